"""``echelon.integrations.CrossEncoder``: saved settings, precision, device, older names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from cross_encoders import (
    DOCUMENTS,
    ONE,
    PAIRS,
    QUERY,
    change,
    same,
    same_ranking,
    variant,
)
from sentence_transformers import CrossEncoder as Original

from echelon import Reranker
from echelon.errors import EchelonWarning, InvalidInput, TooLarge
from echelon.integrations import CrossEncoder, FlagReranker
from echelon.models.description import describe

if TYPE_CHECKING:
    from pathlib import Path

HALF_TOLERANCE = 5e-3
SHORT = [pair for pair in PAIRS if sum(map(len, pair)) < 150]


@pytest.fixture(scope="module")
def both(bert: Path) -> tuple[CrossEncoder, Original]:
    """Echelon's and the original."""
    return CrossEncoder(bert, device="cpu"), Original(str(bert), device="cpu")


# --- what the model was saved with

IDENTITY = "torch.nn.modules.linear.Identity"
ELU = "torch.nn.modules.activation.ELU"
TANH = "torch.nn.modules.activation.Tanh"


@pytest.mark.parametrize(
    "config",
    [
        {"sbert_ce_default_activation_function": IDENTITY},
        {"sbert_ce_default_activation_function": None},
        {"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.1"}},
        {"sentence_transformers": {"activation_fn": None}},
        {
            "sentence_transformers": {"activation_fn": TANH},
            "sbert_ce_default_activation_function": IDENTITY,
        },
        {
            "sentence_transformers": {"version": "4.1"},
            "sbert_ce_default_activation_function": TANH,
        },
    ],
    ids=str,
)
def test_a_saved_activation_is_used(tmp_path: Path, bert: Path, config: dict[str, Any]) -> None:
    folder = variant(tmp_path / "model", bert, **config)
    ours, theirs = CrossEncoder(folder, device="cpu"), Original(str(folder), device="cpu")

    assert type(ours.activation_fn) is type(theirs.activation_fn)
    assert ours.default_activation_function is ours.activation_fn
    same(ours.predict(PAIRS), theirs.predict(PAIRS))


@pytest.mark.parametrize("function", [torch.nn.Identity(), torch.nn.Sigmoid(), torch.nn.Tanh()])
def test_a_model_saved_by_version_6(tmp_path: Path, bert: Path, function: Any) -> None:
    Original(str(bert), activation_fn=function, device="cpu").save_pretrained(str(tmp_path / "m"))
    change(tmp_path / "m" / "config.json", sbert_ce_default_activation_function=ELU)  # outdated
    ours, theirs = CrossEncoder(tmp_path / "m", device="cpu"), Original(str(tmp_path / "m"))

    assert type(ours.activation_fn) is type(theirs.activation_fn) is type(function)
    same(ours.predict(PAIRS), theirs.predict(PAIRS))


@pytest.mark.parametrize("path", ["my_code.Activation", "torch.hub.load", "torch.nn.NoSuch"])
def test_a_foreign_activation_is_not_run(tmp_path: Path, bert: Path, path: str) -> None:
    folder = variant(tmp_path / "model", bert, sbert_ce_default_activation_function=path)

    with pytest.warns(EchelonWarning, match=path):
        model = CrossEncoder(folder, device="cpu")

    assert type(model.activation_fn) is torch.nn.Sigmoid


def test_prompts(tmp_path: Path, bert: Path) -> None:
    prompts = {"ask": "Question: ", "plain": ""}
    saved = Original(str(bert), prompts=prompts, default_prompt_name="ask", device="cpu")
    saved.save_pretrained(str(tmp_path / "m"))
    ours, theirs = CrossEncoder(tmp_path / "m", device="cpu"), Original(str(tmp_path / "m"))

    for options in ({}, {"prompt_name": "plain"}, {"prompt": "Stove: "}, {"prompt": ""}):
        same(ours.predict(PAIRS, **options), theirs.predict(PAIRS, **options))
    assert not np.allclose(ours.predict(PAIRS), ours.predict(PAIRS, prompt=""), atol=1e-4)
    same_ranking(ours.rank(QUERY, DOCUMENTS), theirs.rank(QUERY, DOCUMENTS))
    with pytest.raises(InvalidInput, match="Known: 'ask', 'plain'"):
        ours.predict(PAIRS, prompt_name="missing")
    with pytest.raises(InvalidInput, match="Known: none"):
        CrossEncoder(bert, default_prompt_name="missing", device="cpu")
    with pytest.warns(EchelonWarning, match="prompt_name ignored"):
        same(ours.predict(PAIRS, prompt="", prompt_name="ask"), theirs.predict(PAIRS, prompt=""))


