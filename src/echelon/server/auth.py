"""How many documents a key may have scored in a time (pure).

A token bucket: it fills with the rate, holds at most the burst, and each request takes its
documents out. Documents are counted and not requests: they are what a reranker pays for. The time
is an argument; nothing here knows keys, HTTP or the time of day.

API keys: who may ask, under which name, and how much.

Keys are kept as digests and compared in constant time; logs and metrics know names only.
"""

from __future__ import annotations

import hmac
import math
import os
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput, RateLimited, Unauthorised

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}

ROUNDING = 1e-6
"""Parts of a document that do not count: whoever comes when told must not fail by a last digit."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A rate, and how much of it may come at once.

    Attributes:
        rate: documents a second.
        burst: documents that may come at once after a rest.
        words: the rate as it was written.
    """

    rate: float
    burst: float
    words: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.words or f"{self.rate:g}/s"


class TokenBucket:
    """What is left of a limit.

    A request is let in when the bucket holds its documents, or is full; a request larger than the
    burst then leaves a debt, which is paid before the next. So none is too large to ever come in,
    and over any time no more come in than burst, rate and the size of one request allow.

    Args:
        limit: the rate and the burst.
    """

    def __init__(self, limit: RateLimit) -> None:
        self.limit = limit
        self._left = limit.burst
        self._then = -math.inf

    def take(self, documents: int, now: float) -> None:
        """Let a request in.

        Raises:
            RateLimited: not yet; it says when there will be room.
        """
        self.ask(documents, now)
        self._left -= documents

    def ask(self, documents: int, now: float) -> None:
        """Whether a request would be let in; takes nothing.

        Raises:
            RateLimited: not yet.
        """
        self._fill(now)
        missing = min(documents, self.limit.burst) - self._left
        if missing > ROUNDING:
            raise RateLimited(
                f"The key's limit of {self.limit} documents is used up",
                missing / self.limit.rate,
            )

    def give_back(self, documents: int) -> None:
        """A request that was let in here was refused elsewhere: it costs nothing."""
        self._left = min(self.limit.burst, self._left + documents)

    def _fill(self, now: float) -> None:
        if now > self._then:
            new = (now - self._then) * self.limit.rate
            self._left = min(self.limit.burst, self._left + new)
            self._then = now


def limit_of(field: str, rate: str, burst: str | None = None) -> RateLimit:
    """A limit as it is written: ``50/s``, ``3000/min`` or ``100000/h``.

    Args:
        field: where it is written, for messages.
        rate: the rate.
        burst: documents at once; None is what comes in one second, and at least one.

    Raises:
        InvalidInput: it is no rate above zero, or the burst is less than one document.
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
"""Where clients put their key. In ``Authorization`` it stands after ``Bearer``, or alone, as the
TEI client of LlamaIndex sends it."""

ANYBODY = "anybody"
"""The name of all who ask where no keys are known."""

UNLIMITED = "none"
"""A rate that frees a key from the limit of ``--rate-limit``."""

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, as it is written.

    Attributes:
        text: the key itself; never shown.
        name: what logs and metrics call its holder.
        limit: what it may have scored; None is no limit.
    """

    text: str
    name: str
    limit: RateLimit | None = None

    def __repr__(self) -> str:
        return f"Key({self.name})"


@dataclass(frozen=True, slots=True)
class ApiClient:
    """Who asks.

    Attributes:
        name: for logs and metrics.
        bucket: what is left of its limit; None is no limit.
    """

    name: str
    bucket: TokenBucket | None = None


