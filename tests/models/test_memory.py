"""Memory for real: how much loading takes, and scoring under an address-space limit."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers import WIDE, make_toy, run_python
from safetensors import safe_open

from echelon import Reranker
from echelon.models.checkpoint import MappedPages

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS, which are Linux's"
)

MEDIUM = {
    "hidden_size": 512,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 500,
}
"""400 MB in fp32: large enough that the memory of libraries does not matter."""


MEASURE = """
import json, sys
from pathlib import Path
import torch
from echelon.models import checkpoint, encoder, transformers
from echelon.models.registry import open_scorer

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
scorer = open_scorer(Path(sys.argv[1]), device="cpu", precision=sys.argv[2], threads=2)
peak, after = status("VmHWM"), status("VmRSS")
print(json.dumps([peak - before, after - before, scorer.info.weights_bytes]))
"""

LIMITED = """
import json, resource, sys
from pathlib import Path
from safetensors import safe_open

from echelon import Reranker
from echelon.models.checkpoint import MappedPages

def address_space():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))

pairs, options = json.loads(sys.argv[2]), json.loads(sys.argv[3])
reranker = Reranker(sys.argv[1], device="cpu", threads=2, **options)
reranker.score_pairs([["rain", "rain"]])  # starts every library's threads
spare = int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (address_space() + spare, resource.RLIM_INFINITY))
first = reranker.score_pairs(pairs)
again = reranker.score_pairs(pairs)
print(json.dumps({
    "logits": [scored.logits.tolist() for scored in (first, again)],
    "ladder": [[step.rung for step in s.report.ladder] for s in (first, again)],
    "details": [step.detail for step in first.report.ladder],
    "budget": reranker.token_budget,
    "precision": reranker.facts.precision,
}))
"""

LOAD_LIMITED = """
import resource, sys
from pathlib import Path
import torch
from echelon import OutOfMemory
from echelon.models import encoder, transformers
from echelon.models.registry import open_scorer

torch.ones(64, 64) @ torch.ones(64, 64)
lines = Path("/proc/self/status").read_text().splitlines()
size = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
limit = size + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    open_scorer(Path(sys.argv[1]), device="cpu", precision="fp32", threads=1)
except OutOfMemory as error:
    print(error)
"""


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory):
    folder = make_toy(tmp_path_factory.mktemp("medium"), "bert", None, **MEDIUM)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]) -> Path:
    return make_toy(tmp_path_factory.mktemp("wide"), "bert", tokenizers["bert"], **WIDE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loading_needs_little_more_than_the_loaded_model(medium, precision):
    """The peak counts every resident page, those of the mapped checkpoint file included.

    The bound is taken from the weights alone, without the memory that libraries need to begin.
    """
    ran = run_python(MEASURE, medium, precision)
    assert ran.returncode == 0, ran.stderr
    peak, settled, weights = json.loads(ran.stdout)
    assert 0.9 * weights < settled
    assert peak < 1.25 * weights


def documents() -> list[list[str]]:
    """Pairs of 3 to 512 tokens; together 4,500, or 280 MiB in the widest layer."""
    return [["rain", "rain " * (length - 4)] for length in range(512, 64, -28)]


def limited(folder: Path, spare: int, **options: object) -> dict:
    ran = run_python(LIMITED, folder, json.dumps(documents()), json.dumps(options), spare)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def test_scoring_outlives_a_memory_limit(wide):
    with Reranker(wide, device="cpu", threads=2) as reranker:
        unlimited = reranker.score(documents())
    found = limited(wide, 300 * 2**20, token_budget=10_000)
    for logits in found["logits"]:
        np.testing.assert_allclose(logits, unlimited, rtol=0, atol=1e-4)
    assert found["ladder"][0][:2] == ["drop_caches", "halve_budget"]
    assert set(found["ladder"][0]) <= {"drop_caches", "halve_budget", "one_pair"}
    assert found["budget"] < 5_000
    assert found["ladder"][1] == [], "what was learned is kept"
    assert any("token budget" in detail for detail in found["details"])


def test_weights_that_do_not_fit(medium, tmp_path):
    import torch
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(medium / "config.json", pickled)
    torch.save(load_file(medium / "model.safetensors"), pickled / "pytorch_model.bin")
    for folder, spare in ((medium, 400), (medium, 100), (pickled, 100)):
        ran = run_python(LOAD_LIMITED, folder, spare * 2**20)
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert f"{folder}: the weights, which take 0." in ran.stdout
        assert " GiB, do not fit on cpu in fp32" in ran.stdout
        assert "A step of one longest pair takes about 0." in ran.stdout
        assert "choose a lower precision" in ran.stdout


TABLE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from echelon.models.registry import open_scorer
from echelon.models.checkpoint import MappedPages
from echelon.types import TokenBatch

def mapped():
    lines = Path("/proc/self/smaps").read_text().splitlines()
    inside, kib = False, 0
    for line in lines:
        if "-" in line.split()[0]:
            inside = line.endswith("model.safetensors")
        elif inside and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib * 1024

scorer = open_scorer(Path(sys.argv[1]), device="cpu", precision="fp32", threads=1)
table = scorer._weights.embeddings.words
assert MappedPages.of(table) is None  # small: stays
assert MappedPages.of(table.clone(), 0) is None  # no file's: zeros would be left
ids = np.arange(5, 2005, dtype=np.int32)
batch = TokenBatch(ids, None, np.arange(0, 2001, 100, dtype=np.int32))
before = scorer.score(batch)
kept = mapped()
scorer._mapped = MappedPages.of(table, 0)
after = scorer.score(batch)
print(json.dumps([kept, mapped(), table.nbytes, bool((before == after).all())]))
"""


def test_pages_of_the_word_table_are_given_back(tokenizers, tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 2500}
    folder = make_toy(tmp_path / "toy", "bert", tokenizers["bert"], **shape)
    done = run_python(TABLE, folder)
    assert not done.stderr, done.stderr
    kept, left, table, equal = json.loads(done.stdout)
    assert equal
    assert kept > table / 2
    assert left < table / 10


def test_a_table_that_was_written_to_is_not_given_back(tokenizers, tmp_path):
    folder = make_toy(tmp_path / "toy", "bert", tokenizers["bert"], vocab_size=2500)
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        table = opened.get_tensor("bert.embeddings.word_embeddings.weight")
    assert MappedPages.of(table, 0) is not None
    table[7] = 1.0
    assert MappedPages.of(table, 0) is None
