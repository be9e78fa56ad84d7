"""The output of a job while it grows: blocks of windows, and a state that says how many count.

``OUTPUT.part`` holds the blocks, ``OUTPUT.errors.jsonl`` the bad rows, ``OUTPUT.job.json`` the
state. A window counts once the state names it: blocks are on disk before the state is, and the
state is replaced whole. Whatever a killed run left beyond that is cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from echelon.errors import InvalidInput, StorageError
from echelon.offline.rows import ResumePoint
from echelon.offline.scoring import Steps
from echelon.offline.streams import STANDARD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echelon.offline.writers import Writer

SCHEMA = 1
"""Version of the state's layout; another one cannot be read."""

RESTART = "Restore it, or begin anew with --restart."


@dataclass(slots=True)
class RowCounts:
    """What a job has done.

    Attributes:
        rows: rows that were scored.
        pairs: their pairs.
        bad: bad rows, or bad parts of one.
        cut: pairs that were cut to the longest a pair may be.
        tokens: tokens that went through the model.
        memory: actions of the memory ladder.
    """

    rows: int = 0
    pairs: int = 0
    bad: int = 0
    cut: int = 0
    tokens: int = 0
    memory: int = 0


@dataclass(slots=True)
class JobState:
    """How far a job is.

    Attributes:
        identity: what it is a job of: input, model, options; flat names to plain values.
        steps: what decides the steps; None before the first window.
        mark: where the input was left; None at its start.
        output_bytes: length of the blocks that count.
        errors_bytes: length of the bad rows that count.
        counts: what was done.
        quality: sums of the metrics, see :mod:`echelon.offline.ir_metrics`.
        complete: whether the output is finished.
    """

    identity: dict[str, Any]
    steps: Steps | None = None
    mark: ResumePoint | None = None
    output_bytes: int = 0
    errors_bytes: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
    quality: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def load(cls, path: Path) -> JobState | None:
        """The state that a run left; None where there is none.

        Raises:
            InvalidInput: the file is no state that this version can read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InvalidInput("-o", f"{path} cannot be read ({error})", RESTART) from error
        try:
            content = content[f"version {SCHEMA}"]
            steps, mark = content["steps"], content["mark"]
            content["steps"] = None if steps is None else Steps(**steps)
            content["mark"] = None if mark is None else ResumePoint(**mark)
            content["counts"] = RowCounts(**content["counts"])
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                "-o", f"{path} is no job of this version of Echelon ({error})", RESTART
            ) from error

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with another job's state.

        Raises:
            InvalidInput: with every difference.
        """
        names = sorted(self.identity.keys() | identity.keys())
        told = [
            f"{name} was {self.identity.get(name)!r}, is {identity.get(name)!r}"
            for name in names
            if self.identity.get(name) != identity.get(name)
        ]
        if told:
            raise InvalidInput("-o", f"its job began otherwise: {'; '.join(told)}", RESTART)


