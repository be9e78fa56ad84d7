"""Click's texts in the language of the command line."""

from __future__ import annotations

import inspect
import re
from functools import partial

import click
import pytest
from helpers import run_command

from echelon import cli
from echelon.cli import click_texts

COMMANDS = [
    *(command for command in cli.cli.commands.values() if not isinstance(command, click.Group)),
    *cli.cli.commands["report"].commands.values(),
]


@pytest.fixture
def run(capsys, monkeypatch):
    return partial(run_command, capsys, monkeypatch)


def test_click_has_each_text_that_is_translated():
    modules = [*click_texts._MODULES, click.types]
    source = "".join(inspect.getsource(module) for module in modules)
    assert [text for text in click_texts.TEXTS if f'"{text}"' not in source] == []


def test_every_heading_of_a_help_is_translated():
    found = {getattr(option, "group", "Help") for c in COMMANDS for option in c.params} | {"Help"}
    assert found - {"Options"} == set(click_texts.HEADINGS)


@pytest.mark.parametrize("command", [[], ["rank"], ["report"], ["serve"]])
def test_help(run, monkeypatch, command):
    code, told, _ = run("--lang", "zh", *command, "--help")
    monkeypatch.setenv("ECHELON_LANG", "zh")
    assert (code, told) == run(*command, "--help")[:2]
    assert told.startswith("用法: echelon")
    assert "显示此帮助并退出。" in told
    assert not re.search("^(Usage|Options|Commands|Output|Help|Model):", told, re.MULTILINE)


def test_the_language_holds_wherever_it_stands(run):
    assert run("rank", "--help", "--lang", "zh") == run("rank", "--lang=zh", "--help")
    assert run("rank", "--nope", "--lang", "zh")[2].startswith("错误：没有选项")
    assert run("rank", "--help")[1].startswith("Usage: echelon rank")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rank", "q", "--nope"], "没有选项 '--nope'"),
        (["nope"], "没有命令 'nope'"),
        (["rank", "q", "--batch-size", "x"], "--batch-size：'x' 不是有效的 integer"),
        (["rank", "q", "--precision", "x"], "--precision：'x' 不是 'auto', "),
        (["rank", "q", "--model"], "选项 '--model' 需要一个值"),
        (["doctor", "more"], "多余的参数（more）"),
    ],
)
def test_wrong_usage(run, words, told):
    code, _, error = run("--lang", "zh", *words)
    assert code == 2
    assert error.startswith("错误：")
    assert told in error
    assert re.search(r"[^.]。请参阅：echelon \S*\s?--help", error)
