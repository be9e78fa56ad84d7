"""Echelon as a ranker component of Haystack."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput
from echelon.integrations.components import (
    Model,
    check_no_options,
    missing,
    opened,
    ranked,
    ranked_async,
)
from echelon.options import Options, check_count
from echelon.reranker import AsyncReranker, Reranker

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ImportError as error:
    raise missing("haystack-ai", "haystack") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.types import RankedDocument


@component
class EchelonRanker:
    """Sorts documents by relevance to the query.

    Returns copies with new scores (sigmoid of the logit). ``warm_up``, which a pipeline calls,
    loads the model.

    Args:
        model: hub id, local folder, ``"demo"``, or an open reranker.
        top_k: documents to return; None returns all.
        meta_fields_to_embed: fields of ``meta`` put before the content if they are not empty.
        embedding_separator: text between them.
        **options: see :class:`echelon.options.Options`.

    Raises:
        InvalidInput: ``top_k`` or an option is wrong.
    """

    def __init__(
        self,
        model: Model,
        top_k: int | None = None,
        meta_fields_to_embed: Sequence[str] = (),
        embedding_separator: str = "\n",
        **options: Any,
    ) -> None:
        check_count("top_k", top_k)
        if isinstance(model, Reranker | AsyncReranker):
            check_no_options(options)
        Options.of(**options)
        self.model = model
        self.top_k = top_k
        self.meta_fields_to_embed = list(meta_fields_to_embed)
        self.embedding_separator = embedding_separator
        self.options = options
        self._reranker: Reranker | None = None

    def warm_up(self) -> None:
        """Load the model; a second call does nothing.

        Raises:
            ModelError: the model does not exist, is damaged, or of an unsupported kind.
            ProfileError: the profile cannot be read.
            OutOfMemory: the weights do not fit.
        """
        self._warm()

    def close(self) -> None:
        """Free the model, unless it was passed in open; the next run loads it again."""
        if self._reranker is not None and not isinstance(self.model, Reranker | AsyncReranker):
            self._reranker.close()
        self._reranker = None

    def to_dict(self) -> dict[str, Any]:
        """The component as plain data; an open reranker as its model is refused."""
        if isinstance(self.model, Reranker | AsyncReranker):
            remedy = "Pass the model's name and the options to a component that is to be saved."
            raise InvalidInput("model", "is an open reranker, which cannot be saved", remedy)
        plain = Options.of(**self.options).as_dict()
        data: dict[str, Any] = default_to_dict(
            self,
            model=str(self.model),
            top_k=self.top_k,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            **{name: plain[name] for name in self.options},
        )
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EchelonRanker:
        """The component that :meth:`to_dict` described."""
        made: EchelonRanker = default_from_dict(cls, data)
        return made

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Return the best documents, best first, under ``documents``.

        Args:
            query: the query.
            documents: documents to sort.
            top_k: documents to return, instead of the constructor's.

        Raises:
            InvalidInput: a document has no text, ``top_k`` is wrong, or the query leaves no room.
            ModelError: as in :meth:`warm_up`.
            OutOfMemory: a document alone does not fit in memory.

        Warns:
            EchelonWarning: documents were cut to ``max_length``.
        """
        top_n = self._limit(top_k)
        return _copies(documents, ranked(self._warm(), query, self._texts(documents), top_n))

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """As :meth:`run`; with an AsyncReranker, concurrent calls share steps."""
        top_n, texts = self._limit(top_k), self._texts(documents)
        best = await ranked_async(self.model, self._warm(), query, texts, top_n)
        return _copies(documents, best)

    def _limit(self, top_k: int | None) -> int | None:
        check_count("top_k", top_k)
        return self.top_k if top_k is None else top_k

    def _texts(self, documents: Sequence[Document]) -> list[str]:
        return [self._text(document, place) for place, document in enumerate(documents)]

    def _warm(self) -> Reranker:
        if self._reranker is None:
            self._reranker = opened(self.model, self.options)
        return self._reranker

    def _text(self, document: Document, place: int) -> str:
        if document.content is None:
            remedy = "Rank documents that hold text."
            raise InvalidInput(f"documents[{place}]", "has no content", remedy)
        fields = [document.meta.get(name) for name in self.meta_fields_to_embed]
        return self.embedding_separator.join([*(str(f) for f in fields if f), document.content])


def _copies(
    documents: Sequence[Document], best: Sequence[RankedDocument]
) -> dict[str, list[Document]]:
    return {"documents": [replace(documents[r.index], score=r.score) for r in best]}
