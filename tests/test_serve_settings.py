"""The server's settings: flags over environment over file over defaults, each with its origin."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from echelon.api.command import config
from echelon.errors import InvalidInput


def told(*arguments, **environment) -> dict:
    """What ``echelon config`` says."""
    runner = CliRunner()
    result = runner.invoke(config, [*map(str, arguments), "--json"], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "echelon.toml"
    path.write_text(
        '[serve]\nport = 9000\nworkers = 2\nmax-documents = 7\ncors = ["https://a.example"]\n'
        "[other]\nport = 1\n",
        "utf-8",
    )
    return path


def test_each_value_says_where_it_came_from(file):
    environment = {"ECHELON_SERVE_PORT": "9001", "ECHELON_SERVE_WORKERS": "3"}
    found = told("--config", file, "--port", 9002, **environment)
    assert found["port"] == {"value": 9002, "origin": "flag"}
    assert found["workers"] == {"value": 3, "origin": "environment"}
    assert found["max_documents"] == {"value": 7, "origin": "file"}
    assert found["cors"] == {"value": ["https://a.example"], "origin": "file"}
    assert found["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert found["token_budget"] == {"value": None, "origin": "default"}


def test_the_file_may_be_named_by_the_environment(file):
    assert told(ECHELON_SERVE_CONFIG=str(file))["port"] == {"value": 9000, "origin": "file"}


def test_the_table_for_people():
    output = CliRunner().invoke(config, ["--port", "9002"]).output
    assert any(line.split() == ["port", "flag", "9002"] for line in output.splitlines())
    assert any(line.split() == ["host", "default", "127.0.0.1"] for line in output.splitlines())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[serve]\nprot = 1\n", "unknown setting 'prot'. Did you mean 'port'?"),
        ("[serve]\nzzz = 1\n", "unknown setting 'zzz'. See: echelon serve --help."),
        ("serve = 3\n", "serve is no table"),
        ("[serve\n", "cannot be read"),
    ],
)
def test_files_that_are_wrong(tmp_path, content, words):
    path = tmp_path / "echelon.toml"
    path.write_text(content, "utf-8")
    with pytest.raises(InvalidInput) as caught:
        told("--config", path)
    assert words in str(caught.value)
    with pytest.raises(InvalidInput, match=r"--config: .* cannot be read"):
        told("--config", tmp_path / "none.toml")


def test_values_of_the_wrong_kind_are_usage_errors(tmp_path):
    path = tmp_path / "echelon.toml"
    path.write_text('[serve]\nport = "many"\n', "utf-8")
    result = CliRunner().invoke(config, ["--config", str(path)])
    assert result.exit_code == 2
    assert "--port" in result.output
