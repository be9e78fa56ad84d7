"""What users see, put into plain data: the helpers of test_public_surface.py."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from importlib import import_module
from typing import Any

import click

WORDS = {"advice", "allow", "doubts", "matrix_features", "notes", "warnings"}
"""Lists of texts that may be empty: how many there are is no matter of form."""

MAPS = {"refused": "numbers by name", "versions": "texts by name", "software": "versions by name"}
"""Objects whose keys are data."""

CODES = {"code", "error_type", "loc", "object", "param", "type"}
"""What programs read in an answer: its value is pinned, not only its type."""

VERSIONS = frozenset({"kind", "schema"})
"""What programs look at first in the JSON of a command: pinned likewise."""

WIDTH = 150


def there(place: str) -> Any:
    """What stands at ``module:name``, or the module."""
    module, _, name = place.partition(":")
    found = import_module(module)
    return getattr(found, name) if name else found


# The form of data.


def form(data: Any, codes: frozenset[str] | set[str] = VERSIONS) -> Any:
    """Keys and the types of values; a key with ``?`` is not in every item of a list."""
    if isinstance(data, dict) and data.keys() == {"id", "values"}:
        return "message: id and values"
    if isinstance(data, dict):
        return {key: _entry(key, value, codes) for key, value in sorted(data.items())}
    if isinstance(data, list | tuple):
        forms = [form(item, codes) for item in data]
        return [_merged(forms)] if forms else []
    if data is None:
        return "null"
    kinds = {bool: "bool", int: "number", float: "number", str: "text"}
    return kinds[type(data)]


def _entry(key: str, value: Any, codes: frozenset[str] | set[str]) -> Any:
    if key in codes:
        return f"= {json.dumps(value, ensure_ascii=False)}"
    if key in WORDS and isinstance(value, list):
        return sorted({form(item, codes) for item in value} or {"text"})
    if key in MAPS and isinstance(value, dict):
        return MAPS[key]
    return form(value, codes)


def _merged(forms: list[Any]) -> Any:
    """One form for all items of a list."""
    dicts = [one for one in forms if isinstance(one, dict)]
    lists = [one for one in forms if isinstance(one, list)]
    plain = {one for one in forms if isinstance(one, str)}
    if dicts and len(dicts) + (("null" in plain) * len(forms)) >= len(forms):
        keys = sorted({key for one in dicts for key in one})
        made = {
            key if all(key in one for one in dicts) else f"{key}?": _merged(
                [one[key] for one in dicts if key in one]
            )
            for key in keys
        }
        return {"(or null)": True, **made} if plain else made
    if lists and not dicts and not plain:
        inner = [item for one in lists for item in one]
        return [_merged(inner)] if inner else []
    assert not dicts
    names = {name for one in plain for name in one.split(" | ")} | ({"list"} if lists else set())
    return " | ".join(sorted(names))


def loose(data: Any) -> Any:
    """The form where a number may be missing, which depends on how noisy the machine is."""
    if isinstance(data, dict):
        return {key: loose(value) for key, value in data.items()}
    if isinstance(data, list):
        return [loose(item) for item in data]
    return "number or null" if data in {"null", "number", "null | number"} else data


# Python.


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters; no annotations, which are not called."""
    found = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    told = str(found.replace(parameters=bare, return_annotation=found.empty))
    assert " at 0x" not in told, told
    return f"async {told}" if inspect.iscoroutinefunction(function) else told


def members(cls: type) -> dict[str, str]:
    """Constructor, methods and properties that Echelon gives a class."""
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "echelon"]
    found = {}
    for base in reversed(own):
        for name, value in vars(base).items():
            special = name in {"__init__", "__enter__", "__exit__", "__aenter__", "__aexit__"}
            if name.startswith("_") and not special:
                continue
            if isinstance(value, property):
                found[name] = "property" if value.fset is None else "property, may be set"
            elif isinstance(value, classmethod | staticmethod):
                found[name] = f"{type(value).__name__} {signature(value.__func__)}"
            elif inspect.isfunction(value) and value.__module__ == base.__module__:
                found[name] = signature(value)
    return dict(sorted(found.items()))


def data_fields(cls: type) -> dict[str, str]:
    """Fields of a dataclass in their order, with defaults."""
    found = {}
    for one in dataclasses.fields(cls):
        if one.default is not dataclasses.MISSING:
            found[one.name] = repr(one.default)
        elif one.default_factory is not dataclasses.MISSING:
            found[one.name] = repr(one.default_factory())
        else:
            found[one.name] = "required"
    return found


def choices(cls: type) -> dict[str, list[str]]:
    """Values that fields take where those are listed."""
    return {
        name: found
        for name, hint in sorted(typing.get_type_hints(cls).items())
        if (found := _literals(hint))
    }


def _literals(hint: Any) -> list[str]:
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [value for part in typing.get_args(hint) for value in _literals(part)]


def error_tree(module: Any) -> dict[str, Any]:
    """Classes of errors by name: bases, status, exit code, how they are made."""
    found: dict[str, Any] = {}
    for name, cls in sorted(vars(module).items()):
        if not (isinstance(cls, type) and issubclass(cls, Exception)):
            continue
        row: dict[str, Any] = {"bases": [base.__name__ for base in cls.__bases__]}
        for key in ("status", "exit_code"):
            if hasattr(cls, key):
                row[key] = getattr(cls, key)
        if "__init__" in vars(cls):
            row["made"] = signature(cls.__init__)
        found[name] = row
    return found


