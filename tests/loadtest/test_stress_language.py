"""What `echelon stress --lang zh` shows: no line of it, nor of its page, is left in English."""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import signal
from functools import partial

import pytest
from aiohttp import web
from helpers import run_command
from stand_in_reranker import good, in_a_thread

from echelon import reports
from echelon.loadtest.page import SETTING_NAMES

SHORT = ("--rate", "100", "--duration-s", "0.4", "--warmup-s", "0")
EASY = ("--slo-p99-ms", "9000")
SEARCH = ("--find-max", "--rate", "40", "--duration-s", "0.3", "--warmup-s", "0", *EASY)

KEPT = (
    "P50 P75 P90 P95 P99 ms s CPU UTC JSON Echelon JavaScript json token max rate timeout slo p99 "
    "find cohere rerank v3 en poisson index text full"
)
NAMES = set(KEPT.split())
"""Names, units and flags that have no other word in Chinese, and what the server says itself."""


@pytest.fixture
def call(capsys, monkeypatch):
    """``echelon --lang zh stress`` in this process: (exit code, output, error output)."""
    monkeypatch.setattr(reports, "_plotly_js", lambda: "")
    monkeypatch.setattr("echelon.loadtest.client.PAUSE_S", 0.0)
    # Server and generator share this process and a busy machine, which is not what is tested.
    monkeypatch.setattr("echelon.loadtest.summary.BUSY_SHARE", 100.0)
    monkeypatch.setattr("echelon.loadtest.summary.LATE_S", 100.0)
    return partial(run_command, capsys, monkeypatch, "stress", "--lang", "zh")


def english(text):
    """Words that are left in English."""
    text = re.sub(r"http://[\w.:/]+|/\S*\.html", "", text)
    return sorted(set(re.findall("[A-Za-z][A-Za-z0-9]*", text)) - NAMES)


def full(number, body):
    return web.json_response("full", status=429) if number > 5 else good(body)


def broken(number, body):
    match number % 3:
        case 0:
            return web.Response(status=500)
        case 1:
            return good(body)
        case _:
            return {"results": []}


async def slow(number, body):
    await asyncio.sleep(0.3 * (number > 1))
    return good(body)


def interrupted(number, body):
    if number == 12:
        os.kill(os.getpid(), signal.SIGINT)
    return good(body)


RUNS = {
    "held": (None, (*SHORT, *EASY), 0, "时达到目标：P99 "),
    "no goal": (None, (*SHORT, "--documents", "2", "--tokens", "9"), 0, "失败 0.00"),
    "clients": (None, ("--clients", "2", *SHORT[2:]), 0, "2 个客户端：P99"),
    "missed": (full, (*SHORT, *EASY), 8, "时未达到目标：P99"),
    "wrong": (broken, (*SHORT, *EASY), 8, "× 错误应答，第一条：10 个文档却有 0 个结果"),
    "late": (slow, (*SHORT, "--slo-p99-ms", "90"), 8, "时未达到目标：P99"),
    "nothing": (slow, (*SHORT, "--timeout-ms", "90", *("--slo-p99-ms", "90")), 8, "没有任何应答"),
    "searched": (None, (*SEARCH, "--max-rate", "80"), 0, "80.0 请求/秒时 P99 不超过 9.00"),
    "no rate": (full, SEARCH, 8, "没有任何速率能满足 P99 不超过"),
    "stopped": (
        interrupted,
        ("--duration-s", "99", "--rate", "100", "--warmup-s", "0"),
        130,
        "已中断",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_line_of_a_test_is_left_in_english(call, tmp_path, name):
    answer, arguments, code, words = RUNS[name]
    path = tmp_path / "页.html"
    with in_a_thread(*([answer] if answer else [])) as server:
        ended, out, err = call(server.url, *arguments, "--html", path)
    assert (ended, english(out + err)) == (code, [])
    assert words in out + err
    page = path.read_text("utf-8")
    figures = json.loads((re.findall(r'id="figures">(.*?)</script>', page, re.DOTALL) or ["{}"])[0])
    labels = re.findall(r'"(?:text|name)": ?"([^"]*)"', json.dumps(figures, ensure_ascii=False))
    shown = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert english(html.unescape(" ".join([shown, *labels]))) == []
    assert '<html lang="zh-CN">' in page


def test_a_doubt_and_the_end_of_a_search_are_told_in_chinese(call, monkeypatch):
    monkeypatch.setattr("echelon.loadtest.summary.BUSY_SHARE", -1.0)
    with in_a_thread() as server:
        _, out, err = call(server.url, *SEARCH)
    assert english(out + err) == []
    assert re.search("结果不可信：\\s*搜索因压测程序跟不上而结束", out)
    assert "压测程序太慢" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("localhost:1",),
        ("http://a:b@h",),
        ("http://h:x",),
        ("http://:80",),
        ("http://h?q",),
        ("http://127.0.0.1:1",),
        ("http://h", "--dialect", "x"),
        ("http://h", "--clients", "2", "--rate", "3"),
        ("http://h", "--find-max"),
        ("http://h", "--max-rate", "3"),
        ("http://h", "--slo-p99-ms", "20000"),
        ("http://h", "--header", "secret"),
        ("http://h", "--warmup-s", "-1"),
        ("http://h", "--duration-s", "0"),
    ],
    ids=" ".join,
)
def test_no_error_before_a_test_is_left_in_english(call, arguments):
    code, _, err = call(*arguments)
    assert code == 2
    ours = re.sub("（.*?）|Connect call failed", "", err)  # the rest is Python's
    assert not re.search(r"[A-Za-z]+ [a-z]+ [a-z]+", ours), err
    assert len(re.findall("[^。]*[一-鿿][^。]*。", err)) == 2


def test_json_is_the_same_in_each_language(call):
    with in_a_thread(full) as server:
        _, out, _ = call(server.url, *SHORT, *EASY, "--json")
    found = json.loads(out)
    assert set(found["result"]["failures"]) == {"status 429"}
    assert set(found["settings"]) == set(SETTING_NAMES)
