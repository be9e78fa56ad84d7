"""Echelon beside its peers: the same pairs through every engine that installs here.

    python benchmarks/peers.py --tokenizer FOLDER --xquad FOLDER     # everything; hours
    python benchmarks/peers.py                                       # the demo model, short pairs
    python benchmarks/peers.py … --models large --workloads mixed --engines echelon,onnxruntime

Each engine runs in a process of its own, at its fastest flags and its best step size, which is
found on a part of the pairs first. Then the engines take turns, in an order drawn anew for every
round. Where not all fit in memory they run in groups, with Echelon taking turns in each. fp32 on
large shapes is slow and has rounds of its own (--slow-rounds).

Results are saved after every round, and runs of parts are merged: peers.json, peers.md and
peers.svg under benchmarks/results/, a block for each processor, and the tables of the READMEs.
What fails is listed there with the reason.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peer_readme
import peer_report
from peer_models import MODELS, flop
from peer_results import finished, merge
from peer_setup import ENGINES, PRECISIONS, prepare, versions
from peer_turns import REPEATS, Member, Task, agreement, settle
from peer_worker import ENVIRONMENT, EngineFailed
from workloads import NAMES, build, read_passages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peer_setup import Engine
    from workloads import Passages

HERE = Path(__file__).parent
START = "start"
SLOW = ("large", "qwen3")
STARTERS = (
    "echelon bf16",
    "echelon int8",
    "sentence-transformers fp32",
    "sentence-transformers bf16",
)
"""Engines whose way from the start of the process to the first score is timed."""

PASSAGES_NEEDED = {"mixed", "long", "query"}
REFERENCE_SIZE = 8
PROCESS_BYTES = 0.7e9
"""What a process takes beside the weights."""

MEMORY_SHARE = 0.6
"""Of the memory now free that engines may take together, by default."""


class Bench:
    """One call of the benchmark: what is measured, and the results file.

    Args:
        arguments: the parsed command line.
        scratch: folder for the texts.
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments = arguments
        self.scratch = scratch
        self.path = arguments.results / "peers.json"
        stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.parts: list[dict[str, Any]] = stored.get("parts", [])
        self.references: dict[str, Any] = stored.get("references", {})

    def save(self, task: Task) -> None:
        """Add what the task has so far, and write all three files."""
        self.parts = merge(self.parts, finished(task.part))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"parts": self.parts, "references": self.references}
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        text = peer_report.markdown(self.parts)
        self.path.with_suffix(".md").write_text(text, encoding="utf-8")
        peer_report.chart(self.parts, self.path.with_suffix(".svg"))
        if self.path.resolve() == peer_readme.RESULTS:
            peer_readme.write(self.parts)

    def run(self, model: str, folder: Path, passages: Sequence[Passages]) -> None:
        """Everything about one model."""
        names = self._names(model, passages)
        tasks = [self._task(model, folder, name, passages) for name in names]
        ready = list(self._ready(self._engines(model), folder, tasks))
        warm = [task for task in tasks if task.name != START]
        self._score_references(model, folder, warm)
        for number, group in enumerate(self._groups(ready, folder) if warm else ()):
            say(f"{model}, group {number}: " + ", ".join(engine.name for engine in group))
            self._measure_peaks(warm)
            members = list(self._opened(group, folder, warm))
            for task in warm:
                self._take_turns(members, task, number)
            for member in members:
                member.close()
        for task in tasks:
            if task.name == START:
                self._start_up([e for e in ready if e.name in STARTERS], folder, task)
            say(peer_report.summary(self.parts, model, task.name))

    def _names(self, model: str, passages: Sequence[Passages]) -> list[str]:
        asked, there = self.arguments.workloads, (*MODELS[model].workloads, START)
        able = [name for name in asked if passages or name not in PASSAGES_NEEDED]
        return [name for name in able if name in there]

    def _engines(self, model: str) -> list[Engine]:
        """Those that run the model, of those that were asked for."""
        chosen = self.arguments.engines or ("",)
        able = MODELS[model].engines or ("",)
        return [e for e in ENGINES if e.name.startswith(chosen) and e.name.startswith(able)]

    def _task(self, model: str, folder: Path, name: str, passages: Sequence[Passages]) -> Task:
        from tokenizers import Tokenizer

        from echelon.tuning.machine import describe_machine

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        workload = build("realtime" if name == START else name, tokenizer, passages)
        texts = self.scratch / f"{model}-{name}.json"
        texts.write_text(json.dumps(workload.pairs), encoding="utf-8")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        part: dict[str, Any] = {
            "model": model,
            "workload": name,
            "fingerprint": f"{workload.fingerprint}-{config['num_hidden_layers']}",
            "pairs": len(workload.pairs) if name != START else 1,
            "tokens": sum(workload.lengths),
            "flop": flop(folder, workload),
            "command": "python " + " ".join(sys.argv),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": {},
            "peaks": {},
            "engines": {},
            "turns": [],
        }
        return Task(workload, texts, part)

    def _ready(
        self, engines: Sequence[Engine], folder: Path, tasks: list[Task]
    ) -> Iterator[Engine]:
        """The engines that install; the others are results already."""
        for engine in engines:
            facts = {
                "precision": engine.precision,
                "ours": engine.ours,
                "unit": engine.unit,
                "note": engine.note,
                "environment": engine.environment,
            }
            for task in tasks:
                if task.name != START or engine.name in STARTERS:
                    task.part["engines"][engine.name] = dict(facts)
            try:
                say(f"preparing {engine.name}")
                prepare(engine, folder)
            except EngineFailed as error:
                self._failed(engine, tasks, error)
                continue
            for task in tasks:
                task.part["versions"][engine.environment] = versions(engine.environment)
            yield engine

    def _failed(self, engine: Engine, tasks: list[Task], error: EngineFailed) -> None:
        say(f"{engine.name}: {error}")
        for task in tasks:
            if engine.name in task.part["engines"]:
                task.part["engines"][engine.name]["failure"] = str(error)

    def _score_references(self, model: str, folder: Path, tasks: list[Task]) -> None:
        """Logits of the reference, once for each set of pairs; they are kept in the results."""
        wanted = [task for task in tasks if self._reference(task) is None]
        if not wanted:
            return
        reference = MODELS[model].reference
        say(f"{model}: reference scores of {reference}")
        engine = next(engine for engine in ENGINES if engine.name == reference)
        try:
            member = Member(engine, folder)
            for task in wanted:
                _, logits = member.score(task, REFERENCE_SIZE)
                self.references[f"{model}/{task.name}"] = {
                    "fingerprint": task.part["fingerprint"],
                    "logits": [round(logit, 6) for logit in logits],
                }
            member.close()
        except EngineFailed as error:
            say(f"{reference}: {error}; agreement is not measured")

    def _reference(self, task: Task) -> list[float] | None:
        kept = self.references.get(f"{task.part['model']}/{task.name}", {})
        return kept.get("logits") if kept.get("fingerprint") == task.part["fingerprint"] else None

    def _groups(self, ready: list[Engine], folder: Path) -> Iterator[list[Engine]]:
        """Engines that are loaded at a time: peers of one precision, with Echelon.

        Beside fp32 peers Echelon takes turns in every precision, else in the peers' own.
        """
        import psutil

        given = self.arguments.memory
        free = MEMORY_SHARE * psutil.virtual_memory().available if given is None else given * 1e9
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

        def needs(engines: Sequence[Engine]) -> float:
            return sum(PROCESS_BYTES + engine.weights * weights for engine in engines)

        peers = [engine for engine in ready if not engine.ours]
        if not peers and ready:
            yield ready
        for precision in PRECISIONS:
            ours = [e for e in ready if e.ours and precision in {"fp32", e.precision}]
            group: list[Engine] = []
            for peer in (e for e in peers if e.precision == precision):
                if group and needs([*ours, *group, peer]) > free:
                    yield [*ours, *group]
                    group = []
                group.append(peer)
            if group:
                yield [*ours, *group]

    def _opened(self, group: list[Engine], folder: Path, tasks: list[Task]) -> Iterator[Member]:
        for engine in group:
            try:
                yield Member(engine, folder)
            except EngineFailed as error:
                self._failed(engine, tasks, error)

    def _measure_peaks(self, tasks: list[Task]) -> None:
        """The machine's matrix peak, anew for each group; the best counts."""
        command = [sys.executable, HERE / "peaks.py"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=ENVIRONMENT)
        for precision, routes in json.loads(answer.stdout).items():
            for task in tasks:
                kept = task.part["peaks"].setdefault(precision, {})
                kept.update({route: max(r, kept.get(route, 0)) for route, r in routes.items()})

    def _take_turns(self, members: list[Member], task: Task, group: int) -> None:
        """Find each engine's settings, then let all take turns; saved after every round."""
        settled = [member for member in members if self._settled(member, task)]
        slow = task.part["model"] in SLOW and task.name not in REPEATS
        slow = slow and any(m.engine.precision == "fp32" for m in members if not m.engine.ours)
        for number in range(self.arguments.slow_rounds if slow else self.arguments.rounds):
            turn: dict[str, Any] = {"group": group, "round": number, "seconds": {}}
            task.part["turns"].append(turn)
            order = list(settled)
            random.Random(f"{task.name} {group} {number}").shuffle(order)
            for member in order:
                try:
                    turn["seconds"][member.engine.name] = self._score(member, task)
                except EngineFailed as error:
                    self._failed(member.engine, [task], error)
                    settled.remove(member)
            self.save(task)
            say(f"{task.part['model']}/{task.name} round {number + 1}: {_brief(turn)}")

    def _settled(self, member: Member, task: Task) -> bool:
        facts = task.part["engines"][member.engine.name]
        try:
            if "size" not in facts:  # Echelon is settled in its first group
                facts.update(settle(member, task))
                say(f"{member.engine.name}: {facts['size']} {facts['unit']}, {facts['options']}")
            member.open(facts["options"])
        except EngineFailed as error:
            self._failed(member.engine, [task], error)
            return False
        return True

    def _score(self, member: Member, task: Task) -> float:
        facts = task.part["engines"][member.engine.name]
        times = []
        for _ in range(REPEATS.get(task.name, 1)):
            seconds, logits = member.score(task, facts["size"])
            times.append(seconds)
        reference = self._reference(task)
        if reference is not None:
            facts.update(agreement(task, reference, logits))
        facts["memory"] = member.worker.memory()
        return statistics.median(times)

    def _start_up(self, engines: list[Engine], folder: Path, task: Task) -> None:
        """Cold processes in turn, files in the page cache; one pair is scored."""
        for number in range(self.arguments.start_rounds):
            turn: dict[str, Any] = {"group": 0, "round": number, "seconds": {}}
            task.part["turns"].append(turn)
            for engine in engines:
                try:
                    member = Member(engine, folder)
                    member.score(task, max(engine.sizes), [0])
                    spent = time.perf_counter() - member.worker.started
                    turn["seconds"][engine.name] = spent
                    member.close()
                except EngineFailed as error:
                    self._failed(engine, [task], error)
            self.save(task)
        say(f"{task.part['model']}/{task.name}: {_brief(turn)}")


