"""Weights on disk: one safetensors file, shards with an index, or a weights-only pickle.

Each read maps the file again and returns views, so memory is freed as soon as the caller has
converted them: loading needs little more memory than the loaded model.

A large word table stays mapped, and its pages are given back regularly. The kernel maps 16 pages
around each row that is used, so after some hundred texts most of a 500 MB table would count as the
process's memory; pages given back stay in the file cache.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import BadCheckpoint, ModelNotFound
from echelon.files import MAX_LIST_BYTES, OBJECT, read_object, shown
from echelon.models.base import first_line
from echelon.models.faults import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

AGAIN = "Download the model again."

_FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def wrong_shape(
    folder: Path, name: str, implied: Iterable[int], held: Iterable[int]
) -> BadCheckpoint:
    """The error for a tensor of another shape than its model's configuration implies."""
    return BadCheckpoint(
        f"{folder}: config.json implies {name} of shape {list(implied)}, the weights hold "
        f"{list(held)}. Use the config.json that came with these weights."
    )


class Checkpoint:
    """Named tensors of a model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _files_of(folder)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return sum(file.stat().st_size for file in {*self._files.values()})

    def refuse_surplus(self, root: str, layers: int) -> None:
        """Raise :class:`BadCheckpoint` where there are more layers than ``config.json`` says.

        ``root`` begins the names of the layers' tensors, their number follows it.
        """
        surplus = f"{root}{layers}."
        if any(name.startswith(surplus) for name in self.names):
            raise BadCheckpoint(
                f"{self.folder}: the weights hold {surplus}*, beyond config.json's "
                f"num_hidden_layers={layers}. Use the config.json that came with these weights."
            )

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Map tensors by name and check their shapes against those that ``config.json`` implies."""
        tensors: dict[str, torch.Tensor] = {}
        for file in {self._file(name) for name in shapes}:
            wanted = [name for name in shapes if self._files[name] == file]
            tensors.update(_map(file, wanted))
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise wrong_shape(self.folder, name, shape, tensors[name].shape)
        return tensors

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise BadCheckpoint(
                f"{self.folder}: the weights hold no tensor {name}, which config.json implies. "
                "Use the config.json that came with these weights, or a cross-encoder checkpoint."
            )
        return self._files[name]


def _files_of(folder: Path) -> dict[str, Path]:
    for single, index, suffix in (
        ("model.safetensors", "model.safetensors.index.json", "safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", "bin"),
    ):
        if (folder / single).is_file():
            return dict.fromkeys(_names(folder / single, suffix), folder / single)
        if (folder / index).is_file():
            return _shards(folder / index)
    raise ModelNotFound(
        f"{folder}: no weights there (looked for model.safetensors and pytorch_model.bin, whole "
        "or in shards with an index). Give the folder that holds them, or a hub id."
    )


def _shards(index: Path) -> dict[str, Path]:
    try:
        content = read_object(index, {"weight_map": OBJECT}, MAX_LIST_BYTES)
        names = content["weight_map"] or {}
        shards = {file: _shard(index.parent, file) for file in {*names.values()}}
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{index}: not a readable shard index ({error}). {AGAIN}") from error
    for file in sorted(shards.values()):
        if not file.is_file():
            raise BadCheckpoint(f"{index.parent}: shard {file.name} is missing. {AGAIN}")
    return {name: shards[file] for name, file in names.items()}


def _shard(folder: Path, name: object) -> Path:
    """A shard's path; ``ValueError`` for one outside of its model's folder."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"weight_map: {shown(name)} is not the name of a file in this folder")
    path, target, home = folder / name, (folder / name).resolve(), folder.resolve()
    # The hub's cache holds files by their hash, for a repository or for all, and links to them.
    stores = home.parents[1:3] if home.parent.name == "snapshots" else ()
    if target.parent != home and not any(target.is_relative_to(s / "blobs") for s in stores):
        raise ValueError(f"weight_map: {shown(name)} is a link to a file outside of this folder")
    return path


def _names(file: Path, suffix: str) -> list[str]:
    if suffix == "bin":
        return list(_unpickle(file))
    with _opened(file) as tensors:
        return list(tensors.keys())


def _map(file: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    if file.suffix != ".bin":
        with _opened(file) as opened:
            return {name: opened.get_tensor(name) for name in names}
    tensors = _unpickle(file)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise BadCheckpoint(f"{file}: {missing[0]} of the index is missing. {AGAIN}")
    return {name: tensors[name] for name in names}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(
            f"{file}: damaged or cut short ({first_line(error)}). {AGAIN}"
        ) from error


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    """Read a pickle of tensors; a pickle that would execute code is refused."""
    import torch

    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        with file.open("rb") as opened:
            is_zip = opened.read(2) == b"PK"
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle raises any kind of error
        if is_out_of_memory(error):
            raise
        raise BadCheckpoint(
            f"{file}: not a readable weights-only checkpoint ({first_line(error)}). {AGAIN}"
        ) from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{file}: holds no named tensors. {AGAIN}")
    return content


MIN_BYTES = 128 * 2**20  # smaller tables stay in memory: giving them back would save little

ROWS = 1024
"""Rows looked up before pages are given back: these hold 64 MiB at most, and giving them back takes
some 2 ms, little beside scoring as many tokens."""

DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)

_SPAN = re.compile(r"(?P<low>[0-9a-f]+)-(?P<high>[0-9a-f]+) \S+ \S+ (?P<device>\S+) ")
"""The first line of each mapping in /proc/self/smaps, see proc(5)."""


class MappedPages:
    """The memory pages of one table, from its first byte's address and its length in bytes."""

    def __init__(self, start: int, length: int) -> None:
        self._start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # only whole pages
        self._length = (start + length - self._start) // mmap.PAGESIZE * mmap.PAGESIZE
        self._rows = 0

    @classmethod
    def of(cls, table: torch.Tensor, min_bytes: int = MIN_BYTES) -> MappedPages | None:
        """The pages of a table; None if it is small or not mapped from a file."""
        if table.device.type != "cpu" or table.nbytes < min_bytes or DONT_NEED is None:
            return None
        start = table.data_ptr()
        return cls(start, table.nbytes) if _is_of_a_file(start, table.nbytes) else None

    def count_rows(self, rows: int) -> None:
        """Count rows that were looked up; give pages back after every :data:`ROWS`."""
        self._rows += rows
        if self._rows >= ROWS:
            self._rows = 0
            self.give_back()

    def give_back(self) -> None:
        """Give the pages back to the kernel."""
        where, length = ctypes.c_void_p(self._start), ctypes.c_size_t(self._length)
        ctypes.CDLL(None).madvise(where, length, DONT_NEED)


def _is_of_a_file(start: int, length: int) -> bool:
    """Whether all bytes are mapped from a file and unchanged; other memory would be lost."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return False
    reached, inside, written = start, False, 0
    for line in smaps.read_text(encoding="utf-8", errors="replace").splitlines():
        if (span := _SPAN.match(line)) is not None:
            low, high = int(span["low"], 16), int(span["high"], 16)
            inside = low <= reached < high and span["device"] != "00:00"
            reached = high if inside else reached
        elif inside and line.startswith("Anonymous:"):
            written += int(line.split()[1])
    return reached >= start + length and written == 0