def test_the_reranker_reads_the_default_prompt(tmp_path: Path, bert: Path) -> None:
    """It stands before the query, and a call's instruction takes its place."""
    saved = Original(str(bert), prompts={"ask": "Question: "}, default_prompt_name="ask")
    saved.save_pretrained(str(tmp_path / "m"))
    theirs = Original(str(tmp_path / "m"), device="cpu", activation_fn=torch.nn.Identity())
    with Reranker(tmp_path / "m", device="cpu", precision="fp32") as ours:
        same(ours.score(SHORT), theirs.predict(SHORT))
        for text in ("Stove: ", ""):
            same(
                ours.score_pairs(SHORT, instruction=text).logits, theirs.predict(SHORT, prompt=text)
            )
        with pytest.raises(TooLarge, match="instruction: it has 5000 characters"):
            ours.score_pairs(SHORT, instruction="a" * 5000)
    assert describe(tmp_path / "m").instruction == "Question: "
    plain, prompted = (FlagReranker(folder, devices="cpu") for folder in (bert, tmp_path / "m"))
    assert plain.compute_score(SHORT) == prompted.compute_score(SHORT)


def test_texts_in_lower_case_and_a_saved_length(tmp_path: Path, toy: Any) -> None:
    roberta = toy("roberta")
    Original(str(roberta)).save_pretrained(str(tmp_path / "m"))
    change(tmp_path / "m" / "sentence_bert_config.json", do_lower_case=True, max_seq_length=20)
    ours, theirs = CrossEncoder(tmp_path / "m", device="cpu"), Original(str(tmp_path / "m"))

    assert ours.max_length == theirs.max_seq_length == 20
    loud = [(query.upper(), document.title()) for query, document in PAIRS]
    same(ours.predict(loud), theirs.predict(loud))
    assert not np.allclose(
        ours.predict(loud), Original(str(roberta), max_length=20).predict(loud), atol=1e-4
    )


