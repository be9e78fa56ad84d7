"""Both pages in Chromium, against a server on a real port and the fake scorer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import httpx
import pytest
from website import Site, chromium, fits, visit

from echelon.server.auth import Access, ApiKey, Keys
from echelon.server.openapi import GROUPS

ASKED = {
    "query": 'what\'s "it" & $HOME `x` \\n?',
    "documents": ["it's one", 'two "quoted" \\ $PATH', "drei — 三", "JSON", "<b>five</b>"],
}
HOSTILE = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def site(browser):  # not started where there is no browser
    with Site() as served:
        yield served


@pytest.fixture(scope="module")
def locked(browser):
    with Site(access=Access(Keys([ApiKey("sesame", "tests")]))) as served:
        yield served


def enter(page, asked=ASKED):
    page.get_by_label("Query", exact=True).fill(asked["query"])
    page.locator("#lines").fill("\n".join(asked["documents"]))


def ranked(page):
    page.locator("#results li").first.wait_for()
    return [int(item.get_attribute("data-index")) for item in page.locator("#results li").all()]


def order_of(site, asked=ASKED, **headers):
    answer = httpx.post(f"{site.url}/v2/rerank", json=asked, headers=headers).json()
    return [result["index"] for result in answer["results"]]


# The playground.


def test_the_order_is_the_apis_and_the_details_are_shown(browser, site):
    raw = httpx.post(f"{site.url}/v2/rerank", json={**ASKED, "raw_scores": True}).json()
    plain = httpx.post(f"{site.url}/v2/rerank", json=ASKED)
    with visit(browser, site.url) as page:
        enter(page)
        page.keyboard.press("Control+Enter")
        assert ranked(page) == [result["index"] for result in raw["results"]]
        scores = page.locator(".score").all()
        for shown, result, expected in zip(
            scores, raw["results"], plain.json()["results"], strict=True
        ):
            relevance = float(shown.get_attribute("title").split()[1])
            assert relevance == pytest.approx(expected["relevance_score"], rel=1e-12)
            row = shown.locator("xpath=../..")
            assert f"document {result['index']}" in row.inner_text()
            logit = row.locator(".place").inner_text().split("logit ")[1].replace("−", "-")
            assert float(logit) == pytest.approx(result["relevance_score"], rel=0.01)
            width = row.locator(".bar span").evaluate("bar => bar.style.width")
            assert float(width.rstrip("%")) == pytest.approx(100 * relevance, rel=1e-4)
        names, values = (page.locator(f"#details {tag}").all_inner_texts() for tag in ("dt", "dd"))
        tiles = dict(zip(names, values, strict=True))
        assert tiles["Tokens"] == plain.headers["X-Echelon-Tokens"]
        assert all(tiles[name].endswith("ms") for name in ("Total", "Queue", "Tokenise", "Compute"))
        assert page.locator("#request-id").inner_text().startswith("Request ")
        assert page.locator("#status").inner_text() == "5 results of 5 documents"
        page.locator("#top-n").fill("2")
        page.locator("#rank").click()
        page.get_by_text("2 results of 5 documents").wait_for()
        assert ranked(page) == order_of(site)[:2]


def test_the_example_ranks(browser, site):
    with visit(browser, site.url) as page:
        page.get_by_role("button", name="Load an example").press("Enter")
        assert sorted(ranked(page)) == list(range(6))
        assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("language", ["curl", "requests", "Cohere"])
def test_copied_snippets_run_and_get_the_same_answer(browser, locked, language):
    settings = {"permissions": ["clipboard-read", "clipboard-write"]}
    with visit(browser, locked.url, **settings) as page:
        page.locator("#key").fill("sesame")
        enter(page)
        page.locator("#top-n").fill("4")
        page.get_by_role("tab", name=language).click()
        page.locator("#copy").click()
        page.get_by_text("Copied.").wait_for()
        copied = page.evaluate("navigator.clipboard.readText()")
    assert "sesame" not in copied
    command = ["sh", "-c"] if language == "curl" else [sys.executable, "-c"]
    environment = {**os.environ, "ECHELON_API_KEY": "sesame"}
    done = subprocess.run(
        [*command, copied], capture_output=True, text=True, env=environment, check=True
    )
    if language == "curl":
        order = [result["index"] for result in json.loads(done.stdout)["results"]]
    else:
        order = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert order == order_of(locked, {**ASKED, "top_n": 4}, **{"X-Api-Key": "sesame"})


def test_the_librarys_call_is_python_with_the_same_texts(browser, site):
    with visit(browser, site.url) as page:
        enter(page)
        page.get_by_role("tab", name="curl").focus()
        page.keyboard.press("ArrowLeft")  # the last one
        code = page.locator("#snippet").inner_text()
    compile(code, "copied", "exec")
    assert 'Reranker("the-model")' in code
    for text in (ASKED["query"], *ASKED["documents"]):
        assert json.dumps(text, ensure_ascii=False) in code


def test_errors_are_shown_in_the_servers_words(browser, site):
    with visit(browser, site.url, tolerated="422") as page:
        page.locator("#rank").click()
        error = page.get_by_role("alert")
        assert "query: is empty" in error.inner_text()
        page.locator("#query").fill("q")
        for top_n, documents in (("", ""), ("x", "d"), ("1.5", "d"), ("-1", "d")):
            page.locator("#lines").fill(documents)
            page.locator("#top-n").fill(top_n)
            with page.expect_response("**/v2/rerank") as answered:
                page.locator("#rank").click()
            words = answered.value.json()["message"]
            page.get_by_text(f"422 · {words}").wait_for()
        page.locator("#top-n").fill("1")
        page.locator("#rank").click()
        assert ranked(page) == [0]
        assert not error.is_visible()


def test_a_wait_can_be_stopped_and_a_full_server_shows_retry_after(browser, site):
    with visit(browser, site.url, tolerated="429") as page:
        page.route("**/v2/rerank", lambda route: None)  # no answer ever
        enter(page)
        page.locator("#rank").click()
        page.get_by_text("Ranking …").wait_for()
        page.locator("#stop").click()
        page.get_by_text("Stopped").wait_for()
        assert page.locator("#rank").is_enabled()
        page.unroute("**/v2/rerank")
        full = {"status": 429, "headers": {"Retry-After": "7"}, "json": {"message": "It is full."}}
        page.route("**/v2/rerank", lambda route: route.fulfill(**full))
        page.locator("#rank").click()
        alert = page.get_by_text("429 · It is full.")
        alert.wait_for()
        assert "Retry-After: 7 s" in alert.inner_text()


def test_a_key_is_refused_then_taken_and_never_in_an_address(browser, locked):
    with visit(browser, locked.url, tolerated="401") as page:
        enter(page)
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        page.locator("#rank").click()
        page.get_by_text("401 · The API key is not known here.").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.locator("#key").fill("sesame")
        page.locator("#rank").click()
        order = ranked(page)
        assert order == order_of(locked, **{"X-Api-Key": "sesame"})
        page.get_by_role("link", name="Dashboard").click()
        page.locator("#about", has_text="running since").wait_for()
        assert "sesame" not in page.url
        kept = "[JSON.stringify(localStorage), document.cookie]"
        assert all("sesame" not in text for text in page.evaluate(kept))


def test_texts_are_shown_as_texts(browser, site):
    long = "x" * 100_000 + "end"
    asked = {"query": HOSTILE, "documents": [HOSTILE, long, "a" + "̈" * 50]}
    with visit(browser, site.url, viewport={"width": 360, "height": 740}) as page:
        enter(page, asked)
        page.locator("#rank").click()
        ranked(page)
        texts = page.locator("#results .text").all_inner_texts()
        assert HOSTILE in texts
        assert page.locator("main img, main script").count() == 0
        assert page.evaluate("window.pwned") is None
        assert max(map(len, texts)) < 1000
        assert "cut:" in page.locator("#results").inner_text()
        assert "were cut" in page.locator("#warnings").inner_text()
        page.get_by_role("button", name="Show all 100,003 letters").click()
        assert long in page.locator("#results .text").all_inner_texts()
        assert fits(page)


def test_many_results_come_a_hundred_at_a_time(browser, site):
    asked = {"query": "q", "documents": [f"document {i}" for i in range(230)]}
    with visit(browser, site.url) as page:
        enter(page, asked)
        page.locator("#rank").click()
        assert len(ranked(page)) == 100
        page.locator("#more").click()
        page.get_by_role("button", name="Show 30 more of 230").click()
        assert ranked(page) == order_of(site, asked)
        assert not page.locator("#more").is_visible()


def test_documents_in_boxes_by_keyboard(browser, site):
    with visit(browser, site.url) as page:
        enter(page, {"query": "q", "documents": ["one", "two"]})
        page.get_by_role("button", name="Boxes").press("Enter")
        page.get_by_label("Document 1", exact=True).fill("two\nlines")
        page.get_by_role("button", name="Add a document").press("Enter")
        page.keyboard.type("three")
        assert "3 documents" in page.locator("#count").inner_text()
        page.get_by_role("button", name="One per line").click()
        assert "Document 1 holds line breaks" in page.locator("#entry-note").inner_text()
        page.get_by_role("button", name="Remove document 0").press("Enter")
        assert page.evaluate("document.activeElement.value") == "two\nlines"
        page.locator("#rank").click()
        assert ranked(page) == order_of(site, {"query": "q", "documents": ["two\nlines", "three"]})
        page.get_by_label("Document 0", exact=True).fill("two")
        page.get_by_role("button", name="One per line").click()
        assert page.locator("#lines").input_value() == "two\nthree"


def test_a_phone_in_both_themes(browser, site):
    phone = {"width": 360, "height": 740}
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = []
    for scheme in ("light", "dark"):
        with visit(browser, site.url, viewport=phone, color_scheme=scheme) as page:
            page.get_by_role("button", name="Load an example").click()
            ranked(page)
            assert fits(page)
            seen.append(page.evaluate(colour))
            page.locator("#theme").click()
            turned = page.evaluate(colour)
            page.reload()
            assert page.evaluate(colour) == turned != seen[-1]
    assert len(set(seen)) == 2


def test_a_page_behind_a_proxy_that_puts_a_path_before(browser):
    with Site(root="/ranks") as site, visit(browser, f"{site.url}/", strip="/ranks") as page:
        enter(page)
        page.locator("#rank").click()
        assert len(ranked(page)) == 5
        assert f"{site.url}/v2/rerank" in page.locator("#snippet").inner_text()
        page.get_by_role("link", name="Dashboard").click()
        page.locator("#about", has_text="running since").wait_for()


def test_the_description_renders_and_can_be_tried_under_its_policy(browser, site):
    with visit(browser, f"{site.url}/docs") as page:
        page.locator(".opblock").first.wait_for()
        described = httpx.get(f"{site.url}/openapi.json").json()["paths"]
        assert page.locator(".opblock").count() == len(described)
        row = page.locator("#operations-Ranking-v2_rerank")
        row.locator(".opblock-summary-control").click()
        row.get_by_role("button", name="Try it out").click()
        row.get_by_role("button", name="Execute").click()
        row.locator(".live-responses-table .response-col_status", has_text="200").wait_for()


def test_the_description_is_grouped_fits_a_phone_and_leads_back(browser, site):
    with visit(browser, f"{site.url}/docs", viewport={"width": 390, "height": 844}) as page:
        page.locator(".opblock-tag").first.wait_for()
        named = [tag.get_attribute("data-tag") for tag in page.locator(".opblock-tag").all()]
        assert named == list(GROUPS)
        assert page.locator(".opblock").count() == 0
        page.locator("#operations-tag-Ranking").click()
        page.locator("#operations-Ranking-v2_rerank .opblock-summary-control").click()
        page.locator("#operations-Ranking-v2_rerank .opblock-body").wait_for()
        assert fits(page)
        page.get_by_role("link", name="Playground").click()
        page.locator("#rank").wait_for()


ENGLISH = re.compile(r"[A-Za-z]{2,}[ -][A-Za-z]{2,}")
KEPT = "the-model|echelon tune --refresh|API key|NVIDIA NIM|Cohere v|vLLM [a-z]+|Expand operation"
"""Names, commands, and a word of Swagger UI, which speaks English only."""

SAID = """() => {
  document.querySelector("pre")?.remove();  // code
  const names = ["title", "placeholder", "aria-label"];
  const said = (node) => names.map((name) => node.getAttribute(name));
  const words = [...document.querySelectorAll("body *")].flatMap(said).filter(Boolean);
  return [document.title, document.body.innerText, ...words].join("\\n");
}"""


@pytest.mark.parametrize("path", ["/", "/dashboard", "/docs"])
def test_a_page_in_chinese_has_no_english_sentence_and_fits_a_phone(browser, site, path):
    phone = {"width": 390, "height": 844}
    with visit(browser, site.url + path, viewport=phone, locale="zh-CN") as page:
        if path == "/":
            page.locator("#query").fill("查询")
            page.locator("#lines").fill("一\n二")
            page.locator("#rank").click()
            ranked(page)
            page.locator("#as-boxes").click()
        elif path == "/dashboard":
            page.locator("#workers tr").first.wait_for()
            page.locator(".plot .main-svg").nth(11).wait_for(state="attached")
        else:
            page.locator(".opblock-tag").first.wait_for()
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        lines = page.evaluate(SAID).splitlines()
        assert len([line for line in lines if re.search("[一-鿿]", line)]) > 5
        assert [line for line in lines if ENGLISH.search(re.sub(KEPT, "", line))] == []
        assert fits(page)


def test_no_page_can_be_framed_by_another_site(browser, site):
    context = browser.new_context()
    page = context.new_page()
    frames = []
    for path in ("/", "/dashboard", "/docs", "/health", "/nothing"):
        page.set_content(f"<iframe src='http://localhost:{site.port}{path}'></iframe>")
        page.wait_for_load_state("networkidle")
        frames += [frame.url for frame in page.frames[1:]]
    context.close()
    assert frames == ["chrome-error://chromewebdata/"] * 5
