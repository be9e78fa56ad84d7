"""What a model may be called, and what each name leads to. No network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from echelon.errors import InvalidInput, ModelNotFound
from echelon.models import demo, hub
from echelon.models.hub import ModelFolder, fingerprint, resolve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, ...]]:
    """Stand-ins for the two places that models come from; they write down what is asked."""
    asked: list[tuple[object, ...]] = []

    def fetch(repo: str, *, revision: str | None, progress: bool, weights: bool) -> Path:
        assert weights
        asked.append(("hub", repo, revision, progress))
        return tmp_path / "snapshots" / "c0ffee"

    def pull(*, progress: bool) -> Path:
        asked.append(("demo", progress))
        return tmp_path / "demo-model"

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(demo, "pull", pull)
    return asked


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    (folder / "README.md").write_text("words")
    return folder


def test_demo(asked: list[tuple[object, ...]], tmp_path: Path) -> None:
    found = resolve("demo", progress=True)

    assert found == ModelFolder(tmp_path / "demo-model", "demo", demo.REVISION)
    assert demo.REVISION == "1225ccd6afd0"
    assert asked == [("demo", True)]


@pytest.mark.parametrize("name", ["demo", "acme/reranker"])
def test_a_text_and_a_path_that_look_alike(
    asked: list[tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """``demo`` is the demo model even beside such a folder; any other folder that is there wins."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        resolve(Path(name))
    (tmp_path / name).mkdir(parents=True)

    assert resolve(Path(name)).path == tmp_path / name
    assert resolve(f"./{name}").path == tmp_path / name
    assert asked == []
    assert resolve(name).path.name == ("demo-model" if name == "demo" else "reranker")


@pytest.mark.parametrize(
    "name", ["bert", "acme/reranker", "cross-encoder/ms-marco-MiniLM-L12-v2", "A_1/b.c-d"]
)
def test_hub_names(asked: list[tuple[object, ...]], name: str) -> None:
    found = resolve(name, revision="v1")

    assert (found.name, found.revision, found.path.name) == (name, "c0ffee", "c0ffee")
    assert asked == [("hub", name, "v1", False)]


def test_a_local_folder(
    asked: list[tuple[object, ...]], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ModelFolder(model, "my-model", fingerprint(model))
    monkeypatch.setenv("HOME", str(model.parent))
    monkeypatch.chdir(model)

    for name in (
        model,
        str(model),
        f"{model}/",
        "~/my-model",
        Path("~/my-model"),
        ".",
        "../my-model",
    ):
        assert resolve(name) == expected
    assert asked == []


def test_a_folder_without_a_model_is_accepted_here(tmp_path: Path) -> None:
    assert resolve(tmp_path).path == tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "./nothing",
        "../nothing",
        "~/nothing",
        "~nobody-of-that-name/nothing",
        "a/b/c",
        "trailing/",
        "two words",
        "C:\\models\\mine",
        "-x/y",
        "ünï/cödé",
        "acme/reranker\n",
        "nul\0byte",
        "x" * 5000 + "/..",
        Path("acme/reranker"),
        Path("demo"),
    ],
)
def test_a_model_that_does_not_exist(
    asked: list[tuple[object, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str | Path,
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(
        ModelNotFound, match=r"There is no folder .*owner/name, or 'demo'"
    ) as caught:
        resolve(name)

    assert repr(os.fspath(name)) in str(caught.value)
    assert asked == []


def test_a_file(model: Path) -> None:
    with pytest.raises(InvalidInput, match=r"is a file\. Give the folder") as caught:
        resolve(model / "model.safetensors")

    assert caught.value.field == "model"


@pytest.mark.parametrize("name", [None, 7, b"demo", "", "  ", ["demo"]])
def test_a_value_that_is_no_name(name: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve(name)  # type: ignore[arg-type]  # what is wrong is the test

    assert caught.value.field == "model"


@pytest.mark.parametrize("name", ["demo", "."])
def test_a_revision_of_a_model_without_revisions(
    asked: list[tuple[object, ...]], name: str
) -> None:
    with pytest.raises(InvalidInput, match="has no revision 'v1'") as caught:
        resolve(name, revision="v1")

    assert caught.value.field == "revision"
    assert asked == []


def test_an_empty_revision(asked: list[tuple[object, ...]]) -> None:
    with pytest.raises(InvalidInput, match="revision: it is empty"):
        resolve("acme/reranker", revision=" ")
    assert asked == []


def test_a_fingerprint_changes_with_the_model_only(model: Path) -> None:
    seen = [fingerprint(model)]
    assert len(seen[0]) == 12

    def changed() -> bool:
        seen.append(fingerprint(model))
        return seen[-1] not in seen[:-1]

    (model / "README.md").write_text("other words")
    assert not changed()
    (model / "config.json").write_text("[]")
    os.utime(model / "config.json", (1, 1))
    assert changed()
    os.utime(model / "config.json", (2, 2))
    assert not changed(), "the config counts by its bytes"
    os.utime(model / "model.safetensors", (1, 1))
    assert changed()
    (model / "model.safetensors").write_text("longer weights")
    os.utime(model / "model.safetensors", (1, 1))
    assert changed()
    (model / "pytorch_model.bin").write_text("")
    assert changed()
    (model / "pytorch_model.bin").rename(model / "other.bin")
    assert changed()


def test_a_folder_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)

    with pytest.raises(ModelNotFound, match=r"cannot be read.*permissions"):
        resolve(model)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, echelon.models.hub; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    loaded = set(done.stdout.split())
    assert "echelon" in loaded
    assert not loaded & {"huggingface_hub", "safetensors", "torch", "transformers", "onnx", "tqdm"}
