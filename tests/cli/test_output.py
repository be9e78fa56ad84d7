"""What commands print: help, one form of errors, languages, and pipes beside terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial

import click
import pytest
from echelon.compat import CrossEncoder
from helpers import ROOT, run_command
from rich.cells import cell_len
from rich.console import Console

from echelon import cli, errors, progress
from echelon.messages import Message, in_language, tr
from echelon.models.base import DeviceOutOfMemory
from echelon.models.drivers import UnusableCard
from echelon.profile import Profile
from echelon.reports.tables import print_profile, print_ranking
from echelon.reports.terminal import say_row
from echelon.types import RankedDocument, Ranking

NO_FILE = "/no/file cannot be read (No such file or directory)"
PROFILE = ROOT / "examples/demo-profile.json"

COMMANDS = {
    **{name: cli.cli.commands[name] for name in cli.cli.commands if name != "report"},
    **{f"report {name}": inner for name, inner in cli.cli.commands["report"].commands.items()},
}


@pytest.fixture
def call(capsys, monkeypatch):
    """The command in this process: (exit code, output, error output)."""
    monkeypatch.delenv("ECHELON_LANG", raising=False)
    return partial(run_command, capsys, monkeypatch)


# Help.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_options_in_groups_and_an_example_that_parses(call, name):
    command = COMMANDS[name]
    _, out, _ = call(*name.split(), "--help")
    groups = {o.group for o in command.params if isinstance(o, click.Option)}
    assert all(f"\n{group}:\n" in out for group in groups)
    examples = [line.strip() for line in out.partition("Example:\n")[2].splitlines()]
    assert examples
    for line in examples:
        words = shlex.split(line.rpartition("| ")[2])
        assert words[: 1 + len(name.split())] == ["echelon", *name.split()]
        arguments = words[1 + len(name.split()) :]
        command.make_context(name, arguments, resilient_parsing=False).close()


def test_the_version_has_a_short_flag(call):
    assert call("-V") == call("--version")


@pytest.mark.parametrize("command", ["rank", "serve", "tune", "batch"])
def test_help_lists_every_precision(call, command):
    assert "[auto|fp32|bf16|fp16|int8|fp8]" in call(command, "--help")[1]


# Errors.


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("rank",), "Error: QUERY: is not given. See: echelon rank --help"),
        (("plan",), "Error: --slo-p99-ms: is not given. See: echelon plan --help"),
        (("config", "--port", "a"),
         "Error: --port: 'a' is not a valid integer. See: echelon config --help"),
        (("rank", "q", "d", "--top-n", "0"),
         "Error: --top-n: 0 is not a positive whole number. Give 1 or more."),
        (("plan", "--slo-p99-ms", "9", "--rate", "0", "--profile", "p"),
         "Error: --rate: 0 is not a finite number above 0. Give requests a second, such as 5."),
        (("rank", "q", "--file", "/no/file"),
         f"Error: --file: {NO_FILE}. Check its name."),
        (("--lang", "zh", "rank"), "错误：QUERY：未给出。请参阅：echelon rank --help"),
        (("rank", "q", "--file", "/no/file", "--lang", "zh"),
         "错误：--file：无法读取 /no/file（No such file or directory）。请检查文件名。"),
    ],
)  # fmt: skip
def test_every_error_is_one_line_with_flag_problem_and_remedy(call, arguments, line):
    code, out, err = call(*arguments)
    assert (code, out, err) == (2, "", f"{line}\n")


def test_json_lines_given_as_a_profile_are_named(call, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"query": "a"}\n{"query": "b"}\n', "utf-8")
    code, _, err = call("report", "show", tmp_path / "texts.jsonl")
    assert code == 4
    assert "it holds several JSON values, as JSONL files do). Give the file that" in err


def test_a_warning_begins_as_an_error_does(capsys):
    cli._show_warning(errors.EchelonWarning("It is old."))
    assert capsys.readouterr().err == "Warning: It is old.\n"


# The language.


def test_the_language_is_that_of_the_flag_or_of_its_variable_alone(call, monkeypatch):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert call("rank")[2].startswith("Error: ")
    monkeypatch.setenv("ECHELON_LANG", "zh")
    assert call("serve")[2].startswith("错误：MODEL：")
    assert call("rank", "--lang", "en")[2].startswith("Error: ")
    assert tr("Latency") == "Latency"


def test_tables_and_notes_are_in_the_language(call):
    code, out, _ = call("report", "compare", PROFILE, PROFILE, "--lang", "zh")
    assert code == 0
    assert "运行于" in out
    for english in ("Throughput", "Compared profiles", "Pairs", "Note:"):
        assert english not in out


# Pipes and terminals.


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_line_of_a_note_ends_inside_of_a_flag(capsys, monkeypatch, language):
    names = ("calibration.memory_left_out", "sweep.noisy_points", "sweep.points_predicted")
    notes = [Message(name, {"noisy": 3, "predicted": 4, "all": 9}) for name in names]
    flags = []
    for columns in range(20, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        with in_language(language):
            listed = tr("Check --dialect, --model, --documents and --tokens.")
            print_profile(replace(Profile.load(PROFILE), warnings=[*notes, listed]))
        lines = capsys.readouterr().out.splitlines()
        assert all(cell_len(line) <= columns for line in lines)
        flags += re.findall(r"--[a-z-]+", "\n".join(lines))
    listed = {"--dialect", "--model", "--documents", "--tokens"}
    assert set(flags) == {"--time-limit", "--refresh", *listed}
    assert len(flags) == 40 * (4 + len(listed))


def test_a_command_beside_a_name_stays_whole_where_there_is_room(capsys):
    command = "pip install -e '/some/folder[otel]'"
    many = "one, two, three, four, five, six, seven missing:"
    say_row(Console(width=60), "otel", 8, many, command)
    say_row(Console(width=90), "otel", 8, "one missing:", command)
    assert capsys.readouterr().out.splitlines() == [
        f"  otel     {many}",
        " " * 11 + command,
        f"  otel     one missing: {command}",
    ]
    say_row(Console(width=24), "otel", 8, "one, two, three missing:")
    assert (
        capsys.readouterr().out == "  otel     one, two,\n           three\n           missing:\n"
    )


LONG = " ".join(["word"] * 3000)
RESULTS = (
    RankedDocument(0, score=0.5, logit=0.0, document=LONG, truncated_tokens=0),
    RankedDocument(1, score=0.1, logit=-2.0, document="[b]", truncated_tokens=7),
)


def test_a_document_is_one_line_in_a_pipe(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_ranking(Ranking("q", RESULTS))
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["#", "score", "logit", "document"]
    assert first.endswith(LONG)
    assert second.endswith("  [b]  (cut by 7 tokens)")


def on_terminal(code):
    """What code prints on a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **streams)
    os.close(theirs)
    printed = b""
    try:
        while part := os.read(ours, 65536):
            printed += part
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return printed.decode()


