"""Results from threads for those who await them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio

Result = TypeVar("Result")


def resolve(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Result], value: Result) -> None:
    """Give a future its value from another thread, unless nobody waits any more."""

    def give() -> None:
        if not future.done():
            future.set_result(value)

    with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
        loop.call_soon_threadsafe(give)
