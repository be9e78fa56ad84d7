"""Logs: one JSON object a line, or plain lines for people; each knows the request it is about."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import warnings
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Mapping

ID_HEADER = "x-request-id"

request_id: ContextVar[str] = ContextVar("echelon_request_id", default="")
"""The id of the request that the running task is about; empty outside of one."""

_SOUND = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def id_of(headers: Mapping[str, str]) -> str:
    """The caller's id for its request where it is a sound one, else a new one."""
    given = headers.get(ID_HEADER, "")
    return given if _SOUND.fullmatch(given) else uuid4().hex


class JsonLines(logging.Formatter):
    """A record as one line of JSON.

    Keys: ``time`` (UTC, milliseconds), ``level``, ``logger``, ``message``, ``request_id`` in a
    request, ``error`` with a traceback, and what the record's ``facts`` hold.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if number := request_id.get():
            line["request_id"] = number
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        line |= getattr(record, "facts", {})
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up(style: str, level: str) -> None:
    """Send the logs of Echelon, the HTTP server and the exporter of traces to standard error.

    Args:
        style: ``json`` or ``text``.
        level: the lowest level that is written, such as ``info``.
    """
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if style == "json" else plain)
    for name in ("echelon", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    warnings.showwarning = _log_warning
    # What it says at info (started, waiting) is said by us or is of no use in production.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logger.level))


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a line of the log, so that a reader of JSON meets nothing else."""
    logging.getLogger("echelon").warning("%s", message)
