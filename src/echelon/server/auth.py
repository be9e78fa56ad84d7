"""API keys and their rate limits.

Keys are stored as digests and compared in constant time; logs and metrics hold names only. A rate
limit is a token bucket of documents, since documents, not requests, are the work of a reranker. The
time is an argument.
"""

from __future__ import annotations

import hmac
import logging
import math
import os
import re
import stat
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput, RateLimited, Unauthorised
from echelon.server.http_checks import Hosts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

logger = logging.getLogger(__name__)

_RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}

ROUNDING = 1e-6
"""Part of a document that is ignored: a client that waits for Retry-After must not be refused
because of rounding."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Documents a second, and documents that may come at once after a pause."""

    rate: float
    burst: float
    words: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.words or f"{self.rate:g}/s"


class TokenBucket:
    """The documents that a limit still allows.

    A request is admitted when the bucket holds its documents, or is full. A request larger than the
    burst makes the bucket negative, and it must fill again before the next. So every request can be
    admitted, and over any time at most burst + rate × time + the size of one request are.
    """

    def __init__(self, limit: RateLimit) -> None:
        self.limit = limit
        self._left = limit.burst
        self._then = -math.inf

    def take(self, documents: int, now: float) -> None:
        """Admit a request, or raise as :meth:`check` does."""
        self.check(documents, now)
        self._left -= documents

    def check(self, documents: int, now: float) -> None:
        """Check that a request would be admitted.

        Raises:
            RateLimited: the bucket holds too little; the error says when it will hold enough.
        """
        if now > self._then:
            new = (now - self._then) * self.limit.rate
            self._left = min(self.limit.burst, self._left + new)
            self._then = now
        missing = min(documents, self.limit.burst) - self._left
        if missing > ROUNDING:
            problem = f"The key's limit of {self.limit} documents is used up"
            raise RateLimited(problem, missing / self.limit.rate)

    def give_back(self, documents: int) -> None:
        """Return the documents of a request that the service did not have to read or score."""
        self._left = min(self.limit.burst, self._left + documents)


def limit_of(field: str, rate: str, burst: str | None = None) -> RateLimit:
    """Parse a limit such as ``50/s``, ``3000/min`` or ``100000/h``.

    The burst is by default the documents of one second, and at least one.
    """
    found = _RATE.fullmatch(rate)
    if found is None or not float(found[1]) > 0:
        raise InvalidInput(field, f"{rate!r} is no rate", "Write 50/s or 900/min.")
    each_second = float(found[1]) / _SECONDS[found[2]]
    if burst is None:
        return RateLimit(each_second, max(1.0, each_second), rate)
    if not burst.isdecimal() or int(burst) < 1:
        raise InvalidInput(field, f"burst={burst!r} is no count", "Write 1 document or more.")
    return RateLimit(each_second, float(burst), rate)


VARIABLE = "ECHELON_API_KEYS"
"""Environment variable with keys, separated by commas."""

HEADERS = ("authorization", "x-api-key", "api-key")
"""Headers that may hold the key. In ``Authorization`` it stands after ``Bearer``, or alone, as the
TEI client of LlamaIndex sends it."""

ANONYMOUS = "anybody"
"""Name of every client of a server without keys."""

UNLIMITED = "none"
"""The rate of a key without the limit of ``--rate-limit``."""

