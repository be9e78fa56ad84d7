"""The report says what the profile says, needs nothing from outside, and trusts no text."""

import ast
import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echelon.config import Options
from echelon.errors import StorageError
from echelon.plan.pack import NO_BUDGET
from echelon.tune import plots, report, words
from echelon.tune.grid import Measured, Point
from echelon.tune.profile import Key, Profile, Settings
from echelon.tune.solve import best_batches, best_budget, situations

HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}</table>"
LOADING = {"src", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href"}
SECTIONS = ["advice", "best", "plots", "precision", "warnings", "numbers", "facts", "use"]

# Building profiles.


def entry(pairs, seconds=(), *, status="ok", reason="", memory=2**29, **size):
    """One point as the sweep leaves it."""
    point = Point(pairs, **size)
    measured = Measured(point, status, reason, list(seconds), tokens=pairs * 100)
    measured.cost_tokens, measured.steps, measured.peak_bytes = pairs * 110, 3, memory
    return measured


def steady(median, count=20):
    return [median * (0.96 + 0.08 * i / max(1, count - 1)) for i in range(count)]


RESULTS = (
    entry(10, steady(0.2), batch_size=1),
    entry(10, steady(0.1), batch_size=8),
    entry(50, [0.7, 0.72], batch_size=1),
    entry(50, steady(0.4, 7), batch_size=8),
    entry(50, status="out_of_memory", reason="std::bad_alloc here", batch_size=16),
    entry(50, status="skipped", reason="steps of 16 already ran out of memory", batch_size=32),
    entry(50, steady(0.5), token_budget=256),
    entry(50, [0.31], token_budget=1024, memory=None),
    entry(50, status="not_reached", reason="the time limit came first", token_budget=2048),
)

PRECISIONS = [
    {
        "precision": name,
        "tokens_per_s": rate,
        "tau": tau,
        "overlap": 1.0,
        "max_delta": 0.057,
        "ndcg_loss": loss,
        "passed": passed,
        "queries": 8,
    }
    for name, rate, tau, loss, passed in (
        ("fp32", 5400.0, 1.0, 0.0, True),
        ("bf16", 16800.0, 0.9962, -0.0013, True),
        ("fp16", 17900.0, 0.913, None, False),
    )
]


def make_profile(results=RESULTS, **changes):
    """A profile as the tuner builds it."""
    best, budget = best_batches(results), best_budget(results)
    chosen = Settings(
        precision="bf16",
        token_budget=budget.point.token_budget if budget else NO_BUDGET,
        batch_size=None if budget or not best else best[-1].point.batch_size,
        threads=2,
        max_length=None,
    )
    profile = Profile(
        key=Key("some/model", "abc123", "cpu", "A Processor", "bf16", {"torch": "2.13.0"}),
        settings=chosen,
        created="2026-11-22T13:00:09+00:00",
        machine={
            "cpu": "A Processor",
            "cpus": 4,
            "usable_cpus": 2,
            "matrix_features": ["avx2"],
            "memory_bytes": 8 * 2**30,
            "system": "Linux 6",
            "machine": "x86_64",
            "python": "3.11.7",
            "gpus": [{"name": "A Card", "memory_bytes": 2**34, "capability": "9.0"}],
        },
        data={"name": "built-in (en)", "pairs": 144, "tokens": {"mean": 118.2, "max": 420}},
        precisions=PRECISIONS,
        points=[measured.as_dict() for measured in results],
        best=[measured.as_dict() for measured in best],
        situations=[situation.as_dict() for situation in situations(results)],
        warnings=["3 of 9 points are noisy. Close other programs."],
    )
    return replace(profile, **changes)


# Reading pages.


class Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.tables, self.scripts, self.styles = [], [], [], [], []
        self.words, self.open = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in {"meta", "br", "link", "img", "input"}:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        elif tag in {"script", "style"}:
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are not nested"

    def handle_data(self, data):
        here = self.open[-1] if self.open else ""
        if here in {"script", "style"}:
            (self.scripts if here == "script" else self.styles)[-1] += data
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return "".join(self.words)

    @property
    def figures(self):
        return json.loads(self.scripts[0]) if self.scripts else {}

    def table(self, header):
        """Rows of the table with this column, as dictionaries; short rows hold gaps."""
        table = next(t for t in self.tables if header in t[0])
        return [dict(zip(table[0], row, strict=False)) for row in table[1:]]


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Leave the megabytes of plotly.js out where they are not what is tested."""
    if "real_plotly" not in request.fixturenames:
        monkeypatch.setattr(report, "_plotly_js", lambda: "/* plotly */")


@pytest.fixture
def real_plotly():
    """Ask for the real library."""


def read(profile):
    return Page(report.render(profile))


def number_rows(page):
    return page.table("Median (P50)")


def traces(figure, meta):
    return [trace for trace in figure["data"] if trace["meta"] == meta]


# The page as a whole.


def test_sections_come_in_order():
    page = read(make_profile())
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_loaded_from_outside(real_plotly):
    html = report.render(make_profile())
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


def test_page_is_written_whole_and_equals_render(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    report.write_report(make_profile(), path)
    assert path.read_text(encoding="utf-8") == report.render(make_profile())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_failure_to_write_keeps_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        report.write_report(make_profile(), path)
    assert [p.read_text(encoding="utf-8") for p in tmp_path.iterdir()] == ["old"]


def test_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        report.write_report(make_profile(), tmp_path / "nowhere" / "report.html")


def test_light_modules_stay_light():
    code = (
        "import sys, echelon, echelon.cli, echelon.tune.report\n"
        "heavy = {'plotly', 'jinja2', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


# Texts that users give.


def test_hostile_texts_are_shown_and_not_obeyed():
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
    hovers = [
        t for figure in page.figures.values() for trace in figure["data"] for t in trace["text"]
    ]
    assert any("alert(1)" in hover for hover in hovers)
    assert not any("<" in hover.replace("<br>", "") for hover in hovers)


def test_a_name_that_is_no_utf8_can_still_be_written(tmp_path):
    profile = make_profile()
    odd = replace(profile, key=replace(profile.key, model="model-\udcff"))
    report.write_report(odd, tmp_path / "report.html")
    assert "model-?" in (tmp_path / "report.html").read_text(encoding="utf-8")


# The tables.


def test_every_measured_median_is_in_the_table():
    profile = make_profile()
    rows = number_rows(read(profile))
    assert len(rows) == len(profile.points)
    for point, row in zip(profile.points, rows, strict=True):
        assert row["Pairs"] == str(point["pairs"])
        assert row["Step"] == words.step_of(point).removesuffix(" a step")
        if words.measured(point):
            assert row["Median (P50)"] == words.duration(point["latency_s"]["median"])
            assert row["n"] == str(point["samples"])
            assert row["Pairs/s"] == words.number(point["pairs_per_s"])


def test_sizes_without_a_number_say_why():
    rows = [list(row.values()) for row in number_rows(read(make_profile()))]
    for words_, reason in (
        ("out of memory", "std::bad_alloc here"),
        ("skipped", "steps of 16 already ran out of memory"),
        ("not reached", "the time limit came first"),
    ):
        assert any(row[2:] == [reason, words_] for row in rows)


def test_summary_keeps_the_row_of_pairs_never_measured():
    results = [*RESULTS, entry(90, status="not_reached", batch_size=4)]
    rows = {row["Pairs"]: row for row in read(make_profile(results)).table("Best batch")}
    assert rows["10"]["Best batch"] == "8"
    assert rows["90"]["Best batch"] == "not measured"


def test_advice_is_for_four_situations_in_words_to_type():
    page = read(make_profile())
    rows = page.table("Situation")
    assert len(rows) == 4
    api = rows[0]
    assert (
        'Reranker("some/model", profile="echelon-profile.json", batch_size=8)'
        in api["Setting, and what to type"]
    )
    assert (
        "--model some/model --profile echelon-profile.json --token-budget 1024"
        in rows[3]["Setting, and what to type"]
    )
    assert api["Peak memory"] == words.size(2**29)


def test_a_situation_without_points_names_the_remedy():
    rows = read(make_profile(RESULTS[:4])).table("Situation")
    assert "Give --token-budgets" in " ".join(rows[3].values())


def test_verdict_compares_with_the_slowest_size():
    page = read(make_profile())
    # 50 pairs in 0.31 s against 0.71 s.
    assert "Use 1,024 tokens a step in bf16" in page.text
    assert "2.3 times the slowest size measured (batch 1)" in page.text
    assert "(n=1)" in page.text


def test_precisions_show_what_failed():
    rows = {row["Precision"].split()[0]: row for row in read(make_profile()).table("Kendall τ")}
    assert rows["bf16"]["Passed"] == "✓ yes"
    assert rows["fp16"]["Passed"] == "✗ no"
    assert rows["fp16"]["nDCG@10 loss"] == words.UNKNOWN
    assert rows["bf16"]["nDCG@10 loss"] == "−0.0013"


def test_a_learned_budget_is_a_warning():
    page = read(make_profile(learned_token_budget=512, warnings=[]))
    assert "at most 512 tokens" in page.text


# The charts.


def expected_line(profile, unit, pairs):
    return [e for e in profile.points if words.measured(e) and e["pairs"] == pairs and e[unit]]


def check_line(trace, found, value, ends):
    assert trace["y"] == pytest.approx([value(e) for e in found])
    bars = trace.get("error_y")
    for index, point in enumerate(found):
        bounds = ends(point)
        if bounds is None:
            assert bars is None or bars["array"][index] is bars["arrayminus"][index] is None
        else:
            assert trace["y"][index] - bars["arrayminus"][index] == pytest.approx(bounds[0])
            assert trace["y"][index] + bars["array"][index] == pytest.approx(bounds[1])


def latency_ends(point):
    latency = point["latency_s"]
    return None if latency["low"] is None else (latency["low"], latency["high"])


def rate_ends(point):
    ends = latency_ends(point)
    return None if ends is None else (point["pairs"] / ends[1], point["pairs"] / ends[0])


def check_charts(profile, figures):
    """Every line of every chart holds the profile's numbers, no more and no fewer."""
    for unit in ("batch_size", "token_budget"):
        counts = sorted({e["pairs"] for e in profile.points if e[unit] and words.measured(e)})
        for name, value, ends in (
            ("latency", lambda e: e["latency_s"]["median"], latency_ends),
            ("throughput", lambda e: e["pairs_per_s"], rate_ends),
        ):
            if not counts:
                assert f"{name}-{unit}" not in figures
                continue
            lines = traces(figures[f"{name}-{unit}"], "measured")
            assert [line["name"] for line in lines] == [f"{n} pairs" for n in counts]
            for line, pairs in zip(lines, counts, strict=True):
                found = sorted(expected_line(profile, unit, pairs), key=lambda e: e[unit])
                assert line["x"] == [e[unit] for e in found]
                check_line(line, found, value, ends)


def test_charts_hold_exactly_the_measured_series():
    profile = make_profile()
    check_charts(profile, read(profile).figures)


def test_memory_chart_leaves_out_what_was_not_read():
    figures = read(make_profile()).figures
    assert traces(figures["memory-batch_size"], "measured")[0]["y"] == [0.5, 0.5]
    assert traces(figures["memory-token_budget"], "measured")[0]["x"] == [256]


def test_best_points_are_ringed():
    figures = read(make_profile()).figures
    ring = traces(figures["throughput-batch_size"], "best")[0]
    assert list(zip(ring["x"], ring["y"], strict=True)) == [
        (8, pytest.approx(100.0)),
        (8, pytest.approx(125.0)),
    ]
    assert traces(figures["latency-token_budget"], "best")[0]["x"] == [1024]


def test_sizes_without_a_number_have_hollow_signs():
    figures = read(make_profile()).figures
    gaps = {t["name"]: t for t in traces(figures["throughput-batch_size"], "missing")}
    assert {name: gap["x"] for name, gap in gaps.items()} == {
        "out of memory": [16],
        "skipped": [32],
    }
    for gap in gaps.values():
        assert gap["marker"]["symbol"].endswith("-open")
        assert gap["yaxis"] == "y2"
    assert traces(figures["latency-token_budget"], "missing")[0]["name"] == "not reached"


def test_plotly_knows_every_attribute():
    from plotly import graph_objects

    drawn = plots.charts(make_profile())
    assert len(drawn) == 6
    for chart in drawn:
        graph_objects.Figure(chart.figure)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", plots.COLOURS)
@pytest.mark.parametrize("page", ["#ffffff", "#14171c"])
def test_lines_are_seen_on_both_themes(colour, page):
    lighter, darker = sorted((luminance(colour), luminance(page)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 3  # WCAG 2.1, 1.4.11


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
        {"settings": Settings("fp32", NO_BUDGET, None, None, None)},
        {"settings": Settings("fp32", NO_BUDGET, 8, None, 512)},
        {"settings": Settings("bf16", 12345, None, 2, None)},
        {"created": "some day"},
    ],
)
def test_renders_whatever_is_missing(changes):
    page = read(make_profile(**changes))
    assert "None" not in page.text
    assert str(NO_BUDGET) not in page.text
    assert f"{NO_BUDGET:,}" not in page.text
    assert not page.open


@pytest.mark.parametrize(
    "results",
    [
        RESULTS[:4],  # no token budgets
        RESULTS[6:],  # nothing else
        [entry(10, [0.5], batch_size=4, memory=None)],
        [entry(10, status="out_of_memory", batch_size=1)],
        [entry(10, status="not_reached", batch_size=1), entry(10, [1.0], token_budget=64)],
    ],
)
def test_renders_any_part_of_a_grid(results):
    profile = make_profile(results)
    page = read(profile)
    check_charts(profile, page.figures)
    assert len(number_rows(page)) == len(profile.points)


# Commands that can be typed.


def params_of(command, line):
    from echelon import cli

    parts = shlex.split(line)
    assert parts[:2] == ["echelon", command]
    return getattr(cli, command).make_context(command, parts[2:]).params


@pytest.mark.parametrize("model", ["some/model", '/my models/it\'s "one"', "模型"])
def test_repeating_measures_the_same_sizes(model):
    profile = make_profile()
    profile = replace(
        profile,
        key=replace(profile.key, model=model),
        data={"name": "my data.jsonl"},
        precisions=[],
        settings=replace(profile.settings, max_length=256),
    )
    params = params_of("tune", report._repeat(profile))
    assert (params["model"], params["data"]) == (model, "my data.jsonl")
    assert params["pairs"] == (10, 50)
    assert params["batch_sizes"] == (1, 8, 16, 32)
    assert params["token_budgets"] == (256, 1024, 2048)
    assert (params["precision"], params["max_length"]) == ("bf16", 256)


@pytest.mark.parametrize("model", ["some/model", '/my models/it\'s "one"', "模型\n", "\U0001f600"])
def test_examples_mean_what_they_show(model):
    advice = {"batch_size": None, "token_budget": 512}
    call = ast.parse(words.python(model, "p.json", advice), mode="eval").body
    keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert ast.literal_eval(call.args[0]) == model
    assert Options.of(**keywords).token_budget == 512
    params = params_of("rank", words.shell(model, "p.json", advice))
    assert (params["model"], params["profile"], params["token_budget"]) == (model, "p.json", 512)


def test_another_profile_file_is_named_in_the_examples():
    html = report.render(make_profile(), profile_path="out/mine.json")
    assert "echelon-profile.json" not in html
    assert "out/mine.json" in html


# Numbers for people.


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1e-5, "0.0000100"),
        (0.05711, "0.0571"),
        (9.996, "10.0"),
        (99.96, "100"),
        (15234.6, "15,200"),
        (-0.5, "−0.500"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_have_three_digits(value, shown):
    assert words.number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0799, "79.9 ms"), (0.9994, "999 ms"), (0.9996, "1.00 s"), (19.84, "19.8 s")],
)
def test_durations_change_unit_at_a_second(value, shown):
    assert words.duration(value).replace(words.SPACE, " ") == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(1, words.UNKNOWN), (2, "≈ 1.00 s"), (19, "≈ 1.00 s"), (20, "1.00 s")]
)
def test_percentiles_of_few_runs_are_marked(count, shown):
    found = entry(10, [1.0] * count, batch_size=1).as_dict()
    assert words.percentile(found, "p95").replace(words.SPACE, " ") == shown


