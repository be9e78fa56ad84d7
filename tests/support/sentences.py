"""Every sentence that can be translated, found in the code and in the templates."""

from __future__ import annotations

import ast
import json
from functools import cache
from pathlib import Path
from string import Formatter

import jinja2
from jinja2 import nodes

SOURCE = Path(__file__).parents[2] / "src/echelon"
CATALOGUE = SOURCE / "reports/messages/zh.json"


def placeholders(sentence):
    return {name for _, name, _, _ in Formatter().parse(sentence) if name is not None}


@cache
def sentences():
    """``said`` and ``kept``: the English of each, as in the catalogue."""
    found = {"said": set(), "kept": set()}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                _note(found, node.func.id, getattr(node.args[0], "value", None))
    for path in SOURCE.rglob("*.j2"):
        tree = jinja2.Environment().parse(path.read_text(encoding="utf-8"))
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.args:
                _note(found, call.node.name, getattr(call.args[0], "value", None))
    return found


def _note(found, function, sentence):
    section = {"tr": "said", "mark": "said", "kept": "kept"}.get(function)
    if section is not None and isinstance(sentence, str):
        found[section].add(sentence)


def catalogue():
    return json.loads(CATALOGUE.read_text(encoding="utf-8"))
