"""Reads the texts to measure with: the built-in English and Chinese set, or the user's JSONL."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput
from echelon.files import parse_json
from echelon.messages import Message

if TYPE_CHECKING:
    import os

    from echelon.types import Pair

FORMS = (
    'Each line is {"query": "…", "documents": ["…", {"text": "…", "grade": 2}]} '
    'or {"query": "…", "document": "…"}.'
)


@dataclass(frozen=True, slots=True)
class Topic:
    """One query with its documents, and grades from 0 (none) up if there are judgements."""

    query: str
    documents: tuple[str, ...]
    grades: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Texts:
    """A named set of topics."""

    name: str
    topics: tuple[Topic, ...]

    @property
    def pairs(self) -> list[Pair]:
        """All (query, document) pairs, topic after topic."""
        return [(topic.query, document) for topic in self.topics for document in topic.documents]

    def sample(self, count: int) -> list[Pair]:
        """Take ``count`` pairs with the same mix of lengths as the whole set.

        The pairs are sorted by length and taken at even distances. A smaller set is repeated.
        """
        ordered = sorted(self.pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
        if count > len(ordered):
            repeated = ordered * -(-count // len(ordered))
            return repeated[:count]
        return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def load_texts(path: str | os.PathLike[str] | None = None, language: str | None = None) -> Texts:
    """Read the user's JSONL file, or the built-in set, of which ``language`` is ``en`` or ``zh``.

    Raises:
        InvalidInput: the file cannot be read, or a line is wrong; the error names the line.
    """
    if path is None:
        lines = (files("echelon.data") / "texts.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        chosen = [r for r in records if language in {None, r["lang"]}]
        name = Message("data.built_in", {"language": language or "en, zh"})
        return Texts(name, tuple(_topic(r, "texts.jsonl") for r in chosen))
    return Texts(Path(path).name, _grouped(_read(Path(path))))


def _read(path: Path) -> list[Topic]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{path} cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InvalidInput("data", problem, "Give a UTF-8 file.") from error
    topics = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            topics.append(_topic(_parse(line, f"{path}:{number}"), f"{path}:{number}"))
    if not any(topic.documents for topic in topics):
        raise InvalidInput("data", f"{path} holds no documents", FORMS)
    return topics


def _parse(line: str, where: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise InvalidInput("data", f"{where} is {error}", FORMS) from error


def _topic(record: Any, where: str) -> Topic:
    if not isinstance(record, dict) or not isinstance(record.get("query"), str):
        raise InvalidInput("data", f"{where} has no text under 'query'", FORMS)
    listed = record.get("documents", [record["document"]] if "document" in record else None)
    if not isinstance(listed, list):
        raise InvalidInput("data", f"{where} has no 'documents' list and no 'document'", FORMS)
    documents: list[Any] = [d.get("text") if isinstance(d, dict) else d for d in listed]
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise InvalidInput("data", f"{where}: documents[{index}] is not text", FORMS)
    grades: list[Any] = [d.get("grade") if isinstance(d, dict) else None for d in listed]
    judged = bool(grades) and all(isinstance(grade, int) for grade in grades)
    return Topic(record["query"], tuple(documents), tuple(grades) if judged else None)


def _grouped(topics: list[Topic]) -> tuple[Topic, ...]:
    """Merge lines with the same query, such as one pair per line, into one topic."""
    queries: dict[str, list[Topic]] = {}
    for topic in topics:
        queries.setdefault(topic.query, []).append(topic)
    merged = []
    for query, parts in queries.items():
        documents = tuple(document for part in parts for document in part.documents)
        grades = tuple(grade for part in parts for grade in part.grades or ())
        judged = all(part.grades is not None for part in parts)
        merged.append(Topic(query, documents, grades if judged else None))
    return tuple(merged)
