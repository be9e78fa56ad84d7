"""Pages in other languages: every sentence is translated, and none is left in English."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import run_command
from profile_pairs import compared, profile_of, sides
from report_pages import CURVE, RESULTS, Page, entry, leave_plotly_out, scenario_entry, steady
from sentences import catalogue, placeholders, sentences

from echelon.cli.report import report as group
from echelon.errors import InvalidInput
from echelon.reports import comparison_page as comparison
from echelon.reports import tuning_report
from echelon.reports.html import kept, speaking, told, tr
from echelon.scheduling.fit import REMEDY, FitError

quick = pytest.fixture(leave_plotly_out, autouse=True)

NAMES = {
    "A",
    "B",
    "B/A",
    "Echelon",
    "Python",
    "GPU",
    "CPU",
    "CUDA",
    "API",
    "P50",
    "P90",
    "P95",
    "P99",
    "nDCG",
    "Kendall",
    "logit",
    "Max",
    "token",
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "GiB",
    "MiB",
    "KiB",
    "ms",
    "ns",
    "µs",
    "cpu",
    "echelon",
    "tune",
    "refresh",
    "time",
    "limit",
    "batch",
    "sizes",
    "pairs",
    "budgets",
    "JavaScript",
    "UTC",
    "en",
    "scenario",
    "concurrent",
    "api",
    "stress",
    "precision",
    "auto",
    "n",
    "s",
}
"""Names, units and flags that have no other word in Chinese."""

SHOWN = {"text", "name", "title", "ticktext"}
"""Keys of a figure whose strings people see."""


def missing(section):
    return sorted(sentences()[section] - set(catalogue()[section]))


@pytest.mark.parametrize("section", ["said", "kept"])
def test_every_sentence_is_translated_and_no_translation_is_left_over(section):
    known = catalogue()[section]
    wanted = json.dumps(dict.fromkeys(missing(section), ""), ensure_ascii=False, indent=1)
    assert missing(section) == [], f"add to zh.json, under {section!r}: {wanted}"
    assert sorted(set(known) - sentences()[section]) == [], "these are said nowhere"
    assert list(known) == sorted(known)


@pytest.mark.parametrize("section", ["said", "kept"])
def test_a_translation_has_the_sentences_placeholders(section):
    for english, translation in catalogue()[section].items():
        assert placeholders(translation) == placeholders(english), english
        assert translation.strip()


@pytest.mark.parametrize("english", sorted(sentences()["kept"]))
def test_a_sentence_of_a_profile_is_told_in_chinese(english):
    values = {name: f"<{place}>" for place, name in enumerate(sorted(placeholders(english)))}
    translation = catalogue()["kept"][english]
    with speaking("zh"):
        assert told(kept(english, **values)) == translation.format(**values)
    assert told(kept(english, **values)) == english.format(**values)


def test_what_a_sentence_holds_is_told_as_well():
    error = FitError(0.1, 0.2, 9)
    off = "Predicted {what} are off ({error}), so none were kept. {remedy}"
    found = kept(off, what="step times", error=error.words, remedy=REMEDY)
    with speaking("zh"):
        assert not re.search("[A-Za-z]{4}", told(found).replace("echelon tune --refresh", ""))
        assert "10%" in told(found)


def test_what_has_no_translation_stays_english():
    with speaking("zh"):
        assert tr("Nobody has {said} this.", said="{odd}") == "Nobody has {odd} this."
        assert told("std::bad_alloc {here}") == "std::bad_alloc {here}"
    assert tr("Latency") == "Latency"


# Pages.


def visible(page):
    """What people read of a page: its words and those of its charts, commands left out."""
    text = html.unescape(
        re.sub(r"<(style|script|code|pre)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    )
    labels = re.findall(r'(?:aria-label|data-label)="([^"]*)"', page)
    return [text, *labels, *strings(Page(page).figures)]


def strings(data, key=""):
    if isinstance(data, dict):
        return [text for name, value in data.items() for text in strings(value, name)]
    if isinstance(data, list):
        return [text for item in data for text in strings(item, key)]
    return [data] if isinstance(data, str) and key in SHOWN else []


def english(page):
    """Words that are left in English."""
    text = " ".join(visible(page)).replace("<br>", " ")
    return sorted(set(re.findall(r"[A-Za-zµ]+(?:/[A-Z])?\d*", text)) - NAMES)


def shape(tokens, *, unseen):
    return {
        "pairs": 4,
        "tokens": tokens,
        "squares": 100 * tokens,
        "seconds": tokens * 1e-4,
        "samples": 3,
        "predicted_s": tokens * 1.1e-4,
        "peak_bytes": 5 * 10**8 + 10**4 * tokens,
        "unseen": unseen,
    }


OFF = "Proof 1 disagrees with its prediction: Memory 0.4\u00a0GiB, predicted 0.7\u00a0GiB."


def rich(factor=1.0, **changes):
    """A profile with everything in it, all that is not the report's own in Chinese."""
    results = [
        *(m for m in RESULTS if m.status == "ok"),
        entry(1, steady(0.02), batch_size=1),
        entry(50, status="out_of_memory", reason="显存", batch_size=16),
        entry(50, status="skipped", batch_size=32, reason="steps of 16 already ran out of memory"),
        entry(50, status="not_reached", token_budget=2048),
    ]
    base = profile_of(factor, results=results)
    cost = base.cost | {"shapes": [shape(n, unseen=n > 900) for n in (100, 400, 1600)]}
    layers = base.precisions[1] | {"precision": "int8", "keep_bf16": ["层"]}
    names = {"model": "型号", "revision": "一", "device_name": "机器", "versions": {"库": "1"}}
    made = replace(
        base,
        key=replace(base.key, **names),
        cost=cost,
        precisions=[*base.precisions, layers, layers | {"keep_bf16": ["层", "层"]}],
        machine=base.machine
        | {"cpu": "机", "system": "系", "machine": "", "matrix_features": []}
        | {"gpus": [{"name": "卡", "memory_bytes": 2**34, "capability": "9.0"}]},
        warnings=[
            (
                "3 of 9 points are known to no better than ±10 %. Close other programs, or "
                "raise --time-limit."
            )
        ],
        learned_token_budget=512,
        scenario=scenario_entry(notes=[OFF, "Trust the measured numbers."]),
    )
    return replace(made, **changes)


