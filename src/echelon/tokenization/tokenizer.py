"""Texts → token ids: the only file that uses the ``tokenizers`` library.

A tokenizer loses its own truncation and padding when it is loaded and is never changed again:
changing it while another thread uses it raises "Already borrowed".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.errors import BadCheckpoint, InvalidInput, UnsupportedModel
from echelon.files import MAX_ID, MAX_LIST_BYTES, read_object
from echelon.tokenization.pairs import EncodedPairs, Template, TruncationImpossible, encode_pairs
from echelon.types import TokenIds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tokenizers import Encoding, Tokenizer

    from echelon.types import Pair, Side, Truncation

PROBES = ("a", "1", "的", "x y")
"""Texts tried in turn to find the special tokens; the first that gives tokens is enough."""


class PairEncoder:
    """Turns pairs of texts into token ids exactly as the model's reference tokenizer does.

    Args:
        folder: model folder with ``tokenizer.json``, or files that ``transformers`` converts.

    Raises:
        BadCheckpoint: no readable tokenizer.
        UnsupportedModel: the tokenizer does not join pairs as ``… query … document …``.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _load(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _settings(folder)
        self.ids = _ids(self._tokenizer, settings)
        side: Side = "left" if settings.get("truncation_side") == "left" else "right"
        self.template = _template(self._tokenizer, side)

    def encode(
        self,
        pairs: Sequence[Pair],
        max_length: int,
        truncation: Truncation,
        max_query_tokens: int | None = None,
        places: Sequence[int] | None = None,
    ) -> EncodedPairs:
        """Encode pairs: each distinct query once, all documents in one batched call.

        Args:
            pairs: (query, document) texts.
            max_length: maximum tokens of a pair, special tokens included.
            truncation: which text is cut when a pair is longer.
            max_query_tokens: maximum tokens of a query; None keeps all.
            places: index of each pair in the caller's list, for messages; None counts from 0.

        Raises:
            InvalidInput: a query leaves no room for its document in mode ``only_second``.
        """
        distinct = list(dict.fromkeys(query for query, _ in pairs))
        texts = [*distinct, *(document for _, document in pairs)]
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(
            texts, add_special_tokens=False
        )
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        by_text = {text: i[:max_query_tokens] for text, i in zip(distinct, ids, strict=False)}
        queries = [by_text[query] for query, _ in pairs]
        documents = ids[len(distinct) :]
        try:
            return encode_pairs(self.template, queries, documents, max_length, truncation, places)
        except TruncationImpossible as error:
            raise InvalidInput(
                f"pairs[{error.index}].query",
                f"its {error.query_tokens} tokens leave no room for the document in "
                f"max_length={max_length} (room for {error.room} besides special tokens)",
                "Shorten the query, raise max_length, or use truncation='longest_first'.",
            ) from None

    def ends(self, text: str) -> list[int]:
        """End of each token of a text, in characters from the beginning."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return [end for _, end in offsets]


def _load(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return _convert(folder)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every broken file
        raise BadCheckpoint(
            f"{path}: not a readable tokenizer ({error}). Download the model again."
        ) from error


def _convert(folder: Path) -> Tokenizer:
    """Build a fast tokenizer from older vocabulary files."""
    files = (folder / "vocab.txt", folder / "vocab.json", *folder.glob("*.model"))
    if not any(file.is_file() for file in files):
        raise BadCheckpoint(
            f"{folder}: no tokenizer.json and no vocabulary file. "
            "Download the model again, with its tokenizer."
        )
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        backend: Tokenizer = tokenizer.backend_tokenizer
    except Exception as error:
        raise BadCheckpoint(
            f"{folder}: no tokenizer.json, and transformers could not build one ({error}). "
            "Save the tokenizer with a recent transformers and try again."
        ) from error
    return backend


def _settings(folder: Path) -> dict[str, Any]:
    """The tokenizer's settings; in older folders another file holds the special tokens."""
    settings: dict[str, Any] = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        try:
            settings |= read_object(path, max_bytes=MAX_LIST_BYTES) if path.is_file() else {}
        except (ValueError, OSError) as error:
            raise BadCheckpoint(f"{path}: {error}. Download the model again.") from error
    return settings


def _ids(tokenizer: Tokenizer, settings: dict[str, Any]) -> TokenIds:
    """Its largest id, and those of the special tokens that the settings name."""
    if type(tokenizer.model).__name__ == "Unigram":  # ids are places in its list
        largest = tokenizer.get_vocab_size(with_added_tokens=False) - 1
    else:
        largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    largest = max(largest, 0, *tokenizer.get_added_tokens_decoder())
    if largest > MAX_ID:
        raise BadCheckpoint(
            f"The tokenizer has a token of id {largest}, beyond {MAX_ID}. Download the model again."
        )
    named = {name: settings.get(f"{name}_token") for name in ("pad", "cls", "sep")}
    texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items()}
    ids = {name: tokenizer.token_to_id(t) for name, t in texts.items() if isinstance(t, str)}
    return TokenIds(largest, {name: id_ for name, id_ in ids.items() if id_ is not None})


def _template(tokenizer: Tokenizer, side: Side) -> Template:
    for probe in PROBES:
        encoding = tokenizer.encode(probe, probe)
        if {0, 1} <= set(encoding.sequence_ids):
            return _template_of(encoding, side)
    raise UnsupportedModel("The tokenizer gives no tokens for plain text. Use another model.")


def _template_of(encoding: Encoding, side: Side) -> Template:
    ids, types, owners = encoding.ids, encoding.type_ids, encoding.sequence_ids
    first, last = owners.index(0), len(owners) - 1 - owners[::-1].index(0)
    second, end = owners.index(1), len(owners) - owners[::-1].index(1)
    if last > second:
        raise UnsupportedModel(
            "The tokenizer puts the document before the query. Use another model."
        )
    runs = (slice(0, first), slice(last + 1, second), slice(end, len(ids)))
    before, between, after = (tuple(ids[run]) for run in runs)
    outer, inner, last_types = (tuple(types[run]) for run in runs)
    segments = (outer, types[first], inner, types[second], last_types)
    return Template(before, between, after, segments if any(types) else None, side)
