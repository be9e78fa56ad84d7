"""The files of a job that can be resumed: blocks of windows, and a state that says what counts.

``OUTPUT.part`` holds the blocks, ``OUTPUT.errors.jsonl`` the bad rows, ``OUTPUT.scores`` what the
windows changed in the score cache, ``OUTPUT.job.json`` the state. A window counts once the state
names it: its block is on disk before the state is, and the state is replaced in one move. If a run
is killed, the next one cuts off the rest.

The state has the length and the digest of what counts of the other files, and a digest of itself,
so a file that another program changed is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import IO, TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

from echelon.errors import InvalidInput, StorageError
from echelon.offline.ir_metrics import are_sums
from echelon.offline.scoring import Steps  # noqa: TC001 - its fields are read at run time
from echelon.offline.streams import CHUNK, STANDARD, ResumePoint, replacement, sync_to_disk
from echelon.options import Precision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.offline.writers import Writer

VERSION = "version 3"
"""Key of the state in its file; a file with another one cannot be read."""

STATE_BYTES = 2**20
"""Longest state; one has a few kilobytes."""

LARGEST = 2**63 - 1
"""Largest number of a state."""

RESTART = "Restore it, or begin anew with --restart."

SHOWN_DIFFERENCES, SHOWN_CHARACTERS = 20, 200
"""Most differences in a message, and characters of each value."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What counts of a file."""

    bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()


@dataclass(slots=True)
class RowCounts:
    """Counts over all runs of a job."""

    rows: int = 0
    pairs: int = 0
    bad: int = 0  # bad rows, or bad parts of rows
    cut: int = 0  # pairs that were cut to ``max_length``
    tokens: int = 0
    memory: int = 0  # actions of the OOM ladder


@dataclass(slots=True)
class JobState:
    """How far a job is."""

    identity: dict[str, Any]  # input, model and options of the job; flat names to plain values
    steps: Steps | None = None
    # the place behind the last row that counts; None at the input's start
    resume_point: ResumePoint | None = None
    output: Extent = field(default_factory=Extent)  # blocks that count
    errors: Extent = field(default_factory=Extent)  # bad rows that count
    scores: Extent = field(default_factory=Extent)  # notes of the score cache that count
    index: str | None = None  # SHA-256 of the index of a run's texts
    counts: RowCounts = field(default_factory=RowCounts)
    # sums of the metrics, see :mod:`echelon.offline.ir_metrics`
    quality: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def load(cls, path: Path) -> JobState | None:
        """Read the state that a run left; None if there is none."""
        try:
            with path.open("rb") as file:
                content = _parsed(file.read(STATE_BYTES + 1))
            state: JobState = _restored(JobState, content[VERSION], "state")
            _check_values(state)
            if content != state.as_content():
                raise _DamagedState("it was changed since: its digest is another one")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            reason = "too deep" if isinstance(error, RecursionError) else error
            raise InvalidInput("-o", f"{path} cannot be read ({reason})", RESTART) from error
        return state

    def as_content(self) -> dict[str, Any]:
        """The content of the state's file."""
        content = asdict(self)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return {VERSION: content, "sha256": digest}

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse to resume another job; the error has the differences."""
        names = sorted(self.identity.keys() | identity.keys())
        differences = [
            f"{name} was {_shown(self.identity.get(name))}, is {_shown(identity.get(name))}"
            for name in names
            if self.identity.get(name) != identity.get(name)
        ][:SHOWN_DIFFERENCES]
        if differences:
            raise InvalidInput("-o", f"its job began otherwise: {'; '.join(differences)}", RESTART)


class _DamagedState(ValueError):
    """The content of a state's file is not what a job writes; the text says what and where."""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _parsed(text: bytes) -> dict[str, Any]:
    """The JSON object of a state's file."""
    if len(text) > STATE_BYTES:
        raise _DamagedState(f"it has more than {STATE_BYTES:,} bytes")
    content = json.loads(text)
    if not isinstance(content, dict) or VERSION not in content:
        raise _DamagedState("it is no job of this version of Echelon")
    return content


