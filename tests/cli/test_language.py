"""Click's texts in the language of the command line."""

from __future__ import annotations

import inspect
import re
from functools import partial

import click
import pytest
from helpers import run_command
from sentences import commands, help_sentences, texts

from echelon.cli import click_texts
from echelon.messages.lines import wrapped

COMMANDS = dict(commands())


@pytest.fixture
def run(capsys, monkeypatch):
    return partial(run_command, capsys, monkeypatch)


def test_click_has_each_text_that_is_translated():
    modules = [*click_texts._MODULES, click.decorators]
    source = "".join(inspect.getsource(module) for module in modules)
    assert [text for text in click_texts.TEXTS if f'"{text}"' not in source] == []


def test_every_heading_of_a_help_is_translated():
    options = [option for command in COMMANDS.values() for option in command.params]
    found = {getattr(option, "group", "Help") for option in options} | {"Help"}
    assert found - {"Options"} == set(click_texts.HEADINGS)


def test_every_sentence_of_a_help_is_translated():
    found = help_sentences()
    assert {"Sort DOCUMENTS by relevance to QUERY.", "required", "unexpected failure"} <= found
    assert sorted(found - set(texts("zh"))) == [], "add to messages/zh.po"


WIDEST = 80


def columns(line):
    """As a terminal shows it: Chinese characters and marks take two."""
    return len(line) + len(re.findall("[\u3000-\u9fff\uff00-\uff60]", line))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_help_in_chinese_has_no_english_sentence_and_fits(run, monkeypatch, path):
    monkeypatch.setenv("COLUMNS", str(WIDEST))
    _, told, _ = run("--lang", "zh", *path[1:], "--help")
    usage, _, prose = told.partition("示例：")[0].partition("\n\n")
    assert usage.startswith(f"用法: {' '.join(path)} ")
    assert not re.search(r"[a-z]+ [a-z]+ [a-z]+", prose)
    assert [line for line in prose.splitlines() if columns(line) > WIDEST] == []


@pytest.mark.parametrize("width", [20, 50])
def test_lines_break_by_columns_and_lose_nothing(width):
    text = (
        "按与 QUERY 的相关性（“分数”）对 DOCUMENTS 排序，见 --find-max；每批最多 2048 个 token。"
        * 3
    )
    lines = wrapped(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(columns(line) <= width for line in lines)
    assert not [line for line in lines if line[0] in "，。；：）”" or line[-1] in "（“"]


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
        (["rank", "q", "--batchsize", "1"], "'--batch-size'？ 请参阅：echelon rank --help"),
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
    assert re.search(r"[^.？](。|？）? )请参阅：echelon \S*\s?--help", error)
