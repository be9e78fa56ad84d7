"""Launches, bytes and operations of the forward passes on cards, and what they predict.

The passes run without values, on fake CUDA tensors, so no card is needed:

    python benchmarks/card_costs.py

prints the tables of docs/decisions/0005-cuda.md. They are predictions until a card has run them.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echelon.models import card_kernels, encoder, modernbert_encoder
from echelon.models.architecture import Architecture, LayerPlan
from echelon.models.attention_cuda import FLASH_CAPABILITY, attention_with, choose_kernel
from echelon.models.cuda_steps import CaptureShape, read
from echelon.models.encoder import load_weights
from echelon.models.encoder_cuda import EncoderPass
from echelon.models.modernbert import ModernBertArchitecture
from echelon.models.modernbert_cuda import ModernBertPass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from echelon.models.attention_cuda import Attention
    from echelon.models.cuda_steps import StepInputs

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
    """A model's shape."""

    name: str
    architecture: Architecture | ModernBertArchitecture

    def forward(
        self, layers: int, attend: Attention, precision: str
    ) -> Callable[[StepInputs], Tensor]:
        """The pass of a model with so many layers."""
        shape, plan = replace(self.architecture, layers=layers), LayerPlan(precision)
        if isinstance(shape, Architecture):
            with patch.object(encoder, "encoder_checkpoint", lambda _: FakeCheckpoint()):
                weights = load_weights(Path(), shape, CUDA, plan, 0)
            return EncoderPass(weights, attend, precision)
        shape = replace(shape, local=(True,) * (layers - 1) + (False,))
        with patch.object(modernbert_encoder, "Checkpoint", lambda _: FakeCheckpoint()):
            loaded = modernbert_encoder.load_weights(Path(), shape, CUDA, plan, 0)
        return ModernBertPass(shape, loaded, attend, precision)


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
MODERNBERT = Model(
    "ModernBERT-base",
    ModernBertArchitecture(
        *("modernbert", 50_368, 768, 22, 12, 1152, 8192, 50_283, ("LABEL_0",), "gelu", 1e-5),
        *(False, False, False, (), 64, (160_000.0, 10_000.0), "cls", "gelu", False, None),
    ),
)
MODELS = (XLM_R_LARGE, MINILM, MODERNBERT)


@contextmanager
def fake_card(*, kernels: bool) -> Iterator[None]:
    """Tensors without values on a card with or without our kernels."""
    why = None if kernels else "left out"
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.inference_mode())
        stack.enter_context(patch.object(card_kernels, "missing", lambda _: why))
        yield


def costs(
    model: Model, *, layers: int, major: int = 9, kernels: bool = True, precision: str = "fp16"
) -> Launches:
    """What a pass of some of a model's layers does on a card of a major capability."""
    shape = model.architecture
    step = CaptureShape(TOKENS, TOKENS // LENGTH, LENGTH)
    with fake_card(kernels=kernels):
        attend = attention_with(choose_kernel(major, torch.float16, shape.head_shape[1]))
        size = step.size(segments=shape.reads_segments)
        block = torch.zeros(size, dtype=torch.int32, device=CUDA)
        run = model.forward(layers, attend, precision)
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


CARDS = {"T4": (7, 65, 0.32), "L4": (8, 121, 0.3), "A100": (8, 312, 1.9), "H200": (9, 989, 4.8)}
"""Major compute capability, TFLOP/s of fp16 products and TB/s of memory, by the data sheets."""

PRODUCT_SHARE, MEMORY_SHARE, ATTENTION_SHARE = 0.6, 0.8, 0.35
"""Shares of the peaks that products, passes over memory and attention are expected to reach."""


def token_us(model: Model, card: str, *, kernels: bool = True) -> tuple[float, float, float]:
    """Microseconds of a token in pairs of LENGTH: products, other passes, attention; a prediction.

    The host is expected to keep up.
    """
    major, tflops, tbytes = CARDS[card]
    costs = LayerCosts.of(model, kernels=kernels, major=major)
    layers, hidden = model.architecture.layers, model.architecture.hidden
    return (
        layers * costs.token_flops / (tflops * PRODUCT_SHARE * 1e6),
        layers * costs.token_bytes / (tbytes * MEMORY_SHARE * 1e6),
        layers * 4 * hidden * LENGTH / (tflops * ATTENTION_SHARE * 1e6),
    )


def main() -> None:
    """Print both tables."""
    print("| model | launches a layer | kB a token and layer | MFLOP a token and layer |")
    print("|---|---|---|---|")
    for model in MODELS:
        torch_only, ours = (LayerCosts.of(model, kernels=kernels) for kernels in (False, True))
        print(
            f"| {model.name} | {ours.launches} ({torch_only.launches} without Triton) "
            f"| {ours.token_bytes / 1e3:.1f} ({torch_only.token_bytes / 1e3:.1f}) "
            f"| {ours.token_flops / 1e6:.1f} |"
        )
    print("\n| model | card | products | other passes | attention | tokens a second |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        for card, (major, *_) in CARDS.items():
            if major < FLASH_CAPABILITY and not isinstance(model.architecture, Architecture):
                continue  # its pass needs windows in the kernel
            parts = token_us(model, card)
            shown = " | ".join(f"{part:.2g} µs" for part in parts)
            print(f"| {model.name} | {card} | {shown} | {float(f'{1e6 / sum(parts):.2g}'):,.0f} |")


if __name__ == "__main__":
    main()
