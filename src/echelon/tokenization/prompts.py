"""Puts a query, a document and an instruction into a language model's prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from echelon.errors import InvalidInput, TooLarge
from echelon.tokenization.pairs import Template

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer

    from echelon.types import IntArray, Pair, Prompt

MAX_INSTRUCTION = 4096
"""Characters of an instruction: every pair is judged with it, so it costs as often."""

REMEMBERED = 64  # instructions whose tokens are kept


class Asked:
    """What a model is asked about each pair.

    A classifier is asked nothing, or reads its instruction before each query.

    The control tokens of the prompt are read first. After that the tokenizer takes the text of a
    control token for text, so that no query, document or instruction can forge one.
    """

    def __init__(
        self, prompt: Prompt | None, tokenizer: Tokenizer, *, before_query: bool = False
    ) -> None:
        self.prompt, self._tokenizer, self._before_query = prompt, tokenizer, before_query
        self.template: Template | None = None
        self._leads: dict[str, IntArray] = {}
        if prompt is not None:
            before, between, *after = (
                tuple(self._ids(part).tolist())
                for part in (prompt.prefix, prompt.between, *prompt.suffix)
            )
            self.template = Template(
                before,
                between,
                tuple(id_ for part in after for id_ in part),
                None,
                causal=prompt.causal,
            )
            tokenizer.encode_special_tokens = True

    def lead(self, instruction: str | None) -> IntArray:
        """The tokens between a prompt's prefix and the query: the instruction in its words.

        Raises:
            InvalidInput: the model reads no instruction.
            TooLarge: it is too long.
        """
        prompt = self.prompt
        if instruction is not None and len(instruction) > MAX_INSTRUCTION:
            problem = f"it has {len(instruction)} characters, and {MAX_INSTRUCTION} is the most"
            raise TooLarge("instruction", problem, "Shorten it.")
        if prompt is None or prompt.around_instruction is None:
            if instruction is not None and not self._before_query:
                kind = "is a classifier and" if prompt is None else "has a prompt without one and"
                raise InvalidInput(
                    "instruction",
                    f"this model {kind} reads none",
                    "Leave it out, or use a language model such as Qwen/Qwen3-Reranker-0.6B.",
                )
            return np.zeros(0, dtype=np.int32)
        text = prompt.instruction if instruction is None else instruction
        if text is None:
            return np.zeros(0, dtype=np.int32)
        if text not in self._leads:
            begin, end = prompt.around_instruction
            if len(self._leads) >= REMEMBERED:
                self._leads.clear()
            self._leads[text] = self._ids(f"{begin}{text}{end}")
        return self._leads[text]

    def worded(
        self,
        pairs: Sequence[Pair],
        max_query_tokens: int | None,
        cut: Callable[[str, int], str],
        instruction: str | None,
    ) -> Sequence[Pair]:
        """The pairs with the prompt's words around each text.

        Before, a query is ``cut`` to its first ``max_query_tokens``: the words behind it stay.
        """
        prompt = self.prompt
        if prompt is None:
            return [(instruction + query, text) for query, text in pairs] if instruction else pairs
        if prompt.strips:
            pairs = [(query.strip(), document.strip()) for query, document in pairs]
        begin, end = prompt.around_query
        queries: dict[str, str] = {}
        for query, _ in pairs:
            if query not in queries:
                kept = query if max_query_tokens is None else cut(query, max_query_tokens)
                queries[query] = f"{begin}{kept}{end}"
        return [(queries[query], prompt.before_document + document) for query, document in pairs]

    def query_tokens(self, max_length: int) -> int | None:
        """Tokens that instruction and query are cut to, where the model's authors cut them."""
        share = None if self.prompt is None else self.prompt.query_share
        return None if share is None else int(share * max_length)

    def _ids(self, text: str) -> IntArray:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)
