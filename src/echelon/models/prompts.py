"""Prompts of language models that rerank, as their authors publish them. No torch.

A checkpoint does not say which prompt it was trained with, and with another one it scores without
an error and wrongly. So a prompt is used for models that carry its name, or the modules that
sentence-transformers writes for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.errors import UnsupportedModel
from echelon.models.text_settings import read_text_settings
from echelon.types import Prompt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

QWEN3_RERANKER = Prompt(
    prefix="<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    around_instruction=("<Instruct>: ", "\n<Query>:"),
    around_query=(" ", "\n<Document>:"),
    between="",
    before_document=" ",
    suffix=("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",),
    answers=("yes", "no"),
    max_tokens=8192,
)

_MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. "
    "For each query-document pair, carefully analyze the semantic relationship between them, "
    "then provide your binary relevance judgment (0 for not relevant, 1 for relevant).\n"
    "Relevance:"
)

MXBAI_RERANK_V2 = Prompt(
    prefix="<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n",
    instruction=None,
    around_instruction=("instruction: ", "\n"),
    around_query=("query: ", ""),
    between="\n",
    before_document="document: ",
    suffix=(
        "\n",
        _MXBAI_TASK,
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    answers=("1", "0"),
    max_tokens=8192,
    query_share=0.75,
)

NEMOTRON_RERANK = Prompt(
    prefix="<|begin_of_text|>",
    instruction=None,
    around_instruction=None,
    # The tokenizer keeps a sign and the letters behind it together: the parts end before the colon.
    around_query=("question:", " \n \n passage"),
    between="",
    before_document=":",
    suffix=(),
    answers=None,
    max_tokens=8192,
    causal=False,
)

ZERANK = Prompt(
    prefix="<|im_start|>system\n",
    instruction=None,
    around_instruction=None,
    around_query=("", ""),
    between="<|im_end|>\n<|im_start|>user\n",
    before_document="",
    suffix=("<|im_end|>\n<|im_start|>assistant\n",),
    answers=("Yes",),
    max_tokens=32_768,
    strips=True,
    temperature=5.0,
)

PROMPTS = {
    ("qwen3", "qwen3-reranker"): QWEN3_RERANKER,
    ("qwen3", "zerank-1"): ZERANK,
    ("qwen3", "zerank-2"): ZERANK,
    ("qwen2", "mxbai-rerank"): MXBAI_RERANK_V2,
    ("llama_bidirec", "rerank"): NEMOTRON_RERANK,
}
"""(``model_type``, a part of the model's name) → prompt."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What of a language model's vocabulary its score is read of."""

    yes: int  # the token whose logit counts
    no: int | None = None  # the one whose logit is taken off, if any
    temperature: float = 1.0  # divides the logit

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens."""
        return (self.yes,) if self.no is None else (self.yes, self.no)


def prompt_of(folder: Path, config: Mapping[str, Any]) -> Prompt | None:
    """The prompt of the model in a folder; None for one that reads plain pairs.

    Where a path names several, the last name is the model's.

    Raises:
        BadCheckpoint: a file of sentence-transformers is damaged.
        UnsupportedModel: they hold a default prompt for a model that reads no instruction.
    """
    kind = config.get("model_type")
    known = {name: prompt for (of, name), prompt in PROMPTS.items() if of == kind}
    for place in (folder, folder.resolve(), config.get("_name_or_path", "")):
        found = {name: str(place).lower().rfind(name) for name in known}
        last = max(found, key=lambda name: found[name], default=None)
        if last is not None and found[last] >= 0:
            _require_place_for_saved(known[last], folder)
            return known[last]
    return None


def _require_place_for_saved(prompt: Prompt, folder: Path) -> None:
    if prompt.around_instruction is None and read_text_settings(folder).default_prompt:
        raise UnsupportedModel(
            f"{folder}: it has a default prompt in config_sentence_transformers.json, and the "
            "prompt of this model has no place for one. Use the model as its authors publish it."
        )
