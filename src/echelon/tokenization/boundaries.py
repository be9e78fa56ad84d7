"""Boundaries of a text: places where its tokens are the tokens of its two parts.

They are proven from the parts of the tokenizer, of which this file names those that allow it
(docs/decisions/0015-long-documents.md). A tokenizer with any other part has no boundaries.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import AddedToken, Tokenizer

WINDOW = 2**14
"""Characters of a window: some 4,000 tokens, more than most models read, in some 10 ms. Shorter
texts are tokenized whole."""

LONGEST_RUN = 2**17
"""Characters that are tokenized at once where a text has no boundary: 0.05 to 0.3 s, 30 MB."""

_TRIES = 1000
"""Places that are tried on the normalizer, some 10 µs each, before giving up."""

_JOINING = r"\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U00011000-\U00011fff"
"""Characters that form one unit with the next one, also with a space (Unicode: Prepend)."""

_WORD = r"[^\W_\u037a\u0d4e\u115f\u1160\u3164\ufb50-\U0010ffff]"
"""Letters and digits that no normal form removes or ends with a space."""

_LETTERS = "[0-9A-Za-zÀ-ÖØ-öø-ÿА-яא-תا-غअ-हก-ฮぁ-ゖァ-ヺ一-龥가-힣]"
"""Letters and digits of every version of Unicode."""

_MARKS = ",.;:!?、。，！？；："  # noqa: RUF001 - Chinese marks
"""Punctuation that begins a token of its own after a letter."""

_IDEOGRAPHS = "[㐀-䶵一-龥]"
"""Characters that BERT's normalizer puts between spaces."""

_PLAIN = "[!-&(-_a-~、-〃「-】！-～ぁ-ゖァ-ヺ一-龥가-힣ก-ฮ]"  # noqa: RUF001 - wide forms
"""Characters that are normalized alone if the next one is of them, too."""

_CHECKED = {"Precompiled", "Strip", "Replace"}
"""Normalizers with tables of their own, or that join spaces: each boundary is tried on them."""

_NORMALIZERS = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"}
_NORMALIZERS |= _CHECKED
_REPLACED = {" {2,}", r"\s{2,}|[\n\r\t]", "``", "''"}
"""Patterns that :class:`Replace` may have: spaces, and marks that are not of ``_MARKS``."""

_WORD_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
}
"""Patterns that divide texts as GPT-4's does: Qwen's, and Llama's with up to three digits."""

_DROP_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}

_SAMPLE = (
    "The kettle, twelve cups: 12,50. What? Yes!\nБыло тепло; хорошо. 今天天气很好，我们去看电影。"  # noqa: RUF001 - Chinese and Cyrillic
    "東京タワーへ行きます。次に 한국어 문장 ไทย ภาษา हिन्दी वाक्य עברית מילה مرحبا كلمة  e\u0301 "
    "a\u0300 b <s> [SEP] <mask> </s> [MASK] x\ny  z\t1 2 ① ﬁ 👩‍👩‍👧‍👦 don't it's A.B a_b d\u200b e"
)

_Step = dict[str, Any]


class Boundaries:
    """Finds the boundaries of texts for one tokenizer.

    ``window`` are the characters after which a window should end, ``longest_run`` those after which
    it must.
    """

    def __init__(
        self, tokenizer: Tokenizer, window: int = WINDOW, longest_run: int = LONGEST_RUN
    ) -> None:
        self.window, self.longest_run = window, longest_run
        self._tokenizer = tokenizer
        steps = _steps(tokenizer.normalizer, "normalizers")
        self._checked = any(step["type"] in _CHECKED for step in steps)
        self._gap = " " if any(step.get("strip_left") for step in steps) else ""
        self._pattern = _pattern(tokenizer, steps)
        if not self._hold_on_sample():
            self._pattern = None

    def end(self, text: str, begin: int) -> int | None:
        """End of the window that begins at a boundary; None if no end is near enough."""
        if len(text) - begin <= self.window:
            return len(text)
        place = next(self.places(text, begin + self.window, begin + self.longest_run), None)
        if place is None and len(text) - begin <= self.longest_run:
            return len(text)
        return place or self._last(text, begin, begin + self.window)

    def begin(self, text: str, end: int) -> int | None:
        """Begin of the window that ends at a boundary; None if no begin is near enough."""
        if end <= self.window:
            return 0
        place = next(self.places(text, end - self.window, end), None)
        if place is None and end <= self.longest_run:
            return 0
        return place or self._last(text, end - self.longest_run, end - self.window + 1)

    def final(self, text: str, begin: int, least: int) -> range | None:
        """Places from ``least`` on, of which one ends a token, though it may be no boundary.

        For Unigram alone: the best split up to a place does not depend on what follows, and no
        piece leaps over as many places as the longest has characters. What the tokens of
        ``text[begin:place]`` have in common for all these places are the first of ``text[begin:]``.
        """
        if self._pattern is None or type(self._tokenizer.model).__name__ != "Unigram":
            return None
        stretch = re.compile(f"{_PLAIN}{{{self._longest_piece + 1}}}")
        found = stretch.finditer(text, least, begin + self.longest_run)
        for start, end in (match.span() for match in islice(found, _TRIES)):
            normal = self._normalized(text[start:end])
            if len(normal) == end - start and not any(map(str.isspace, normal)):
                return range(start + 1, end)
        return None

    def places(self, text: str, begin: int, end: int) -> Iterator[int]:
        """Boundaries of a text after ``begin`` and before ``end``, in order."""
        candidates = islice(self._candidates(text, begin, end), _TRIES)
        return (place for place in candidates if self._holds(text, place))

    @cached_property
    def _longest_piece(self) -> int:
        """Characters of the longest piece or added token."""
        # One by one, so that other threads run in between: a vocabulary takes some 0.2 s.
        ids = range(self._tokenizer.get_vocab_size(with_added_tokens=False))
        pieces = (len(self._tokenizer.id_to_token(index) or "") for index in ids)
        added = self._tokenizer.get_added_tokens_decoder().values()
        forms = (len(form) for token in added for form in _forms(self._tokenizer, token))
        return max(*pieces, *forms)

    def _candidates(self, text: str, begin: int, end: int) -> Iterator[int]:
        found = iter(()) if self._pattern is None else self._pattern.finditer(text, begin, end)
        return (match.end() for match in found)

    def _last(self, text: str, begin: int, end: int) -> int | None:
        last = islice(reversed([*self._candidates(text, begin, end)]), _TRIES)
        return next((place for place in last if self._holds(text, place)), None)

    def _holds(self, text: str, place: int) -> bool:
        """Whether the normalizer neither joins nor removes what is beside a place."""
        if not self._checked:
            return True
        left, right = text[max(0, place - 2) : place], text[place : place + 2]
        before, after = self._normalized(left), self._normalized(right)
        ends_in_word = before != "" and not before[-1].isspace()
        return ends_in_word and self._normalized(left + right) == before + self._gap + after

    def _normalized(self, text: str) -> str:
        return _normalized(self._tokenizer, text)

    def _hold_on_sample(self) -> bool:
        """Whether the tokens of a text in many scripts are those of its parts."""
        places = [0, *self.places(_SAMPLE, 0, len(_SAMPLE)), len(_SAMPLE)]
        parts = [_SAMPLE[begin:end] for begin, end in pairwise(places)]
        whole, *found = self._tokenizer.encode_batch_fast(
            [_SAMPLE, *parts], add_special_tokens=False
        )
        return bool(whole.ids == [token for part in found for token in part.ids])


