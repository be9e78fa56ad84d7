"""What a card's operators refuse, and those that a CPU has no kernel for or rounds otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from shim_card.machine import Card

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)


def require(condition: object, message: str) -> None:
    """Raise torch's error for a wrong argument."""
    if not condition:
        raise RuntimeError(message)


# What is refused. Each check gets the card and the arguments by name.


def _layer_norm(card: Card, values: dict[str, Any]) -> None:
    del card
    rows = values["input"].dtype
    for name in ("weight", "bias"):
        found = rows if values.get(name) is None else values[name].dtype
        require(found == rows, f"expected scalar type {_scalar(rows)} but found {_scalar(found)}")


def _same_types(*names: str) -> Callable[[Card, dict[str, Any]], None]:
    def check(card: Card, values: dict[str, Any]) -> None:
        del card
        first, *others = (values[name].dtype for name in names)
        for other in others:
            require(
                first == other,
                f"expected m1 and m2 to have the same dtype, but got: {_c(first)} != {_c(other)}",
            )

    return check


def _scaled_mm(card: Card, values: dict[str, Any]) -> None:
    require(
        card.machine.capability >= (8, 9),
        "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9, "
        "or ROCm MI300+",
    )
    first, second = values["self"], values["mat2"]
    require(first.stride(-1) == 1, "mat_a must be row-major")
    require(second.stride(0) == 1, "mat_b must be column-major")
    require(
        first.shape[1] % 16 == 0 and second.shape[1] % 16 == 0,
        f"Expected trailing dimension of mat1 to be divisible by 16 but got mat1 shape: "
        f"({first.shape[0]}x{first.shape[1]}).",
    )


def _int_mm(card: Card, values: dict[str, Any]) -> None:
    del card
    first, second = values["self"], values["mat2"]
    require(
        first.shape[0] > 16, f"self.size(0) needs to be greater than 16, but got {first.shape[0]}"
    )
    for size in (first.shape[1], second.shape[1]):
        require(
            size % 8 == 0, f"size needs to be greater than 0 and a multiple of 8, but got {size}"
        )


