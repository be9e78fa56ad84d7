"""Every option once: its type, default, meaning and check; and the checks of what callers pass in.

Options mean the same in Python, on the command line and in a profile. They are frozen, checked when
they are made, and not read from the environment. Each error names the field, the problem and the
remedy.
"""

# ruff: noqa: RUF009 - _option() is dataclasses.field() with a check

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from echelon.errors import InvalidInput, MissingDependency
from echelon.types import Truncation

if TYPE_CHECKING:
    from echelon.types import Pair

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8", "fp8"]
Allowance = Literal["precision", "max_length"]


def _device(name: str, value: object) -> object:
    if isinstance(value, str):
        kind, _, number = value.partition(":")
        if value in {"auto", "cpu", "cuda", "mps"}:
            return value
        if kind == "cuda" and number.isascii() and number.isdecimal():
            return value
    raise InvalidInput(name, f"{value!r} is unknown", "Use auto, cpu, cuda, cuda:N or mps.")


def _one_of(*choices: str) -> Callable[[str, object], object]:
    def check(name: str, value: object) -> object:
        if value not in choices:
            raise InvalidInput(name, f"{value!r} is unknown", f"Use {', '.join(choices)}.")
        return value

    return check


def _any_of(*choices: str) -> Callable[[str, object], object]:
    check = _one_of(*choices)

    def check_all(name: str, value: object) -> object:
        if isinstance(value, str) or not isinstance(value, Iterable):
            value = (value,)
        return tuple(check(name, one) for one in value)

    return check_all


def _path(name: str, value: object) -> object:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise InvalidInput(name, f"{value!r} is not a path", "Give a file name.")
    return value


def _revision(name: str, value: object) -> object:
    if value is not None and not isinstance(value, str):
        raise InvalidInput(name, f"{value!r} is not a string", "Name a commit.")
    return value


def _instruction(name: str, value: object) -> object:
    if value is not None:
        check_text(name, value)
    return value


_SIZE = re.compile(r"([0-9]+(?:[.][0-9]+)?) ?(?:(?:([kmgt])(i?))?b)?", re.IGNORECASE)

MIN_CACHE_BYTES = 1000
"""Smallest cache but none: a score takes half of it."""


