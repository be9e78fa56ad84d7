"""Settings of a server on Ray, and commands that do not need Ray."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

pytest.importorskip("ray", reason="Ray is in an extra of its own")

from helpers import ROOT, run_python
from ray import serve
from ray.serve.schema import ServeDeploySchema

from echelon.cli import cli
from echelon.engine.launch import PreparedModel
from echelon.errors import InvalidInput, MissingDependency, install_command
from echelon.integrations.ray.serve import app, plan_of, values_of
from echelon.integrations.ray.worker import (
    WorkerResources,
    device_there,
    factory_of,
    place_of,
)
from echelon.models.hub import DEMO, ModelFolder
from echelon.options import Options
from echelon.scheduling.autoscaling import AutoscalingLimits
from echelon.server.http_server import GRACE_S


def test_an_application_holds_its_settings():
    made = app({"model": "demo", "max_requests": "100", "ingresses": 2, "drain_s": 10})
    deployment = made._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.max_ongoing_requests == 164
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 15
    assert isinstance(made, serve.Application)


def test_settings_come_out_of_arguments_environment_and_defaults(monkeypatch):
    monkeypatch.setenv("ECHELON_SERVE_MAX_WAIT_S", "7")
    values = values_of({"model": "demo", "workers": "2", "max_workers": 5, "worker_gpus": 0.5})
    plan = plan_of(values)
    assert (plan.model, plan.settings["max_wait_s"], plan.options.max_length) == ("demo", 7.0, None)
    assert plan.scaling == AutoscalingLimits(2, 5, delay_s=2.0)
    assert plan.resources == WorkerResources(1.0, 0.5)
    assert plan_of(values_of({"model": "demo", "workers": 3})).scaling == AutoscalingLimits(3, 3)


@pytest.fixture
def nodes(monkeypatch):
    """The machines of a cluster, as Ray lists them: some GPUs each, or none."""

    def there(*gpus, alive=True):
        listed = [
            {"Alive": alive, "Resources": {"CPU": 8.0} | ({"GPU": n} if n else {})} for n in gpus
        ]
        monkeypatch.setattr("ray.nodes", lambda: listed)

    return there


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_a_worker_has_a_gpu_of_its_own_where_the_cluster_has_any(nodes, device):
    nodes(0, 4.0)
    found = WorkerResources(2.0).on_cluster(device)
    assert found.needs == {"num_cpus": 2.0, "num_gpus": 1.0}
    assert device_there(device, found.gpus) == device.partition(":")[0]
    nodes(0, 0)
    assert WorkerResources(2.0).on_cluster(device).needs["num_gpus"] == 0
    nodes(4.0, alive=False)
    assert WorkerResources(2.0).on_cluster(device).needs["num_gpus"] == 0


def test_a_worker_without_a_gpu_of_its_own_takes_no_ones(nodes):
    nodes(4.0)
    assert WorkerResources(2.0).on_cluster("cpu").needs["num_gpus"] == 0
    for asked in (0.0, 0.5, 2.0):
        assert WorkerResources(1.0, asked).on_cluster("auto").gpus == asked
    assert device_there("auto", 0.0) == "cpu"
    assert device_there("cuda:1", 0.0) == "cuda:1"  # the user knows better


def test_an_application_has_all_host_names_unless_some_are_set():
    assert plan_of(values_of({"model": "demo"}))().access.hosts.names is None
    named = plan_of(values_of({"model": "demo", "allowed_hosts": ["rank.example"]}))()
    assert "rank.example" in named.access.hosts.names


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no model"),
        ({"model": "demo", "worker": 2}, "Did you mean 'workers'"),
        ({"model": "demo", "workers": "two"}, "not a valid integer"),
        ({"model": "demo", "port": 80}, "http_options"),
        ({"model": "demo", "workers": 3, "max_workers": 2}, "less than workers=3"),
        ({"model": "demo", "ingresses": 0}, "not positive"),
        ({"model": "demo", "worker_cpus": 0}, "worker_cpus"),
        ({"model": "demo", "worker_gpus": 1.5}, "worker_gpus"),
        ({"model": "demo", "max_delay_s": 0}, "delay_s"),
        ({"model": "demo", "precision": "fp64"}, "precision"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(settings, words):
    with pytest.raises(InvalidInput, match=words):
        app(settings)


def test_the_command_refuses_what_ray_cannot_do():
    ran = CliRunner().invoke(cli, ["serve", "demo", "--tls-cert", "x.pem", "--ray"])
    assert isinstance(ran.exception, InvalidInput)
    assert "Ray Serve has no TLS" in str(ran.exception)


def test_workers_of_a_file_are_rays_alone():
    ran = CliRunner().invoke(cli, ["batch", "in.jsonl", "-o", "out.jsonl", "--workers", "2"])
    assert isinstance(ran.exception, InvalidInput)
    assert "Add --ray" in str(ran.exception)


def test_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = CliRunner().invoke(cli, ["serve", "demo", "--ray"])
    assert isinstance(ran.exception, MissingDependency)
    assert "--ray needs ray" in str(ran.exception)
    assert install_command("ray") in str(ran.exception)


def test_config_knows_of_ray():
    ran = CliRunner().invoke(cli, ["config", "--max-workers", "4"])
    assert ran.exit_code == 0
    assert "max_workers          flag         4" in ran.output


def test_help_and_import_do_not_load_ray():
    ran = run_python(
        "import sys, echelon, echelon.cli\n"
        "from click.testing import CliRunner\n"
        "CliRunner().invoke(echelon.cli.cli, ['serve', '--help'])\n"
        "print('ray' in sys.modules)"
    )
    assert ran.stdout.strip() == "False", ran.stderr


# What opens the model elsewhere.


def prepared(tmp_path, name, revision, **options) -> PreparedModel:
    folder = ModelFolder(tmp_path / name, name, revision)
    return PreparedModel(folder, Options.of(**options), None, None, ["layer"])


def test_a_hub_model_is_opened_at_the_servers_commit(tmp_path):
    found = factory_of(
        prepared(tmp_path, "abc123", "abc123", threads=3), "owner/name", WorkerResources(2.0)
    )
    assert (found.model, found.revision, found.threads) == ("owner/name", "abc123", 3)
    assert found.keep_bf16 == ("layer",)


def test_a_folder_is_opened_by_its_whole_path(tmp_path):
    found = factory_of(prepared(tmp_path, "model", "f1n93r"), "model", WorkerResources(2.0))
    assert (found.model, found.revision, found.threads) == (str(tmp_path / "model"), None, 2)


def test_the_demo_model_is_found_by_every_machine_itself(tmp_path):
    found = factory_of(prepared(tmp_path, "demo", "demo"), DEMO, WorkerResources(0.5))
    assert (found.model, found.revision, found.threads) == (DEMO, None, 1)


# deploy/ray.

RAY = ROOT / "deploy/ray"


def test_the_file_for_serve_is_one_that_ray_and_the_application_take():
    made = ServeDeploySchema.model_validate(yaml.safe_load((RAY / "serve.yaml").read_text("utf-8")))
    (application,) = made.applications
    assert application.import_path == "echelon.integrations.ray.serve:app"
    plan = plan_of(values_of(application.args))
    assert plan.scaling == AutoscalingLimits(1, 4, delay_s=2.0)
    assert app(application.args)._bound_deployment.name == "echelon"


def test_the_kuberay_manifest_agrees_with_itself_and_with_the_file():
    manifest = yaml.safe_load((RAY / "rayservice.yaml").read_text("utf-8"))
    spec = manifest["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    assert config == yaml.safe_load((RAY / "serve.yaml").read_text("utf-8"))
    plan = plan_of(values_of(config["applications"][0]["args"]))
    (scorers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    head = spec["rayClusterConfig"]["headGroupSpec"]
    for group in (scorers, head):
        pod = group["template"]["spec"]
        assert pod["enableServiceLinks"] is False
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == config["http_options"]["port"]
        variables = {entry["name"] for entry in container["env"]}
        assert {"ECHELON_API_KEYS", "RAY_USAGE_STATS_ENABLED"} <= variables
        kubernetes_validate.validate(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "pod"},
                "spec": pod,
            },
            "1.37",
            strict=True,
        )
    limits = scorers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) == plan.resources.cpus
    assert scorers["maxReplicas"] == plan.scaling.max_workers
    grace = scorers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > plan.settings["drain_s"] + GRACE_S
    assert int(head["rayStartParams"]["num-cpus"]) < plan.resources.cpus


def test_other_machines_fetch_a_model_of_modelscope_by_its_name(tmp_path):
    name = "modelscope:acme/reranker@v2"
    assert place_of(ModelFolder(tmp_path, name, "0" * 12), "modelscope:acme/reranker") == (
        name,
        None,
    )
