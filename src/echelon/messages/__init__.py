"""Messages in English and Chinese, from gettext catalogues.

A stored message has an id (``sweep.noisy_points``) and values; both catalogues hold its text. A
sentence that only pages show is its own id, as is usual with gettext, so only ``zh.po`` holds it.
"""

from __future__ import annotations

import ast
import gettext
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from gettext import _TranslationsReader

LANGUAGES = {"en": "en", "zh": "zh-CN"}
"""Each language, and its tag in a page's ``lang`` attribute."""

_language: ContextVar[str | None] = ContextVar("language", default=None)


class PoTranslations(gettext.NullTranslations):
    """Translations read from a ``.po`` file; gettext itself reads compiled files only."""

    texts: dict[str, str]

    def _parse(self, fp: _TranslationsReader) -> None:  # the constructor's hook for other formats
        self.texts = read_po(fp.read().decode("utf-8"))

    def gettext(self, message: str) -> str:
        """The translation, or the message itself where there is none."""
        return self.texts.get(message, message)


def read_po(content: str) -> dict[str, str]:
    """Read a catalogue of ``msgid`` and ``msgstr``; a ValueError names any other line."""
    texts: dict[str, str] = {}
    msgid, field = "", ""
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        keyword, _, rest = line.partition(" ")
        if keyword in {"msgid", "msgstr"}:
            field, quoted = keyword, rest
        elif line.startswith('"') and field:
            quoted = line
        else:
            raise ValueError(f"line {number} of a message catalogue: {line!r}")
        text = ast.literal_eval(quoted)
        if keyword == "msgid":
            msgid = text
        elif field == "msgid":
            msgid += text
        else:
            texts[msgid] = texts.get(msgid, "") + text
    return texts


@cache
def catalogue(language: str) -> PoTranslations:
    """The translations into a language, read once."""
    with (files(__name__) / f"{language}.po").open("rb") as file:
        return PoTranslations(file)


class Message(str):
    """A message that a profile stores by id and values; as a string, it is its English text.

    It can be printed, logged, raised and written as JSON. A value may be another message.
    """

    __slots__ = ("id", "values")

    id: str
    values: Mapping[str, Any]

    def __new__(cls, id: str, values: Mapping[str, Any] | None = None) -> Self:  # noqa: A002  # the field of a catalogue
        """Look up the English text and fill it in."""
        values = dict(values or {})
        found = super().__new__(cls, _filled(catalogue("en"), id, values))
        found.id, found.values = id, values
        return found

    def __reduce__(self) -> tuple[type[Message], tuple[str, Mapping[str, Any]]]:
        return type(self), (self.id, self.values)


def _filled(texts: PoTranslations, message: str, values: Mapping[str, Any]) -> str:
    """The text of a message; where the catalogue lacks it, its id and values."""
    try:
        return texts.texts[message].format(**values)
    except LookupError:  # written by another version of Echelon
        return " ".join([message, *(f"{name}={value}" for name, value in values.items())])


def stored(content: Any) -> Any:
    """Content for a file: each message in it as ``id`` and ``values``."""
    if isinstance(content, Message):
        return {"id": content.id, "values": stored(content.values)}
    if isinstance(content, Mapping):
        return {name: stored(value) for name, value in content.items()}
    return [stored(item) for item in content] if isinstance(content, list | tuple) else content


def restored(content: Any) -> Any:
    """The content of a file, with its messages; plain sentences of older files stay as they are."""
    if isinstance(content, dict):
        found = {name: restored(value) for name, value in content.items()}
        if found.keys() == {"id", "values"} and isinstance(found["values"], dict):
            return Message(str(found["id"]), found["values"])
        return found
    return [restored(item) for item in content] if isinstance(content, list) else content


# The language of pages and of the command line.


def use_language(language: str) -> None:
    """Make :func:`tr` and :func:`translated` use a language from now on."""
    _language.set(language)


@contextmanager
def in_language(language: str | None) -> Iterator[None]:
    """Make :func:`tr` and :func:`translated` use a language for a while; None leaves it.

    Raises:
        InvalidInput: there is no such language.
    """
    language = language or _language.get()
    if language is not None and language not in LANGUAGES:
        reason = f"{language!r} is not a language of pages"
        raise InvalidInput("--lang", reason, f"Give {' or '.join(LANGUAGES)}.")
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def asked_language() -> str | None:
    """The language that somebody asked for; None where English is only the default."""
    return _language.get()


def tag() -> str:
    """The language's tag, for the page's ``lang`` attribute."""
    return LANGUAGES[_language.get() or "en"]


def _translations() -> PoTranslations:
    return catalogue(_language.get() or "en")


def tr(message: str, /, **values: object) -> str:
    """A sentence of a page, or a message id, in the page's language; ``values`` are text."""
    text = _translations().gettext(message)
    return text.format(**values) if values else text


def N_(message: str) -> str:  # noqa: N802 - gettext's own name
    """Mark a sentence for translation; :func:`tr` translates it where it is shown."""
    return message


def translated(text: object) -> str:
    """A message in the page's language; anything else as it is."""
    if not isinstance(text, Message):
        return str(text)
    values = {name: translated(value) for name, value in text.values.items()}
    return _filled(_translations(), text.id, values)


def listed(parts: Iterable[str]) -> str:
    """Parts of a sentence joined by the language's comma."""
    return tr(", ").join(parts)
