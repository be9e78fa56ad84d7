"""``sentence_transformers.CrossEncoder`` with Echelon as its engine."""
# The signatures are the original's, so that scripts run unchanged:
# ruff: noqa: PLR0913, PLR0917, FBT001, FBT002

from __future__ import annotations

import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any

from echelon.errors import EchelonWarning, InvalidInput
from echelon.integrations.keywords import (
    as_documents,
    as_pairs,
    capped,
    check_num_labels,
    device_option,
    is_single,
    length_argument,
    precision_argument,
    refuse,
    renamed,
    take_idle,
    take_refused,
)
from echelon.integrations.saved_model import Storage, locate, read_saved
from echelon.integrations.torch_module import (
    TorchModule,
    activate,
    check_activation,
    converted,
    default_activation,
)
from echelon.options import Options, check_pairs, check_text
from echelon.reranker import Reranker

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import torch

    from echelon.integrations.torch_module import Activation
    from echelon.types import FloatArray, ModelInfo, Pair

OWNER = "cross-encoder"
"""Put before a hub name that has no owner."""


class CrossEncoder(TorchModule):
    """Scores pairs of texts and ranks documents, with the interface of sentence-transformers 6.

    Args:
        model_name_or_path: folder, hub name (``cross-encoder/`` is put before a bare one) or
            ``demo``.
        num_labels: outputs of the head; must be the model's own.
        max_length: tokens a pair may have; None is the model's limit.
        activation_fn: applied to the logits, a tensor [pairs, 1]; None is the saved function, else
            sigmoid.
        device: ``cpu``, ``cuda``, ``cuda:N`` or a ``torch.device``; None takes a GPU if there is.
        revision: hub branch, tag or commit.
        trust_remote_code: must be false.
        local_files_only: never connect to the hub.
        cache_folder: where hub models are kept; None is the hub's own cache.
        token: for the hub.
        model_kwargs: ``dtype`` or ``torch_dtype``; None computes in the dtype of the weights, as
            the original does.
        processor_kwargs: ``model_max_length``.
        config_kwargs: ``num_labels``.
        backend: must be ``torch``.
        prompts: name → text put before queries.
        default_prompt_name: the prompt of calls that name none.
        **options: other options of :class:`echelon.options.Options`, such as ``profile``.

    Raises:
        InvalidInput: a keyword is unknown, wrong or not supported, or the model has several labels
            and no ``label`` is chosen.
        ModelError: the model does not exist, is damaged, or of an unsupported kind.
        OutOfMemory: the weights do not fit.
    """

    @renamed(
        model_name="model_name_or_path",
        automodel_args="model_kwargs",
        tokenizer_args="processor_kwargs",
        tokenizer_kwargs="processor_kwargs",
        config_args="config_kwargs",
        cache_dir="cache_folder",
        default_activation_function="activation_fn",
    )
    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        num_labels: int | None = None,
        max_length: int | None = None,
        activation_fn: Activation | None = None,
        device: str | int | torch.device | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        cache_folder: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        **options: Any,
    ) -> None:
        refuse(trust_remote_code=trust_remote_code, backend=None if backend == "torch" else backend)
        take_refused(options)
        options["device"] = device_option(device)
        precision = precision_argument(model_kwargs, options)
        Options.of(**options, revision=revision)
        storage = Storage(revision, cache_folder, local_files_only, token)
        self._located = locate(model_name_or_path, storage, owner=OWNER)
        self._saved = read_saved(self._located.path)
        check_num_labels(num_labels, config_kwargs, len(self._saved.labels))
        if options.get("profile") is None:
            precision = precision or self._saved.precision
        self._options = {**options, "precision": precision or "auto"}
        self._options["revision"] = self._located.revision
        self._reranker = Reranker(self._located.model, **self._options)
        self.max_length = length_argument(max_length, processor_kwargs)
        self.activation_fn = activation_fn
        self.prompts = {**self._saved.prompts, **(prompts or {})}
        self.default_prompt_name = default_prompt_name or self._saved.default_prompt_name
        self._prompt(None, self.default_prompt_name)

    @renamed(sentences="inputs", activation_fct="activation_fn")
    def predict(
        self,
        inputs: Sequence[Sequence[str]] | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | int | torch.device | None = None,
        pool: object = None,
        chunk_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Score pairs.

        Args:
            inputs: pairs of texts, or one pair.
            prompt_name: name of a prompt to put before queries.
            prompt: text to put before queries.
            batch_size: pairs a step; None lets Echelon choose. Scores do not depend on it.
            show_progress_bar: show a progress bar.
            activation_fn: instead of the model's, for this call.
            apply_softmax: no effect on models with one label, as in the original.
            convert_to_numpy: return a float32 array [pairs], else a list of tensors.
            convert_to_tensor: return one tensor [pairs]; overrides ``convert_to_numpy``.
            device: move the model there first.
            pool: not supported.
            chunk_size: not supported.
            **options: options of one call, see :meth:`echelon.Reranker.score_pairs`.

        Returns:
            Scores in input order; for a single pair its score.

        Raises:
            InvalidInput: a pair is not two texts, or a keyword is wrong.
            OutOfMemory: a pair alone does not fit in memory.
        """
        refuse(pool=pool, chunk_size=chunk_size)
        take_idle(options, "num_workers")
        take_refused(options)
        function = self.activation_fn if activation_fn is None else activation_fn
        check_activation(function)
        self._move_to(device)
        single = is_single(inputs)
        pairs = self._prompted(as_pairs(inputs, single=single), self._prompt(prompt, prompt_name))
        logits = self._logits(pairs, batch_size, show_progress_bar, options)
        scores = activate(logits, function, self.device, softmax=bool(apply_softmax))
        result = converted(scores, to_tensor=convert_to_tensor, to_numpy=convert_to_numpy)
        return result[0] if single else result

    @renamed(activation_fct="activation_fn")
    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        device: str | int | torch.device | None = None,
        pool: object = None,
        chunk_size: int | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Sort documents by their score against a query.

        ``top_k`` limits the results, ``return_documents`` adds each document's text; the other
        arguments are those of :meth:`predict`.

        Returns:
            Dictionaries with ``corpus_id``, ``score`` and ``text`` if requested, best first; equal
            scores keep their input order.

        Raises:
            InvalidInput: as in :meth:`predict`.
            OutOfMemory: a pair alone does not fit in memory.
        """
        take_idle(options, "num_workers", "apply_softmax", "convert_to_numpy", "convert_to_tensor")
        check_text("query", query)
        texts = as_documents(documents)
        scores = self.predict(
            [(query, text) for text in texts],
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            convert_to_tensor=True,
            device=device,
            pool=pool,
            chunk_size=chunk_size,
            **options,
        ).tolist()
        ranked = sorted(enumerate(scores), key=lambda entry: entry[1], reverse=True)[:top_k]
        return [
            {"corpus_id": i, "score": score} | ({"text": texts[i]} if return_documents else {})
            for i, score in ranked
        ]

    @property
    def activation_fn(self) -> Activation:
        """What is applied to logits; setting None brings the model's own back."""
        return self._activation

    @activation_fn.setter
    def activation_fn(self, function: Activation | None) -> None:
        """The function applied to logits; setting None restores the model's own."""
        if function is None:
            function = default_activation(self._saved)
        check_activation(function)
        self._activation = function

    @property
    def default_activation_function(self) -> Activation:
        """The older name of :attr:`activation_fn`."""
        return self._activation

    @property
    def max_length(self) -> int:
        """Tokens a pair may have, special tokens included; set it at any time."""
        return self._max_length

    @max_length.setter
    def max_length(self, tokens: int | None) -> None:
        self._max_length = (
            min(self._reranker.max_length, self._saved.max_length or self._reranker.max_length)
            if tokens is None
            else capped("max_length", tokens, self._info.max_tokens)
        )

    max_seq_length = max_length

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head."""
        return len(self._saved.labels)

    @property
    def model(self) -> InnerModel:
        """A handle with ``half()``, ``bfloat16()`` and ``to()``, as scripts call them."""
        return InnerModel(self)

    @cached_property
    def config(self) -> Any:
        """The configuration as ``transformers`` reads it; changing it changes no score."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._located.path, local_files_only=True)

    @cached_property
    def tokenizer(self) -> Any:
        """A tokenizer as ``transformers`` loads it; changing it changes no score."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._located.path, local_files_only=True)

    @property
    def _info(self) -> ModelInfo:
        return self._reranker.facts

    def _reopen(self, **changes: Any) -> None:
        options = {**self._options, **changes}
        # Closed first: many callers change the precision because memory is short.
        self._reranker.close()
        self._reranker = Reranker(self._located.model, **options)
        self._options = options

    def _move_to(self, device: str | int | torch.device | None) -> None:
        if isinstance(device, list | tuple):
            refuse(pool=device)
        if device is not None:
            self.to(device)

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            check_text("prompt", prompt)
            if name is not None:
                warnings.warn(
                    "prompt is used and prompt_name ignored. Give one of them.",
                    EchelonWarning,
                    stacklevel=3,
                )
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise InvalidInput("prompt_name", f"{name!r} is not a prompt", f"Known: {known}.")
        return self.prompts[name]

    @staticmethod
    def _prompted(pairs: list[Any], prompt: str) -> list[Pair]:
        checked = check_pairs(pairs)
        return [(prompt + query, document) for query, document in checked] if prompt else checked

    def _logits(
        self, pairs: list[Pair], batch_size: int | None, show: bool | None, options: dict[str, Any]
    ) -> FloatArray:
        overrides = {"max_length": self._max_length, **options}
        if batch_size is not None:
            overrides["batch_size"] = batch_size
        if show is not None:
            overrides["progress"] = bool(show)
        return self._reranker.score_pairs(pairs, **overrides).logits


class InnerModel(TorchModule):
    """The object that ``CrossEncoder.model`` returns: the same model, moved with its owner."""

    def __init__(self, owner: CrossEncoder) -> None:
        self._owner = owner

    @property
    def config(self) -> Any:
        """As :attr:`CrossEncoder.config`."""
        return self._owner.config

    @property
    def _info(self) -> ModelInfo:
        return self._owner._info  # noqa: SLF001 - the same model

    def _reopen(self, **changes: Any) -> None:
        self._owner._reopen(**changes)  # noqa: SLF001 - the same model
