"""Two profiles side by side: what is compared, what is not, and how sure it is."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_pairs import compared, profile_of, ratios
from report_pages import RESULTS, entry, steady

from echelon.profile import TunedSettings
from echelon.reports import comparison_page
from echelon.reports.statistics import TIE, KnownValue, Ratio
from echelon.scheduling.packing import NO_BUDGET

factors = st.floats(0.05, 20)
numbers = st.floats(1e-6, 1e6)
SHARES = st.floats(0.2, 1.0)


@st.composite
def known(draw):
    value = draw(numbers)
    if draw(st.booleans()):
        return KnownValue(value)
    return KnownValue(value, value * draw(SHARES), value / draw(SHARES))


# Ratios.


@given(known())
def test_a_number_beside_itself_is_one_and_a_tie(number):
    found = Ratio.of(number, number)
    assert (found.value, found.judgement) == (1, "tie")
    if found.low is not None:
        assert found.low <= 1 <= found.high


@given(known(), known())
def test_swapping_turns_a_ratio_over(a, b):
    there, back = Ratio.of(a, b), Ratio.of(b, a).inverse
    assert back.value == pytest.approx(there.value)
    assert (there.low is None) == (back.low is None) == (a.low is None or b.low is None)
    if there.low is not None:
        assert (back.low, back.high) == (pytest.approx(there.low), pytest.approx(there.high))
        assert there.low <= there.value * (1 + 1e-12)
        assert there.value <= there.high * (1 + 1e-12)


@given(known(), known())
def test_an_interval_is_no_wider_than_both_together_and_no_narrower_than_one(a, b):
    found = Ratio.of(a, b)
    if found.low is None:
        return
    slack = 1 + 1e-9
    assert b.low / a.high <= found.low * slack
    assert found.high <= b.high / a.low * slack
    assert found.low <= min(b.low / a.value, b.value / a.high) * slack
    assert max(b.high / a.value, b.value / a.low) <= found.high * slack


def test_ends_of_equal_relative_width_add_up_as_squares():
    wide = math.exp(0.1)
    number = KnownValue(1.0, 1 / wide, wide)
    found = Ratio.of(number, replace(number))
    assert math.log(found.high) == pytest.approx(0.1 * math.sqrt(2))
    assert math.log(found.low) == pytest.approx(-0.1 * math.sqrt(2))


@pytest.mark.parametrize(
    ("ratio", "judgement"),
    [
        (Ratio(1 + TIE, 1.02, 1.04), "tie"),
        (Ratio(1 / (1 + TIE), 0.9, 0.99), "tie"),
        (Ratio(1.04, 1.01, 1.07), "beyond"),
        (Ratio(0.9, 0.85, 0.99), "beyond"),
        (Ratio(1.04, 0.99, 1.09), "within"),
        (Ratio(0.9, 0.7, 1.1), "within"),
        (Ratio(1.04), "unknown"),
    ],
)
def test_a_ratio_is_judged_by_tie_and_interval(ratio, judgement):
    assert ratio.judgement == judgement
    assert ratio.inverse.judgement == judgement


# Profiles.


@given(factors)
def test_a_profile_beside_itself_differs_nowhere(factor):
    found = compared(profile_of(factor), profile_of(factor))
    assert {(ratio["value"], ratio["judgement"]) for ratio in ratios(found)} == {(1, "tie")}
    # 6 measured points, 2 best, 1 chosen: latency and throughput; 3 precisions; 4 steps twice.
    assert len(ratios(found)) == 2 * (6 + 2 + 1) + 3 + 2 * 4
    assert not any(row["differs"] for row in found["keys"] + found["settings"])
    assert found["verdict"].startswith("A tie: 50 pairs take ")


@given(factors)
def test_swapping_turns_every_ratio_over(factor):
    a, b = profile_of(), profile_of(factor, key={"device_name": "Another"})
    there, back = ratios(compared(a, b)), ratios(compared(b, a))
    assert len(there) == len(back) > 20
    for one, other in zip(there, back, strict=True):
        assert one["value"] * other["value"] == pytest.approx(1)
        assert one["judgement"] == other["judgement"]
        if one["low"] is not None:
            assert one["low"] * other["high"] == pytest.approx(1)


def test_ratios_are_b_over_a():
    found = compared(profile_of(1.0), profile_of(0.5))
    for row in found["best"] + found["chosen"]:
        assert row["latency"]["value"] == pytest.approx(0.5)
        assert row["throughput"]["value"] == pytest.approx(2)
        rates = row["a"]["pairs_per_s"], row["b"]["pairs_per_s"]
        assert row["throughput"]["value"] == pytest.approx(rates[1] / rates[0])
    assert {row["speed"]["value"] for row in found["precisions"]} == {2}
    assert [row["time"]["value"] for row in found["cost"]["steps"]] == pytest.approx([0.5] * 4)
    assert [row["size"]["value"] for row in found["memory"]["steps"]] == pytest.approx([0.5] * 4)
    step = found["cost"]["steps"][1]  # 8 pairs of 128 tokens
    assert step["a_s"] == pytest.approx(0.002 + 3e-5 * 1024 + 4e-9 * 8 * 128**2)


def test_points_are_matched_by_their_size():
    fewer = [m for m in RESULTS if m.point.batch_size != 8]
    found = compared(profile_of(), profile_of(results=fewer))
    rows = {(r["pairs"], (r["a"] or r["b"])["batch_size"]): r for r in found["points"]}
    assert rows[10, 8]["b"] is rows[10, 8]["latency"] is None
    assert rows[10, 1]["latency"]["value"] == 1
    assert rows[50, 16]["a"]["status"] == "out_of_memory"
    assert rows[50, 16]["latency"] is None
    assert len(found["points"]) == len(RESULTS)
    keys = [(r["pairs"], r["a"]["batch_size"] is None) for r in found["points"]]
    assert keys == sorted(keys)


# What is not compared.


def times(found):
    return ratios([found[name] for name in ("chosen", "best", "points", "precisions")])


def models(found):
    return ratios([found["cost"], found["memory"]])


def test_other_models_have_no_ratios():
    found = compared(profile_of(), profile_of(0.5, key={"model": "b/b", "revision": "x"}))
    assert times(found) == models(found) == []
    comparable = {"times": False, "model": False, "obstacles": ["the models differ"]}
    assert found["comparable"] == comparable
    assert "the models differ" in found["verdict"]
    assert found["best"][0]["b"]["latency_s"] == pytest.approx(0.05)


def test_the_same_files_under_another_name_are_the_same_model():
    found = compared(profile_of(), profile_of(key={"model": "/models/copy"}))
    assert found["comparable"]["times"]
    assert any("it is one model" in note for note in found["notes"])


def test_another_revision_is_compared_with_a_note():
    found = compared(profile_of(), profile_of(key={"revision": "new"}))
    assert found["comparable"]["times"]
    assert "The two profiles have different revisions of the model." in found["notes"]


def test_other_texts_have_no_ratios_of_times_but_of_predictions():
    longer = [entry(pairs, steady(0.1), batch_size=8) for pairs in (10, 50)]
    longer[1].tokens += 1  # one kind of call is enough
    found = compared(profile_of(), profile_of(results=longer))
    assert times(found) == []
    assert len(models(found)) == 8
    assert "the scored texts differ" in found["verdict"]


def test_the_name_of_the_texts_does_not_decide():
    moved = profile_of(data={"name": "/elsewhere/mine.jsonl", "pairs": 144})
    found = compared(profile_of(), moved)
    assert found["comparable"]["times"]
    assert any(row["differs"] for row in found["keys"] if row["name"] == "data.name")


def test_without_a_shared_call_there_are_no_ratios():
    other = [entry(7, steady(0.2), batch_size=1)]
    found = compared(profile_of(), profile_of(results=other))
    assert ratios([found["chosen"], found["best"], found["points"]]) == []
    assert "no number of pairs was measured on both" in found["verdict"]
    moved = profile_of(results=other, data={"name": "mine", "pairs": 144})
    assert "the scored texts differ" in compared(profile_of(), moved)["verdict"]


def test_memory_of_a_gpu_is_not_compared_with_a_process():
    found = compared(profile_of(), profile_of(key={"device": "cuda:0"}))
    assert ratios(found["memory"]) == []
    assert len(ratios(found["cost"])) == 4
    assert "The memory of a process is not compared with the memory of a GPU." in found["notes"]
    cards = [profile_of(key={"device": f"cuda:{n}"}) for n in range(2)]
    assert len(ratios(compared(*cards)["memory"])) == 4


def test_profiles_without_models_have_none():
    found = compared(profile_of(), replace(profile_of(), cost=None, memory=None))
    assert found["cost"]["b"] is found["memory"]["b"] is None
    assert models(found) == []
    assert found["cost"]["steps"][0]["a_s"] > 0
    bare = replace(profile_of(), cost=None, memory=None, precisions=[])
    found = compared(bare, bare)
    for make in (comparison_page.cost, comparison_page.memory, comparison_page.precisions):
        assert make(found).rows == []


# In words.

SURE = [entry(50, steady(0.4), batch_size=8)]


def headline(factor, results=SURE):
    return compared(profile_of(results=results), profile_of(factor, results=results))["verdict"]


def test_the_headline_names_the_faster_profile_the_ratio_and_its_certainty():
    for factor, first, last in ((0.5, "B", "A"), (2.0, "A", "B")):
        text = headline(factor).replace("\u00a0", " ")
        assert text.startswith(f"{first} is 2.00 times as fast as {last}: 50 pairs take ")
        assert f" ms on {first} and " in text
        assert (
            "larger than the variation between runs (95 % confidence interval 1.74 to 2.30" in text
        )
    assert "A tie: 50 pairs take" in headline(1.02)


def test_the_headline_says_when_the_difference_is_uncertain():
    assert "too few runs to compare" in headline(0.5, [entry(50, [0.4] * 2, batch_size=8)])
    unsteady = [0.2 + 0.05 * i for i in range(9)]
    text = headline(0.9, [entry(50, unsteady, batch_size=8)])
    assert "within the variation between runs" in text
    assert "there may be none" in text


def test_the_best_batch_sizes_are_compared_if_the_chosen_setting_has_no_point():
    settings = TunedSettings("bf16", 12345, None, 2, None)
    a, b = (replace(profile_of(f), settings=settings) for f in (1.0, 0.5))
    found = compared(a, b)
    assert found["chosen"] == []
    assert "each with its best batch size" in found["verdict"]


def test_a_budget_without_end_is_no_number():
    settings = TunedSettings("bf16", NO_BUDGET, 8, 2, None)
    made = replace(profile_of(), settings=settings)
    found = compared(made, made)
    assert {row["name"]: row["a"] for row in found["settings"]}["token_budget"] is None
    assert [row["a"]["batch_size"] for row in found["chosen"]] == [8, 8]


def test_what_differs_is_marked():
    found = compared(profile_of(), profile_of(key={"versions": {"torch": "9", "numpy": "2"}}))
    grid = comparison_page.keys(found)
    marked = {grid.rows[index][0]: grid.rows[index][1:] for index in grid.marked}
    assert marked == {"torch": ["2.13.0", "9"], "numpy": ["–", "2"]}


def test_warnings_and_learned_budgets_name_their_profile():
    noisy = profile_of(warnings=["It was loud."], learned_token_budget=512)
    found = compared(profile_of(warnings=[]), noisy)
    assert found["notes"][0] == "B: It was loud."
    assert found["notes"][1].startswith("B: memory ran out after tuning")
    precise = compared(profile_of(), profile_of(key={"precision": "fp32"}))
    assert "precisions differ" in precise["notes"][0]


def test_every_cell_of_a_table_has_a_column():
    found = compared(profile_of(), profile_of(0.5))
    for make in (*comparison_page.GRIDS, comparison_page.points):
        assert {len(row) for row in make(found).rows} == {len(make(found).columns)}


def test_medians_that_are_alike_without_an_interval_are_not_called_a_tie():
    text = headline(1.01, [entry(50, [0.4] * 2, batch_size=8)])
    assert "A tie" not in text
    assert "too few runs to compare" in text
    assert "--time-limit" in text