class Keys:
    """The keys that are let in; without any, everyone is, and all share one limit.

    Keys of one name, such as an old and a new one, share a limit.

    Args:
        keys: those that are known.
        common: limit of everybody together, where no key is known.

    Raises:
        InvalidInput: keys of one name have different limits.
    """

    def __init__(self, keys: Iterable[ApiKey] = (), common: RateLimit | None = None) -> None:
        holders: dict[str, ApiClient] = {}
        self._holders: dict[bytes, ApiClient] = {}
        for key in keys:
            holder = holders.setdefault(key.name, _holder(key.name, key.limit))
            if key.limit != (holder.bucket and holder.bucket.limit):
                raise InvalidInput(
                    "--api-keys",
                    f"keys with the name {key.name} have different limits",
                    "Keys of one name share a limit: write the same, or another name.",
                )
            self._holders.setdefault(_digest(key.text), holder)
        self._anybody = _holder(ANYBODY, common)

    def __len__(self) -> int:
        return len(self._holders)

    def holder(self, headers: Mapping[str, str]) -> ApiClient:
        """Who sends a request.

        Every key is compared, so that the time says nothing about which is near.

        Raises:
            Unauthorised: no key, or a wrong one.
        """
        if not self._holders:
            return self._anybody
        given = next((headers[name] for name in HEADERS if name in headers), None)
        if given is None:
            raise Unauthorised("An API key is needed. Send it as 'Authorization: Bearer KEY'.")
        scheme, _, rest = given.strip().partition(" ")
        digest = _digest(rest.strip() if scheme.lower() == "bearer" else given.strip())
        matches = [
            holder for known, holder in self._holders.items() if hmac.compare_digest(digest, known)
        ]
        if not matches:
            raise Unauthorised("The API key is not known here. Send another.")
        return matches[0]


def read_keys(path: str | os.PathLike[str] | None, rate: str | None = None) -> Keys:
    """Keys out of the environment and a file, one a line (``#`` begins a comment).

    A line is ``KEY``, then what else is known of it in any order: ``name=web-shop``,
    ``rate=50/s``, ``burst=200``. A key without a name is called after its place: ``line-3`` of
    the file, ``env-1`` of the environment.

    Args:
        path: the file; None reads the environment only.
        rate: the limit of keys that have none of their own.

    Raises:
        InvalidInput: the file cannot be read, holds no key, or a line is wrong; no message holds
            a key.
    """
    common = None if rate is None else limit_of("--rate-limit", rate)
    texts = [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
    keys = [ApiKey(text, f"env-{number}", common) for number, text in enumerate(texts, 1)]
    if path is None:
        return Keys(keys, common)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("--api-keys", f"cannot be read ({error})", "Give a text file.") from None
    found = [
        _key(words, f"{path}, line {number}", f"line-{number}", common)
        for number, line in enumerate(lines, 1)
        if (words := line.partition("#")[0].split())
    ]
    if not found:
        raise InvalidInput("--api-keys", f"{path} holds no key", "Write one key a line.")
    return Keys([*keys, *found], common)


def _key(words: list[str], where: str, name: str, common: RateLimit | None) -> ApiKey:
    """A line's key and what is said of it."""
    told: dict[str, str] = {}
    for word in words[1:]:
        field, _, value = word.partition("=")
        if field not in {"name", "rate", "burst"} or not value or field in told:
            raise InvalidInput(
                "--api-keys",
                f"{where}: what follows the key is not understood",
                "Write KEY name=NAME rate=50/s burst=200, each at most once.",
            )
        told[field] = value
    name = told.get("name", name)
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "--api-keys", f"{where}: the name is odd", "Use letters, digits, dots and dashes."
        )
    return ApiKey(words[0], name, _limit(told, f"--api-keys: {where}", common))


def _limit(told: dict[str, str], field: str, common: RateLimit | None) -> RateLimit | None:
    rate, burst = told.get("rate"), told.get("burst")
    if burst is not None and rate in {None, UNLIMITED}:
        raise InvalidInput(field, "a burst without a rate limits nothing", "Write rate=50/s too.")
    if rate is None:
        return common
    return None if rate == UNLIMITED else limit_of(field, rate, burst)


def _holder(name: str, limit: RateLimit | None) -> ApiClient:
    return ApiClient(name, None if limit is None else TokenBucket(limit))


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
