"""The profile: the JSON file that tuning writes and everything else reads.

It is valid for the machine, model and library versions in its key. Where one of them has changed
the profile is still used, with a warning that names the change. A file of another schema version is
refused.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon import files
from echelon.errors import EchelonWarning, ProfileError, StorageError
from echelon.messages import N_, restored, stored, tr

if TYPE_CHECKING:
    from echelon.options import Options
    from echelon.types import ModelInfo

SCHEMA = 1
"""Version of the file's layout."""

MAX_PROFILE_BYTES = 64 * files.MIB

_COUNT = files.whole(1, 2**63 - 1)  # a token budget without limit is a large number
_OBJECTS = files.list_of(dict, "objects")
_PROFILE = {
    "key": files.OBJECT,
    "settings": files.OBJECT,
    "created": files.TEXT,
    **dict.fromkeys(("machine", "data", "cost", "memory", "scenario"), files.OBJECT),
    **dict.fromkeys(("precisions", "threads", "points", "best", "situations"), _OBJECTS),
    "warnings": files.list_of(str, "texts"),
    "learned_token_budget": _COUNT,
}
_KEY = {
    **dict.fromkeys(
        ("model", "revision", "device", "device_name", "precision", "kernels"), files.TEXT
    ),
    "versions": files.OBJECT,
    "features": files.list_of(str, "texts"),
    **dict.fromkeys(("cores", "usable_cpus"), _COUNT),
}
_SETTINGS = {
    "precision": files.TEXT,
    **dict.fromkeys(("token_budget", "batch_size", "threads", "max_length"), _COUNT),
}
_PRECISION = {
    "precision": files.TEXT,
    "passed": files.SWITCH,
    "keep_bf16": files.list_of(str, "texts"),
}
"""What the fields of a profile, its key, its settings and its precisions may hold. The other
fields are checked where they are used."""

TUNE_AGAIN = N_("Run `echelon tune` again to measure this machine.")
TUNED = N_("Give the file that `echelon tune` wrote, such as echelon-profile.json.")


NAMES = {
    "model": "the model",
    "revision": "the model's revision",
    "device": "the device",
    "precision": "the precision",
}
"""Fields of a profile's key in words."""

FEATURES = {
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "amx_fp16": "AMX fp16",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
"""Processor features that make matrix products faster, best first, and their names."""


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """The model, device and libraries that a profile is valid for."""

    model: str
    revision: str  # hub commit, or a fingerprint of a local folder
    device: str  # ``cpu`` or ``cuda:N``; ``device_name`` is that of the processor or the GPU
    device_name: str
    precision: str
    versions: dict[str, str]  # versions of the libraries that affect speed and scores
    # of the processor; None where it is unknown, as in older profiles, and for a GPU
    features: list[str] | None = None  # instruction sets that make matrix products faster
    cores: int | None = None  # physical
    usable_cpus: int | None = None  # by affinity and the container's quota
    kernels: str | None = None  # as :class:`echelon.types.ModelInfo` has it

    def differences(self, now: ProfileKey) -> list[str]:
        """Describe each value that has changed, in words; empty where the profile is valid."""
        if self.device.partition(":")[0] == now.device.partition(":")[0]:
            now = replace(now, device=self.device)  # a card's number says nothing, its name does
        pairs = [(words, getattr(self, name), getattr(now, name)) for name, words in NAMES.items()]
        for package in sorted(self.versions.keys() | now.versions.keys()):
            old, new = (key.versions.get(package, "not installed") for key in (self, now))
            pairs.append((package, old, new))
        if None not in {self.kernels, now.kernels}:
            pairs.append(("the level of the compiled kernels", self.kernels, now.kernels))
        found = [f"{words} was {old}, is {new}" for words, old, new in pairs if old != new]
        if self.other_machine(now):
            found.insert(0, f"the machine was {self.machine(now)}, is {now.machine(self)}")
        return found

    def other_machine(self, now: ProfileKey) -> bool:
        """Whether the machine has changed; what is unknown on one side does not count."""
        return self.device_name != now.device_name or bool(self._changed(now))

    def machine(self, other: ProfileKey) -> str:
        """The processor or GPU, with what is different on another machine."""
        said, changed = [], self._changed(other)
        if "features" in changed:
            mine, its = set(self.features or ()), set(other.features or ())
            sets = [FEATURES.get(name, name) for name in self.features or ()]
            said.append(", ".join(sets) + (" only" if mine < its else ""))
        said += [f"{getattr(self, n)} {words}" for n, words in _COUNTS.items() if n in changed]
        return " with ".join([self.device_name, *[" and ".join(said)] * bool(said)])

    def _changed(self, other: ProfileKey) -> set[str]:
        """Known values of the processor that are not the same."""
        names = ("features", *_COUNTS)
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name for name, two in pairs.items() if None not in two and two[0] != two[1]}


