"""Cards that are in the machine but out of torch's reach, most often for an old driver.

``torch.cuda.is_available()`` is then only false, and scoring would move to the CPU without a word.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

NEEDED = {"13": (580, "7.5"), "12": (525, "5.0"), "11": (450, "3.5")}
"""By CUDA's major version: NVIDIA's oldest driver branch (table "minor version compatibility" of
CUDA's release notes), and the oldest compute capability."""

_VERSION = re.compile(r"Kernel Module\b.*?(\d+(?:\.\d+)+)")
"""The driver's version in ``/proc/driver/nvidia/version``."""


@dataclass(frozen=True, slots=True)
class UnusableCard:
    """A card that torch cannot use."""

    build: str  # what torch is built for, such as ``CUDA 13.0``
    driver: str | None  # version of NVIDIA's driver; None where it is unknown
    needed: int | None = None  # oldest driver branch; None where it is unknown
    capability: str | None = None  # oldest compute capability

    @property
    def too_old(self) -> bool:
        """Whether the driver is known to be older than the build needs."""
        if self.driver is None or self.needed is None:
            return False
        return int(self.driver.partition(".")[0]) < self.needed

    def __str__(self) -> str:
        start = f"there is a card, but torch, built for {self.build}, cannot use it"
        if self.too_old:
            return (
                f"{start}: it needs NVIDIA driver {self.needed} or newer, and a card of compute "
                f"capability {self.capability} or newer; this machine has driver {self.driver}"
            )
        if self.needed is None:
            return start
        has = "" if self.driver is None else f"; driver {self.driver} is new enough"
        return (
            f"{start}. The build needs NVIDIA driver {self.needed} and compute capability "
            f"{self.capability} or newer{has}"
        )


REMEDY = (
    "Update the driver, install a build of torch for an older CUDA (docs/GPU.md), or see with "
    "nvidia-smi whether this process may use the card."
)


NODES = ("dev/nvidia0", "dev/nvidiactl", "dev/nvidia-caps", "dev/dxg", "dev/kfd")
"""Device nodes of cards: NVIDIA's, those of Windows' subsystem, AMD's."""


def surely_no_card(root: Path = Path("/")) -> bool:
    """Whether torch need not be asked for cards: importing it takes seconds and hundreds of MB."""
    imported = sys.modules.get("torch") is not None
    return sys.platform == "linux" and not imported and not any((root / n).exists() for n in NODES)


def unusable_card(root: Path = Path("/")) -> UnusableCard | None:
    """The card that torch cannot use; None if it uses one, there is none, or it is hidden.

    ``root`` is the folder with ``dev`` and ``proc``.
    """
    import torch

    build, hip = torch.version.cuda, torch.version.hip
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in {"", "-1"}
    if hidden or torch.cuda.is_available():
        return None
    if hip is not None:
        return UnusableCard(f"ROCm {hip}", None) if (root / "dev/kfd").exists() else None
    told = root / "proc/driver/nvidia/version"
    if build is None or not ((root / "dev/nvidia0").exists() or told.exists()):
        return None
    found = _VERSION.search(told.read_text(encoding="utf-8")) if told.exists() else None
    needed, capability = NEEDED.get(build.partition(".")[0], (None, None))
    return UnusableCard(f"CUDA {build}", found[1] if found else None, needed, capability)


def accelerators() -> str:
    """What torch was built for beside the CPU, such as `` (ROCm 7.0)``; empty for nothing."""
    import torch

    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    named = [f"{kind} {version}" for kind, version in builds.items() if version is not None]
    return f" ({', '.join(named)})" if named else ""


def untested_here() -> list[str]:
    """Accelerators of this machine on which Echelon was never tested, as options name them."""
    import torch

    rocm = torch.version.hip is not None and torch.cuda.is_available()
    return ["cuda (ROCm)"] * rocm + ["mps"] * torch.backends.mps.is_available()
