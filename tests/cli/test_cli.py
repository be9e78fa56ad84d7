"""The command line as people use it: output, pipes, exit codes, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import click
import pytest
from helpers import offer, run_command

from echelon import cli, errors
from echelon.models import kernels
from echelon.models.device import CPU_SWITCH
from echelon.profile import Profile
from echelon.reports import tables

pytestmark = pytest.mark.device

QUICK = (
    "--pairs=4",
    "--batch-sizes=1,2",
    "--token-budgets=64",
    "--time-limit=1",
    "--max-length=100",
)


def run(*arguments, **more):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "echelon", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **more)


@pytest.fixture
def call(capsys, monkeypatch):
    """The command in this process: (exit code, output, error output)."""

    return partial(run_command, capsys, monkeypatch)


def test_rank_prints_the_documents_in_order(demo_folder, call):
    code, out, err = call(
        "rank", "how do I open a jar", "Tap the lid of the jar, then twist.", "[bold]Cars[/bold]",
        "--model", demo_folder,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.index("Tap the lid") < out.index("[bold]Cars[/bold]")


def test_a_command_that_ends_with_a_code_gives_it_to_the_shell(call, monkeypatch):
    @click.command()
    @click.argument("code", type=int)
    @click.pass_context
    def ends(context, code):
        context.exit(code)

    monkeypatch.setitem(cli.cli.commands, "ends", ends)
    assert call("ends", 3)[0] == 3
    assert call("ends", 0)[0] == 0


def test_rank_as_json_has_the_exact_numbers(demo_folder, call):
    documents = ["Tap the lid.", "Cars need fuel.", "Jars are made of glass."]
    code, out, _ = call(
        "rank", "how do I open a jar", *documents, "--json", "--top-n", 2, "--model", demo_folder
    )
    results = json.loads(out)["results"]
    assert code == 0
    assert len(results) == 2
    assert results[0]["logit"] >= results[1]["logit"]
    assert all(r["document"] == documents[r["index"]] for r in results)
    from echelon import Reranker

    with Reranker(demo_folder) as reranker:
        expected = reranker.rank("how do I open a jar", documents, 2)
    assert results[0]["logit"] == pytest.approx(expected.results[0].logit, abs=1e-4)


def test_rank_reads_files_and_standard_input(light, tmp_path):
    file = tmp_path / "documents.txt"
    file.write_text("one\n\nzwei\n三\n", "utf-8")
    from_file = run("rank", "q", "--file", file, "--json", "--model", light)
    from_pipe = run("rank", "q", "--json", "--model", light, input=file.read_text("utf-8"))
    dash = run("rank", "q", "--file", "-", "--json", "--model", light, input="one\nzwei\n三\n")
    assert from_file.stdout == from_pipe.stdout == dash.stdout
    assert sorted(r["document"] for r in json.loads(from_file.stdout)["results"]) == [
        "one",
        "zwei",
        "三",
    ]
    assert from_file.stderr == ""


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_no_documents_are_an_error(call, monkeypatch, tmp_path, text):
    file = tmp_path / "none.txt"
    file.write_text(text, "utf-8")
    for arguments, given in (((), "standard input"), (("--file", file), "none.txt")):
        with file.open(encoding="utf-8") as empty:
            monkeypatch.setattr("sys.stdin", empty)
            code, out, err = call("rank", "q", *arguments, "--model", "/no/such/model")
        assert (code, out) == (2, "")
        assert err.startswith("Error: documents: ")
        assert f"{given} holds no line of text. Give documents" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("rank", "q", "d", "--model", "/no/such/folder"), 3, "/no/such/folder"),
        (("rank", "q", "d", "--precision", "fp7"), 2, "Error: --precision: 'fp7'"),
        (("rank", "q", "d", "--device", "tpu"), 2, "Error: --device: 'tpu'"),
        (("rank", "q", "d", "--top-n", "0"), 2, "Error: --top-n: 0 is not"),
        (("rank", "q", "d", "--file", "x"), 2, "--file"),
        (("rank", "q", "--file", "/no/such/file"), 2, "/no/such/file"),
        (("rank", "q", "d", "--nonsense"), 2, "--nonsense"),
        (("rank", "q", "d", "--profile", "/no/profile.json"), 4, "/no/profile.json"),
        (("tune", "x", "--pairs", "1,b"), 2, "--pairs"),
        (("tune", "x", "--time-limit", "0"), 2, "Error: --time-limit: 0 is not"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_bad_usage_is_one_clear_line_and_an_exit_code(bert, call, arguments, code, said):
    if arguments[0] == "rank" and "--model" not in arguments:
        arguments = (*arguments, "--model", bert)
    got, out, err = call(*arguments)
    assert (got, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_tune_writes_profile_and_report_and_prints_the_table(bert, tmp_path, call, monkeypatch):
    offer(monkeypatch, "fp32", "bf16")
    profile, report = tmp_path / "p.json", tmp_path / "r.html"

    def shown(found, show=tables.print_profile):
        assert report.exists(), "a closed pipe would end the command here"
        show(found)

    monkeypatch.setattr(tables, "print_profile", shown)
    code, out, err = call("tune", bert, *QUICK, "--profile", profile, "--report", report)
    assert code == 0, err
    for words in ("Best batch", "Pairs/s", "Best step", "Realtime API", "Kendall"):
        assert words in out
    assert json.loads(profile.read_text())["schema"] == 1
    assert "<html" in report.read_text("utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "r.html"]
    code, _, err = call("rank", "q", "a", "b", "--model", bert, "--profile", profile, "--json")
    assert (code, err) == (0, "")


def test_tune_as_json_prints_the_profile_and_nothing_else(light, tmp_path):
    paths = ["--profile", tmp_path / "p.json", "--report", tmp_path / "r.html"]
    done = run("tune", light, *QUICK, *paths, "--precision", "fp32", "--json")
    assert done.stderr == ""
    saved = Profile.load(tmp_path / "p.json").as_dict()
    assert json.loads(done.stdout) == json.loads(json.dumps(saved))
    quiet = run("tune", light, *QUICK, *paths, "--precision", "fp32", "--quiet")
    assert (quiet.stdout, quiet.stderr, quiet.returncode) == ("", "", 0)


@pytest.mark.parametrize("flag", ["--profile", "--report"])
@pytest.mark.parametrize(("name", "problem"), [("no/p", "does not exist"), ("", "is a folder")])
def test_an_output_that_cannot_be_written_is_refused_at_once(call, tmp_path, flag, name, problem):
    code, out, err = call("tune", "/no/such/model", flag, tmp_path / name)
    assert (code, out) == (2, "")
    assert f"{flag}: " in err
    assert problem in err


def test_control_c_keeps_measurements_and_shows_no_traceback(bert, tmp_path):
    profile = tmp_path / "p.json"
    partial = tmp_path / "p.json.partial.json"
    command = [sys.executable, "-m", "echelon", "tune", str(bert), "--time-limit", "300"]
    command += ["--profile", str(profile), "--report", str(tmp_path / "r.html")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (partial.exists() and '"status"' in partial.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert str(partial) in err
    assert "Traceback" not in err
    assert json.loads(partial.read_text())["points"]
    assert not profile.exists()


def test_a_reader_that_goes_away_is_no_error(light):
    script = f"{sys.executable} -m echelon rank q a b c --model {light} --json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_help_names_every_command_and_exit_code(call):
    code, out, _ = call("--help")
    assert code == 0
    classes = [v for v in vars(errors).values() if isinstance(v, type)]
    codes = {c.exit_code for c in classes if issubclass(c, errors.EchelonError)}
    assert all(f"\n    {n} " in out for n in codes | {0, cli.INTERRUPTED})
    assert all(f"\n  {name} " in out for name in cli.cli.commands)


def test_help_loads_nothing_heavy():
    heavy = ("torch", "numpy", "rich", "plotly", "tokenizers", "huggingface_hub", "transformers")
    script = (
        "import sys\nfrom echelon import cli\n"
        "try:\n    cli.cli(['tune', '--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_doctor_shows_the_machine_and_what_is_used(call):
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["machine"]["usable_cpus"] <= (os.cpu_count() or 1)
    assert found["will_use"]["precision"] in {"fp32", "fp16"}
    assert any("echelon tune" in advice for advice in found["advice"])
    code, out, _ = call("doctor")
    assert code == 0
    assert found["machine"]["cpu"] in out


def test_doctor_simulates_an_old_processor_on_request(call, monkeypatch):
    monkeypatch.setenv(CPU_SWITCH, "avx2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    kernels.used_level.cache_clear()
    code, out, _ = call("doctor", "--json")
    kernels.used_level.cache_clear()
    found = json.loads(out)
    assert code == 0
    assert set(found["machine"]["matrix_features"]) <= {"avx2"}
    assert found["will_use"]["precisions_to_tune"] == ["fp32"]
    assert found["will_use"]["kernels"] in {"avx2", "off"}


def test_an_unknown_processor_is_refused(call, monkeypatch):
    monkeypatch.setenv(CPU_SWITCH, "avx3")
    code, out, err = call("doctor")
    assert (code, out) == (errors.InvalidInput.exit_code, "")
    assert "ECHELON_CPU: 'avx3' is unknown. Set it to avx2" in err


def test_doctor_without_torch_names_the_command():
    script = "import sys\nsys.modules['torch'] = None\nfrom echelon.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", script, "rank", "q", "d"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == errors.MissingDependency.exit_code
    assert errors.install_command("torch") in done.stderr


def test_pull_demo_is_idempotent_and_quiet(demo_folder, call):
    code, out, _ = call("pull", "demo")
    assert code == 0
    assert str(demo_folder) in out
    assert call("pull", "demo", "--quiet") == (0, "", "")
