"""The limits of the server, each once: its default and the reason for it, its flag and its words.

The flags of ``echelon serve``, the answers to what exceeds a limit, the metric that counts them and
the table in docs/SERVING.md are made from the fields of :class:`ServerLimits`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput, Overloaded, SlowClient, TooLarge, check_positive

if TYPE_CHECKING:
    from collections.abc import Iterator


DEEPEST = 256
"""Largest ``max_json_depth``: the decoder recurses, and Python allows 1,000 calls in all."""


def _limit(default: float, bounds: str, reason: str) -> Any:
    """A limit: what it bounds (the help of its flag), and why its default is what it is."""
    return field(default=default, metadata={"bounds": bounds, "reason": reason})


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one connection, one request and all of them together may take.

    A field's name is its flag's, its environment variable's, its value in the metric
    ``echelon_limit_refusals_total``, and stands in the answer to what exceeds it.
    """

    # Connections.
    max_connections: int = _limit(
        768,
        "Maximum open connections, idle ones and TLS handshakes included.",
        "512 admitted requests have one each, and half as many may be idle; together they stay "
        "below the 1,024 files that a process may usually open",
    )
    handshake_timeout_s: float = _limit(
        10.0,
        "Seconds in which a TLS handshake must end.",
        "a handshake takes two round trips, a second at the worst",
    )
    header_timeout_s: float = _limit(
        10.0,
        "Seconds in which headers must arrive.",
        "headers are one or two packets",
    )
    max_header_kb: float = _limit(
        64.0,
        "Maximum size of a request's first line and headers, in KiB.",
        "browsers send at most some 16 KiB of cookies",
    )
    body_timeout_s: float = _limit(
        30.0,
        "Seconds in which a body must arrive.",
        "the largest body at 10 Mbit/s",
    )
    send_timeout_s: float = _limit(
        30.0,
        "Seconds in which a client must read some of its response.",
        "longer than a network stays silent; clients that never read free their connection",
    )
    # One request.
    max_body_mb: float = _limit(
        32.0,
        "Maximum size of a body, in MiB.",
        "10,000 documents of 500 tokens are 20 to 30 MB",
    )
    max_json_depth: int = _limit(
        32,
        "Maximum depth of a body's JSON.",
        "no API needs more than five levels; the rest is for fields of documents",
    )
    max_json_values: int = _limit(
        250_000,
        "Maximum values in a body's JSON.",
        "10,000 documents of 20 fields",
    )
    max_documents: int = _limit(
        10_000,
        "Maximum documents of a request.",
        "Cohere's API allows as many",
    )
    max_rank_fields: int = _limit(
        64,
        "Maximum names in rank_fields.",
        "documents have fewer fields; the names are looked up in every document",
    )
    max_characters: int = _limit(
        32 * 2**20,
        "Maximum characters of a request's texts, after rank_fields are joined.",
        "as many as the largest body can hold",
    )
    # All requests together, and their end.
    drain_s: float = _limit(
        30.0,
        "Seconds to answer accepted requests at shutdown.",
        "Kubernetes waits as long before it kills",
    )
    max_bodies_mb: float = _limit(
        128.0,
        "Maximum size of all requests' bodies and texts in memory together, in MiB.",
        "four of the largest requests, or 512 of 256 KiB",
    )

    def __post_init__(self) -> None:
        check_positive(**{one.name: getattr(self, one.name) for one in fields(self)})
        if self.max_json_depth > DEEPEST:
            problem = f"{self.max_json_depth} is more than Python can read"
            raise InvalidInput("max_json_depth", problem, f"Give {DEEPEST} or less.")
        if self.max_body_mb > self.max_bodies_mb:
            raise InvalidInput(
                "max_body_mb",
                f"{self.max_body_mb:g} is more than max_bodies_mb={self.max_bodies_mb:g}, so the "
                "largest body would never be accepted",
                "Raise max_bodies_mb too.",
            )

    @classmethod
    def of(cls, settings: dict[str, Any]) -> ServerLimits:
        """The limits among settings of ``echelon serve``."""
        return cls(**{name: settings[name] for name in NAMES})

    @property
    def max_header_bytes(self) -> int:
        """Bytes of a request's first line and headers."""
        return int(self.max_header_kb * 2**10)

    @property
    def max_body_bytes(self) -> int:
        """Bytes of a body."""
        return int(self.max_body_mb * 2**20)

    @property
    def max_bodies_bytes(self) -> int:
        """Bytes of all requests' bodies and texts in memory together."""
        return int(self.max_bodies_mb * 2**20)

    def exceeded(self, limit: str, where: str, value: str) -> TooLarge:
        """The error for a part of a request that exceeds a limit.

        Args:
            limit: name of the limit.
            where: the part, such as ``documents``.
            value: what it has, with its unit, such as ``10_001 documents``.
        """
        remedy = f"Send less at a time, or start the server with a larger {flag_of(limit)}."
        error = TooLarge(where, f"{value} are more than {self._shown(limit)}", remedy)
        error.limit = limit
        return error

    def full(self, limit: str, what: str, retry_after_s: float) -> Overloaded:
        """The error for a request that finds used up what all requests share, such as memory."""
        error = Overloaded(f"The {what} ({self._shown(limit)}) is used up", retry_after_s)
        error.limit = limit
        return error

    def too_slow(self, limit: str, what: str) -> SlowClient:
        """The error for a part of a request, such as ``The body``, that did not come in time."""
        error = SlowClient(f"{what} did not come within {self._shown(limit)}. Send it faster.")
        error.limit = limit
        return error

    def _shown(self, limit: str) -> str:
        value = getattr(self, limit)
        return f"{limit}={value:_}" if isinstance(value, int) else f"{limit}={value:g}"


def flag_of(name: str) -> str:
    """The flag of a limit or setting: ``--max-body-mb``."""
    return "--" + name.replace("_", "-")


def described() -> Iterator[tuple[str, float, str, str]]:
    """Each limit: its name, default, what it bounds, and the reason for the default."""
    for one in fields(ServerLimits):
        default: Any = one.default
        yield one.name, default, one.metadata["bounds"], one.metadata["reason"]


NAMES = tuple(one.name for one in fields(ServerLimits))
"""Names of the limits."""
