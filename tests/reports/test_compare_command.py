"""`echelon report` as people use it: tables, JSON, pages, and errors for broken files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import run_command
from profile_pairs import compared, profile_of, views
from report_pages import RESULTS, Page, leave_plotly_out
from website import chromium

from echelon.cli.report import report as group
from echelon.reports import comparison_page, tuning_report

DOCS = Path(__file__).parents[2] / "docs/REPORT.md"
HOSTILE = "<script>alert(1)</script>[bold]\"'&{{ 7 * 7 }}</table>"

quick = pytest.fixture(leave_plotly_out, autouse=True)


@pytest.fixture
def real_plotly():
    """Ask for the real library."""


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """``echelon report`` among two profiles: (exit code, output, error output)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    profile_of().save("a.json")
    profile_of(0.5).save("b.json")

    return partial(run_command, capsys, monkeypatch, "report")


# Comparing.


def test_the_terminal_shows_headline_and_tables(call):
    code, out, err = call("compare", "a.json", "b.json")
    assert (code, err) == (0, "")
    assert "B is 2.00 times as fast as A: 50 pairs" in out
    for title in ("Compared profiles", "Chosen settings", "Precisions", "Cost model", "Memory"):
        assert f"\n{title}" in out
    assert "2.00×" in out
    assert "Note: A: 3 of 9 points are noisy. Close other programs." in out
    assert not list(Path().glob("*.html"))


def test_json_is_the_comparison_and_as_documented(call):
    code, out, err = call("compare", "a.json", "b.json", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found == compared(profile_of(), profile_of(0.5))
    docs = DOCS.read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", docs))
    assert keys_of(found) <= documented
    listed = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", docs, re.MULTILINE)
    names = {name for cell in listed for name in re.findall(r"\w+", cell)}
    assert set(found) == names - {"tie", "beyond", "within", "unknown"}


def keys_of(data):
    """Names of all fields, however deep; not of a profile's key, which is the profile's."""
    if isinstance(data, list):
        return set().union(*map(keys_of, data)) if data else set()
    if not isinstance(data, dict):
        return set()
    return set(data).union(*(keys_of(v) for k, v in data.items() if k != "key"))


def test_the_page_is_written_too(call):
    code, out, err = call("compare", "a.json", "b.json", "-o", "ab.html")
    assert (code, err) == (0, "Page: ab.html\n")
    assert "2.00 times" in out
    assert "2.00 times" in Page(Path("ab.html").read_text(encoding="utf-8")).text
    code, out, err = call("compare", "a.json", "b.json", "-o", "quiet.html", "--quiet")
    assert (code, out, err) == (0, "", "")
    assert Path("quiet.html").exists()
    code, out, err = call("compare", "a.json", "b.json", "-o", "too.html", "--json")
    assert (code, json.loads(out)["kind"], err) == (0, "comparison", "")


def test_markup_in_names_is_shown_at_the_terminal(call):
    profile_of(key={"model": "[bold]x[/bold]", "revision": "[red]"}).save("c.json")
    code, out, _ = call("compare", "c.json", "b.json")
    assert code == 0
    assert "[bold]x[/bold]" in out
    assert "[red]" in out


# Showing again.


def test_show_writes_the_report_that_tuning_wrote(call):
    code, out, err = call("show", "a.json", "-o", "r.html")
    assert (code, out, err) == (0, "", "Page: r.html\n")
    expected = tuning_report.render(profile_of(), profile_path="a.json")
    assert Path("r.html").read_text(encoding="utf-8") == expected
    assert call("show", "a.json", "--quiet") == (0, "", "")
    assert Path("echelon-report.html").read_text(encoding="utf-8") == expected


# What is wrong.


@pytest.mark.parametrize("command", [("show",), ("compare", "b.json")])
def test_broken_files_are_named_with_a_remedy(call, command):
    whole = profile_of().as_dict()
    point = whole["points"][0]
    broken = {
        "no JSON": "{",
        "no profile": "[]",
        "another version": json.dumps(whole | {"schema": 99}),
        "points are text": json.dumps(whole | {"points": "many"}),
        "a point without size": json.dumps(whole | {"points": [{"pairs": 3}]}),
        "a point without times": json.dumps(whole | {"points": [point | {"latency_s": None}]}),
        "a cost model without prices": json.dumps(whole | {"cost": {"paid": "ragged"}}),
        "a precision without speed": json.dumps(whole | {"precisions": [{"precision": "fp32"}]}),
        "a machine in words": json.dumps(whole | {"machine": "large"}),
    }
    for what, text in broken.items():
        Path("bad.json").write_text(text, encoding="utf-8")
        code, out, err = call(*command, "bad.json")
        assert (code, out) == (4, ""), what
        assert err.startswith("Error: bad.json: "), what
        assert "`echelon tune`" in err, what
    code, _, err = call(*command, "none.json")
    assert (code, "none.json: no such profile" in err) == (4, True)
    assert not list(Path().glob("*.html"))


@pytest.mark.parametrize("value", [0, -1, "NaN", "Infinity", '"fast"', "true"])
@pytest.mark.parametrize("field", ["median", "pairs_per_s", "samples"])
def test_a_number_that_is_none_is_refused(call, field, value):
    text = Path("a.json").read_text(encoding="utf-8")
    text = re.sub(rf'"{field}": [\d.]+', f'"{field}": {value}', text, count=1)
    Path("bad.json").write_text(text, encoding="utf-8")
    code, _, err = call("compare", "a.json", "bad.json")
    assert code == 4
    assert err.startswith("Error: bad.json: damaged profile (ValueError: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "a.json", "-o", "./a.json"),
        ("compare", "a.json", "b.json", "-o", "a.json"),
        ("compare", "a.json", "b.json", "-o", "../{here}/b.json"),
    ],
)
def test_a_profile_is_not_overwritten(call, arguments):
    before = [Path(name).read_bytes() for name in ("a.json", "b.json")]
    code, _, err = call(*(argument.format(here=Path.cwd().name) for argument in arguments))
    assert (code, "is the profile itself" in err) == (2, True)
    assert [Path(name).read_bytes() for name in ("a.json", "b.json")] == before


