"""Playground and dashboard as they are served: who may see what, headers, files, addresses."""

from __future__ import annotations

import asyncio
import gzip
import re
from html.parser import HTMLParser

import httpx
import pytest
from served import ASKED, run_app
from services import until

from echelon.engine.events import ServiceSnapshot
from echelon.reports import PLOTLY_VERSION
from echelon.server.app import make_app
from echelon.server.auth import Access, ApiKey, Keys
from echelon.server.context import ServerContext
from echelon.server.dashboard import RollingStats
from echelon.server.metrics import Metrics
from echelon.server.pages import (
    FILES,
    FOLDER,
    FOLDERS,
    PLOTLY,
    POLICIES,
    TRANSLATED,
    language_of,
    takes_gzip,
)

PAGES = ("/", "/dashboard")
SECRET = {"Authorization": "Bearer sesame"}
PLAIN = {"Accept-Encoding": "identity"}


class Tags(HTMLParser):
    """Tags with their attributes, and what stands inside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.inline, self._open = [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open in {"script", "style"}:
            self.inline += data

    def addresses(self):
        found = (attrs.get("src") or attrs.get("href") for _, attrs in self.tags)
        return [address for address in found if address and not address.startswith("#")]


# The pages.


@pytest.mark.parametrize("path", [*PAGES, "/docs"])
def test_a_page_runs_only_files_of_this_server(path):
    async def main(client, server):
        response = await client.get(path)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        policy = response.headers["Content-Security-Policy"]
        rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
        assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"] == rules["connect-src"] == "'self'"
        assert "http" not in policy
        assert ("unsafe" in policy) == (path != "/")
        page = Tags(response.text)
        assert page.inline == ""
        for _, attrs in page.tags:
            assert not {name for name in attrs if name.startswith("on") or name == "style"}
        assert len(page.addresses()) >= 8
        for address in page.addresses():
            assert address.startswith("/")
            assert (await client.get(address)).status_code == 200, address

    run_app(main)


def test_pages_need_no_key_and_data_needs_one():
    async def main(client, server):
        for path in PAGES:
            page = await client.get(path)
            assert page.status_code == 200
            assert 'data-keys="yes"' in page.text
            assert "the-model" not in page.text
        assert (await client.get(f"/pages/{PLOTLY}")).status_code == 200
        refused = await client.get("/dashboard/data")
        assert refused.status_code == 401
        assert "API key" in refused.json()["message"]
        wrong = {"Authorization": "Bearer wrong"}
        assert (await client.get("/dashboard/data", headers=wrong)).status_code == 401
        allowed = await client.get("/dashboard/data", headers=SECRET)
        assert allowed.status_code == 200
        assert allowed.headers["Cache-Control"] == "no-store"

    run_app(main, access=Access(Keys([ApiKey("sesame", "tests")])))


def test_the_path_that_a_proxy_puts_before_is_in_every_address():
    async def main(client, server):
        app = make_app(server)
        for path in PAGES:
            behind = httpx.ASGITransport(app, root_path='/a"b/')
            async with httpx.AsyncClient(transport=behind, base_url="http://test") as proxied:
                page = Tags((await proxied.get(path)).text)
            assert page.tags[0][1]["data-root"] == '/a"b'
            assert all(address.startswith('/a"b/') for address in page.addresses())
        assert 'data-keys="no"' in (await client.get("/")).text

    run_app(main)


def test_other_methods_and_unknown_paths_get_404_or_405():
    async def main(client, server):
        posted = await client.post("/", json=ASKED)
        assert (posted.status_code, posted.json()["error_type"]) == (405, "Validation")
        assert posted.headers["Allow"] == "GET, HEAD"
        lost = await client.get("/nothing")
        assert lost.status_code == 404
        assert "/nothing" in lost.json()["message"]
        assert (await client.post("/dashboard")).status_code == 405
        assert (await client.head("/")).status_code == 200

    run_app(main)


# Languages.


@pytest.mark.parametrize(
    ("accepted", "asked", "language"),
    [
        ("", None, "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", None, "zh"),
        ("ZH-hant-tw", None, "zh"),
        ("en;q=0.5, zh;q=0.7", None, "zh"),
        ("en;q=0.7, zh;q=0.5", None, "en"),
        ("fr, de;q=0.9, *;q=0.5", None, "en"),
        ("fr, zh;q=0.2", None, "zh"),
        ("zh;q=0, en", None, "en"),
        ("zh;q=0", None, "en"),
        ("zh;q=much", None, "zh"),
        ("en", "zh", "zh"),
        ("zh", "en", "en"),
    ],
)
def test_the_language_is_the_asked_one_else_the_browsers(accepted, asked, language):
    assert language_of({"accept-language": accepted}, asked) == language


@pytest.mark.parametrize("path", [*PAGES, "/docs", "/openapi.json"])
def test_an_address_answers_in_each_language_and_says_so(path):
    chinese = {"Accept-Language": "zh-CN"}

    async def main(client, server):
        plain = await client.get(path)
        assert not re.search("[\u4e00-\u9fff]", plain.text)
        assert "data-texts" not in plain.text
        found = await client.get(path, headers=chinese)
        assert re.search("[\u4e00-\u9fff]", found.text)
        assert plain.headers["Vary"] == found.headers["Vary"] == "Accept-Language"
        assert (await client.get(path)).text == plain.text
        server.language = "en"
        assert (await client.get(path, headers=chinese)).text == plain.text
        server.language = "zh"
        assert (await client.get(path)).text == found.text

    run_app(main)


def test_scripts_translate_literals_only():
    """What is not written out in a call is not found, and so has no translation."""
    scripts = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js"))
    others = re.findall(r"\b(?:tr|plural)\(([\w\"'`]+)", TRANSLATED.sub("", scripts))
    assert sorted(others) == ["count", "name"]  # of plural itself, and of names in the data


# Files.


def test_files_are_compressed_tagged_and_not_sent_twice():
    async def main(client, server):
        for name in sorted(FILES):
            path = f"/pages/{name}"
            plain = await client.get(path, headers=PLAIN)
            assert "Content-Encoding" not in plain.headers
            assert plain.content == (FOLDER / name).read_bytes()
            small = await client.get(path, headers={"Accept-Encoding": "br, gzip"})
            assert small.content == plain.content
            assert plain.headers["Cache-Control"] == "no-cache"
            assert plain.headers["X-Content-Type-Options"] == "nosniff"
            assert "charset=utf-8" in plain.headers["Content-Type"]
            again = await client.get(
                path, headers={**PLAIN, "If-None-Match": plain.headers["ETag"]}
            )
            assert (again.status_code, again.content) == (304, b"")
            other = await client.get(path, headers={**PLAIN, "If-None-Match": '"other"'})
            assert other.status_code == 200

    run_app(main)


def test_plotly_is_served_compressed_and_cached():
    async def main(client, server):
        request = client.build_request("GET", f"/pages/{PLOTLY}")
        request.headers["Accept-Encoding"] = "gzip"
        response = await client.send(request, stream=True)
        raw = b"".join([part async for part in response.aiter_raw()])
        await response.aclose()
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Vary"] == "Accept-Encoding"
        assert "immutable" in response.headers["Cache-Control"]
        script = gzip.decompress(raw)
        assert f"plotly.js (basic - minified) v{PLOTLY_VERSION}\n".encode() in script[:500]
        assert len(raw) < len(script) / 2
        plain = await client.get(f"/pages/{PLOTLY}", headers=PLAIN)
        assert plain.content == script
        assert plain.headers["ETag"] != response.headers["ETag"]

    run_app(main)


def test_nothing_else_of_the_folder_is_served():
    async def main(client, server):
        pages, other = ("__init__.py", "playground.html.j2", "index.html"), ("..%2Fapp.py", "%00")
        for name in (*pages, *other, "none.js", "theme.js%0A", "swagger-initializer.js"):
            for folder in FOLDERS:
                response = await client.get(f"{folder}/{name}")
                assert response.status_code == 404
                assert "There is no GET" in response.json()["message"]

    run_app(main)


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        ("gzip", True),
        ("br;q=1, GZIP;q=0.2", True),
        ("*", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("identity", False),
        ("", False),
    ],
)
def test_clients_that_accept_gzip(accepted, takes):
    assert takes_gzip({"accept-encoding": accepted}) is takes
    assert not takes_gzip({})


def test_the_pages_need_no_other_server_and_stay_readable():
    sources = [path for path in FOLDER.iterdir() if path.suffix in {".j2", ".css", ".js", ".svg"}]
    assert {path.name.removesuffix(".j2") for path in sources} == FILES | set(POLICIES)
    for path in sources:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) < 400, path.name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", source)
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", source)) - {"http://www.w3.org"}
        assert addresses == set(), path.name


# The data.


def test_data_counts_events_of_routes_and_service():
    async def main(client, server):
        for _ in range(3):
            assert (await client.post("/v2/rerank", json=ASKED)).status_code == 200
        assert (await client.post("/v2/rerank", json={})).status_code == 422
        stats = server.stats

        def counted():
            return sum(past.counts["http", "422"] for past in stats.view().slices)

        await until(lambda: counted() and stats.view().slices[-1].state is not None)
        data = (await client.get("/dashboard/data")).json()
        assert data["model"] == "the-model"
        assert data["scorer"] == {"family": "fake", "device": "cpu", "precision": "fp32"}
        assert data["window"]["counts"]["http"] == {"200": 3, "422": 1}
        assert data["window"]["counts"]["outcome"]["answered"] == 3
        seconds = data["window"]["seconds"]
        assert data["window"]["documents_per_s"] * seconds == pytest.approx(15, rel=0.01)
        assert data["window"]["tokens_per_s"] > 0
        assert data["window"]["p50_s"] > 0
        assert data["now"]["token_budget"] == 2048
        assert data["columns"]["token_budget"][-1] == 2048
        assert [worker["name"] for worker in data["workers"]] == ["up"]
        assert data["steps"]["recent"]

    run_app(main, slice_s=0.05)


def test_data_before_the_start():
    async def main():
        server = ServerContext(lambda: None, "m", Metrics())
        transport = httpx.ASGITransport(make_app(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            data = (await client.get("/dashboard/data")).json()
        assert data["now"] is data["scorer"] is None
        assert data["minute"]["p99_s"] is None
        assert (data["workers"], data["events"]) == ([], [])

    asyncio.run(main())


def test_sampling_continues_until_the_end():
    class Sampled(RollingStats):
        samples = 0

        def sampled(self, state):
            assert isinstance(state, ServiceSnapshot)
            self.samples += 1
            raise RuntimeError("an error in one sample does not end the others")

    stats = Sampled(0.01)

    async def main(client, server):
        await until(lambda: stats.samples > 3)
        assert not server._sampling.done()
        await server.close()
        assert server._sampling.cancelled()

    run_app(main, stats=stats)
