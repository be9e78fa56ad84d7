"""The profile: what tuning found, and the machine, model and versions it holds for.

A versioned JSON file. The tuner writes it, :class:`echelon.Reranker` reads it. When the machine
or the model is no longer the same, the profile is stale: a warning with the remedy, no error.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import EchelonWarning, ProfileError, StorageError
from echelon.messages import restored, stored

if TYPE_CHECKING:
    from echelon.options import Options
    from echelon.types import ModelInfo

SCHEMA = 1
"""Version of the file's layout; another one cannot be read."""

TUNE_AGAIN = "Run `echelon tune` again to measure this machine."


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What a profile holds for.

    Attributes:
        model: name as the user gave it.
        revision: hub commit, or a fingerprint of a local folder.
        device: ``cpu`` or ``cuda:N``.
        device_name: the processor's or card's own name.
        precision: of the forward pass.
        versions: of the libraries that decide speed and scores.
    """

    model: str
    revision: str
    device: str
    device_name: str
    precision: str
    versions: dict[str, str]

    def differences(self, now: ProfileKey) -> list[str]:
        """What is different now, in words; empty when the profile is fresh."""
        pairs = [(f.name, getattr(self, f.name), getattr(now, f.name)) for f in fields(self)]
        return [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]


@dataclass(frozen=True, slots=True)
class TunedSettings:
    """What tuning chose; the names are those of :class:`echelon.options.Options`."""

    precision: str
    token_budget: int
    batch_size: int | None
    threads: int | None
    max_length: int | None


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything one tuning run found.

    Attributes:
        key: what it holds for.
        settings: what it chose.
        created: UTC time, ISO 8601.
        machine: description, see :mod:`echelon.tuning.machine`.
        data: which texts were scored, and their lengths in tokens.
        precisions: per precision, speed and agreement with fp32.
        threads: per number of threads tried, its speed.
        points: per measured point, see :class:`echelon.tuning.sweep.MeasuredPoint`.
        best: per number of pairs, its best point.
        situations: advice for the four situations, see :mod:`echelon.tuning.choose`.
        warnings: what to know before trusting it.
        learned_token_budget: smaller budget that memory pressure taught since; None if none.
        cost: how long a step takes, see :class:`echelon.scheduling.fit.CostFit`; None where that
        was
            refused, or the profile is older.
        memory: how much it needs, see :class:`echelon.scheduling.fit.MemoryFit`; None likewise.
        scenario: what the settings were chosen for and how that was proved, see docs/TUNE.md; None
            where no scenario was asked for.
    """

    key: ProfileKey
    settings: TunedSettings
    created: str
    machine: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    precisions: list[dict[str, Any]] = field(default_factory=list)
    threads: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    situations: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    learned_token_budget: int | None = None
    cost: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    scenario: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile.

        Raises:
            ProfileError: it is not there, no profile, or of another version.
        """
        return cls.from_dict(read_json(Path(path)), Path(path))

    @classmethod
    def from_dict(cls, content: Any, path: Path) -> Profile:
        """Build a profile from its JSON content."""
        if not isinstance(content, dict) or "schema" not in content:
            raise ProfileError(f"{path}: not an Echelon profile. {TUNE_AGAIN}")
        if content["schema"] != SCHEMA:
            raise ProfileError(
                f"{path}: profile version {content['schema']!r}, this Echelon reads {SCHEMA}. "
                f"{TUNE_AGAIN}"
            )
        try:
            known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            known["key"] = ProfileKey(**content["key"])
            known["settings"] = TunedSettings(**content["settings"])
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise ProfileError(f"{path}: incomplete profile ({error}). {TUNE_AGAIN}") from error

    def as_dict(self) -> dict[str, Any]:
        """The JSON content."""
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile whole or not at all.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        write_json(Path(path), self.as_dict())


def current_key(model: str, revision: str, facts: ModelInfo) -> ProfileKey:
    """The key of a model as it is loaded now."""
    return ProfileKey(
        model, revision, facts.device, facts.device_name, facts.precision, library_versions()
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide speed and scores, those installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("echelon-rerank", "torch", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def apply_profile(options: Options, profile: Profile) -> Options:
    """Fill in what the user left open.

    A step size that the user gave, in tokens or pairs, replaces the profile's altogether.
    """
    chosen = profile.settings
    filled: dict[str, Any] = {}
    if options.precision == "auto":
        filled["precision"] = chosen.precision
    if options.threads is None:
        filled["threads"] = chosen.threads
    if options.max_length is None:
        filled["max_length"] = chosen.max_length
    if options.token_budget is None and options.batch_size is None:
        learned = profile.learned_token_budget or chosen.token_budget
        filled["token_budget"] = min(learned, chosen.token_budget)
        filled["batch_size"] = chosen.batch_size
    return replace(options, **filled)


def warn_if_stale(profile: Profile, now: ProfileKey, path: object) -> None:
    """Say that a profile was measured under other conditions, and which.

    Warns:
        EchelonWarning: with the differences and the remedy.
    """
    differences = profile.key.differences(now)
    if differences:
        warnings.warn(
            f"{path} is stale: {'; '.join(differences)}. It is used all the same. {TUNE_AGAIN}",
            EchelonWarning,
            stacklevel=4,
        )


def remember_budget(path: str | os.PathLike[str] | None, budget: int) -> None:
    """Write a budget that memory pressure taught into the profile file, if there is one.

    A profile that cannot be written is only a warning: scoring goes on with the new budget.
    """
    if path is None:
        return
    try:
        replace(Profile.load(path), learned_token_budget=budget).save(path)
    except (ProfileError, StorageError) as error:
        warnings.warn(
            f"The token budget {budget} that memory allows could not be kept: {error}",
            EchelonWarning,
            stacklevel=2,
        )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ProfileError: it is not there or not JSON.
    """
    try:
        return restored(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ProfileError(
            f"{path}: no such profile. Make one with `echelon tune MODEL --profile {path}`."
        ) from None
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read ({error}). {TUNE_AGAIN}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all: into a neighbour first, then renamed.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    write_text(path, json.dumps(stored(content), ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; see :func:`write_json`."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}). "
            "Free disk space or choose another file."
        ) from error
