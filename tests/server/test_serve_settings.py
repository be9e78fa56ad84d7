"""The server's settings: flags over environment over file over defaults, each with its origin."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from tuned_models import profile

from echelon.cli.serve import config, serve
from echelon.errors import InvalidInput
from echelon.messages import in_language
from echelon.options import Options
from echelon.server.auth import ANONYMOUS, RateLimit
from echelon.server.context import max_wait_s


def config_of(*arguments, **environment) -> dict:
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
    found = config_of("--config", file, "--port", 9002, **environment)
    assert found["port"] == {"value": 9002, "origin": "flag"}
    assert found["workers"] == {"value": 3, "origin": "environment"}
    assert found["max_documents"] == {"value": 7, "origin": "file"}
    assert found["cors"] == {"value": ["https://a.example"], "origin": "file"}
    assert found["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert found["token_budget"] == {"value": None, "origin": "default"}


def test_the_file_may_be_named_by_the_environment(file):
    assert config_of(ECHELON_SERVE_CONFIG=str(file))["port"] == {"value": 9000, "origin": "file"}


@pytest.mark.parametrize(
    ("flags", "goal_s", "seconds", "reason"),
    [
        ({}, None, 5.0, "no latency goal is known"),
        ({}, 0.3, 0.3, "the latency goal of .*profile.json"),
        ({"slo_p99_ms": 200.0}, 0.3, 0.2, "the latency goal of --slo-p99-ms"),
        ({"slo_p99_ms": 200.0, "max_wait_s": 9.0}, 0.3, 9.0, "--max-wait-s"),
    ],
)
def test_a_request_waits_as_long_as_the_latency_goal(
    tmp_path, caplog, flags, goal_s, seconds, reason
):
    goal = {"slo_p99_s": goal_s, "rate": 5.0}
    path = tmp_path / "profile.json"
    profile(scenario={"asked": goal}).save(path)
    settings = {name: entry["value"] for name, entry in config_of().items()} | flags
    caplog.set_level("INFO")
    assert max_wait_s(settings, Options(profile=path)) == seconds
    assert re.search(f"longer than {seconds:g} s is refused: .*{reason}", caplog.text)


def test_config_as_a_table():
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
        config_of("--config", path)
    assert words in str(caught.value)
    with pytest.raises(InvalidInput, match=r"--config: .* cannot be read"):
        config_of("--config", tmp_path / "none.toml")


def test_values_of_the_wrong_kind_are_usage_errors(tmp_path):
    path = tmp_path / "echelon.toml"
    path.write_text('[serve]\nport = "many"\n', "utf-8")
    result = CliRunner().invoke(config, ["--config", str(path)])
    assert result.exit_code == 2
    assert "--port" in result.output


@pytest.fixture
def servers(monkeypatch):
    """What would have been served."""
    made = []
    monkeypatch.setattr(
        "echelon.server.http_server.run", lambda server, *_, **__: made.append(server)
    )
    monkeypatch.setattr("echelon.server.observability.set_up", lambda *_: None)
    return made


def served(servers, *arguments, **environment):
    result = CliRunner().invoke(serve, ["m", *map(str, arguments)], env=environment)
    if result.exception is not None:
        raise result.exception
    return servers.pop()


def test_settings_reach_the_server(servers, tmp_path):
    flags = ("--max-connections", 5, "--header-timeout-s", 2.5, "--rate-limit", "900/min")
    server = served(servers, *flags, ECHELON_SERVE_WEDGE_AFTER_S="7.5")
    assert (server.limits.max_connections, server.limits.header_timeout_s) == (5, 2.5)
    assert server.access.keys.authenticate({}).name == ANONYMOUS
    assert server.access.keys.authenticate({}).bucket.limit == RateLimit(15, 15)
    assert server._launch.keywords["wedge_after_s"] == 7.5
    assert server.traces is None
    assert server._launch.keywords["fallback_max_length"] is None
    (tmp_path / "keys").write_text("abc name=shop\n", "utf-8")
    keys = served(servers, "--api-keys", tmp_path / "keys", "--rate-limit", "5/s").access.keys
    assert keys.authenticate({"api-key": "abc"}).bucket.limit == RateLimit(5, 5)


def test_pages_are_in_the_language_of_flag_or_environment(servers):
    for arguments, environment, language in (
        ((), {}, None),
        (("--lang", "zh"), {}, "zh"),
        ((), {"ECHELON_LANG": "zh"}, "zh"),
        (("--lang", "en"), {"ECHELON_LANG": "zh"}, "en"),
    ):
        with in_language(None):
            assert served(servers, *arguments, **environment).language == language


def test_hosts_of_a_server_by_flag_environment_and_file(servers, tmp_path):
    (tmp_path / "e.toml").write_text('[serve]\nallowed_hosts = ["a.example"]\n', "utf-8")
    local = {"localhost", "*.localhost", "127.0.0.1"}
    assert served(servers).access.hosts.names == local
    for arguments, environment, names in (
        (("--allowed-hosts", "a", "--allowed-hosts", "b"), {}, {"a", "b"}),
        ((), {"ECHELON_SERVE_ALLOWED_HOSTS": "a b"}, {"a", "b"}),
        (("--config", tmp_path / "e.toml"), {}, {"a.example"}),
    ):
        assert served(servers, *arguments, **environment).access.hosts.names == local | names
    for arguments in (("--host", "0.0.0.0"), ("--allowed-hosts", "*")):
        assert served(servers, *arguments).access.hosts.names is None


def test_falling_back_is_off_unless_flag_environment_or_file_say_so(servers, tmp_path):
    assert config_of()["fallback_max_length"] == {"value": None, "origin": "default"}
    (tmp_path / "e.toml").write_text("[serve]\nfallback-max-length = 64\n", "utf-8")
    for arguments, environment, length in (
        (("--fallback-max-length", 128), {}, 128),
        ((), {"ECHELON_SERVE_FALLBACK_MAX_LENGTH": "96"}, 96),
        (("--config", tmp_path / "e.toml"), {}, 64),
    ):
        server = served(servers, *arguments, **environment)
        assert server._launch.keywords["fallback_max_length"] == length
        assert config_of(*arguments, **environment)["fallback_max_length"]["value"] == length


def test_traces_are_asked_for_by_flag_environment_or_file(servers, tmp_path):
    (tmp_path / "e.toml").write_text("[serve]\notel = true\n", "utf-8")
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    for arguments, environment, on in (
        (("--otel",), {}, True),
        ((), asked, True),
        (("--no-otel",), asked, False),
        (("--config", tmp_path / "e.toml"), {}, True),
        ((), {"ECHELON_SERVE_OTEL": "0", **asked}, False),
    ):
        traces = served(servers, *arguments, **environment).traces
        assert (traces is not None) is on
        if traces is not None:
            traces.close()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-connections", 0), "--max-connections: 0 is not positive"),
        (("--header-timeout-s", -1), "--header-timeout-s: -1.0 is not positive"),
        (("--rate-limit", "fast"), "--rate-limit: 'fast' is no rate"),
        (("--port", 80000), "--port: 80000 is no port. Give 0 to 65535."),
        (("--port", -1), "--port: -1 is no port"),
        (("--drain-s", "inf"), "--drain-s: inf is no number"),
        (("--max-wait-s", "nan"), "--max-wait-s: nan is no number"),
        (("--memory-limit-mb", 0), "--memory-limit-mb: 0 is not positive"),
        (("--cors", "shop.example"), "--cors: 'shop.example' is no origin"),
        (("--cors", "https://shop.example/"), "is no origin"),
        (("--allowed-hosts", "http://a"), "--allowed-hosts: 'http://a' is no host name"),
    ],
)
def test_settings_that_make_no_sense(servers, flags, words):
    with pytest.raises(InvalidInput) as caught:
        served(servers, *flags)
    assert words in str(caught.value)
