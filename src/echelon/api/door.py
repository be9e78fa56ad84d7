"""What stands before every route: the request's id, and the words of a start that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from echelon.api.logs import ID_HEADER, id_of, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Door:
    """Gives each request its id and each answer that id.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's scope; see ASGI."""
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        else:
            await self.app(scope, receive, _wordless(send))

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = id_of(Headers(scope=scope))
        token = request_id.set(number)
        header = (ID_HEADER.encode(), number.encode())

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[Any] = message["headers"]
                message["headers"] = [*headers, header]
            await send(message)

        try:
            await self.app(scope, receive, signed)
        finally:
            request_id.reset(token)


def _wordless(send: Send) -> Send:
    """A failed start without its traceback: whoever started the server reports the error."""

    async def sent(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            message = {"type": message["type"]}
        await send(message)

    return sent
