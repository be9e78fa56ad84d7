"""What callers may get wrong: one clear error each, with the field and the remedy."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers import make_toy, save_tokenizer, words

from echelon import (
    BadCheckpoint,
    EchelonError,
    InvalidInput,
    ModelNotFound,
    Reranker,
    UnsupportedModel,
)


@pytest.fixture(scope="module")
def reranker(bert):
    with Reranker(bert, device="cpu", precision="fp32", threads=1) as opened:
        yield opened


@pytest.fixture
def copied(bert, tmp_path):
    """A copy of the toy BERT to spoil."""
    return shutil.copytree(bert, tmp_path / "model")


def reconfigure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(kind: type[EchelonError], call) -> EchelonError:
    """The error of exactly this kind, which says more than its name."""
    with pytest.raises(EchelonError) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    assert str(caught.value).count(". ") or str(caught.value).endswith(".")
    return caught.value


# Models


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "no/such/folder/here"])
def test_no_such_model(name):
    error = refusal(ModelNotFound, lambda: Reranker(name))
    assert name in str(error)
    assert "hub" in str(error)


def test_a_folder_without_weights(copied):
    (copied / "model.safetensors").unlink()
    error = refusal(ModelNotFound, lambda: Reranker(copied))
    assert "no weights there (looked for model.safetensors and pytorch_model.bin" in str(error)


def test_an_empty_folder(tmp_path):
    error = refusal(ModelNotFound, lambda: Reranker(tmp_path))
    assert "no config.json there, so it is not a model folder" in str(error)


def test_truncated_safetensors(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = refusal(BadCheckpoint, lambda: Reranker(copied))
    assert "damaged or cut short" in str(error)
    assert "Download the model again" in str(error)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"model_type": 5}', "{}", "\x00"])
def test_a_config_that_is_none(copied, content):
    (copied / "config.json").write_text(content)
    error = refusal(BadCheckpoint, lambda: Reranker(copied))
    assert str(copied / "config.json") in str(error)


def test_a_config_in_another_encoding(copied):
    (copied / "config.json").write_bytes('{"model_type": "bért"}'.encode("latin-1"))
    assert "not JSON" in str(refusal(BadCheckpoint, lambda: Reranker(copied)))


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 96}, {"num_hidden_layers": 2}, {"num_hidden_layers": 5}]
)
def test_a_config_that_does_not_match_its_tensors(copied, changes):
    reconfigure(copied, **changes)
    error = refusal(BadCheckpoint, lambda: Reranker(copied))
    assert "Use the config.json that came with these weights" in str(error)


def test_an_unknown_architecture(copied):
    reconfigure(copied, model_type="perceptron-9000")
    error = refusal(UnsupportedModel, lambda: Reranker(copied))
    assert "perceptron-9000" in str(error)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_a_model_without_classification_head(copied, kind):
    reconfigure(copied, architectures=[kind])
    error = refusal(UnsupportedModel, lambda: Reranker(copied))
    assert f"a {kind} has no classification head" in str(error)


def test_a_head_missing_from_the_weights(copied):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    error = refusal(BadCheckpoint, lambda: Reranker(copied))
    assert "the weights hold no tensor classifier.weight" in str(error)


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory, tokenizers):
    """A toy BERT whose head names three labels."""
    folder = make_toy(tmp_path_factory.mktemp("labels"), "bert", tokenizers["bert"], labels=3)
    reconfigure(folder, id2label={"0": "contradiction", "1": "entailment", "2": "neutral"})
    return folder


def test_several_labels_and_none_chosen(three_labels):
    error = refusal(InvalidInput, lambda: Reranker(three_labels))
    assert error.field == "label"
    assert "0=contradiction, 1=entailment, 2=neutral" in error.problem
    assert "label='neutral'" in error.remedy


@pytest.mark.parametrize("label", ["maybe", 3, -1, "3", 1.0, True, ""])
def test_a_label_that_is_not_there(three_labels, label):
    error = refusal(InvalidInput, lambda: Reranker(three_labels, label=label))
    assert error.field == "label"
    assert "contradiction" in error.remedy


def test_labels_by_name_and_by_number(three_labels):
    scores = [
        Reranker(three_labels, device="cpu", threads=1, label=label).score([("a", "b")])[0]
        for label in ("entailment", 1, "1", "neutral")
    ]
    assert scores[0] == scores[1] == scores[2] != scores[3]


def test_a_tokenizer_whose_ids_exceed_the_vocabulary(tmp_path, tokenizers):
    folder = make_toy(tmp_path, "bert", tokenizers["bert"], vocab_size=60)
    error = refusal(BadCheckpoint, lambda: Reranker(folder))
    assert "embeddings for 60 tokens: they do not belong together" in str(error)


def test_a_missing_tokenizer(copied):
    (copied / "tokenizer.json").unlink()
    error = refusal(BadCheckpoint, lambda: Reranker(copied))
    assert "no tokenizer.json and no vocabulary file" in str(error)


def test_a_damaged_tokenizer(copied):
    (copied / "tokenizer.json").write_text("{")
    error = refusal(BadCheckpoint, lambda: Reranker(copied))
    assert "not a readable tokenizer" in str(error)


@pytest.mark.parametrize("model", [None, 3, b"demo", ["demo"], "", " "])
def test_what_is_no_model_at_all(model):
    assert refusal(InvalidInput, lambda: Reranker(model)).field == "model"


# Texts


def test_documents_given_as_one_string(reranker):
    error = refusal(InvalidInput, lambda: reranker.rank("q", "one document"))
    assert str(error) == "documents: is str, not a list. Pass a list of strings."


@pytest.mark.parametrize("documents", [None, 3, {"a": 1}, {"a"}, b"bytes", iter(["a"])])
def test_documents_that_are_no_list(reranker, documents):
    assert refusal(InvalidInput, lambda: reranker.rank("q", documents)).field == "documents"


@pytest.mark.parametrize("document", [None, 3, b"bytes", {"text": "a"}, ["a"], float("nan")])
def test_documents_that_are_no_strings(reranker, document):
    error = refusal(InvalidInput, lambda: reranker.rank("q", ["fine", document]))
    assert error.field == "documents[1]"
    assert "not a string" in error.problem


@pytest.mark.parametrize("query", [None, 3, b"bytes", ["q"]])
def test_queries_that_are_no_strings(reranker, query):
    assert refusal(InvalidInput, lambda: reranker.rank(query, ["a"])).field == "query"


def test_lone_surrogates(reranker):
    error = refusal(InvalidInput, lambda: reranker.rank("q", ["fine", "bad \ud83d here"]))
    assert error.field == "documents[1]"
    assert "lone surrogate at character 4" in error.problem
    assert "clean it" in error.remedy
    assert refusal(InvalidInput, lambda: reranker.rank("\udfff", ["a"])).field == "query"
    error = refusal(InvalidInput, lambda: reranker.score([("a", "b"), ("a", "\ud800")]))
    assert error.field == "pairs[1].document"


@pytest.mark.parametrize("pairs", [None, 3, "query", b"ab"])
def test_pairs_that_are_no_list(reranker, pairs):
    assert refusal(InvalidInput, lambda: reranker.score(pairs)).field == "pairs"


@pytest.mark.parametrize("pair", ["ab", ("a",), ("a", "b", "c"), None, {"a": "b"}, 7])
def test_pairs_that_are_no_pairs(reranker, pair):
    assert refusal(InvalidInput, lambda: reranker.score([("a", "b"), pair])).field == "pairs[1]"


@pytest.mark.parametrize(
    ("pair", "field"),
    [
        ((1, "b"), "pairs[0].query"),
        (("a", None), "pairs[0].document"),
        ([b"", ""], "pairs[0].query"),
    ],
)
def test_pairs_of_other_things(reranker, pair, field):
    assert refusal(InvalidInput, lambda: reranker.score([pair])).field == field


def test_strings_of_other_classes_are_strings(reranker):
    class Text(str):
        __slots__ = ()

    assert len(reranker.score([(np.str_("a"), Text("b"))])) == 1


def test_a_query_longer_than_max_length(reranker):
    def call():
        reranker.rank(words(200), ["a b c"], truncation="only_second")

    error = refusal(InvalidInput, call)
    assert error.field == "pairs[0].query"
    assert "max_length=130" in error.problem
    assert "longest_first" in error.remedy


@pytest.mark.parametrize("top_n", [0, -1, 1.5, "3", True])
def test_top_n(reranker, top_n):
    assert refusal(InvalidInput, lambda: reranker.rank("q", ["a"], top_n=top_n)).field == "top_n"


# Options


@pytest.mark.parametrize("max_length", [131, 8192])
def test_max_length_beyond_the_model(bert, reranker, max_length):
    for call in (
        lambda: Reranker(bert, max_length=max_length),
        lambda: reranker.rank("q", ["a"], max_length=max_length),
    ):
        error = refusal(InvalidInput, call)
        assert error.field == "max_length"
        assert f"{max_length} is beyond the model's 130 tokens" in error.problem
        assert error.remedy == "Use at most 130."


@pytest.mark.parametrize("max_length", [1, 3])
def test_max_length_too_small(bert, reranker, max_length):
    for call in (
        lambda: Reranker(bert, max_length=max_length),
        lambda: reranker.rank("q", ["a"], max_length=max_length),
    ):
        error = refusal(InvalidInput, call)
        assert (error.field, error.remedy) == ("max_length", "Use at least 4.")
    assert len(reranker.rank("q", ["a"], max_length=4).results) == 1


def test_an_unknown_option(bert, reranker):
    error = refusal(InvalidInput, lambda: Reranker(bert, bach_size=8))
    assert (error.field, error.remedy) == ("bach_size", "Did you mean 'batch_size'?")
    error = refusal(InvalidInput, lambda: Reranker(bert, zzz=8))
    assert "Known: device, precision" in error.remedy
    error = refusal(InvalidInput, lambda: reranker.rank("q", ["a"], tokn_budget=8))
    assert error.field == "tokn_budget"
    assert "token_budget" in error.remedy


@pytest.mark.parametrize(
    ("option", "value"),
    [("token_budget", 0), ("batch_size", True), ("max_length", "20"), ("truncation", "middle")],
)
def test_a_wrong_override(reranker, option, value):
    error = refusal(InvalidInput, lambda: reranker.rank("q", ["a"], **{option: value}))
    assert error.field == option


def test_a_tokenizer_alone_is_no_model(tmp_path):
    save_tokenizer(tmp_path, "bert")
    error = refusal(ModelNotFound, lambda: Reranker(tmp_path))
    assert "config.json" in str(error)
