"""Damaged and hostile files of models and profiles: one short error each, never a traceback."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from helpers import make_toy, run_command, run_python

from echelon.errors import EchelonWarning
from echelon.files import MAX_BYTES, MAX_LIST_BYTES
from echelon.models.architecture import CONFIG
from echelon.profile import MAX_PROFILE_BYTES
from echelon.scheduling.packing import NO_BUDGET

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MOST_SHOWN = 1_000
"""Characters of an error, paths included."""

MODEL, PROFILE = 3, 4  # exit codes

FILES = {
    "config.json": (MODEL, MAX_BYTES),
    "tokenizer_config.json": (MODEL, MAX_LIST_BYTES),
    "special_tokens_map.json": (MODEL, MAX_LIST_BYTES),
    "tokenizer.json": (MODEL, 0),
    "model.safetensors.index.json": (MODEL, MAX_LIST_BYTES),
    "profile.json": (PROFILE, MAX_PROFILE_BYTES),
}
"""File: the exit code if it is damaged, and the most bytes it may have; 0 is not tested here."""

CONTENTS = {
    "empty": b"",
    "truncated": b'{"model_type": "bert", "weight_map": {"a": "b',
    "list": b"[]",
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deeper than needed": b'{"a":' * 100 + b"1" + b"}" * 100,
    "no UTF-8": b'{"model_type": "\xff"}',
    "long number": b'{"model_type": ' + b"9" * 5_000 + b"}",
    "huge": b"",
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]) -> Path:
    """A model in shards, with a profile beside it."""
    folder = make_toy(
        tmp_path_factory.mktemp("sharded"), "bert", tokenizers["bert"], max_shard="40KB"
    )
    (folder / "profile.json").write_text(json.dumps(profile()))
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(sharded, tmp_path / "m")


@pytest.fixture
def rank(capsys, monkeypatch) -> Callable[..., tuple[int, str]]:
    """Run ``echelon rank``: its exit code and what it says on standard error."""

    def run(folder: Path, *options: object) -> tuple[int, str]:
        flags = ("--model", folder, "--device", "cpu", "--threads", 1, "--quiet", *options)
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EchelonWarning)
            code, _, printed = run_command(capsys, monkeypatch, "rank", "q", "a", "b", *flags)
        assert len(printed) < MOST_SHOWN
        # transformers shows its progress on the same stream.
        errors = [line for line in printed.splitlines() if line.startswith("Error: ")]
        assert len(errors) == (code != 0)
        return code, "".join(errors)

    return run


def profile(**changes: Any) -> dict[str, Any]:
    names = ("model", "revision", "device", "device_name", "precision")
    content = {"schema": 1, "created": "", "precisions": [{"precision": "fp32"}]}
    content["key"] = dict.fromkeys(names, "x") | {"versions": {}}
    content["settings"] = {"precision": "fp32", "token_budget": NO_BUDGET}
    content["settings"] |= dict.fromkeys(("batch_size", "threads", "max_length"))
    return content | changes


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_model_before_it_is_damaged(folder, rank):
    assert rank(folder, "--profile", folder / "profile.json") == (0, "")


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(folder, rank, name, kind):
    code, limit = FILES[name]
    path = folder / name
    path.write_bytes(CONTENTS[kind])
    if kind == "huge":
        with path.open("wb") as file:
            file.truncate(limit + 1)
    found, error = rank(folder, "--profile", folder / "profile.json")
    assert found == code, error
    assert str(path) in error
    assert ("more than" in error) == (kind == "huge" and limit > 0)


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"\x3a" * 99_999, b"\x3a\x05\x0a\x03\x22"])
def test_damaged_graphs(tmp_path, tokenizers, rank, content):
    folder = shutil.copytree(tokenizers["bert"], tmp_path / "m")
    (folder / "model.onnx").write_bytes(content)
    code, error = rank(folder)
    assert (code, str(folder / "model.onnx") in error) == (MODEL, True), error


WRONG = (-3, 0, 10**7, 2**31, 10**30, 1.5, float("nan"), "3", "x" * 100_000, True, [5], {"a": 1})


@pytest.mark.parametrize("field", CONFIG)
def test_wrong_values_in_a_configuration(folder, rank, field):
    for value in WRONG:
        change(folder / "config.json", **{field: value})
        code, error = rank(folder)
        if not CONFIG[field].holds(value):
            assert (code, f"config.json: {field}: " in error) == (MODEL, True), (value, error)
        assert code in {0, 2, MODEL}, (value, error)


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("bert", {"num_labels": 3}, "num_labels: 3, but id2label names 1"),
        ("bert", {"id2label": {"0": "no", "2": "yes"}}, "does not name the labels 0 to 1"),
        ("bert", {"id2label": {"0": ["no"]}}, "does not name the labels 0 to 0"),
        ("bert", {"id2label": dict.fromkeys(map(str, range(20_000)), "x")}, "an object of 20000"),
        ("bert", {"hidden_size": None}, "hidden_size: it is missing"),
        ("roberta", {"pad_token_id": 4}, "pad_token_id: 4, but the tokenizer's pad_token has id"),
        ("bert", {"sep_token_id": 0}, "sep_token_id: 0, but the tokenizer's sep_token has id 3"),
        ("roberta", {"pad_token_id": 500}, "pad_token_id: 500"),
        ("bert", {"vocab_size": 5}, "has embeddings for 5 tokens: they do not belong together"),
        ("distilbert", {"dim": 10**6}, "hidden_size: 1000000 is not a whole number"),
        ("distilbert", {"n_layers": 1000}, "config.json describes a model of"),
        ("distilbert", {"hidden_dim": 2**20}, "config.json describes a model of"),
        ("distilbert", {"n_layers": "3"}, "cannot load it as a sequence classifier"),
        ("distilbert", {"n_heads": 0}, "cannot load it as a sequence classifier"),
        ("distilbert", {"max_position_embeddings": 131}, "the weights hold [130, "),
    ],
)
def test_values_that_contradict_others(toy, tmp_path, rank, family, values, words):
    folder = shutil.copytree(toy(family), tmp_path / "m")
    change(folder / "config.json", **values)
    code, error = rank(folder)
    assert (code, words in error) == (MODEL, True), error


def test_padding_that_nothing_is_counted_from(toy, tmp_path, rank):
    """Published models of BERT's kind with the tokenizer of XLM-RoBERTa have such a pair."""
    folder = shutil.copytree(toy("bert"), tmp_path / "m")
    change(folder / "config.json", pad_token_id=4)
    assert rank(folder) == (0, "")


