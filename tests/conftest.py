"""Fixtures: tiny models of every family, made once a session, and the real demo model."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import hypothesis
import pytest
from helpers import SENTENCES, SHAPES, TOKENIZER_OF, make_toy, save_tokenizer

from echelon.models.kernels import used_level

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from served import Live

    from echelon import Ranking, Reranker

# Read when Haystack is imported: its pipelines report to a server otherwise.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

# Started in the background of a script, tests and what they start would ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test fails because the machine is slow.
hypothesis.settings.register_profile("echelon", deadline=None, print_blob=True)
hypothesis.settings.load_profile("echelon")


LONG_FILES = ("test_ray.py", "test_plan_command.py", "test_http_faults.py", "test_tune_run.py")
"""Files that take a minute or more. They come first: begun last, they would keep one process busy
while the other has nothing left."""


@pytest.hookimpl(trylast=True)  # after the shuffle
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(autouse=True)
def own_kernels() -> None:
    """A process chooses its kernels once: not in a test that makes the processor an older one."""
    used_level()


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a trained tokenizer each: bert, roberta, xlm-roberta."""
    home = tmp_path_factory.mktemp("tokenizers")
    return {kind: save_tokenizer(home / kind, kind) for kind in ("bert", "roberta", "xlm-roberta")}


@pytest.fixture(scope="session")
def toy(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]
) -> Callable[[str], Path]:
    """The toy model folder of a family, made when first asked for."""
    home = tmp_path_factory.mktemp("toys")

    def folder(family: str) -> Path:
        assert family in SHAPES
        if not (home / family).exists():
            make_toy(home / family, family, tokenizers[TOKENIZER_OF.get(family, family)])
        return home / family

    return folder


@pytest.fixture(scope="session")
def bert(toy: Callable[[str], Path]) -> Path:
    """The toy BERT, for tests that need any model."""
    return toy("bert")


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]) -> Path:
    """A model that a process opens in less than a second, since it needs no torch."""
    from onnx_graphs import write_graph

    folder = tmp_path_factory.mktemp("light") / "light"
    shutil.copytree(tokenizers["bert"], folder)
    write_graph(folder / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model, fetched on first use and kept in Echelon's own cache."""
    from echelon.models import demo

    return demo.pull()


@pytest.fixture(scope="session")
def live(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """``echelon serve`` over the toy BERT, for requests with ``served.KEY``."""
    from served import KEY, MODEL, Live

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n", "utf-8")
    rules = ("--api-keys", keys, "--body-timeout-s", 1, "--max-documents", 50)
    rules += ("--header-timeout-s", 1)
    with Live(bert, *MODEL, *rules) as server:
        yield server


@pytest.fixture(scope="session")
def full() -> Iterator[str]:
    """URL of a server that refuses every request with 429."""
    from served import full_server

    with full_server() as url:
        yield url


@pytest.fixture(scope="session")
def reranker(bert: Path) -> Iterator[Reranker]:
    """The toy BERT, open in this process."""
    from echelon import Reranker

    with Reranker(bert, device="cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def expected(reranker: Reranker) -> Ranking:
    """The ranking of ``helpers.SENTENCES`` for ``served.QUERY``, as clients of ``live`` get it."""
    from served import QUERY

    return reranker.rank(QUERY, SENTENCES)


@pytest.fixture
def fake(bert: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy BERT's folder; every model is scored by a fake scorer."""
    from offline_jobs import ForgetfulScorer

    from echelon.engine import precision_check

    monkeypatch.setattr(
        precision_check, "open_scorer", lambda _, **__: ForgetfulScorer(max_tokens=130)
    )
    return bert
