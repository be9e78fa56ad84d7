"""What sentence-transformers saves beside a model of how its texts are read. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from echelon.errors import BadCheckpoint
from echelon.files import (
    MAX_ID,
    SWITCH,
    TEXT,
    Field,
    check_fields,
    list_of,
    read_json,
    read_object,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PROMPTS = Field(
    "an object of texts",
    lambda value: (
        isinstance(value, dict)
        and all(text is None or isinstance(text, str) for text in value.values())
    ),
)
_MODEL = {"prompts": _PROMPTS, "default_prompt_name": TEXT, "activation_fn": TEXT}
_TRANSFORMER = {"do_lower_case": SWITCH, "max_seq_length": whole(1, MAX_ID)}


@dataclass(frozen=True, slots=True)
class TextSettings:
    """Settings of ``config_sentence_transformers.json`` and ``sentence_bert_config.json``."""

    prompts: dict[str, str] = field(default_factory=dict)  # name → text put before queries
    default_prompt_name: str | None = None
    activation: str | None = None  # dotted path of the function that makes scores of logits
    lower_case: bool = False  # texts are read in lower case
    max_tokens: int | None = None  # of a pair; None leaves it to the tokenizer

    @property
    def default_prompt(self) -> str | None:
        """The prompt that is used when none is named; None where there is none."""
        return self.prompts.get(self.default_prompt_name or "")


def read_text_settings(folder: Path) -> TextSettings:
    """Read a folder's settings; those without ``modules.json`` have none, as in the original.

    Raises:
        BadCheckpoint: a file is damaged, or the default prompt is none of the prompts.
    """
    path = folder / "modules.json"
    try:
        modules = {"modules": read_json(path) if path.is_file() else []}
        check_fields(modules, {"modules": list_of(dict, "objects")})
        if not modules["modules"]:
            return TextSettings()
        path = folder / "sentence_bert_config.json"
        transformer = _optional(path, _TRANSFORMER)
        path = folder / "config_sentence_transformers.json"
        model = _optional(path, _MODEL)
        prompts = {name: text or "" for name, text in (model.get("prompts") or {}).items()}
        name = model.get("default_prompt_name")
        if name is not None and name not in prompts:
            raise ValueError(f"default_prompt_name: {name!r} is none of its prompts")  # noqa: TRY301 - the handler names the file
    except (ValueError, OSError) as error:
        raise BadCheckpoint(f"{path}: {error}. Download the model again.") from error
    return TextSettings(
        prompts,
        name,
        model.get("activation_fn"),
        bool(transformer.get("do_lower_case")),
        transformer.get("max_seq_length"),
    )


def _optional(path: Path, fields: Mapping[str, Field]) -> dict[str, Any]:
    return read_object(path, fields) if path.is_file() else {}