def _flash(card: Card, values: dict[str, Any]) -> None:
    query, key, value = values["query"], values["key"], values["value"]
    require(card.machine.capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
    require(query.dtype in HALVES, "FlashAttention only support fp16 and bf16 data type")
    require(query.dtype == key.dtype, "query and key must have the same dtype")
    require(query.dtype == value.dtype, "query and value must have the same dtype")
    size = query.shape[-1]
    require(size <= 256, "FlashAttention forward only supports head dimension at most 256")
    require(size % 8 == 0, "head_size must be a multiple of 8, this is ensured by padding!")
    require(
        query.shape[-2] % key.shape[-2] == 0,
        "Number of heads in key/value must divide number of heads in query",
    )
    for part in (query, key, value):
        require(part.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        aligned = all(stride % 8 == 0 for stride in part.stride()[:-1])
        require(aligned, "CUDA error: misaligned address")
    for name, short in (("cum_seq_q", "cu_seqlens_q"), ("cum_seq_k", "cu_seqlens_k")):
        _offsets(values[name], short)


def _efficient(card: Card, values: dict[str, Any]) -> None:
    query, key, value = values["query"], values["key"], values["value"]
    require(query.dim() == 4, "query.dim() == 4")
    require(query.dtype == key.dtype == value.dtype, "query.scalar_type() == key.scalar_type()")
    old = card.machine.capability < (8, 0)
    require(
        query.dtype in (torch.float16, torch.float32)
        or (query.dtype == torch.bfloat16 and not old),
        "cutlassF: no kernel found to launch!",
    )
    offsets = [values.get("cu_seqlens_q"), values.get("cu_seqlens_k")]
    if offsets[0] is not None:
        require(query.shape[0] == 1, "cu_seqlen only supports batch_size=1")
        for part, name in zip(offsets, ("seqstart_q", "seqstart_k"), strict=True):
            _offsets(part, name)
    # Tensor cores load four numbers at a time; without them, as in fp32 before sm80, one.
    least = 1 if old and query.dtype == torch.float32 else 4
    for part, name in ((query, "query"), (key, "key"), (value, "value")):
        require(part.stride(-1) == 1, f"{name}: last dimension must be contiguous")
        aligned = part.stride(1) % least == 0 and part.stride(2) % least == 0
        require(aligned, f"{name} is not correctly aligned (strideM)")


def _offsets(offsets: Any, name: str) -> None:
    require(offsets.dtype == torch.int32, f"{name} must have dtype int32")
    require(offsets.dim() == 1 and offsets.is_contiguous(), f"{name} must be contiguous")


def _sdpa(card: Card, values: dict[str, Any]) -> None:
    del card
    query, key, value = values["query"], values["key"], values["value"]
    require(
        query.dtype == key.dtype == value.dtype,
        "Expected query, key, and value to have the same dtype, but got query.dtype: "
        f"{_c(query.dtype)} key.dtype: {_c(key.dtype)} and value.dtype: {_c(value.dtype)} instead.",
    )
    mask = values.get("attn_mask")
    require(
        mask is None or mask.dtype in (torch.bool, query.dtype),
        "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
        f"attn_mask.dtype: {None if mask is None else _c(mask.dtype)} and  query.dtype: "
        f"{_c(query.dtype)} instead.",
    )


def _scalar(dtype: torch.dtype) -> str:
    """What C++ calls a dtype."""
    names = {torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float32: "Float"}
    return names.get(dtype, str(dtype))


def _c(dtype: torch.dtype) -> str:
    names = {torch.float16: "c10::Half", torch.bfloat16: "c10::BFloat16", torch.float32: "float"}
    return names.get(dtype, str(dtype))


REFUSALS: dict[Any, Callable[[Card, dict[str, Any]], None]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.mm.default: _same_types("self", "mat2"),
    aten.bmm.default: _same_types("self", "mat2"),
    aten.addmm.default: _same_types("mat1", "mat2", "self"),
    aten._scaled_mm.default: _scaled_mm,
    aten._int_mm.default: _int_mm,
    aten._flash_attention_forward.default: _flash,
    aten._efficient_attention_forward.default: _efficient,
    aten.scaled_dot_product_attention.default: _sdpa,
}


# What is computed otherwise. Each gets tensors on CPU.


def _attend(query: Tensor, key: Tensor, value: Tensor, limits: Any, *, scale: float | None,
            causal: bool = False, window: tuple[int, int] = (-1, -1)) -> Tensor:  # fmt: skip
    """Attention of packed rows, pair by pair, summed in fp32; rows of no pair stay unwritten.

    A pair's last query and its last key are at one place; ``window`` is how far a query sees.
    """
    queries, keys, max_queries, max_keys = limits
    out = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
    first, seen = queries.tolist(), keys.tolist()
    repeat = query.shape[1] // key.shape[1]
    for i in range(len(first) - 1):
        rows, columns = slice(first[i], first[i + 1]), slice(seen[i], seen[i + 1])
        if rows.start == rows.stop:
            continue
        # Kernels leave out rows beyond the bound, or read other pairs' keys: wrong, and silently.
        short = rows.stop - rows.start > max_queries or columns.stop - columns.start > max_keys
        if short:
            continue
        q, k, v = (
            part.transpose(0, 1).float() for part in (query[rows], key[columns], value[columns])
        )
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        weights = q @ k.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)
        if causal:
            hidden = torch.ones(weights.shape[-2:], dtype=torch.bool)
            weights.masked_fill_(hidden.triu(1 + k.shape[1] - q.shape[1]), float("-inf"))
        place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        away = torch.arange(k.shape[1]) - place
        for limit, beyond in zip(window, (-away, away), strict=True):
            if limit >= 0:
                weights.masked_fill_(beyond > limit, float("-inf"))
        out[rows] = (weights.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    return out


def by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by their names."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _run_flash(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    given = by_name(aten._flash_attention_forward.default, args, kwargs)
    query = given["query"]
    limits = [given[name] for name in ("cum_seq_q", "cum_seq_k", "max_q", "max_k")]
    options = {"scale": given.get("scale"), "causal": given["is_causal"]}
    sides = (given.get(f"window_size_{side}") for side in ("left", "right"))
    options["window"] = tuple(-1 if side is None else side for side in sides)
    mixed = _attend(query, given["key"], given["value"], limits, **options)
    logsumexp = torch.zeros(query.shape[1], query.shape[0])
    state = torch.zeros(2, dtype=torch.uint64)
    return mixed, logsumexp, state, torch.zeros((), dtype=torch.uint64), torch.zeros(0)


def _run_efficient(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    given = by_name(aten._efficient_attention_forward.default, args, kwargs)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    limits = [given[name] for name in names]
    packed = (given[name].squeeze(0) for name in ("query", "key", "value"))
    options = {"scale": given.get("scale"), "causal": given["custom_mask_type"] != 0}
    mixed = _attend(*packed, limits, **options)
    number = torch.zeros((), dtype=torch.int64)
    return mixed[None], torch.zeros(0), number, number.clone(), *limits[2:]


def _run_cudnn(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """What ``varlen_attn`` of torch 2.14 takes on Hopper for more than 128 queries a pair."""
    given = by_name(aten._cudnn_attention_forward.default, args, kwargs)
    query = given["query"]
    limits = [given[name] for name in ("cum_seq_q", "cum_seq_k", "max_q", "max_k")]
    options = {"scale": given.get("scale"), "causal": given.get("is_causal", False)}
    mixed = _attend(query, given["key"], given["value"], limits, **options)
    empty = [torch.zeros(0) for _ in range(4)]
    return mixed, torch.zeros(query.shape[1], query.shape[0]), *empty[:2], *limits[2:], *empty[:3]


def _run_scaled(*args: Any, **kwargs: Any) -> Tensor:
    """The product of codes, each row and column with its scale: before 2.12 no CPU takes those."""
    given = by_name(aten._scaled_mm.default, args, kwargs)
    product = (given["self"].float() @ given["mat2"].float()) * given["scale_a"] * given["scale_b"]
    if given.get("bias") is not None:
        product = product + given["bias"].float()
    return product.to(given.get("out_dtype") or given["self"].dtype)


def _in_tf32(func: Any) -> Callable[..., Any]:
    """A product whose fp32 factors lose 13 bits, where the settings and the card say so."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return func(*(_rounded(a) if _is_factor(a, args) else a for a in args), **kwargs)

    return run


def _is_factor(value: Any, args: tuple[Any, ...]) -> bool:
    """Whether an argument is one of the last two tensors, not what is added to their product."""
    factors = [a for a in args if isinstance(a, torch.Tensor)][-2:]
    return any(value is factor for factor in factors) and value.dtype == torch.float32


def _rounded(factor: Tensor) -> Tensor:
    bits = factor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def uses_tf32(card: Card) -> bool:
    """Whether fp32 products of a card are computed in TF32 now."""
    return card.machine.capability >= (8, 0) and torch.backends.cuda.matmul.fp32_precision == "tf32"


def kernel_of(func: Any, card: Card) -> Callable[..., Any]:
    """What computes an operator on CPU."""
    if func is aten._flash_attention_forward.default:
        return _run_flash
    if func is aten._efficient_attention_forward.default:
        return _run_efficient
    if func is aten._cudnn_attention_forward.default:
        return _run_cudnn
    if func is aten._scaled_mm.default:
        return _run_scaled
    if func in PRODUCTS and uses_tf32(card):
        return _in_tf32(func)
    found: Callable[..., Any] = func
    return found