def _restored(hint: Any, value: Any, name: str) -> Any:
    """A value of the state, or the dataclass that it is the content of, checked by its type."""
    for kind in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if is_dataclass(kind) and isinstance(value, dict):
            hints = get_type_hints(kind)
            for key in hints.keys() ^ value.keys():
                raise _DamagedState(f"{name}.{key[:SHOWN_CHARACTERS]} is missing or unknown")
            found = {key: _restored(hints[key], value[key], f"{name}.{key}") for key in hints}
            make: Any = kind
            return make(**found)
        if type(value) is (get_origin(kind) or kind):
            if type(value) is int and not 0 <= value <= LARGEST:
                raise _DamagedState(f"{name} is below 0 or above {LARGEST}")
            return value
    raise _DamagedState(f"{name} is of a wrong type")


def _check_values(state: JobState) -> None:
    """Refuse values that no job has, though their types are right."""
    right = {"quality": are_sums(state.quality)}
    if state.steps is not None:
        for name in ("token_budget", "max_length", "window"):
            right[f"steps.{name}"] = getattr(state.steps, name) > 0
        right["steps.lowered"] = state.steps.lowered in {"", *get_args(Precision)}
    for name, holds in right.items():
        if not holds:
            raise _DamagedState(f"state.{name} has a value that no job writes")


class _GrowingFile:
    """A file that is only appended to, with the extent of what counts of it.

    ``path`` None is the standard stream of that name. Unless ``linked``, a link is refused.
    """

    def __init__(self, path: Path | None, stream: str, *, linked: bool = False) -> None:
        self.path, self._stream = path, stream
        self._no_link = 0 if linked else getattr(os, "O_NOFOLLOW", 0)
        self._file: IO[bytes] | None = None
        self._bytes, self._hash = 0, hashlib.sha256()

    def open(self) -> IO[bytes]:
        """The open file or stream."""
        if self.path is None:
            return cast("IO[bytes]", getattr(sys, self._stream).buffer)
        if self._file is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | self._no_link
            self._file = os.fdopen(os.open(self.path, flags, 0o666), "ab")
        return self._file

    def append(self, data: bytes) -> Extent:
        """Write, and wait until the data is on disk."""
        file = self.open()
        file.write(data)
        file.flush()
        if self.path is not None:
            os.fsync(file.fileno())
        self._bytes += len(data)
        self._hash.update(data)
        return Extent(self._bytes, self._hash.hexdigest())

    def cut_to(self, extent: Extent) -> None:
        """Refuse a file that does not begin with what counts, and cut off the rest."""
        if self.path is None:
            return
        rest = self._read(self.path, extent)
        if rest:
            os.ftruncate(self.open().fileno(), extent.bytes)

    def moved_to(self, path: Path, extent: Extent) -> None:
        """Refuse a file that is not what counts, moved to its place by a killed run."""
        if self._read(path, extent):
            raise InvalidInput("-o", f"{path} is not what its job wrote", RESTART)

    def _read(self, path: Path, extent: Extent) -> int:
        """Take in what counts, refuse it if it is not what the job wrote; bytes of the rest."""
        size = 0
        if path.is_file():
            size = path.stat().st_size
            with os.fdopen(os.open(path, os.O_RDONLY | self._no_link), "rb") as file:
                while part := file.read(min(CHUNK, extent.bytes - self._bytes)):
                    self._bytes += len(part)
                    self._hash.update(part)
        if Extent(self._bytes, self._hash.hexdigest()) != extent:
            raise InvalidInput("-o", f"{path} is not what its job wrote", RESTART)
        return size - self._bytes

    def close(self) -> None:
        """Close the file, and remove it if it is empty."""
        if self._file is not None:
            # A full disk refuses again; what it refuses does not count.
            with contextlib.suppress(OSError):
                self._file.close()
        if self.path is not None and self.path.is_file() and self.path.stat().st_size == 0:
            self.path.unlink()


