"""The benchmark of the score cache: its trace, what it holds to be wrong, and its page."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import score_cache


def trace(**changed):
    options = score_cache.options_of([])
    vars(options).update({"queries": 40, "documents": 5, "requests": 2000} | changed)
    return score_cache.Trace.of(options)


def row(size, **changed):
    usual = {"size": size, "cache_mb": 1.0, "max_mb": 64.0, "entries": 10}
    return usual | changed


def replay(*seen):
    found = score_cache.Replay(None, "")
    found.logits[0] = {np.array(logits, dtype=np.float32).tobytes() for logits in seen}
    return found


PLAIN = row("0", cache_mb=0.0, max_mb=0.0, entries=0)


def test_a_trace_repeats_its_first_queries_most():
    made = trace()
    counts = Counter(made.numbers)
    assert counts[0] > counts[5] > counts[39]
    assert made.numbers == trace().numbers != trace(seed=1).numbers
    pairs = {(q, d) for q, texts in zip(made.queries, made.documents, strict=True) for d in texts}
    assert len(pairs) == 40 * 5


def test_scores_that_differ_by_rounding_are_no_problem():
    rows, replays = [PLAIN, row("64MB")], [replay([1.0, 2.0]), replay([1.0001, 2.0])]
    assert score_cache.problems_of(rows, replays) == []


def test_other_scores_and_too_much_memory_are_problems():
    rows = [PLAIN, row("8MB", max_mb=0.5), row("64MB")]
    replays = [replay([1.0]), replay([1.0]), replay([1.0], [1.5])]
    assert score_cache.problems_of(rows, replays) == [
        "8MB: 1.0 MB are more than 0.5",
        "64MB: query 0 differs by 0.5",
    ]


def test_the_page_has_a_row_for_each_size():
    numbers = dict.fromkeys(score_cache.NUMBERS, 7)
    shown = {"seconds": 1, "documents_per_s": 3, "p50_ms": 4, "p99_ms": 5, "hit_rate": 0.6}
    rows = [row(size, **shown, process_grew_mb=8.0) for size in ("0", "64MB")]
    result = {"command": "python benchmarks/score_cache.py", "machine": {"cpu": "c"}}
    text = score_cache.page(result | numbers | {"rows": rows, "problems": []})
    assert "| 64MB | 3 | 4 | 5 | 0.6 | 10 | 1.0 | 8.0 |" in text
    assert "`python benchmarks/score_cache.py` on c" in text
