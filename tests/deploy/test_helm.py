"""The Helm chart: linted, its objects valid, and with its default values what the manifests are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from deployed import DEPLOY, documents, environment, one, series, settings

from echelon.engine.service import CANARY_TIMEOUT_S
from echelon.server.http_server import GRACE_S

CHART = DEPLOY / "helm/echelon"
KUBERNETES = DEPLOY / "kubernetes"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
BESIDE = Path(sys.executable).with_name("helm")  # scripts/get_helm.py puts it there
HELM = str(BESIDE) if BESIDE.exists() else shutil.which("helm")

pytestmark = pytest.mark.skipif(HELM is None, reason="there is no helm (make test brings it)")

GPU = {
    "image": {"repository": "registry.example/echelon", "tag": "cuda"},
    "model": "BAAI/bge-reranker-v2-m3",
    "settings": {
        "workers": 2,
        "max_requests": 2_000_000,
        "drain_s": 45.5,
        "fallback_max_length": 99,
    },
    "resources": {"limits": {"cpu": 8, "memory": "24Gi", "nvidia.com/gpu": 2}},
    "autoscaling": {"by": "backlog", "backlogSeconds": 5},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
}
OFFLINE = {
    "replicas": 5,
    "autoscaling": {"by": "none"},
    "podDisruptionBudget": {"enabled": False},
    "cache": {"existingClaim": "models"},
    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
    "apiKeys": {"secret": ""},
    "tls": {"secret": "certificate"},
    "service": {"type": "LoadBalancer", "port": 443},
    "serviceMonitor": {"enabled": True, "tlsConfig": {"serverName": "echelon.example"}},
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "imagePullSecrets": [{"name": "registry"}],
    "startupSeconds": 1200,
}
CASES = {"default": {}, "gpu": GPU, "offline": OFFLINE}


def helm(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [HELM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def rendered(tmp_path):
    """Render the chart with values; returns its objects by kind."""

    def render(values: dict, release="echelon") -> dict[str, dict]:
        file = tmp_path / "values.json"
        file.write_text(json.dumps(values))
        done = helm("template", release, CHART, "--values", file)
        assert done.returncode == 0, done.stderr
        found = [document for document in yaml.safe_load_all(done.stdout) if document]
        assert len({document["kind"] for document in found}) == len(found)
        return {document["kind"]: document for document in found}

    return render


def pod_of(objects: dict) -> dict:
    return objects["Deployment"]["spec"]["template"]["spec"]


def container_of(objects: dict) -> dict:
    (found,) = pod_of(objects)["containers"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_chart_pleases_its_linter(case, tmp_path):
    file = tmp_path / "values.json"
    file.write_text(json.dumps(CASES[case]))
    done = helm("lint", "--strict", CHART, "--values", file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_objects_follow_their_schemas(case, rendered):
    for kind, document in rendered(CASES[case]).items():
        if kind != "ServiceMonitor":  # of an operator; the cluster's own schemas lack it
            version = kubernetes_validate.latest_version()
            kubernetes_validate.validate(document, version, strict=True)


# The chart and the manifests.


OF_HELM = ("app.kubernetes.io/instance", "app.kubernetes.io/version",
           "app.kubernetes.io/managed-by", "helm.sh/chart")  # fmt: skip


def plain(node):
    """An object without what only releases have: their labels."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key not in OF_HELM}
    return [plain(item) for item in node] if isinstance(node, list) else node


def manifests(*files: str) -> dict[str, dict]:
    """The manifests by kind, with the image that kustomize puts in, and defaults written out."""
    found = {d["kind"]: d for file in files for d in documents(KUBERNETES / file)}
    (image,) = one(KUBERNETES / "kustomization.yaml")["images"]
    container = container_of(found)
    assert container["image"] == image["name"]
    container["image"] = f"{image['newName']}:{image['newTag']}"
    container["imagePullPolicy"] = "IfNotPresent"
    for volume in pod_of(found)["volumes"]:
        if "secret" in volume:  # YAML 1.1 reads 0440 as octal, which is what Kubernetes does
            assert volume["secret"]["defaultMode"] == 0o440
    return found


def test_with_default_values_it_is_the_manifests(rendered):
    listed = one(KUBERNETES / "kustomization.yaml")["resources"]
    assert plain(rendered({})) == manifests(*listed)


def test_what_is_optional_is_the_manifests_too(rendered):
    values = {"autoscaling": {"by": "backlog"}, "serviceMonitor": {"enabled": True}}
    objects = plain(rendered(values))
    expected = manifests("deployment.yaml", "hpa-backlog.yaml", "servicemonitor.yaml")
    # The job's name comes from the Service's label, since a release may have any name.
    assert objects["ServiceMonitor"]["spec"].pop("jobLabel") == "app.kubernetes.io/name"
    assert {kind: objects[kind] for kind in expected} == expected


