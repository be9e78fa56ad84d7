"""What a recommendation is made of: what is asked, candidates, texts of a length, corrections."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuned_models import COEFFICIENTS, MIB, profile, toy

from echelon.errors import InvalidInput
from echelon.options import Options
from echelon.profile import TunedSettings
from echelon.progress import no_progress
from echelon.scheduling.cost_model import CostModel, MemoryModel, work_of
from echelon.scheduling.packing import NO_BUDGET
from echelon.server.metrics import RATIOS
from echelon.simulation.workload import Arrival, ArrivalRecord, FixedSize, UniformSize
from echelon.tuning import candidates as candidates_module
from echelon.tuning.candidates import (
    MaxLengthCheck,
    budgets,
    candidates,
    check_max_lengths,
    fitted_models,
    paced,
)
from echelon.tuning.goal import ScenarioGoal, ScenarioLimits
from echelon.tuning.recommendation import (
    LoadMetrics,
    Validation,
    agree,
    correct,
    deviations,
    noise_of_ratios,
    pace_of,
    squares_per_token,
)
from echelon.tuning.scenario import Candidate, cut, predict
from echelon.tuning.scenario_model import (
    WorkloadTexts,
    length_policy_of,
    open_for_scenario,
    require_texts,
)
from echelon.tuning.validation import (
    ServerFailed,
    ServerProcess,
    ValidationContext,
    load_test_plan,
    serve_arguments,
)


def point(budget, status="ok"):
    return {"token_budget": budget, "batch_size": None, "pairs": 8, "status": status}


@pytest.fixture(scope="module")
def model(bert):
    return toy(bert)


# Goals.


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"scenario": "batch"}, "--scenario"),
        ({"scenario": "api", "rate": 5.0}, "--slo-p99-ms"),
        ({"scenario": "concurrent", "goal_s": 0.1}, "--rate"),
        ({"scenario": "api", "goal_s": 0.1, "rate": -1.0}, "--rate"),
        ({"scenario": "api", "goal_s": float("nan"), "rate": 1.0}, "--slo-p99-ms"),
        ({"scenario": "api", "goal_s": 0.1, "rate": 9.0, "trace": (ArrivalRecord(0.0),)}, "--rate"),
        ({"scenario": "api", "goal_s": 0.1, "rate": 0.1}, "--verify-s"),
        ({"scenario": "edge", "rate": 1.0}, "--rate"),
        ({"scenario": "offline", "goal_s": 0.1}, "--slo-p99-ms"),
        ({"scenario": "edge", "memory_limit_bytes": 0.0}, "--memory-limit"),
        ({"scenario": "edge", "verify_s": -1.0}, "--verify-s"),
        ({"scenario": "edge", "allow": ("speed",)}, "--allow"),
    ],
)
def test_a_wrong_goal_is_refused_with_the_remedy(asked, field):
    with pytest.raises(InvalidInput) as caught:
        ScenarioGoal(**asked)
    assert caught.value.field == field
    assert caught.value.remedy


def test_each_scenario_has_its_usual_documents_and_a_trace_its_own_rate():
    assert [str(ScenarioGoal(s).sizes) for s in ("edge", "offline")] == ["1-10", "50-200"]
    trace = tuple(ArrivalRecord(float(i) / 2, 3, 40) for i in range(9))
    goal = ScenarioGoal("api", goal_s=0.1, trace=trace, documents=FixedSize(4))
    assert goal.traffic(FixedSize(50)).rate == 2.0
    assert goal.as_dict()["trace_requests"] == 9
    with pytest.raises(InvalidInput, match="one moment"):
        ScenarioGoal("api", goal_s=0.1, trace=trace[:1]).traffic(FixedSize(50))


@pytest.mark.parametrize(
    ("goal", "field"),
    [
        (ScenarioGoal("edge", tokens=FixedSize(131)), "--tokens"),
        (
            ScenarioGoal("edge", trace=(ArrivalRecord(0.0, 1, 40), ArrivalRecord(1.0, 1, 200))),
            "--tokens",
        ),
        (ScenarioGoal("edge", tokens=FixedSize(3)), "--tokens"),
        (ScenarioGoal("edge", goal_s=1e-7), "--slo-p99-ms"),
        (ScenarioGoal("edge", memory_limit_bytes=5.0 * MIB), "--memory-limit"),
    ],
)
def test_a_goal_that_the_model_cannot_reach_is_refused_before_tuning(bert, goal, field):
    with pytest.raises(InvalidInput) as caught:
        open_for_scenario(bert, Options(device="cpu", threads=1), None, goal)
    assert caught.value.field == field
    assert any(character.isdigit() for character in caught.value.remedy)


# Candidates.


def test_budgets_stay_below_what_memory_refused_and_allows():
    assert budgets(profile(), ScenarioGoal("edge")) == [256, 512, 700, 1024, 2048, 4096]
    refused = profile(points=[point(2048, "out_of_memory"), point(1024)])
    assert budgets(refused, ScenarioGoal("edge")) == [256, 512, 700, 1024]
    assert budgets(profile(learned_token_budget=300), ScenarioGoal("edge")) == [256]
    assert budgets(profile(learned_token_budget=100), ScenarioGoal("edge")) == [100]
    limited = ScenarioGoal("edge", memory_limit_bytes=380.0 * MIB)
    assert budgets(profile(), limited) == [256, 512, 700]
    free = profile(settings=TunedSettings("bf16", NO_BUDGET, 4, 2, None))
    assert max(budgets(free, ScenarioGoal("edge"))) == 4096


def test_other_precisions_and_lengths_are_candidates_when_allowed_and_checked():
    made = profile()
    base = candidates(made, ScenarioGoal("edge"), fitted_models(made), ())
    assert {one.precision for one in base} == {"bf16"}
    assert {one.agreement for one in base} == {0.99}
    lengths = [
        MaxLengthCheck(100, "bf16", 0.98, 1.0, None, 0.5, 0.5, passed=True, reason=None),
        MaxLengthCheck(
            64, "bf16", 0.5, 0.5, None, 0.5, 0.5, passed=False, reason="ranks differently"
        ),
    ]
    more = candidates(
        made, ScenarioGoal("edge", allow=("precision",)), fitted_models(made), lengths
    )
    assert {(one.precision, one.max_length, one.agreement) for one in more} == {
        ("bf16", None, 0.99),
        ("bf16", 100, 0.98),
        ("fp32", None, 1.0),
    }
    steps = {one.precision: one.cost.predict((50, 50)) for one in more if one.token_budget == 256}
    assert steps["fp32"] == pytest.approx(2 * steps["bf16"])


def test_several_gpus_give_candidates_with_several_workers():
    key = replace(profile().key, device="cuda:0")
    gpus = profile(key=key, machine={"gpus": [{}, {}]})
    found = candidates(gpus, ScenarioGoal("edge"), fitted_models(gpus), ())
    assert {one.workers for one in found} == {1, 2}


def test_a_limit_without_measured_memory_is_refused():
    made = profile(memory=None)
    with pytest.raises(InvalidInput, match="--memory-limit"):
        candidates(made, ScenarioGoal("edge", memory_limit_bytes=1e9), fitted_models(made), ())


# Requests as texts.


@pytest.mark.parametrize("tokens", [FixedSize(70), UniformSize(50, 120)])
def test_texts_have_the_lengths_that_are_simulated(model, tokens):
    traffic = ScenarioGoal("edge", documents=FixedSize(8)).traffic(tokens)
    encoder, topics = model.check.encoder, model.texts.topics
    load = WorkloadTexts(traffic, topics, length_policy_of(encoder))
    requests = load.first(160)
    assert sum(one.documents for one in requests) == 160
    wanted = np.array([length for one in requests for length in one.lengths])
    pairs = [(q, d) for q, documents in load.texts(requests, 0) for d in documents]
    sent = encoder.encode(pairs, model.longest, "longest_first").lengths
    assert sent.mean() == pytest.approx(wanted.mean(), rel=0.01)
    assert np.abs(sent - wanted).max() <= 2  # cut within a word, it may count otherwise
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("trace", [(), tuple(ArrivalRecord(i / 4, 2, 60) for i in range(40))])
def test_the_load_test_sends_the_requests_that_were_simulated(model, trace, tmp_path):
    rate = None if trace else 4.0
    goal = ScenarioGoal("api", 0.5, rate, trace, UniformSize(1, 6), verify_s=6.0, seed=3)
    policy = length_policy_of(model.check.encoder)
    load = WorkloadTexts(goal.traffic(UniformSize(40, 90)), model.texts.topics, policy)
    context = ValidationContext(
        goal, model, load, tmp_path / "p.json", on_gpu=False, on_progress=no_progress
    )
    simulated = load.requests(6.0, 3)
    plan = load_test_plan(context, "http://127.0.0.1:1")
    assert list(plan.workload.requests(6.0)) == simulated
    assert len(simulated) > 10
    assert plan.length_policy is policy


def test_the_server_gets_the_profile_and_the_users_options(model, tmp_path):
    context = ValidationContext(
        ScenarioGoal("edge"),
        model,
        None,
        tmp_path / "p.json",
        on_gpu=False,
        on_progress=no_progress,
    )
    given = serve_arguments(context, Candidate(256, CostModel()))
    assert given[0] == str(model.name)
    assert given[given.index("--profile") + 1] == str(tmp_path / "p.json")
    assert given[given.index("--device") + 1] == "cpu"
    assert given[given.index("--score-cache") + 1] == "0"
    many = serve_arguments(context, Candidate(256, CostModel(), workers=2))
    assert many[many.index("--device") + 1] == "cuda"


def test_a_server_that_does_not_start_says_why():
    with (
        pytest.raises(ServerFailed, match=r"no folder.*--verify-s 0"),
        ServerProcess(["/no/such/model"]),
    ):
        pass


# A shorter length.


def verdict(tau):
    return {"tau": tau, "overlap": 1.0, "ndcg_loss": None, "passed": tau >= 0.97}


@pytest.mark.parametrize(
    ("tau", "lengths", "said"),
    [(0.99, (60, 90), None), (0.9, (60, 90), "do not rank"), (0.99, (120,) * 9, "not valid")],
)
def test_a_shorter_length_is_checked_on_texts_as_long_as_the_load(
    model, monkeypatch, tau, lengths, said
):
    monkeypatch.setattr(candidates_module, "LENGTHS", (110, 500))
    monkeypatch.setattr(candidates_module.Comparisons, "row", lambda *_: verdict(tau))
    monkeypatch.setattr(candidates_module, "_lengths", lambda *_: [60, 120])
    requests = [Arrival(0.0, len(lengths) + 1, (*lengths, 120))]
    (found,) = check_max_lengths(model.check, "fp32", (), requests, no_progress)
    assert (found.max_length, found.tau, found.cut) == (110, tau, 0.5)
    assert found.reason is None if said is None else said in found.reason


def test_the_agreement_of_a_shorter_length_is_measured(model, monkeypatch):
    monkeypatch.setattr(candidates_module, "LENGTHS", (129, 40))
    requests = [Arrival(0.0, 1, (130,))]
    little, much = check_max_lengths(model.check, "fp32", (), requests, no_progress)
    assert little.tau > 0.9 > much.tau
    assert much.cut > little.cut
    assert check_max_lengths(model.check, "fp32", (), [Arrival(0.0, 1, (20,))], no_progress) == []


# Predicted beside measured.


def metrics(p50=0.01, p99=0.02, per_s=100.0, memory=400.0 * MIB):
    return LoadMetrics(p50, p50, p99, 10.0, per_s, memory, 50, 0)


@given(st.floats(0.11, 9.9), st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_the_pace_of_steps_is_found_again(pace, lengths):
    cost = CostModel(COEFFICIENTS)
    slow = paced(cost, pace)
    assert slow.predict(lengths) == pytest.approx(pace * cost.predict(lengths))
    work, share = work_of(lengths, "none"), squares_per_token([Arrival(0, 1, tuple(lengths))], None)
    found = pace_of(slow.predict(lengths), 1, work.tokens, share, cost)
    assert found == pytest.approx(pace, rel=1e-3)


def test_the_pace_without_measurements_is_1_and_faults_are_bounded():
    assert pace_of(0.0, 0, 0, 1.0, CostModel(COEFFICIENTS)) == 1.0
    assert pace_of(1e9, 1, 100, 50.0, CostModel(COEFFICIENTS)) == 10.0


def test_prediction_and_measurement_agree_within_a_quarter():
    off = deviations("api", metrics(), metrics(p50=0.012, p99=0.026))
    assert off["p50_s"] == pytest.approx(0.2)
    assert not agree(off)
    assert agree(deviations("api", metrics(), metrics(p99=0.024, memory=900.0 * MIB)))
    assert agree(deviations("offline", metrics(), metrics(p99=9.0, per_s=80.0)))
    assert not agree(deviations("offline", metrics(), metrics(per_s=70.0)))


def test_a_correction_takes_what_was_measured():
    one = Candidate(512, CostModel(COEFFICIENTS), memory=MemoryModel(300.0 * MIB, 1.0))
    seen = Validation(metrics(memory=800.0 * MIB), 2.0, 0.007, held=True)
    (slower,), limits = correct([one], ScenarioLimits(overhead_s=0.002), metrics(), seen, 1)
    assert slower.cost.predict((50,)) == pytest.approx(2 * one.cost.predict((50,)))
    assert (limits.overhead_s, limits.noise) == (0.007, 0.0)
    assert correct([one], limits, metrics(), replace(seen, noise=0.2), 1)[1].noise == 0.2
    calm = replace(seen, overhead_s=None)
    assert (
        correct([one], ScenarioLimits(overhead_s=0.002), metrics(), calm, 1)[1].overhead_s == 0.002
    )


@pytest.mark.parametrize(
    ("came", "workers", "fixed"), [(800, 1, 700), (800, 2, 500), (300, 1, 200), (1, 1, 0)]
)
def test_memory_is_corrected_both_ways_by_what_a_worker_holds(came, workers, fixed):
    one = Candidate(512, CostModel(COEFFICIENTS), memory=MemoryModel(300.0 * MIB, 1.0))
    seen = Validation(metrics(memory=came * MIB), 1.0, None, held=True)
    (found,), _ = correct([one], ScenarioLimits(), metrics(), seen, workers)
    assert found.memory == MemoryModel(fixed * MIB, 1.0)


@pytest.mark.parametrize(
    ("sizes", "trace"), [(FixedSize(6), ()), (FixedSize(90), (ArrivalRecord(0.0, 2, 6),))]
)
def test_pairs_shorter_than_the_marks_of_requests_are_refused(model, sizes, trace):
    topics, encoder = model.texts.topics, model.check.encoder
    require_texts(topics, encoder, FixedSize(90), (), model.longest)
    with pytest.raises(InvalidInput, match="--tokens: pairs of 6 tokens cannot be made"):
        require_texts(topics, encoder, sizes, trace, model.longest)


def test_the_noise_of_steps_is_read_from_their_ratios():
    bounds = [*RATIOS, math.inf]

    def counted(ratios):
        return {bound: float((ratios <= bound).sum()) for bound in bounds}

    chance = np.random.default_rng(0)
    for noise in (0.1, 0.2, 0.4):
        ratios = 1.1 * chance.lognormal(0.0, noise, 4000)
        assert noise_of_ratios(counted(ratios)) == pytest.approx(noise, rel=0.1)
    assert noise_of_ratios(counted(np.full(50, 1.02))) == pytest.approx(0.0, abs=1e-9)
    assert noise_of_ratios(counted(np.array([0.1, 30.0]))) > 1
    assert noise_of_ratios(counted(np.array([1.0]))) is None


def test_given_requests_arrive_as_in_their_scenario():
    requests = [Arrival(0.0, 2, (50, 300)), Arrival(0.001, 1, (60,))]
    one = Candidate(1000, CostModel(COEFFICIENTS), max_length=100)
    assert [list(a.lengths) for a in cut(requests, 100)] == [[50, 100], [60]]
    first = one.cost.predict((50, 100))
    calm, largest = predict("edge", requests, one, ScenarioLimits())
    assert largest == 150
    assert calm.longest_s == pytest.approx(first)
    found = LoadMetrics.of("edge", calm, one, largest)
    assert found.requests_per_s == pytest.approx(1 / calm.mean_s)
    once, largest = predict("offline", requests, one, ScenarioLimits(overhead_s=1.0))
    assert largest == 150  # the first to come finds an idle worker
    assert once.duration_s == pytest.approx(first + one.cost.predict((60,)))
    assert LoadMetrics.of("offline", once, one, largest).p99_s is None
