"""Why the server ends a connection by itself, and what it then responds."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Literal

Reason = Literal[
    "too_many",
    "displaced",
    "slow_handshake",
    "bad_handshake",
    "slow_headers",
    "large_headers",
    "trailers",
    "pipelined",
    "small_chunks",
    "malformed",
    "slow_reader",
]
"""Why the server ends a connection."""

EXCEEDED: dict[Reason, str] = {
    "too_many": "max_connections",
    "displaced": "max_connections",
    "slow_handshake": "handshake_timeout_s",
    "slow_headers": "header_timeout_s",
    "large_headers": "max_header_kb",
    "slow_reader": "send_timeout_s",
}
"""The limit that was exceeded, for the reasons that have one."""

STATUSES: dict[Reason, HTTPStatus] = {
    "too_many": HTTPStatus.SERVICE_UNAVAILABLE,
    "slow_headers": HTTPStatus.REQUEST_TIMEOUT,
    "large_headers": HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "trailers": HTTPStatus.BAD_REQUEST,
    "pipelined": HTTPStatus.BAD_REQUEST,
    "small_chunks": HTTPStatus.BAD_REQUEST,
    "malformed": HTTPStatus.BAD_REQUEST,
}
"""Status of the response, for the reasons that have one."""


def response(reason: Reason, words: str) -> bytes:
    """The whole response of a connection that ends, in JSON."""
    status = STATUSES[reason]
    body = json.dumps({"message": words, "detail": words}).encode()
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(["retry-after: 1"] if status is HTTPStatus.SERVICE_UNAVAILABLE else []),
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
