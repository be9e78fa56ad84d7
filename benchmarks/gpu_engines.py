"""The engines that ``gpu.py`` measures, called with pairs and a step size."""

from __future__ import annotations

import gc
import platform
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_workloads import LIMIT, one_pair

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import Pair

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class Ours:
    """Echelon's encoder and engine, texts in and logits out; identical pairs are not folded."""

    def __init__(self, folder: Path, precision: str, device: str) -> None:
        from echelon.engine.engine import Engine, StepLimits
        from echelon.models.registry import open_scorer
        from echelon.scheduling.packing import NO_BUDGET
        from echelon.tokenization.tokenizer import PairEncoder

        self.name = f"echelon {precision}"
        self.precision = precision
        self.encoder = PairEncoder(folder)
        self.scorer: Any = open_scorer(folder, device=device, precision=precision)
        self.engine = Engine(self.scorer, StepLimits(NO_BUDGET))
        self._limits, self._unbounded = StepLimits, NO_BUDGET

    @property
    def has_graphs(self) -> bool:
        """Whether small steps can run as graphs."""
        return hasattr(self.scorer, "use_graphs")

    def encode(self, pairs: list[Pair]) -> EncodedPairs:
        """Token ids."""
        return self.encoder.encode(pairs, LIMIT, "longest_first")

    def run(self, encoded: EncodedPairs, *, budget: int = 0, batch: int = 0) -> np.ndarray:
        """Logits of encoded pairs, in steps of ``budget`` tokens or ``batch`` pairs."""
        limits = self._limits(budget or self._unbounded, batch or None)
        return self.engine.run(encoded, limits=limits).logits

    def score(self, pairs: list[Pair], *, budget: int = 0, batch: int = 0) -> np.ndarray:
        """Logits of texts."""
        return self.run(self.encode(pairs), budget=budget, batch=batch)

    def close(self) -> None:
        """Free the card."""
        self.engine.close()


class Peer:
    """sentence-transformers' CrossEncoder; ``attention`` is its own choice (sdpa) or another."""

    def __init__(self, folder: Path, precision: str, device: str, attention: str = "") -> None:
        import torch
        from sentence_transformers import CrossEncoder

        self.name = f"sentence-transformers {precision}" + (f", {attention}" if attention else "")
        self.precision = precision
        settings: dict[str, Any] = {"dtype": getattr(torch, DTYPES[precision])}
        if attention:
            settings["attn_implementation"] = attention
        self._model: Any = CrossEncoder(
            str(folder), max_length=LIMIT, device=device, model_kwargs=settings
        )
        self._identity = torch.nn.Identity()

    def score(self, pairs: list[Pair], *, batch: int) -> np.ndarray:
        """Logits of texts, in steps of ``batch`` pairs."""
        found = self._model.predict(
            pairs, batch_size=batch, activation_fn=self._identity, show_progress_bar=False
        )
        return np.asarray(found, dtype=np.float32).reshape(-1)

    def close(self) -> None:
        """Free the card."""
        self._model = None


def open_peers(folder: Path, device: str) -> tuple[list[Peer], str]:
    """sentence-transformers in half width, with FlashAttention if installed, and missing engines.

    The results name the engines that are missing and the reason.
    """
    try:
        peers = [Peer(folder, precision, device) for precision in ("fp16", "bf16")]
    except ImportError as error:
        return [], f"sentence-transformers is not installed: {error}"
    try:
        peers.append(Peer(folder, "fp16", device, "flash_attention_2"))
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        return peers, f"flash-attn is not installed: {str(error).splitlines()[0]}"
    return peers, ""


def reference(folder: Path, encoded: EncodedPairs, device: str) -> np.ndarray:
    """Logits of transformers in fp32, every pair alone, so nothing is padded."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    batch = encoded.batch(range(len(encoded)))
    logits = []
    with torch.inference_mode():
        for index in range(len(batch)):
            inputs = {k: v.to(device) for k, v in one_pair(batch, index).items()}
            logits.append(float(model(**inputs).logits[0, 0]))
    del model
    free(device)
    return np.array(logits, dtype=np.float32)


def free(device: str) -> None:
    """Free the card's memory."""
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    """Versions of the libraries that affect speed and scores."""
    import torch

    from echelon.profile import library_versions

    found = library_versions() | {"platform": platform.platform(), "cuda": str(torch.version.cuda)}
    for name in ("transformers", "sentence_transformers", "flash_attn"):
        try:
            found[name] = str(__import__(name).__version__)
        except (ImportError, AttributeError):
            found[name] = "not installed"
    return found
