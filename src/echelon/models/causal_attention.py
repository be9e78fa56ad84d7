"""Causal attention over packed pairs whose beginnings are shared, with grouped query heads.

The keys of a pair are those of its prefix and its own. The compiled kernel takes all pairs at once,
and reads the keys of a prefix where they are. Without it, pairs of one prefix and one length go
together, a block of their rows at a time, so that a long pair neither makes a large mask nor
multiplies keys that come later. Blocks end at the same positions in every pair, shared or not, so
that a row's sums are over as many keys in the same order: bf16 gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.models.device import has_amx
from echelon.models.kernel_calls import call_kernel, has_kernel
from echelon.models.kernels import CAUSAL_HEAD_SIZES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from echelon.models.prefixes import Run, StepLayout

BLOCK = 64
"""Positions of a pair that attend at a time; 128 took 4 % more time for a whole step."""


@dataclass(frozen=True, slots=True)
class KeysAndValues:
    """Rotated keys, and values, in one layer: [tokens, key heads, size], or so for each pair."""

    keys: Tensor
    values: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> KeysAndValues:
        """A function of both."""
        return KeysAndValues(function(self.keys), function(self.values))

    def __getitem__(self, tokens: slice) -> KeysAndValues:
        """Those of some of the tokens."""
        return self.map(itemgetter(tokens))

    def then(self, later: KeysAndValues) -> KeysAndValues:
        """These, and those of later tokens, of the same pairs or one prefix."""
        parts = ((self.keys, later.keys), (self.values, later.values))
        return KeysAndValues(*(torch.cat(part, -3) for part in parts))

    @property
    def nbytes(self) -> int:
        """Size of both."""
        return self.keys.nbytes + self.values.nbytes


class CausalMask:
    """Masks for blocks of queries, as views of one staircase.

    Row i of the staircase allows the first ``width + i + 1`` keys. A block whose first query
    follows n keys reads it from column ``width - n`` on.
    """

    def __init__(self, width: int, group: int, device: torch.device, dtype: torch.dtype) -> None:
        self._width = width
        columns = torch.arange(width + BLOCK, device=device)
        last = torch.arange(width, width + BLOCK, device=device).repeat_interleave(group)
        mask = torch.zeros(len(last), len(columns), device=device, dtype=dtype)
        self._mask = mask.masked_fill_(columns > last[:, None], float("-inf"))

    def block(self, before: int, rows: int, keys: int) -> Tensor:
        """The mask of ``rows`` rows whose first query follows ``before`` keys; [rows, keys]."""
        first = self._width - before
        mask = self._mask[:rows, first : first + keys]
        # CUDA's kernels read rows that begin at aligned addresses.
        return mask if mask.device.type == "cpu" else mask.contiguous()


@dataclass(frozen=True, slots=True)
class KernelTexts:
    """What the kernel knows of texts whose rows follow one another, each [texts] in int32.

    A text is a pair's own tokens, or those tokens of a prefix that are computed.
    """

    offsets: Tensor  # [texts + 1], of its rows in the step
    starts: Tensor  # first row, among those of all prefixes, of the tokens before its own
    before: Tensor  # how many those are

    @classmethod
    def of(cls, layout: StepLayout) -> KernelTexts:
        """Those of a step: the prefixes that are computed, then the pairs."""
        sizes = [len(prefix.ids) for prefix in layout.prefixes]
        places = [sum(sizes[:index]) for index in range(len(sizes))]
        rows, starts, before = [0], [], []
        for prefix, place in zip(layout.prefixes, places, strict=True):
            if prefix.known < len(prefix.ids):
                rows.append(len(prefix.ids) - prefix.known)
                starts.append(place)
                before.append(prefix.known)
        for run in layout.runs:
            rows += [run.length] * run.count
            starts += [0 if run.prefix is None else places[run.prefix]] * run.count
            before += [0 if run.prefix is None else sizes[run.prefix]] * run.count
        numbers = (torch.tensor(values, dtype=torch.int32) for values in (rows, starts, before))
        offsets, *others = numbers
        return cls(offsets.cumsum(0, dtype=torch.int32), *others)

    def last(self, count: int) -> KernelTexts:
        """The last ones of them."""
        return KernelTexts(self.offsets[-count - 1 :], self.starts[-count:], self.before[-count:])


class CausalAttention:
    """The attention of one step in all layers."""

    def __init__(
        self, layout: StepLayout, heads: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layout = layout
        query_heads, self._key_heads = heads
        self._group = query_heads // self._key_heads
        self._device, self._dtype = device, dtype

    @cached_property
    def _mask(self) -> CausalMask:
        ends = [len(prefix.ids) for prefix in self._layout.prefixes]
        before = [ends[run.prefix] if run.prefix is not None else 0 for run in self._layout.runs]
        ends += [start + run.length for start, run in zip(before, self._layout.runs, strict=True)]
        return CausalMask(max(ends), self._group, self._device, self._dtype)

    @cached_property
    def _texts(self) -> KernelTexts:
        return KernelTexts.of(self._layout)

    def beginnings(
        self, own: KeysAndValues, cached: Sequence[KeysAndValues | None]
    ) -> list[KeysAndValues]:
        """Keys and values of all prefixes in one layer: those that are cached and ``own`` rows."""
        found = []
        for prefix, past in zip(self._layout.prefixes, cached, strict=True):
            computed = own[prefix.rows]
            found.append(computed if past is None else past[: prefix.known].then(computed))
        return found

    def attend(
        self, query: Tensor, own: KeysAndValues, beginnings: Sequence[KeysAndValues]
    ) -> Tensor:
        """Attention of all rows: [rows, heads, size] → [rows, heads × size]; filler gets 0."""
        if _fits_kernel(query, own):
            return self._by_kernel(query, own, beginnings, self._texts, self._texts.offsets)
        mixed = own.values.new_zeros(len(query), query.shape[1] * query.shape[2])
        for prefix, beginning in zip(self._layout.prefixes, beginnings, strict=True):
            if prefix.known < len(prefix.ids):
                mixed[prefix.rows] = self._causal(
                    query[prefix.rows][None], beginning.map(itemgetter(None))
                )
        for run in self._layout.runs:
            queries = query[run.rows].view(run.count, run.length, *query.shape[1:])
            mixed[run.rows] = self._causal(queries, _of_run(run, own, beginnings))
        return mixed

    def attend_last(
        self, query: Tensor, own: KeysAndValues, beginnings: Sequence[KeysAndValues]
    ) -> Tensor:
        """Attention of each pair's last row, in the layout's order, to all of its pair.

        ``query`` is [pairs or more, heads, size]; the surplus rows of the result are 0.
        """
        if _fits_kernel(query, own):
            pairs = len(self._layout.order)
            one_each = torch.arange(pairs + 1, dtype=torch.int32)
            return self._by_kernel(query, own, beginnings, self._texts.last(pairs), one_each)
        mixed = own.values.new_zeros(len(query), query.shape[1] * query.shape[2])
        for run in self._layout.runs:
            found = _of_run(run, own, beginnings)
            mixed[run.pairs] = self._causal(query[run.pairs][:, None], found)
        return mixed

    def _by_kernel(
        self,
        query: Tensor,
        own: KeysAndValues,
        beginnings: Sequence[KeysAndValues],
        texts: KernelTexts,
        query_offsets: Tensor,
    ) -> Tensor:
        """Attention of the last rows of each text; rows of none are 0."""
        size = query.shape[2]
        out = query.new_zeros(len(query), query.shape[1] * size)
        # Of one prefix they are where they were: nothing is copied.
        parts = [(part.keys, part.values) for part in beginnings] or [(own.keys, own.values)]
        keys, values = (
            (part[0] if len(part) == 1 else torch.cat(part)).contiguous()
            for part in zip(*parts, strict=True)
        )
        call_kernel(
            "causal_attention",
            *(query, query.stride(0), query_offsets),
            *(own.keys, own.keys.stride(0), own.values, own.values.stride(0), texts.offsets),
            *(keys, values, texts.starts, texts.before),
            *(len(texts.starts), self._key_heads, self._group, size, out),
        )
        return out

    def _causal(self, query: Tensor, tokens: KeysAndValues) -> Tensor:
        """Attention of each pair's last rows: [pairs, rows, heads, size] → [all rows, width].

        ``tokens`` are those of the same pairs: [pairs, tokens, key heads, size].
        """
        pairs, length, _, size = query.shape
        total = tokens.keys.shape[1]
        filler = -total % BLOCK
        whole = tokens.map(lambda part: functional.pad(part, (0, 0, 0, 0, 0, filler)))
        keys, values = whole.keys.transpose(1, 2), whole.values.transpose(1, 2)
        # Query heads that share keys stand side by side among the rows of one product.
        groups = query.view(pairs, length, self._key_heads, self._group, size).transpose(1, 2)
        mixed, first = [], total - length
        while first < total:
            end = (first // BLOCK + 1) * BLOCK
            block = groups[:, :, first + length - total : end + length - total]
            rows = block.flatten(2, 3)
            mask = self._mask.block(first, rows.shape[2], end)
            out = functional.scaled_dot_product_attention(
                rows, keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )
            mixed.append(out.view(block.shape).transpose(1, 2))
            first = end
        return torch.cat(mixed, 1).view(pairs * length, -1)


def _fits_kernel(query: Tensor, own: KeysAndValues) -> bool:
    """Whether the kernel is there, and the heads of each row lie one after the other."""
    size = query.shape[2]
    close = all(part.stride()[1:] == (size, 1) for part in (query, own.keys, own.values))
    # Nobody could compare it with torch's products on AMX yet.
    return (
        close
        and size in CAUSAL_HEAD_SIZES
        and not has_amx()
        and has_kernel("causal_attention", query)
    )


def _of_run(run: Run, own: KeysAndValues, beginnings: Sequence[KeysAndValues]) -> KeysAndValues:
    """Keys and values of a run's pairs, prefix included: [pairs, tokens, key heads, size]."""
    rows = own[run.rows].map(lambda part: part.view(run.count, run.length, *part.shape[1:]))
    if run.prefix is None:
        return rows
    return beginnings[run.prefix].map(lambda part: part.expand(run.count, -1, -1, -1)).then(rows)
