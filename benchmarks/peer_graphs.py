"""Model folder to the graphs that ONNX Runtime and OpenVINO run. One step a call.

A script for the environment that has the exporter; the result is kept, for exporting is slow.

    python peer_graphs.py STEP FOLDER GRAPHS [--calibration FILE]

STEP is the name of a function here, with dashes; it fills the folder GRAPHS/STEP.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

OPSET = 17
CALIBRATION_LENGTH = 256


def onnx_plain(folder: Path, _graphs: Path, out: Path) -> None:
    """Export with optimum."""
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = ORTModelForSequenceClassification.from_pretrained(folder, export=True)
    model.save_pretrained(out)


def onnx_fused(folder: Path, graphs: Path, out: Path) -> None:
    """Attention, GELU and layer norm fused by onnxruntime.transformers."""
    from onnxruntime.transformers.optimizer import optimize_model

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    optimized = optimize_model(
        str(graphs / "onnx-plain" / "model.onnx"),
        model_type="bert",
        num_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"],
        opt_level=0,
    )
    print(optimized.get_fused_operator_statistics())
    optimized.save_model_to_file(str(out / "model.onnx"), use_external_data_format=True)


def onnx_int8(_folder: Path, graphs: Path, out: Path) -> None:
    """Dynamic int8 of the exported graph, one scale a weight."""
    _quantize(graphs / "onnx-plain", out, per_channel=False)


def onnx_int8_channel(_folder: Path, graphs: Path, out: Path) -> None:
    """Dynamic int8 of the exported graph, one scale a channel."""
    _quantize(graphs / "onnx-plain", out, per_channel=True)


def onnx_fused_int8(_folder: Path, graphs: Path, out: Path) -> None:
    """Dynamic int8 of the fused graph, one scale a weight."""
    _quantize(graphs / "onnx-fused", out, per_channel=False)


def _quantize(graph: Path, out: Path, *, per_channel: bool) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        graph / "model.onnx",
        out / "model.onnx",
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        # Shape inference stops at fused nodes; what they give is float.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def infinity_onnx(folder: Path, graphs: Path, out: Path) -> None:
    """A folder as infinity's optimum engine wants it, with the quantised graph."""
    quantized = graphs / "onnx-int8"
    for file in quantized.iterdir():
        named = "model_quantized.onnx" if file.name == "model.onnx" else file.name
        (out / named).symlink_to(file.resolve())
    _copy_settings(folder, out)


def st_onnx_plain(folder: Path, graphs: Path, out: Path) -> None:
    """The exported graph where sentence-transformers looks for it."""
    (out / "onnx").mkdir()
    for file in (graphs / "onnx-plain").glob("model.onnx*"):
        (out / "onnx" / file.name).symlink_to(file.resolve())
    _copy_settings(folder, out)


def st_onnx_o3(folder: Path, graphs: Path, out: Path) -> None:
    """What export_optimized_onnx_model(…, "O3") does, without loading the model beside it."""
    from optimum.onnxruntime import ORTOptimizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig

    with _own_copy(graphs / "onnx-plain") as plain:
        optimizer = ORTOptimizer.from_pretrained(plain, file_names=["model.onnx"])
        optimizer.optimize(AutoOptimizationConfig.O3(), out / "onnx", file_suffix="O3")
    _copy_settings(folder, out)


def st_onnx_int8(folder: Path, graphs: Path, out: Path) -> None:
    """What export_dynamic_quantized_onnx_model(…, "avx512_vnni") does, likewise."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    config = AutoQuantizationConfig.avx512_vnni(is_static=False)
    with _own_copy(graphs / "onnx-plain") as plain:
        quantizer = ORTQuantizer.from_pretrained(plain, file_name="model.onnx")
        quantizer.quantize(quantization_config=config, save_dir=out / "onnx", file_suffix="qint8")
    _copy_settings(folder, out)


@contextmanager
def _own_copy(graph: Path) -> Iterator[Path]:
    """A copy to work on: optimum removes the weights file beside a large graph that it has read."""
    with tempfile.TemporaryDirectory(dir=graph.parent) as scratch:
        yield Path(shutil.copytree(graph, Path(scratch) / "copy"))


def openvino_plain(folder: Path, _graphs: Path, out: Path) -> None:
    """Export with optimum-intel, weights as they are."""
    from optimum.intel import OVModelForSequenceClassification

    model = OVModelForSequenceClassification.from_pretrained(
        folder, export=True, compile=False, load_in_8bit=False
    )
    model.save_pretrained(out)
    _copy_settings(folder, out)


def openvino_int8(folder: Path, graphs: Path, out: Path, calibration: list[Any]) -> None:
    """Static quantisation of weights and activations by nncf, with SmoothQuant."""
    import nncf
    import openvino as ov
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ov.Core().read_model(graphs / "openvino-plain" / "openvino_model.xml")
    names = {port.get_any_name() for port in model.inputs}

    def encode(pair: list[str]) -> dict[str, Any]:
        encoded = tokenizer(
            *pair, truncation=True, max_length=CALIBRATION_LENGTH, return_tensors="np"
        )
        return {name: encoded[name] for name in names}

    quantized = nncf.quantize(
        model,
        nncf.Dataset(calibration, encode),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calibration),
    )
    ov.save_model(quantized, out / "openvino_model.xml", compress_to_fp16=False)
    _copy_settings(folder, out)


def openvino_int8_weights(folder: Path, graphs: Path, out: Path) -> None:
    """Weights in int8 a channel; the runtime can quantise activations as they come."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(graphs / "openvino-plain" / "openvino_model.xml")
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    ov.save_model(compressed, out / "openvino_model.xml", compress_to_fp16=False)
    _copy_settings(folder, out)


def _copy_settings(folder: Path, out: Path) -> None:
    for file in folder.iterdir():
        if file.suffix in {".json", ".txt"} and not (out / file.name).exists():
            shutil.copy(file, out)


STEPS = {
    step.__name__.replace("_", "-"): step
    for step in (
        onnx_plain,
        onnx_fused,
        onnx_int8,
        onnx_int8_channel,
        onnx_fused_int8,
        infinity_onnx,
        st_onnx_plain,
        st_onnx_o3,
        st_onnx_int8,
        openvino_plain,
        openvino_int8,
        openvino_int8_weights,
    )
}


def main() -> None:
    """Run one step; its folder appears whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("--calibration", type=Path, help="JSON list of pairs, for static int8")
    given = parser.parse_args()
    more = {}
    if given.step == "openvino-int8":
        more["calibration"] = json.loads(given.calibration.read_text(encoding="utf-8"))
    out = Path(tempfile.mkdtemp(prefix=f".{given.step}-", dir=given.graphs))
    try:
        STEPS[given.step](given.folder, given.graphs, out, **more)
        out.rename(given.graphs / given.step)
    finally:
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
