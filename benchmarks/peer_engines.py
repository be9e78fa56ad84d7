"""The engines that the benchmarks compare, each at its fastest settings for a CPU.

Runs in the environment of the engine, not only in Echelon's: nothing is imported here but numpy
until an engine is opened. Each engine is opened on a model folder and has one method,
``score(pairs, size)``: texts in, raw logits out, in order. ``NOTES`` says which flags are set.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from workloads import MAX_LENGTH

if TYPE_CHECKING:
    from pathlib import Path

Pairs = list[tuple[str, str]]

NOTES = {
    "Echelon": "Reranker.score_pairs, token budget; identical pairs not folded",
    "Transformers": "sorted by tokens, padded to the longest of a batch, inference_mode, SDPA or "
    "eager attention (the faster)",
    "TransformersCompiled": "as transformers; torch.compile(dynamic=True), inductor's freezing "
    "(weights prepacked)",
    "SentenceTransformers": "CrossEncoder.predict (sorts by characters), SDPA or eager attention",
    "SentenceTransformersOnnx": "backend='onnx'; fp32: the exported graph, or optimised as by "
    "export_optimized_onnx_model('O3'); int8: as by "
    "export_dynamic_quantized_onnx_model('avx512_vnni')",
    "SentenceTransformersOpenVino": "backend='openvino', INFERENCE_PRECISION_HINT as named; int8: "
    "the static quantisation of nncf",
    "Flag": "FlagReranker.compute_score (sorts by tokens; forwards its first batch twice); bf16: "
    "its model cast by hand, as on CPU it has no such flag",
    "Infinity": "AsyncEmbeddingEngine.rerank of all queries at once, BetterTransformer or not",
    "InfinityOnnx": "engine='optimum' with the dynamically quantised graph",
    "OnnxRuntime": "sorted by tokens, ORT_ENABLE_ALL; fp32: exported or fused by "
    "onnxruntime.transformers; int8: quantize_dynamic of either, weights a tensor or a channel",
    "OpenVino": "sorted by tokens, LATENCY or THROUGHPUT hint (asynchronous requests); int8: "
    "nncf.quantize (static, weights and activations, SmoothQuant) or int8 weights with dynamic "
    "quantisation of activations",
}
"""Per kind of engine, the flags in words, for the results."""


def threads() -> int:
    """Threads every engine gets: all processors that this process may use."""
    return len(os.sched_getaffinity(0))


class Echelon:
    """Echelon's public interface; ``size`` counts tokens a step, or pairs."""

    def __init__(self, folder: Path, _graphs: Path, *, precision: str, unit: str) -> None:
        from echelon import Reranker

        # Random weights would not pass int8's gate; how scores agree is measured here anyway.
        with mock.patch("echelon.engine.launch.check_precision", return_value=[]):
            self._reranker = Reranker(folder, precision=precision, max_length=MAX_LENGTH)
        self._option = "token_budget" if unit == "tokens" else "batch_size"

    def score(self, pairs: Pairs, size: int) -> Any:
        """Every pair goes through the model, also one that stands there twice."""
        with mock.patch("echelon.engine.call._fold", _unfolded):
            return self._reranker.score_pairs(pairs, **{self._option: size}).logits


def _unfolded(pairs: Pairs) -> tuple[Pairs, list[int], Any]:
    places = list(range(len(pairs)))
    return pairs, places, np.array(places)


