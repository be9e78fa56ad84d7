"""int8 is never used without a check: that it ranks as fp32 does."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SENTENCES, offer, random_batch

from echelon import InvalidInput, Reranker
from echelon.data import Texts, Topic, load_texts
from echelon.engine import check_store, precision_check
from echelon.engine.agreement import decided
from echelon.engine.launch import launch
from echelon.models.device import choose_precision, multiplies_int8
from echelon.models.hub import resolve
from echelon.models.registry import layer_errors, open_scorer
from echelon.options import Options
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tuning.tuner import TuningPlan, tune
from echelon.types import RerankRequest

pytestmark = pytest.mark.device

needs_int8 = pytest.mark.skipif(not multiplies_int8(), reason="needs AVX-512 VNNI or AMX")

CPU = torch.device("cpu")

ALL = ("fp32", "bf16", "int8")


@pytest.fixture(autouse=True)
def own_home(request, tmp_path, monkeypatch):
    """Results of checks go to a folder of the test; the demo model stays where it is."""
    if "demo_folder" in request.fixturenames:
        request.getfixturevalue("demo_folder")
    monkeypatch.setattr(check_store, "home", lambda: tmp_path)
    return tmp_path


def check_of(folder) -> precision_check.PrecisionCheck:
    return precision_check.PrecisionCheck.of(
        resolve(folder), Options(device="cpu"), PairEncoder(folder), load_texts(None, "en")
    )


PAIRS = [("where is the key", "under the mat"), ("where is the key", "bread")]


@pytest.fixture(scope="module")
def checked(demo_folder, tmp_path_factory):
    """The demo model was opened in int8: what was compared, the scores, and what was stored."""
    home, compared = tmp_path_factory.mktemp("home"), []
    real = precision_check.compare_precisions

    def compare(*arguments):
        compared.append(real(*arguments))
        return compared[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_store, "home", lambda: home)
        patch.setattr(precision_check, "compare_precisions", compare)
        with Reranker(demo_folder, device="cpu", precision="int8", threads=1) as first:
            assert first.facts.precision == "int8"
            scores = first.score(PAIRS)
    (rows,) = compared
    return rows, scores, home


@needs_int8
def test_int8_of_the_demo_model_passes_the_check(checked):
    rows, _, _ = checked
    assert [row["precision"] for row in rows] == ["fp32", "int8"]
    exact, int8 = rows
    assert exact["max_delta"] == 0
    assert int8["passed"]
    assert 0 < int8["max_delta"] < 0.5
    assert int8["tau"] >= 0.97


@needs_int8
def test_int8_is_checked_once_and_the_result_is_stored(demo_folder, checked, monkeypatch):
    _, scores, home = checked
    (kept,) = (home / "precision_checks").iterdir()
    content = json.loads(kept.read_text())
    assert content["int8"]["passed"]
    assert content["key"]["precision"] == "int8"

    monkeypatch.setattr(check_store, "home", lambda: home)
    monkeypatch.setattr(
        precision_check, "compare_precisions", lambda *_: pytest.fail("measured again")
    )
    with Reranker(demo_folder, device="cpu", precision="int8", threads=1) as second:
        np.testing.assert_array_equal(second.score(PAIRS), scores)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {}, "int8": {}}', '{"int8": 3}'])
def test_a_damaged_stored_result_is_measured_again(bert, own_home, monkeypatch, content):
    offer(monkeypatch, *ALL)
    asked = []

    def compare(*_):
        asked.append(1)
        return [{}, {**FAILED, "passed": True}]

    monkeypatch.setattr(precision_check, "compare_precisions", compare)
    Reranker(bert, device="cpu", precision="int8").close()
    (kept,) = (own_home / "precision_checks").iterdir()
    kept.write_text(content)
    Reranker(bert, device="cpu", precision="int8").close()
    assert len(asked) == 2


FAILED = {
    "precision": "int8",
    "tau": 0.91,
    "overlap": 0.99,
    "ndcg_loss": 0.002,
    "queries": 8,
    "passed": False,
    "keep_bf16": ["layer.0.output.dense"],
}


def test_int8_that_fails_is_refused_with_numbers_and_remedy(bert, monkeypatch):
    offer(monkeypatch, *ALL)
    monkeypatch.setattr(precision_check, "compare_precisions", lambda *_: [{}, FAILED])
    with pytest.raises(InvalidInput) as caught:
        Reranker(bert, device="cpu", precision="int8")
    assert caught.value.field == "precision"
    for part in ("0.910", "0.990", "+0.0020", "1 layers in bf16", "0.97", "Use bf16 or auto"):
        assert part in str(caught.value)


def test_sensitive_layers_stay_in_bf16_until_int8_passes(bert, monkeypatch):
    """Logits and errors are made up; which layers are tried, and when it stops, is not."""
    offer(monkeypatch, *ALL)
    tried = []
    worst_first = [f"layer {i}" for i in range(13)]
    monkeypatch.setattr(precision_check.PrecisionCheck, "sensitive_layers", lambda _: worst_first)
    real = precision_check.PrecisionCheck.score

    def score(self, precision, keep_bf16=()):
        tried.append((precision, list(keep_bf16)))
        logits, speed = real(self, "bf16")
        ranks_alike = precision != "int8" or len(keep_bf16) >= 3
        return (logits if ranks_alike else [-part for part in logits]), speed

    monkeypatch.setattr(precision_check.PrecisionCheck, "score", score)
    row = precision_check.compare_precisions(check_of(bert), ["fp32", "int8"])[1]
    kept = [keep for precision, keep in tried if precision == "int8"]
    assert kept == [[], worst_first[:1], worst_first[:1], worst_first[:3]]
    assert row["passed"]
    assert row["keep_bf16"] == worst_first[:3]


def pretend_scores(monkeypatch, differing):
    """Scores of which all but fp32's are reversed for these queries; returns what is scored."""
    scored = []

    def score(check, precision, keep_bf16=()):
        scored.append((precision, len(check.topics)))
        logits = [np.arange(len(topic.documents), dtype=np.float32) for topic in check.topics]
        if precision != "fp32":
            signs = [-1 if topic.query in differing else 1 for topic in check.topics]
            logits = [part * sign for part, sign in zip(logits, signs, strict=True)]
        return logits, 1.0

    monkeypatch.setattr(precision_check.PrecisionCheck, "score", score)
    return scored