# --- precision and device


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precisions_on_the_cpu(bert: Path, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    ours, theirs = CrossEncoder(bert, device="cpu"), Original(str(bert), device="cpu")
    before = ours.predict(PAIRS, activation_fn=torch.nn.Identity())

    for model in (ours, theirs):
        assert model.half() is model
        if dtype == "bfloat16":
            model.model.bfloat16()
    scores = ours.predict(PAIRS, activation_fn=torch.nn.Identity())

    assert ours.dtype == theirs.dtype == ours.model.dtype == torch_dtype
    assert not np.array_equal(scores, before)
    tolerance = HALF_TOLERANCE * (8 if dtype == "bfloat16" else 1)
    same(scores, theirs.predict(PAIRS, activation_fn=torch.nn.Identity()), tolerance)
    ours.model.float()
    np.testing.assert_array_equal(ours.predict(PAIRS, activation_fn=torch.nn.Identity()), before)


@pytest.mark.parametrize(
    "options",
    [
        {"model_kwargs": {"dtype": torch.bfloat16}},
        {"model_kwargs": {"torch_dtype": "bfloat16"}},
        {"model_kwargs": {"dtype": "torch.bfloat16", "torch_dtype": None}},
        {"automodel_args": {"torch_dtype": torch.bfloat16}},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_the_dtype_can_be_asked_for(bert: Path, options: dict[str, Any]) -> None:
    assert CrossEncoder(bert, device="cpu", **options).dtype == torch.bfloat16


def test_weights_stored_in_half_are_computed_in_half(tmp_path: Path, bert: Path) -> None:
    half = Original(str(bert), device="cpu").half()
    half.save_pretrained(str(tmp_path / "m"))
    ours, theirs = CrossEncoder(tmp_path / "m", device="cpu"), Original(str(tmp_path / "m"))

    assert ours.dtype == theirs.dtype == torch.float16
    same(ours.predict(PAIRS), theirs.predict(PAIRS), HALF_TOLERANCE)
    exact = {"model_kwargs": {"dtype": "float32"}}
    assert CrossEncoder(tmp_path / "m", device="cpu", **exact).dtype == torch.float32


def test_the_old_weights_are_freed_before_new_ones_are_read(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CrossEncoder(bert, device="cpu")
    steps: list[str] = []
    close, opened = model._reranker.close, Reranker.__init__
    monkeypatch.setattr(model._reranker, "close", lambda: steps.append("close") or close())
    monkeypatch.setattr(
        Reranker,
        "__init__",
        lambda self, *args, **kwargs: steps.append("open") or opened(self, *args, **kwargs),
    )

    model.half()

    assert steps == ["close", "open"]


def test_moving_about(bert: Path) -> None:
    model = CrossEncoder(bert, device=torch.device("cpu"))
    opened = model._reranker

    for same_place in (model.cpu(), model.to("cpu"), model.to(torch.float32), model.eval()):
        assert same_place is model
    model.predict(PAIRS, device="cpu")
    assert model._reranker is opened
    assert model.device == model.model.device == torch.device("cpu")
    assert model.to("cpu", torch.float16).dtype == torch.float16
    assert model.to(dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InvalidInput, match="neither a device nor a dtype"):
        model.to()
    with pytest.raises(InvalidInput, match="device"):
        model.to("mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_a_device_that_is_not_there(bert: Path, device: Any) -> None:
    with pytest.raises(InvalidInput, match="cuda"):
        CrossEncoder(bert, device=device)
    with pytest.raises(InvalidInput, match="cuda"):
        CrossEncoder(bert, device="cpu").cuda()


# --- what else scripts look at


def test_attributes(both: tuple[CrossEncoder, Original]) -> None:
    ours, theirs = both

    assert ours.num_labels == theirs.num_labels == 1
    changed = {"use_cache": False}  # the original switches it off; classifiers read it nowhere
    assert ours.config.to_dict() | changed == theirs.config.to_dict()
    assert ours.config is ours.config is ours.model.config
    assert ours.tokenizer(*ONE)["input_ids"] == theirs.tokenizer(*ONE)["input_ids"]


def test_older_names(both: tuple[CrossEncoder, Original], bert: Path) -> None:
    _, theirs = both
    ours = CrossEncoder(
        model_name=bert,
        tokenizer_args={"model_max_length": 20},
        config_args={"num_labels": 1},
        default_activation_function=torch.nn.Identity(),
    )

    assert ours.max_length == 20
    expected = Original(str(bert), max_length=20).predict(PAIRS, activation_fn=torch.tanh)
    same(ours.predict(sentences=PAIRS, activation_fct=torch.tanh), expected)
    same_ranking(
        CrossEncoder(bert, device="cpu").rank(QUERY, DOCUMENTS, activation_fct=torch.tanh),
        theirs.rank(QUERY, DOCUMENTS, activation_fn=torch.tanh),
    )
    with pytest.raises(InvalidInput, match="older name of inputs"):
        ours.predict(sentences=PAIRS, inputs=PAIRS)


def test_the_older_order_of_arguments(bert: Path) -> None:
    model = CrossEncoder(bert, 1, 20, torch.nn.Tanh(), "cpu")

    assert (model.max_length, type(model.activation_fn)) == (20, torch.nn.Tanh)


def test_echelons_own_options_pass(bert: Path) -> None:
    model = CrossEncoder(bert, device="cpu", token_budget=300, threads=1)

    assert model._reranker.token_budget == 300
    assert len(model.predict(PAIRS, token_budget=140)) == len(PAIRS)
