"""Step times predicted against measured, on shapes that the fit has not seen.

Fits the cost model to the probes that `echelon tune` would choose, and compares what it says of
other shapes, of mixed lengths and any size, with their medians. All shapes take turns, round after
round, so that a machine that slows down slows all alike.

    python benchmarks/predict.py                        # the demo model
    python benchmarks/predict.py --tokenizer FOLDER     # and XLM-RoBERTa-large, random weights

Writes benchmarks/results/predict.json and predict.md. The goal on a quiet machine: median absolute
error at most 10 %, P90 at most 25 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.data import load_texts
from echelon.errors import TooNoisy
from echelon.models.device import cpu_name, usable_cpus
from echelon.models.hub import resolve
from echelon.models.registry import open_scorer
from echelon.profile import library_versions
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, work_of
from echelon.scheduling.fit import CostFit, FitError
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tuning.calibration import MIN_ROUNDS, ProbeResult, fitted, measure, scaled_prior
from echelon.tuning.machine import meter_of
from echelon.tuning.probe_shapes import LengthRange, StepFactory, choose
from echelon.types import monotonic
from make_checkpoint import SHAPES, make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.scheduling.fit import Probe
    from echelon.tuning.probe_shapes import Lengths

RESULTS = Path(__file__).parent / "results"
UNSEEN, SEED = 30, 2026
LONGEST = 512
GOAL = {"median": 0.10, "p90": 0.25}


def evaluate(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit one model's step times and compare them with unseen shapes'.

    Raises:
        TooNoisy: no fit was kept.
    """
    encoder = PairEncoder(folder)
    scorer = open_scorer(folder, device=arguments.device, precision=arguments.precision)
    try:
        info = scorer.info
        limits = LengthRange(min(LONGEST, info.max_tokens), arguments.budget, info.padding)
        steps = StepFactory(encoder, load_texts(None, language="en"), limits.longest)

        def run(shape: Lengths) -> None:
            scorer.score(steps.batch(shape))

        prior = scaled_prior(
            run, limits, DEFAULT_COEFFICIENTS[info.device.partition(":")[0]], monotonic
        )
        chosen = choose(limits, prior, arguments.seconds / 2 / (1 + MIN_ROUNDS))
        known = {*chosen.probes, *chosen.checks}
        others = [s for s in dict.fromkeys(limits.mixed(10 * UNSEEN, SEED)) if s not in known]
        unseen = set(others[: arguments.shapes])
        shapes = [*known, *unseen]
        measured = measure(shapes, run, meter_of(info.device), monotonic, arguments.seconds)
    finally:
        scorer.close()
    by_lengths = {probe.lengths: probe for probe in measured}
    parts = [[by_lengths[shape] for shape in some if shape in by_lengths] for some in chosen]
    found = fitted(ProbeResult(*parts, limits, steps, info))
    if found.cost is None:
        raise TooNoisy(f"{name}: {' '.join(found.warnings)}")
    return {
        "model": name,
        "precision": info.precision,
        "device": info.device_name,
        "threads": info.threads,
        "fit": found.cost,
        "memory": found.memory,
        **compared([p for p in measured if p.lengths in unseen], CostFit.from_dict(found.cost)),
    }


def compared(unseen: Sequence[Probe], fit: CostFit) -> dict[str, Any]:
    """Each unseen shape with both times, and the errors over all of them."""
    rows = [
        {
            "pairs": len(probe.lengths),
            "tokens": sum(probe.lengths),
            "longest": max(probe.lengths),
            "samples": len(probe.seconds),
            "measured_s": probe.median_s,
            "spread": probe.spread,
            "predicted_s": fit.coefficients.seconds(work_of(probe.lengths, fit.padding)),
        }
        for probe in unseen
    ]
    error = FitError.of([r["predicted_s"] for r in rows], [r["measured_s"] for r in rows])
    met = error.median <= GOAL["median"] and error.p90 <= GOAL["p90"]
    return {
        "unseen": rows,
        "error": {"median": error.median, "p90": error.p90, "shapes": error.shapes},
        "goal": GOAL,
        "met": met,
    }


def page(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = content["machine"]
    lines = [
        "# Step times: predicted against measured",
        "",
        f"`{content['command']}`, {content['date']}, {machine['cpu']}, {machine['cpus']} cores.",
        "",
        "| model | precision | shapes | median error | P90 | goal | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["models"]:
        error, goal = row["error"], row["goal"]
        lines.append(
            f"| {row['model']} | {row['precision']} | {error['shapes']} | {error['median']:.1%} | "
            f"{error['p90']:.1%} | {goal['median']:.0%}, {goal['p90']:.0%} | "
            f"{'yes' if row['met'] else 'no'} |"
        )
    for row in content["models"]:
        lines += ["", f"## {row['model']}", "", "| pairs | tokens | measured | predicted | off |"]
        lines.append("|---|---|---|---|---|")
        lines += [
            f"| {r['pairs']} | {r['tokens']} | {1000 * r['measured_s']:.1f} ms | "
            f"{1000 * r['predicted_s']:.1f} ms | {r['predicted_s'] / r['measured_s'] - 1:+.1%} |"
            for r in row["unseen"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="hub id, folder or 'demo'")
    parser.add_argument("--tokenizer", type=Path, help="also the large shape, with this tokenizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of the largest step")
    parser.add_argument("--shapes", type=int, default=UNSEEN)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    models = [evaluate(arguments.model, resolve(arguments.model).path, arguments)]
    if arguments.tokenizer is not None:
        with tempfile.TemporaryDirectory() as home:
            folder = make_checkpoint(
                Path(home) / "large", SHAPES["xlm-roberta-large"], arguments.tokenizer
            )
            models.append(evaluate("xlm-roberta-large, random weights", folder, arguments))
    content = {
        "command": " ".join(["python", "benchmarks/predict.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu_name(), "cpus": usable_cpus(), "system": platform.system()},
        "versions": library_versions(),
        "load_before": os.getloadavg(),
        "models": models,
    }
    (arguments.out / "predict.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    (arguments.out / "predict.md").write_text(page(content), "utf-8")
    for row in models:
        print(f"{row['model']}: median {row['error']['median']:.1%}, P90 {row['error']['p90']:.1%}")


if __name__ == "__main__":
    try:
        main()
    except TooNoisy as error:
        sys.exit(str(error))