@pytest.mark.parametrize(
    "values",
    [
        {"key": None},
        {"key": {"model": 5}},
        {"settings": {"precision": "fp32"}},
        *(
            {"settings": profile()["settings"] | {"token_budget": value}}
            for value in (-3, *WRONG[4:])
        ),
        {"learned_token_budget": -3},
        {"precisions": [5]},
        {"precisions": [{"keep_bf16": []}]},
        {"precisions": [{"precision": "int8", "keep_bf16": 5}]},
    ],
)
def test_wrong_values_in_a_profile(folder, rank, values):
    (folder / "profile.json").write_text(json.dumps(profile(**values)))
    code, error = rank(folder, "--profile", folder / "profile.json")
    assert (code, "incomplete profile" in error) == (PROFILE, True), error


@pytest.mark.parametrize("id_", [3000, 2**31, 2**32 - 1])
def test_token_ids_that_no_model_has(bert, tmp_path, rank, id_):
    folder = shutil.copytree(bert, tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zzz"] = id_
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, error = rank(folder)
    assert (code, f"id {id_}" in error) == (MODEL, True), error


CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Own: pass\n"

ATTEMPTS = """
import sys, warnings
from pathlib import Path
from echelon.integrations.sentence_transformers import CrossEncoder
from echelon.models.registry import open_scorer
from echelon.tokenization.tokenizer import PairEncoder

warnings.simplefilter("ignore")
path = Path(sys.argv[1])
original = CrossEncoder.__new__(CrossEncoder)
original._located = type("Located", (), {"path": path})
for attempt in (
    lambda: PairEncoder(path),
    lambda: open_scorer(path),
    lambda: original.config,
    lambda: original.tokenizer,
):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__)
"""


def test_code_beside_a_model_is_never_run_and_never_asked_about(tmp_path):
    own = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    own["AutoTokenizer"] = ["own.Own", None]
    folder = make_toy(tmp_path, "distilbert", None, vocab_size=150)
    change(folder / "config.json", model_type="own", auto_map=own)
    settings = {"tokenizer_class": "Own", "auto_map": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (folder / "own.py").write_text(CODE)
    ran = run_python(ATTEMPTS, folder, stdin="y\n" * 20, HF_MODULES_CACHE=str(tmp_path / "cache"))
    kinds = ["BadCheckpoint", "UnsupportedModel", "ValueError", "ValueError"]
    assert ran.stdout.split() == kinds, ran.stderr
    assert not list(tmp_path.rglob("ran"))
