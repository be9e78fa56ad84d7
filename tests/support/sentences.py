"""Every translatable message: in code, scripts, templates, the help and the catalogues."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter
from unittest.mock import patch

import click
import jinja2
from jinja2 import nodes

from echelon.cli import cli, help_texts
from echelon.messages import catalogue
from echelon.server import pages

SOURCE = Path(__file__).parents[2] / "src/echelon"
STORED_ID = re.compile(r"[a-z]+\.[a-z0-9_]+")


@dataclass
class Used:
    """Messages that are used: stored ones with the names of their values, and others."""

    stored: dict[str, set[str] | None] = field(default_factory=dict)
    pages: set[str] = field(default_factory=set)


def placeholders(sentence):
    return {name for _, name, _, _ in Formatter().parse(sentence) if name is not None}


def is_id(message):
    return STORED_ID.fullmatch(message) is not None


@cache
def used():
    found = Used()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                _note(found, node.func.id, node.args)
    for path in SOURCE.rglob("*.j2"):
        tree = jinja2.Environment().parse(path.read_text(encoding="utf-8"))
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.args:
                _note(found, call.node.name, call.args)
    found.pages |= help_sentences() | pages.sentences()
    return found


def commands(group=cli, path=("echelon",)):
    """Each command and group with its words on the command line."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def help_sentences():
    """What the help of all commands looks up."""
    found = set()
    with patch.object(help_texts, "tr", lambda sentence: found.add(sentence) or sentence):
        for path, command in commands():
            command.get_help(click.Context(command, info_name=" ".join(path)))
    return found


def _note(found, function, arguments):
    first = arguments[0]
    choices = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
    for message in (getattr(choice, "value", None) for choice in choices):
        if not isinstance(message, str):
            continue
        if function == "Message":
            found.stored[message] = _names(arguments[1:])
        elif function in {"tr", "N_"}:
            if is_id(message):
                found.stored.setdefault(message, None)
            else:
                found.pages.add(message)


def _names(values):
    """Names of a message's values; None where the code does not write them out."""
    if not values:
        return set()
    keys = getattr(values[0], "keys", [None])
    return {key.value for key in keys} if all(isinstance(k, ast.Constant) for k in keys) else None


def texts(language):
    """A catalogue without its header."""
    return {message: text for message, text in catalogue(language).texts.items() if message}
