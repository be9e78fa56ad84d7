"""A server on a real port in a thread of this process, on the fake scorer, and a browser for it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading
from urllib.parse import urlsplit

import pytest
import uvicorn
from services import GUARD_S, service

from echelon.engine.events import ListenerGroup
from echelon.server.app import make_app
from echelon.server.context import ServerContext
from echelon.server.dashboard import RollingStats
from echelon.server.metrics import Metrics

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SLICE_S = 0.25
"""Eight times as fast as it is served, so that tests see slices end."""


class Site:
    """The server.

    Attributes:
        port: of the loopback.
        context: the server's context; None before the start.
    """

    def __init__(self, port=0, access=None, root="", **settings):
        self.context = None
        self._access, self._root, self._settings = access, root, settings
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self._up = threading.Event()
        self._server = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}{self._root}"

    def __enter__(self):
        self._thread.start()
        assert self._up.wait(GUARD_S)
        return self

    def __exit__(self, *exc):
        self._server.should_exit = True
        self._thread.join(GUARD_S)
        assert not self._thread.is_alive()
        self._socket.close()

    async def _serve(self):
        metrics, stats = Metrics(), RollingStats(SLICE_S)

        async def launch():
            made = service(listener=ListenerGroup(metrics, stats), **self._settings)
            await made.start()
            return made

        self.context = ServerContext(launch, "the-model", metrics, access=self._access, stats=stats)
        app = make_app(self.context)
        config = uvicorn.Config(app, log_config=None, lifespan="on", root_path=self._root)
        self._server = uvicorn.Server(config)
        asyncio.get_running_loop().call_soon(self._watch)
        await self._server.serve(sockets=[self._socket])

    def _watch(self):
        if self._server.started:
            self._up.set()
        else:
            asyncio.get_running_loop().call_later(0.01, self._watch)


@contextlib.contextmanager
def chromium():
    """The system's Chromium; nothing is downloaded."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on this machine (on Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visit(browser, url, *, tolerated="never", strip="", **settings):
    """A tab of its own; it must not ask other servers, raise or complain.

    ``strip`` is the path that a proxy takes off before the server sees an address.
    """
    context = browser.new_context(**settings)
    page = context.new_page()
    page.set_default_timeout(20_000)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if m.type != "log" else None)
    if strip:
        page.route(
            "**/*", lambda route: route.continue_(url=route.request.url.replace(strip, "", 1))
        )
    page.goto(url)
    try:
        yield page
    finally:
        context.close()
    assert {urlsplit(address).netloc for address in asked} == {urlsplit(page.url).netloc}
    assert [words for words in complaints if tolerated not in words] == []


def fits(page):
    """Whether nothing has to be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
