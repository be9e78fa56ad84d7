"""Peak memory of accelerators, with the methods of ``echelon.tuning.machine.MemoryMeter``."""

from __future__ import annotations

MAX_CONTEXT_BYTES = 2**30
"""Most that a CUDA context with its libraries takes. More outside torch's allocator belongs to
other processes on the card."""


class CudaMemoryMeter:
    """Memory of a CUDA device that this process takes: tensors, graphs and its context."""

    def __init__(self, device: str) -> None:
        self._device = device

    def reset(self) -> None:
        """Start a new measurement."""
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Peak since the last reset."""
        import torch

        peak = torch.cuda.max_memory_allocated(self._device)
        return int(peak) + self._graph_bytes() + self._context_bytes()

    def _graph_bytes(self) -> int:
        """What graphs keep for their replays, which the allocator counts as free."""
        import torch

        index = torch.device(self._device).index or 0
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]  # torch's own gap
        return sum(
            int(segment["total_size"] - segment["allocated_size"])
            for segment in segments
            if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
        )

    def _context_bytes(self) -> int:
        import torch

        free, total = torch.cuda.mem_get_info(self._device)
        outside = total - free - torch.cuda.memory_reserved(self._device)
        return max(0, min(outside, MAX_CONTEXT_BYTES))


class MpsMemoryMeter:
    """Memory that Metal holds for this process, which grows to the peak and stays there."""

    def reset(self) -> None:
        """Start a new measurement."""
        import torch

        torch.mps.empty_cache()

    def peak_bytes(self) -> int:
        """Peak since the last reset."""
        import torch

        return int(torch.mps.driver_allocated_memory())
