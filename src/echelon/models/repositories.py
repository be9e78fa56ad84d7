"""What places of models share: the files that a reranker needs, and errors without secrets."""

from __future__ import annotations

import errno
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_CONFIG = "config.json"
_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",  # sentencepiece under its many names: tokenizer.model, spm.model, bpe.model
)
_USAGE = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_MODULES = ("[0-9]*_*/config.json", "[0-9]*_*/model.safetensors")
"""Folders of the modules that ``modules.json`` names, such as a head."""
_WEIGHTS = (  # best first; within a kind one file beats shards
    ("model.safetensors",),
    ("model-[0-9]*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin",),
    ("pytorch_model-[0-9]*-of-*.bin", "pytorch_model.bin.index.json"),
)
_SHARD = re.compile(r"-\d+-of-0*(\d+)\.")
SECRETS = re.compile(r"(?<=//)[^/@\s]+(?=@)|hf_\w+")
"""A password in an address, and a token."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def choose(files: Iterable[str]) -> list[str]:
    """Choose the files that a reranker needs, with weights of one format; empty without weights."""
    names = sorted(files)
    for kind in _WEIGHTS:
        if weights := _matching(names, kind):
            return [*described(names), *weights]
    return []


def described(names: list[str]) -> list[str]:
    """The files that say what a model is, and those of its modules."""
    return _matching(names, (_CONFIG, *_TOKENIZER, *_USAGE)) + _matching(names, _MODULES, depth=1)


def _matching(names: list[str], patterns: Iterable[str], depth: int = 0) -> list[str]:
    # A pattern's * crosses folders; files in a folder are another format of the same model.
    return [n for n in names if n.count("/") == depth and any(fnmatchcase(n, p) for p in patterns)]


def complete(names: list[str]) -> bool:
    """Whether files are a model's: its config, a tokenizer and all of its weights."""
    chosen = choose(names)
    if _CONFIG not in chosen or not _matching(chosen, _TOKENIZER):
        return False
    totals = [int(match[1]) for name in chosen if (match := _SHARD.search(name))]
    return all(total == len(totals) for total in totals)


def of_disk(error: Exception) -> bool:
    """Whether the disk is full, or may not be written."""
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def redacted(error: Exception) -> str:
    """An error's kind and first line, without passwords and tokens."""
    first_line = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {SECRETS.sub('***', first_line)}"
