"""The charts of the report hold all numbers of the profile."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_pages import RESULTS, entry, leave_plotly_out, make_profile, number_rows, read, traces

from echelon.messages import units
from echelon.reports import plots, wording
from echelon.reports.model_charts import agreement_charts

quick = pytest.fixture(leave_plotly_out, autouse=True)


def expected_line(profile, unit, pairs):
    return [e for e in profile.points if wording.measured(e) and e["pairs"] == pairs and e[unit]]


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
        counts = sorted({e["pairs"] for e in profile.points if e[unit] and wording.measured(e)})
        for name, value, ends in (
            ("latency", lambda e: e["latency_s"]["median"], latency_ends),
            ("throughput", lambda e: e["pairs_per_s"], rate_ends),
        ):
            if not counts:
                assert f"{name}-{unit}" not in figures
                continue
            lines = traces(figures[f"{name}-{unit}"], "measured")
            assert [line["name"] for line in lines] == [wording.pairs(n) for n in counts]
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
    assert ring["x"] == [8, 8]
    assert ring["y"] == pytest.approx([100.0, 125.0])
    assert traces(figures["latency-token_budget"], "best")[0]["x"] == [1024]


def test_a_star_marks_the_knee_of_each_line():
    figures = read(make_profile()).figures
    for name in ("throughput", "latency"):
        assert traces(figures[f"{name}-batch_size"], "knee")[0]["x"] == [8, 8]
        assert traces(figures[f"{name}-token_budget"], "knee")[0]["x"] == [1024]
    assert traces(figures["memory-batch_size"], "knee") == []


def test_agreement_is_drawn_beside_what_is_needed():
    figure = read(make_profile()).figures["agreement"]
    assert traces(figure, "tau")[0]["y"] == [1.0, 0.9962, 0.913]
    assert traces(figure, "needed")[0]["y"] == [0.97] * 3
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < 0.913
    assert high > 1
    assert "agreement" not in read(make_profile(precisions=[])).figures


def test_sizes_without_a_number_have_hollow_symbols():
    figures = read(make_profile()).figures
    gaps = {t["name"]: t for t in traces(figures["throughput-batch_size"], "missing")}
    sizes = {name: gap["x"] for name, gap in gaps.items()}
    assert sizes == {"out of memory": [16], "skipped": [32]}
    for gap in gaps.values():
        assert gap["marker"]["symbol"].endswith("-open")
        assert gap["yaxis"] == "y2"
    assert traces(figures["latency-token_budget"], "missing")[0]["name"] == "not measured in time"


def test_plotly_knows_every_attribute():
    from plotly import graph_objects

    drawn = plots.charts(make_profile())
    drawn += agreement_charts(make_profile())
    assert len(drawn) == 7
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
    medians = [e["latency_s"]["median"] for e in profile.points if wording.measured(e)]
    shown = [row["Median (P50)"] for row in rows if "n" in row]
    assert shown == [units.duration(median) for median in medians]
    assert len(rows) == len(profile.points)
    assert len(page.table("Scenario")) == 4
