"""The hub side of fetching, against a stand-in server that speaks just enough of the hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import huggingface_hub.utils._http
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from echelon.errors import EchelonWarning, ModelNotFound, StorageError, UnsupportedModel
from echelon.fetch import hub
from echelon.fetch.resolve import ModelFolder, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPO = "acme/reranker"
OLD, NEW = "a" * 40, "b" * 40
PLAIN = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }",
    "model.safetensors": b"weights",
}
UNWANTED = {
    "pytorch_model.bin": b"the same weights again",
    "tf_model.h5": b"and again",
    "flax_model.msgpack": b"and again",
    "onnx/model.onnx": b"and again",
    "onnx/config.json": b"{}",
    "openvino/openvino_model.bin": b"and again",
    "README.md": b"words",
    "training_args.bin": b"",
}


class StandIn:
    """A hub with repositories in memory; it writes down what it was asked."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.broken = False
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: no connection outlives its answer
            def do_GET(self) -> None:
                stand_in.answer(self)

            def do_HEAD(self) -> None:
                stand_in.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def add(self, repo: str, commit: str, files: dict[str, bytes]) -> None:
        self.commits.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})["main"] = commit

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def fetched(self) -> set[str]:
        return {line.split("/", 5)[-1] for line in self.asked if line.startswith("GET /acme")}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        self.tokens.add(request.headers.get("Authorization"))
        status, headers, body = self.find(path)
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def find(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.broken:
            return 503, {}, b""
        kind = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models/" if kind else "/").split("/")
        repo = f"{owner}/{name}"
        if repo not in self.commits:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        what, revision = (*rest, "revision", "main")[:2] if rest else ("revision", "main")
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.commits[repo][commit]
        if kind:
            return 200, {"Content-Type": "application/json"}, _listing(repo, commit, files, what)
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        return _file(commit, files, "/".join(rest[2:]))


def _listing(repo: str, commit: str, files: dict[str, bytes], what: str) -> bytes:
    if what == "tree":
        entries = [
            {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
            for n, b in files.items()
        ]
        return json.dumps(entries).encode()
    siblings = [{"rfilename": name} for name in files]
    return json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()


def _file(commit: str, files: dict[str, bytes], name: str) -> tuple[int, dict[str, str], bytes]:
    if name not in files:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    etag = hashlib.sha1(files[name]).hexdigest()
    return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    for module in (constants, file_download):  # up to 0.x the second holds a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _forget_sessions()
    yield stand_in
    stand_in.stop()
    _forget_sessions()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _forget_sessions()


def _forget_sessions() -> None:
    # Up to 0.x a session knows from its making whether it is offline.
    getattr(huggingface_hub.utils._http, "reset_sessions", lambda: None)()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_download_takes_what_is_needed_and_nothing_else(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN | UNWANTED)

    found = resolve(REPO)

    assert found == ModelFolder(found.path, REPO, NEW)
    assert names(found.path) == set(PLAIN)
    assert (found.path / "model.safetensors").read_bytes() == b"weights"
    assert server.fetched() == set(PLAIN)


def test_a_cached_copy_serves_offline(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, NEW, PLAIN | UNWANTED)
    first = resolve(REPO)
    server.stop()
    go_offline(monkeypatch)

    assert resolve(REPO) == first


def test_a_cached_copy_serves_with_a_warning_when_the_hub_is_gone(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    first = resolve(REPO)
    server.stop()

    with pytest.warns(EchelonWarning, match="bbbbbbbbbbbb.*HF_HUB_OFFLINE=1"):
        assert resolve(REPO) == first


def test_a_cached_copy_serves_with_a_warning_when_the_hub_is_ill(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    first = resolve(REPO)
    server.broken = True

    with pytest.warns(EchelonWarning, match="did not hand out"):
        assert resolve(REPO) == first


@pytest.mark.parametrize("half", [False, True], ids=["nothing", "dangling link"])
@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_copy_does_not_serve(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, lost: str, *, half: bool
) -> None:
    files = {name: data for name, data in PLAIN.items() if name != "tokenizer_config.json"}
    server.add(REPO, NEW, files)
    link = resolve(REPO).path / lost
    (link.resolve() if half else link).unlink()
    go_offline(monkeypatch)

    with pytest.raises(ModelNotFound, match=r"not complete in the cache.*HF_HUB_OFFLINE"):
        resolve(REPO)


def test_offline_with_nothing_cached(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)

    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE forbids"):
        resolve(REPO)
    assert server.asked == []


def test_no_connection_and_nothing_cached(server: StandIn) -> None:
    server.stop()

    with pytest.raises(ModelNotFound, match=r"could not be fetched.*Check the connection"):
        resolve(REPO)


def test_a_commit_pins_the_content(server: StandIn) -> None:
    server.add(REPO, OLD, PLAIN | {"model.safetensors": b"old weights"})
    server.add(REPO, NEW, PLAIN)

    old, new = resolve(REPO, revision=OLD), resolve(REPO)

    assert (old.revision, new.revision) == (OLD, NEW)
    assert (old.path / "model.safetensors").read_bytes() == b"old weights"
    assert (new.path / "model.safetensors").read_bytes() == b"weights"


def test_a_cached_commit_asks_nothing(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    first = resolve(REPO, revision=NEW)
    server.asked.clear()

    assert resolve(REPO, revision=NEW) == first
    assert server.asked == []


def test_a_moved_branch_is_followed(server: StandIn) -> None:
    server.add(REPO, OLD, PLAIN | {"model.safetensors": b"old weights"})
    assert resolve(REPO, revision="main").revision == OLD
    server.add(REPO, NEW, PLAIN)

    found = resolve(REPO, revision="main")

    assert found.revision == NEW
    assert (found.path / "model.safetensors").read_bytes() == b"weights"


def test_a_broken_commit_in_the_cache_is_completed(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    folder = resolve(REPO, revision=NEW).path
    (folder / "model.safetensors").unlink()

    assert resolve(REPO, revision=NEW).path == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_missing_repository(server: StandIn) -> None:
    with pytest.raises(ModelNotFound, match=r"no such repository.*spelling.*HF_TOKEN"):
        resolve("acme/nothing")


def test_a_missing_revision_is_not_replaced_by_the_cache(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN)
    server.branches[REPO]["v9"] = NEW
    resolve(REPO, revision="v9")
    del server.branches[REPO]["v9"]

    with pytest.raises(ModelNotFound, match="has no revision 'v9'"):
        resolve(REPO, revision="v9")


def test_a_gated_repository(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    server.add(REPO, NEW, PLAIN)
    server.gated.add(REPO)

    with pytest.raises(ModelNotFound, match=r"gated.*licence.*HF_TOKEN") as caught:
        resolve(REPO)

    assert "Bearer hf_secretsecretsecret" in server.tokens
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["a--b/c", "acme/x..y", "acme/x.git", "acme/" + "x" * 120])
def test_a_name_that_the_hub_forbids(server: StandIn, name: str) -> None:
    with pytest.raises(ModelNotFound, match="neither a local folder nor a name that the hub"):
        resolve(name)
    assert server.asked == []


def test_no_weights_to_use(server: StandIn) -> None:
    server.add(REPO, NEW, {"config.json": b"{}", "onnx/model.onnx": b"", "model.gguf": b""})

    with pytest.raises(UnsupportedModel, match=r"onnx/model\.onnx"):
        resolve(REPO)
    assert server.fetched() == set()


def test_a_full_disk(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, NEW, PLAIN)

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)

    with pytest.raises(StorageError, match=r"No space left.*HF_HOME"):
        resolve(REPO)


def test_an_address_with_a_password_is_not_repeated() -> None:
    error = OSError("no route to http://me:pass@proxy:80 with hf_abcDEF\nmore")

    assert hub._redacted(error) == "OSError: no route to http://***@proxy:80 with ***"


SHARDS = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)}
BIN_SHARDS = {f"pytorch_model-0000{i}-of-00002.bin": b"%d" % i for i in (1, 2)}


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin", "onnx/model.onnx"], ["pytorch_model.bin"]),
        (
            [*SHARDS, "model.safetensors.index.json", "pytorch_model.bin"],
            [*SHARDS, "model.safetensors.index.json"],
        ),
        ([*SHARDS, "model.safetensors"], ["model.safetensors"]),
        (
            [*BIN_SHARDS, "pytorch_model.bin.index.json", "tf_model.h5"],
            [*BIN_SHARDS, "pytorch_model.bin.index.json"],
        ),
        (["model-fp16.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (["onnx/model.safetensors", "adapter_model.safetensors"], []),
    ],
)
def test_one_kind_of_weights_is_chosen(there: list[str], taken: list[str]) -> None:
    assert sorted(hub.choose(there)) == sorted(taken)


def test_every_kind_of_tokenizer_file_is_chosen() -> None:
    files = ["vocab.txt", "merges.txt", "spm.model", "sentencepiece.bpe.model", "tokenizer.json"]

    assert set(hub.choose([*files, "model.safetensors", "modeling_x.py", "old/spm.model"])) == {
        *files,
        "model.safetensors",
    }


def test_shards_are_fetched_and_a_lost_one_is_noticed(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"model.safetensors.index.json": b'{"weight_map": {}}'}
    config = {"config.json": b"{}", "tokenizer.json": b"{ }"}
    server.add(REPO, NEW, config | SHARDS | index)
    folder = resolve(REPO).path
    assert names(folder) == {*config, *SHARDS, *index}
    go_offline(monkeypatch)
    assert resolve(REPO).path == folder

    (folder / next(iter(SHARDS))).unlink()

    with pytest.raises(ModelNotFound, match="not complete"):
        resolve(REPO)


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_progress_bars_are_switched_and_put_back(
    server: StandIn, capfd: pytest.CaptureFixture[str], *, progress: bool, hidden: bool
) -> None:
    server.add(REPO, NEW, PLAIN)
    before = are_progress_bars_disabled()
    (disable_progress_bars if hidden else enable_progress_bars)()
    try:
        resolve(REPO, progress=progress)
        assert are_progress_bars_disabled() is hidden
    finally:
        (disable_progress_bars if before else enable_progress_bars)()

    assert bool(capfd.readouterr().err) is progress


def test_the_environment_is_honoured(server: StandIn, tmp_path: Path) -> None:
    """A fresh process, as the library reads HF_ENDPOINT, HF_HOME and the rest when imported."""
    server.add(REPO, NEW, PLAIN)
    code = f"from echelon.fetch.resolve import resolve; print(resolve({REPO!r}).path)"
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_fromenvironment",
    }
    environment.pop("HF_HUB_CACHE", None)

    def run(**extra: str) -> str:
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.run(
            command, env=environment | extra, check=True, capture_output=True, text=True
        ).stdout.strip()

    first = run(HF_HUB_OFFLINE="0")
    server.stop()

    assert first.startswith(str(tmp_path / "home"))
    assert "Bearer hf_fromenvironment" in server.tokens
    assert run(HF_HUB_OFFLINE="1") == first