ATTRIBUTES = ("name", "rate", "burst")
"""What may follow a key on its line."""

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_KEY = re.compile(r"[!#-&(-+\--~]+")  # visible ASCII without comma and quotes
_COMMENT = re.compile(r"(?:^|\s)#.*")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, which is never shown, and its name in logs and metrics."""

    text: str
    name: str
    limit: RateLimit | None = None

    def __repr__(self) -> str:
        return f"Key({self.name})"


@dataclass(frozen=True, slots=True)
class ApiClient:
    """The owner of one or more keys; without a bucket it has no limit."""

    name: str
    bucket: TokenBucket | None = None


class Keys:
    """The keys that a server accepts; without any, every client is accepted and all share a limit.

    Keys of one name, such as an old and a new one, share a limit. ``common`` is the limit of all
    clients together, for a server without keys.
    """

    def __init__(self, keys: Iterable[ApiKey] = (), common: RateLimit | None = None) -> None:
        by_name: dict[str, ApiClient] = {}
        self._clients: dict[bytes, ApiClient] = {}
        for key in keys:
            client = by_name.setdefault(key.name, _client(key.name, key.limit))
            if key.limit != (client.bucket and client.bucket.limit):
                problem = f"keys with the name {key.name} have different limits"
                remedy = "Keys of one name share a limit: write the same, or another name."
                raise InvalidInput("--api-keys", problem, remedy)
            same = self._clients.setdefault(_digest(key.text), client)
            if same is not client:
                problem = f"{same.name} and {client.name} are the same key"
                raise InvalidInput("--api-keys", problem, "Write each key once.")
        self._anonymous = _client(ANONYMOUS, common)

    def __len__(self) -> int:
        return len(self._clients)

    def authenticate(self, headers: Mapping[str, str]) -> ApiClient:
        """Find the client that sends a request.

        Every key is compared, so that the time reveals nothing about the keys.

        Raises:
            Unauthorised: no key, or a wrong one.
        """
        if not self._clients:
            return self._anonymous
        given = next((headers[name] for name in HEADERS if name in headers), None)
        if given is None:
            raise Unauthorised("An API key is needed. Send it as 'Authorization: Bearer KEY'.")
        scheme, _, rest = given.strip().partition(" ")
        digest = _digest(rest.strip() if scheme.lower() == "bearer" else given.strip())
        matches = [
            client for known, client in self._clients.items() if hmac.compare_digest(digest, known)
        ]
        if not matches:
            raise Unauthorised("The API key is not known here. Send another.")
        return matches[0]


@dataclass(frozen=True, slots=True)
class Access:
    """Who may send requests: owners of API keys, pages of web origins (CORS), for which hosts."""

    keys: Keys = field(default_factory=Keys)
    origins: tuple[str, ...] = ()
    hosts: Hosts = field(default_factory=Hosts)


def read_keys(path: str | os.PathLike[str] | None, rate: str | None = None) -> Keys:
    """Read keys from the environment and from a file, one a line.

    A line is ``KEY``, then in any order ``name=web-shop``, ``rate=50/s``, ``burst=200``. A comment
    begins with ``#`` at the start of a line or after a space. A key without a name is named after
    its place: ``line-3`` of the file, ``env-1`` of the environment. ``rate`` is the limit of keys
    that have none of their own.

    Raises:
        InvalidInput: anything is unclear. The error names the line, and shows neither keys nor the
            name of the file, which may be a key that was given in its place.
    """
    common = None if rate is None else limit_of("--rate-limit", rate)
    keys = list(_keys_of_environment(common))
    if path is not None:
        found = [
            _key(words, f"line {number}", f"line-{number}", common)
            for number, line in enumerate(_lines(path), 1)
            if (words := _COMMENT.sub("", line).split())
        ]
        if not found:
            raise InvalidInput("--api-keys", "the file holds no key", "Write one key a line.")
        keys += found
    return Keys(keys, common)


def _keys_of_environment(common: RateLimit | None) -> Iterator[ApiKey]:
    value = os.environ.get(VARIABLE, "").strip()
    texts = [text for part in value.split(",") if (text := part.strip())]
    if value and not texts:
        raise InvalidInput(VARIABLE, "holds no key", "Separate keys by commas, or leave it empty.")
    for number, text in enumerate(texts, 1):
        yield ApiKey(_checked(text, VARIABLE, f"key {number}"), f"env-{number}", common)


def _lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a key file, without the byte-order mark that some editors write."""
    try:
        with Path(path).open("rb") as file:
            _warn_of_others(file.fileno(), path)
            content = file.read()
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        problem = f"line {number}: is no text in UTF-8"
        raise InvalidInput("--api-keys", problem, "Save the file as UTF-8.") from None
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or "no file can have this name"
        remedy = f"Give the name of a text file; keys themselves go into {VARIABLE}."
        raise InvalidInput("--api-keys", f"cannot be read ({words})", remedy) from None
    return [line.removesuffix("\r") for line in lines]


def _warn_of_others(descriptor: int, path: str | os.PathLike[str]) -> None:
    """Warn if other users of this machine may read or change a key file.

    The server's group may read a file of root's: so are Secrets mounted in Kubernetes.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not hasattr(os, "geteuid"):
        return
    mode, mounted = stat.S_IMODE(status.st_mode), status.st_uid == 0 != os.geteuid()
    may = "Other users of this machine may %s the API keys in %s (mode %o). Run chmod 600 on it."
    if mode & 0o022:
        logger.error(may, "read and change", path, mode)
    elif mode & (0o004 if mounted else 0o044):
        logger.warning(may, "read", path, mode)


def _key(words: list[str], where: str, name: str, common: RateLimit | None) -> ApiKey:
    text = _checked(words[0], "--api-keys", where)
    given: dict[str, str] = {}
    for word in words[1:]:
        field, _, value = word.partition("=")
        if field not in ATTRIBUTES or not value or field in given:
            problem = f"{where}: the words after the key are not understood"
            remedy = "Write KEY name=NAME rate=50/s burst=200, each at most once."
            raise InvalidInput("--api-keys", problem, remedy)
        given[field] = value
    name = given.get("name", name)
    if not _NAME.fullmatch(name):
        problem = f"{where}: the name is not allowed"
        raise InvalidInput("--api-keys", problem, "Use letters, digits, dots and dashes.")
    field, rate, burst = f"--api-keys: {where}", given.get("rate"), given.get("burst")
    if rate not in {None, UNLIMITED}:
        return ApiKey(text, name, limit_of(field, rate, burst))
    if burst is not None:
        raise InvalidInput(field, "a burst without a rate limits nothing", "Write rate=50/s too.")
    return ApiKey(text, name, common if rate is None else None)


def _checked(text: str, field: str, where: str) -> str:
    """A key, if a client can send it and nobody can take it for something else."""
    if text.partition("=")[0] in ATTRIBUTES:
        raise InvalidInput(field, f"{where}: has no key", "Write the key first: KEY name=NAME.")
    if not _KEY.fullmatch(text):
        problem = f"{where}: the key has characters that are not allowed"
        remedy = "Use visible ASCII characters without commas and quotes: headers carry no others."
        raise InvalidInput(field, problem, remedy)
    return text


def _client(name: str, limit: RateLimit | None) -> ApiClient:
    return ApiClient(name, None if limit is None else TokenBucket(limit))


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
