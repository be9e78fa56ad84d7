"""The files of a job that can be resumed: blocks of windows, and a state that says what counts.

``OUTPUT.part`` holds the blocks, ``OUTPUT.errors.jsonl`` the bad rows, ``OUTPUT.job.json`` the
state. A window counts once the state names it: its block is on disk before the state is, and the
state is replaced in one move. If a run is killed, the next one cuts off the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from echelon.errors import InvalidInput, StorageError
from echelon.offline.scoring import Steps
from echelon.offline.streams import STANDARD, ResumePoint, sync_to_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.offline.writers import Writer

VERSION = "version 1"
"""Key of the state in its file; a file with another one cannot be read."""

RESTART = "Restore it, or begin anew with --restart."


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
    # length of the blocks that count; ``errors_bytes`` is that of the bad rows
    output_bytes: int = 0
    errors_bytes: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
    # sums of the metrics, see :mod:`echelon.offline.ir_metrics`
    quality: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def load(cls, path: Path) -> JobState | None:
        """Read the state that a run left; None if there is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InvalidInput("-o", f"{path} cannot be read ({error})", RESTART) from error
        try:
            content = content[VERSION]
            steps, point = content["steps"], content.pop("mark")
            content["steps"] = None if steps is None else Steps(**steps)
            content["resume_point"] = None if point is None else ResumePoint(**point)
            content["counts"] = RowCounts(**content["counts"])
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"{path} is no job of this version of Echelon ({error})"
            raise InvalidInput("-o", problem, RESTART) from error

    def as_json(self) -> str:
        """The content of the state's file, in which the resume point is called ``mark``."""
        content = asdict(self)
        content["mark"] = content.pop("resume_point")
        return json.dumps({VERSION: content}, ensure_ascii=False, indent=1) + "\n"

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse to resume another job; the error has every difference."""
        names = sorted(self.identity.keys() | identity.keys())
        differences = [
            f"{name} was {self.identity.get(name)!r}, is {identity.get(name)!r}"
            for name in names
            if self.identity.get(name) != identity.get(name)
        ]
        if differences:
            raise InvalidInput("-o", f"its job began otherwise: {'; '.join(differences)}", RESTART)


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
        self.index_path = self._beside("index")
        if self._standard:
            self.index_path = Path(tempfile.gettempdir(), f"echelon-{os.getpid()}.index")
        self._finished = False
        self._part_path = self._beside("part")
        self._resumable = resumable and not self._standard
        self._named_errors = errors
        beside = None if self._standard else self._beside("errors.jsonl")
        self.errors_path = beside if errors is None else Path(errors)
        self._part: IO[bytes] | None = None
        self._errors: IO[bytes] | None = None
        if not self._standard:
            with self._storage_errors(self._part_path):
                self._part = self._part_path.open("ab")
                _lock(self._part, self._part_path)

    def restart(self) -> None:
        """Remove everything that earlier runs left, including the output."""
        for path in (self.state_path, self.index_path, self.errors_path, self.output):
            if path is not None and not (self._standard and path is self.output):
                with self._storage_errors(path):
                    path.unlink(missing_ok=True)

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
        return state

    def truncate_to(self, state: JobState) -> None:
        """Cut off blocks and bad rows that do not count; refuse a file that is too short."""
        if self._standard:
            return
        paths = [] if self._moved(state) else [(self._part_path, state.output_bytes)]
        if self.errors_path is not None:
            paths.append((self.errors_path, state.errors_bytes))
        for path, length in paths:
            size = path.stat().st_size if path.exists() else 0
            if size < length:
                raise InvalidInput("-o", f"{path} is shorter than its job left it", RESTART)
            if size > length:
                with self._storage_errors(path):
                    os.truncate(path, length)

    def append(self, state: JobState, block: bytes, problems: bytes) -> None:
        """Write a block and bad rows to disk, then the state that makes them count."""
        with self._storage_errors(self._part_path):
            if self._part is not None:
                _write(self._part, block)
            else:
                sys.stdout.buffer.write(block)
                sys.stdout.flush()
        state.output_bytes += len(block)
        if problems:
            self._append_problems(problems)
            state.errors_bytes += len(problems)
        self.save(state)

    def save(self, state: JobState) -> None:
        """Replace the state's file in one move."""
        if not self._resumable:
            return
        fresh = self._beside("job.json.new")
        with self._storage_errors(self.state_path):
            fresh.write_text(state.as_json(), encoding="utf-8")
            sync_to_disk(fresh)
            fresh.replace(self.state_path)
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
        return empty and state.output_bytes > 0 and self.output.exists()

    def _append_problems(self, problems: bytes) -> None:
        if self.errors_path is None:
            sys.stderr.buffer.write(problems)
            sys.stderr.flush()
            return
        with self._storage_errors(self.errors_path):
            if self._errors is None:
                self._errors = self.errors_path.open("ab")
            _write(self._errors, problems)

    def close(self) -> None:
        """Close the files, and remove those that a finished job does not need."""
        for file in (self._part, self._errors):
            if file is not None:
                # A full disk refuses again; what it refuses does not count.
                with contextlib.suppress(OSError):
                    file.close()
        if self._finished or not self._resumable:
            self.index_path.unlink(missing_ok=True)
        for path in (self._part_path, self.errors_path):
            if path is not None and path.is_file() and path.stat().st_size == 0:
                path.unlink()

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


def _write(file: IO[bytes], data: bytes) -> None:
    """Write, and wait until the data is on disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


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