class Padded:
    """Tokenises, sorts by length and pads: what an engine that takes arrays needs around it."""

    names: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(self, pairs: Pairs, size: int) -> Any:
        """Longest first, ``size`` pairs a batch."""
        queries, documents = zip(*pairs, strict=True)
        encoded = self._tokenizer(
            list(queries), list(documents), truncation="longest_first", max_length=MAX_LENGTH
        )
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        logits = np.empty(len(pairs), dtype=np.float32)
        outputs = self.run_all([self._pad(encoded, chunk) for chunk in chunks])
        logits[order] = np.concatenate([np.ravel(output) for output in outputs])
        return logits

    def run_all(self, batches: list[dict[str, Any]]) -> list[Any]:
        """Logits of each batch."""
        raise NotImplementedError

    def _pad(self, encoded: Any, chunk: Any) -> dict[str, Any]:
        longest = max(len(encoded["input_ids"][i]) for i in chunk)
        fill = {"input_ids": self._tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        batch = {}
        for name in fill.keys() & encoded.keys():
            batch[name] = np.full((len(chunk), longest), fill[name], dtype=np.int64)
            for row, index in enumerate(chunk):
                batch[name][row, : len(encoded[name][index])] = encoded[name][index]
        return batch


class Transformers(Padded):
    """AutoModelForSequenceClassification."""

    def __init__(self, folder: Path, _graphs: Path, *, dtype: str, attention: str = "sdpa") -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        super().__init__(folder)
        torch.set_num_threads(threads())
        self._model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()

    def run_all(self, batches: list[dict[str, Any]]) -> list[Any]:
        """One forward pass a batch."""
        import torch

        with torch.inference_mode():
            return [
                self._model(**{name: torch.from_numpy(a) for name, a in batch.items()})
                .logits.float()
                .numpy()
                for batch in batches
            ]


class TransformersCompiled(Transformers):
    """The same through torch.compile."""

    def __init__(self, folder: Path, graphs: Path, *, dtype: str) -> None:
        import torch
        import torch._inductor.config as inductor

        super().__init__(folder, graphs, dtype=dtype)
        inductor.freezing = True
        self._model = torch.compile(self._model, dynamic=True)


class SentenceTransformers:
    """CrossEncoder; the backend's own options come through ``model_kwargs``."""

    def __init__(
        self, folder: Path, _graphs: Path, *, dtype: str | None = None, **model_kwargs: Any
    ) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        torch.set_num_threads(threads())
        backend = model_kwargs.pop("backend", "torch")
        if dtype is not None:
            model_kwargs["dtype"] = getattr(torch, dtype)
        self._model = CrossEncoder(
            str(folder),
            max_length=MAX_LENGTH,
            device="cpu",
            backend=backend,
            model_kwargs=model_kwargs,
        )
        self._identity = torch.nn.Identity()

    def score(self, pairs: Pairs, size: int) -> Any:
        """``predict`` without the sigmoid."""
        return self._model.predict(
            pairs, batch_size=size, activation_fn=self._identity, show_progress_bar=False
        )


class SentenceTransformersOnnx(SentenceTransformers):
    """The ONNX backend; ``graph`` is a folder that the benchmark made."""

    def __init__(self, _folder: Path, graphs: Path, *, graph: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        file = next((graphs / graph / "onnx").glob("*.onnx"))
        super().__init__(
            graphs / graph,
            graphs,
            backend="onnx",
            file_name=f"onnx/{file.name}",
            provider="CPUExecutionProvider",
            session_options=options,
        )


class SentenceTransformersOpenVino(SentenceTransformers):
    """The OpenVINO backend."""

    def __init__(self, _folder: Path, graphs: Path, *, graph: str, precision: str) -> None:
        super().__init__(
            graphs / graph,
            graphs,
            backend="openvino",
            ov_config={"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"},
        )


class Flag:
    """FlagEmbedding's FlagReranker."""

    def __init__(self, folder: Path, _graphs: Path, *, dtype: str) -> None:
        import torch
        from FlagEmbedding import FlagReranker

        torch.set_num_threads(threads())
        self._model = FlagReranker(
            str(folder), use_fp16=False, devices="cpu", max_length=MAX_LENGTH, normalize=False
        )
        self._model.model.to(getattr(torch, dtype))

    def score(self, pairs: Pairs, size: int) -> Any:
        """``compute_score``: raw logits."""
        return np.asarray(self._model.compute_score(pairs, batch_size=size), dtype=np.float32)


class Infinity:
    """infinity_emb's engine in this process. It cuts at what the tokenizer's file says."""

    def __init__(self, folder: Path, graphs: Path, **flags: Any) -> None:
        from infinity_emb import AsyncEmbeddingEngine, EngineArgs

        # From inside the folder: it hands absolute names of graphs to optimum, which finds none.
        os.chdir(_limited_copy(folder, graphs / "infinity"))
        arguments = EngineArgs(
            model_name_or_path=".", device="cpu", model_warmup=False, batch_size=8, **flags
        )
        self._loop = asyncio.new_event_loop()
        self._engine = AsyncEmbeddingEngine.from_args(arguments)
        self._loop.run_until_complete(self._engine.astart())

    def score(self, pairs: Pairs, size: int) -> Any:
        """All queries at once, so that their documents can share batches."""
        self._engine._batch_handler.max_batch_size = size  # noqa: SLF001 - else it loads anew
        return self._loop.run_until_complete(self._rerank(pairs))

    async def _rerank(self, pairs: Pairs) -> Any:
        places: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            places.setdefault(query, []).append(index)
        answers = await asyncio.gather(
            *(
                self._engine.rerank(
                    query=query, docs=[pairs[i][1] for i in indices], raw_scores=True
                )
                for query, indices in places.items()
            )
        )
        logits = np.empty(len(pairs), dtype=np.float32)
        for indices, (results, _usage) in zip(places.values(), answers, strict=True):
            for result in results:
                logits[indices[result.index]] = result.relevance_score
        return logits


class InfinityOnnx(Infinity):
    """Its route for processors: ONNX Runtime with a quantised graph."""

    def __init__(self, _folder: Path, graphs: Path) -> None:
        super().__init__(
            graphs / "infinity-onnx", graphs, engine="optimum", onnx_disable_optimize=True
        )


def _limited_copy(folder: Path, out: Path) -> Path:
    """The same model by links, with files that say 512 tokens: infinity takes no other word."""
    out = out.with_name(f"{out.name}-{folder.name}")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    limits = {"tokenizer_config.json": "model_max_length"}
    if (folder / "model_quantized.onnx").exists():
        limits["config.json"] = "max_position_embeddings"  # its optimum engine reads this one
    for file in folder.iterdir():
        if file.name in limits:
            content = json.loads(file.read_text(encoding="utf-8"))
            content[limits[file.name]] = MAX_LENGTH
            (out / file.name).write_text(json.dumps(content), encoding="utf-8")
        elif file.is_file():
            (out / file.name).symlink_to(file.resolve())
    return out


class OnnxRuntime(Padded):
    """A bare InferenceSession."""

    def __init__(self, folder: Path, graphs: Path, *, graph: str) -> None:
        import onnxruntime

        super().__init__(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session = onnxruntime.InferenceSession(
            graphs / graph / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self._names = {node.name for node in self._session.get_inputs()}

    def run_all(self, batches: list[dict[str, Any]]) -> list[Any]:
        """One run a batch."""
        return [
            self._session.run(None, {name: batch[name] for name in self._names})[0]
            for batch in batches
        ]


class OpenVino(Padded):
    """A bare compiled model; the THROUGHPUT hint runs several requests side by side."""

    def __init__(
        self, folder: Path, graphs: Path, *, graph: str, hint: str = "LATENCY", **properties: str
    ) -> None:
        import openvino

        super().__init__(folder)
        config = {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads(),
            **properties,
        }
        self._model = openvino.Core().compile_model(
            graphs / graph / "openvino_model.xml", "CPU", config
        )
        self._names = {port.get_any_name() for port in self._model.inputs}
        self._queue = openvino.AsyncInferQueue(self._model)

    def run_all(self, batches: list[dict[str, Any]]) -> list[Any]:
        """As many requests in flight as the hint asks for."""
        outputs: list[Any] = [None] * len(batches)

        def keep(request: Any, place: int) -> None:
            outputs[place] = request.get_output_tensor(0).data.copy()

        self._queue.set_callback(keep)
        for place, batch in enumerate(batches):
            self._queue.start_async({name: batch[name] for name in self._names}, place)
        self._queue.wait_all()
        return outputs
