"""What every request must satisfy before a route reads it: its host and its type of content.

Both checks keep pages of other sites out, which a user's browser may show while it can reach this
server. Such a page cannot send JSON without the browser asking the server first (CORS). It can ask
under a host name of its own that it has made lead to this server (DNS rebinding), but it then sends
that name.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput, Malformed, Misdirected, UnsupportedMediaType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ANY_HOST = "*"
"""``--allowed-hosts`` with this value allows every name."""

_HOST = re.compile(r"(?:\[([^\]]*)\]|([^\[\]:]*))(?::\d*)?")
"""The Host header: an IPv6 address in brackets, or a name or IPv4 address; then perhaps a port."""

_NAME = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", re.IGNORECASE)
"""A name that ``--allowed-hosts`` may hold: ``rank.example.org``, or with ``*.`` all below it."""

_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Hosts:
    """The host names under which a server answers; None are all names.

    IP addresses are always allowed: nobody else can make them lead here.
    """

    names: frozenset[str] | None = None

    @classmethod
    def of(cls, address: str, allowed: Iterable[str]) -> Hosts:
        """The names of a server that listens on an address.

        Without ``--allowed-hosts``, a server that only this machine reaches has the names of the
        loopback alone. One that other machines reach was exposed on purpose and is called by names
        that it cannot know, so it answers to all.
        """
        allowed = tuple(allowed)
        if ANY_HOST in allowed or not (allowed or is_loopback(address)):
            return cls()
        names = ("localhost", "*.localhost", address, *map(_checked, allowed))
        return cls(frozenset(map(_normal, names)))

    def check(self, headers: Iterable[tuple[bytes, bytes]], version: str) -> None:
        """Check the host of a request by its headers and its version of HTTP.

        Raises:
            Malformed: there is none, or more than one. HTTP/1.0, used by no browser, needs none.
            Misdirected: it is not a name of this server.
        """
        given = [value for name, value in headers if name == b"host"]
        if len(given) > 1 or (not given and version != "1.0"):
            problem = f"was sent {len(given)} times"
            raise Malformed("Host", problem, "Send this header once.")
        if self.names is not None and given and not self._allows(given[0].decode("latin-1")):
            problem = "is not a name of this server"
            remedy = "Ask for localhost or an IP address, or start it with --allowed-hosts NAME."
            raise Misdirected("Host", problem, remedy)

    def _allows(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None or self.names is None:
            return False
        name = _normal(found[1] or found[2] or "")
        below = (one[1:] for one in self.names if one.startswith("*."))
        return name in self.names or _is_address(name) or any(map(name.endswith, below))


def check_json(headers: Mapping[str, str]) -> None:
    """Check that a body is announced as JSON, by its headers (names in lower case).

    Raises:
        UnsupportedMediaType: it is announced as something else, or not at all.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip()
    if not _JSON.fullmatch(kind):
        problem = f"is {kind!r}" if kind else "is missing"
        remedy = "Send application/json (with curl: -H 'Content-Type: application/json')."
        raise UnsupportedMediaType("Content-Type", problem, remedy)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _normal(name: str) -> str:
    return name.lower().removesuffix(".")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name.removesuffix(".")) and not _is_address(name):
        problem = f"{name!r} is no host name"
        remedy = (
            "Give names without scheme and port: rank.example.org, *.example.org, or * for all."
        )
        raise InvalidInput("--allowed-hosts", problem, remedy)
    return name