_COUNTS = {"cores": "physical cores", "usable_cpus": "usable CPUs"}


@dataclass(frozen=True, slots=True)
class TunedSettings:
    """What tuning chose, with the names of :class:`echelon.options.Options`."""

    precision: str
    token_budget: int
    batch_size: int | None
    threads: int | None
    max_length: int | None


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything that a tuning run found."""

    key: ProfileKey
    settings: TunedSettings
    created: str  # UTC time, ISO 8601
    machine: dict[str, Any] = field(default_factory=dict)
    # name and token lengths of the texts that were scored
    data: dict[str, Any] = field(default_factory=dict)
    # speed of each precision, and its agreement with fp32
    precisions: list[dict[str, Any]] = field(default_factory=list)
    threads: list[dict[str, Any]] = field(default_factory=list)  # speed with each number of threads
    # every measured point of the sweep; ``best`` is the best for each number of pairs
    points: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    # the best point for each of the four scenarios
    situations: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # smaller budget that was learned from running out of memory
    learned_token_budget: int | None = None
    # a :class:`echelon.scheduling.fit.CostFit`: how long a step takes; None where it could not be
    # fitted, or the profile is older
    cost: dict[str, Any] | None = None
    # a :class:`echelon.scheduling.fit.MemoryFit`: how much memory a step needs
    memory: dict[str, Any] | None = None
    # what the settings were chosen for and how they were validated, see docs/TUNE.md; None where
    # no scenario was given
    scenario: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile, or raise :class:`ProfileError`."""
        return cls.from_dict(read_json(Path(path)), Path(path))

    @classmethod
    def from_dict(cls, content: Any, path: Path) -> Profile:
        """Build a profile from its JSON content."""
        if not isinstance(content, dict) or "schema" not in content:
            raise _unusable(path, tr("not an Echelon profile"), tr(TUNED))
        if content["schema"] != SCHEMA:
            words = N_("profile version {found}, this Echelon reads {known}")
            problem = tr(words, found=repr(content["schema"]), known=SCHEMA)
            raise _unusable(path, problem, tr(TUNE_AGAIN))
        try:
            files.check_fields(content, _PROFILE, ("key", "settings"))
            files.check_fields(content["key"], _KEY, [*NAMES, "device_name", "versions"])
            files.check_fields(content["settings"], _SETTINGS, ("precision", "token_budget"))
            for row in content.get("precisions") or ():
                files.check_fields(row, _PRECISION, ("precision",))
            known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            known["key"] = ProfileKey(**content["key"])
            known["settings"] = TunedSettings(**content["settings"])
            return cls(**known)
        except (ValueError, TypeError) as error:
            problem = tr("incomplete profile ({reason})", reason=error)
            raise _unusable(path, problem, tr(TUNE_AGAIN)) from error

    def as_dict(self) -> dict[str, Any]:
        """The JSON content."""
        return {"schema": SCHEMA, **asdict(self)}

    def precision_row(self, precision: str) -> dict[str, Any] | None:
        """The row of a precision in ``precisions``; None where it was not compared."""
        return next((row for row in self.precisions if row["precision"] == precision), None)

    @property
    def keep_bf16(self) -> list[str]:
        """The layers that the profile's precision leaves in bf16."""
        row = self.precision_row(self.key.precision) or {}
        return list(row.get("keep_bf16", []))

    @property
    def goal_s(self) -> float | None:
        """Latency goal in seconds that the settings were chosen for, if there was one."""
        asked = (self.scenario or {}).get("asked")
        goal = asked.get("slo_p99_s") if isinstance(asked, dict) else None
        return float(goal) if isinstance(goal, int | float) and goal > 0 else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile completely or not at all, or raise :class:`StorageError`."""
        write_json(Path(path), self.as_dict())


def current_key(model: str, revision: str, info: ModelInfo, **processor: Any) -> ProfileKey:
    """The key of a model as it is loaded now, on a processor as ``models.device`` describes it."""
    return ProfileKey(
        model,
        revision,
        info.device,
        info.device_name,
        info.precision,
        library_versions(),
        kernels=info.kernels,
        **processor,
    )


def library_versions(
    packages: tuple[str, ...] = ("echelon-rerank", "torch", "tokenizers"),
) -> dict[str, str]:
    """Versions of the installed ones of some packages: by default those that affect a profile."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def apply_profile(options: Options, profile: Profile) -> Options:
    """Fill in what the user left open.

    A step size from the user, in tokens or pairs, replaces both of the profile's.
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
    """Warn where a profile was measured under other conditions, with the differences."""
    differences = profile.key.differences(now)
    if not differences:
        return
    others = "; ".join(differences[1:])
    if profile.key.other_machine(now):
        where = f"on {profile.key.machine(now)}; this machine is {now.machine(profile.key)}"
        said = f"{where}. Also, {others}" if others else where
    else:
        said = f"under other conditions: {'; '.join(differences)}"
    warnings.warn(
        f"{path} was measured {said}. It is still used. {TUNE_AGAIN}", EchelonWarning, stacklevel=4
    )


def remember_budget(path: str | os.PathLike[str] | None, budget: int | None) -> None:
    """Write the token budget that fits in memory into the profile, if any; None removes it.

    A profile that cannot be written is only a warning: scoring continues.
    """
    if path is None:
        return
    try:
        replace(Profile.load(path), learned_token_budget=budget).save(path)
    except (ProfileError, StorageError) as error:
        what = "full token budget" if budget is None else f"token budget {budget}"
        warnings.warn(
            f"The {what} that fits in memory could not be stored: {error}",
            EchelonWarning,
            stacklevel=2,
        )


def read_json(path: Path) -> Any:
    """Read a JSON file, or raise :class:`ProfileError`."""
    try:
        return restored(files.read_json(path, MAX_PROFILE_BYTES))
    except FileNotFoundError:
        remedy = tr("Make one with `echelon tune MODEL --profile {path}`.", path=path)
        raise _unusable(path, tr("no such profile"), remedy) from None
    except OSError as error:
        reason = error.strerror or error
        problem = tr("cannot be read ({reason})", reason=reason)
        raise _unusable(path, problem, tr(TUNED)) from error
    except ValueError as error:
        lines = "Extra data" in str(error)
        why = tr("it holds several JSON values, as JSONL files do") if lines else error
        problem = tr("cannot be read as a profile ({reason})", reason=why)
        raise _unusable(path, problem, tr(TUNED)) from error


def _unusable(path: Path, problem: str, remedy: str) -> ProfileError:
    words = tr("{field}: {problem}. {remedy}", field=path, problem=problem, remedy=remedy)
    return ProfileError(words)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as :func:`write_text` does."""
    write_text(path, json.dumps(stored(content), ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a new file, then move it: completely or not at all (:class:`StorageError`)."""
    try:
        # A file in a folder of its own, not a temporary file: others may read it as usual (umask).
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            fresh = Path(folder, path.name)
            with fresh.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}). "
            "Free disk space or choose another file."
        ) from error
