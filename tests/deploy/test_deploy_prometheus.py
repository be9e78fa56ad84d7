"""Alert rules and dashboard, judged by Prometheus: on made-up series and on a real server."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from functools import partial

import httpx
import pytest
import scorers
import yaml
from deployed import (
    DEPLOY,
    RULES,
    alerts,
    expressions,
    needs_prometheus,
    on_a_socket,
    one,
    panels,
    plain,
    until,
)
from services import GUARD_S

pytestmark = needs_prometheus

RULES_TEST = DEPLOY / "prometheus/alerts_test.yml"
BAD = {"query": "q", "documents": [chr(scorers.RAISE)]}
GOOD = {"query": "q", "documents": ["one document", "and another", "x" * 600]}
SHORT = "6s"
"""Of a test's rules: long enough for thirty scrapes."""


def promtool(*arguments):
    command = ["promtool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=GUARD_S)


def test_config_and_rules_are_sound(tmp_path):
    done = promtool("check", "config", DEPLOY / "prometheus/prometheus.yml")
    assert done.returncode == 0, done.stderr
    named = one(DEPLOY / "prometheus/prometheus.yml")["rule_files"]
    assert named == [RULES.name]
    # Expressions of panels are checked as if they were rules.
    rules = [{"record": f"r{i}", "expr": e} for i, e in enumerate(expressions().values())]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}), "utf-8")
    done = promtool("check", "rules", "--lint=none", path)
    assert done.returncode == 0, done.stderr


def test_rules_fire_when_they_should():
    done = promtool("test", "rules", DEPLOY / "prometheus/alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    fired = set(
        re.findall(r'alertname="(\w+)', (DEPLOY / "prometheus/alerts_test.yml").read_text())
    )
    assert fired == {rule["alert"] for rule in alerts()}


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("echelon_draining == 0", "echelon_draining >= 0"),
        ("died|wedged|failed", "died|failed"),
        ("0.9 *", "0.8 *"),
    ],
)
def test_the_tests_of_the_rules_notice_changes(tmp_path, was, becomes):
    rules = RULES.read_text("utf-8")
    assert was in rules
    (tmp_path / RULES.name).write_text(rules.replace(was, becomes), "utf-8")
    shutil.copy(RULES_TEST, tmp_path)
    assert promtool("test", "rules", tmp_path / RULES_TEST.name).returncode != 0


class Prometheus:
    """Prometheus' HTTP API."""

    def __init__(self, address: str) -> None:
        self._client = httpx.Client(base_url=f"http://{address}", trust_env=False)

    def query(self, expression: str) -> list:
        answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    def firing(self) -> dict[str, dict]:
        found = self._client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {a["labels"]["alertname"]: a for a in found if a["state"] == "firing"}

    def close(self) -> None:
        self._client.close()


@contextlib.contextmanager
def prometheus(folder, target: str):
    """Prometheus on the loopback, with our configuration and rules, but in more of a hurry."""
    config = one(DEPLOY / "prometheus/prometheus.yml")
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["scrape_configs"] = config["scrape_configs"][:1]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    rules = re.sub(r"\[\d+[mh]\]", f"[{SHORT}]", RULES.read_text("utf-8"))
    (folder / RULES.name).write_text(re.sub(r"for: \d+m", "for: 0s", rules), "utf-8")
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = re.compile(r'msg="Listening on" address=(\S+)')
            found = next((m for line in process.stderr if (m := said.search(line))), None)
            assert found is not None, "Prometheus did not start"
            api = Prometheus(found.group(1))
            yield api
            api.close()
        finally:
            process.kill()


def test_a_loaded_server_is_scraped_and_an_alert_fires(tmp_path):
    def post(body, status):
        answer = client.post("/v1/rerank", json=body)
        assert answer.status_code == status, answer.text

    served = on_a_socket(memory_limit_bytes=2**40)
    with (
        served as address,
        prometheus(tmp_path, address) as api,
        httpx.Client(base_url=f"http://{address}", trust_env=False) as client,
    ):
        until(lambda: api.query('up{job="echelon"} == 1'))
        until(lambda: "EchelonAbsent" not in api.firing())
        for _ in range(3):
            post(GOOD, 200)
        until(lambda: api.query("rate(echelon_requests_total{outcome='answered'}[6s]) > 0"))
        assert "EchelonFailing" not in api.firing()

        def failing():
            post(GOOD, 200)
            post(BAD, 500)
            return api.firing().get("EchelonFailing")

        alert = until(failing, every_s=0.1)
        assert alert["labels"]["instance"] == address
        assert alert["labels"]["severity"] == "critical"
        assert re.fullmatch(
            rf"{address} fails [\d.]+% of requests", alert["annotations"]["summary"]
        )
        assert "EchelonTruncating" in api.firing()  # 600 letters are more than the model takes
        assert {"EchelonNotReady", "EchelonTargetDown", "EchelonAbsent"}.isdisjoint(api.firing())

        for panel in panels():
            for target in panel["targets"]:
                # A rate needs two scrapes in its window: where the machine stalls, later ones.
                drawn = partial(api.query, plain(target["expr"], SHORT))
                until(drawn, what=(panel["title"], target["expr"]))
