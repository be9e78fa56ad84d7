"""What is installed is what was pinned: locks, their hashes, images by digest."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Some versions of pip, whose parts the script uses, import pkg_resources.
pytestmark = pytest.mark.filterwarnings("ignore:.*pkg_resources:DeprecationWarning")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DIGEST = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
DOCKERFILES = [(DEPLOY / name).read_text("utf-8") for name in ("Dockerfile", "Dockerfile.cuda")]


@pytest.fixture
def lock():
    spec = importlib.util.spec_from_file_location("lock", ROOT / "scripts/lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The locks of the repository.


def test_each_pin_of_the_locks_has_hashes(lock):
    entries = lock.entries().values()
    assert sorted(entry.partition(" \\\n")[0] for entry in entries) == sorted(lock.pins())
    for entry in entries:
        _, *lines = entry.split("\\\n")
        assert lines
        assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64} ?", line) for line in lines)


def test_what_the_project_requires_is_pinned(lock):
    pinned = {canonicalize_name(one.name): one.specifier for one in map(Requirement, lock.pins())}
    project = PYPROJECT["project"]
    extras = sorted(project["optional-dependencies"])
    for line in [*project["dependencies"], *lock.requirements(extras, project)]:
        required = Requirement(line)
        (pin,) = pinned[canonicalize_name(required.name)]
        assert required.specifier.contains(pin.version), line
    assert set(PYPROJECT["build-system"]["requires"]) <= set(lock.pins())


# How the lock is written.

SERVED = {
    "tiny-1.0-py3-none-any.whl": "a",
    "tiny-1.0.tar.gz": "b",
    "tiny-1.1-py3-none-any.whl": "c",
    "tiny-1.1-py2-none-any.whl": "f",  # for no Python that is served
    "some-1.0-cp312-cp312-manylinux_2_17_x86_64.whl": "d",
    "some-1.0.tar.gz": "e",
    "bare-1.0-cp312-cp312-manylinux_2_17_x86_64.whl": "d",
}


class Index(BaseHTTPRequestHandler):
    """Two indexes: one in JSON, and below /html one with another build of `tiny` alone."""

    def do_GET(self):
        *_, where, name, _ = self.path.split("/")
        if where == "html":
            kind, page = (
                "text/html",
                f'<a href="/f/tiny-1.0%2Bcpu-py3-none-any.whl#sha256={"9" * 64}">',
            )
        else:
            kind = "application/vnd.pypi.simple.v1+json"
            files = [
                {"filename": file, "hashes": {"sha256": digit * 64}}
                for file, digit in SERVED.items()
                if file.startswith(name)
            ]
            page = json.dumps({"files": files})
        self.send_response(404 if where == "html" and name != "tiny" else 200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(page.encode())

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def written(lock, tmp_path, monkeypatch):
    """Write a lock of pins from the indexes; returns its entries."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
    monkeypatch.setattr(lock, "PINS", (tmp_path / "pins",))
    monkeypatch.setattr(lock, "HASHES", tmp_path / "hashes")

    def write(*pins, more=False):
        (tmp_path / "pins").write_text("\n".join(["# comment", *pins]))
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{url}/html" if more else "")
        lock.write()
        return {name: lock.SHA256.findall(text) for name, text in lock.entries().items()}

    yield write
    server.shutdown()
    thread.join()
    server.server_close()


def test_hashes_are_of_the_wheels_of_the_pinned_version(written):
    assert written("tiny==1.0") == {"tiny": ["a" * 64]}
    assert written("tiny==1.1") == {"tiny": ["c" * 64]}


def test_a_platform_without_a_wheel_gets_the_source_archive(written):
    assert written("some==1.0") == {"some": ["d" * 64, "e" * 64]}


def test_a_platform_without_any_file_is_an_error(written):
    with pytest.raises(SystemExit, match=r"bare==1\.0: a platform has no file"):
        written("bare==1.0")


def test_another_build_of_a_version_stays_when_its_index_is_not_asked(written):
    both = {"tiny": ["9" * 64, "a" * 64]}
    assert written("tiny==1.0", more=True) == both
    assert written("tiny==1.0") == both
    assert written("tiny==1.1") == {"tiny": ["c" * 64]}


# Images.


def test_images_of_others_are_given_by_digest():
    bases = {re.search(r"^ARG BASE=(.+)$", text, re.MULTILINE)[1] for text in DOCKERFILES}
    assert len(bases) == 1, "one base, so that both are renewed together"
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    images = {one["image"] for one in compose["services"].values() if "build" not in one}
    assert len(images) == 2
    assert all(DIGEST.fullmatch(image) for image in bases | images)
    for text in DOCKERFILES:
        assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}


def test_images_install_with_hashes_only():
    for text in DOCKERFILES:
        installs = re.findall(r"pip install (.*?)(?: \\)?$", text, re.MULTILINE)
        assert len(installs) == 2
        for options in installs:
            assert "--require-hashes" in options or "--no-deps --no-build-isolation" in options
