"""Pages in other languages: every sentence is translated, and none is left in English."""

from __future__ import annotations

import html
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import run_command
from profile_pairs import compared, profile_of, views
from report_pages import CURVE, RESULTS, Page, entry, leave_plotly_out, scenario_entry, steady
from sentences import SOURCE, is_id, placeholders, texts, used

from echelon.cli.report import report as group
from echelon.errors import InvalidInput
from echelon.messages import Message, in_language, read_po, tr, translated
from echelon.profile import Profile
from echelon.reports import comparison_page as comparison
from echelon.reports import tuning_report
from echelon.scheduling.fit import FitError

quick = pytest.fixture(leave_plotly_out, autouse=True)

KEPT = (
    "A B B/A Echelon Python GPU CPU CUDA API P50 P90 P95 P99 nDCG Kendall logit Max token fp32 "
    "bf16 fp16 int8 GiB MiB KiB ms ns µs cpu echelon tune refresh time limit batch sizes pairs "
    "budgets JavaScript UTC en scenario concurrent api stress precision auto n s "
)
NAMES = set(KEPT.split())
"""Names, units and flags that have no other word in Chinese."""

SHOWN = {"text", "name", "title", "ticktext"}
"""Keys of a figure whose strings people see."""


def test_every_message_has_a_text_in_both_languages():
    stored, pages = set(used().stored), used().pages
    assert sorted(stored - set(texts("en"))) == [], "add to messages/en.po"
    assert sorted((stored | pages) - set(texts("zh"))) == [], "add to messages/zh.po"
    assert [m for language in ("en", "zh") for m, text in texts(language).items() if not text] == []


def test_no_text_is_left_over():
    stored, pages = set(used().stored), used().pages
    assert sorted(set(texts("en")) - stored) == [], "en.po holds messages that nothing uses"
    assert sorted(set(texts("zh")) - stored - pages) == [], "zh.po holds messages nothing uses"


def test_the_languages_have_the_same_placeholders():
    for message, chinese in texts("zh").items():
        english = texts("en")[message] if is_id(message) else message
        assert placeholders(chinese) == placeholders(english), message


def test_a_stored_message_has_the_values_that_its_text_needs():
    for message, values in used().stored.items():
        if values is not None:
            assert placeholders(texts("en")[message]) == values, message


@pytest.mark.parametrize("language", ["en", "zh"])
def test_catalogues_are_sorted_and_have_one_text_a_message(language):
    content = (SOURCE / f"messages/{language}.po").read_text(encoding="utf-8")
    ids = re.findall(r'^msgid "(.+)"$', content, re.MULTILINE)
    assert ids == [*sorted(filter(is_id, ids)), *sorted(i for i in ids if not is_id(i))]
    assert len(ids) == len(set(ids)) == len(texts(language))


# Stored messages.


@pytest.mark.parametrize("message", sorted(texts("en")))
def test_a_stored_message_is_english_text_and_is_shown_in_chinese(message):
    names = placeholders(texts("en")[message])
    values = {name: f"<{place}>" for place, name in enumerate(sorted(names))}
    found = Message(message, values)
    assert found == translated(found) == texts("en")[message].format(**values)
    with in_language("zh"):
        assert translated(found) == texts("zh")[message].format(**values)


def test_a_value_that_is_a_message_is_translated_too():
    found = Message("fit.imprecise", {"share": "20 %", "error": FitError(0.1, 0.2, 9).words})
    with in_language("zh"):
        shown = translated(found)
    assert not re.search("[A-Za-z]{4}", shown.replace("echelon tune --refresh", ""))
    assert "10%" in shown