# The command line.


def commands(command: click.Command, path: str = "echelon") -> dict[str, Any]:
    """Every command below one, with its parameters; no help texts."""
    found: dict[str, Any] = {
        path: {
            "variables": command.context_settings.get("auto_envvar_prefix"),
            "parameters": {
                p.name or "": parameter(p) for p in sorted(command.params, key=_name_of)
            },
        }
    }
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        found |= commands(inner, f"{path} {name}")
    return found


def _name_of(told: click.Parameter) -> str:
    return told.name or ""


def parameter(told: click.Parameter) -> dict[str, Any]:
    """A parameter as it is typed; what is as usual is left out."""
    kind = told.type
    default = told.default
    if type(default).__name__ == "Sentinel" or callable(default):
        default = None
    found: dict[str, Any] = {
        "as": list(told.opts) if told.param_type_name == "option" else "argument",
        # The name of a function that reads a value is nothing that users see.
        "type": "parsed" if isinstance(kind, click.types.FuncParamType) else kind.name,
        "default": list(default) if isinstance(default, tuple) else default,
    }
    if isinstance(kind, click.Choice):
        found["choices"] = list(kind.choices)
    more = {
        "off": list(told.secondary_opts),
        "required": told.required,
        "multiple": told.multiple,
        "flag": getattr(told, "is_flag", False),
        "nargs": None if told.nargs == 1 else told.nargs,
        "variable": told.envvar,
    }
    return found | {key: value for key, value in more.items() if value}


# The server.


def service_errors(package: Any) -> dict[str, Exception]:
    """What a service may fail with, by name."""
    kinds = {name: cls for name, cls in vars(package).items() if inspect.isclass(cls)}
    words = ("documents[0]", "is wrong", "Send another")
    made = {name: kinds[name](*words) for name in ("InvalidInput", "TooLarge", "Malformed")}
    made |= {name: kinds[name]("It is full", 2.0) for name in ("Overloaded", "RateLimited")}
    plain = (
        "Unauthorised", "DeadlinePassed", "ShuttingDown", "ScoringFailed", "WorkerLost",
        "OutOfMemory", "NonFiniteScore", "NoSuchRoute", "SlowClient", "ModelError",
        "StorageError",
    )  # fmt: skip
    made |= {name: kinds[name]("It did not work. Try again.") for name in plain}
    return made | {"an unknown one": RuntimeError("oh")}


def answer(response: Any) -> dict[str, Any]:
    """Status, headers of ours, and the form of a body, with its codes."""
    ours = [name for name in response.headers if name.startswith(("x-", "retry-after"))]
    body = response.content
    found = {"status": response.status_code, "body": form(json.loads(body), CODES) if body else ""}
    return found | {"headers": " ".join(sorted(set(ours)))}


def spoken(described: Any) -> dict[str, Any]:
    """Protocols and their examples, with the first path that the description shows them on."""
    found = {}
    for path, methods in described["paths"].items():
        if "post" in methods:
            content = methods["post"]["requestBody"]["content"]["application/json"]
            for name, example in content["examples"].items():
                found.setdefault(name, (path, example["value"]))
    return dict(sorted(found.items()))


def bodies(described: Any) -> dict[str, list[str]]:
    """Fields of every body, by schema; ``!`` marks those that are required."""
    return {
        name: [f"{field}!" if field in one.get("required", ()) else field
               for field in sorted(one.get("properties", ()))]
        for name, one in sorted(described["components"]["schemas"].items())
    }  # fmt: skip


# The snapshot.


def dump(data: Any, depth: int = 0) -> str:
    """JSON to read: what fits stands on one line."""
    line = json.dumps(data, ensure_ascii=False)
    if len(line) + 2 * depth <= WIDTH and (depth > 1 or not isinstance(data, dict)):
        return line
    inner, outer = "  " * (depth + 1), "  " * depth
    if isinstance(data, dict) and data:
        rows = [
            f"{json.dumps(k, ensure_ascii=False)}: {dump(v, depth + 1)}" for k, v in data.items()
        ]
        return "{\n" + ",\n".join(inner + row for row in rows) + f"\n{outer}}}"
    if isinstance(data, list) and data:
        rows = [dump(item, depth + 1) for item in data]
        return "[\n" + ",\n".join(inner + row for row in rows) + f"\n{outer}]"
    return line


def flat(data: Any, path: str = "") -> dict[str, str]:
    """Leaves by their paths."""
    inner: dict[str, Any] = {}
    if isinstance(data, dict):
        inner = data
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        inner = {f"item {place}": item for place, item in enumerate(data)}
    if inner:
        return {
            at: leaf
            for key, value in inner.items()
            for at, leaf in flat(value, f"{path} > {key}" if path else str(key)).items()
        }
    return {path: json.dumps(data, ensure_ascii=False)}


def differences(frozen: Any, now: Any) -> list[str]:
    """What is gone (-) and what is new (+), each with its path."""
    before, after = flat(frozen), flat(now)
    lines = []
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            lines += [f"- {path}: {before[path]}"] if path in before else []
            lines += [f"+ {path}: {after[path]}"] if path in after else []
    if not lines and frozen != now:
        lines.append("! the same leaves in another form")
    return lines
