"""A server that stands in for the hub and speaks just enough of its API."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import huggingface_hub.utils._http
from huggingface_hub import constants, file_download

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

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
SHARDS = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)}


class StandIn:
    """A hub with repositories in memory; it writes down what it was asked."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.broken = False
        self.refusal = 0  # status of every answer, if it is not 0
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
        if self.broken or self.refusal:
            return self.refusal or 503, {}, b""
        kind = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/" if kind else "/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
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


def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A fixture's body: the stand-in, where the library looks for the hub."""
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