@pytest.mark.parametrize(
    ("differing", "queries", "proven", "failed"),
    [(0, 12, True, False), (1, 24, False, False), (12, 12, False, True)],
)
def test_queries_are_added_until_they_decide(bert, monkeypatch, differing, queries, proven, failed):
    check = check_of(bert)
    scored = pretend_scores(monkeypatch, {topic.query for topic in check.topics[:differing]})
    exact, row = precision_check.compare_precisions(check, ["fp32", "fp16"])
    assert exact["passed"]
    assert (row["queries"], row["proven"], row["failed"]) == (queries, proven, failed)
    assert row["passed"] == proven
    assert decided(row) == (proven or failed)
    # Both score each part once.
    parts = queries // 12
    assert sorted(scored) == sorted([("fp32", 12), ("fp16", 12)] * parts)


def test_without_time_no_query_is_added(bert, monkeypatch):
    check = check_of(bert)
    pretend_scores(monkeypatch, {check.topics[0].query})
    row = precision_check.compare_precisions(check, ["fp32", "bf16"], limit_s=0.0)[1]
    assert (row["queries"], row["proven"], row["failed"]) == (12, False, False)
    with pytest.raises(InvalidInput, match="bf16 is not proven to rank as fp32 does"):
        precision_check.require_passed(row)


def test_the_users_queries_come_first_if_they_can_be_ranked(bert):
    own = (Topic("mine", ("a", "b")), Topic("one document only", ("a",)))
    check = precision_check.PrecisionCheck.of(
        resolve(bert), Options(), PairEncoder(bert), Texts("own", own)
    )
    known = load_texts(None).topics
    assert check.topics[0] == own[0]
    assert len(check.topics) == precision_check.TOPICS
    assert {*check.topics, *check.more} == {own[0], *known}


