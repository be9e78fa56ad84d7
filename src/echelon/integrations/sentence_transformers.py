"""``sentence_transformers.CrossEncoder`` with Echelon as its engine."""
# The signatures are the original's, so that scripts run unchanged:
# ruff: noqa: PLR0913, PLR0917, FBT001, FBT002

from __future__ import annotations

import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any

import echelon.integrations.originals as originals  # noqa: PLR0402 - the package imports this
from echelon.errors import EchelonWarning, InvalidInput
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


RESULT_KEYWORDS = ("apply_softmax", "convert_to_numpy", "convert_to_tensor")


class CrossEncoder(TorchModule):
    """Scores pairs of texts and ranks documents, with the interface of sentence-transformers 6.

    The model is a folder, ``demo``, or a hub name; ``cross-encoder/`` is put before a bare one. The
    arguments are the original's, with these limits: ``num_labels`` must be the model's own,
    ``trust_remote_code`` false, ``backend`` ``torch``, and ``device`` one device. ``model_kwargs``
    may hold ``dtype`` or ``torch_dtype``, ``processor_kwargs`` ``model_max_length``,
    ``config_kwargs`` ``num_labels``. Without a dtype the model computes in that of its weights, as
    the original does. ``activation_fn`` is applied to the logits, a tensor [pairs, 1]; None is the
    saved function, else sigmoid. Other keywords are options of :class:`echelon.options.Options`,
    such as ``profile``.

    Raises:
        InvalidInput: a keyword is unknown, wrong or not supported, or the model has several labels
            and no ``label`` is chosen.
        ModelError: the model does not exist, is damaged, or of an unsupported kind.
        OutOfMemory: the weights do not fit.
    """

    @originals.renamed(
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
        other = None if backend == "torch" else backend
        originals.refuse(trust_remote_code=trust_remote_code, backend=other)
        originals.take_refused(options)
        options["device"] = originals.device_option(device)
        precision = originals.precision_argument(model_kwargs, options)
        Options.of(**options, revision=revision)
        storage = originals.Storage(revision, cache_folder, local_files_only, token)
        self._located = originals.locate(model_name_or_path, storage, owner=OWNER)
        self._saved = originals.read_saved(self._located.path)
        originals.check_num_labels(num_labels, config_kwargs, len(self._saved.labels))
        if options.get("profile") is None:
            precision = precision or self._saved.precision
        self._options = {**options, "precision": precision or "auto"}
        self._options["revision"] = self._located.revision
        self._reranker = Reranker(self._located.model, **self._options)
        self.max_length = originals.length_argument(max_length, processor_kwargs)
        self.activation_fn = activation_fn
        texts = self._saved.texts
        self.prompts = {**texts.prompts, **(prompts or {})}
        self.default_prompt_name = default_prompt_name or texts.default_prompt_name
        self._prompt(None, self.default_prompt_name)

    @originals.renamed(sentences="inputs", activation_fct="activation_fn")
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
        """Score pairs of texts, or one pair.

        ``batch_size`` is pairs a step; None lets Echelon choose, and scores do not depend on it.
        ``apply_softmax`` has no effect on models with one label, as in the original. ``device``
        moves the model there first. ``pool`` and ``chunk_size`` are not supported. Other keywords
        are options of one call, see :meth:`echelon.Reranker.score_pairs`.

        Returns:
            float32 array [pairs] in input order; with ``convert_to_tensor`` a tensor [pairs],
            without ``convert_to_numpy`` a list of tensors; for a single pair its score.

        Raises:
            InvalidInput: a pair is not two texts, or a keyword is wrong.
            OutOfMemory: a pair alone does not fit in memory.
        """
        originals.refuse(pool=pool, chunk_size=chunk_size)
        originals.take_idle(options, "num_workers")
        originals.take_refused(options)
        function = self.activation_fn if activation_fn is None else activation_fn
        check_activation(function)
        self._move_to(device)
        single = originals.is_single(inputs)
        listed = originals.as_pairs(inputs, single=single)
        pairs, options = self._prompted(listed, self._prompt(prompt, prompt_name), options)
        logits = self._logits(pairs, batch_size, show_progress_bar, options)
        scores = activate(logits, function, self.device, softmax=bool(apply_softmax))
        result = converted(scores, to_tensor=convert_to_tensor, to_numpy=convert_to_numpy)
        return result[0] if single else result

    @originals.renamed(activation_fct="activation_fn")
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
        arguments, and the errors, are those of :meth:`predict`.

        Returns:
            Dictionaries with ``corpus_id``, ``score`` and ``text`` if requested, best first; equal
            scores keep their input order.
        """
        originals.take_idle(options, "num_workers", *RESULT_KEYWORDS)
        check_text("query", query)
        texts = originals.as_documents(documents)
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
            else originals.capped("max_length", tokens, self._info.max_tokens)
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

        return AutoConfig.from_pretrained(self._located.path, **originals.LOCAL)

    @cached_property
    def tokenizer(self) -> Any:
        """A tokenizer as ``transformers`` loads it; changing it changes no score."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._located.path, **originals.LOCAL)

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
            originals.refuse(pool=device)
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

    def _prompted(
        self, pairs: list[Any], prompt: str, options: dict[str, Any]
    ) -> tuple[list[Pair], dict[str, Any]]:
        """The pairs and the options of a call, one of which holds the prompt."""
        checked = check_pairs(pairs)
        saved = self._saved
        if saved.reads_instruction:
            if not prompt and saved.instruction is None and saved.texts.default_prompt:
                problem = "it is empty, and the default saved with this model cannot be left out"
                raise InvalidInput("prompt", problem, "Give a text.")
            return checked, {"instruction": prompt or saved.instruction, **options}
        return [(prompt + query, text) for query, text in checked] if prompt else checked, options

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
