"""API keys: who may ask. Keys are kept as digests and compared in constant time."""

from __future__ import annotations

import hmac
import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from echelon.errors import InvalidInput, Unauthorised

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

VARIABLE = "ECHELON_API_KEYS"
"""Environment variable with keys, separated by commas."""

HEADERS = ("authorization", "x-api-key", "api-key")
"""Where clients put their key. In ``Authorization`` it stands after ``Bearer``, or alone, as the
TEI client of LlamaIndex sends it."""


class Keys:
    """The keys that are let in; without any, everyone is.

    Args:
        keys: texts.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple({_digest(key) for key in keys})

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, headers: Mapping[str, str]) -> None:
        """Let a request pass.

        Every key is compared, so that the time says nothing about which is near.

        Raises:
            Unauthorised: no key, or a wrong one.
        """
        if not self._digests:
            return
        given = next((headers[name] for name in HEADERS if name in headers), None)
        if given is None:
            raise Unauthorised("An API key is needed. Send it as 'Authorization: Bearer KEY'.")
        scheme, _, rest = given.strip().partition(" ")
        digest = _digest(rest.strip() if scheme.lower() == "bearer" else given.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise Unauthorised("The API key is not known here. Send another.")


def read_keys(path: str | os.PathLike[str] | None) -> Keys:
    """Keys out of a file, one a line (``#`` begins a comment), and out of the environment.

    Raises:
        InvalidInput: the file cannot be read or holds none.
    """
    keys = [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
    if path is None:
        return Keys(keys)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("--api-keys", f"cannot be read ({error})", "Give a text file.") from None
    found = [line.partition("#")[0].strip() for line in lines]
    found = [key for key in found if key]
    if not found:
        raise InvalidInput("--api-keys", f"{path} holds no key", "Write one key a line.")
    return Keys([*keys, *found])


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
