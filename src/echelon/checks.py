"""Checks of what callers pass in: each error names the field, the problem and the remedy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from echelon.types import Pair


DISTRIBUTIONS = {"hdrh": "hdrhistogram"}
"""What pip calls a package that is imported under another name."""


def require_packages(who: str, extra: str, packages: Iterable[str], other: str = "") -> None:
    """Refuse to begin without packages of an extra.

    Args:
        who: what needs them.
        extra: what to install.
        packages: names to import.
        other: another way out, in words.

    Raises:
        MissingDependency: names those that are missing.
    """
    missing = [
        DISTRIBUTIONS.get(name, name) for name in packages if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise MissingDependency(
            f"{who} needs {', '.join(missing)}. "
            f"Install with: pip install 'echelon-rerank[{extra}]'{other}"
        )


def check_text(field: str, text: object) -> None:
    """Refuse what is not encodable text.

    Raises:
        InvalidInput: not a string, or one with lone surrogates.
    """
    if not isinstance(text, str):
        raise InvalidInput(field, f"is {type(text).__name__}, not a string", "Pass text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(
            field,
            f"holds a lone surrogate at character {error.start}, which is no valid text",
            "Decode it correctly, or clean it with text.encode('utf-8', 'replace').decode().",
        ) from None


def check_documents(documents: object) -> None:
    """Refuse a string or a mapping where a list of texts belongs.

    Raises:
        InvalidInput: not a sequence of texts.
    """
    if isinstance(documents, str | bytes) or not isinstance(documents, Sequence):
        raise InvalidInput(
            "documents", f"is {type(documents).__name__}, not a list", "Pass a list of strings."
        )
    for index, document in enumerate(documents):
        check_text(f"documents[{index}]", document)


def check_top_n(top_n: object, field: str = "top_n") -> None:
    """Refuse what is not a positive number or None.

    Raises:
        InvalidInput: wrong.
    """
    if top_n is None:
        return
    if isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1:
        raise InvalidInput(field, f"{top_n!r} is not a positive whole number", "Give 1 or more.")


def check_pairs(pairs: object, first: int = 0) -> list[Pair]:
    """Refuse anything but (query, document) texts.

    Args:
        pairs: what should be pairs.
        first: what the caller calls the first of them, where they are a part.

    Raises:
        InvalidInput: names the pair and what is wrong with it.
    """
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise InvalidInput(
            "pairs", f"is {type(pairs).__name__}", "Pass a list of (query, document) tuples."
        )
    checked: list[Pair] = []
    for index, pair in enumerate(pairs, first):
        if not isinstance(pair, tuple | list) or len(pair) != 2:  # noqa: PLR2004 - a pair
            raise InvalidInput(
                f"pairs[{index}]", "is not a (query, document) tuple", "Pass two strings."
            )
        check_text(f"pairs[{index}].query", pair[0])
        check_text(f"pairs[{index}].document", pair[1])
        checked.append((pair[0], pair[1]))
    return checked


def check_fallback(asked: int | None, longest: int, specials: int) -> None:
    """Refuse a fallback that would change nothing, or leave no text.

    Args:
        asked: tokens that a pair may have then; None never falls back.
        longest: tokens that it may have otherwise.
        specials: special tokens added to every pair.

    Raises:
        InvalidInput: not below ``longest``, or no room beside the special tokens.
    """
    if asked is not None and not specials < asked < longest:
        raise InvalidInput(
            "fallback_max_length",
            f"{asked} is not between {specials}, the special tokens of a pair, and {longest}, the "
            "tokens that it may have anyway",
            f"Use {specials + 1} to {longest - 1}, or leave it out.",
        )


def check_max_length(asked: int | None, limit: int, specials: int) -> int:
    """The ``max_length`` to use: the model's own limit unless the user asked for less.

    Args:
        asked: the option's value; None is the model's limit.
        limit: longest pair the model takes, special tokens included.
        specials: special tokens added to every pair.

    Raises:
        InvalidInput: more than the model takes, or no room beside the special tokens.
    """
    if asked is None:
        return limit
    if asked > limit:
        raise InvalidInput(
            "max_length", f"{asked} is beyond the model's {limit} tokens", f"Use at most {limit}."
        )
    if asked <= specials:
        raise InvalidInput(
            "max_length",
            f"{asked} leaves no room beside {specials} special tokens",
            f"Use at least {specials + 1}.",
        )
    return asked
