"""CUDA graphs: tapes of operators that are run again into the same memory, without Python."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from shim_card.faults import IN_CAPTURE, error_of
from shim_card.machine import current_machine

if TYPE_CHECKING:
    from shim_card.machine import Card, Stream, Tape

_numbers = itertools.count(1)


def new_pool() -> tuple[int, int]:
    """A handle of a memory pool."""
    return (next(_numbers), 0)


class CUDAGraph:
    """What was captured."""

    def __init__(self, keep_graph: bool = False) -> None:  # noqa: FBT001, FBT002 - torch's own
        del keep_graph
        self._tape: Tape | None = None
        self._stream: Stream | None = None
        self._pool: Any = None

    @property
    def _card(self) -> Card:
        if self._stream is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        return self._stream.card

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        """Let the present stream's work go onto a tape."""
        from shim_card.machine import Tape

        stream = current_machine().stream()
        if stream is stream.card.default:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after capture, "
                "it's ok to replay them on the default stream.)"
            )
        if stream.tape is not None:
            raise error_of(IN_CAPTURE)
        stream.card.event("capture")
        self._stream, self._pool = stream, pool or new_pool()
        stream.tape = Tape()

    def capture_end(self) -> None:
        """Keep the tape."""
        card = self._card
        self._tape = card.end_capture(self._stream)  # type: ignore[arg-type]  # there is one
        card.pools[self._pool] += 1
        card.machine.note("capture", "graph", len(self._tape.works), card)

    def replay(self) -> None:
        """Run the tape in the present stream."""
        card, tape = self._card, self._tape
        if tape is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        card.event("launch")
        card.machine.note("replay", "graph", len(tape.works), card)
        works = list(tape.works)
        card.machine.stream(card).submit(lambda: [work() for work in works] and None)

    def pool(self) -> Any:
        """The handle of its memory."""
        return self._pool

    def reset(self) -> None:
        """Let go of the tape and its memory."""
        if self._tape is not None:
            self._tape = None
            pools = self._card.pools
            pools[self._pool] -= 1
            if not pools[self._pool]:
                del pools[self._pool]


class graph:  # noqa: N801 - torch's own name
    """Captures what its body does."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, **_: Any
    ) -> None:
        self._graph, self._pool = cuda_graph, pool
        self._context = torch.cuda.stream(stream or torch.cuda.Stream())

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._context.__enter__()
        self._graph.capture_begin(self._pool)

    def __exit__(self, *error: object) -> None:
        # As in torch, a failure here leaves the stream chosen.
        self._graph.capture_end()
        self._context.__exit__(*error)
