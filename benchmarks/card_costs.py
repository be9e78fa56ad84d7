"""Launches, bytes and operations of the forward passes on cards, and what they predict.

The passes run without values, on fake CUDA tensors, so no card is needed:

    python benchmarks/card_costs.py

prints the tables of docs/decisions/0005-cuda.md. They are predictions until a card has run them.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echelon.models import card_kernels
from echelon.models.architecture import Architecture, LayerPlan
from echelon.models.attention_cuda import attention_with, choose_kernel
from echelon.models.cuda_steps import CaptureShape, read
from echelon.models.encoder import load_weights
from echelon.models.encoder_cuda import EncoderPass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

CUDA = torch.device("cuda", 0)
TOKENS, LENGTH = 8192, 128
"""The step that is counted: as many tokens, in pairs of one length."""

PRODUCTS = {"linear": 0, "mm": 0, "bmm": 0, "_scaled_mm": 0, "addmm": 1, "_addmm_activation": 1}
"""Operators that multiply matrices, and which of their tensors is the left one."""

ATTENTION = ("_flash_attention_forward", "_efficient_attention_forward")
UNLAUNCHED = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh")
ONCE_READ = ("embedding", "index_select", "index")  # of a table only the rows that are asked for


class Launches(TorchDispatchMode):
    """Counts what a card would do: kernels, bytes that they read and write, and products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0  # of all that is neither product nor attention
        self.flops = 0  # of products

    @property
    def count(self) -> int:
        """Kernels."""
        return sum(self.names.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one operator and run it."""
        del types
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name in UNLAUNCHED or _is_view(func):
            return out
        self.names[name] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in PRODUCTS:
            self.flops += 2 * tensors[PRODUCTS[name]].numel() * out.shape[-1]
        elif name not in ATTENTION:
            written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            read = written if name in ONCE_READ else tensors
            self.bytes += sum(tensor.nbytes for tensor in (*read, *written))
        return out


def _is_view(func: Any) -> bool:
    """Whether an operator only looks at its input in another way."""
    returns = func._schema.returns  # noqa: SLF001 - no public name exists
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


class FakeCheckpoint:
    """A checkpoint of the right shapes without numbers."""

    def refuse_surplus(self, root: str, layers: int) -> None:
        """Refuse nothing."""

    def read(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Tensors of these shapes."""
        return {name: torch.empty(shape) for name, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shape, and what a pass of it costs."""

    name: str
    architecture: Architecture


def bert_like(name: str, kind: str, layers: int, heads: int, size: int) -> Model:
    """An encoder with a feed-forward four times as wide as its heads together."""
    vocabulary, positions = (250_002, 514) if kind == "xlm-roberta" else (30_522, 512)
    architecture = Architecture(
        *(kind, vocabulary, heads * size, layers, heads, 4 * heads * size),
        *(positions, 2, "gelu", 1e-5, 1, ("LABEL_0",)),
    )
    return Model(name, architecture)


XLM_R_LARGE = bert_like("XLM-R-large", "xlm-roberta", 24, 16, 64)
MINILM = bert_like("MiniLM-L6", "bert", 6, 12, 32)
MODELS = (XLM_R_LARGE, MINILM)


@contextmanager
def fake_card(*, kernels: bool) -> Iterator[None]:
    """Tensors without values on a card with or without our kernels."""
    why = None if kernels else "left out"
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.inference_mode())
        stack.enter_context(patch.object(card_kernels, "missing", lambda _: why))
        yield


def costs(model: Model, *, layers: int, major: int = 9, kernels: bool = True) -> Launches:
    """What a pass of some of a model's layers in fp16 does on a card of a major capability."""
    shape = replace(model.architecture, layers=layers)
    step = CaptureShape(TOKENS, TOKENS // LENGTH, LENGTH)
    with fake_card(kernels=kernels):
        weights = load_weights(FakeCheckpoint(), shape, CUDA, LayerPlan("fp16"), 0)
        attend = attention_with(choose_kernel(major, torch.float16, shape.head_shape[1]))
        size = step.size(segments=shape.reads_segments)
        block = torch.zeros(size, dtype=torch.int32, device=CUDA)
        run = EncoderPass(weights, attend, "fp16")
        with Launches() as launches:
            run(read(block, step, segments=shape.reads_segments))
    return launches


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What one layer of a model costs, and the rest of its pass."""

    launches: int
    rest_launches: int
    token_bytes: float  # that norms and activations move for a token
    token_flops: float  # of products for a token

    @classmethod
    def of(cls, model: Model, **card: Any) -> LayerCosts:
        """Those of a model, as the difference that a layer makes."""
        two, three = (costs(model, layers=count, **card) for count in (2, 3))
        launches = three.count - two.count
        return cls(
            launches,
            two.count - 2 * launches,
            (three.bytes - two.bytes) / TOKENS,
            (three.flops - two.flops) / TOKENS,
        )


def main() -> None:
    """Print the table."""
    for model in MODELS:
        for kernels in (False, True):
            print(model.name, kernels, LayerCosts.of(model, kernels=kernels))


if __name__ == "__main__":
    main()