def test_the_version_is_the_packages():
    chart = one(CHART / "Chart.yaml")
    (image,) = one(KUBERNETES / "kustomization.yaml")["images"]
    assert chart["appVersion"] == image["newTag"]


# Values.


def test_parts_of_a_release_find_each_other_and_no_other_release(rendered):
    objects = rendered(GPU, release="second")
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "second"
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (spread,) = pod_of(objects)["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    monitor = objects["ServiceMonitor"]
    service_labels = objects["Service"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service_labels.items()
    assert service_labels[monitor["spec"]["jobLabel"]] == "echelon", "the job of the alert rules"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"] == "second"
    assert scaler["metrics"][0]["pods"]["metric"]["name"] in series()
    assert scaler["metrics"][0]["pods"]["target"]["averageValue"] == "5"


def test_settings_are_those_of_the_server_and_arrive_as_given(rendered):
    objects = rendered(GPU)
    values = {entry["name"]: entry["value"] for entry in container_of(objects)["env"]}
    assert values.keys() <= settings().keys()
    assert values["ECHELON_SERVE_MAX_REQUESTS"] == "2000000"
    assert values["ECHELON_SERVE_DRAIN_S"] == "45.5"
    assert container_of(objects)["image"] == "registry.example/echelon:cuda"
    assert container_of(objects)["args"] == ["BAAI/bge-reranker-v2-m3"]


@pytest.mark.parametrize("case", CASES)
def test_the_pod_has_time_to_end_and_its_probes_time_to_answer(case, rendered):
    objects = rendered(CASES[case])
    container = container_of(objects)
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    (_, pause_s) = container["lifecycle"]["preStop"]["exec"]["command"]
    needed_s = float(pause_s) + float(values["ECHELON_SERVE_DRAIN_S"]) + GRACE_S
    assert pod_of(objects)["terminationGracePeriodSeconds"] >= needed_s
    assert container["readinessProbe"]["timeoutSeconds"] > CANARY_TIMEOUT_S
    assert container["resources"]["requests"] == container["resources"]["limits"]
    startup = container["startupProbe"]
    expected_s = CASES[case].get("startupSeconds", VALUES["startupSeconds"])
    assert startup["periodSeconds"] * startup["failureThreshold"] == expected_s


@pytest.mark.parametrize("case", CASES)
def test_the_pod_is_that_of_the_image_and_no_root(case, rendered):
    pod, container = pod_of(rendered(CASES[case])), container_of(rendered(CASES[case]))
    image = environment("Dockerfile")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["models"] == image["ECHELON_HOME"]
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert str(container["ports"][0]["containerPort"]) == image["ECHELON_SERVE_PORT"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == VALUES["securityContext"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    for entry in container["env"]:
        if entry.get("value", "").startswith("/etc/"):
            assert str(Path(entry["value"]).parent) in mounts.values()


def test_without_keys_and_with_tls(rendered):
    objects = rendered(OFFLINE)
    container = container_of(objects)
    names = [entry["name"] for entry in container["env"]]
    assert "ECHELON_SERVE_API_KEYS" not in names
    assert {"ECHELON_SERVE_TLS_CERT", "ECHELON_SERVE_TLS_KEY", "HF_HUB_OFFLINE"} <= set(names)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"] == {"serverName": "echelon.example"}
    assert objects["Deployment"]["spec"]["replicas"] == 5
    assert objects.keys() == {"Deployment", "Service", "ServiceMonitor"}
    assert objects["Service"]["spec"]["type"] == "LoadBalancer"
    volumes = {volume.pop("name"): volume for volume in pod_of(objects)["volumes"]}
    assert volumes["models"] == {"persistentVolumeClaim": {"claimName": "models"}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modle": "demo"}, "'modle' not allowed"),
        ({"model": ""}, "/model"),
        ({"resources": {"limits": {"cpu": "1.5"}}}, "/resources/limits/cpu"),
        ({"settings": {"port": 80}}, "'port'"),
        ({"settings": {"max-wait-s": 2}}, "'max-wait-s'"),
        ({"settings": {"drain_s": None}}, "drain_s"),
        ({"autoscaling": {"by": "luck"}}, "/autoscaling/by"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(values, words, tmp_path):
    file = tmp_path / "values.json"
    file.write_text(json.dumps(values))
    done = helm("template", "echelon", CHART, "--values", file)
    assert done.returncode != 0
    assert words in done.stderr


def test_the_notes_say_what_is_missing(tmp_path):
    shown = helm("install", "echelon", CHART, "--dry-run=client").stdout
    assert "create secret generic echelon-api-keys" in shown
    shown = helm("install", "e", CHART, "--dry-run=client", "--set", "apiKeys.secret=").stdout
    assert "asks for no API key" in shown
