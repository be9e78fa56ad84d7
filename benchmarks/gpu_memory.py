"""The OOM ladder on a card whose memory is capped: all pairs are scored, and alike."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from gpu_engines import free

if TYPE_CHECKING:
    from gpu_bench import Bench

BUDGETS = (16384, 32768, 65536)
SAME = 0.05
"""How far a score in smaller steps may be from the same in large ones, in deviations of the scores:
fp16 rounds other sums."""

SHARES = (0.5, 0.25, 0.1)
"""Of the memory that the largest step takes beside the weights."""


def ladder(bench: Bench) -> dict[str, Any]:
    """Score mixed lengths in large steps with less and less memory; nothing on a CPU."""
    if bench.device == "cpu":
        return {"runs": []}
    # The memory of graphs would be freed first, and hide what the ladder does after that.
    with patch.dict(os.environ, {"ECHELON_CUDA_GRAPHS": "off"}):
        return _ladder(bench)


def _ladder(bench: Bench) -> dict[str, Any]:
    import torch

    from echelon import Reranker

    pairs = bench.writer.mixed(bench.scale.pairs)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    settings = {"device": bench.device, "precision": "fp16", "token_budget": BUDGETS[-1]}
    with Reranker(str(bench.folder), **settings) as reranker:
        idle, peak, exact = _scored(bench, reranker, pairs)
    allowance = SAME * float(exact.std())
    rows = []
    for share in SHARES:
        allowed = idle + share * (peak - idle)
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), bench.device)
        try:
            row = _capped(bench, settings, pairs, exact)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
            free(bench.device)
        rows.append(row | {"share": share} | _verdict(row, allowance))
    return {"pairs": len(pairs), "idle_bytes": idle, "peak_bytes": peak, "runs": rows}


def _scored(bench: Bench, reranker: Any, pairs: Any) -> tuple[int, int, Any]:
    """Bytes before and at the peak, and the logits."""
    import torch

    free(bench.device)
    idle = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    logits = reranker.score_pairs(pairs).logits
    return idle, torch.cuda.max_memory_allocated(bench.device), logits


def _capped(bench: Bench, settings: dict[str, Any], pairs: Any, exact: Any) -> dict[str, Any]:
    from echelon import Reranker

    with Reranker(str(bench.folder), **settings) as reranker:
        scored = reranker.score_pairs(pairs)
    return {
        "rungs": [step.rung for step in scored.report.ladder],
        "max_delta": float(np.abs(scored.logits - exact).max()),
    }


def _verdict(row: dict[str, Any], allowance: float) -> dict[str, str]:
    """What is wrong with a run, if anything; a difference that is no number is."""
    if not row["rungs"]:
        return {"failed": "memory was not short, so this proves nothing"}
    if not row["max_delta"] <= allowance:
        return {"failed": f"scores differ by {row['max_delta']:.1e}, not {allowance:.1e} at most"}
    return {}
