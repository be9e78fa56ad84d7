"""Weights on disk: every layout gives the same logits, and what is damaged says so."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers import make_toy, random_batch, reference_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from echelon.errors import BadCheckpoint, ModelError, ModelNotFound
from echelon.models.checkpoint import Checkpoint
from echelon.models.registry import open_scorer

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 150
BATCH = random_batch([30, 5, 77], VOCABULARY, seed=4, types=True)


def score(folder: Path) -> np.ndarray:
    return open_scorer(folder, device="cpu", precision="fp32", threads=1).score(BATCH)


def toy(folder: Path, **settings) -> Path:
    return make_toy(folder, "bert", None, vocab_size=VOCABULARY, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One safetensors file."""
    return toy(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "copied")


def as_pickle(folder: Path, *, legacy: bool = False) -> Path:
    """The same weights as ``pytorch_model.bin``."""
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder / "model.safetensors").unlink()
    return folder


def as_sharded_pickle(folder: Path, *, shards: int = 3) -> Path:
    """The same weights dealt out to several files, neighbours to different ones."""
    tensors = load_file(folder / "model.safetensors")
    names = {
        name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin"
        for i, name in enumerate(tensors)
    }
    for file in set(names.values()):
        torch.save({n: t for n, t in tensors.items() if names[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def test_safetensors_are_the_references(whole):
    np.testing.assert_allclose(score(whole), reference_logits(whole, BATCH), rtol=0, atol=1e-4)


def test_sharded_safetensors(whole, tmp_path):
    folder = toy(tmp_path, max_shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert not (folder / "model.safetensors").exists()
    assert score(folder).tolist() == score(whole).tolist()


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles(whole, copied, legacy):
    assert score(as_pickle(copied, legacy=legacy)).tolist() == score(whole).tolist()


def test_the_pickle_that_make_checkpoint_writes(whole, tmp_path):
    folder = toy(tmp_path, pickle=True)
    assert (folder / "pytorch_model.bin").exists()
    assert score(folder).tolist() == score(whole).tolist()


def test_sharded_pickles(whole, copied):
    assert score(as_sharded_pickle(copied)).tolist() == score(whole).tolist()


def test_safetensors_go_before_a_pickle(whole, copied):
    (copied / "pytorch_model.bin").write_bytes(b"never looked at")
    assert score(copied).tolist() == score(whole).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_files_load_in_any_precision(copied, dtype):
    tensors = load_file(copied / "model.safetensors")
    halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(halves, copied / "model.safetensors", metadata={"format": "pt"})
    found = score(copied)
    np.testing.assert_allclose(found, reference_logits(copied, BATCH), rtol=0, atol=1e-4)
    for precision in ("bf16", "fp16"):
        half = open_scorer(copied, device="cpu", precision=precision, threads=1).score(BATCH)
        np.testing.assert_allclose(half, found, rtol=0, atol=0.05)


def test_the_weights_are_counted(whole):
    tensors = load_file(whole / "model.safetensors")
    layers = sum(t.nbytes for n, t in tensors.items() if "embeddings." not in n)
    norm = sum(t.nbytes for n, t in tensors.items() if "embeddings.LayerNorm" in n)
    assert open_scorer(whole, precision="fp32").info.weights_bytes == layers + norm


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["plain", "torch", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(copied, tmp_path, how):
    marker = tmp_path / "ran"
    content = {"weight": Evil(f"touch {marker}")}
    (copied / "model.safetensors").unlink()
    target = copied / "pytorch_model.bin"
    if how == "plain":
        target.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, target, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(BadCheckpoint, match="not a readable weights-only checkpoint"):
        score(copied)
    assert not marker.exists()


def test_a_folder_without_weights(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no weights there"):
        score(copied)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_safetensors(copied, keep):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors: damaged or cut short"):
        score(copied)


@pytest.mark.parametrize("legacy", [False, True])
@settings(max_examples=25)
@given(share=st.floats(0, 0.99))
def test_truncated_pickles(whole, tmp_path_factory, legacy, share):
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("cut") / "model")
    file = as_pickle(folder, legacy=legacy) / "pytorch_model.bin"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadCheckpoint, match="not a readable weights-only checkpoint"):
        score(folder)
    shutil.rmtree(folder)


@settings(max_examples=60)
@given(st.data())
def test_damaged_pickles_never_end_in_a_foreign_error(whole, tmp_path_factory, data):
    """Bytes of the pickle itself overwritten: a clear error, or tensors of other values."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("hurt") / "model")
    file = as_pickle(folder, legacy=True) / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))
    with warnings.catch_warnings(), suppress(ModelError):
        warnings.simplefilter("ignore")
        Checkpoint(folder).read({"classifier.bias": (1,)})
    shutil.rmtree(folder)


@pytest.mark.parametrize("content", [[1, 2], {"weight": 3, "bias": "x"}, torch.zeros(3)])
def test_a_pickle_without_named_tensors(copied, content):
    (copied / "model.safetensors").unlink()
    torch.save(content, copied / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint):
        score(copied)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', ""]
)
def test_a_damaged_index(copied, index):
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadCheckpoint, match="not a readable shard index"):
        score(copied)


def test_a_missing_shard(tmp_path):
    folder = toy(tmp_path, max_shard="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=f"shard {shard.name} is missing"):
        score(folder)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize(
    "name",
    ["../{}", "{folder}/../{}", "./{}", "sub/../{}", "a\\{}", "\u0000", "", ".", "..", 5, None],
)
def test_shards_outside_of_the_folder_are_refused(tmp_path, family, name):
    folder = make_toy(tmp_path / "m", family, None, vocab_size=VOCABULARY, max_shard="20KB")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    tensor, shard = next(iter(names.items()))
    shutil.copy(folder / shard, tmp_path / shard)
    names[tensor] = name.format(shard, folder=folder) if isinstance(name, str) else name
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(
        BadCheckpoint, match=r"weight_map: .* is not the name of a file in this fol"
    ):
        score(folder)


def test_links_lead_to_shards_within_the_folder_or_the_hubs_cache_alone(tmp_path):
    plain = toy(tmp_path / "plain", max_shard="20KB")
    expected = score(plain).tolist()
    repo = tmp_path / "hub" / "models--a--b"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        if file.suffix != ".safetensors":
            shutil.copy(file, snapshot)
            continue
        # Every other file is shared by all repositories of the cache, as newer versions do.
        blob = repo / "blobs" / str(number)
        home = tmp_path / "hub" / "blobs" / "00" / str(number) if number % 2 else blob
        for path in (home, blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, home)
        if home != blob:
            blob.symlink_to(os.path.relpath(home, blob.parent))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert score(snapshot).tolist() == expected
    shutil.copytree(snapshot, plain, symlinks=True, dirs_exist_ok=True)
    for file in plain.glob("*.safetensors"):
        file.unlink()
        file.symlink_to((snapshot / file.name).resolve())
    with pytest.raises(BadCheckpoint, match="is a link to a file outside of this folder"):
        score(plain)


def test_an_index_that_names_a_missing_tensor(copied):
    folder = as_sharded_pickle(copied)
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    names = content["weight_map"]
    other = next(file for file in set(names.values()) if file != names["classifier.weight"])
    names["classifier.weight"] = other
    index.write_text(json.dumps(content))
    with pytest.raises(BadCheckpoint, match=r"classifier\.weight of the index is missing"):
        score(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 96}, r"config\.json implies .* of shape"),
        ({"intermediate_size": 100}, r"config\.json implies .*intermediate.* of shape"),
        ({"vocab_size": 151}, r"word_embeddings\.weight of shape \[151, 48\]"),
        ({"max_position_embeddings": 512}, r"position_embeddings\.weight of shape \[512, 48\]"),
        ({"type_vocab_size": 1}, r"token_type_embeddings\.weight of shape"),
        ({"num_hidden_layers": 4}, r"no tensor bert\.encoder\.layer\.3"),
        ({"num_hidden_layers": 2}, r"layer\.2.*num_hidden_layers"),
        ({"id2label": {"0": "no", "1": "yes"}}, r"classifier\.weight of shape \[2, 48\]"),
        ({"model_type": "roberta"}, r"no tensor roberta\.embeddings"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide' is not a whole number"),
        ({"vocab_size": None}, "vocab_size: it is missing"),
        ({"id2label": {"first": "x"}}, "id2label"),
    ],
)
def test_a_config_that_does_not_match_its_tensors(copied, changes, words):
    file = copied / "config.json"
    config = json.loads(file.read_text())
    label = 0 if "id2label" in changes else None
    file.write_text(json.dumps({**config, **changes}))
    with pytest.raises(BadCheckpoint, match=words):
        open_scorer(copied, device="cpu", precision="fp32", label=label)
