"""The public surface: names, commands, JSON, metrics, routes, errors, exit codes, profiles.

``public_surface.json`` beside this file holds it. Moving code must not change it. If a change is
intended, write the file again, read its changes, and commit it with the change:

    python tests/house/test_public_surface.py --write

(the same as ECHELON_WRITE_SURFACE=1 before pytest). Texts for people are not compared.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import surface
from helpers import ROOT, run_command
from surface import form, there

# Places inside the package; code that moves is named here only.

OPTIONS = "echelon.options:Options"
ERRORS = "echelon.errors"
COMMANDS = "echelon.cli:cli"
METRICS = "echelon.server.metrics:Metrics"
APPLICATION = "echelon.server.app:make_app"
ACCESS = "echelon.server.auth:Access"
KEYS = "echelon.server.auth:Keys"
KEY = "echelon.server.auth:ApiKey"
TRACES = "echelon.server.observability:Traces"
ADVISE = "echelon.tuning.advisor:recommend"
TUNING_PLAN = "echelon.tuning.tuner:TuningPlan"
DISTURBANCE = "echelon.tuning.load:Disturbance"
FITTED = "echelon.tuning.tuner.models_of"
QUICKER = {
    "echelon.simulation.capacity.REQUESTS": 400,
    "echelon.simulation.capacity.FULL": 200,
    "echelon.simulation.capacity_plan.BUDGETS": {"cpu": (256, 1024)},
    "echelon.simulation.capacity_plan.ROUTINGS": ("tokens", "random"),
    "echelon.simulation.cluster_traffic.BLOCK": 512,
    "echelon.simulation.capacity.WARM_S": 0.3,
    "echelon.simulation.capacity.WINDOW_S": 1.0,
    "echelon.tuning.scenario.REQUESTS": 60,
    "echelon.tuning.scenario.FULL": 20,
    "echelon.loadtest.summary.BUSY_SHARE": 100.0,
    "echelon.loadtest.summary.LATE_S": 100.0,
}
"""Smaller simulations and looser limits; the forms of the results do not depend on them."""

# What users import, as they write it.

RESULTS = ("Ranking", "RankedDocument", "ScoredPairs", "RunReport")
CLASSES = (
    "echelon:Reranker",
    "echelon:AsyncReranker",
    "echelon.compat:CrossEncoder",
    "echelon.compat:FlagReranker",
    "echelon.adapters.langchain:EchelonReranker",
    "echelon.adapters.llamaindex:EchelonRerank",
    "echelon.adapters.haystack:EchelonRanker",
)

SNAPSHOT = Path(__file__).with_name("public_surface.json")
WRITE = "ECHELON_WRITE_SURFACE"
PROFILE = ROOT / "examples/demo-profile.json"
REMEDY = (
    "The public surface has changed (- was, + is). If that is intended, write the snapshot with "
    "`python tests/house/test_public_surface.py --write` and say so in CHANGELOG and docs."
)


def check(section, found):
    """Compare with the snapshot, or write it."""
    found = json.loads(json.dumps(found))
    frozen = json.loads(SNAPSHOT.read_text("utf-8")) if SNAPSHOT.exists() else {}
    if os.environ.get(WRITE):
        fresh = dict(sorted((frozen | {section: found}).items()))
        SNAPSHOT.write_text(surface.dump(fresh) + "\n", "utf-8")
        return
    changes = surface.differences(frozen.get(section), found)
    assert not changes, "\n".join([f"{section}: {REMEDY}", *changes])


@pytest.fixture
def quick(monkeypatch):
    for place, value in QUICKER.items():
        monkeypatch.setattr(place, value)


@pytest.fixture
def call(quick, capsys, monkeypatch, tmp_path):
    """``echelon`` in this process, in an empty folder: (exit code, output, error output)."""
    monkeypatch.chdir(tmp_path)
    return partial(run_command, capsys, monkeypatch)


@pytest.fixture
def printed(call):
    """What ``--json`` prints."""

    def run(*arguments):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


# Python.


def test_names():
    package, compat = there("echelon"), there("echelon.compat")
    for module in (package, compat):
        assert all(hasattr(module, name) for name in module.__all__)
    application = there("echelon.scale.serve:app")
    check(
        "names",
        {
            "echelon": sorted(package.__all__),
            "echelon.compat": sorted(compat.__all__),
            "echelon.scale.serve:app": surface.signature(application),
        },
    )


def test_classes():
    check("classes", {place: surface.members(there(place)) for place in CLASSES})


def test_results_and_options():
    package, options = there("echelon"), there(OPTIONS)
    found = {name: surface.data_fields(getattr(package, name)) for name in RESULTS}
    found["options"] = surface.data_fields(options)
    found["choices of options"] = surface.choices(options)
    check("data", found)


def test_errors():
    check("errors", surface.error_tree(there(ERRORS)))


# The command line.


def test_commands():
    check("commands", surface.commands(there(COMMANDS)))


def test_exit_codes(call):
    code, out, _ = call("--help")
    assert code == 0
    told = re.findall(r"^\s+(\d+) +\S", out[out.index("Exit codes") :], re.MULTILINE)
    listed = {}
    for name in ("docs/REFERENCE.md", "docs/REFERENCE.zh.md"):
        page = (ROOT / name).read_text("utf-8")
        listed[name] = re.findall(r"^\| (\d+) \| \S", page, re.MULTILINE)
    check("exit codes", {"--help": told} | listed)


def test_json_of_rank_batch_doctor_and_config(printed, call, fake, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("ECHELON_SERVE_")]:
        monkeypatch.delenv(name)
    found = {"rank": form(printed("rank", "q", "a", "b", "--model", fake))}
    rows = [
        {"id": "1", "query": "q", "documents": ["a", {"id": "d", "text": "b"}]},
        {"id": "2", "query": "q", "documents": "no list"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    code, _, err = call("batch", "in.jsonl", "-o", "out.jsonl", "--model", fake, "--quiet")
    assert code == 9, err
    for key, name in (("batch", "out.jsonl"), ("batch, bad rows", "out.jsonl.errors.jsonl")):
        lines = (tmp_path / name).read_text("utf-8").splitlines()
        found[key] = form([json.loads(line) for line in lines])
    machine = printed("doctor")
    machine["machine"]["gpus"] = []
    found["doctor"] = form(machine)
    found["config"] = printed("config")
    check("json", found)


def test_json_of_plan_and_compare(printed):
    asked = ("--profile", PROFILE, "--rate", 20, "--slo-p99-ms", 900)
    plan = printed("plan", *asked, "--day", "1,1", "--price-per-hour", 1)
    check("json of plan", form(plan))
    check("json of report compare", form(printed("report", "compare", PROFILE, PROFILE)))


def test_json_of_tune(printed, fake, monkeypatch):
    from profile_pairs import profile_of

    # Models of a real machine may be refused, and then they are null.
    fitted = profile_of()
    models = SimpleNamespace(cost=fitted.cost, memory=fitted.memory, warnings=[])
    monkeypatch.setattr(FITTED, lambda *_: models)
    sweep = ("--pairs=4", "--batch-sizes=1,2", "--token-budgets=64", "--time-limit=60")
    found = printed("tune", fake, *sweep, "--device", "cpu", "--threads", 1)
    for point in (*found["points"], *found["best"]):
        # What disturbed a run depends on what else runs here.
        point |= {"disturbed": [{"run": 0, **there(DISTURBANCE)().as_dict()}], "outliers": [0]}
        point |= {"predicted_s": {"median": 1.0, "low": 0.5, "high": 2.0}}
    for choice in (*found["best"], *found["situations"]):
        choice["rivals"] = [{"batch_size": 1, "token_budget": None}]
    # An old processor has one precision, and nothing to compare.
    found["precisions"] = found["precisions"] or fitted.precisions
    shape = form(found)
    shape |= {name: surface.loose(shape[name]) for name in ("best", "points", "precisions")}
    check("json of tune", shape | {"situations": surface.loose(shape["situations"])})


def test_json_of_tune_with_a_scenario(quick, bert, monkeypatch):
    from tuned_models import api_goal, known_as, pretend_validations, toy

    pretend_validations(monkeypatch, 2.0, 1.0)
    model = toy(bert)
    known = known_as(model, precisions=[])
    found = there(ADVISE)(model, known, api_goal(), there(TUNING_PLAN)()).profile
    printed = json.loads(json.dumps(found.as_dict()["scenario"]))
    check("json of tune --scenario", form(printed))


def test_json_of_stress(call):
    from aiohttp import web
    from stand_in_reranker import good, in_a_thread

    def third(number, body):
        return web.Response(status=500, text="no") if number % 3 == 0 else good(body)

    short = ("--duration-s", "0.4", "--warmup-s", "0", "--slo-p99-ms", "9000", "--json")
    with in_a_thread() as server:
        _, out, _ = call("stress", server.url, "--find-max", "--rate", 40, "--max-rate", 80, *short)
    found = form(json.loads(out))
    with in_a_thread(third) as server:
        _, out, _ = call("stress", server.url, "--rate", 100, *short)
    (failure,) = json.loads(out)["result"]["failures"].values()
    check("json of stress", found | {"a failure": form(failure)})


# The server.


def test_metrics():
    found = {}
    registry = there(METRICS)().registry
    labels = {
        name: collector._labelnames
        for collector, names in registry._collector_to_names.items()
        for name in names
    }
    for family in registry.collect():
        row = {"type": family.type, "labels": list(labels[family.name])}
        for label in row["labels"]:
            values = {s.labels[label] for s in family.samples if label in s.labels}
            row |= {f"known values of {label}": sorted(values)} if values else {}
        bounds = [s.labels["le"] for s in family.samples if s.name.endswith("_bucket")]
        found[family.name] = row | ({"buckets": bounds} if bounds else {})
    check("metrics", dict(sorted(found.items())))


def test_routes_answers_and_errors():
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from served import run_app

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    found = {}

    async def main(client, context):
        context.traces = there(TRACES)(provider)
        known = {"Authorization": "Bearer the-key"}
        routes = there(APPLICATION)(context).app.routes
        found["routes"] = {r.path: sorted(getattr(r, "methods", None) or ()) for r in routes}
        described = (await client.get("/openapi.json")).json()
        found["described"] = sorted(described["paths"])
        found["fields of bodies"] = surface.bodies(described)
        found["plain"] = {
            name: surface.answer(await client.request(*name.split(), headers=known))
            for name in ("GET /v1/models", "GET /info", "GET /health", "GET /ready",
                         "GET /nowhere", "POST /", "GET /v1/rerank")
        }  # fmt: skip
        found["plain"]["GET /v1/models without a key"] = surface.answer(
            await client.get("/v1/models")
        )
        found["answers"], found["errors"] = {}, {}
        submit = context.service.submit

        async def shortened(*arguments, **settings):
            return replace(await submit(*arguments, **settings), fallback=64)

        for name, (path, example) in surface.spoken(described).items():
            post = partial(client.post, path, headers=known)
            context.service.submit = submit
            found["answers"][name] = surface.answer(await post(json=example))
            context.service.submit = shortened
            explained = (await post(json={**example, "explain": True})).json()
            if isinstance(explained, dict):
                found["answers"][name]["explained"] = form(explained["echelon"])
            found["errors"][name] = {}
            for kind, error in surface.service_errors(there(ERRORS)).items():

                async def fail(*_, error=error, **__):
                    raise error

                context.service.submit = fail
                found["errors"][name][kind] = surface.answer(await post(json=example))
        context.service.submit = submit

    run_app(main, access=there(ACCESS)(keys=there(KEYS)([there(KEY)("the-key", "shop")])))
    spans = exporter.get_finished_spans()
    provider.shutdown()
    found["spans"] = {
        "names": sorted({re.sub(r" .*", " PATH", span.name) for span in spans}),
        "attributes": sorted({name for span in spans for name in span.attributes}),
    }
    check("http", found)


# Profiles.


def test_the_form_of_a_profile():
    content = json.loads(PROFILE.read_text("utf-8"))
    check("profile", {"schema": content["schema"], "form": form(content)})


def test_a_profile_of_today_is_read(call, fake):
    code, out, err = call("report", "show", PROFILE, "-o", "page.html")
    assert code == 0, out + err
    assert Path("page.html").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = call("rank", "q", "a", "--model", fake, "--profile", PROFILE)
    assert code == 0, err
    assert "; this machine is fake. Also, the model was demo, is bert" in err


@pytest.mark.parametrize("version", [0, 2, 99, "1", None])
def test_a_profile_of_another_version_is_refused_with_the_remedy(call, fake, version):
    content = json.loads(PROFILE.read_text("utf-8")) | {"schema": version}
    Path("other.json").write_text(json.dumps(content), "utf-8")
    for command in (
        ("rank", "q", "a", "--model", fake, "--profile", "other.json"),
        ("plan", "--profile", "other.json", "--rate", 20, "--slo-p99-ms", 900),
    ):
        code, out, err = call(*command)
        assert (code, out) == (4, "")
        assert f"profile version {version!r}, this Echelon reads 1" in err
        assert "Run `echelon tune` again" in err


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    os.environ[WRITE] = "1"
    sys.exit(pytest.main([__file__, "-q", "-p", "no:randomly"]))
