"""The model families that run natively: one entry each says how it is read and opened. No torch.

A new family of known parts needs one entry here and one parity test. A family with parts of its own
also needs a module that reads its shape (without torch) and one with its forward pass, whose
``open_native`` opens it. Any other sequence classifier runs through transformers, with padding.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from echelon.errors import BadCheckpoint, InvalidInput, UnsupportedModel
from echelon.files import MIB, OBJECT, read_object
from echelon.models import architecture, gte, llama, modernbert, modules, qwen
from echelon.models.prompts import Answers, prompt_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from echelon.models.architecture import LayerPlan
    from echelon.models.base import Scorer
    from echelon.types import IntArray, Prompt

    Config = dict[str, Any]


WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}
"""Bytes of a weight."""

IN_CACHE_BYTES = 6 * MIB
"""Blocks of rows that are in several forms at a time, whatever the step's size."""


class NativeShape(Protocol):
    """What is known of a native model before its weights are read."""

    @property
    def model_type(self) -> str:
        """As in ``config.json``."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's outputs."""

    @property
    def max_tokens(self) -> int:
        """Longest pair, special tokens included."""

    @property
    def weights(self) -> int:
        """Number of weights that scoring needs."""

    @property
    def hidden(self) -> int:
        """Width of a row."""

    @property
    def intermediate(self) -> int:
        """Width inside the feed-forward."""

    def check_ids(self, ids: IntArray) -> None:
        """Raise :class:`BadCheckpoint` for a token id without an embedding."""


@dataclass(frozen=True, slots=True)
class NativeFamily:
    """A family of models that share a forward pass."""

    name: str  # as its authors write it
    model_types: tuple[str, ...]  # of ``config.json``
    read: Callable[[Path, Config], NativeShape | None]  # None where one is not native after all
    module: str  # below ``echelon.models``, with its forward pass
    cuda_module: str | None = None  # the same for CUDA, if it is another
    mps_module: str | None = None  # the same for Apple's GPUs; None where it is not built
    half: str | None = None  # the usual precision where the processor is fast in it
    modular: bool = False  # a head may stand in modules beside the model
    known: tuple[str, ...] = ()  # models of it that many use

    def open(self, device: torch.device, **values: Any) -> Scorer:
        """Open a model of the family: the values of its module's ``open_native``."""
        name = self.cuda_module if device.type == "cuda" and self.cuda_module else self.module
        if device.type == "mps":
            name = self.mps_module or _not_on_apple(self.name)
        opened: Scorer = importlib.import_module(f"echelon.models.{name}").open_native(
            device=device, **values
        )
        return opened


def _not_on_apple(family: str) -> str:
    raise InvalidInput("device", f"{family} is not built for Apple's GPUs", "Use device='cpu'.")


FAMILIES = (
    NativeFamily(
        "BERT",
        ("bert",),
        architecture.native_architecture,
        "encoder",
        "encoder_cuda",
        "encoder_padded",
        modular=True,
        known=("cross-encoder/ms-marco-MiniLM-L6-v2", "cross-encoder/ms-marco-MiniLM-L12-v2"),
    ),
    NativeFamily(
        "RoBERTa and XLM-RoBERTa",
        ("roberta", "xlm-roberta", "camembert"),
        architecture.native_architecture,
        "encoder",
        "encoder_cuda",
        "encoder_padded",
        modular=True,
        known=(
            "BAAI/bge-reranker-v2-m3",
            "BAAI/bge-reranker-base",
            "BAAI/bge-reranker-large",
            "jinaai/jina-reranker-v2-base-multilingual",
        ),
    ),
    NativeFamily(
        "ModernBERT",
        ("modernbert",),
        modernbert.read,
        "modernbert_encoder",
        "modernbert_cuda",
        modular=True,
        known=(
            "Alibaba-NLP/gte-reranker-modernbert-base",
            "ibm-granite/granite-embedding-reranker-english-r2",
        ),
    ),
    NativeFamily(
        "gte",
        ("new",),
        gte.read,
        "gte_encoder",
        known=("Alibaba-NLP/gte-multilingual-reranker-base",),
    ),
    NativeFamily(
        "Qwen3 and Qwen2",
        ("qwen3", "qwen2"),
        qwen.read,
        "decoder",
        half="bf16",
        known=(
            "Qwen/Qwen3-Reranker-0.6B",
            "Qwen/Qwen3-Reranker-4B",
            "Qwen/Qwen3-Reranker-8B",
            "mixedbread-ai/mxbai-rerank-base-v2",
            "mixedbread-ai/mxbai-rerank-large-v2",
            "zeroentropy/zerank-1-small",
            "zeroentropy/zerank-2",
        ),
    ),
    NativeFamily(
        "bidirectional Llama",
        ("llama_bidirec",),
        llama.read,
        "llama_encoder",
        half="bf16",
        known=("nvidia/llama-nemotron-rerank-1b-v2", "nvidia/llama-3.2-nv-rerankqa-1b-v2"),
    ),
)


