"""What may be imported where, and the names that users rely on."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from helpers import run_python

import echelon
from echelon import errors

PACKAGE = Path(echelon.__file__).parent
NEEDS_TORCH = {
    "echelon.integrations.haystack",  # Haystack looks for torch when it is imported
    "echelon.models.attention_cpu",
    "echelon.models.attention_cuda",
    "echelon.models.blocks",
    "echelon.models.causal_attention",
    "echelon.models.decoder",
    "echelon.models.decoder_weights",
    "echelon.models.float8",
    "echelon.models.gated",
    "echelon.models.gte_encoder",
    "echelon.models.llama_encoder",
    "echelon.models.heads",
    "echelon.models.loading",
    "echelon.models.local_attention",
    "echelon.models.modernbert_cuda",
    "echelon.models.modernbert_encoder",
    "echelon.models.packed",
    "echelon.models.rotary",
    "echelon.models.encoder_cuda",
    "echelon.models.encoder_padded",
    "echelon.models.exact",
    "echelon.models.transformers",
    "echelon.models.card_kernels",
    "echelon.models.cuda_graphs",
    "echelon.models.cuda_scorer",
    "echelon.models.triton_kernels",
    "echelon.models.kernel_calls",
    "echelon.models.layers",
    "echelon.models.encoder",
}
NEEDS_RAY = {
    "echelon.integrations.ray.scorer_pool",
    "echelon.integrations.ray.serve",
    "echelon.integrations.ray.worker",
}

PUBLIC = {
    "AsyncReranker",
    "BadCheckpoint",
    "EchelonError",
    "EchelonWarning",
    "InvalidInput",
    "MissingDependency",
    "ModelError",
    "ModelNotFound",
    "OutOfMemory",
    "ProfileError",
    "RankedDocument",
    "Ranking",
    "Reranker",
    "RunReport",
    "ScoredPairs",
    "StorageError",
    "UnsupportedModel",
    "__version__",
}

BARRED = """
import importlib, sys

class Barrier:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "ray", "plotly"}:
            raise RuntimeError(f"{name} must not be imported here")

sys.meta_path.insert(0, Barrier())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


BARRED_ONE_BY_ONE = (
    BARRED.partition("for name")[0]
    + """
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except RuntimeError as error:
        if "torch must not be imported" in str(error):
            print(name)
"""
)
"""Prints the modules that import torch."""


def modules() -> list[str]:
    """Every module of the package."""
    names = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if name != "echelon.__main__"]


def test_light_modules_import_without_the_heavy_packages():
    light = [name for name in modules() if name not in NEEDS_TORCH | NEEDS_RAY]
    assert len(light) > 20
    ran = run_python(BARRED, *light)
    assert ran.returncode == 0, ran.stderr


def test_the_other_modules_need_torch():
    """Also a check of the barrier: it bars."""
    ran = run_python(BARRED_ONE_BY_ONE, *sorted(NEEDS_TORCH))
    assert set(ran.stdout.split()) == NEEDS_TORCH, ran.stderr


@pytest.mark.parametrize(
    ("name", "package"),
    [("langchain", "langchain_core"), ("llamaindex", "llama_index"), ("haystack", "haystack")],
)
def test_an_adapter_without_its_framework_names_the_extra(name, package):
    code = f"import sys; sys.modules[{package!r}] = None; import echelon.integrations.{name}"
    ran = run_python(code)
    assert "echelon.errors.MissingDependency: " in ran.stderr
    assert errors.install_command(name) in ran.stderr


def test_importing_echelon_costs_nothing():
    code = "import sys, echelon; print(sorted(n for n in sys.modules if 'numpy' in n))"
    assert run_python(code).stdout.strip() == "[]"


def test_the_public_surface_is_pinned():
    assert set(echelon.__all__) == PUBLIC
    assert echelon.__all__ == sorted(PUBLIC)
    assert all(getattr(echelon, name) is not None for name in PUBLIC)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'echelon' has no attribute 'Rerankr'"):
        echelon.Rerankr  # noqa: B018 - the access is the test


def test_errors_are_one_tree():
    named = [getattr(echelon, name) for name in PUBLIC]
    kinds = [
        kind
        for kind in named
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, Warning)
    ]
    assert len(kinds) == 10
    assert all(issubclass(kind, echelon.EchelonError) for kind in kinds)
    assert issubclass(echelon.InvalidInput, ValueError)
    assert all(400 <= kind.status < 600 and 0 < kind.exit_code < 128 for kind in kinds)


def test_the_drawn_tree_of_errors_is_the_tree():
    drawn = re.findall(r"(\w+)(?: \([^)]*\))? +(\d{3}) +(\d+)$", errors.__doc__, re.MULTILINE)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    there = [kind for kind in kinds if issubclass(kind, errors.EchelonError)]
    assert drawn == [(k.__name__, str(k.status), str(k.exit_code)) for k in there]


@pytest.mark.parametrize(
    "error",
    [errors.TooLarge("documents", "11 are too many", "Send 10."), errors.RateLimited("x", 2)],
)
def test_errors_travel_between_processes(error):
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), vars(there)) == (type(error), str(error), vars(error))
