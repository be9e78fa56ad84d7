"""The language of pages: sentences are written in English, and looked up in one file of others.

- :func:`tr` says a sentence now, :func:`mark` one that is said later by ``tr``.
- A profile is English whoever reads it: :func:`kept` writes its sentences, and :func:`told` says
  them on a page, by finding which sentence it was and with which values.
- A sentence without a translation stays English.

Values have names, so that a translation may put them in another order.

A template and its content as one HTML page that needs nothing else, not even a network.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import TYPE_CHECKING, Any

from echelon.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

LANGUAGES = {"en": "en", "zh": "zh-CN"}
"""Each language, and the tag that tells browsers which one a page is in."""


@dataclass(frozen=True, slots=True)
class MessageCatalogue:
    """Translations into one language.

    Attributes:
        tag: of the language.
        said: sentences of pages, by their English.
        kept: sentences of profiles: what matches one, and its translation; the longest first.
    """

    tag: str = "en"
    said: dict[str, str] = field(default_factory=dict)
    kept: tuple[tuple[re.Pattern[str], str], ...] = ()


_spoken: ContextVar[MessageCatalogue] = ContextVar("spoken", default=MessageCatalogue())  # noqa: B039 - frozen


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """Say sentences in a language for as long as the context is open.

    Raises:
        InvalidInput: there is no such language.
    """
    if language not in LANGUAGES:
        raise InvalidInput(
            "--lang", f"{language!r} is no language of pages", f"Give {' or '.join(LANGUAGES)}."
        )
    token = _spoken.set(MessageCatalogue() if language == "en" else _catalogue(language))
    try:
        yield
    finally:
        _spoken.reset(token)


@cache
def _catalogue(language: str) -> MessageCatalogue:
    text = (files("echelon.reports") / f"messages/{language}.json").read_text(encoding="utf-8")
    content = json.loads(text)
    longest_first = sorted(content["kept"].items(), key=lambda item: -len(item[0]))
    kept = tuple((_pattern(english), translation) for english, translation in longest_first)
    return MessageCatalogue(LANGUAGES[language], content["said"], kept)


def _pattern(sentence: str) -> re.Pattern[str]:
    """What matches a sentence whose placeholders were filled."""
    parts: list[str] = []
    seen: set[str] = set()
    for literal, name, _, _ in Formatter().parse(sentence):
        parts.append(re.escape(literal))
        if name is not None:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>.*)")
            seen.add(name)
    return re.compile("".join(parts), re.DOTALL)


def tag() -> str:
    """The language's tag, for the page's ``lang``."""
    return _spoken.get().tag


def tr(sentence: str, /, **values: object) -> str:
    """Say a sentence.

    Args:
        sentence: in English, values as ``{name}``.
        values: what to put there, in words.
    """
    said = _spoken.get().said.get(sentence, sentence)
    return said.format(**values) if values else said


def mark(sentence: str) -> str:
    """The sentence itself: it is said by :func:`tr` where it is used."""
    return sentence


def listed(parts: Iterable[str]) -> str:
    """Words in a row."""
    return tr(", ").join(parts)


def kept(sentence: str, /, **values: object) -> str:
    """A sentence for the profile, in English; arguments as of :func:`tr`."""
    return sentence.format(**values) if values else sentence


def told(sentence: str) -> str:
    """What :func:`kept` wrote, or a page's own word in it, in the page's language.

    What neither is stays as it is.
    """
    spoken = _spoken.get()
    for pattern, translation in spoken.kept:
        match = pattern.fullmatch(sentence)
        if match is not None:
            values = {name: told(value) for name, value in match.groupdict().items()}
            return translation.format(**values)
    return spoken.said.get(sentence, sentence)


def fill(package: str, name: str, content: Mapping[str, Any]) -> str:
    """The page as HTML, in the language that is spoken.

    Args:
        package: where the template lies.
        name: its file; it may extend ``report.html.j2`` of this package.
        content: what it shows; ``plotly_js``, ``tr`` and ``lang`` are added.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda base: _read("echelon.reports", base)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(tr=tr, lang=tag())
    template = environment.from_string(_read(package, name))
    page = template.render(content, plotly_js=_plotly_js())
    # File names and servers' words may hold lone surrogates, which no file can hold.
    return page.encode("utf-8", "replace").decode("utf-8")


def _read(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