def test_a_profile_stores_ids_and_values(tmp_path):
    warning = Message("sweep.noisy_points", {"noisy": 3, "all": 9})
    path = tmp_path / "p.json"
    rich(warnings=[warning, "一"]).save(path)
    known = {"id": "sweep.noisy_points", "values": {"noisy": 3, "all": 9}}
    assert json.loads(path.read_text("utf-8"))["warnings"] == [known, "一"]
    loaded = Profile.load(path)
    assert loaded == rich(warnings=[warning, "一"])
    assert (loaded.warnings[0].id, loaded.warnings[0].values) == (warning.id, warning.values)
    for copied in (pickle.loads(pickle.dumps(warning)), loaded.as_dict()["warnings"][0]):
        assert (copied, copied.id) == (warning, warning.id)
    assert json.loads(json.dumps(loaded.as_dict()))["warnings"] == [str(warning), "一"]


def test_a_sentence_of_an_older_profile_is_shown_as_it_is():
    old = "3 of 9 points are known to no better than ±10 %. Close other programs."
    with in_language("zh"):
        assert translated(old) == old
    assert old in html.unescape(tuning_report.render(rich(warnings=[old]), lang="zh"))


@pytest.mark.parametrize("values", [{}, {"noisy": 3}, {"noisy": 3, "all": 9}])
def test_a_message_of_another_version_is_shown_by_id_and_values(values):
    shown = " ".join(["sweep.of_tomorrow", *(f"{name}={value}" for name, value in values.items())])
    assert Message("sweep.of_tomorrow", values) == shown
    damaged = Message("sweep.noisy_points", {"noisy": 3})
    assert damaged == "sweep.noisy_points noisy=3"
    with in_language("zh"):
        assert translated(damaged) == "sweep.noisy_points noisy=3"


def test_page_text_without_a_translation_stays_english():
    with in_language("zh"):
        assert tr("Not {said} yet.", said="{odd}") == "Not {odd} yet."
        assert translated("std::bad_alloc {here}") == "std::bad_alloc {here}"
    assert tr("Latency") == "Latency"


# The reader of catalogues.


def test_strings_may_go_on_over_lines_and_hold_escapes():
    content = '# note\nmsgid "a"\n"b"\nmsgstr ""\n"\\"中\\"\\n"\n"d"\n\nmsgid "e"\nmsgstr "f"\n'
    assert read_po(content) == {"ab": '"中"\nd', "e": "f"}


@pytest.mark.parametrize("line", ["msgid_plural x", "words", "msgctxt a", 'msgid "a'])
def test_a_damaged_catalogue_is_refused(line):
    with pytest.raises((ValueError, SyntaxError)):
        read_po(line)


def test_orphaned_text_is_refused_with_its_line():
    with pytest.raises(ValueError, match="line 2 of a message catalogue"):
        read_po('# note\n"text"')


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


SKIPPED = Message("sweep.smaller_out_of_memory", {"size": 16})
OFF = Message(
    "scenario.prediction_off",
    {
        "place": 1,
        "name": Message("metric.memory_bytes"),
        "measured": "0.4\u00a0GiB",
        "predicted": "0.7\u00a0GiB",
    },
)


def rich(factor=1.0, **changes):
    """A profile with everything in it, all that is not the report's own in Chinese."""
    results = [
        *(m for m in RESULTS if m.status == "ok"),
        entry(1, steady(0.02), batch_size=1),
        entry(50, status="out_of_memory", reason="显存", batch_size=16),
        entry(50, status="skipped", reason=SKIPPED, batch_size=32),
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
        warnings=[Message("sweep.noisy_points", {"noisy": 3, "all": 9})],
        learned_token_budget=512,
        scenario=scenario_entry(notes=[OFF, Message("scenario.trust_measured")]),
    )
    return replace(made, **changes)


BARE = {"points": [], "best": [], "situations": [], "precisions": [], "cost": None}
OFFLINE = scenario_entry(scenario="offline", held=None, measured=None, accuracy=None, notes=[])
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
        {"scenario": OFFLINE},
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
    page = comparison.render(*views(a, b), compared(a, b), lang="zh")
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
    with pytest.raises(InvalidInput, match=r"'fr' is not a language of pages\. Give en or zh"):
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
