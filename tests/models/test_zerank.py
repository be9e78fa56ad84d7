"""zerank: the logit of one answer, by sentence-transformers too, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers import SENTENCES
from language_models import make_language_model

from echelon import Reranker
from echelon.errors import BadCheckpoint, UnsupportedModel
from echelon.models.architecture import read_config
from echelon.models.families import native_model

if TYPE_CHECKING:
    from pathlib import Path

QUERY = "When does the ferry leave?"
ROLE = "{{ messages | selectattr('role', 'eq', 'ROLE') | map(attribute='content') | first | trim }}"
CHAT = (
    "<|im_start|>system\n" + ROLE.replace("ROLE", "query") + "<|im_end|>\n"
    "<|im_start|>user\n" + ROLE.replace("ROLE", "document") + "<|im_end|>\n"
    "{{ '<|im_start|>assistant\n' }}"  # the last newline of a template would be lost
)
SCORE = "1_LogitScore/config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("toys") / "zerank-2", "qwen3")


@pytest.fixture(scope="module")
def modular(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as sentence-transformers saves it."""
    found = tmp_path_factory.mktemp("saved") / "zerank-2"
    original(folder).save_pretrained(str(found))
    return found


def original(folder: Path) -> Any:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder import CrossEncoder
    from sentence_transformers.cross_encoder.modules import LogitScore

    yes = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["Yes"]
    layers = Transformer(
        str(folder),
        transformer_task="text-generation",
        processor_kwargs={"chat_template": CHAT},
        model_kwargs={"dtype": "float32"},
    )
    return CrossEncoder(modules=[layers, LogitScore(yes)], device="cpu")


def test_scores_are_those_of_sentence_transformers(folder, modular):
    """It gives the logit, which the authors divide by five before the sigmoid."""
    import torch

    pairs = [(QUERY, text) for text in (*SENTENCES, f"  {SENTENCES[0]}\n")]
    expected = original(folder).predict(pairs, activation_fn=torch.nn.Identity()) / 5
    assert expected.std() > 0.01
    for place in (folder, modular):
        with Reranker(place, device="cpu", precision="fp32") as reranker:
            found = reranker.score(pairs)
        np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std())
        assert found[0] == found[-1]


def test_bf16_ranks_alike(folder):
    from scipy.stats import kendalltau

    pairs = [(QUERY, text) for text in SENTENCES]
    found = {}
    for precision in ("fp32", "bf16"):
        with Reranker(folder, device="cpu", precision=precision) as reranker:
            found[precision] = reranker.score(pairs)
    assert kendalltau(found["fp32"], found["bf16"]).statistic >= 0.8


def changed(modular: Path, place: Path, **values: Any) -> Path:
    folder = shutil.copytree(modular, place / "zerank-2")
    settings = json.loads((folder / SCORE).read_text()) | values
    (folder / SCORE).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("values", [{"true_token_id": 9}, {"false_token_id": 9}])
def test_modules_that_read_other_tokens_are_refused(modular, tmp_path, values):
    folder = changed(modular, tmp_path, **values)
    with pytest.raises(UnsupportedModel, match="modules read the score of other tokens"):
        native_model(folder, read_config(folder))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text("{"),
        lambda file: file.write_text('{"true_token_id": "Yes"}'),
    ],
)
def test_damaged_modules_are_named(modular, tmp_path, break_it):
    folder = changed(modular, tmp_path)
    break_it(folder / SCORE)
    with pytest.raises(BadCheckpoint, match="LogitScore"):
        native_model(folder, read_config(folder))


def test_a_classifier_made_from_it_is_refused(tmp_path):
    """Nothing in its files says whether the logit was divided."""
    folder = make_language_model(
        tmp_path / "zerank-2-seq-cls",
        "qwen3",
        architecture="Qwen3ForSequenceClassification",
        num_labels=1,
    )
    with pytest.raises(UnsupportedModel, match="may hold its temperature of 5 or not"):
        Reranker(folder)


def test_a_tokenizer_without_the_answer_is_refused(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "zerank-2")
    path = broken / "tokenizer.json"
    path.write_text(path.read_text().replace('"Yes"', '"Yep"'))
    with pytest.raises(BadCheckpoint, match="no token 'Yes'"):
        native_model(broken, read_config(broken))