UNREACHED = CURVE | {"most_rate": None}


BARE = {"points": [], "best": [], "situations": [], "precisions": [], "cost": None}
CHOSEN = replace(rich().settings, token_budget=777)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scenario": scenario_entry(notes=[], curve=CURVE)},
        {"scenario": scenario_entry(notes=[], curve=CURVE | {"most_rate": None})},
        {"scenario": scenario_entry(notes=[])},
        {"scenario": None},
        {"scenario": scenario_entry(held=False, notes=[]), "settings": CHOSEN},
        {"scenario": None, "settings": CHOSEN},
        {
            "scenario": scenario_entry(
                scenario="offline", held=None, measured=None, accuracy=None, notes=[]
            )
        },
        BARE | {"scenario": None, "warnings": [], "learned_token_budget": None},
    ],
)
def test_no_english_is_left_on_a_chinese_report(changes):
    page = tuning_report.render(rich(**changes), lang="zh", profile_path="配置")
    assert english(page) == []
    assert '<html lang="zh-CN">' in page


@pytest.mark.parametrize(
    "changes", [{}, {"warnings": [], "precisions": []}, {"memory": None}, BARE]
)
def test_no_english_is_left_on_a_chinese_comparison(changes):
    a, b = rich(), rich(0.5, **changes)
    page = comparison.render(*sides(a, b), compared(a, b), lang="zh")
    assert set(english(page)) <= {"a", "b", "json"}
    assert '<html lang="zh-CN">' in page


def test_english_is_the_default_and_comes_back():
    before = tuning_report.render(rich())
    tuning_report.render(rich(), lang="zh")
    assert tuning_report.render(rich()) == before
    assert '<html lang="en">' in before
    assert not re.search(
        "[一-鿿]", re.sub("型号|机器|显存|机|系|卡|库|层|一", "", before.split("</style>")[1])
    )


# The flag.


def test_a_wrong_language_is_refused_by_name():
    with pytest.raises(InvalidInput, match=r"'fr' is no language of pages\. Give en or zh"):
        tuning_report.render(rich(), lang="fr")


def test_commands_write_chinese_pages(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rich().save("a.json")
    rich(0.5).save("b.json")
    for arguments in (("show", "a.json"), ("compare", "a.json", "b.json")):
        call = ("report", *arguments, "-o", "page.html", "--lang")
        assert run_command(capsys, monkeypatch, *call, "zh")[0] == 0
        assert "zh-CN" in Path("page.html").read_text(encoding="utf-8")
        code, _, err = run_command(capsys, monkeypatch, *call, "fr")
        assert (code, "'fr' is not one of 'en', 'zh'" in err) == (2, True)
    assert {"show", "compare"} == set(group.commands)