def _brief(turn: dict[str, Any]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in turn["seconds"].items())


def commit() -> str:
    """The checkout's commit, or ``unknown``."""
    command = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def say(words: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def main() -> None:
    """Parse and measure one model after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="tokenizer of the XLM-R-large stand-in")
    parser.add_argument("--xquad", type=Path, help="folder of SQuAD-like *.LANGUAGE.json files")
    parser.add_argument("--models", type=_list, default=tuple(MODELS))
    parser.add_argument("--workloads", type=_list, default=(*NAMES, START))
    parser.add_argument("--engines", type=_list, help="names, or what they begin with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=3, help="beside fp32, large shapes")
    parser.add_argument("--start-rounds", type=int, default=3, help="cold starts of each engine")
    parser.add_argument("--memory", type=float, help="GB that engines may take together")
    parser.add_argument("--layers", type=int, help="of seeded models, to try things quickly")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error("matplotlib is missing: install the extra `bench`")  # now, not after hours
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, Path(scratch))
        for model in arguments.models:
            _run_model(bench, model)
    print(f"{bench.path}\n{bench.path.with_suffix('.md')}\n{bench.path.with_suffix('.svg')}")


def _run_model(bench: Bench, model: str) -> None:
    arguments, made = bench.arguments, MODELS[model]
    if arguments.tokenizer is None and not made.own_tokenizer:
        say(f"{model}: left out, it needs --tokenizer")
        return
    folder = made.make(arguments.tokenizer, arguments.layers)
    passages = read_passages(arguments.xquad, made.languages) if arguments.xquad else ()
    bench.run(model, folder, passages)


if __name__ == "__main__":
    main()
