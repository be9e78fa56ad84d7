"""Options with one meaning in Python, on the command line and in a profile.

Frozen, validated once, and never read from the environment at import.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

from echelon.errors import InvalidInput

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Truncation = Literal["longest_first", "only_second"]
Allowance = Literal["precision", "max_length"]


@dataclass(frozen=True, slots=True)
class Options:
    """How a reranker loads and scores.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto`` takes the profile's choice, else fp32 on CPU and fp16 on CUDA; ``int8``
            serves where it ranks as fp32 does, see :mod:`echelon.gate`.
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
