"""What the tests of ``deploy/`` share: its files, the metrics there are, a server to look at."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import threading
import time
from functools import cache
from typing import get_args

import pytest
import uvicorn
import yaml
from helpers import ROOT
from services import GUARD_S, service

from echelon.cli.serve import serve
from echelon.engine.events import Outcome, WorkerState
from echelon.server.app import make_app
from echelon.server.context import ServerContext
from echelon.server.metrics import Metrics

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus/alerts.yml"
DASHBOARD = DEPLOY / "grafana/dashboard.json"
PAGE = (ROOT / "docs/DEPLOY.md").read_text("utf-8")

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="Prometheus is not installed (on Debian: apt install prometheus)",
)

PHASES = {"tokenise", "queue", "compute", "total"}


def documents(path) -> list:
    """The YAML documents of a file."""
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def one(path):
    (found,) = documents(path)
    return found


def alerts() -> list[dict]:
    return [rule for group in one(RULES)["groups"] for rule in group["rules"]]


def panels() -> list[dict]:
    """The dashboard's panels that show something."""
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def plain(expression: str, window: str = "5m") -> str:
    """A panel's expression without Grafana's variables."""
    return expression.replace("$__rate_interval", window).replace("$instance", ".*")


def expressions() -> dict[str, str]:
    """PromQL by where it stands: all alerts and all panels."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"{panel['id']} {panel['title']} {target['refId']}"] = plain(target["expr"])
    return found


@cache
def series() -> dict[str, dict[str, set[str]]]:
    """The labels of each series that a server exposes, with the values that are known at once."""
    found: dict[str, dict[str, set[str]]] = {}
    registry = Metrics().registry
    for collector in set(registry._collector_to_names):
        for metric in collector.collect():
            kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
            for ending in kinds.get(metric.type, ("",)):
                labels = {label: set() for label in collector._labelnames}
                labels |= {"le": set()} if ending == "_bucket" else {}
                found[metric.name + ending] = labels
            for sample in metric.samples:
                for label, value in sample.labels.items():
                    if sample.name in found:
                        found[sample.name][label].add(value)
    for phased in ("_bucket", "_sum", "_count"):
        found["echelon_request_seconds" + phased]["phase"] |= PHASES
    assert found["echelon_requests_total"]["outcome"] == set(get_args(Outcome))
    assert found["echelon_worker_changes_total"]["state"] == set(get_args(WorkerState))
    return found


def settings() -> dict[str, str]:
    """Flags of ``echelon serve`` by their environment variables."""
    options = {p.name: p.opts[0] for p in serve.params if p.opts[0].startswith("--")}
    return {f"ECHELON_SERVE_{name.upper()}": flag for name, flag in options.items()}


def environment(dockerfile: str) -> dict[str, str]:
    """What a Dockerfile's last stage sets."""
    content = (DEPLOY / dockerfile).read_text("utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (.*)$", content, re.MULTILINE)
    return dict(pair.split("=", 1) for pair in line.split())


@contextlib.contextmanager
def on_a_socket(**more):
    """The application over HTTP on the loopback, without weights; its address.

    It runs in a thread of its own, its worker in a process of its own.
    """
    metrics = Metrics()
    made = service(listener=metrics, **more)

    async def launch():
        await made.start()
        return made

    context = ServerContext(launch, "the-model", metrics)
    config = uvicorn.Config(make_app(context), lifespan="on", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    taken = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started, context.failure
        yield "{}:{}".format(*taken.getsockname())
    finally:
        server.should_exit = True
        thread.join(GUARD_S)
        taken.close()
    assert not thread.is_alive()


def until(condition, every_s: float = 0.02, what: object = ""):
    """Wait for what other processes do; what it came to. An error names ``what`` did not come."""
    guard = time.monotonic() + GUARD_S
    while not (found := condition()):
        assert time.monotonic() < guard, f"waited in vain {what}"
        time.sleep(every_s)
    return found
