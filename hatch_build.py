"""Build hook: compile the kernels if there is a compiler, else build without them.

A wheel built with them is for one platform and any Python 3; one built without is pure Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent
FOLDER = Path("src/echelon/models/kernels")
PLATFORM = "ECHELON_WHEEL_PLATFORM"
"""Environment variable of scripts/wheels.py: the wheel's platform tag, instead of this machine's;
``any`` compiles nothing."""

LIBRARY = "libechelon_{level}.so.1"  # ends in no suffix that Python takes for a module
SOURCES = ("attention.cpp", "rows.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-s",  # without the names of what is inside
    "-fno-math-errno",
    "-ffp-contract=fast",  # a * b + c in one instruction where there is one
    "-fno-exceptions",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # Vectors are passed between inline functions only; and gcc 12 and older warn about their own
    # headers' undefined vectors.
    "-Wno-psabi",
    "-Wno-uninitialized",
)

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_PORTABLE = ("-DECHELON_PORTABLE",)

LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512bf16": (*_AVX512, "-mavx512bf16"),
        "avx512": _AVX512,
        "avx2": ("-mavx2", "-mfma"),
        "portable": _PORTABLE,
    },
    "aarch64": {"neon": (), "portable": _PORTABLE},
}
"""Machine, as ``platform.machine()`` names it → level of its instructions → compiler flags.
:mod:`echelon.models.kernels` knows what a processor needs for each level."""


class KernelHook(BuildHookInterface):  # type: ignore[misc]  # hatchling ships no types for it
    """Adds the compiled kernels to the wheel, or to the source tree of an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a failure is a warning, never a failed installation."""
        del version
        platform_tag = os.environ.get(PLATFORM) or sysconfig.get_platform()
        if platform_tag == "any":
            return
        folder = Path(self.root) / FOLDER
        for reason in _compile(folder, platform_tag):
            self.app.display_warning(
                f"Echelon is built without some or all of its compiled kernels: {reason}. "
                "It works, slower on CPU."
            )
        built = sorted(path.name for path in folder.glob(LIBRARY.format(level="*")))
        if not built:
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag.replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += [str(FOLDER / name) for name in built]


def _compile(folder: Path, platform_tag: str) -> list[str]:
    """Build the libraries beside their sources; return the reasons for those that are missing."""
    for old in folder.glob("libechelon*.so.1"):
        old.unlink()
    machine = next((name for name in LEVELS if platform_tag.endswith(name)), None)
    if sys.platform != "linux" or machine is None:
        return [f"there are none for {platform_tag} yet"]
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return ["no C++ compiler (on Debian: apt install g++)"]
    failures = compile_kernels(compiler.split(), machine, folder)
    return [f"level {level}: {reason}" for level, reason in failures.items()]


def compile_kernels(compiler: Sequence[str], machine: str, output: Path) -> dict[str, str]:
    """Compile the kernels for every level of a machine, one library each.

    The libraries need the C library alone: no C++ runtime, no OpenMP. So any GCC from 10 or Clang
    from 10 will do, a cross compiler too, such as ``["aarch64-linux-gnu-g++"]`` or ``["python",
    "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu.2.17"]``.

    Args:
        compiler: the command and its first arguments.
        machine: a key of :data:`LEVELS`.
        output: an existing folder, for :data:`LIBRARY` of each level.

    Returns:
        The reason for each level that could not be compiled; empty if all were.
    """
    sources = [str(ROOT / FOLDER / name) for name in SOURCES]
    failures = {}
    for level, flags in LEVELS[machine].items():
        library = output / LIBRARY.format(level=level)
        command = [*compiler, *FLAGS, *flags, *sources, "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
        except OSError as error:
            failures[level] = f"{compiler[0]} did not start ({error})"
            continue
        if done.returncode:
            failures[level] = f"{compiler[0]} failed ({done.stderr.strip().splitlines()[-1:]})"
    return failures
