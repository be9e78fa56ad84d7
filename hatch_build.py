"""Build hook: compile the kernels if there is a compiler, else build without them.

A wheel built with them is for one platform and any Python 3; one built without is pure Python.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/echelon/models/kernels")
PLATFORM = "ECHELON_WHEEL_PLATFORM"
"""Environment variable of scripts/wheels.py: the wheel's platform tag, instead of this machine's;
``any`` compiles nothing."""

LIBRARY = "libechelon.so.1"  # ends in no suffix that Python takes for a module
SOURCES = ("attention.cpp", "rows.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # gcc 12 and older warn about their own headers' undefined vectors.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


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
        reason = _compile(folder)
        if reason is not None:
            self.app.display_warning(
                f"Echelon is built without its compiled kernels: {reason}. It works, slower on CPU."
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag.replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(str(FOLDER / LIBRARY))


def _compile(folder: Path) -> str | None:
    """Build the library beside its sources; return the reason if that fails."""
    library = folder / LIBRARY
    library.unlink(missing_ok=True)
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "AMD64"}:
        return f"there are none for {sys.platform} on {platform.machine()} yet"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "no C++ compiler (on Debian: apt install g++)"
    sources = [str(folder / name) for name in SOURCES]
    command = [*compiler.split(), *FLAGS, *sources, "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
    except OSError as error:
        return f"{compiler} did not start ({error})"
    if done.returncode:
        return f"{compiler} failed ({done.stderr.strip().splitlines()[-1:]})"
    return None