def _cache_bytes(name: str, value: object) -> object:
    """Bytes of a cache, from a number of them or a text such as ``256MB``."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        size = value
    else:
        found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None:
            raise InvalidInput(name, f"{value!r} is no size", "Give one such as 256MB, or 0.")
        number, prefix, binary = found.groups(default="")
        base = 1024 if binary else 1000
        size = int(float(number) * base ** " kmgt".index(prefix.lower() or " "))
    if size is not None and size != 0 and size < MIN_CACHE_BYTES:
        problem = f"{value} is too small for a score"
        raise InvalidInput(name, problem, "Give a size such as 256MB, or 0.")
    return size


def check_count(name: str, value: object) -> object:
    """Refuse what is not a positive whole number or None."""
    if value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(name, f"{value!r} is not a positive whole number", "Give 1 or more.")
    return value


def _option(
    default: Any,
    check: Callable[[str, Any], object] = lambda _, value: value,
    *,
    per_call: bool = False,
) -> Any:
    """An option: its default, its check, and whether one call may set it."""
    return field(default=default, metadata={"check": check, "per_call": per_call})


@dataclass(frozen=True, slots=True)
class Options:
    """How a reranker loads a model and scores with it."""

    device: str = _option("auto", _device)
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` (Apple's GPU); see docs/GPU.md."""

    precision: Precision = _option("auto", _one_of(*get_args(Precision)))
    """``auto`` takes the profile's choice, else fp32 on CPU and fp16 on CUDA. ``int8``, on CPU, and
    ``fp8``, on newer cards, are refused unless they rank as fp32 does, see
    :mod:`echelon.engine.precision_check`."""

    max_length: int | None = _option(None, check_count, per_call=True)
    """Tokens a pair may have, special tokens included; None is the model's limit."""

    truncation: Truncation = _option("longest_first", _one_of(*get_args(Truncation)), per_call=True)
    """Which text of a pair that is too long loses tokens: the longer one (``longest_first``), or
    the document (``only_second``)."""

    max_query_tokens: int | None = _option(None, check_count, per_call=True)
    """Tokens kept of a query before it is joined with a document; None keeps all."""

    token_budget: int | None = _option(None, check_count, per_call=True)
    """Tokens a step may cost; None is the profile's choice or the default."""

    batch_size: int | None = _option(None, check_count, per_call=True)
    """Pairs a step may hold; None leaves it to the token budget."""

    threads: int | None = _option(None, check_count)
    """CPU threads of the forward pass (process-wide in torch); None is all the process may use."""

    profile: str | os.PathLike[str] | None = _option(None, _path)
    """File written by ``echelon tune``."""

    revision: str | None = _option(None, _revision)
    """Hub branch, tag or commit; None is the default branch."""

    label: str | int | None = _option(None)
    """Which output of a head with several labels to score, by name or number."""

    instruction: str | None = _option(None, _instruction, per_call=True)
    """What a language model is asked to judge, in a sentence; None is the model's own. Classifiers
    read none and refuse it."""

    allow: tuple[Allowance, ...] = _option((), _any_of(*get_args(Allowance)), per_call=True)
    """What the OOM ladder may lower if one pair alone does not fit in memory."""

    score_cache: int | str | None = _option(None, _cache_bytes)
    """Memory in which scores are kept for pairs that come again: bytes, or a text such as
    ``256MB``; 0 and None keep none, see :mod:`echelon.engine.score_cache`."""

    progress: bool = _option(default=False, per_call=True)
    """Show progress bars."""

    def __post_init__(self) -> None:
        for option in fields(self):
            checked = option.metadata["check"](option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)

    @property
    def score_cache_bytes(self) -> int:
        """Bytes of the score cache; 0 where there is none."""
        return self.score_cache if isinstance(self.score_cache, int) else 0

    @classmethod
    def of(cls, **values: Any) -> Options:
        """Build options from keywords; an error names the nearest known keyword."""
        known = [option.name for option in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
                raise InvalidInput(name, "unknown option", hint)
        return cls(**values)

    def overridden(self, values: dict[str, Any]) -> Options:
        """These options with others for one call; those of the model cannot be set."""
        if not values:
            return self
        allowed = {option.name for option in fields(self) if option.metadata["per_call"]}
        fixed = sorted(set(values) - allowed)
        if fixed:
            known = ", ".join(sorted(allowed))
            remedy = f"One call may set: {known}. Give the others to Reranker(...)."
            raise InvalidInput(fixed[0], "cannot be set for one call", remedy)
        return replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """The options as they come back from JSON: paths as strings, tuples as lists."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values


def check_max_length(asked: int | None, limit: int, specials: int) -> int:
    """The ``max_length`` to use: the model's ``limit`` unless the user asked for less."""
    if asked is None:
        return limit
    if asked > limit:
        problem = f"{asked} is beyond the model's {limit} tokens"
        raise InvalidInput("max_length", problem, f"Use at most {limit}.")
    if asked <= specials:
        problem = f"{asked} leaves no room beside {specials} special tokens"
        raise InvalidInput("max_length", problem, f"Use at least {specials + 1}.")
    return asked


def check_fallback(asked: int | None, longest: int, specials: int) -> None:
    """Refuse a length, used while the queue is long, that changes nothing or leaves no text."""
    if asked is not None and not specials < asked < longest:
        raise InvalidInput(
            "fallback_max_length",
            f"{asked} is not between {specials}, the special tokens of a pair, and {longest}, the "
            "tokens that it may have anyway",
            f"Use {specials + 1} to {longest - 1}, or leave it out.",
        )


def check_text(name: str, text: object) -> None:
    """Refuse what is not encodable text."""
    if not isinstance(text, str):
        raise InvalidInput(name, f"is {type(text).__name__}, not a string", "Pass text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(
            name,
            f"holds a lone surrogate at character {error.start}, which is no valid text",
            "Decode it correctly, or clean it with text.encode('utf-8', 'replace').decode().",
        ) from None


def check_rank(query: object, documents: object, top_n: object) -> None:
    """Refuse a query, documents or ``top_n`` that cannot be ranked."""
    check_text("query", query)
    if isinstance(documents, str | bytes) or not isinstance(documents, Sequence):
        problem = f"is {type(documents).__name__}, not a list"
        raise InvalidInput("documents", problem, "Pass a list of strings.")
    for index, document in enumerate(documents):
        check_text(f"documents[{index}]", document)
    check_count("top_n", top_n)


def check_pairs(pairs: object, first: int = 0) -> list[Pair]:
    """Refuse anything but (query, document) texts; messages count pairs from ``first``."""
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        problem = f"is {type(pairs).__name__}"
        raise InvalidInput("pairs", problem, "Pass a list of (query, document) tuples.")
    checked: list[Pair] = []
    for index, pair in enumerate(pairs, first):
        if not isinstance(pair, tuple | list) or len(pair) != 2:  # noqa: PLR2004 - a pair
            problem = "is not a (query, document) tuple"
            raise InvalidInput(f"pairs[{index}]", problem, "Pass two strings.")
        check_text(f"pairs[{index}].query", pair[0])
        check_text(f"pairs[{index}].document", pair[1])
        checked.append((pair[0], pair[1]))
    return checked


DISTRIBUTIONS = {"hdrh": "hdrhistogram"}
"""Name for pip of a package that is imported under another name."""


def require_packages(who: str, extra: str, packages: Iterable[str], other: str = "") -> None:
    """Refuse to begin without the packages of an extra.

    Args:
        who: the command or option that needs them.
        extra: the extra to install.
        packages: names to import.
        other: another remedy, in words.
    """
    missing = [
        DISTRIBUTIONS.get(name, name) for name in packages if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise MissingDependency(f"{who} needs {', '.join(missing)}.", extra, other)
