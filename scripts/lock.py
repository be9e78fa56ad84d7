"""Write requirements.hashes.lock: the pins of the other locks with the hashes of their files.

The hashes are what the configured package indexes say (with pip's own configuration and session).
A hash that the lock already has for the same version stays: PyTorch's CPU builds come from
PyTorch's own index, and only those who name it in PIP_EXTRA_INDEX_URL read them anew.

    python scripts/lock.py                        write the lock
    python scripts/lock.py --select torch,serve   print its entries that these extras need

Needs nothing but pip.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from pip._internal.commands import create_command
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from pip._vendor.packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from pip._vendor.packaging.version import InvalidVersion

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).parents[1]
PINS = (ROOT / "requirements.lock", ROOT / "requirements.cuda.lock")
HASHES = ROOT / "requirements.hashes.lock"

PYTHONS = ((3, 11), (3, 12), (3, 13), (3, 14))
JSON = "application/vnd.pypi.simple.v1+json"
HTML_LINK = re.compile(r'href="[^"#]*?([^"/#]+)#sha256=([0-9a-f]{64})')
ENTRY = re.compile(r"^([\w.-]+)==([^\s;]+)(?:[^\n]*\\\n)*[^\n]*$", re.MULTILINE)
VERSION = re.compile(r"==[^\s;]+")
SHA256 = re.compile(r"sha256:([0-9a-f]{64})")

HEADER = """\
# Written by scripts/lock.py (make lock-hashes): requirements.lock and requirements.cuda.lock with
# the hashes of their files, for CPython 3.11 to 3.14 on Linux (glibc) on x86-64 and 64-bit ARM, and
# on macOS on Apple silicon. docs/DEPLOY.md says how to install from it.
# The files are wheels. Where a platform has none, the source archive's hash stands with them:
# {sources}.
# torch has the hashes of two builds: the default index's, which needs CUDA's packages on Linux, and
# the one of PyTorch's own index of CPU builds (+cpu), which does not.
"""


def linux(machine: str) -> list[str]:
    """Platform tags of Linux with a glibc up to 2.41."""
    names = [f"_2_{minor}" for minor in range(41, 4, -1)] + ["2014", "2010", "1"]
    return [f"manylinux{name}_{machine}" for name in names]


def accepted(platforms: list[str]) -> list[set[Tag]]:
    """The tags of wheels that each of PYTHONS accepts on a machine."""
    return [
        {
            *cpython_tags(python, [f"cp3{python[1]}"], platforms),
            *compatible_tags(python, f"cp3{python[1]}", platforms),
        }
        for python in PYTHONS
    ]


LINUX = [*accepted(linux("x86_64")), *accepted(linux("aarch64"))]
MACOS = accepted(list(mac_platforms((15, 0), "arm64")))


class Indexes:
    """The package indexes that pip is configured to use."""

    def __init__(self) -> None:
        command: Any = create_command("download")
        options, _ = command.parse_args([])
        urls = [options.index_url, *options.extra_index_urls]
        self._urls = [url.rstrip("/") for url in urls if url.startswith("http")]
        self._session = command._build_session(options)  # noqa: SLF001 - as pip itself

    def files(self, name: str) -> dict[str, str]:
        """The SHA-256 of each file of a package, by the file's name."""
        found: dict[str, str] = {}
        for url in self._urls:
            page = self._session.get(f"{url}/{canonicalize_name(name)}/", headers={"Accept": JSON})
            if page.status_code == HTTPStatus.NOT_FOUND:
                continue
            page.raise_for_status()
            if page.headers["Content-Type"] == JSON:
                files = page.json()["files"]
                found |= {file["filename"]: file["hashes"]["sha256"] for file in files}
            else:
                found |= {unquote(file): digest for file, digest in HTML_LINK.findall(page.text)}
        return found


def tags_of(file: str, version: str) -> set[Tag] | None:
    """The tags of a version's wheel, none for its source archive; None for any other file."""
    try:
        if file.endswith(".whl"):
            _, found, _, tags = parse_wheel_filename(file)
        else:
            (_, found), tags = parse_sdist_filename(file), frozenset()
    except (InvalidSdistFilename, InvalidVersion, InvalidWheelFilename):
        return None
    return set(tags) if found.public == version else None


