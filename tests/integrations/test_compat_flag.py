"""``echelon.integrations.FlagReranker`` against FlagEmbedding's own."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from FlagEmbedding import FlagReranker as Original
from helpers import LIMITS, NATIVE, SENTENCES, make_toy, reference_model, words
from sentence_transformers import CrossEncoder

from echelon.errors import EchelonWarning, InvalidInput
from echelon.integrations import FlagReranker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOLERANCE = 1e-4
SPREAD = 0.05
PAIRS = [(words(5, 1), words(count, count)) for count in (3, 12, 1, 5, 3)]
PAIRS += [("", words(6, 8)), (SENTENCES[0], SENTENCES[3])]
LONG = [*PAIRS, (words(3, 10), words(90, 11))]
LENGTH = 96
"""Within every model's positions, which FlagEmbedding's default of 512 is not."""


@pytest.fixture(scope="module", params=NATIVE)
def folder(request: pytest.FixtureRequest, toy: Callable[[str], Path]) -> Path:
    assert LIMITS[request.param] >= LENGTH
    return toy(request.param)


@pytest.fixture(scope="module")
def ours(folder: Path) -> FlagReranker:
    return FlagReranker(folder, devices="cpu")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Original:
    return Original(str(folder), devices="cpu", batch_size=64)


@pytest.fixture(scope="module")
def bert_pair(bert: Path) -> tuple[FlagReranker, Original]:
    return FlagReranker(bert, devices="cpu"), Original(str(bert), devices="cpu", batch_size=64)


def same(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    assert type(ours) is type(theirs) is list
    assert {type(score) for score in ours} == {type(score) for score in theirs} == {float}
    assert ours == pytest.approx(theirs, abs=tolerance)


def test_scores_are_those_of_the_original(ours: FlagReranker, theirs: Original) -> None:
    expected = theirs.compute_score(LONG, max_length=LENGTH)

    assert np.ptp(expected) > SPREAD
    same(ours.compute_score(LONG, max_length=LENGTH), expected)


@pytest.mark.parametrize("length", [24, 40, 64])
def test_truncation_cuts_the_passage(ours: FlagReranker, theirs: Original, length: int) -> None:
    pairs = [("kettle", words(90, seed)) for seed in range(4)]

    scores = ours.compute_score(pairs, max_length=length)

    same(scores, theirs.compute_score(pairs, max_length=length))
    assert scores != pytest.approx(ours.compute_score(pairs, max_length=LENGTH), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "query_tokens"),
    [
        ({"max_length": 40}, 30),
        ({"max_length": 41}, 30),
        ({"max_length": 60, "query_max_length": 7}, 7),
        ({"query_max_length": 9, "max_length": 96}, 9),
    ],
)
def test_queries_are_cut_to_their_share(
    folder: Path, options: dict[str, int], query_tokens: int
) -> None:
    """Against ids joined by hand: with transformers 5 FlagEmbedding decodes a cut query and
    encodes the text again, which may give other tokens than the cut left.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = reference_model(folder)
    query, passage = words(60, 5), words(90, 6)
    bert = model.config.model_type == "bert"
    one, two = tokenizer([query, passage], add_special_tokens=False)["input_ids"]
    first = [tokenizer.cls_token_id, *one[:query_tokens]]
    first += [tokenizer.sep_token_id] * (1 if bert else 2)
    second = [*two[: options["max_length"] - len(first) - 1], tokenizer.sep_token_id]
    inputs = {"input_ids": torch.tensor([first + second])}
    if bert:
        inputs["token_type_ids"] = torch.tensor([[0] * len(first) + [1] * len(second)])
    with torch.inference_mode():
        expected = float(model(**inputs).logits)

    assert len(one) > query_tokens
    assert len(first + second) == options["max_length"]
    by_call = FlagReranker(folder, devices="cpu").compute_score([(query, passage)], **options)
    by_constructor = FlagReranker(folder, devices="cpu", **options).compute_score((query, passage))
    assert by_call == by_constructor == pytest.approx([expected], abs=TOLERANCE)


