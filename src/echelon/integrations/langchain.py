"""Echelon as a document compressor of LangChain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echelon.integrations.components import Model, missing, opened, ranked, ranked_async
from echelon.options import check_count

try:
    from langchain_core.documents.compressor import BaseDocumentCompressor
    from pydantic import ConfigDict, PrivateAttr
except ImportError as error:
    raise missing("langchain-core", "langchain") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import Document

    from echelon.reranker import Reranker
    from echelon.types import RankedDocument


class EchelonReranker(BaseDocumentCompressor):
    """Sorts documents by relevance to the query.

    Returns copies with ``relevance_score`` (sigmoid of the logit) in their metadata.

    Args:
        model: hub id, local folder, ``"demo"``, or an open reranker.
        top_n: documents to return; None returns all.
        **options: see :class:`echelon.options.Options`.

    Raises:
        InvalidInput: ``top_n`` or an option is wrong.
        ModelError: the model does not exist, is damaged, or of an unsupported kind.
        OutOfMemory: the weights do not fit.
    """

    model: Model
    top_n: int | None = None
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="allow")
    _reranker: Reranker = PrivateAttr()

    def __init__(self, model: Model, top_n: int | None = None, **options: Any) -> None:
        check_count("top_n", top_n)
        reranker = opened(model, options)
        fields: dict[str, Any] = {"model": model, "top_n": top_n, **options}
        super().__init__(**fields)
        self._reranker = reranker

    @property
    def reranker(self) -> Reranker:
        """The reranker in use; its ``close`` frees the model."""
        return self._reranker

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return the best documents, best first.

        Raises:
            InvalidInput: the query leaves no room.
            OutOfMemory: a document alone does not fit in memory.

        Warns:
            EchelonWarning: documents were cut to ``max_length``.
        """
        del callbacks
        texts = [document.page_content for document in documents]
        return _copies(documents, ranked(self._reranker, query, texts, self.top_n))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """As :meth:`compress_documents`; with an AsyncReranker, concurrent calls share steps."""
        del callbacks
        texts = [document.page_content for document in documents]
        best = await ranked_async(self.model, self._reranker, query, texts, self.top_n)
        return _copies(documents, best)


def _copies(documents: Sequence[Document], best: Sequence[RankedDocument]) -> list[Document]:
    copies = []
    for result in best:
        document = documents[result.index]
        metadata = {**document.metadata, "relevance_score": result.score}
        copies.append(document.model_copy(update={"metadata": metadata}))
    return copies
