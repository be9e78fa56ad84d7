"""Echelon as a node postprocessor of LlamaIndex."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput
from echelon.integrations.components import Model, missing, opened, ranked, ranked_async
from echelon.options import check_count

try:
    from llama_index.core.bridge.pydantic import ConfigDict, PrivateAttr
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise missing("llama-index-core", "llamaindex") from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from echelon.reranker import Reranker
    from echelon.types import RankedDocument

dispatcher = get_dispatcher(__name__)


class EchelonRerank(BaseNodePostprocessor):
    """Sorts nodes by relevance to the query.

    A node's text is what LlamaIndex would embed, metadata included. Returns the same nodes with new
    scores (sigmoid of the logit).

    Args:
        model: hub id, local folder, ``"demo"``, or an open reranker.
        top_n: nodes to return; None returns all.
        **options: see :class:`echelon.options.Options`; ``callback_manager`` is LlamaIndex's.

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
        own = {name: options[name] for name in options.keys() - {"callback_manager"}}
        reranker = opened(model, own)
        fields: dict[str, Any] = {"model": model, "top_n": top_n, **options}
        super().__init__(**fields)
        self._reranker = reranker

    @property
    def reranker(self) -> Reranker:
        """The reranker in use; its ``close`` frees the model."""
        return self._reranker

    @classmethod
    def class_name(cls) -> str:
        """The class's name in serialised pipelines."""
        return "EchelonRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Return the best nodes, best first, and report to LlamaIndex's observers."""
        with self._observed(nodes, query_bundle) as (query, best):
            results = ranked(self._reranker, query, _texts(nodes), self.top_n)
            best.extend(_scored(nodes, results))
        return best

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """As ``_postprocess_nodes``; with an AsyncReranker, concurrent calls share steps."""
        with self._observed(nodes, query_bundle) as (query, best):
            texts = _texts(nodes)
            results = await ranked_async(self.model, self._reranker, query, texts, self.top_n)
            best.extend(_scored(nodes, results))
        return best

    @contextmanager
    def _observed(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None
    ) -> Iterator[tuple[str, list[NodeWithScore]]]:
        """Report the query and the nodes in the yielded list to LlamaIndex's observers."""
        if query_bundle is None:
            raise InvalidInput("query_bundle", "is missing", "Pass query_bundle or query_str.")
        best: list[NodeWithScore] = []
        query, name = query_bundle.query_str, str(self.model)
        top_n = len(nodes) if self.top_n is None else self.top_n
        dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=top_n, model_name=name)
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: name,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield query, best
            event.on_end(payload={EventPayload.NODES: best})
        dispatcher.event(ReRankEndEvent(nodes=best))


def _texts(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]


def _scored(nodes: list[NodeWithScore], best: Sequence[RankedDocument]) -> list[NodeWithScore]:
    return [NodeWithScore(node=nodes[r.index].node, score=r.score) for r in best]