class JobStore:
    """The files beside one output; ``-`` is standard output, which cannot be resumed.

    ``errors`` is the file for bad rows; None is beside the output, or standard error. A resumable
    job keeps a state, and needs an input that can be read again. Only one process may write an
    output.
    """

    def __init__(self, output: str, errors: str | None, *, resumable: bool) -> None:
        self._standard = output == STANDARD
        self.output = Path(output)
        self.state_path = self._beside("job.json")
        self._folder = tempfile.TemporaryDirectory(prefix="echelon-") if self._standard else None
        self.index_path = self._beside("index")
        if self._folder is not None:
            self.index_path = Path(self._folder.name, "index")
        self._finished = False
        self._part_path = self._beside("part")
        self._resumable = resumable and not self._standard
        self._named_errors = errors
        beside = None if self._standard else self._beside("errors.jsonl")
        self.errors_path = beside if errors is None else Path(errors)
        self._part = _GrowingFile(None if self._standard else self._part_path, "stdout")
        self._errors = _GrowingFile(self.errors_path, "stderr", linked=errors is not None)
        self.scores_path = self._beside("scores")
        self._scores = _GrowingFile(self.scores_path, "stdout")
        if not self._standard:
            with self._storage_errors(self._part_path):
                _lock(self._part.open(), self._part_path)

    def restart(self) -> None:
        """Remove everything that earlier runs left, including the output."""
        own = self.state_path, self.index_path, self.scores_path
        for path in (*own, self.errors_path, self.output):
            if path is not None and not (self._standard and path is self.output):
                with self._storage_errors(path):
                    if path.is_file() or path.is_symlink():  # never a device
                        path.unlink()

    def load(self) -> JobState | None:
        """Read the state of an earlier run; refuse an output that another program made."""
        if self._standard:
            return None
        state = JobState.load(self.state_path) if self._resumable else None
        if state is None:
            for option, path in (("-o", self.output), ("--errors", self._named_errors)):
                if path is not None and Path(path).exists():
                    remedy = "Name another file, or replace it with --restart."
                    raise InvalidInput(option, f"{path} exists", remedy)
        elif state.complete and not self.output.exists():
            raise InvalidInput("-o", f"{self.output} was finished and is gone", RESTART)
        else:
            self._finished = state.complete
        return state

    def cut_to(self, state: JobState) -> None:
        """Cut off blocks and bad rows that do not count; refuse files that others wrote."""
        if self._standard:
            return
        with self._storage_errors(self._part_path):
            if self._moved(state):
                self._part.moved_to(self.output, state.output)
            else:
                self._part.cut_to(state.output)
        with self._storage_errors(self.errors_path or self._part_path):
            self._errors.cut_to(state.errors)
        with self._storage_errors(self.scores_path):
            self._scores.cut_to(state.scores)

    def append(self, state: JobState, block: bytes, problems: bytes, notes: bytes = b"") -> None:
        """Write a block, bad rows and notes to disk, then the state that makes them count."""
        if notes and self._resumable:
            with self._storage_errors(self.scores_path):
                state.scores = self._scores.append(notes)
        with self._storage_errors(self._part_path):
            state.output = self._part.append(block)
        self.append_problems(state, problems)
        self.save(state)

    def append_problems(self, state: JobState, problems: bytes) -> None:
        """Write bad rows to disk; they count when the state is saved."""
        if problems:
            with self._storage_errors(self.errors_path or Path("standard error")):
                state.errors = self._errors.append(problems)

    def save(self, state: JobState) -> None:
        """Replace the state's file in one move."""
        if not self._resumable:
            return
        with self._storage_errors(self.state_path):
            with replacement(self.state_path, "new") as fresh:
                fresh.write_text(json.dumps(state.as_content(), indent=1) + "\n", encoding="utf-8")
            sync_to_disk(self.output.parent)

    def finish(self, state: JobState, writer: Writer) -> None:
        """Turn the blocks into the output; a killed run does it again if all blocks count."""
        state.complete = True
        if not self._standard:
            with self._storage_errors(self.output):
                if not self._moved(state):
                    writer.assemble(self._part_path, self.output)
                    sync_to_disk(self.output.parent)
        self.save(state)
        self._finished = True

    def _moved(self, state: JobState) -> bool:
        """Whether a run was killed after it had moved the blocks and before it said so."""
        # There is no other way to an output beside an unfinished state.
        empty = not self._part_path.exists() or self._part_path.stat().st_size == 0
        return empty and state.output.bytes > 0 and self.output.exists()

    def close(self) -> None:
        """Close the files, and remove those that a finished job does not need."""
        self._part.close()
        self._errors.close()
        self._scores.close()
        if self._finished and not self._standard:
            self._part_path.unlink(missing_ok=True)
            self.scores_path.unlink(missing_ok=True)
        if self._finished or not self._resumable:
            self.index_path.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{ending}")

    @contextlib.contextmanager
    def _storage_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            kept = " Finished windows are kept: the same command resumes." * self._resumable
            raise StorageError(
                f"{path}: cannot be written ({error.strerror or error}).{kept} "
                "Free disk space or choose another file."
            ) from error


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other processes out until this one ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that held the lock may have moved the file away since it was opened.
        mine = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        mine = False
    if not mine:
        file.close()
        problem = f"another process is writing {path}"
        raise InvalidInput("-o", problem, "Wait for it, or name another file.")