@dataclass(frozen=True, slots=True)
class NativeModel:
    """A folder's model that runs natively."""

    folder: Path
    family: NativeFamily
    shape: NativeShape
    prompt: Prompt | None
    answers: Answers | None  # the prompt's, for a model without a classifier

    def weights_bytes(self, precision: str) -> int:
        """Memory of the weights in a precision, in bytes."""
        return self.shape.weights * WEIGHT_BYTES[precision]

    def step_bytes(self, precision: str) -> int:
        """About the most memory that the smallest step takes: one pair of the longest length.

        A layer's largest moment is in attention, with queries, keys, values and copies of them, or
        in the feed-forward, with both parts of a gate and their product. Int8 keeps rows in bf16.
        Of attention by products, which takes more, only short pairs have the choice.
        """
        width = max(8 * self.shape.hidden, 3 * self.shape.intermediate) + 2 * self.shape.hidden
        numbers = max(WEIGHT_BYTES[precision], WEIGHT_BYTES["bf16"]) * width
        sums = 2 * WEIGHT_BYTES["fp32"] * self.shape.hidden  # between layers, and normalised
        return self.shape.max_tokens * (numbers + sums) + IN_CACHE_BYTES

    def open(self, device: torch.device, plan: LayerPlan, threads: int, label: int) -> Scorer:
        """Load the weights."""
        more = {} if self.answers is None else {"answers": self.answers}
        return self.family.open(
            device,
            folder=self.folder,
            architecture=self.shape,
            plan=plan,
            threads=threads,
            label=label,
            **more,
        )


def family_of(config: Config) -> NativeFamily | None:
    """The native family of a configuration."""
    return next((f for f in FAMILIES if config.get("model_type") in f.model_types), None)


def native_model(folder: Path, config: Config) -> NativeModel | None:
    """The folder's model, or None for one that needs the generic scorer.

    Raises:
        BadCheckpoint: a field of the configuration is wrong, or an answer is no token.
        UnsupportedModel: it cannot score pairs.
    """
    require_head(folder, config)
    family = family_of(config)
    shape = None if family is None else family.read(folder, config)
    if family is None or shape is None:
        if _is_language_model(config):
            raise UnsupportedModel(
                f"{folder}: this {config['model_type']} has parts that do not run here, such as "
                "scaled positions, windows or quantized weights. Use a reranker such as "
                "Qwen/Qwen3-Reranker-0.6B."
            )
        return None
    prompt = prompt_of(folder, config)
    if prompt is None:
        return NativeModel(folder, family, shape, None, None)
    limit = min(prompt.max_tokens, shape.max_tokens)
    shape = replace(cast("Any", shape), max_tokens=limit)  # a dataclass of each family
    if _is_language_model(config):
        return NativeModel(folder, family, shape, prompt, _answers(folder, prompt))
    if prompt.temperature != 1:
        raise UnsupportedModel(
            f"{folder}: a classifier made from this model may hold its temperature of "
            f"{prompt.temperature:g} or not, and its files do not say. Use the original, such as "
            "zeroentropy/zerank-2."
        )
    return NativeModel(folder, family, shape, prompt, None)


def require_head(folder: Path, config: Config) -> None:
    """Raise :class:`UnsupportedModel` for a model that cannot score pairs."""
    named = (config.get("architectures") or ["?"])[0]
    if named == "?" or named.endswith("ForSequenceClassification"):
        if modules.read(folder) is not None:
            raise UnsupportedModel(
                f"{folder}/modules.json: lists modules besides a transformer with a head of its "
                "own, and Echelon would not run them. Stay with sentence_transformers for it."
            )
        return
    if _is_language_model(config):
        if prompt_of(folder, config) is not None:
            return
        raise UnsupportedModel(
            f"{folder}: {named} is a language model, and its name does not say with which "
            "prompt it was trained to rerank. Use a reranker such as "
            "Qwen/Qwen3-Reranker-0.6B, in a folder that keeps its name."
        )
    family = family_of(config)
    modular = named.endswith("Model") and family is not None and family.modular
    if modular and modules.read(folder) is not None:
        return
    raise UnsupportedModel(
        f"{folder}: a {named} has no classification head, so it cannot score pairs. "
        "Use a cross-encoder, such as BAAI/bge-reranker-v2-m3."
    )


def _is_language_model(config: Config) -> bool:
    return bool((config.get("architectures") or [""])[0].endswith("ForCausalLM"))


def _answers(folder: Path, prompt: Prompt) -> Answers:
    """The prompt's answers as tokens, which those of the folder's own modules must be."""
    if prompt.answers is None:
        raise RuntimeError("This is a bug: the prompt of a language model names no answers.")
    yes, *others = (_token_id(folder, answer) for answer in prompt.answers)
    no = others[0] if others else None
    named = modules.logit_score(folder)
    if named not in {None, (yes, no)}:
        raise UnsupportedModel(
            f"{folder}: its modules read the score of other tokens than its name says: of {named}, "
            f"not {(yes, no)}. Use the model as its authors publish it."
        )
    return Answers(yes, no, prompt.temperature)


def _token_id(folder: Path, text: str) -> int:
    """The id of a token of the folder's vocabulary."""
    path = folder / "tokenizer.json"
    try:
        id_ = (read_object(path, {"model": OBJECT}, 256 * MIB)["model"] or {})["vocab"][text]
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BadCheckpoint(
            f"{path}: no token {text!r}, which the model answers with ({error}). Download the "
            "model again, with its tokenizer.json."
        ) from error
    if isinstance(id_, bool) or not isinstance(id_, int):
        raise BadCheckpoint(f"{path}: token {text!r} has the id {id_!r}. Download the model again.")
    return id_
