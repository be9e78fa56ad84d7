"""From a model's name to everything that opening it needs, the same for library and server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from echelon.gate import opener, pass_gate
from echelon.models.hub import resolve
from echelon.models.registry import require_model
from echelon.profile import Profile, apply_profile, current_key, remember_budget, warn_if_stale
from echelon.progress import status
from echelon.tokenization.tokenizer import PairEncoder

if TYPE_CHECKING:
    import os

    from echelon.models.base import ModelInfo
    from echelon.models.hub import ModelFolder
    from echelon.options import Options
    from echelon.score.worker import Opener


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model that may be opened.

    Attributes:
        folder: where it lies.
        options: the caller's, with what the profile chose.
        encoder: its tokenizer.
        profile: what tuning found; None where none was given.
        keep_bf16: layers that int8 leaves in bf16.
    """

    folder: ModelFolder
    options: Options
    encoder: PairEncoder
    profile: Profile | None
    keep_bf16: list[str]

    def opener(self, device: str | None = None, threads: int | None = None) -> Opener:
        """Opens the scorer, in this process or another.

        Args:
            device: instead of the options' own.
            threads: instead of the options' own.
        """
        options = replace(
            self.options,
            device=device or self.options.device,
            threads=threads or self.options.threads,
        )
        return opener(self.folder, options, self.keep_bf16)

    def check_profile(self, facts: ModelInfo) -> None:
        """Warn where the profile was measured on something else."""
        if self.profile is not None:
            key = current_key(self.folder.name, self.folder.revision, facts)
            warn_if_stale(self.profile, key, self.options.profile)

    def learned(self, budget: int) -> None:
        """Keep a smaller token budget, which memory taught, in the profile."""
        remember_budget(self.options.profile, budget)


def with_profile(asked: Options) -> tuple[Options, Profile | None]:
    """The options, with what the profile chose for those that were left open.

    Raises:
        ProfileError: the profile cannot be read.
    """
    if asked.profile is None:
        return asked, None
    profile = Profile.load(asked.profile)
    return apply_profile(asked, profile), profile


def prepare(
    model: str | os.PathLike[str], options: Options, profile: Profile | None
) -> PreparedModel:
    """Find a model, read its tokenizer and let its precision through the gate.

    Args:
        model: hub id, local folder, or ``"demo"``.
        options: with what the profile chose.
        profile: what tuning found.

    Raises:
        InvalidInput: int8 was asked for and does not rank as fp32 does.
        ModelError: the model is not there, damaged, or of an unsupported kind.
    """
    folder = resolve(model, revision=options.revision, progress=options.progress)
    require_model(folder.path)  # first of all: a folder that is no model says so
    encoder = PairEncoder(folder.path)
    with status("Comparing int8 with fp32", shown=options.progress) as told:
        kept = pass_gate(folder, options, encoder, profile, told)
    return PreparedModel(folder, options, encoder, profile, kept)