STAGES = """
from echelon.progress import progress_bar, status
with progress_bar("Tuning", shown=True) as (on_progress, _):
    on_progress("measuring", 1, 4)
with status("Comparing", shown=True) as on_progress:
    on_progress("int8")
with status("Unused", shown=True):
    pass
"""


def test_stages_are_bars_on_a_terminal_and_lines_elsewhere():
    shown = on_terminal(STAGES)
    assert "\x1b[" in shown
    assert "25 %" in shown
    assert "Comparing: int8" in shown
    assert "…" not in shown
    piped = subprocess.run(
        [sys.executable, "-c", STAGES], capture_output=True, text=True, check=True
    )
    assert piped.stdout == ""
    lines = [line.partition(" … (")[0] for line in piped.stderr.splitlines()]
    assert lines == ["Tuning: measuring", "Comparing: int8"]
    assert "Unused" not in shown + piped.stderr


LOG = """
import logging
from echelon.server.observability import set_up
set_up(None, "info")
logging.getLogger("echelon").info("Loading demo.")
"""


def test_logs_are_plain_lines_on_a_terminal_and_json_elsewhere():
    assert on_terminal(LOG).rstrip().endswith("INFO echelon: Loading demo.")
    piped = subprocess.run([sys.executable, "-c", LOG], capture_output=True, text=True, check=True)
    assert json.loads(piped.stderr)["message"] == "Loading demo."


