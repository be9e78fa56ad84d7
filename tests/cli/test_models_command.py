"""``echelon models``: families, and one model, as text and JSON, in two languages."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from echelon.cli import cli
from echelon.messages import in_language


def run(*arguments, code=0):
    with in_language(None):  # --lang holds until the end of a process
        result = CliRunner().invoke(cli, ["models", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_families_and_known_models_are_listed():
    text = run()
    assert "XLM-RoBERTa" in text
    assert "BAAI/bge-reranker-v2-m3" in text
    found = json.loads(run("--json"))
    assert {"bert"} <= {name for family in found["families"] for name in family["model_types"]}


def test_a_model_says_how_it_runs_and_what_memory_it_needs(bert, toy):
    text = run(bert)
    assert "natively, without padding" in text
    assert "130 tokens" in text
    assert "GiB (bf16)" in text
    assert "for one longest pair" in text
    assert "无填充" in run(bert, "--lang", "zh")
    found = json.loads(run(bert, "--json"))
    assert found["weights_bytes"]["fp32"] == 4 * found["weights"]
    assert found["step_bytes"]["fp32"] > found["step_bytes"]["bf16"] == found["step_bytes"]["int8"]
    assert "no native electra" in run(toy("electra"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    result = CliRunner().invoke(cli, ["models", str(tmp_path)])
    assert result.exit_code != 0
    assert "no config.json" in str(result.exception)


@pytest.mark.parametrize("asked", [[], ["demo"]])
def test_it_imports_no_torch(asked):
    import subprocess
    import sys

    code = "import sys; from echelon.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "models", *asked], check=True, capture_output=True)
