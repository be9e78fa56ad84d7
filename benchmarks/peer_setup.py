"""Which engines are compared, and what each needs: an environment, graphs, memory.

An environment is a virtual environment of its own where an engine's pins demand one, made once
and kept under the cache folder. What cannot be installed or exported is a result, not an error.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from peer_engines import NOTES
from peer_models import CACHE
from peer_worker import ENVIRONMENT, EngineFailed, last_line

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")

HERE = Path(__file__).parent
PRECISIONS = ("fp32", "bf16", "int8")
PROJECT = "project"
CALIBRATION_PAIRS = 64

TORCH = "torch==2.13.0"
"""Pinned everywhere: the project's own version, of which pip finds a build for processors."""

ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "onnx": (TORCH, "sentence-transformers[onnx]"),
    "openvino": (TORCH, "sentence-transformers[openvino]", "nncf"),
    # The last releases with BetterTransformer, infinity's default for this kind of model; their
    # ONNX part does not run with this torch.
    "infinity": (TORCH, "infinity-emb[torch]", "optimum<2", "transformers<4.49"),
    "infinity-onnx": (TORCH, "infinity-emb[torch,optimum]"),
}
"""What pip installs, by environment; :data:`PROJECT` is the environment that runs this."""

UNWANTED = {"openvino": ("torchvision",)}
"""Dependencies that nothing here uses and whose build does not fit a torch for processors."""

SHOWN_VERSIONS = (
    "echelon-rerank",
    "FlagEmbedding",
    "infinity_emb",
    "nncf",
    "numpy",
    "onnxruntime",
    "openvino",
    "optimum",
    "optimum-intel",
    "optimum-onnx",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)