def test_lines_say_each_new_stage_and_others_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    lines = progress.StageLines("Tuning")
    for at_s, stage, done in (
        (100, "opening the model", 0),
        (103, "measuring batch 1", 1),
        (104, "measuring batch 2", 2),
        (114, "measuring batch 4", 3),
        (115, "simulating", 4),
    ):
        now[0] = at_s
        lines(stage, done, 4)
    assert capsys.readouterr().err.splitlines() == [
        "Tuning: opening the model … (0 s)",
        "Tuning: measuring batch 1 … (3 s, 25 %)",
        "Tuning: measuring batch 4 … (14 s, 75 %)",
        "Tuning: simulating … (15 s, 100 %)",
    ]
    with progress.bar("Scoring", 40, shown=True) as advance:
        advance(10)
        now[0] += progress.LINE_S
        advance(10)
    assert capsys.readouterr().err == "Scoring … (10 s, 50 %)\n"


# What is missing.


@pytest.mark.parametrize("runtime", ["ONNX Runtime", None])
def test_doctor_without_torch_says_what_runs_and_what_to_install(call, monkeypatch, runtime):
    from echelon import profile

    known = profile.library_versions
    hidden = {"torch"} if runtime else {"torch", "onnxruntime"}
    monkeypatch.setattr(
        profile,
        "library_versions",
        lambda *names: {k: v for k, v in known(*names).items() if k not in hidden},
    )
    monkeypatch.setattr("echelon.models.device.has_torch", lambda: False)
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["will_use"]["runtime"] == runtime
    assert found["will_use"]["threads"] >= 1
    (torch,) = [row for row in found["extras"] if row["name"] == "torch"]
    assert (torch["missing"], torch["command"]) == (["torch"], errors.install_command("torch"))
    advice = " ".join(found["advice"])
    assert torch["command"] in advice
    assert (errors.install_command("onnx") in advice) == (runtime is None)
    _, out, _ = call("doctor", "--lang", "zh")
    assert torch["command"] in out
    assert "将使用" in out


@pytest.mark.parametrize(
    ("direct_url", "folder", "command"),
    [
        (None, ".", "pip install 'echelon-rerank[serve]'"),
        ('{"url": "https://x/e.whl"}', ".", "pip install 'echelon-rerank[serve]'"),
        ('{"url": "file:///tmp", "dir_info": {"editable": true}}', "/tmp",
         "pip install -e '.[serve]'"),
        ('{"url": "file:///a%20b", "dir_info": {"editable": true}}', "/tmp",
         "pip install -e '/a b[serve]'"),
    ],
)  # fmt: skip
def test_a_remedy_fits_how_echelon_was_installed(monkeypatch, direct_url, folder, command):
    class Installed:
        def read_text(self, name):
            return direct_url if name == "direct_url.json" else None

    monkeypatch.setattr("importlib.metadata.distribution", lambda _: Installed())
    monkeypatch.chdir(folder)
    assert str(errors.MissingDependency("A needs b.", "serve")) == (
        f"A needs b. Install with: {command}"
    )


# Code that was written for torch.


def test_a_fallback_that_was_written_for_torch_works(bert, monkeypatch):
    """The pattern of tutorials: on out of memory, shorter pairs one at a time."""
    model = CrossEncoder(str(bert), device="cpu")
    scorer = model._reranker._engine._scorer
    score, pairs = scorer.score, [("rain", "window " * 60), ("rain", "tea")]

    def small(batch):
        if batch.lengths.max() > 40:
            raise DeviceOutOfMemory("planned")
        return score(batch)

    monkeypatch.setattr(scorer, "score", small)
    try:
        scores = model.predict(pairs, batch_size=32)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        scores = [model.predict([(q, d[:20])], batch_size=1)[0] for q, d in pairs]
    else:
        pytest.fail("the long pair fits nowhere")
    assert len(scores) == 2
    assert issubclass(errors.ScoringFailed, RuntimeError)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (UnusableCard("CUDA 13.0", "550.54.15", 580, "7.5"), "needs NVIDIA driver 580 or newer"),
        (UnusableCard("CUDA 13.0", "580.65.06", 580, "7.5"), "built for CUDA 13.0, cannot use it"),
    ],
)
def test_doctor_says_which_driver_a_card_needs(call, monkeypatch, card, words):
    monkeypatch.setattr("echelon.models.drivers.unusable_card", lambda: card)
    monkeypatch.setattr("echelon.models.drivers.untested_here", lambda: ["mps"])
    code, out, _ = call("doctor", "--json")
    assert code == 0
    advice = json.loads(out)["advice"]
    assert any(words in line for line in advice)
    assert any("has not been tested on such hardware" in line for line in advice)
