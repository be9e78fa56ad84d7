"""The cards of a machine: their memory, their streams, what was done on them, and their faults."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from shim_card.faults import CAPTURE_ENDED, IN_CAPTURE, LOST, WAITED, Fault, error_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Work = Callable[[], None]

PIECE = 512  # bytes that torch's allocator rounds up to
KEPT_EVENTS = 200_000
NAMES = {(7, 5): "Tesla T4", (8, 0): "NVIDIA A100-SXM4-80GB", (9, 0): "NVIDIA H200"}


class Happening(NamedTuple):
    """Something that a card did."""

    kind: str  # launch, copy in, copy out, wait, capture, replay
    name: str  # of the operator
    size: int  # bytes that it wrote or copied; launches of a replayed graph
    card: int


class Block:
    """Memory of a card, given back when nothing refers to it."""

    __slots__ = ("card", "pooled", "size")

    def __init__(self, card: Card, size: int, *, pooled: bool) -> None:
        self.size, self.card, self.pooled = 0, card, pooled
        card.take(size)
        self.size = size

    def __del__(self) -> None:
        self.card.allocated -= self.size


class Tape:
    """A capture: work that runs at each replay, and the memory that it runs in."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.invalid = False


class Stream:
    """A queue of work. It runs at once, or when somebody waits for it if the machine defers."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.card = device if isinstance(device, Card) else current_machine().card_of(device)
        self.device = self.card.device
        self.card.streams.add(self)
        self.priority = priority
        self.tape: Tape | None = None
        self.stream_id = self.cuda_stream = id(self)
        self._queue: deque[Work] = deque()
        self._submitted = self._done = 0
        self._lock = threading.RLock()

    def submit(self, work: Work) -> None:
        """Do the work in order."""
        if self.tape is not None:
            self.tape.works.append(work)
            return
        with self._lock:
            self._queue.append(work)
            self._submitted += 1
        if not current_machine().deferred:
            self.run_until(self._submitted)

    @property
    def position(self) -> int:
        """Number of works that were submitted."""
        return self._submitted

    def is_done(self, position: int) -> bool:
        """Whether the first works have run."""
        return self._done >= position

    def run_until(self, position: int) -> None:
        """Run the first works, those that have not run yet."""
        with self._lock:
            while self._done < position:
                work = self._queue.popleft()
                self._done += 1
                work()

    def synchronize(self) -> None:
        """Wait for all work."""
        self.card.wait("stream.synchronize", self)

    def query(self) -> bool:
        """Whether all work has run."""
        self.card.check()
        return self.is_done(self._submitted)

    def wait_stream(self, other: Stream) -> None:
        """Let later work here come after what the other has now."""
        position = other.position
        if other is not self:
            self.submit(lambda: other.run_until(position))

    def wait_event(self, event: Event) -> None:
        """Let later work here come after what the event recorded."""
        stream, position = event.recorded
        if stream is not None and stream is not self:
            self.submit(lambda: stream.run_until(position))

    def record_event(self, event: Event | None = None) -> Event:
        """Mark the end of the present work."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A place in a stream's queue."""

    def __init__(self, **_: Any) -> None:
        self.recorded: tuple[Stream | None, int] = (None, 0)

    def record(self, stream: Stream | None = None) -> None:
        """Mark the end of a stream's present work."""
        stream = stream or current_machine().stream()
        stream.card.check()
        self.recorded = (stream, stream.position)

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream's later work come after this."""
        (stream or current_machine().stream()).wait_event(self)

    def query(self) -> bool:
        """Whether the work before it has run."""
        stream, position = self.recorded
        return stream is None or stream.is_done(position)

    def synchronize(self) -> None:
        """Wait for the work before it."""
        stream, position = self.recorded
        if stream is not None:
            stream.card.wait("event.synchronize", stream, position)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds: a card made of shims has no clock, so always one."""
        del end
        return 1.0


class Card:
    """One card."""

    def __init__(self, machine: Machine, index: int, total: int) -> None:
        import torch

        self.machine, self.index, self.total = machine, index, total
        self.device = torch.device("cuda", index)
        self.fraction = 1.0
        self.allocated = self.peak = self.reserved = 0
        self.lost: str | None = None  # the words
        self.stuck = False  # a capture failed: the allocator believes that it still runs
        self.pools: Counter[Any] = Counter()  # graphs in each memory pool
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.default = Stream(self)

    def check(self) -> None:
        """Raise the error of a card that was lost."""
        if self.lost is not None:
            raise error_of(self.lost)

    def event(self, at: str, size: int = 0) -> None:
        """Raise the fault that is due here, if one is."""
        self.check()
        for fault in self.machine.faults:
            if fault.happens(at, self.index, size):
                self.fail(fault.words)

    def fail(self, words: str) -> None:
        """Raise an error; one of a lost card stays."""
        if words in LOST:
            self.lost = words
        raise error_of(words)

    def take(self, size: int) -> None:
        """Account for memory.

        Raises:
            OutOfMemoryError: it is more than the process may have.
        """
        self.event("allocate", size)
        limit = int(self.total * self.fraction)
        if self.allocated + size > limit:
            free = max(0, limit - self.allocated)
            raise error_of(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU {self.index} "
                f"has a total capacity of {self.total / 2**30:.2f} GiB of which "
                f"{free / 2**20:.2f} MiB is free."
            )
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)

    def block(self, size: int) -> Block:
        """New memory of at least ``size`` bytes."""
        pooled = self.machine.stream(self).tape is not None
        return Block(self, -(-size // PIECE) * PIECE, pooled=pooled)

    def empty_cache(self) -> None:
        """Give back what is cached."""
        self.check()
        if not self.stuck:
            self.reserved = self.allocated

    def wait(self, name: str, stream: Stream | None = None, position: int | None = None) -> None:
        """Wait for a stream, or for all of the default one; what capture and debugging refuse."""
        self.event("wait")
        self.machine.note("wait", name, 0, self)
        current = self.machine.stream(self)
        if current.tape is not None:
            current.tape.invalid = True
            raise error_of(IN_CAPTURE)
        if self.machine.sync_debug == "error":
            raise error_of(WAITED)
        stream = stream or current
        stream.run_until(stream.position if position is None else position)

    def wait_for_all(self) -> None:
        """Wait for all streams."""
        self.wait("synchronize")
        for stream in list(self.streams):
            stream.run_until(stream.position)

    def end_capture(self, stream: Stream) -> Tape:
        """The finished tape of a stream."""
        tape, stream.tape = stream.tape, None
        if tape is None:
            raise error_of("There is no capture to end")
        try:
            self.event("capture end")
        except RuntimeError:
            self.stuck = True
            raise
        if tape.invalid:
            self.stuck = True
            raise error_of(CAPTURE_ENDED)
        return tape


@dataclass
class Machine:
    """Cards of one kind.

    Attributes:
        capability: compute capability, (major, minor).
        count: number of cards.
        memory: bytes of each.
        deferred: work runs only when somebody waits for it, so a copy from pinned memory that was
            rewritten too early takes the wrong numbers, as it may on a card.
        faults: those that are going to happen.
    """

    capability: tuple[int, int] = (9, 0)
    count: int = 1
    memory: int = 8 << 30
    deferred: bool = False
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.capability = (self.capability[0], self.capability[1])
        self.faults = [Fault(**f) if isinstance(f, dict) else f for f in self.faults]
        self.cards = [Card(self, index, self.memory) for index in range(self.count)]
        self.happenings: deque[Happening] = deque(maxlen=KEPT_EVENTS)
        self.sync_debug = "default"
        self._threads = threading.local()

    @property
    def name(self) -> str:
        """What the driver calls the cards."""
        return NAMES.get(self.capability, f"Shim sm_{self.capability[0]}{self.capability[1]}")

    def note(self, kind: str, name: str, size: int, card: Card) -> None:
        """Remember what happened."""
        self.happenings.append(Happening(kind, name, size, card.index))

    def counts(self, kind: str) -> Counter[str]:
        """How often each operator did something of a kind."""
        return Counter(h.name for h in self.happenings if h.kind == kind)

    @property
    def current(self) -> int:
        """Index of this thread's card."""
        return int(getattr(self._threads, "card", 0))

    @current.setter
    def current(self, index: int) -> None:
        self.card_of(index)
        self._threads.card = index

    def card_of(self, device: Any = None) -> Card:
        """The card of a device, a number, a name, or this thread's."""
        import torch

        if isinstance(device, str):
            device = torch.device(device)
        index = device.index if isinstance(device, torch.device) else device
        index = self.current if index is None else int(index)
        if not 0 <= index < self.count:
            raise error_of(
                "CUDA error: invalid device ordinal\nSearch for `cudaErrorInvalidDevice'"
            )
        return self.cards[index]

    def stream(self, device: Any = None) -> Stream:
        """This thread's stream of a card."""
        card = device if isinstance(device, Card) else self.card_of(device)
        found: Stream = self._chosen().get(card.index, card.default)
        return found

    def set_stream(self, stream: Stream) -> None:
        """Choose this thread's stream of the stream's card, and the card."""
        self._chosen()[stream.card.index] = stream
        self.current = stream.card.index

    def _chosen(self) -> dict[int, Stream]:
        if not hasattr(self._threads, "streams"):
            self._threads.streams = {}
        chosen: dict[int, Stream] = self._threads.streams
        return chosen


_installed: list[Machine] = []


def current_machine() -> Machine:
    """The machine whose cards torch sees."""
    if not _installed:
        raise AssertionError("Torch not compiled with CUDA enabled")
    return _installed[-1]


def install(machine: Machine) -> None:
    """Let torch see a machine's cards."""
    _installed.append(machine)


def remove(machine: Machine) -> None:
    """Take the machine away again."""
    _installed.remove(machine)
