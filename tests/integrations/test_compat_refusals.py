"""``echelon.integrations.CrossEncoder``: what it refuses, and where models come from."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cross_encoders import (
    DOCUMENTS,
    PAIRS,
    QUERY,
    same,
    variant,
)
from helpers import make_toy, run_python
from sentence_transformers import CrossEncoder as Original

from echelon import Reranker
from echelon.errors import (
    BadCheckpoint,
    EchelonWarning,
    InvalidInput,
    ModelNotFound,
    UnsupportedModel,
)
from echelon.integrations import CrossEncoder
from echelon.integrations.originals import read_saved

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def both(bert: Path) -> tuple[CrossEncoder, Original]:
    """Echelon's and the original."""
    return CrossEncoder(bert, device="cpu"), Original(str(bert), device="cpu")


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code.*never runs code"),
        ({"backend": "onnx"}, "backend.*stay with"),
        ({"modules": [torch.nn.Identity()]}, "modules.*save_pretrained"),
        ({"model_card_data": {"language": "en"}}, "model_card_data"),
        ({"keep_in_fp32_modules": ["classifier"]}, "keep_in_fp32_modules.*always"),
        ({"classifier_dropout": 0.1}, "classifier_dropout.*training"),
        ({"num_labels": 3}, "num_labels.*trained with 1"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, r"model_kwargs\['attn_impl"),
        ({"model_kwargs": {"dtype": "float8"}}, "float8"),
        ({"model_kwargs": {"dtype": "float16"}, "precision": "fp16"}, "more than once"),
        ({"model_kwargs": {"dtype": "float16", "torch_dtype": "float16"}}, "more than once"),
        ({"processor_kwargs": {"padding_side": "left"}}, r"processor_kwargs\['padding_side"),
        ({"config_kwargs": {"hidden_size": 3}}, r"config_kwargs\['hidden_size"),
        ({"activation_fn": "sigmoid"}, "activation_fn.*not callable"),
        ({"max_lenght": 12}, "max_lenght: unknown option. Did you mean 'max_length'"),
        ({"device": "tpu"}, "device"),
    ],
    ids=str,
)
def test_the_constructor_refuses(bert: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        CrossEncoder(bert, **{"device": "cpu", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": {"processes": []}}, "pool.*process for each device"),
        ({"device": ["cpu", "cpu"]}, "pool.*process for each device"),
        ({"chunk_size": 10}, "chunk_size.*Leave it out"),
        ({"processing_kwargs": {"text": {}}}, "processing_kwargs.*max_length"),
        ({"batch_sise": 3}, "batch_sise"),
        ({"batch_size": 0}, "batch_size"),
        ({"activation_fn": 3}, "activation_fn"),
        ({"prompt": 3}, "prompt"),
    ],
    ids=str,
)
def test_calls_refuse(
    both: tuple[CrossEncoder, Original], options: dict[str, Any], message: str
) -> None:
    ours, _ = both

    with pytest.raises(InvalidInput, match=message):
        ours.predict(PAIRS, **options)
    with pytest.raises(InvalidInput, match=message):
        ours.rank(QUERY, DOCUMENTS, **options)


@pytest.mark.parametrize(
    "inputs", ["text", 3, None, {"a": "b"}, ["a", "b", "c"], [("a", "b", "c")], [("a", 3)]]
)
def test_what_is_no_pair_is_refused(both: tuple[CrossEncoder, Original], inputs: Any) -> None:
    with pytest.raises(InvalidInput):
        both[0].predict(inputs)


@pytest.mark.parametrize("documents", ["text", 3, None, [3], {"a": "b"}])
def test_what_is_no_list_of_documents_is_refused(
    both: tuple[CrossEncoder, Original], documents: Any
) -> None:
    with pytest.raises(InvalidInput):
        both[0].rank(QUERY, documents)


def test_ignored_in_predict_too(both: tuple[CrossEncoder, Original]) -> None:
    with pytest.warns(EchelonWarning, match="num_workers"):
        same(both[0].predict(PAIRS, num_workers=0), both[1].predict(PAIRS))


@pytest.mark.parametrize("name", ["fit", "save_pretrained", "start_multi_process_pool", "foo"])
def test_methods_that_are_not_there_say_why(both: tuple[CrossEncoder, Original], name: str) -> None:
    assert not hasattr(both[0], name)
    with pytest.raises(AttributeError, match=rf"CrossEncoder\.{name}: .*(Use|Start)"):
        getattr(both[0], name)


def test_several_labels_need_a_choice(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    folder = make_toy(tmp_path / "three", "bert", tokenizers["bert"], labels=3)

    with pytest.raises(InvalidInput, match="label: the model's head has 3 labels"):
        CrossEncoder(folder, device="cpu")

    theirs = Original(str(folder), device="cpu").predict(PAIRS)
    chosen = CrossEncoder(folder, device="cpu", label=1, num_labels=3)
    assert chosen.num_labels == 3
    same(chosen.predict(PAIRS), theirs[:, 1])


# --- where models come from


def test_only_parts_that_would_run_are_loaded(tmp_path: Path, bert: Path) -> None:
    folder = variant(tmp_path / "model", bert)
    modules = [
        {"type": "Transformer", "path": ""},
        {"type": "Pooling", "path": "1_Pooling"},
        {"type": "Dense", "path": "2_Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    dense: dict[str, Any] = {"in_features": 4, "out_features": 1, "module_output_name": "scores"}
    for name, settings in (("1_Pooling", {"pooling_mode": "cls"}), ("2_Dense", dense)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(settings))

    for opening in (CrossEncoder, Reranker):
        with pytest.raises(UnsupportedModel, match=r"modules\.json: lists modules besides"):
            opening(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *(("modules.json", content, "") for content in ("{}", "[5]", "5", "[" * 99_999)),
        ("config_sentence_transformers.json", '{"prompts": ["a"]}', "prompts: .* an object of tex"),
        ("config_sentence_transformers.json", '{"prompts": {"a": 5}}', "prompts: .* an object of"),
        ("config_sentence_transformers.json", '{"default_prompt_name": 5}', "5 is not text"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "a"}', "'a' is none of its"),
        ("sentence_bert_config.json", '{"do_lower_case": "no"}', "'no' is not true or false"),
        ("sentence_bert_config.json", '{"max_seq_length": 0}', "0 is not a whole number"),
        ("tokenizer_config.json", '{"model_max_length": -1}', "model_max_length: -1 is not at le"),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length: nan is not"),
    ],
)
def test_saved_settings_of_another_kind_are_named(tmp_path, bert, name, content, words) -> None:
    folder = variant(tmp_path / "model", bert)
    (folder / "modules.json").write_text('[{"path": ""}]')
    (folder / name).write_text(content)
    with pytest.raises(BadCheckpoint, match=rf"{name}: .*{words}"):
        read_saved(folder)


@pytest.mark.parametrize("limit", ["1e30", "1000000000000000019884624838656", "Infinity", "null"])
def test_a_tokenizer_without_limit(tmp_path, bert, limit) -> None:
    folder = variant(tmp_path / "model", bert)
    (folder / "tokenizer_config.json").write_text(f'{{"model_max_length": {limit}}}')
    assert read_saved(folder).max_length in {None, 2**31 - 1}


def test_a_model_out_of_a_hub_cache(tmp_path: Path, bert: Path) -> None:
    commit = "a1" * 20
    home = tmp_path / "cache" / "models--someone--toy"
    shutil.copytree(bert, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    where = {"cache_folder": str(tmp_path / "cache"), "local_files_only": True, "device": "cpu"}

    ours = CrossEncoder("someone/toy", **where)

    same(ours.predict(PAIRS), Original(str(bert), device="cpu").predict(PAIRS))
    with pytest.raises(ModelNotFound, match="someone/other could not be fetched"):
        CrossEncoder("someone/other", **where)
    with pytest.raises(ModelNotFound, match="cross-encoder/toy could not be fetched"):
        CrossEncoder("toy", **where)


def test_a_hub_model_is_asked_for_once(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from echelon.models.hub import ModelFolder

    asked: list[tuple[str, str | None]] = []

    def resolve(name: str, *, revision: str | None = None, **_: Any) -> ModelFolder:
        asked.append((name, revision))
        return ModelFolder(bert, name, "c0ffee")

    monkeypatch.setattr("echelon.integrations.originals.resolve", resolve)
    monkeypatch.setattr("echelon.engine.launch.resolve", resolve)
    model = CrossEncoder("toy", revision="main", device="cpu")

    # The second time by the commit that the first one found, which the cache answers.
    assert asked == [("cross-encoder/toy", "main"), ("cross-encoder/toy", "c0ffee")]
    model.half()
    assert asked[2:] == [("cross-encoder/toy", "c0ffee")]


@pytest.mark.parametrize("files", [["model.safetensors", "config.json"], ["README.md"]])
def test_a_token_or_cache_reaches_the_hub(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    from types import SimpleNamespace

    asked: dict[str, Any] = {}

    def model_info(hub: Any, repo: str, revision: str | None) -> Any:
        asked["info"] = (hub.token, repo, revision)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(repo: str, **options: Any) -> str:
        asked["files"] = (repo, options)
        return str(bert)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    options = {"token": "secret", "cache_dir": tmp_path, "revision": "v1", "device": "cpu"}

    if "README.md" in files:
        with pytest.raises(UnsupportedModel, match="no weights"):
            CrossEncoder("toy", **options)
        return
    CrossEncoder("toy", **options)
    assert asked["info"] == ("secret", "cross-encoder/toy", "v1")
    assert asked["files"][1]["cache_dir"] == tmp_path
    assert asked["files"][1]["token"] == "secret"
    assert set(asked["files"][1]["allow_patterns"]) == set(files)


@pytest.mark.parametrize("name", [None, 3])
def test_no_name_of_a_model(name: Any) -> None:
    with pytest.raises(InvalidInput, match="model_name_or_path"):
        CrossEncoder(name)


def test_importing_loads_no_heavy_library() -> None:
    done = run_python(
        "import sys, echelon.integrations; "
        "from echelon.integrations import CrossEncoder, FlagReranker; "
        "print(sorted({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    )

    assert done.stdout.strip() == "[]", done.stderr


def test_only_the_two_classes_are_offered() -> None:
    import echelon.compat

    with pytest.raises(AttributeError, match="FlagLLMReranker"):
        _ = echelon.integrations.FlagLLMReranker
