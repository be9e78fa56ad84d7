"""Prompts of language models that rerank, as their authors publish them. No torch.

A checkpoint does not say which prompt it was trained with, and with another one it scores without
an error and wrongly. So a prompt is used for models that carry its name, or the modules that
sentence-transformers writes for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    around_instruction=("", ""),
    # The tokenizer keeps a sign and the letters behind it together: the parts end before the colon.
    around_query=("question:", " \n \n passage"),
    between="",
    before_document=":",
    suffix=(),
    answers=None,
    max_tokens=8192,
    causal=False,
)

PROMPTS = {
    ("qwen3", "qwen3-reranker"): QWEN3_RERANKER,
    ("qwen2", "mxbai-rerank"): MXBAI_RERANK_V2,
    ("llama_bidirec", "rerank"): NEMOTRON_RERANK,
}
"""(``model_type``, a part of the model's name) → prompt."""


def prompt_of(folder: Path, config: Mapping[str, Any]) -> Prompt | None:
    """The prompt of the model in a folder; None for one that reads plain pairs."""
    names = " ".join((str(folder), str(folder.resolve()), str(config.get("_name_or_path", ""))))
    for (model_type, name), prompt in PROMPTS.items():
        if config.get("model_type") == model_type and name in names.lower():
            return prompt
    return None
