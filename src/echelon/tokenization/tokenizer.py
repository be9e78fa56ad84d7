"""Texts → token ids, with the ``tokenizers`` library.

Short texts are tokenized in batches, long ones in windows, as far as their tokens are needed.

A tokenizer loses its own truncation and padding when it is loaded and is never changed again:
changing it while another thread uses it raises "Already borrowed".
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from echelon.errors import BadCheckpoint, EchelonError, InvalidInput, TooLarge, UnsupportedModel
from echelon.files import MAX_ID, MAX_LIST_BYTES, read_object
from echelon.tokenization.boundaries import Boundaries
from echelon.tokenization.pairs import EncodedPairs, Template, TruncationImpossible, encode_pairs
from echelon.tokenization.prompts import Asked
from echelon.tokenization.reading import Reading
from echelon.types import TokenIds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tokenizers import Encoding, Tokenizer

    from echelon.types import IntArray, Pair, Prompt, Side, Truncation

PROBES = ("a", "1", "的", "x y")
"""Texts tried in turn to find the special tokens; the first that gives tokens is enough."""

MAX_FILE_BYTES = 256 * 2**20
"""Bytes of ``tokenizer.json``; that of the largest vocabulary known here has 17 MB."""


class Turn(NamedTuple):
    """How much is tokenized at a time, unless one text alone has more."""

    texts: int
    characters: int


WHOLE = Turn(texts=2**62, characters=2**20)
"""For callers that do not take turns: as much as bounded memory allows."""


class PairEncoder:
    """Turns pairs of texts into token ids exactly as the model's reference tokenizer does.

    Args:
        folder: model folder with ``tokenizer.json``, or files that ``transformers`` converts.
        prompt: the words around a pair, for a language model.
        instruction: what it is asked to judge; None is the model's own.
        before_query: whether a classifier reads an instruction, before each query.
        lower_case: texts are read in lower case, whatever the tokenizer's files say.

    Raises:
        BadCheckpoint: no readable tokenizer.
        InvalidInput: an instruction for a model that reads none.
        UnsupportedModel: the tokenizer does not join pairs as ``… query … document …``.
    """

    def __init__(
        self,
        folder: Path,
        prompt: Prompt | None = None,
        instruction: str | None = None,
        *,
        before_query: bool = False,
        lower_case: bool = False,
    ) -> None:
        with _readable(folder):
            self._tokenizer = _load(folder)
            if lower_case:
                _lower_case(self._tokenizer)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            settings = _settings(folder)
            self.ids = _ids(self._tokenizer, settings)
            side: Side = "left" if settings.get("truncation_side") == "left" else "right"
            self._asked = Asked(prompt, self._tokenizer, before_query=before_query)
            self.template = self._asked.template or _template(self._tokenizer, side)
            self.boundaries = Boundaries(self._tokenizer)
        self._instruction = instruction
        self._asked.lead(instruction)

    @property
    def prompt(self) -> Prompt | None:
        """The words around a pair, for a language model."""
        return self._asked.prompt

    def encode(
        self,
        pairs: Sequence[Pair],
        max_length: int,
        truncation: Truncation,
        max_query_tokens: int | None = None,
        places: Sequence[int] | None = None,
        *,
        instruction: str | None = None,
    ) -> EncodedPairs:
        """Encode pairs: each distinct query once, and of a document what its pair can need.

        Args:
            pairs: (query, document) texts.
            max_length: maximum tokens of a pair, special tokens included.
            truncation: which text is cut when a pair is longer.
            max_query_tokens: maximum tokens of a query; None keeps all.
            places: index of each pair in the caller's list, for messages; None counts from 0.
            instruction: what the model is asked to judge; None is the encoder's.

        Raises:
            InvalidInput: a query leaves no room for its document in mode ``only_second``, which is
                that of every language model; an instruction for a model that reads none.
            TooLarge: a query is too long, or the tokenizer cannot divide a long text.
        """
        turns = self.turns(
            pairs, max_length, truncation, max_query_tokens, places, instruction=instruction
        )
        return next(encoded for encoded in turns if encoded is not None)

    def turns(  # noqa: PLR0913 - the arguments of encode, and how documents are read
        self,
        pairs: Sequence[Pair],
        max_length: int,
        truncation: Truncation,
        max_query_tokens: int | None = None,
        places: Sequence[int] | None = None,
        *,
        instruction: str | None = None,
        side: Side | None = None,
        document_tokens: int = 0,
        turn: Turn = WHOLE,
    ) -> Iterator[EncodedPairs | None]:
        """Encode as :meth:`encode` does: None after each turn, at the end the pairs.

        Args:
            pairs: this and what follows as for :meth:`encode`.
            max_length: maximum tokens of a pair.
            truncation: which text is cut.
            max_query_tokens: maximum tokens of a query.
            places: index of each pair in the caller's list.
            instruction: what the model is asked to judge.
            side: side from which documents will be cut; None is the model's own.
            document_tokens: tokens of a document that its chunks need.
            turn: how much is tokenized at a time.
        """
        places = range(len(pairs)) if places is None else places
        instruction = self._instruction if instruction is None else instruction
        lead = self._asked.lead(instruction)
        pairs = self._asked.worded(pairs, max_query_tokens, self._cut, instruction)
        if self._asked.prompt is not None:
            truncation, max_query_tokens = "only_second", self._asked.query_tokens(max_length)
        first = {query: place for place, (query, _) in zip(places[::-1], pairs[::-1], strict=True)}
        texts = [*first, *(document for _, document in pairs)]
        asked = self._long_queries(first, max_query_tokens)
        ids: list[IntArray] = [np.zeros(0, dtype=np.int32)] * len(texts)
        yield from self._read_short(texts, ids, turn)
        yield from self._read_long(asked, ids, turn)
        by_text = {
            query: np.concatenate((lead, tokens))[:max_query_tokens]
            for query, tokens in zip(first, ids, strict=False)
        }
        queries, documents = [by_text[query] for query, _ in pairs], ids[len(first) :]
        if max(map(len, texts), default=0) > self.boundaries.window:
            # One token more than can be kept tells which text is longer, and that tokens are lost.
            least = max(max_length - self.template.specials, document_tokens)
            enough = [max(least, len(query)) + 1 for query in queries]
            wanted = self._long_documents(pairs, places, enough, side or self.template.side)
            yield from self._read_long(wanted, documents, turn)
        yield self._joined(queries, documents, max_length, truncation, places)

    def _joined(
        self,
        queries: Sequence[IntArray],
        documents: Sequence[IntArray],
        max_length: int,
        truncation: Truncation,
        places: Sequence[int],
    ) -> EncodedPairs:
        try:
            return encode_pairs(self.template, queries, documents, max_length, truncation, places)
        except TruncationImpossible as error:
            classifier = self._asked.prompt is None
            raise InvalidInput(
                f"pairs[{error.index}].query",
                f"its {error.query_tokens} tokens leave no room for the document in "
                f"max_length={max_length} (room for {error.room} besides special tokens)",
                "Shorten the query, raise max_length, or use truncation='longest_first'."
                if classifier
                else "Shorten the query or the instruction, or raise max_length.",
            ) from None

    def _long_queries(
        self, first: dict[str, int], max_query_tokens: int | None
    ) -> dict[int, Reading]:
        """The long ones of distinct queries, each with the place of its first pair."""
        bounds, readings = self.boundaries, {}
        for index, (query, place) in enumerate(first.items()):
            name = f"pairs[{place}].query"
            if max_query_tokens is None and len(query) > bounds.longest_run:
                problem = f"it has {len(query)} characters, and {bounds.longest_run} is the most"
                raise TooLarge(name, problem, "Shorten it, or set max_query_tokens.")
            if len(query) > bounds.window:
                readings[index] = Reading(name, query, max_query_tokens, "right", bounds)
        return readings

    def _long_documents(
        self, pairs: Sequence[Pair], places: Sequence[int], enough: Sequence[int], side: Side
    ) -> dict[int, Reading]:
        """The long documents, each to be read until ``enough`` of its tokens are known."""
        bounds, named = self.boundaries, zip(places, pairs, enough, strict=True)
        return {
            index: Reading(f"pairs[{place}].document", document, tokens, side, bounds)
            for index, (place, (_, document), tokens) in enumerate(named)
            if len(document) > bounds.window
        }

    def _read_short(self, texts: Sequence[str], ids: list[IntArray], turn: Turn) -> Iterator[None]:
        """Tokenize the texts that are not long, a batch each turn."""
        for batch in _batches(texts, self.boundaries.window, turn):
            found = self._tokens([texts[index] for index in batch])
            for index, tokens in zip(batch, found, strict=True):
                ids[index] = tokens
            yield

    def _read_long(
        self, readings: dict[int, Reading], ids: list[IntArray], turn: Turn
    ) -> Iterator[None]:
        """Tokenize the next window of some long texts each turn, until all are known."""
        at_once = max(1, turn.characters // self.boundaries.window)
        waiting = deque(readings)
        while waiting:
            batch = [waiting.popleft() for _ in range(min(at_once, len(waiting)))]
            windows = [readings[index].windows() for index in batch]
            found = iter(self._tokens([window for parts in windows for window in parts]))
            for index, parts in zip(batch, windows, strict=True):
                readings[index].add([*islice(found, len(parts))])
                if readings[index].done:
                    ids[index] = readings.pop(index).ids
                else:
                    waiting.appendleft(index)
            yield

    def _tokens(self, texts: list[str]) -> list[IntArray]:
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(
            texts, add_special_tokens=False
        )
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _cut(self, text: str, tokens: int) -> str:
        """The text up to the end of one of its tokens; longer ones than can be read are left."""
        found = self.ends(text[: self.boundaries.longest_run])
        return text if len(found) <= tokens else text[: found[tokens - 1]]

    def ends(self, text: str) -> list[int]:
        """End of each token of a text, in characters from the beginning."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return [end for _, end in offsets]