def choose(files: dict[str, str], pin: str) -> tuple[set[str], bool]:
    """The hashes of a pin's files, and whether its source archive is among them.

    Raises:
        SystemExit: a platform has neither a wheel nor the source archive.
    """
    version = pin.partition("==")[2].partition(";")[0].strip()
    machines = LINUX if "linux" in pin.partition(";")[2] else [*LINUX, *MACOS]
    tags = {file: found for file in files if (found := tags_of(file, version)) is not None}
    wheels = {file for file in tags if any(tags[file] & machine for machine in machines)}
    served = set().union(*(tags[file] for file in wheels))
    if all(served & machine for machine in machines):
        return {files[file] for file in wheels}, False
    sources = {file for file in tags if not tags[file]}
    if not sources:
        raise SystemExit(f"{pin}: a platform has no file. Choose another version, or a marker.")
    return {files[file] for file in wheels | sources}, True


def pins() -> Iterator[str]:
    """The lines of the locks without hashes: ``name==version``, some with a marker."""
    for lock in PINS:
        lines = lock.read_text(encoding="utf-8").splitlines()
        yield from (line for line in lines if line and not line.startswith("#"))


def entries() -> dict[str, str]:
    """The entries of the lock with hashes, by the package's name."""
    text = HASHES.read_text(encoding="utf-8") if HASHES.exists() else ""
    return {canonicalize_name(entry[1]): entry[0] for entry in ENTRY.finditer(text)}


def write() -> None:
    """Write the lock with hashes."""
    indexes, before, lines, sources = Indexes(), entries(), [], []
    for pin in sorted(pins(), key=str.lower):
        name = pin.partition("==")[0]
        hashes, from_source = choose(indexes.files(name), pin)
        old = before.get(canonicalize_name(name), "")
        if old.startswith((f"{pin} ", f"{pin}\n")):
            hashes |= set(SHA256.findall(old))
        sources += [name] if from_source else []
        lines.append(" \\\n    ".join([pin, *(f"--hash=sha256:{one}" for one in sorted(hashes))]))
    text = HEADER.format(sources=", ".join(sources)) + "\n".join(lines) + "\n"
    HASHES.write_text(text, encoding="utf-8")


def requirements(extras: Iterable[str], project: dict[str, Any]) -> Iterator[str]:
    """What the project's extras require; an extra may name other extras of the project."""
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            required = Requirement(line)
            if required.name == project["name"]:
                yield from requirements(required.extras, project)
            else:
                yield line


def select(extras: list[str]) -> str:
    """The entries that the project, its extras and its build need here, chosen by pip.

    Raises:
        SystemExit: pip chose a package that the lock does not have.
    """
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    wanted = [
        *pyproject["build-system"]["requires"],
        *project["dependencies"],
        *requirements(extras, project),
    ]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--report=-"]
    command += [f"--constraint={lock}" for lock in PINS]
    done = subprocess.run([*command, *wanted], stdout=subprocess.PIPE, check=True)  # noqa: S603 - pip itself
    report = [one["metadata"] for one in json.loads(done.stdout)["install"]]
    chosen = {canonicalize_name(one["name"]): one["version"] for one in report}
    chosen.pop("pip", None)  # it is there already, and no pin of ours
    known = entries()
    if chosen.keys() - known.keys():
        raise SystemExit(f"Not in {HASHES.name}: {', '.join(chosen.keys() - known.keys())}.")
    # The version as chosen, such as torch's 2.13.0+cpu: the pin alone would allow both builds.
    found = [VERSION.sub(f"=={chosen[name]}", known[name], count=1) for name in sorted(chosen)]
    return "\n".join(found) + "\n"


def main() -> None:
    """Write the lock, or print entries of it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--select", metavar="EXTRAS", help="print the entries that extras need")
    given = parser.parse_args()
    if given.select is None:
        write()
    else:
        print(select([extra for extra in given.select.split(",") if extra]), end="")


if __name__ == "__main__":
    main()