class JobStore:
    """The files of one output.

    Args:
        output: the output's path; ``-`` is standard output, which cannot be resumed.
        errors: where bad rows go; None is beside the output, or standard error.
        resumable: whether a state is kept: the input can be read again.

    Raises:
        InvalidInput: another process is writing the same output.
        StorageError: its folder cannot be written.
    """

    def __init__(self, output: str, errors: str | None, *, resumable: bool) -> None:
        self._standard = output == STANDARD
        self.output = Path(output)
        self.state_path = self._beside("job.json")
        self.index_path = (
            Path(tempfile.gettempdir(), f"echelon-{os.getpid()}.index")
            if self._standard
            else self._beside("index")
        )
        self._finished = False
        self._part_path = self._beside("part")
        self._resumable = resumable and not self._standard
        self._named_errors = errors
        self.errors_path = (
            None
            if errors is None and self._standard
            else Path(errors or self._beside("errors.jsonl"))
        )
        self._part: IO[bytes] | None = None
        self._errors: IO[bytes] | None = None
        if not self._standard:
            with self._written(self._part_path):
                self._part = self._part_path.open("ab")
                _lock(self._part, self._part_path)

    def restart(self) -> None:
        """Forget what earlier runs left, the output included."""
        for path in (self.state_path, self.index_path, self.errors_path, self.output):
            if path is not None and not (self._standard and path is self.output):
                with self._written(path):
                    path.unlink(missing_ok=True)

    def found(self) -> JobState | None:
        """The state of an earlier run.

        Raises:
            InvalidInput: the output is there, but no state that made it.
        """
        if self._standard:
            return None
        state = JobState.load(self.state_path) if self._resumable else None
        if state is None:
            self._refuse_to_replace("-o", self.output)
            if self._named_errors is not None:
                self._refuse_to_replace("--errors", Path(self._named_errors))
        elif state.complete and not self.output.exists():
            raise InvalidInput("-o", f"{self.output} was finished and is gone", RESTART)
        return state

    @staticmethod
    def _refuse_to_replace(option: str, path: Path) -> None:
        if path.exists():
            raise InvalidInput(
                option, f"{path} exists", "Name another file, or replace it with --restart."
            )

    def cut_to(self, state: JobState) -> None:
        """Cut off what does not count.

        Raises:
            InvalidInput: less is there than counts.
        """
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
                with self._written(path):
                    os.truncate(path, length)

    def append(self, state: JobState, block: bytes, problems: bytes) -> None:
        """Write a window's records and bad rows, then the state that makes them count.

        Raises:
            StorageError: the disk is full; what counted before still does.
        """
        with self._written(self._part_path):
            if self._part is not None:
                _write(self._part, block)
            else:
                sys.stdout.buffer.write(block)
                sys.stdout.flush()
        state.output_bytes += len(block)
        if problems:
            self._append_problems(problems)
            state.errors_bytes += len(problems)
        self.keep(state)

    def keep(self, state: JobState) -> None:
        """Put the state in its place, whole."""
        if not self._resumable:
            return
        fresh = self._beside("job.json.new")
        with self._written(self.state_path):
            text = json.dumps({f"version {SCHEMA}": asdict(state)}, ensure_ascii=False, indent=1)
            fresh.write_text(text + "\n", encoding="utf-8")
            flushed(fresh)
            fresh.replace(self.state_path)
            flushed(self.output.parent)

    def finish(self, state: JobState, writer: Writer) -> None:
        """Turn the blocks into the output.

        Killed between its two moves, the next run finds all blocks counted and does them again.
        """
        state.complete = True
        if not self._standard:
            with self._written(self.output):
                if not self._moved(state):
                    writer.assemble(self._part_path, self.output)
                    flushed(self.output.parent)
        self.keep(state)
        self._finished = True

    def _moved(self, state: JobState) -> bool:
        """Whether a run was killed when it had moved the blocks but not said so.

        An output beside an unfinished state can have come from nowhere else.
        """
        empty = not self._part_path.exists() or self._part_path.stat().st_size == 0
        return empty and state.output_bytes > 0 and self.output.exists()

    def _append_problems(self, problems: bytes) -> None:
        if self.errors_path is None:
            sys.stderr.buffer.write(problems)
            sys.stderr.flush()
            return
        with self._written(self.errors_path):
            if self._errors is None:
                self._errors = self.errors_path.open("ab")
            _write(self._errors, problems)

    def close(self) -> None:
        """Close the files; what only a job under way needs is removed."""
        for file in (self._part, self._errors):
            if file is not None:
                # What a full disk refused once is refused again, and does not count.
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
    def _written(self, path: Path) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            kept = " What was finished is kept: the same command goes on." * self._resumable
            raise StorageError(
                f"{path}: cannot be written ({error.strerror or error}).{kept} "
                "Free disk space or choose another file."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _write(file: IO[bytes], data: bytes) -> None:
    """Write, and wait until it is on disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def flushed(path: Path) -> None:
    """Wait until a file, or a folder's names, are on disk; where folders cannot, do not."""
    if path.is_dir() and os.name == "nt":
        return
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other processes out while this one lives."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one that held it may have moved the file away in between.
        mine = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        mine = False
    if not mine:
        file.close()
        raise InvalidInput(
            "-o", f"another process is writing {path}", "Wait for it, or name another file."
        )
