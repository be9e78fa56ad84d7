"""The dashboard in Chromium: moving numbers, keys, a server that goes away and comes back."""

from __future__ import annotations

import contextlib
import threading

import httpx
import pytest
from services import GUARD_S
from website import Site, chromium, fits, visit

from echelon.scheduling.cost_model import Drift
from echelon.server.auth import Access, ApiKey, Keys

COLOURS = """[getComputedStyle(document.body).backgroundColor,
document.getElementById('documents')._fullLayout.font.color]"""
NUMBER = "Number(document.querySelector('#tiles dd').textContent.replace(',', ''))"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


class Load:
    """Asks a server again and again, in a thread; every fourth request is wrong."""

    def __init__(self, site):
        self.asked = 0
        self._url = f"{site.url}/v2/rerank"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._over.set()
        self._thread.join(GUARD_S)

    def _run(self):
        with httpx.Client() as client:
            while not self._over.wait(0.01):
                documents = [] if self.asked % 4 == 3 else [f"{self.asked} {i}" for i in range(6)]
                client.post(self._url, json={"query": "q", "documents": documents})
                self.asked += 1


def drawn(page):
    page.wait_for_function("() => document.querySelectorAll('.plot .main-svg').length >= 12")


def test_numbers_move_under_load_and_charts_show_them_in_both_themes(browser):
    phone = {"width": 360, "height": 740}
    with Site() as site, visit(browser, f"{site.url}/dashboard", viewport=phone) as page:
        drawn(page)
        assert page.get_by_text("nothing measured yet").count() > 0
        with Load(site) as load:
            page.wait_for_function(f"() => {NUMBER} > 0")
            first = page.evaluate(NUMBER)
            page.wait_for_function(f"() => {NUMBER} > 0 && {NUMBER} !== {first}")
            page.locator("#kinds tr", has_text="422").wait_for()
            assert load.asked
        answered = (
            page.locator("#kinds tr", has_text="answered: 200").locator("td").all_inner_texts()
        )
        assert int(answered[1].replace(",", "")) > 0
        assert page.locator("#workers tr").all_inner_texts()[0].split()[:2] == ["0", "up"]
        assert "worker 0: up" in page.locator("#events").inner_text()
        latency = page.get_by_role("img", name="Latency: P95")
        assert latency.get_attribute("aria-label").endswith("ms")
        y = "document.getElementById('documents').data[0].y"
        assert page.evaluate(f"Math.max(...{y})") > 0
        assert page.evaluate("document.getElementById('step-pairs').data[0].y").count(0) < 17
        assert page.locator("#ready-words").inner_text() == "ready"
        assert fits(page)
        before = page.evaluate(COLOURS)
        page.locator("#theme").click()
        assert all(a != b for a, b in zip(before, page.evaluate(COLOURS), strict=True))


def without_charts(page, site):
    """Half of the time goes into drawing."""
    page.route("**/plotly.js*", lambda route: route.abort())
    page.goto(f"{site.url}/dashboard")
    page.locator("#about", has_text="running since").wait_for()


def test_it_outlives_the_server_and_says_so(browser):
    with contextlib.ExitStack() as stack:
        page = stack.enter_context(visit(browser, "about:blank", tolerated="net::ERR"))
        trouble = page.locator("#trouble", has_text="does not answer since")
        stale = page.locator("#content.stale")
        with Site() as site:
            without_charts(page, site)
            page.context.set_offline(True)
            trouble.wait_for()
            assert stale.count() == 1
            page.context.set_offline(False)
            page.get_by_text("The server answers again").wait_for()  # the same one
            assert (trouble.is_visible(), stale.count()) == (False, 0)
        trouble.wait_for()
        assert stale.count() == 1
        assert page.locator("#about").inner_text().startswith("Echelon")
        stack.enter_context(Site(site.port))
        page.get_by_text("The server was restarted").wait_for()
        assert (trouble.is_visible(), stale.count()) == (False, 0)


def test_it_asks_for_a_key_before_it_asks_for_data(browser):
    with Site(access=Access(Keys([ApiKey("sesame", "tests")]))) as site:
        address = f"{site.url}/dashboard"
        with visit(browser, address, tolerated="401") as page:
            page.get_by_text("This server needs an API key.").wait_for()
            page.locator("#key").fill("wrong")
            page.keyboard.press("Enter")
            page.get_by_text("401 · The API key is not known here.").wait_for()
            page.locator("#key").fill("sesame")
            page.keyboard.press("Enter")
            page.locator("#about", has_text="running since").wait_for()
            assert not page.locator("#trouble").is_visible()
            assert page.url == address


def test_a_late_401_for_an_earlier_key_does_not_hide_the_data(browser):
    held = []

    def hold(route):
        if route.request.headers["authorization"].endswith("wrong"):
            held.append(route)
        else:
            route.continue_()

    with (
        Site(access=Access(Keys([ApiKey("sesame", "tests")]))) as site,
        visit(browser, f"{site.url}/dashboard", tolerated="401") as page,
    ):
        page.route("**/dashboard/data", hold)
        for key in ("wrong", "sesame"):
            with page.expect_request("**/dashboard/data"):
                page.locator("#key").fill(key)
                page.keyboard.press("Enter")
        page.locator("#about", has_text="running since").wait_for()
        with page.expect_response(lambda response: response.status == 401):
            held[0].fulfill(status=401, json={"message": "late"})
        page.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")  # it has been read
        assert not page.locator("#trouble").is_visible()


def test_without_the_charts_script_the_numbers_still_come(browser):
    with Site() as site, visit(browser, "about:blank", tolerated="net::ERR") as page:
        without_charts(page, site)
        page.locator("#workers tr", has_text="up").wait_for()
        page.get_by_role("img", name="Token budget: 2,048 now").wait_for()


def test_a_machine_that_has_become_slow_is_shown_with_the_remedy(browser):
    with Site() as site:
        drift = Drift(1.0)
        while drift.see(2.0) is None:
            pass
        drift.see = lambda level: None
        site.context.service._dispatcher.drift = drift
        with visit(browser, f"{site.url}/dashboard") as page:
            page.locator("#about", has_text="echelon tune --refresh").wait_for()
            slowdown = page.locator("#tiles div", has_text="Slowdown").locator("dd").inner_text()
            assert slowdown == "1.99 ×"
