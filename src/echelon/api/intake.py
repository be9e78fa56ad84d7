"""A request's body, as long and as slow as the rules allow."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from echelon.api.wire import priority_of
from echelon.errors import InvalidInput, SlowClient, TooLarge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

    from echelon.api.house import Rules
    from echelon.scheduling.fair_queue import Priority

TIMEOUT_HEADER = "x-request-timeout-ms"
PRIORITY_HEADER = "x-request-priority"


async def read_body(request: Request, rules: Rules) -> bytes:
    """The whole body.

    Raises:
        TooLarge: it is longer than allowed; what comes after that is not read.
        SlowClient: it did not come in time.
        starlette.requests.ClientDisconnect: the client went away.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > rules.max_body_bytes:
        raise _too_large(rules)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(rules.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > rules.max_body_bytes:
                    raise _too_large(rules)
                chunks.append(part)
    except TimeoutError:
        raise SlowClient(
            f"The body did not come within {rules.body_timeout_s:g} s. Send it faster."
        ) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def timeout_of(headers: Mapping[str, str], timeout_ms: float | None) -> float | None:
    """Seconds that the caller gives us, out of the body or the header; None is no limit.

    Raises:
        InvalidInput: no positive number.
    """
    field = "timeout_ms"
    if timeout_ms is None and TIMEOUT_HEADER in headers:
        field = "X-Request-Timeout-Ms"
        try:
            timeout_ms = float(headers[TIMEOUT_HEADER])
        except ValueError:
            timeout_ms = -1.0
    if timeout_ms is None:
        return None
    if not 0 < timeout_ms < float("inf"):
        raise InvalidInput(field, "is no positive number of milliseconds", "Give 1 or more.")
    return timeout_ms / 1000


def priority_asked(headers: Mapping[str, str], priority: Priority | None) -> Priority:
    """Share of the device that the caller asks for, in the body or the header.

    Raises:
        InvalidInput: the header has an unknown name.
    """
    if priority is None:
        priority = priority_of(headers.get(PRIORITY_HEADER), "X-Request-Priority")
    return priority or "normal"


def _too_large(rules: Rules) -> TooLarge:
    return TooLarge(
        "body",
        f"is longer than {rules.max_body_bytes} bytes",
        "Send fewer documents at a time, or start the server with a larger --max-body-mb.",
    )
