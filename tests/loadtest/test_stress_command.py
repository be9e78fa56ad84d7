"""The command as people use it: exit codes, messages, JSON, the page, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web
from helpers import run_command
from stand_in_reranker import good, in_a_thread

from echelon import reports
from echelon.errors import install_command

SHORT = ("--rate", "100", "--duration-s", "0.4", "--warmup-s", "0.1")
EASY = ("--slo-p99-ms", "9000")
DOCS = Path(__file__).parents[2] / "docs/STRESS.md"


@pytest.fixture
def call(capsys, monkeypatch):
    """``echelon stress`` in this process: (exit code, output, error output)."""
    monkeypatch.setattr(reports, "_plotly_js", lambda: "/* plotly */")
    # Server and generator share this process and a busy machine, which is not what is tested.
    monkeypatch.setattr("echelon.loadtest.summary.BUSY_SHARE", 100.0)
    monkeypatch.setattr("echelon.loadtest.summary.LATE_S", 100.0)

    return partial(run_command, capsys, monkeypatch, "stress")


def full(number, body):
    return web.json_response({"message": "full"}, status=429) if number > 25 else good(body)


def test_a_goal_that_holds_ends_with_0(call):
    with in_a_thread() as server:
        code, out, err = call(server.url, *SHORT, *EASY)
    assert code == 0
    assert err.startswith("Testing: ")
    assert "The goal held at" in out
    assert "Wrong answers" in out
    assert {len(body["documents"]) for body in server.bodies} == {10}
    assert {body["model"] for body in server.bodies} == {"rerank-v3.5"}


def test_a_goal_that_is_missed_ends_with_8_and_says_why(call):
    with in_a_thread(full) as server:
        code, out, err = call(server.url, *SHORT, *EASY)
    assert code == 8
    assert "\nError: The goal was missed at" in err
    assert "× status 429, first: status 429: {" in out


def test_without_a_goal_there_is_none_to_miss(call):
    with in_a_thread(full) as server:
        code, out, _ = call(server.url, *SHORT)
    assert code == 0
    assert "Goodput" not in out


def keys_of(data):
    """Names of all fields, however deep; not the data under ``failures``."""
    if isinstance(data, list):
        return set().union(*map(keys_of, data)) if data else set()
    if not isinstance(data, dict):
        return set()
    inner = [{"count", "first"} if k == "failures" else keys_of(v) for k, v in data.items()]
    return set(data).union(*inner)


def test_json_is_alone_on_standard_output_and_every_field_is_documented(call):
    with in_a_thread() as server:
        code, out, err = call(
            server.url, "--find-max", "--rate", "40", "--max-rate", "80", "--duration-s", "0.3",
            "--warmup-s", "0", *EASY, "--json", "--documents", "2-4", "--tokens", "30",
        )  # fmt: skip
    printed = json.loads(out)
    assert (code, err, printed["schema"]) == (0, "", 1)
    assert [probe["rate"] for probe in printed["probes"]] == [40.0, 80.0]
    assert (printed["max_rate"], printed["limit"], printed["held"]) == (80.0, "bounded", True)
    assert printed["settings"]["documents"] == "2-4"
    assert printed["result"]["answered"] == printed["result"]["requests"] > 0
    documented = set(re.findall(r"`([\w.]+)`", DOCS.read_text("utf-8")))
    assert keys_of(printed) <= documented
    assert {2, 3, 4} >= {len(body["documents"]) for body in server.bodies}


def test_a_search_where_nothing_holds_ends_with_8(call, monkeypatch):
    monkeypatch.setattr("echelon.loadtest.client.PAUSE_S", 0.0)
    with in_a_thread(lambda number, body: full(number + 24, body)) as server:
        code, _, err = call(
            server.url, "--find-max", "--rate", "40", "--duration-s", "0.5", "--warmup-s", "0",
            *EASY,
        )  # fmt: skip
    assert code == 8
    assert "No rate held P99 at most" in err


def test_the_page_shows_the_numbers_and_runs_no_script_of_the_server(call, tmp_path):
    hostile = "<script>alert(1)</script>"
    path = tmp_path / "page.html"

    def answer(number, body):
        return web.Response(status=500, text=hostile) if number % 3 == 0 else good(body)

    with in_a_thread(answer) as server:
        code, _, err = call(server.url, *SHORT, *EASY, "--html", path)
    html = path.read_text("utf-8")
    assert code == 8
    assert f"Page: {path}" in err
    assert hostile not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "default-src 'none'" in html
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)[1])
    assert set(figures) == {"spectrum", "time"}
    spectrum = figures["spectrum"]["data"][0]
    assert spectrum["x"] == sorted(spectrum["x"])
    assert spectrum["y"] == sorted(spectrum["y"])
    assert figures["spectrum"]["layout"]["shapes"][0]["y0"] == 9.0
    failed = [t for t in figures["time"]["data"] if t["name"] == "Failed"]
    assert sum(failed[0]["y"]) > 0


def test_the_page_of_a_search_has_the_curve_of_load(call, tmp_path):
    path = tmp_path / "page.html"
    with in_a_thread() as server:
        call(
            server.url, "--find-max", "--rate", "40", "--max-rate", "80", "--duration-s", "0.3",
            "--warmup-s", "0", *EASY, "--quiet", "--html", path,
        )  # fmt: skip
    html = path.read_text("utf-8")
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)[1])
    assert figures["load"]["data"][0]["x"] == [40.0, 80.0]
    assert "Tested rates" in html


def test_the_real_charts_need_no_network():
    assert len(reports._plotly_js()) > 1e6


def test_ctrl_c_prints_what_was_measured(call):
    def answer(number, body):
        if number == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return good(body)

    with in_a_thread(answer) as server:
        code, out, err = call(server.url, "--rate", "100", "--duration-s", "500", "--warmup-s", "0")
    assert code == 130
    assert "Interrupted; above is what was measured" in err
    assert "from when due" in out


def test_a_trace_is_replayed_and_a_key_is_sent(call, tmp_path, monkeypatch):
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,documents,tokens\n1000,2,30\n1000.1,3,60\n", "utf-8")
    monkeypatch.setenv("ECHELON_API_KEY", "geheim")
    with in_a_thread() as server:
        code, out, err = call(
            server.url, "--trace", trace, "--warmup-s", "0", "--header", "X-Team: search",
            "--model", "mine",
        )  # fmt: skip
    assert code == 0
    assert "geheim" not in out + err
    asked = server.bodies[1:]  # the first request tries the server out
    assert [len(body["documents"]) for body in asked] == [2, 3]
    short, long = (len(body["documents"][0].split()) for body in asked)
    assert long > short
    assert {h["Authorization"] for h in server.headers} == {"Bearer geheim"}
    assert {h["X-Team"] for h in server.headers} == {"search"}
    assert {body["model"] for body in server.bodies} == {"mine"}


def test_ones_own_texts_are_sent(call, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"query": "my query", "documents": ["my document"]}\n', "utf-8")
    with in_a_thread() as server:
        code, _, _ = call(server.url, *SHORT, "--data", data, "--same-texts", "--documents", "2")
    assert code == 0
    assert {body["query"] for body in server.bodies} == {"my query"}
    assert server.bodies[0]["documents"] == ["my document", "my document"]


WRONG = {
    "no scheme": (("localhost:1",), "does not begin with http:// or https://"),
    "no server": (("http://127.0.0.1:1",), "cannot be reached: .*Start the server"),
    "no such host": (("http://no-such-host.invalid",), "host name is not known"),
    "rate": (("http://h", "--rate", "0"), "--rate: 0 is not a finite number above 0"),
    "clients": (("http://h", "--clients", "0"), "--clients: 0 is not positive"),
    "two loads": (("http://h", "--clients", "2", "--rate", "3"), "--clients: is given with --rate"),
    "no goal": (("http://h", "--find-max"), "--find-max: has no goal.*--slo-p99-ms"),
    "most": (("http://h", "--max-rate", "3"), "--max-rate: is for --find-max"),
    "goal": (("http://h", "--slo-p99-ms", "20000"), "longer than --timeout-ms"),
    "dialect": (("http://h", "--dialect", "x"), "'x' is unknown. Use one of cohere"),
    "documents": (("http://h", "--documents", "5-"), "--documents: '5-' is no whole number"),
    "tokens": (("http://h", "--tokens", "few"), "--tokens: 'few' is no whole number"),
    "trace": (("http://h", "--trace", "nowhere.csv"), "--trace: nowhere.csv cannot be read"),
    "data": (("http://h", "--data", "nowhere.jsonl"), "data: nowhere.jsonl cannot be read"),
    "header": (("http://h", "--header", "secret"), "--header: one is not 'Name: value'"),
    "warm-up": (("http://h", "--warmup-s", "-1"), "--warmup-s: -1.0 is negative"),
    "duration": (
        ("http://h", "--duration-s", "0"),
        "--duration-s: 0 is not a finite number above 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_refused_before_anything_is_sent(call, name):
    arguments, words = WRONG[name]
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert re.search(words, err), err


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: web.Response(status=401), "ECHELON_API_KEY"),
        (lambda: web.Response(status=404), "--dialect and --path"),
        (lambda: web.Response(status=422, text="too many"), "too many. Check --dialect, --model"),
        (lambda: web.Response(status=500), "See the server's log"),
        (lambda: good({"documents": ["a"]}), "does not answer as cohere does: 1 results for 10"),
        (list, "does not answer as cohere does: the answer has no list 'results'"),
    ],
)
def test_a_server_that_cannot_be_tested_is_named_at_once(call, answer, words):
    with in_a_thread(lambda _number, _body: answer()) as server:
        code, _, err = call(server.url)
    assert code == 2
    assert words in err
    assert len(server.bodies) == 1


def test_help_needs_none_of_its_packages():
    code = (
        "import sys; sys.argv = ['echelon', 'stress', '--help']\n"
        "from echelon import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'aiohttp', 'hdrh', 'numpy', 'plotly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_a_missing_package_is_named_with_its_remedy(call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call("http://h")
    assert code == 7
    assert "aiohttp, hdrhistogram" in err
    assert install_command("stress") in err
