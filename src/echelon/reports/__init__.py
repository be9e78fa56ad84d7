"""Reports of profiles, alone or two side by side, as HTML pages that need no network."""

from __future__ import annotations

import gzip
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.messages import tag, tr

if TYPE_CHECKING:
    from collections.abc import Mapping


PLOTLY_JS = Path(__file__).parent / "plotly-basic.min.js.gz"
"""plotly.js with scatter and bar charts only, compressed (``gzip -9 -n``): the file of
the npm package ``plotly.js-basic-dist-min``. Its licence is beside it."""

PLOTLY_VERSION = "4.1.1"


def fill(package: str, name: str, content: Mapping[str, Any]) -> str:
    """Render the template ``name`` of a package as a page in the current language.

    It may extend a template of this package; ``plotly_js``, ``tr`` and ``lang`` are added.
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
    page = _TYPED.sub(_marked, template.render(content, plotly_js=_plotly_js()))
    page = page.replace("。 ", "。")  # where sentences are joined
    # File names and servers' messages may hold lone surrogates, which UTF-8 cannot hold.
    return page.encode("utf-8", "replace").decode("utf-8")


_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_TYPED = re.compile(
    rf"<(script|style|title)\b.*?</\1>|<[^>]*>|`(?P<code>[^`<>]+)`|(?P<flag>{_FLAG.pattern})",
    re.DOTALL,
)
"""Commands and flags in a page's text; what has no text that is shown is passed over."""


def _marked(found: re.Match[str]) -> str:
    """A command as code, and each flag in a span: browsers break lines after hyphens."""
    if found["code"]:
        return f"<code>{_FLAG.sub(_unbroken, found['code'])}</code>"
    return _unbroken(found) if found["flag"] else found[0]


def _unbroken(flag: re.Match[str]) -> str:
    return f'<span class="flag">{flag[0]}</span>'


def _read(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")


def _plotly_js() -> str:
    return gzip.decompress(PLOTLY_JS.read_bytes()).decode("utf-8")
