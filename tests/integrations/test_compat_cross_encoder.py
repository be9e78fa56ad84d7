"""``echelon.integrations.CrossEncoder`` against sentence-transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from cross_encoders import (
    DOCUMENTS,
    MANY,
    NO,
    ONE,
    PAIRS,
    QUERY,
    change,
    same,
    same_ranking,
    variant,
)
from helpers import LIMITS, NATIVE
from sentence_transformers import CrossEncoder as Original

from echelon.errors import EchelonWarning, InvalidInput
from echelon.integrations import CrossEncoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPREAD = 0.05
"""Logits closer together than this would hide errors."""


@pytest.fixture(scope="module", params=NATIVE)
def folder(
    request: pytest.FixtureRequest,
    toy: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    family: str = request.param
    copy = variant(tmp_path_factory.mktemp("models") / family, toy(family))
    # As published ones do; for RoBERTa the original would otherwise read past its positions.
    change(copy / "tokenizer_config.json", model_max_length=LIMITS[family])
    return copy


@pytest.fixture(scope="module")
def ours(folder: Path) -> CrossEncoder:
    return CrossEncoder(str(folder), device="cpu")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Original:
    return Original(str(folder), device="cpu")


@pytest.fixture(scope="module")
def both(bert: Path) -> tuple[CrossEncoder, Original]:
    """One pair of models for what does not depend on the family."""
    return CrossEncoder(bert, device="cpu"), Original(str(bert), device="cpu")


# --- predict


def test_logits_are_those_of_the_original(ours: CrossEncoder, theirs: Original) -> None:
    expected = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())

    assert np.ptp(expected) > SPREAD
    same(ours.predict(PAIRS, activation_fn=torch.nn.Identity()), expected)


@pytest.mark.parametrize("inputs", [ONE, list(ONE), NO, MANY, tuple(MANY), [ONE]])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"convert_to_numpy": False},
        {"convert_to_tensor": True},
        {"convert_to_tensor": True, "convert_to_numpy": False},
    ],
)
def test_results_are_of_the_same_kind(
    ours: CrossEncoder, theirs: Original, inputs: Any, kind: dict[str, bool]
) -> None:
    same(ours.predict(inputs, **kind), theirs.predict(inputs, **kind))


@pytest.mark.parametrize(
    "inputs",
    [np.array(PAIRS), np.array(ONE), np.array(PAIRS, dtype=object), np.array([], dtype=object)],
)
def test_arrays_of_texts_are_read(both: tuple[CrossEncoder, Original], inputs: Any) -> None:
    ours, theirs = both

    same(ours.predict(inputs), theirs.predict(inputs))


@pytest.mark.parametrize(
    "function",
    [
        torch.nn.Identity(),
        torch.nn.Sigmoid(),
        torch.tanh,
        lambda scores: scores * 3 - 1,
        lambda scores: torch.cat([scores, -scores], dim=1),
        lambda scores: scores[:, 0].double(),
    ],
    ids=["Identity", "Sigmoid", "tanh", "lambda", "two columns", "flat"],
)
@pytest.mark.parametrize("softmax", [False, True])
def test_activation_functions(
    both: tuple[CrossEncoder, Original],
    function: Any,
    softmax: bool,  # noqa: FBT001 - parametrized
) -> None:
    ours, theirs = both
    options = {"activation_fn": function, "apply_softmax": softmax}

    same(ours.predict(PAIRS, **options), theirs.predict(PAIRS, **options))
    same(ours.predict(ONE, **options), theirs.predict(ONE, **options))
    tensors = options | {"convert_to_tensor": True}
    same(ours.predict(PAIRS, **tensors), theirs.predict(PAIRS, **tensors))


def test_an_activation_given_to_the_constructor_or_set_later(bert: Path) -> None:
    plain = CrossEncoder(bert, device="cpu").predict(PAIRS, activation_fn=torch.nn.Identity())

    given = CrossEncoder(bert, device="cpu", activation_fn=torch.tanh)
    np.testing.assert_allclose(given.predict(PAIRS), np.tanh(plain), atol=1e-6)
    given.activation_fn = torch.nn.Identity()
    np.testing.assert_array_equal(given.predict(PAIRS), plain)
    given.activation_fn = None
    np.testing.assert_allclose(given.predict(PAIRS), 1 / (1 + np.exp(-plain)), atol=1e-6)


@pytest.mark.parametrize(
    "function", [lambda scores: scores.sum(), lambda _: 0.5, lambda scores: scores[:-1]]
)
def test_an_activation_must_keep_the_rows(bert: Path, function: Any) -> None:
    with pytest.raises(InvalidInput, match="one row for each pair"):
        CrossEncoder(bert, device="cpu").predict(PAIRS, activation_fn=function)


def test_batch_sizes_change_no_score(both: tuple[CrossEncoder, Original]) -> None:
    ours, theirs = both

    for size in (1, 3, 64):
        same(ours.predict(PAIRS, batch_size=size), theirs.predict(PAIRS, batch_size=size))
    assert _steps(ours, batch_size=1) > _steps(ours, batch_size=64)


def _steps(model: CrossEncoder, **options: Any) -> int:
    """Forward passes that a call takes."""
    seen: list[int] = []
    score_pairs = model._reranker.score_pairs

    def spy(*args: Any, **kwargs: Any) -> Any:
        scored = score_pairs(*args, **kwargs)
        seen.append(scored.report.steps)
        return scored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model._reranker, "score_pairs", spy)
        model.predict(PAIRS, **options)
    return seen[0]


def test_a_family_without_a_packed_encoder(toy: Callable[[str], Path]) -> None:
    with pytest.warns(EchelonWarning, match="distilbert has no packed encoder"):
        ours = CrossEncoder(toy("distilbert"), device="cpu")
    theirs = Original(str(toy("distilbert")), device="cpu")

    same(ours.predict(PAIRS), theirs.predict(PAIRS))
    same_ranking(ours.rank(QUERY, DOCUMENTS), theirs.rank(QUERY, DOCUMENTS))


# --- lengths


def test_the_default_length_is_the_originals(ours: CrossEncoder, theirs: Original) -> None:
    assert ours.max_length == ours.max_seq_length == theirs.max_seq_length


def test_a_tokenizer_may_set_a_shorter_default(tmp_path: Path, bert: Path) -> None:
    folder = variant(tmp_path / "model", bert)
    change(folder / "tokenizer_config.json", model_max_length=30)
    ours, theirs = CrossEncoder(folder, device="cpu"), Original(str(folder), device="cpu")

    assert ours.max_length == theirs.max_seq_length == 30
    same(ours.predict(PAIRS), theirs.predict(PAIRS))
    ours.max_length = theirs.max_seq_length = 60
    same(ours.predict(PAIRS), theirs.predict(PAIRS))


@pytest.mark.parametrize("length", [8, 17, 40])
def test_truncation(folder: Path, length: int) -> None:
    ours = CrossEncoder(folder, max_length=length, device="cpu")
    theirs = Original(str(folder), max_length=length, device="cpu")

    assert ours.max_length == length
    same(ours.predict(PAIRS), theirs.predict(PAIRS))
    assert not np.allclose(
        ours.predict(PAIRS), CrossEncoder(folder, device="cpu").predict(PAIRS), atol=1e-3
    )


def test_the_length_can_be_set_later(both: tuple[CrossEncoder, Original], bert: Path) -> None:
    _, theirs = both
    ours = CrossEncoder(bert, device="cpu", processor_kwargs={"model_max_length": 50})
    assert ours.max_length == 50

    ours.max_length = 12
    same(ours.predict(PAIRS), Original(str(bert), max_length=12).predict(PAIRS))
    ours.max_length = None
    assert ours.max_length == LIMITS["bert"]
    same(ours.predict(PAIRS), theirs.predict(PAIRS))


def test_more_than_the_model_reads_is_brought_down(bert: Path) -> None:
    with pytest.warns(EchelonWarning, match="130 is used instead of 4096"):
        ours = CrossEncoder(bert, max_length=4096, device="cpu")

    same(ours.predict(ONE), Original(str(bert), max_length=4096).predict(ONE))
    with pytest.raises(InvalidInput, match="max_length"):
        ours.max_length = 0


# --- rank


def test_rankings_are_those_of_the_original(ours: CrossEncoder, theirs: Original) -> None:
    for options in (
        {},
        {"top_k": 3},
        {"top_k": 0},
        {"return_documents": True, "activation_fn": torch.nn.Identity()},
        {"batch_size": 2, "show_progress_bar": False},
    ):
        same_ranking(
            ours.rank(QUERY, DOCUMENTS, **options), theirs.rank(QUERY, DOCUMENTS, **options)
        )
    assert ours.rank(QUERY, []) == theirs.rank(QUERY, []) == []
    same_ranking(
        ours.rank(QUERY, iter(DOCUMENTS), return_documents=True),
        theirs.rank(QUERY, DOCUMENTS, return_documents=True),
    )


def test_equal_scores_keep_their_order(both: tuple[CrossEncoder, Original]) -> None:
    ours, theirs = both
    flat = {"activation_fn": torch.zeros_like}

    assert [entry["corpus_id"] for entry in ours.rank(QUERY, DOCUMENTS, **flat)] == [*range(7)]
    same_ranking(ours.rank(QUERY, DOCUMENTS, **flat), theirs.rank(QUERY, DOCUMENTS, **flat))
    ids = [entry["corpus_id"] for entry in ours.rank(QUERY, DOCUMENTS)]
    assert ids.index(6) == ids.index(0) + 1  # the same text twice


def test_an_activation_may_turn_the_ranking_round(both: tuple[CrossEncoder, Original]) -> None:
    ours, theirs = both
    falling = {"activation_fn": torch.neg}

    same_ranking(ours.rank(QUERY, DOCUMENTS, **falling), theirs.rank(QUERY, DOCUMENTS, **falling))


@pytest.mark.parametrize(
    "option", ["num_workers", "apply_softmax", "convert_to_numpy", "convert_to_tensor"]
)
def test_what_rank_ignores_in_the_original_is_said_to_be(bert: Path, option: str) -> None:
    model = CrossEncoder(bert, device="cpu")

    with pytest.warns(EchelonWarning, match=f"{option} has no effect") as caught:
        ranking = model.rank(QUERY, DOCUMENTS, **{option: True})

    assert caught[0].filename == __file__
    assert ranking == model.rank(QUERY, DOCUMENTS)