@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=60))
def test_spread_never_claims_more_than_the_interval(seconds):
    found = entry(10, seconds, batch_size=1).as_dict()
    latency, shown = found["latency_s"], words.spread(found)
    if latency["low"] is None:
        assert shown == f"n={len(seconds)}"
        return
    share = float(shown.strip("±%" + words.SPACE)) / 100
    slack = 1e-9 * latency["high"]
    assert latency["median"] * (1 + share) >= latency["high"] - slack
    assert latency["median"] * (1 - share) <= latency["low"] + slack


# Any profile.

times = st.floats(1e-4, 1e3, allow_subnormal=False)
memories = st.none() | st.integers(1, 2**45)


@st.composite
def points(draw):
    pairs = draw(st.sampled_from([1, 10, 50, 100, 1000]))
    unit = draw(st.sampled_from(["batch_size", "token_budget"]))
    size = {unit: draw(st.integers(1, 2**20))}
    status = draw(st.sampled_from(["ok", "out_of_memory", "skipped", "not_reached"]))
    if status != "ok":
        return entry(pairs, status=status, reason=draw(st.text(max_size=20)), **size)
    runs = draw(st.lists(times, min_size=1, max_size=30))
    return entry(pairs, runs, memory=draw(memories), **size)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    results=st.lists(points(), max_size=25, unique_by=lambda m: m.point),
    model=st.text(max_size=20),
    warnings=st.lists(st.text(max_size=30), max_size=2),
)
def test_any_profile_is_reported_whole(results, model, warnings):
    profile = make_profile(sorted(results, key=lambda m: (m.point.pairs, m.point.size)))
    profile = replace(profile, key=replace(profile.key, model=model), warnings=warnings)
    page = read(profile)
    check_charts(profile, page.figures)
    rows = number_rows(page) if profile.points else []
    medians = [e["latency_s"]["median"] for e in profile.points if words.measured(e)]
    shown = [row["Median (P50)"] for row in rows if "n" in row]
    assert shown == [words.duration(median) for median in medians]
    assert len(rows) == len(profile.points)
    assert len(page.table("Situation")) == 4
