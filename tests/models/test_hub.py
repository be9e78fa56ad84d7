"""The hub side of fetching, against a stand-in server that speaks just enough of the hub's API."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from stand_in_hub import NEW, PLAIN, REPO, SHARDS, UNWANTED, StandIn, names, serve

from echelon.errors import ModelNotFound, StorageError, UnsupportedModel
from echelon.models import hub
from echelon.models.hub import ModelFolder, access, resolve
from echelon.models.repositories import choose, redacted

if TYPE_CHECKING:
    from pathlib import Path

server = pytest.fixture(serve)


def test_download_takes_what_is_needed_and_nothing_else(server: StandIn) -> None:
    server.add(REPO, NEW, PLAIN | UNWANTED)

    found = resolve(REPO)

    assert found == ModelFolder(found.path, REPO, NEW)
    assert names(found.path) == set(PLAIN)
    assert (found.path / "model.safetensors").read_bytes() == b"weights"
    assert server.fetched() == set(PLAIN)


def test_a_missing_repository(server: StandIn) -> None:
    with pytest.raises(ModelNotFound, match=r"no such repository.*spelling.*HF_TOKEN"):
        resolve("acme/nothing")


def test_a_gated_repository(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    server.add(REPO, NEW, PLAIN)
    server.gated.add(REPO)

    with pytest.raises(ModelNotFound, match=r"gated.*licence.*HF_TOKEN") as caught:
        resolve(REPO)

    assert "Bearer hf_secretsecretsecret" in server.tokens
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, r"refused the token.*HF_TOKEN to a valid one"),
        (403, r"does not give acme/reranker to this account.*licence.*HF_TOKEN"),
        (404, r"A file of acme/reranker is not on the hub.*Check the name"),
    ],
)
def test_what_the_hub_refuses(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, status: int, words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    server.add(REPO, NEW, PLAIN)
    server.refusal = status
    with pytest.raises(ModelNotFound, match=words) as caught:
        resolve(REPO)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("bge-reranker-v2-m3", "BAAI/bge-reranker-v2-m3"), ("unknown-model", "owner/name")],
)
def test_a_name_without_its_owner(server: StandIn, name: str, meant: str) -> None:
    with pytest.raises(ModelNotFound, match=f"begin with their owner: did you mean {meant}") as e:
        resolve(name)
    assert "no such repository" in str(e.value)


def test_whether_the_hub_answers(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert access(online=False)["answers"] is None
    assert server.asked == []
    found = access(online=True)
    assert (found["answers"], found["error"]) == (True, None)
    server.broken = True
    assert access(online=True)["answers"] is False
    monkeypatch.setattr(hub, "_ask", lambda _: time.sleep(5))
    monkeypatch.setattr(hub, "ACCESS_S", 0.05)
    assert access(online=True)["error"] == "no answer in 0.05 s"


@pytest.mark.parametrize("name", ["a--b/c", "acme/x..y", "acme/x.git", "acme/" + "x" * 120])
def test_a_name_that_the_hub_forbids(server: StandIn, name: str) -> None:
    with pytest.raises(ModelNotFound, match="neither a local folder nor a valid hub name"):
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

    assert redacted(error) == "OSError: no route to http://***@proxy:80 with ***"


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
    assert sorted(choose(there)) == sorted(taken)


def test_every_kind_of_tokenizer_file_is_chosen() -> None:
    files = ["vocab.txt", "merges.txt", "spm.model", "sentencepiece.bpe.model", "tokenizer.json"]

    assert set(choose([*files, "model.safetensors", "modeling_x.py", "old/spm.model"])) == {
        *files,
        "model.safetensors",
    }


def test_what_sentence_transformers_saves_is_chosen() -> None:
    saved = [
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_LogitScore/config.json",
        "2_Dense/model.safetensors",
    ]
    others = ["README.md", "sentence_bert_config.json.bak", "1_LogitScore/readme.txt"]

    chosen = choose([*saved, *others, "model.safetensors"])
    assert set(chosen) == {*saved, "model.safetensors"}


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
    code = f"from echelon.models.hub import resolve; print(resolve({REPO!r}).path)"
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
