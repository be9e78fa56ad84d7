"""Models of ModelScope, against a stand-in for its package: one repository, one cache."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from stand_in_hub import PLAIN, UNWANTED, go_offline, names

from echelon.errors import (
    EchelonWarning,
    InvalidInput,
    MissingDependency,
    ModelNotFound,
    StorageError,
    UnsupportedModel,
)
from echelon.models.hub import resolve

if TYPE_CHECKING:
    from pathlib import Path

NAME = "modelscope:acme/reranker"


class NotExistError(Exception):
    """As the package names what is not there."""


class StandIn:
    """A site with one repository, and the package's functions that Echelon calls."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files = PLAIN | UNWANTED | {"modeling_acme.py": b"raise SystemExit"}
        self.broken: Exception | None = None
        self.asked: list[tuple[str, str]] = []

    def get_model_files(self, repo: str, *, revision: str, recursive: bool) -> list[dict[str, Any]]:
        self.asked.append((repo, revision))
        if self.broken:
            raise self.broken
        if repo != "acme/reranker":
            raise NotExistError("404")
        return [{"Path": path} for path in self.files if recursive]

    def snapshot_download(
        self,
        repo: str,
        *,
        revision: str,
        local_files_only: bool = False,
        allow_patterns: list[str] | None = None,
    ) -> str:
        folder = self.cache / repo / revision
        if local_files_only:
            if not folder.is_dir():
                raise ValueError("Cannot find the requested files in the cached path.")
            return str(folder)
        for path, content in self.files.items():
            wanted = any(fnmatch(path, pattern) for pattern in allow_patterns or ["*"])
            if wanted and not (folder / path).exists():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
        return str(folder)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    site = StandIn(tmp_path / "cache")
    parts = {name: ModuleType(name) for name in ("modelscope", "modelscope.hub")}
    api = ModuleType("modelscope.hub.api")
    api.__dict__["HubApi"] = lambda: SimpleNamespace(get_model_files=site.get_model_files)
    parts["modelscope"].__dict__["snapshot_download"] = site.snapshot_download
    for name, module in (parts | {"modelscope.hub.api": api}).items():
        monkeypatch.setitem(sys.modules, name, module)
    return site


def test_what_is_needed_is_fetched_and_no_code(site: StandIn) -> None:
    found = resolve(NAME)
    assert found.name == NAME
    assert names(found.path) == set(PLAIN)
    assert site.asked == [("acme/reranker", "master")]
    assert resolve(NAME) == found


@pytest.mark.parametrize(("name", "option"), [(f"{NAME}@v2", None), (NAME, "v2")])
def test_a_revision_is_in_the_name(site: StandIn, name: str, option: str | None) -> None:
    found = resolve(name, revision=option)
    assert (found.name, found.path.name) == (f"{NAME}@v2", "v2")
    assert resolve(found.name) == found
    assert site.asked[0] == ("acme/reranker", "v2")


def test_two_revisions_are_refused(site: StandIn) -> None:
    with pytest.raises(InvalidInput, match=r"revision.*another one than 'v3'.*Give one"):
        resolve(f"{NAME}@v2", revision="v3")
    assert site.asked == []


@pytest.mark.parametrize("name", ["reranker", "", "a/b/c", "a/b@", "a/b@c@d", "../b"])
def test_what_is_no_name(site: StandIn, name: str) -> None:
    with pytest.raises(ModelNotFound, match=r"Use modelscope:owner/name\[@revision\]"):
        resolve(f"modelscope:{name}")
    assert site.asked == []


def test_small_files_alone(site: StandIn) -> None:
    assert names(resolve(NAME, weights=False).path) == set(PLAIN) - {"model.safetensors"}


def test_a_repository_without_a_model(site: StandIn) -> None:
    site.files = {"config.json": b"{}", "model.gguf": b""}
    with pytest.raises(UnsupportedModel, match=r"acme/reranker on ModelScope.*model\.gguf"):
        resolve(NAME)


def test_a_repository_that_is_not_there(site: StandIn) -> None:
    with pytest.raises(ModelNotFound, match=r"ModelScope has no acme/other.*spelling.*login"):
        resolve("modelscope:acme/other")


def test_no_answer(site: StandIn) -> None:
    site.broken = OSError("no route to http://me:secret@proxy")
    with pytest.raises(ModelNotFound, match="could not be fetched from ModelScope") as refused:
        resolve(NAME)
    assert "secret" not in str(refused.value)
    site.broken = None
    found = resolve(NAME)
    site.broken = OSError("no route")
    with pytest.warns(EchelonWarning, match="using the cached copy"):
        assert resolve(NAME) == found
    (found.path / "tokenizer.json").unlink()
    (found.path / "tokenizer_config.json").unlink()
    with pytest.raises(ModelNotFound, match="no complete copy"):
        resolve(NAME)


def test_offline(site: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(NAME)
    site.asked.clear()
    go_offline(monkeypatch)
    assert resolve(NAME) == found
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE forbids"):
        resolve(f"{NAME}@v2")
    assert site.asked == []


def test_a_full_disk(site: StandIn) -> None:
    site.broken = OSError(28, "No space left on device")
    with pytest.raises(StorageError, match=r"No space left.*MODELSCOPE_CACHE"):
        resolve(NAME)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingDependency, match=r"needs the package modelscope.*\[modelscope\]"):
        resolve(NAME)
