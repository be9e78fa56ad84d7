"""Options with one meaning in Python, on the command line and in a profile.

Frozen, validated once, and never read from the environment at import.

Checks of what callers pass in: each error names the field, the problem and the remedy.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from echelon.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from echelon.types import Pair

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Truncation = Literal["longest_first", "only_second"]
Allowance = Literal["precision", "max_length"]


@dataclass(frozen=True, slots=True)
class Options:
    """How a reranker loads and scores.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto`` takes the profile's choice, else fp32 on CPU and fp16 on CUDA; ``int8``
            serves where it ranks as fp32 does, see :mod:`echelon.engine.precision_check`.
        max_length: tokens a pair may have, special tokens included; None is the model's limit.
        truncation: what gives way when a pair is longer: ``longest_first`` or ``only_second``
            (the document).
        max_query_tokens: tokens kept of a query before the pair is joined; None keeps all.
        token_budget: tokens a step may cost; None is the profile's or the default.
        batch_size: pairs a step may hold; None leaves it to the token budget.
        threads: CPU threads of the forward pass (process-wide in torch); None is what the
            process may use.
        profile: file written by ``echelon tune``, or None.
        revision: hub branch, tag or commit; None is the default branch.
        label: which output of a head with several labels to score, by name or number.
        allow: what may be given up when one pair alone does not fit in memory.
        progress: show progress bars.
    """

    device: str = "auto"
    precision: Precision = "auto"
    max_length: int | None = None
    truncation: Truncation = "longest_first"
    max_query_tokens: int | None = None
    token_budget: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    profile: str | os.PathLike[str] | None = None
    revision: str | None = None
    label: str | int | None = None
    allow: tuple[Allowance, ...] = ()
    progress: bool = False

    def __post_init__(self) -> None:
        _check_device(self.device)
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("truncation", self.truncation, get_args(Truncation))
        for name in ("max_length", "max_query_tokens", "token_budget", "batch_size", "threads"):
            _check_count(name, getattr(self, name))
        object.__setattr__(self, "allow", _check_allow(self.allow))
        if self.profile is not None and not isinstance(self.profile, str | os.PathLike):
            raise InvalidInput("profile", f"{self.profile!r} is not a path", "Give a file name.")
        if self.revision is not None and not isinstance(self.revision, str):
            raise InvalidInput("revision", f"{self.revision!r} is not a string", "Name a commit.")

    @classmethod
    def of(cls, **values: Any) -> Options:
        """Build options from keywords.

        Raises:
            InvalidInput: an unknown keyword (with the nearest known one) or a bad value.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
                raise InvalidInput(name, "unknown option", hint)
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The options as they come back from JSON: paths as strings, tuples as lists."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values


def _check_device(device: object) -> None:
    if isinstance(device, str):
        kind, _, number = device.partition(":")
        if device in {"auto", "cpu", "cuda"} or (
            kind == "cuda" and number.isascii() and number.isdecimal()
        ):
            return
    raise InvalidInput("device", f"{device!r} is unknown", "Use auto, cpu, cuda or cuda:N.")


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidInput(field, f"{value!r} is unknown", f"Use {', '.join(choices)}.")


def _check_count(field: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(field, f"{value!r} is not a positive whole number", "Give 1 or more.")


def _check_allow(allow: object) -> tuple[Allowance, ...]:
    if isinstance(allow, str) or not isinstance(allow, Iterable):
        allow = (allow,)
    names = tuple(allow)
    for name in names:
        _check_choice("allow", name, get_args(Allowance))
    return cast("tuple[Allowance, ...]", names)


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