def test_a_matching_profile_replaces_the_check(bert, monkeypatch):
    offer(monkeypatch, *ALL)
    folder = resolve(bert)
    key = precision_check.ProfileKey(
        folder.name,
        folder.revision,
        "cpu",
        precision_check.cpu_name(),
        "bf16",
        precision_check.library_versions(),
    )
    row = {**FAILED, "passed": True}
    profile = profile_with(key, row)
    options = Options(device="cpu", precision="int8")
    encoder = PairEncoder(bert)
    found = precision_check.check_precision(folder, options, encoder, profile)
    assert found == ["layer.0.output.dense"]
    stale = replace(profile, key=replace(key, device_name="another machine"))
    assert precision_check._from_profile(stale, key) is None


def profile_with(key, row):
    from echelon.profile import Profile, TunedSettings

    return Profile(key, TunedSettings("bf16", 512, None, 1, None), "", precisions=[row])


def test_int8_is_refused_where_the_processor_or_the_model_lacks_it(monkeypatch, toy):
    monkeypatch.setattr("echelon.models.device.multiplies_int8", lambda: False)
    with pytest.raises(InvalidInput, match="VNNI or AMX"):
        choose_precision("int8", CPU)
    monkeypatch.setattr("echelon.models.device.multiplies_int8", lambda: True)
    with pytest.raises(InvalidInput, match="not built for distilbert"):
        open_scorer(toy("distilbert"), device="cpu", precision="int8")


@needs_int8
def test_a_service_leaves_the_same_layers_in_bf16(bert, monkeypatch):
    batch = random_batch([40, 22], 150, 1, types=True)
    names = list(layer_errors(bert, [batch]))
    monkeypatch.setattr("echelon.engine.launch.check_precision", lambda *_: names)
    pairs = [("rain at the kitchen window", sentence) for sentence in SENTENCES]
    with Reranker(bert, device="cpu", precision="bf16", threads=1) as reranker:
        expected = reranker.score(pairs)

    async def main():
        service = await launch(bert, device="cpu", threads=1, precision="int8")
        try:
            answer = await service.submit(RerankRequest(pairs))
            assert service.info.precision == "int8"
        finally:
            await service.stop()
        return answer.logits

    found = asyncio.run(main())
    with_codes = open_scorer(bert, precision="int8", threads=1)
    encoded = PairEncoder(bert).encode(pairs, 130, "longest_first")
    codes = with_codes.score(encoded.batch(range(len(pairs))))
    assert np.abs(found - expected).max() < np.abs(codes - expected).max() / 2


QUICK = TuningPlan(pairs=(4,), batch_sizes=(4,), token_budgets=(256,))


def test_tuning_for_int8_checks_it(bert, monkeypatch):
    offer(monkeypatch, *ALL)
    monkeypatch.setattr(
        "echelon.tuning.first_stages.compare_precisions",
        lambda *_: [{**FAILED, "precision": "int8"}],
    )
    with pytest.raises(InvalidInput, match="int8 does not rank as fp32 does"):
        tune(bert, Options(device="cpu", max_length=100, precision="int8"), QUICK)


def test_tuning_measures_with_the_layers_that_stay_in_bf16(bert, monkeypatch):
    offer(monkeypatch, *ALL)
    row = {**FAILED, "passed": True, "tokens_per_s": 1.0}
    monkeypatch.setattr("echelon.tuning.first_stages.compare_precisions", lambda *_: [row])
    opened = []
    real = precision_check.PrecisionCheck.open

    def remembering(self, precision, keep_bf16=()):
        opened.append((precision, list(keep_bf16)))
        return real(self, precision, keep_bf16)

    monkeypatch.setattr(precision_check.PrecisionCheck, "open", remembering)
    found = tune(bert, Options(device="cpu", max_length=100, precision="int8"), QUICK)
    assert found.settings.precision == "int8"
    first, *others = opened  # before the comparison, the first steps are timed
    assert first == ("int8", [])
    assert all(one == ("int8", row["keep_bf16"]) for one in others)
    assert others
