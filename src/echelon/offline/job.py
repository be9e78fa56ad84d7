"""An offline job: its options, checked before anything is loaded, and its identity."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput
from echelon.offline.collection import Collection, RunFile
from echelon.offline.parquet_reader import ParquetReader
from echelon.offline.readers import Columns, JsonLinesReader, Reader, TableReader
from echelon.offline.streams import (
    INPUT,
    RECORD_MB,
    STANDARD,
    Lines,
    compression_of,
    digest_of,
    suffix_of,
)
from echelon.offline.writers import JsonWriter, ParquetWriter, TrecWriter, Writer
from echelon.options import Options
from echelon.progress import Progress, no_progress

if TYPE_CHECKING:
    from echelon.profile import Profile

INPUT_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".run": "trec",
    ".trec": "trec",
}
OUTPUT_SUFFIXES = {s: f for s, f in INPUT_SUFFIXES.items() if f not in {"csv", "tsv"}}
PAIRS = ("csv", "tsv", "parquet")
"""Inputs of one pair a row."""

MOST_RECORD_MB = 1024.0
"""Largest ``max_record_mb``; libraries below count bytes of a text in 32 bits."""


@dataclass(frozen=True, slots=True)
class OfflineJob:
    """One file to rerank; the fields are the flags of ``echelon batch``."""

    input: str  # path, or ``-`` for standard input
    output: str  # path, or ``-`` for standard output
    model: str = "demo"
    options: Options = field(default_factory=Options)
    input_format: str | None = None  # None takes it from the suffix, as for the output
    output_format: str | None = None
    columns: Columns = field(default_factory=Columns)
    topics: str | None = None
    collection: str | None = None
    errors: str | None = None  # file for bad rows; None is beside the output
    top_n: int | None = None  # results kept of a query; None keeps all
    run_tag: str = "echelon"
    qrels: str | None = None
    max_record_mb: float = RECORD_MB  # longest line, record or row of an input, in MiB
    strict: bool = False
    restart: bool = False

    def check(self) -> None:
        """Refuse options that cannot work together, and files that are not there."""
        if self.input == STANDARD and sys.stdin.isatty():
            raise InvalidInput(INPUT, "standard input is a terminal", "Pipe a file in or name one.")
        if self.reads == "trec":
            for option in ("topics", "collection"):
                if getattr(self, option) is None:
                    problem = "is missing, and a run has no texts"
                    raise InvalidInput(f"--{option}", problem, "Name its file.")
        elif self.topics or self.collection:
            problem = f"is for TREC runs, the input is {self.reads}"
            raise InvalidInput("--topics", problem, "Leave it out.")
        if self.reads in PAIRS:
            self._check_pairs()
        if not 0 < self.max_record_mb <= MOST_RECORD_MB:
            problem = f"{self.max_record_mb:g} is not above 0 and at most {MOST_RECORD_MB:g}"
            raise InvalidInput("--max-record-mb", problem, "Give the MiB of the longest record.")
        if len(self.run_tag.split()) != 1 or not self.run_tag.isprintable():
            raise InvalidInput("--run-tag", f"{self.run_tag!r} is not one word", "Give one word.")
        self._check_files()
        if self.input != STANDARD:
            Lines(self.input).close()
            if self.reads in PAIRS:
                self.reader(Path()).close()

    def _check_pairs(self) -> None:
        one_each = "the input is pairs, each of which stands alone"
        if self.writes == "trec":
            raise InvalidInput("--output-format", one_each, "Write JSONL or Parquet.")
        if self.top_n is not None:
            raise InvalidInput("--top-n", one_each, "Leave it out.")
        if self.qrels is not None:
            raise InvalidInput("--qrels", one_each, "Give queries with documents, or a run.")

    def _check_files(self) -> None:
        if self.output == STANDARD:
            if self.writes == "parquet":
                raise InvalidInput("-o", "Parquet cannot be written to a pipe", "Name a file.")
            return
        target = Path(self.output)
        if not target.parent.is_dir() or (target.exists() and not target.is_file()):
            raise InvalidInput("-o", f"{self.output} is no place for a file", "Name a file.")
        for path in (self.input, self.topics, self.collection, self.qrels):
            if path is not None and path != STANDARD and _same(path, self.output):
                raise InvalidInput("-o", "it is one of the input files", "Name another file.")

    @property
    def reads(self) -> str:
        """The input's format."""
        if self.input_format is None and self.topics is not None:
            return "trec"
        return self.input_format or _format(INPUT, self.input, INPUT_SUFFIXES)

    @property
    def writes(self) -> str:
        """The output's format."""
        return self.output_format or _format("-o", self.output, OUTPUT_SUFFIXES)

    def writer(self) -> Writer:
        """Make the writer of the output's format."""
        compression = compression_of(self.output)
        if self.writes == "parquet":
            return ParquetWriter(self.top_n, pairs=self.reads in PAIRS)
        if self.writes == "trec":
            return TrecWriter(compression, self.top_n, self.run_tag)
        return JsonWriter(compression, self.top_n, pairs=self.reads in PAIRS)

    def reader(
        self, index: Path, known: str | None = None, on_progress: Progress = no_progress
    ) -> Reader:
        """Open the input; ``index`` and ``known`` are of its texts, see :class:`Collection`."""
        match self.reads:
            case "trec":
                files = self._text_files()
                texts = Collection(files, index, known, on_progress, self._record_bytes)
                return RunFile(self.input, texts)
            case "parquet":
                return ParquetReader(self.input, self.columns, self._record_bytes)
            case "jsonl":
                return JsonLinesReader(self.input, limit=self._record_bytes)
        tabs = self.reads == "tsv"
        return TableReader(self.input, self.columns, tabs=tabs, limit=self._record_bytes)

    def plain_reader(self) -> Lines | ParquetReader:
        """Open the input to compare it with a resume point: without topics and collection."""
        if self.reads == "parquet":
            return ParquetReader(self.input, self.columns, self._record_bytes)
        return Lines(self.input)

    @property
    def _record_bytes(self) -> int:
        return int(self.max_record_mb * 2**20)

    def _text_files(self) -> dict[str, str]:
        """Topics and collection of a run; empty for other inputs."""
        files = {"topics": self.topics, "collection": self.collection}
        return {name: path for name, path in files.items() if path is not None}

    def identity(self, profile: Profile | None) -> dict[str, Any]:
        """Everything that the output depends on, flat, as it comes back from JSON.

        Of a profile only the settings that tuning chose count, since the OOM ladder changes others.
        ``max_record_mb`` does not: a larger one lets a job go on that a record stopped.
        """
        from echelon.models.hub import resolve
        from echelon.profile import library_versions

        folder = resolve(self.model, revision=self.options.revision, progress=self.options.progress)
        options = self.options.as_dict()
        for name in ("progress", "profile", "revision"):
            del options[name]
        columns = asdict(self.columns) if self.reads in PAIRS else {}
        return {
            "model": folder.name,
            "model revision": folder.revision,
            "input size": None if self.input == STANDARD else Path(self.input).stat().st_size,
            "input format": self.reads,
            "output format": self.writes,
            "output compression": compression_of(self.output),
            "top_n": self.top_n,
            "run tag": self.run_tag if self.writes == "trec" else None,
            "qrels": None if self.qrels is None else digest_of("--qrels", self.qrels),
            "profile": None if profile is None else asdict(profile.settings),
            **{name: digest_of(f"--{name}", p) for name, p in self._text_files().items()},
            **{f"{name} column": value for name, value in columns.items()},
            **{f"{name} version": value for name, value in library_versions().items()},
            **options,
        }


def _format(option: str, path: str, suffixes: dict[str, str]) -> str:
    if path == STANDARD:
        return "jsonl"
    suffix = suffix_of(path)
    if suffix not in suffixes:
        which = "--input-format" if option == INPUT else "--output-format"
        remedy = f"Use {', '.join(suffixes)}, or give {which}."
        raise InvalidInput(option, f"the suffix of {path!r} names no format", remedy)
    return suffixes[suffix]


def _same(first: str, second: str) -> bool:
    try:
        return Path(first).samefile(second)
    except OSError:
        return False