def _batches(texts: Sequence[str], longest: int, turn: Turn) -> Iterator[Sequence[int]]:
    """Indices of the texts of at most ``longest`` characters, as many as a turn takes."""
    sizes = [*map(len, texts)]
    small = len(sizes) <= turn.texts and sum(sizes) <= turn.characters
    if sizes and small and max(sizes) <= longest:  # the usual call
        yield range(len(sizes))
        return
    batch: list[int] = []
    left = turn.characters
    for index, size in enumerate(sizes):
        if size > longest:
            continue
        left -= size
        if batch and (left < 0 or len(batch) == turn.texts):
            yield batch
            batch, left = [], turn.characters - size
        batch.append(index)
    if batch:
        yield batch


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn whatever the library raises for broken files into an error that names the file."""
    try:
        yield
    except (EchelonError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        path = folder / "tokenizer.json"
        raise BadCheckpoint(
            f"{path if path.is_file() else folder}: not a readable tokenizer ({error}). "
            "Download the model again."
        ) from error


def _load(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return _convert(folder)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
    return Tokenizer.from_file(str(path))


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


def _lower_case(tokenizer: Tokenizer) -> None:
    """Let a tokenizer read lower case, before its other normalizers as sentence-transformers."""
    from tokenizers.normalizers import Lowercase, Sequence

    steps = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = Sequence([Lowercase(), *steps])


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
