"""A template and its content as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from echelon.tune.lang import tag, tr

if TYPE_CHECKING:
    from collections.abc import Mapping


def fill(package: str, name: str, content: Mapping[str, Any]) -> str:
    """The page as HTML, in the language that is spoken.

    Args:
        package: where the template lies.
        name: its file; it may extend ``report.html.j2`` of this package.
        content: what it shows; ``plotly_js``, ``tr`` and ``lang`` are added.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda base: _read("echelon.tuning", base)),
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