PAIR_SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKEN_SIZES = (512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine to measure.

    Attributes:
        name: in the results.
        kind: class in :mod:`peer_engines`.
        precision: in which most of it computes.
        options: it is opened with.
        alternatives: other options worth a try; the fastest are used.
        environment: of :data:`ENVIRONMENTS`, or :data:`PROJECT`.
        graphs: steps of :mod:`peer_graphs` that it needs, in order.
        weights: memory it needs, in sizes of the fp32 weights.
    """

    name: str
    kind: str
    precision: str
    options: dict[str, Any]
    alternatives: tuple[dict[str, Any], ...] = ()
    environment: str = PROJECT
    graphs: tuple[str, ...] = ()
    weights: float = field(default=1.2)

    @property
    def ours(self) -> bool:
        """Whether it is Echelon."""
        return self.kind == "Echelon"

    @property
    def unit(self) -> str:
        """What its step size counts."""
        return "tokens" if self.ours else "pairs"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Step sizes to choose from."""
        return TOKEN_SIZES if self.ours else PAIR_SIZES

    @property
    def note(self) -> str:
        """Its flags, in words."""
        return NOTES[self.kind]


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SIZES_OF_WEIGHTS = {"fp32": 1.2, "bf16": 0.7, "int8": 0.6}


def _torch(name: str, kind: str, precision: str) -> Engine:
    eager = ({"attention": "eager"},) if kind == "Transformers" else ()
    eager = ({"attn_implementation": "eager"},) if kind == "SentenceTransformers" else eager
    return Engine(
        f"{name} {precision}",
        kind,
        precision,
        {"dtype": DTYPES[precision]},
        eager,
        weights=SIZES_OF_WEIGHTS[precision] * (2 if kind == "TransformersCompiled" else 1),
    )


_PLAIN, _FUSED = ("onnx-plain",), ("onnx-plain", "onnx-fused")
_INT8 = ("onnx-plain", "onnx-fused", "onnx-int8", "onnx-int8-channel", "onnx-fused-int8")
_OPENVINO = ("openvino-plain",)
_OPENVINO_INT8 = ("openvino-plain", "openvino-int8", "openvino-int8-weights")

ENGINES: tuple[Engine, ...] = (
    *(
        Engine(
            f"echelon {precision}",
            "Echelon",
            precision,
            {"precision": precision, "unit": "tokens"},
            weights=SIZES_OF_WEIGHTS[precision],
        )
        for precision in PRECISIONS
    ),
    *(_torch("transformers", "Transformers", precision) for precision in DTYPES),
    *(_torch("transformers compiled", "TransformersCompiled", precision) for precision in DTYPES),
    *(_torch("sentence-transformers", "SentenceTransformers", precision) for precision in DTYPES),
    Engine(
        "sentence-transformers onnx fp32",
        "SentenceTransformersOnnx",
        "fp32",
        {"graph": "st-onnx-o3"},
        ({"graph": "st-onnx-plain"},),
        "onnx",
        ("onnx-plain", "st-onnx-plain", "st-onnx-o3"),
        2.0,
    ),
    Engine(
        "sentence-transformers onnx int8",
        "SentenceTransformersOnnx",
        "int8",
        {"graph": "st-onnx-int8"},
        (),
        "onnx",
        ("onnx-plain", "st-onnx-int8"),
        0.6,
    ),
    *(
        Engine(
            f"sentence-transformers openvino {precision}",
            "SentenceTransformersOpenVino",
            precision,
            {
                "graph": "openvino-int8" if precision == "int8" else "openvino-plain",
                "precision": "f32" if precision == "fp32" else "bf16",
            },
            (),
            "openvino",
            _OPENVINO_INT8 if precision == "int8" else _OPENVINO,
            0.8 if precision == "int8" else 2.0,
        )
        for precision in PRECISIONS
    ),
    *(_torch("FlagReranker", "Flag", precision) for precision in DTYPES),
    *(
        Engine(
            f"infinity {precision}",
            "Infinity",
            precision,
            {"dtype": dtype, "bettertransformer": True},
            ({"bettertransformer": False},),
            "infinity",
            (),
            SIZES_OF_WEIGHTS[precision],
        )
        for precision, dtype in DTYPES.items()
    ),
    Engine(
        "infinity onnx int8",
        "InfinityOnnx",
        "int8",
        {},
        (),
        "infinity-onnx",
        ("onnx-plain", "onnx-int8", "infinity-onnx"),
        0.6,
    ),
    Engine(
        "onnxruntime fp32",
        "OnnxRuntime",
        "fp32",
        {"graph": "onnx-fused"},
        ({"graph": "onnx-plain"},),
        "onnx",
        _FUSED,
        2.0,
    ),
    Engine(
        "onnxruntime int8",
        "OnnxRuntime",
        "int8",
        {"graph": "onnx-fused-int8"},
        ({"graph": "onnx-int8"}, {"graph": "onnx-int8-channel"}),
        "onnx",
        _INT8,
        0.6,
    ),
    Engine(
        "openvino bf16",
        "OpenVino",
        "bf16",
        {"graph": "openvino-plain"},
        ({"hint": "THROUGHPUT"},),
        "openvino",
        _OPENVINO,
        2.0,
    ),
    Engine(
        "openvino int8",
        "OpenVino",
        "int8",
        {"graph": "openvino-int8"},
        (
            {"hint": "THROUGHPUT"},
            {"graph": "openvino-int8-weights", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"},
        ),
        "openvino",
        _OPENVINO_INT8,
        0.8,
    ),
)


def environment(name: str) -> Path:
    """The interpreter of an environment, made if it is not there.

    Raises:
        EngineFailed: pip could not install it.
    """
    if name == PROJECT:
        return Path(sys.executable)
    _make_environment(name)
    return CACHE / name / "bin" / "python"


def versions(name: str) -> dict[str, str]:
    """Versions of :data:`SHOWN_VERSIONS` in an environment, those installed."""
    script = (
        "import importlib.metadata as m, json, sys\n"
        "there = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: there[n.lower()] for n in sys.argv[1:] if n.lower() in there}))"
    )
    command = [environment(name), "-c", script, *SHOWN_VERSIONS]
    answer = subprocess.run(command, capture_output=True, check=True)
    return json.loads(answer.stdout)


def graphs_of(model: Path) -> Path:
    """Folder of a model's graphs."""
    folder = CACHE / "graphs" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare(engine: Engine, model: Path) -> Path:
    """Make what an engine needs; its interpreter.

    Raises:
        EngineFailed: it cannot be had here; the reason in one line.
    """
    for step in engine.graphs:
        _make_graph(step, model)
    return environment(engine.environment)


def _calibration() -> Path:
    """Echelon's built-in texts, in two languages: none of the pairs that are measured."""
    from echelon.data import load_texts

    path = CACHE / "calibration.json"
    path.write_text(json.dumps(load_texts().sample(CALIBRATION_PAIRS)), encoding="utf-8")
    return path


def _once(make: Callable[P, None]) -> Callable[P, None]:
    """Try something slow once, and fail again for the same reason when asked again."""
    outcomes: dict[Any, EngineFailed | None] = {}

    @wraps(make)
    def tried(*args: P.args, **kwargs: P.kwargs) -> None:
        if args not in outcomes:
            outcomes[args] = None
            try:
                make(*args, **kwargs)
            except EngineFailed as error:
                outcomes[args] = error
        if outcomes[args] is not None:
            raise outcomes[args]

    return tried


@_once
def _make_environment(name: str) -> None:
    folder, log = CACHE / name, CACHE / f"{name}.log"
    done, wanted = folder / "installed.txt", "\n".join(ENVIRONMENTS[name])
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    _command([*pip, "install", "-q", *ENVIRONMENTS[name]], log, f"installing {name}")
    if name in UNWANTED:
        _command([*pip, "uninstall", "-q", "-y", *UNWANTED[name]], log, f"installing {name}")
    done.write_text(wanted, encoding="utf-8")


@_once
def _make_graph(step: str, model: Path) -> None:
    graphs = graphs_of(model)
    if (graphs / step).exists():
        return
    python = environment("openvino" if step.startswith("openvino") else "onnx")
    script = [python, HERE / "peer_graphs.py", step, model, graphs]
    _command([*script, "--calibration", _calibration()], graphs / f"{step}.log", f"making {step}")


def _command(command: list[Any], log: Path, purpose: str) -> None:
    """Run to the end; print a failure in one line."""
    with log.open("wb") as sink:
        done = subprocess.run(command, stdout=sink, stderr=sink, check=False, env=ENVIRONMENT)
    if done.returncode:
        raise EngineFailed(f"{purpose}: {last_line(log)}")