def test_a_folder_that_is_missing_is_a_storage_error(call):
    code, _, err = call("compare", "a.json", "b.json", "-o", "nowhere/ab.html")
    assert (code, "cannot be written" in err) == (6, True)


def test_options_are_documented():
    text = DOCS.read_text(encoding="utf-8")
    for name, command in group.commands.items():
        for param in command.params:
            if param.param_type_name == "option":
                assert param.help
                long = max(param.opts, key=len)
                row = rf"^\| {long}\S* .*\| (?:{name}|both) \|"
                assert re.search(row, text, re.MULTILINE), long


def test_help_loads_nothing_heavy():
    script = (
        "import sys\nfrom echelon import cli\n"
        "try:\n    cli.cli(['report', 'compare', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'rich', 'plotly', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)


# The page.


def html_of(a, b):
    return comparison_page.render(*views(a, b), compared(a, b))


def test_the_page_holds_every_table_and_both_lines():
    read = Page(html_of(profile_of(), profile_of(0.5)))
    sections = ["notes", "keys", "settings", "best", "plots", "precisions", "cost", "memory"]
    assert [name for name in read.ids if name in sections] == sections
    assert len(read.ids) == len(set(read.ids))
    assert not read.open
    rows = read.table("Peak memory of A")
    assert len(rows) == len(RESULTS)
    figure = read.figures["overlay-batch_size"]
    lines = {trace["name"]: trace for trace in figure["data"]}
    assert list(lines) == ["A, 10 pairs", "A, 50 pairs", "B, 10 pairs", "B, 50 pairs"]
    for pairs in (10, 50):
        a, b = (lines[f"{side}, {pairs} pairs"] for side in "AB")
        assert b["y"] == pytest.approx([2 * rate for rate in a["y"]])
        assert a["line"]["dash"] != b["line"]["dash"]
        assert a["marker"]["color"] != b["marker"]["color"]
        assert a["marker"]["symbol"] == b["marker"]["symbol"]
        assert all(text.startswith("B: ") for text in b["text"])


def test_nothing_of_the_tuning_report_is_left_in_it():
    read = Page(html_of(profile_of(), profile_of(0.5)))
    assert "tuning report" not in read.text
    assert "What to use where" not in read.text


def test_html_in_names_is_escaped():
    plain = Page(html_of(profile_of(), profile_of()))
    odd = profile_of(
        key={"model": HOSTILE, "device_name": HOSTILE, "versions": {HOSTILE: HOSTILE}},
        warnings=[HOSTILE],
        created=HOSTILE,
    )
    read = Page(html_of(odd, odd))
    assert len(read.scripts) == len(plain.scripts)
    assert len(read.tables) == len(plain.tables)
    assert read.text.count(HOSTILE) >= 10


def test_profiles_without_points_have_a_page_all_the_same():
    bare = profile_of(results=(), precisions=[])
    read = Page(html_of(bare, bare))
    assert "there are no charts" in read.text
    assert "None" not in read.text
    assert read.figures == {}


@pytest.mark.parametrize(("screen", "scheme"), [((390, 844), "dark"), ((1280, 900), "light")])
def test_chromium_draws_it_on_phone_and_desktop(tmp_path, real_plotly, screen, scheme):
    path = tmp_path / "ab.html"
    a, b = profile_of(), profile_of(0.5, key={"device_name": "a processor " * 9})
    comparison_page.write_page(*views(a, b), compared(a, b), path)
    with chromium() as browser:
        size = dict(zip(("width", "height"), screen, strict=True))
        tab = browser.new_page(viewport=size, color_scheme=scheme)
        urls, errors = [], []
        tab.on("request", lambda request: urls.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text))
        tab.goto(path.as_uri())
        if size["width"] < 800:  # sections are folded
            tab.locator("#plots").click()
        tab.locator(".plot .main-svg").nth(1).wait_for(state="attached")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.locator(".plot .scatterlayer .trace").count() == 6
        assert (errors, urls) == ([], [path.as_uri()])