def test_an_empty_passage_is_still_a_passage(bert: Path) -> None:
    """As in FlagEmbedding with transformers 4; with 5 it scores the query as a text by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    ids = [*tokenizer(SENTENCES[0])["input_ids"], tokenizer.sep_token_id]
    types = [0] * (len(ids) - 1) + [1]
    with torch.inference_mode():
        expected = reference_model(bert)(
            input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])
        ).logits

    scores = FlagReranker(bert, devices="cpu").compute_score((SENTENCES[0], ""))
    assert scores == pytest.approx([float(expected)], abs=TOLERANCE)


def test_cut_queries_agree_where_decoding_loses_nothing(
    bert_pair: tuple[FlagReranker, Original],
) -> None:
    ours, theirs = bert_pair
    pairs = [("a b c d e f g h i j k l m n o p q r s t u v w x y z", words(20, 1))]

    for options in ({"max_length": 24}, {"max_length": 40, "query_max_length": 5}):
        same(ours.compute_score(pairs, **options), theirs.compute_score(pairs, **options))
    assert ours.compute_score(pairs, query_max_length=5) != pytest.approx(
        ours.compute_score(pairs), abs=1e-3
    )


def test_one_pair_gives_a_list_of_one(bert_pair: tuple[FlagReranker, Original]) -> None:
    ours, theirs = bert_pair

    for pair in (PAIRS[0], list(PAIRS[0]), [PAIRS[0]], [list(PAIRS[0])]):
        same(ours.compute_score(pair), theirs.compute_score(pair))


def test_normalize(bert_pair: tuple[FlagReranker, Original], bert: Path) -> None:
    ours, theirs = bert_pair
    expected = theirs.compute_score(PAIRS, normalize=True)

    same(ours.compute_score(PAIRS, normalize=True), expected)
    always = FlagReranker(bert, devices="cpu", normalize=True)
    same(always.compute_score(PAIRS), expected)
    same(always.compute_score(PAIRS, normalize=False), theirs.compute_score(PAIRS))
    always.normalize = False
    same(always.compute_score(PAIRS), theirs.compute_score(PAIRS))


@pytest.mark.parametrize(
    "options",
    [
        {"query_instruction_for_rerank": "Find: "},
        {"passage_instruction_for_rerank": "Passage: "},
        {
            "query_instruction_for_rerank": "tram",
            "query_instruction_format": "{}\\n query {}",
            "passage_instruction_for_rerank": "stove",
            "passage_instruction_format": "<{1}> {0}",
        },
    ],
    ids=["query", "passage", "both"],
)
def test_instructions(
    bert_pair: tuple[FlagReranker, Original], bert: Path, options: dict[str, str]
) -> None:
    ours = FlagReranker(bert, devices="cpu", **options)
    theirs = Original(str(bert), devices="cpu", **options)

    same(ours.compute_score(PAIRS), theirs.compute_score(PAIRS))
    assert ours.compute_score(PAIRS) != pytest.approx(bert_pair[0].compute_score(PAIRS), abs=1e-3)


def test_half_has_no_effect_on_the_cpu(bert: Path) -> None:
    ours, theirs = (
        FlagReranker(bert, use_fp16=True, devices="cpu"),
        Original(str(bert), use_fp16=True, devices="cpu"),
    )

    same(ours.compute_score(PAIRS), theirs.compute_score(PAIRS))
    assert ours.use_fp16 is theirs.use_fp16 is False
    same(ours.compute_score(PAIRS), FlagReranker(bert, devices="cpu").compute_score(PAIRS), 1e-7)


def test_weights_stored_in_half_are_computed_in_half(tmp_path: Path, bert: Path) -> None:
    half = reference_model(bert).__class__.from_pretrained(bert, dtype=torch.float16)
    shutil.copytree(bert, tmp_path / "m")
    half.save_pretrained(tmp_path / "m")
    ours, theirs = (kind(str(tmp_path / "m"), devices="cpu") for kind in (FlagReranker, Original))

    assert ours.use_fp16
    assert theirs.model.dtype == torch.float16
    same(ours.compute_score(PAIRS), theirs.compute_score(PAIRS), 5e-3)
    exact = FlagReranker(tmp_path / "m", devices="cpu", precision="fp32")
    assert not exact.use_fp16


def test_batch_sizes_change_no_score(bert_pair: tuple[FlagReranker, Original], bert: Path) -> None:
    ours, theirs = bert_pair
    expected = theirs.compute_score(PAIRS)

    for size in (1, 3, 64):
        same(ours.compute_score(PAIRS, batch_size=size), expected)
        same(FlagReranker(bert, batch_size=size, devices="cpu").compute_score(PAIRS), expected)


def test_batch_size_is_passed_on(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FlagReranker(bert, batch_size=5, devices="cpu")
    score_pairs, seen = model._reranker.score_pairs, []
    monkeypatch.setattr(
        model._reranker,
        "score_pairs",
        lambda *args, **kwargs: seen.append(kwargs["batch_size"]) or score_pairs(*args, **kwargs),
    )

    model.compute_score(PAIRS)
    model.compute_score(PAIRS, batch_size=2)

    assert seen == [5, 2]


@pytest.mark.parametrize("devices", ["cpu", ["cpu"], ("cpu",)])
def test_one_device(bert: Path, devices: Any) -> None:
    assert FlagReranker(bert, devices=devices).target_devices == ["cpu"]


def test_lengths_beyond_the_model(bert: Path) -> None:
    with pytest.warns(EchelonWarning, match="130 is used instead of 1024"):
        model = FlagReranker(bert, max_length=1024, devices="cpu")
    with pytest.warns(EchelonWarning, match="130 is used instead of 600"):
        model.compute_score(PAIRS, max_length=600)

    # A query of more than 3/4 of 130 tokens that fits is whole in the original, too.
    query = words(97, 3)
    theirs = Original(str(bert), devices="cpu")
    assert len(theirs.tokenizer(query)["input_ids"]) > 100
    same(model.compute_score((query, "kettle")), theirs.compute_score((query, "kettle")))


def test_there_is_no_pool_to_stop(bert: Path) -> None:
    model = FlagReranker(bert, devices="cpu")
    model.stop_self_pool()

    assert len(model.compute_score(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code.*never runs code"),
        ({"devices": ["cpu", "cpu"]}, "devices.*names 2.*process for each"),
        ({"devices": []}, "devices.*names 0"),
        ({"device": "cpu"}, "device.*Name it devices"),
        ({"truncation": "longest_first"}, "truncation"),
        ({"max_query_tokens": 3}, "max_query_tokens.*query_max_length"),
        ({"use_bf16": True}, "use_bf16: unknown option"),
        ({"query_instruction_format": "{}{}{}"}, "query_instruction_format"),
        ({"passage_instruction_format": "{x}"}, "passage_instruction_format"),
        ({"max_length": 0}, "max_length"),
    ],
    ids=str,
)
def test_the_constructor_refuses(bert: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        FlagReranker(bert, **{"devices": "cpu", **options})


@pytest.mark.parametrize("pairs", [[], (), "ab", ["a", "b", "c"], [("a",)], [("a", None)], 3])
def test_what_is_no_pair_is_refused(bert_pair: tuple[FlagReranker, Original], pairs: Any) -> None:
    with pytest.raises(InvalidInput):
        bert_pair[0].compute_score(pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "longest_first"}, "truncation"),
        ({"padding": True}, "padding"),
        ({"device": "cpu"}, "device"),
        ({"query_max_length": 0}, "max_query_tokens"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_calls_refuse(
    bert_pair: tuple[FlagReranker, Original], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        bert_pair[0].compute_score(PAIRS, **options)


def test_a_query_that_leaves_no_room(bert_pair: tuple[FlagReranker, Original]) -> None:
    ours, theirs = bert_pair
    pairs, options = [(words(60, 1), "kettle")], {"max_length": 20, "query_max_length": 20}

    with pytest.raises(Exception, match="too short to respect"):
        theirs.compute_score(pairs, **options)
    with pytest.raises(InvalidInput, match=r"pairs\[0\]\.query.*lower query_max_length"):
        ours.compute_score(pairs, **options)


def test_several_labels_need_a_choice(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    folder = make_toy(tmp_path / "three", "bert", tokenizers["bert"], labels=3)

    with pytest.raises(InvalidInput, match="label: the model's head has 3 labels"):
        FlagReranker(folder, devices="cpu")

    expected = CrossEncoder(str(folder), device="cpu").predict(PAIRS)[:, 2]
    scores = FlagReranker(folder, devices="cpu", label=2).compute_score(PAIRS)
    assert scores == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_a_profile_decides_what_is_not_asked_for(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, Any] = {}
    monkeypatch.setattr(
        "echelon.integrations.flag_embedding.Reranker",
        lambda model, **options: opened.update(options),
    )
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({}))

    FlagReranker(bert, devices="cpu", profile=profile)
    assert (opened["precision"], opened["profile"]) == ("auto", profile)
    FlagReranker(bert, devices="cpu")
    assert opened["precision"] == "fp32"
