"""A head in modules of its own, as sentence-transformers saves it beside a model. No torch.

``modules.json`` names a chain: Transformer, Pooling, then Dense and LayerNorm layers, the last of
which gives one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from echelon.errors import BadCheckpoint, UnsupportedModel
from echelon.files import MAX_ID, SWITCH, TEXT, read_json, read_object, shown, whole

if TYPE_CHECKING:
    from pathlib import Path

AGAIN = "Download the model again."

LABELS = ("score",)
"""Names of the outputs of a head in modules."""

POOLED, SCORES = "sentence_embedding", "scores"
"""What modules read and write: the pooled row, and in the end the score."""

ACTIVATIONS = {
    "Identity": "none",
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "Tanh": "tanh",
}
"""Classes of ``torch.nn`` → names of activations."""

POOLING = {
    "pooling_mode": TEXT,
    "pooling_mode_cls_token": SWITCH,
    "pooling_mode_mean_tokens": SWITCH,
}
DENSE = {
    "in_features": whole(1, 2**16),
    "out_features": whole(1, 2**16),
    "bias": SWITCH,
    "activation_function": TEXT,
    "use_residual": SWITCH,
    "module_input_name": TEXT,
    "module_output_name": TEXT,
}
NORM = {"dimension": whole(1, 2**16)}
LOGIT_SCORE = {"true_token_id": whole(0, MAX_ID), "false_token_id": whole(0, MAX_ID)}


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """A layer of a head: a product with an activation, or a LayerNorm."""

    folder: str  # of its weights, inside of the model's
    kind: str  # ``dense`` or ``norm``
    into: int  # width of its input
    out: int
    bias: bool = True
    activation: str = "none"
    scores: bool = False  # its output is the score

    @property
    def weights(self) -> int:
        """Number of weights."""
        return 2 * self.out if self.kind == "norm" else (self.into + self.bias) * self.out


@dataclass(frozen=True, slots=True)
class Chain:
    """What follows the transformer: pooling ``cls`` or ``mean``, and layers down to one number."""

    pooling: str
    layers: tuple[HeadLayer, ...]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(layer.weights for layer in self.layers)

    def require_width(self, hidden: int) -> None:
        """Raise ``ValueError`` unless it reads rows of the model's width."""
        first = self.layers[0]
        if first.into != hidden:
            raise ValueError(
                f"hidden_size: {hidden}, and {first.folder} beside it takes {first.into} numbers"
            )


def read(folder: Path) -> Chain | None:
    """The head beside a model; None where there is none.

    Raises:
        BadCheckpoint: a file is damaged, or widths do not follow one another.
        UnsupportedModel: a module that is not known here, or no score at the end.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    try:
        named = _named(read_json(path))
        if not named[1:] or {kind for kind, _ in named} <= {"Transformer", "LogitScore"}:
            return None
        return _chain(folder, named)
    except (ValueError, OSError) as error:
        raise BadCheckpoint(f"{path}: {error}. {AGAIN}") from error


def logit_score(folder: Path) -> tuple[int | None, int | None] | None:
    """The tokens relevant and irrelevant that the modules of a language model name, if any.

    Raises:
        BadCheckpoint: a file is damaged.
    """
    path = folder / "modules.json"
    try:
        named = _named(read_json(path)) if path.is_file() else []
        place = dict(named).get("LogitScore")
        if place is None:
            return None
        path = folder / _inside(place) / "config.json"
        given = read_object(path, LOGIT_SCORE)
    except (ValueError, OSError) as error:
        raise BadCheckpoint(f"{path}: {error}. {AGAIN}") from error
    return given.get("true_token_id"), given.get("false_token_id")


def _named(modules: Any) -> list[tuple[str, str]]:
    """The kind and the folder of each module."""
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ValueError("not a list of modules")
    return [
        (str(one.get("type", "")).rpartition(".")[2], str(one.get("path", ""))) for one in modules
    ]


def _chain(folder: Path, named: list[tuple[str, str]]) -> Chain:
    kinds = [kind for kind, _ in named]
    known = kinds[:2] == ["Transformer", "Pooling"] and set(kinds[2:]) <= {"Dense", "LayerNorm"}
    if not known:
        raise UnsupportedModel(
            f"{folder}: its modules are {', '.join(kinds)}. A reranker has Transformer, Pooling, "
            "then Dense and LayerNorm. Use a cross-encoder."
        )
    layers = tuple(_layer(folder, kind, path) for kind, path in named[2:])
    for one, after in pairwise(layers):
        if one.out != after.into:
            raise ValueError(f"{after.folder} takes {after.into} numbers, and {one.out} come to it")
    if not layers or layers[-1].out != 1:
        raise UnsupportedModel(
            f"{folder}: its modules end in {layers[-1].out if layers else 'no'} numbers, and a "
            "score is one. It is no reranker: use a cross-encoder."
        )
    if [layer.scores for layer in layers] != [False] * (len(layers) - 1) + [True]:
        raise UnsupportedModel(
            f"{folder}: the last of its modules alone must give {SCORES!r} (module_output_name), "
            "as those of a reranker do. Use a cross-encoder."
        )
    return Chain(_pooling(folder / _inside(named[1][1])), layers)


def _layer(folder: Path, kind: str, path: str) -> HeadLayer:
    file = folder / _inside(path) / "config.json"
    if kind == "LayerNorm":
        width = read_object(file, NORM).get("dimension")
        if width is None:
            raise ValueError(f"{path}/config.json: dimension: it is missing")
        return HeadLayer(path, "norm", width, width)
    given = read_object(file, DENSE)
    name = str(given.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = ACTIVATIONS.get(name.rpartition(".")[2])
    if activation is None or not name.startswith("torch.nn.") or given.get("use_residual"):
        raise UnsupportedModel(
            f"{file}: Dense with {shown(name)}"
            f"{' and a residual' if given.get('use_residual') else ''} is not built. Known "
            f"activations: {', '.join(ACTIVATIONS)}, without a residual."
        )
    for field in ("in_features", "out_features"):
        if given.get(field) is None:
            raise ValueError(f"{path}/config.json: {field}: it is missing")
    read_, written = (given.get(f"module_{way}_name") for way in ("input", "output"))
    if read_ not in {None, POOLED} or written not in {None, POOLED, SCORES}:
        raise UnsupportedModel(
            f"{file}: Dense from {shown(read_)} to {shown(written)} is not built. It must read "
            f"{POOLED} and give that or {SCORES}."
        )
    bias = given.get("bias") is not False
    widths = given["in_features"], given["out_features"]
    return HeadLayer(path, "dense", *widths, bias, activation, written == SCORES)


def _pooling(folder: Path) -> str:
    given = read_object(folder / "config.json", POOLING)
    older = [
        name
        for name, field in (("cls", "cls_token"), ("mean", "mean_tokens"))
        if given.get(f"pooling_mode_{field}")
    ]
    mode = given.get("pooling_mode") or (older[0] if len(older) == 1 else None)
    if mode not in {"cls", "mean"}:
        raise UnsupportedModel(
            f"{folder}: pooling {shown(mode or older)} is not built. It must be cls or mean."
        )
    return str(mode)


def _inside(path: str) -> str:
    """A module's folder; ``ValueError`` for one elsewhere."""
    if not path or not all(c.isalnum() or c in "_-" for c in path):
        raise ValueError(f"path: {shown(path)} is not the name of a folder in this one")
    return path
