"""The report says what the profile says, needs nothing from outside, and trusts no text."""

import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from report_pages import (
    PRECISIONS,
    RESULTS,
    Page,
    entry,
    leave_plotly_out,
    make_profile,
    number_rows,
    read,
    steady,
)
from website import chromium

from echelon.errors import StorageError
from echelon.messages import Message, units
from echelon.profile import TunedSettings
from echelon.reports import tuning_report, wording
from echelon.scheduling.packing import NO_BUDGET

HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}</table>"
LOADING = {"src", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href"}
PARTS = "meaning warnings advice best rules plots precision numbers details use"
SECTIONS = PARTS.split()
MAX_BYTES = 2e6

quick = pytest.fixture(leave_plotly_out, autouse=True)


@pytest.fixture
def real_plotly():
    """Ask for the real library."""


# The page as a whole.


def test_sections_come_in_order():
    page = read(make_profile())
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_loaded_from_outside(real_plotly):
    html = tuning_report.render(make_profile())
    page = Page(html)
    names = {name for name, _ in page.tags}
    assert not names & {"link", "img", "iframe", "object", "embed", "base", "audio", "video"}
    for tag, attributes in page.tags:
        assert not LOADING & set(attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
    styles = "".join(page.styles)
    assert "url(" not in styles
    assert "@import" not in styles
    assert "default-src 'none'" in html
    assert sum("Plotly" in script and len(script) > 1e6 for script in page.scripts) == 1
    assert len(html.encode()) < MAX_BYTES


def test_a_phone_shows_the_answer_and_unfolds_the_rest(tmp_path, real_plotly):
    path = tmp_path / "report.html"
    tuning_report.write_report(make_profile(), path)
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate("document.documentElement.scrollHeight") < 5000
        assert tab.locator(".tiles").bounding_box()["y"] < 1200
        assert tab.locator(".plot .main-svg").count() == 0
        tab.locator("#plots").click()
        tab.locator(".plot .main-svg").nth(1).wait_for(state="attached")


HINTS = [
    Message("sweep.noisy_points", {"noisy": 3, "all": 9}),
    Message("calibration.memory_left_out"),
    "<b title='--none'>",
]


@pytest.mark.parametrize("width", [300, 330, 390])
def test_no_line_breaks_inside_of_a_flag(tmp_path, width):
    path = tmp_path / "report.html"
    tuning_report.write_report(make_profile(warnings=HINTS), path, lang="zh")
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": width, "height": 844})
        tab.goto(path.as_uri())
        assert "。 " not in tab.locator("main").inner_text()
        assert tab.locator("code").get_by_text("echelon tune --refresh", exact=True).count()
        flags = tab.locator(".flag")
        assert {"--time-limit", "--none"} <= set(flags.all_inner_texts())
        assert max(flags.evaluate_all("all => all.map(one => one.getClientRects().length)")) == 1


def test_a_wide_screen_shows_all_sections(tmp_path, real_plotly):
    path = tmp_path / "report.html"
    tuning_report.write_report(make_profile(), path)
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(path.as_uri())
        tab.locator(".plot .main-svg").nth(1).wait_for(state="attached")
        assert tab.locator("details:not([open])").count() == 0


def test_memory_charts_have_one_scale():
    results = [entry(10, [0.1], batch_size=1, memory=2**30)]
    results += [entry(10, [0.1], token_budget=256, memory=2**31)]
    figures = read(make_profile(results)).figures
    memory = [f for name, f in figures.items() if name.startswith("memory-")]
    low, high = memory[0]["layout"]["yaxis"]["range"]
    assert (low, high > 2) == (0, True)
    assert [f["layout"]["yaxis"]["range"] for f in memory] == [[low, high]] * 2


def test_page_is_written_whole_and_equals_render(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    tuning_report.write_report(make_profile(), path)
    assert path.read_text(encoding="utf-8") == tuning_report.render(make_profile())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_failure_to_write_keeps_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        tuning_report.write_report(make_profile(), path)
    assert [p.read_text(encoding="utf-8") for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640)])
def test_others_may_read_what_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        tuning_report.write_report(make_profile(), tmp_path / "report.html")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == mode


def test_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        tuning_report.write_report(make_profile(), tmp_path / "nowhere" / "report.html")


def test_light_modules_stay_light():
    code = (
        "import sys, echelon, echelon.cli, echelon.reports.tuning_report\n"
        "heavy = {'plotly', 'jinja2', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_another_profile_file_is_named_in_the_examples():
    html = tuning_report.render(make_profile(), profile_path="out/mine.json")
    assert "echelon-profile.json" not in html
    assert "out/mine.json" in html


# Texts that users give.


def test_html_in_texts_is_escaped():
    results = [*RESULTS, entry(50, status="skipped", reason=HOSTILE, batch_size=64)]
    plain = make_profile(results)
    key = replace(plain.key, model=HOSTILE, device_name=HOSTILE, versions={HOSTILE: HOSTILE})
    hostile = replace(
        plain,
        key=key,
        data={"name": HOSTILE, "pairs": 1, "tokens": {}},
        machine={"cpu": HOSTILE, "gpus": [{"name": HOSTILE}]},
        warnings=[HOSTILE],
        created=HOSTILE,
    )
    page, usual = read(hostile), read(plain)
    assert len(page.scripts) == len(usual.scripts)
    assert len(page.tables) == len(usual.tables)
    # model (title, heading), key's model, device, versions, data, processor, card, warning, date…
    assert page.text.count(HOSTILE) >= 10
    assert all("alert(1)" not in script for script in page.scripts[1:])
    drawn = [trace for figure in page.figures.values() for trace in figure["data"]]
    hovers = [text for trace in drawn for text in trace.get("text", ())]
    assert any("alert(1)" in hover for hover in hovers)
    assert not any("<" in hover.replace("<br>", "") for hover in hovers)


def test_a_name_that_is_no_utf8_can_still_be_written(tmp_path):
    profile = make_profile()
    odd = replace(profile, key=replace(profile.key, model="model-\udcff"))
    tuning_report.write_report(odd, tmp_path / "report.html")
    assert "model-?" in (tmp_path / "report.html").read_text(encoding="utf-8")


# The tables.


def test_every_measured_median_is_in_the_table():
    profile = make_profile()
    rows = number_rows(read(profile))
    assert len(rows) == len(profile.points)
    for point, row in zip(profile.points, rows, strict=True):
        assert row["Pairs"] == str(point["pairs"])
        assert row["Step"] == wording.step_of(point).removesuffix(" per step")
        if wording.measured(point):
            assert row["Median (P50)"] == units.duration(point["latency_s"]["median"])
            assert row["n"] == str(point["samples"])
            assert row["Pairs/s"] == units.number(point["pairs_per_s"])


def test_sizes_without_a_number_say_why():
    rows = [list(row.values()) for row in number_rows(read(make_profile()))]
    for words_, reason in (
        ("out of memory", "std::bad_alloc here"),
        ("skipped", "steps of 16 already ran out of memory"),
        ("not measured in time", "the time limit came first"),
        ("predicted", "about 600\u00a0ms (550\u00a0ms – 650\u00a0ms)"),
    ):
        assert any(row[2:] == [reason, words_] for row in rows)


def test_summary_keeps_the_row_of_pairs_never_measured():
    results = [*RESULTS, entry(90, status="not_reached", batch_size=4)]
    rows = {row["Pairs"]: row for row in read(make_profile(results)).table("Best batch size")}
    assert rows["10"]["Best batch size"] == "8"
    assert rows["90"]["Best batch size"] == "not measured"


def test_advice_is_for_four_scenarios_with_commands():
    page = read(make_profile())
    rows = page.table("Scenario")
    assert len(rows) == 4
    settings = [row["Setting and command"] for row in rows]
    assert 'Reranker("some/model", profile="echelon-profile.json", batch_size=8)' in settings[0]
    assert "--model some/model --profile echelon-profile.json --token-budget 1024" in settings[3]
    assert rows[0]["Peak memory"] == units.size(2**29)


def test_a_scenario_without_points_names_the_remedy():
    rows = read(make_profile(RESULTS[:4])).table("Scenario")
    assert "Give --token-budgets" in " ".join(rows[3].values())


def test_the_headline_compares_with_the_slowest_size():
    page = read(make_profile())
    # 50 pairs in 0.31 s against 0.71 s, and no interval overlaps.
    assert "Use 1,024 tokens per step in bf16" in page.text
    assert "2.3 times as fast as with the slowest size measured (batch size 1)" in page.text
    assert "Not known" not in page.text


def test_what_it_means_is_said_in_plain_sentences():
    page = read(make_profile())
    assert "This machine ranks 50 documents for a query in about 310\u00a0ms." in page.text
    assert "with the slowest one measured, the same call takes 2.3 times as long" in page.text
    one = read(make_profile([entry(50, steady(0.4), batch_size=8)]))
    assert "No other size measured is faster." in one.text


def test_a_headline_of_few_runs_claims_nothing():
    results = [entry(50, [0.7], batch_size=1), entry(50, [0.31], batch_size=8)]
    page = read(make_profile(results))
    assert "(n=1)" in page.text
    assert "times as fast" not in page.text
    assert "Not known: batch size 1 may be as fast" in page.text
    assert "--time-limit 300" in page.text
    assert "Whether another size is faster is not known yet" in page.text


def test_precisions_show_what_failed():
    unsure = {**PRECISIONS[2], "precision": "int8", "failed": False}
    page = read(make_profile(precisions=[*PRECISIONS, unsure]))
    rows = {row["Precision"].split()[0]: row for row in page.table("Kendall τ")}
    assert rows["int8"]["Passed"] == "✗ not proven"
    assert rows["bf16"]["Passed"] == "✓ yes"
    assert rows["fp16"]["Passed"] == "✗ no"
    assert rows["fp16"]["nDCG@10 loss"] == units.UNKNOWN
    assert rows["bf16"]["nDCG@10 loss"] == "−0.0013"


def test_a_learned_budget_is_a_warning():
    page = read(make_profile(learned_token_budget=512, warnings=[]))
    assert "at most 512 tokens" in page.text


# What may be missing.

BARE = {"points": [], "best": [], "situations": []}


@pytest.mark.parametrize(
    "changes",
    [
        BARE,
        BARE | {"precisions": [], "machine": {}, "data": {}, "warnings": []},
        {"precisions": [], "warnings": []},
        {"machine": {"cpu": None, "gpus": None, "memory_bytes": None}},
        {"data": {"name": None, "tokens": None}},
        {"settings": TunedSettings("fp32", NO_BUDGET, None, None, None)},
        {"settings": TunedSettings("fp32", NO_BUDGET, 8, None, 512)},
        {"settings": TunedSettings("bf16", 12345, None, 2, None)},
        {"created": "some day"},
    ],
)
def test_renders_whatever_is_missing(changes):
    page = read(make_profile(**changes))
    assert "None" not in page.text
    assert str(NO_BUDGET) not in page.text
    assert f"{NO_BUDGET:,}" not in page.text
    assert not page.open
