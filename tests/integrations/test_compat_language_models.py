"""``CrossEncoder`` with a language model as sentence-transformers saves it, and its prompts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cross_encoders import DOCUMENTS, PAIRS, QUERY, same_ranking
from language_models import make_language_model

from echelon import Reranker
from echelon.errors import InvalidInput, UnsupportedModel
from echelon.integrations import CrossEncoder
from echelon.models.prompts import MXBAI_RERANK_V2, QWEN3_RERANKER

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-3
"""Of the standard deviation of a model's logits."""

OWN = {"qwen3": QWEN3_RERANKER, "qwen2": MXBAI_RERANK_V2}
NAMES = {"qwen3": "Qwen3-Reranker-0.6B", "qwen2": "mxbai-rerank-base-v2"}
PROMPTS = {"law": "Find the law that holds.", "plain": ""}


def content(role: str) -> str:
    """What a template does with the messages of a role."""
    return f"messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first"


def template(kind: str) -> str:
    """A chat template that writes the prompt of the model's authors."""
    prompt: Any = OWN[kind]
    before, after = map(json.dumps, prompt.around_instruction)
    begin, end = map(json.dumps, prompt.around_query)
    own = "" if prompt.instruction is None else json.dumps(prompt.instruction)
    return (
        f"{{% set asked = ({content('system')}) | default({own or 'none'}) %}}"
        f"{{{{ {json.dumps(prompt.prefix)} }}}}"
        f"{{% if asked %}}{{{{ {before} + asked + {after} }}}}{{% endif %}}"
        f"{{{{ {begin} + ({content('query')}) + {end} + {json.dumps(prompt.between)} }}}}"
        f"{{{{ {json.dumps(prompt.before_document)} + ({content('document')}) }}}}"
        f"{{{{ {json.dumps(''.join(prompt.suffix))} }}}}"
    )


def save_original(folder: Path, kind: str, default: str | None) -> Path:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder import CrossEncoder as Original
    from sentence_transformers.cross_encoder.modules import LogitScore

    plain = make_language_model(folder / "plain" / NAMES[kind], kind, max_position_embeddings=900)
    vocabulary = json.loads((plain / "tokenizer.json").read_text())["model"]["vocab"]
    answers: Any = OWN[kind].answers
    layers = Transformer(
        str(plain),
        transformer_task="text-generation",
        processor_kwargs={"chat_template": template(kind), "model_max_length": 900},
        model_kwargs={"dtype": "float32"},
    )
    score = LogitScore(*(vocabulary[answer] for answer in answers))
    model = Original(
        modules=[layers, score], prompts=PROMPTS, default_prompt_name=default, device="cpu"
    )
    model.save_pretrained(str(folder / NAMES[kind]))
    return folder / NAMES[kind]


def original(folder: Path) -> Any:
    from sentence_transformers.cross_encoder import CrossEncoder as Original

    return Original(str(folder), device="cpu", activation_fn=torch.nn.Identity())


def close(found: Any, expected: Any) -> None:
    assert expected.std() > 0.01
    assert abs(found - expected).max() <= TOLERANCE * expected.std()


@pytest.mark.parametrize("default", [None, "law"])
@pytest.mark.parametrize("kind", list(OWN))
def test_scores_are_those_of_the_original(tmp_path, kind, default) -> None:
    folder = save_original(tmp_path, kind, default)
    theirs = original(folder)
    ours = CrossEncoder(folder, device="cpu", activation_fn=torch.nn.Identity())
    assert ours.num_labels == theirs.num_labels == 1
    assert ours.max_length == theirs.max_seq_length == 900

    calls: list[dict[str, str]] = [{}, {"prompt_name": "law"}, {"prompt": "Judge the weather."}]
    if kind == "qwen3" or default is None:
        calls += [{"prompt": ""}, {"prompt_name": "plain"}]
    for call in calls:
        close(ours.predict(PAIRS, **call), theirs.predict(PAIRS, **call))
    changed = ours.predict(PAIRS) - ours.predict(PAIRS, prompt="Judge the weather.")
    assert abs(changed).max() > 0.01
    same_ranking(ours.rank(QUERY, DOCUMENTS), theirs.rank(QUERY, DOCUMENTS))
    with Reranker(folder, device="cpu", precision="fp32") as reranker:
        close(reranker.score(PAIRS), theirs.predict(PAIRS))


def test_a_saved_default_without_a_place_is_refused(tmp_path) -> None:
    folder = make_language_model(tmp_path / "zerank-2", "qwen3")
    (folder / "modules.json").write_text('[{"type": "Transformer", "path": ""}]')
    settings = {"prompts": PROMPTS, "default_prompt_name": "law"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel, match="has no place for one"):
        Reranker(folder)


def test_the_default_of_a_prompt_without_its_own_cannot_be_left_out(tmp_path) -> None:
    folder = save_original(tmp_path, "qwen2", "law")
    with pytest.raises(InvalidInput, match="prompt: it is empty, and the default"):
        CrossEncoder(folder, device="cpu").predict(PAIRS, prompt="")
