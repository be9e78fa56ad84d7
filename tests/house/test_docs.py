"""The documentation says what the code does: modules, options, errors, links, commands."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from echelon import cli, errors
from echelon.options import Options
from echelon.scheduling import oom_policy

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")],
    key=lambda path: path.as_posix(),
)
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
REFERENCES = [ROOT / "docs/REFERENCE.md", ROOT / "docs/REFERENCE.zh.md"]
MANUALS = READMES + sorted({*ROOT.glob("docs/*.md")} - {ROOT / "docs/LOG.md"})


def text(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", text(page)):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_what_pages_take_from_the_code_is_what_the_code_says():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/doc_parts.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_file_says_in_one_line_what_it_holds():
    page = text(ROOT / "docs/ARCHITECTURE.md")
    tree = page[page.index("<!-- tree") : page.index("<!-- end of tree")].split("```")[1]
    entries = tree.strip().splitlines()
    assert len(entries) > 100
    for entry in entries:
        name, _, summary = entry.strip().partition(" ")
        assert summary.strip().endswith((".", ":", ")", "…")), name


def test_the_ladder_in_the_architecture_is_the_ladder():
    page = text(ROOT / "docs/ARCHITECTURE.md")
    section = page[page.index("## The OOM ladder") : page.index("## Never")]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert listed == [rung.__name__.removeprefix("_") for rung in oom_policy.RUNGS]


def test_the_readme_is_short():
    before, _, rest = text(READMES[0]).partition("<!-- peers: begin -->")
    prose = before + rest.partition("<!-- peers: end -->")[2]  # without the table of results
    assert len(prose.split()) <= 1450


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda p: p.name)
def test_references_name_every_option_command_and_exit_code(reference):
    page = text(reference)
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert listed == {f.name for f in fields(Options)}
    for command in cli.cli.commands:
        assert f"echelon {command}" in page
    classes = [v for v in vars(errors).values() if isinstance(v, type)]
    codes = {c.exit_code for c in classes if issubclass(c, errors.EchelonError)}
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert documented == codes | {0, cli.INTERRUPTED}


def command_of(words):
    """The command that words call, of groups the inner one."""
    found = cli.cli
    while isinstance(found, click.Group):
        found = found.commands[words.pop(0)]
    return found


@pytest.mark.parametrize("page", MANUALS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_in_the_documents_exist(page):
    blocks = re.findall(r"```bash\n(.*?)```", text(page), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    makefile = text(ROOT / "Makefile")
    seen = 0
    for line in lines:
        for word in re.findall(r"(?:^|\| )make (\w+)", line):
            assert re.search(rf"^{word}:", makefile, re.MULTILINE), line
        for called in re.findall(r"(?:^|\| )echelon (\w.*)", line):
            known = {o for p in command_of(called.split()).params for o in p.opts}
            used = set(re.findall(r"(--[\w-]+)", line))
            assert used <= known, line
            seen += 1
    assert seen >= 6 or page not in READMES + REFERENCES


@pytest.mark.parametrize("pages", [READMES, REFERENCES], ids=["readme", "reference"])
def test_the_chinese_page_has_every_section_and_code_block_of_the_english(pages):
    english, chinese = (text(page) for page in pages)
    for mark in (r"^## ", r"^### ", r"^```", r"^\| "):
        counts = [len(re.findall(mark, page, re.MULTILINE)) for page in (english, chinese)]
        assert counts[0] == counts[1], mark


def test_every_command_line_option_has_a_help_text_or_a_telling_default():
    for name, command in cli.cli.commands.items():
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help or param.show_default, f"{name} {param.opts}"


def test_results_are_committed_with_the_command_that_made_them():
    results = list((ROOT / "benchmarks/results").glob("*.json"))
    assert results
    for result in results:
        assert '"command": "python benchmarks/' in text(result), result.name


def test_no_file_names_a_package_registry():
    hosts = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian\.org")
    named = [
        path
        for pattern in ("*.md", "*.toml", "*.lock", "Makefile", "s*/**/*.py", "docs/**/*.md")
        for path in ROOT.glob(pattern)
        if hosts.search(text(path))
    ]
    assert named == []