def _steps(part: Any, inner: str) -> list[_Step]:
    """The steps of a normalizer or pre-tokenizer, also of sequences within sequences."""

    def flat(step: _Step) -> list[_Step]:
        return [one for part in step[inner] for one in flat(part)] if inner in step else [step]

    return [] if part is None else flat(json.loads(part.__getstate__()))


def _pattern(tokenizer: Tokenizer, normalizers: list[_Step]) -> re.Pattern[str] | None:
    """What stands before a boundary, and what follows it; None if the tokenizer has none."""
    steps = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    starts = _starts(steps, newline_is_space=_normalized(tokenizer, "a\na") == "a a")
    strips = any(step.get("strip_left") for step in normalizers)
    if not starts or not all(map(_is_local, normalizers)) or _is_random(tokenizer.model):
        return None
    if strips and not _ignores_leading_space(steps):
        return None
    spaces = "".join(start for start in starts if start.isspace())
    # A space that is stripped off a part is stripped off the whole unless a word follows it.
    parts = [f"(?<![{_JOINING}]){_WORD}(?=[{spaces}]{_WORD * strips})"]
    if _MARKS in starts:
        parts.append(f"{_LETTERS}(?=[{_MARKS}])")
    if any(step.get("handle_chinese_chars") for step in normalizers) and _is_bert(steps):
        parts.append(f".(?={_IDEOGRAPHS})")
    pattern = re.compile("|".join(parts), re.DOTALL)
    tokens = tokenizer.get_added_tokens_decoder().values()
    return None if any(_hides(pattern, tokenizer, token) for token in tokens) else pattern


def _starts(steps: list[_Step], *, newline_is_space: bool) -> str:
    """Characters at which a pre-tokenizer begins a new word after a letter; empty if unknown."""
    found = ""
    match steps:
        case [{"type": "Punctuation" | "Digits"}, *rest] if rest:
            found = _starts(rest, newline_is_space=newline_is_space)
        case [{"type": "BertPreTokenizer" | "Whitespace"}]:
            found = " \n" + _MARKS
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if pattern in _WORD_PATTERNS:
            found = " \n" + _MARKS
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": prefix}]:
            found = " " if prefix else " \n" + _MARKS
        case [{"type": "WhitespaceSplit"}] | [{"type": "WhitespaceSplit"}, {"type": "Metaspace"}]:
            found = " \n"
        case [{"type": "Metaspace", "replacement": "▁", "split": True}]:
            found = " \n" if newline_is_space else " "
    return found


def _is_bert(steps: list[_Step]) -> bool:
    return [step["type"] for step in steps] == ["BertPreTokenizer"]


def _is_local(step: _Step) -> bool:
    """Whether a normalizer changes nothing across a boundary that :meth:`_holds` accepts."""
    match step:
        case {"type": "Replace", "pattern": {"Regex": pattern} | {"String": pattern}}:
            return pattern in _REPLACED
        case {"type": kind}:
            return kind in _NORMALIZERS
    return False


def _ignores_leading_space(steps: list[_Step]) -> bool:
    return steps[0]["type"] in _DROP_SPACES or steps[-1].get("prepend_scheme") == "always"


def _is_random(model: Any) -> bool:
    return bool(getattr(model, "dropout", None) or getattr(model, "alpha", None))


def _hides(pattern: re.Pattern[str], tokenizer: Tokenizer, token: AddedToken) -> bool:
    """Whether a token that is found before all others may depend on both sides of a boundary."""
    takes_space = token.rstrip and token.content[-1:].isalnum()
    divided = any(map(pattern.search, _forms(tokenizer, token)))
    return token.single_word or takes_space or divided


def _forms(tokenizer: Tokenizer, token: AddedToken) -> tuple[str, str]:
    """The texts that an added token may match: as it is, and normalized."""
    return token.content, _normalized(tokenizer, token.content)


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    normalizer = tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))
