"""`echelon plan`: cost coefficients of a profile, the answer, and errors for impossible goals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import run_command
from hypothesis import given
from hypothesis import strategies as st

from echelon.errors import ProfileError
from echelon.profile import Profile, ProfileKey, TunedSettings
from echelon.scheduling.cost_model import Coefficients, MemoryModel
from echelon.scheduling.fit import CostFit, FitError, MemoryFit
from echelon.simulation import capacity, capacity_plan, cluster_traffic
from echelon.simulation.fitted_models import cost_of, lengths_of, memory_of, noise_of

MIB = 2**20
ROOT = Path(__file__).parents[2]
SHARE = 5e-4  # of a squared token's price in a token's


def point(steps, tokens, median, **more):
    return {
        "status": "ok",
        "steps": steps,
        "tokens": tokens,
        "cost_tokens": tokens,
        "samples": 3,
        "seconds": [median] * 3,
        "latency_s": {"median": median},
        "peak_bytes": 700 * MIB + 1000 * tokens // steps,
    } | more


def profile(points=None, *, base=0.004, token=7e-5, **changes):
    if points is None:
        squares = 100 * SHARE + 1  # every text has 100 tokens
        points = [
            point(steps, 5000, base * steps + token * 5000 * squares) for steps in (2, 5, 10, 50)
        ]
    made = Profile(
        key=ProfileKey("demo", "1", "cpu", "a CPU", "fp32", {}),
        settings=TunedSettings("fp32", 2048, None, 2, changes.pop("max_length", None)),
        created="2026-01-01T00:00:00+00:00",
        data={"tokens": {"mean": 100.0, "p50": 100.0, "p90": 100.0, "max": 300}},
        points=points,
    )
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made


# Cost coefficients.


@given(st.floats(0, 0.05), st.floats(1e-6, 1e-3))
def test_cost_coefficients_are_found_again(base, token):
    found = cost_of(profile(base=base, token=token)).coefficients
    assert found.base_s == pytest.approx(base, rel=1e-6, abs=1e-7)
    assert found.token_s == pytest.approx(token, rel=1e-3, abs=1e-8)
    assert found.square_s == pytest.approx(token * SHARE, rel=1e-3, abs=1e-11)


def test_coefficients_that_tuning_fitted_are_used():
    fitted = CostFit(
        Coefficients(0.002, 3e-5, 4e-9, 512, 1e-5), "rectangular", FitError(0.02, 0.05, 9), 0.01
    )
    memory = MemoryFit(MemoryModel(5e8, 1e4, 20.0), FitError(0.02, 0.05, 9))
    made = profile(cost=fitted.as_dict(), memory=memory.as_dict())
    assert cost_of(made).coefficients == fitted.coefficients
    assert cost_of(made).padding == "rectangular"
    assert memory_of(made) == MemoryModel(5e8, 1e4 + 20.0 * 100)
    with pytest.raises(ProfileError, match="damaged cost model"):
        cost_of(profile(cost={"coefficients": {}}))


def test_no_coefficient_is_negative():
    falling = [point(steps, 5000, 1.0 / steps) for steps in (1, 2, 4)]
    assert cost_of(profile(falling)).coefficients.base_s == 0
    found = cost_of(profile([point(2, 100, 0.2), point(2, 900, 0.1)])).coefficients
    assert found.token_s == 0
    assert 0.05 <= found.base_s <= 0.1


def test_measured_padding_makes_a_padded_model():
    assert cost_of(profile()).padding == "none"
    points = [point(2, 100, 0.1, cost_tokens=150), point(3, 100, 0.2)]
    assert cost_of(profile(points)).padding == "rectangular"


def test_points_that_were_not_measured_do_not_count():
    missing = {"status": "out_of_memory", "steps": 0}
    with pytest.raises(ProfileError, match="too few"):
        cost_of(profile([point(1, 100, 0.1), missing]))
    assert memory_of(profile([missing])) is None
    assert noise_of(profile([missing])) == 0.0
    assert lengths_of(profile(data={})) is None


def test_memory_is_a_line_above_all_points():
    memory = memory_of(profile())
    assert memory.fixed_bytes == pytest.approx(700 * MIB)
    assert memory.token_bytes == pytest.approx(1000)
    points = [point(1, n, 0.1, peak_bytes=peak * MIB) for n, peak in ((10, 50), (20, 90), (30, 60))]
    uneven = memory_of(profile(points))
    assert all(uneven.bytes_of(p["tokens"]) >= p["peak_bytes"] - 1 for p in points)
    shrinking = [point(1, n, 0.1, peak_bytes=(100 - n) * MIB) for n in (10, 20)]
    assert memory_of(profile(shrinking)) == MemoryModel(90 * MIB, 0.0)


@given(st.floats(0, 1e9), st.floats(0.1, 1e6), st.floats(1, 1e10))
def test_the_largest_step_within_a_limit_fits(base, per_token, limit):
    memory = MemoryModel(base, per_token)
    tokens = memory.tokens_within(limit)
    if tokens:
        assert memory.bytes_of(tokens) <= limit * (1 + 1e-9)
    assert memory.bytes_of(tokens + 1) > limit * (1 - 1e-9)


def test_noise_is_how_runs_differ_and_lengths_are_the_texts():
    points = [point(1, 100, 0.1, seconds=[0.1, 0.1 * np.exp(0.2)], samples=2)] * 2
    assert noise_of(profile(points)) == pytest.approx(0.2 / np.sqrt(2))
    lengths = lengths_of(profile())
    assert (lengths.mean, lengths.sigma, lengths.maximum) == (100.0, 0.0, 300)


# The command.


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    """The command on a profile: (exit code, output, error output)."""
    monkeypatch.setattr(capacity, "REQUESTS", 400)
    monkeypatch.setattr(capacity_plan, "BUDGETS", {"cpu": (256, 1024)})
    monkeypatch.setattr(capacity_plan, "ROUTINGS", ("tokens", "random"))
    monkeypatch.setattr(cluster_traffic, "BLOCK", 512)
    monkeypatch.setattr(capacity, "WARM_S", 0.3)
    monkeypatch.setattr(capacity, "WINDOW_S", 1.0)
    monkeypatch.setattr(capacity, "FULL", 200)

    def called(*arguments, made=None):
        path = tmp_path / "profile.json"
        (made or profile()).save(path)
        return run_command(capsys, monkeypatch, "plan", "--profile", path, *arguments)

    return called


ASKED = ("--rate", 100, "--slo-p99-ms", 300)


def test_the_answer_adds_up(plan):
    code, out, err = plan(*ASKED, "--json", "--price-per-hour", 2)
    assert (code, err) == (0, "")
    found = json.loads(out)
    given_answer = found["answer"]
    assert (found["schema"], found["kind"]) == (1, "plan")
    # A document of 100 tokens takes 7.35 ms and its share of a step: 1,000 a second, 8 machines.
    assert 9 <= given_answer["machines"] <= 12
    assert given_answer["predicted"]["p99_s"] <= 0.3
    assert given_answer["bears_rate"] >= 120
    assert given_answer["headroom"] == pytest.approx(given_answer["bears_rate"] / 100 - 1)
    assert given_answer["price_per_hour"] == 2 * given_answer["machines"]
    assert given_answer["price_per_million"] == pytest.approx(given_answer["price_per_hour"] / 0.36)
    counts = [row["machines"] for row in found["budgets"] if row["machines"]]
    assert min(counts) == given_answer["machines"]
    rates = [row["machines"] for row in found["rates"]]
    assert rates == sorted(rates)
    assert [row["lengths"] for row in found["lengths"]] == list(capacity_plan.LENGTHS)
    assert (
        found["lengths"][0]["machines"] < given_answer["machines"] < found["lengths"][1]["machines"]
    )
    routed = {row["routing"]: row["bears_rate"] for row in found["routings"]}
    assert routed["random"] < routed["tokens"] == given_answer["bears_rate"]


def test_the_page_names_every_field_of_the_answer(plan):
    _, out, _ = plan(*ASKED, "--json", "--day", "1,1", "--price-per-hour", 1)
    page = (ROOT / "docs/PLAN.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))

    def check(content):
        for name, value in content.items():
            assert name in named, name
            rows = value if isinstance(value, list) else [value]
            for row in rows:
                if isinstance(row, dict) and name not in {"refused", "coefficients"}:
                    check(row)

    check(json.loads(out))


def test_people_get_tables(plan):
    code, out, _ = plan(*ASKED, "--workers", 2, "--price-per-hour", 2, "--day", "0.5,1")
    assert code == 0
    for words in ("machines with", "Headroom", "Price", "By token budget", "Sensitivity", "A day"):
        assert words in out


def test_more_workers_a_machine_take_fewer_machines(plan):
    one, two = (
        json.loads(plan(*ASKED, "--json", "--workers", workers)[1])["answer"] for workers in (1, 2)
    )
    assert two["machines"] < one["machines"]
    assert two["workers"] == 2 * two["machines"]


def test_a_day_shows_what_its_quiet_hours_leave_unused(plan):
    found = json.loads(plan(*ASKED, "--json", "--day", "typical")[1])["day"]
    assert len(found["parts"]) == capacity.PARTS
    assert found["missed"] <= 0.01
    assert 0.3 < found["utilisation"] < 0.8
    assert found["requests"] < 100 * 86_400


def test_a_trace_gives_rate_documents_and_lengths(plan, tmp_path):
    path = tmp_path / "trace.csv"
    rows = [f"{100 + i / 20},{1 + i % 3},50" for i in range(1200)]
    path.write_text("timestamp,documents,tokens\n" + "\n".join(rows), encoding="utf-8")
    found = json.loads(plan("--slo-p99-ms", 300, "--trace", path, "--json")[1])
    assert found["asked"]["rate"] == pytest.approx(20.0, rel=0.01)
    assert found["asked"]["trace_requests"] == 1200
    assert found["notes"] == []
    more = json.loads(plan("--slo-p99-ms", 300, "--trace", path, "--rate", 200, "--json")[1])
    assert more["answer"]["machines"] > found["answer"]["machines"]


def test_the_profiles_own_budget_is_tried_first_and_a_better_one_taken(plan):
    made = profile(base=0.02, learned_token_budget=128)
    found = json.loads(plan(*ASKED, "--json", made=made)[1])
    rows = {row["token_budget"]: row["machines"] for row in found["budgets"]}
    assert list(rows) == [128, 1024, 256]
    assert found["answer"]["token_budget"] == 1024
    assert rows[128] is None or rows[128] > rows[1024]
    assert rows[256] is None


def test_memory_bounds_the_budget(plan):
    found = json.loads(plan(*ASKED, "--json", "--memory-limit", 701)[1])
    assert max(row["token_budget"] for row in found["budgets"]) == 1024


def test_a_hundred_thousand_documents_a_second(plan):
    found = json.loads(plan("--rate", 10_000, "--slo-p99-ms", 300, "--json")[1])
    machines = found["answer"]["machines"]
    assert 800 < machines < 1400


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        (("--rate", -5, "--slo-p99-ms", 200), "--rate", "requests a second"),
        (("--slo-p99-ms", 200), "--rate", "--trace"),
        (("--rate", 5, "--slo-p99-ms", 0), "--slo-p99-ms", "such as 200"),
        (("--rate", 5, "--slo-p99-ms", 1), "--slo-p99-ms", "--overhead-ms"),
        (("--rate", 5, "--slo-p99-ms", 9), "--slo-p99-ms", "a single pair alone takes"),
        (("--rate", 5, "--slo-p99-ms", 60), "--slo-p99-ms", "at most 6 documents"),
        ((*ASKED, "--tokens", "600", "--max-length", 512), "--tokens", "at most 512"),
        ((*ASKED, "--tokens", "0"), "--tokens", "5-50"),
        ((*ASKED, "--documents", "x"), "--documents", "5-50"),
        ((*ASKED, "--memory-limit", 600), "--memory-limit", "or more"),
        ((*ASKED, "--memory-limit", -1), "--memory-limit", "above 0"),
        ((*ASKED, "--workers", 0), "--workers", "1 or more"),
        ((*ASKED, "--overhead-ms", -1), "--overhead-ms", "0 or more"),
        ((*ASKED, "--headroom-percent", -1), "--headroom-percent", "0 or more"),
        ((*ASKED, "--price-per-hour", 0), "--price-per-hour", "above 0"),
        ((*ASKED, "--day", "a,b"), "--day", "typical"),
        ((*ASKED, "--day", "0,0"), "--day", "0.2,0.5,1"),
        ((*ASKED, "--trace", "/nowhere.csv"), "--trace", "Check its name"),
        ((*ASKED, "--trace", "/dev/null"), "--trace", "header"),
    ],
)
def test_an_impossible_option_is_refused_with_what_is_possible(plan, arguments, field, words):
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"Error: {field}:")
    assert words in err


def test_the_possible_goal_of_an_error_holds(plan):
    _, _, err = plan("--rate", 5, "--slo-p99-ms", 60)
    (possible,) = re.findall(r"Possible are ([\d.]+)\s+ms", err)
    assert plan("--rate", 5, "--slo-p99-ms", possible)[0] == 0
    assert plan("--rate", 5, "--slo-p99-ms", 60, "--documents", 6)[0] == 0


def test_a_profile_without_the_needed_data_is_refused(plan):
    code, _, err = plan(*ASKED, made=profile(data={}))
    assert (code, "--tokens" in err) == (2, True)
    code, _, err = plan(*ASKED, made=profile([]))
    assert (code, "echelon tune" in err) == (4, True)
    points = [point(2, 5000, 0.5, peak_bytes=None), point(9, 5000, 0.6, peak_bytes=None)]
    code, _, err = plan(*ASKED, "--memory-limit", 900, made=profile(points))
    assert (code, "no measured memory" in err) == (2, True)


def test_lengths_beyond_what_was_measured_are_noted(plan):
    found = json.loads(plan(*ASKED, "--tokens", "50-400", "--json")[1])
    assert "extrapolated" in found["notes"][0]


# What the deployment guide shows.


def test_the_plan_in_the_deployment_guide_is_what_the_command_says(capsys, monkeypatch):
    page = (ROOT / "docs/DEPLOY.md").read_text("utf-8")
    section = page[page.index("## How many") : page.index("## Scaling out")]
    (command,) = re.findall(r"^echelon (plan .*)$", section, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    code, printed, _ = run_command(capsys, monkeypatch, *command.split(), "--quiet")
    assert code == 0
    (shown,) = re.findall(r"```\n(51 .*?)```", section, re.DOTALL)
    lines = printed.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert set(shown.splitlines()) <= {line.strip() for line in lines}
    cells = re.sub(r"[│\s]+", " ", printed)
    rows = re.findall(r"^\| .*? \| (\d+) \| (\d+ ms) \|$", section, re.MULTILINE)
    assert len(rows) == 3
    for machines, p99 in rows:
        assert f"{machines} {p99} " in cells
    for rate in (190, 569, 600):
        assert f" {rate}/s " in cells
        assert str(rate) in section
