"""Build the source distribution and the wheels into dist/, audit them, and try each one.

The wheels are built from the source distribution, unpacked elsewhere: so it is tested with them,
and the library in the working tree stays this machine's. zig compiles for glibc 2.28 from anywhere.

    python scripts/wheels.py            build, audit and try
    python scripts/wheels.py --no-try   build and audit

``make wheels`` installs the tools into an environment of their own and calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hatch_build import LEVELS, LIBRARY  # noqa: E402 - it lies beside no package

GLIBC = 28  # 2.28
PURE = "any"
MACHINES = ("x86_64", "aarch64")
PLATFORMS = (*(f"manylinux_2_{GLIBC}_{machine}" for machine in MACHINES), PURE)
"""The wheels' platform tags; the pure one is for everything else."""

ZIG = f"{sys.executable} -m ziglang c++"
LARGEST_BYTES = 5_000_000
QUESTION = "how do I reset my router?"
ANSWERS = ("Bananas are yellow.", "To reset the router, hold its reset button for ten seconds.")


def run(command: Sequence[object], **more: Any) -> str:
    """Run a command; return what it printed.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, text=True, capture_output=True, check=False, **more)  # noqa: S603 - no shell
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(target: str, source: Path, out: Path, **environment: str) -> Path:
    """Build the ``wheel`` or the ``sdist`` of a folder into another; return the file."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as fresh:
        command = (sys.executable, "-m", "hatchling", "build", "-t", target, "-d", fresh)
        run(command, cwd=source, env={**os.environ, **environment})
        (file,) = Path(fresh).iterdir()
        return Path(shutil.move(file, out / file.name))


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack a source distribution; return the folder in it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def build_wheel(tag: str, source: Path, out: Path) -> Path:
    """Build the wheel of a platform.

    Raises:
        SystemExit: it became another platform's, which it does when the kernels do not compile.
    """
    target = f"{tag.rpartition(f'_{GLIBC}_')[2]}-linux-gnu.2.{GLIBC}"
    compiler = f"{ZIG} -target {target} -s"
    wheel = build("wheel", source, out, ECHELON_WHEEL_PLATFORM=tag, CXX=compiler)
    if not wheel.name.endswith(f"-py3-none-{tag}.whl"):
        raise SystemExit(f"{wheel.name} should be for {tag}: the kernels did not compile.")
    if missing := levels_of(tag) - levels_in(wheel):
        raise SystemExit(f"{wheel.name} lacks the kernels of {', '.join(sorted(missing))}.")
    return wheel


def levels_of(tag: str) -> set[str]:
    """Levels of kernels that a wheel of a platform holds; the pure one holds none."""
    return set().union(*(levels for machine, levels in LEVELS.items() if tag.endswith(machine)))


def levels_in(wheel: Path) -> set[str]:
    """Levels of kernels in a wheel."""
    before, after = LIBRARY.split("{level}")
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    return {
        name.removeprefix(before).removesuffix(after) for name in names if name.startswith(before)
    }


def allowed(found: str, tag: str) -> bool:
    """Whether what needs the platform tag ``found`` may claim ``tag``: an older glibc does."""
    minor, machine = re.fullmatch(r"manylinux_2_(\d+)_(\w+)|.*", found).groups()  # type: ignore[union-attr] - `.*` matches
    return machine is not None and int(minor) <= GLIBC and tag == f"manylinux_2_{GLIBC}_{machine}"


def audit(wheel: Path, tag: str) -> str:
    """Compare a wheel's size and libraries with what is allowed; return a line about it.

    Raises:
        SystemExit: it is too large, or needs what a machine of that platform may lack.
    """
    size = wheel.stat().st_size
    if size > LARGEST_BYTES:
        raise SystemExit(f"{wheel.name} has {size:,} bytes; at most {LARGEST_BYTES:,} are allowed.")
    if tag == PURE:
        return f"{wheel.name}: {size / 1e6:.2f} MB"
    report = json.loads(run((sys.executable, "-m", "auditwheel", "show", "--json", wheel)))
    if not allowed(report["overall_tag"], tag):
        raise SystemExit(f"{wheel.name} is no wheel for {tag}: {json.dumps(report, indent=1)}")
    return f"{wheel.name}: {size / 1e6:.2f} MB, auditwheel says {report['overall_tag']}"


def try_here(wheel: Path, folder: Path, *, compiled: bool) -> str:
    """Install a wheel into an empty environment without a compiler, and rank; return a line.

    Raises:
        SystemExit: it ranked wrongly, or the kernels are missing or there against ``compiled``.
    """
    venv.create(folder, with_pip=True)
    bare = {**os.environ, "PATH": str(folder / "bin"), "CXX": "false"}
    pins = ("-c", ROOT / "requirements.lock", "--only-binary=:all:")
    run((folder / "bin/pip", "install", "-q", *pins, f"{wheel}[torch]"), env=bare)
    command = (folder / "bin/echelon", "rank", "--model", "demo", "--json", QUESTION, *ANSWERS)
    (first, *_) = json.loads(run(command, env=bare, cwd=folder))["results"]
    if first["index"] != 1:
        raise SystemExit(f"{wheel.name} ranks wrongly: {first}")
    asked = "from echelon.models.kernels import used_level; print(used_level())"
    level = run((folder / "bin/python", "-c", asked), env=bare, cwd=folder).strip()
    if (level != "off") != compiled:
        raise SystemExit(f"{wheel.name}: its compiled kernels are {level}.")
    logit = f"{first['logit']:.4f}"
    return f"{wheel.name}: installed, and ranks with a logit of {logit} (kernels: {level})"


def main() -> None:
    """Build, audit and try."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the files")
    parser.add_argument("--no-try", action="store_true", help="build and audit only")
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=PLATFORMS)
    given = parser.parse_args()
    out = given.out.resolve()
    sdist = build("sdist", ROOT, out)
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB")
    for tag in given.platforms:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = build_wheel(tag, unpack(sdist, Path(scratch)), out)
            print(audit(wheel, tag))
            if not given.no_try and tag.endswith((PURE, platform.machine())):
                print(try_here(wheel, Path(scratch) / "venv", compiled=tag != PURE))


if __name__ == "__main__":
    main()
