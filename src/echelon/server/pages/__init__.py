"""The playground, the dashboard and /docs: files of this folder, of plotly and of Swagger UI.

The pages need no build step and load nothing from other servers. They hold no data, so they need no
API key; they send one with their requests for data. Their language is that of ``--lang``, else the
browser's; a page in Chinese takes the sentences of its scripts along.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jinja2 import Environment, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response

from echelon.engine.events import Outcome, WorkerState
from echelon.errors import NoSuchRoute
from echelon.messages import LANGUAGES, in_language, tag, tr
from echelon.reports import PLOTLY_JS, PLOTLY_VERSION
from echelon.scheduling import admission
from echelon.scheduling.oom_policy import Rung
from echelon.server import refusals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2 import Template
    from starlette.requests import Request

FOLDER = Path(__file__).parent
FOLDERS = ("/pages", "/docs/assets")
"""Paths under which files are served."""

KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = frozenset(path.name for path in FOLDER.iterdir() if path.suffix in KINDS)
"""Files of this folder that are served as they are."""

PLOTLY = "plotly.js"
SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
"""The files of Swagger UI that /docs needs. Its own page is not served: it loads a foreign file."""

TRANSLATED = re.compile(r'\btr\(\s*("[^"]+")|\bplural\(\s*("[^"]+"),\s*("[^"]+")')
"""Calls in our scripts that translate, and the literals in them."""

NAMES = tuple(
    name
    for names in (admission.Reason, refusals.Reason, Outcome, WorkerState, Rung)
    for name in get_args(names)
)
"""Names in the dashboard's data that its script shows as words."""

MIN_GZIP_BYTES = 1024
"""Smaller files are not compressed."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src {style}; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
POLICIES = {
    "playground.html": _POLICY.format(style="'self'"),
    # plotly.js and Swagger UI draw with style attributes; these cannot run scripts.
    "dashboard.html": _POLICY.format(style="'self' 'unsafe-inline'"),
    "docs.html": _POLICY.format(style="'self' 'unsafe-inline'"),
}
"""Content security policy of each page: it may only load from this server."""


@dataclass(frozen=True, slots=True)
class PageContent:
    """A file as it is sent, with its ETag."""

    content: bytes
    tag: str
    gzipped: bool


def page(name: str, request: Request, language: str | None, *, keys: bool) -> Response:
    """A page in the language of :func:`language_of`, behind the prefix of a proxy."""
    with in_language(language_of(request.headers, language)):
        filled = _template(name).render(
            root=request.scope.get("root_path", "").rstrip("/"),
            keys="yes" if keys else "no",
            plotly=PLOTLY_VERSION,
            lang=tag(),
            tr=tr,
            texts=_texts_of_scripts(tag()),
        )
    headers = {
        "Content-Security-Policy": POLICIES[name],
        "Cache-Control": "no-cache",
        "Vary": "Accept-Language",
    }
    return HTMLResponse(filled, headers=headers)


def language_of(headers: Mapping[str, str], asked: str | None) -> str:
    """The language that was asked for, else the one of ours that a browser likes best."""
    weights = weights_of(headers.get("accept-language", ""))
    liked = sorted((name for name in weights if weights[name] > 0), key=lambda n: -weights[n])
    known = (name.partition("-")[0] for name in liked)
    return asked or next((name for name in known if name in LANGUAGES), "en")


@cache
def sentences() -> frozenset[str]:
    """What scripts show: literals that they translate, and the words for names in their data."""
    scripts = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js")]
    written = [text for script in scripts for call in TRANSLATED.findall(script) for text in call]
    names = [name.replace("_", " ") for name in NAMES]
    return frozenset([*map(ast.literal_eval, filter(None, written)), *names])


@cache
def _texts_of_scripts(_: str) -> str:
    """The scripts' sentences in the current language, as JSON; nothing where none differs."""
    found = {sentence: tr(sentence) for sentence in sorted(sentences())}
    changed = {sentence: text for sentence, text in found.items() if text != sentence}
    return json.dumps(changed, ensure_ascii=False) if changed else ""


async def file(request: Request) -> Response:
    """The route of a file, which is compressed at its first request."""
    name = request.path_params["name"]
    if name not in FILES and name != PLOTLY and name not in SWAGGER:
        raise NoSuchRoute(f"There is no {request.method} {request.scope['path']}. See /docs.")
    gzipped = takes_gzip(request.headers)
    body = _CONTENTS.get((name, gzipped))
    if body is None:
        body = await run_in_threadpool(_read, name, gzipped=gzipped)
        _CONTENTS[name, gzipped] = body
    headers = {
        "ETag": body.tag,
        "Vary": "Accept-Encoding",
        # The address of plotly.js holds its version; the other files change with ours.
        "Cache-Control": "public, max-age=31536000, immutable" if name == PLOTLY else "no-cache",
    }
    if body.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if body.gzipped:
        headers["Content-Encoding"] = "gzip"
    kind = KINDS[Path(name).suffix]
    return Response(body.content, headers={**headers, "Content-Type": f"{kind}; charset=utf-8"})


_CONTENTS: dict[tuple[str, bool], PageContent] = {}
"""Files that were read, by name and whether they are compressed."""


def _read(name: str, *, gzipped: bool) -> PageContent:
    """Read a file, and compress it if it is to be."""
    source = _source(name)
    content = source.read_bytes()
    if source.suffix == ".gz":
        content = gzip.decompress(content)
    gzipped = gzipped and len(content) >= MIN_GZIP_BYTES
    if gzipped:
        content = gzip.compress(content, mtime=0)
    return PageContent(content, f'"{sha256(content).hexdigest()[:20]}"', gzipped)


def takes_gzip(headers: Mapping[str, str]) -> bool:
    """Whether a client accepts gzip."""
    weights = weights_of(headers.get("accept-encoding", ""))
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def weights_of(header: str) -> dict[str, float]:
    """The choices of an ``Accept-…`` header and their weights; one that is no number is 1."""
    found = {}
    for part in header.lower().split(","):
        name, _, weight = part.partition(";")
        try:
            found[name.strip()] = float(weight.replace(" ", "").removeprefix("q=") or 1)
        except ValueError:
            found[name.strip()] = 1.0
    return found


def _source(name: str) -> Path:
    if name == PLOTLY:
        return PLOTLY_JS
    if name in SWAGGER:
        return next(_swagger_ui().glob(f"vendor/*/{name}"))
    return FOLDER / name


def _swagger_ui() -> Path:
    """The folder of the package with Swagger UI, found without importing it."""
    spec = find_spec("swagger_ui_bundle")
    if spec is None or not spec.submodule_search_locations:
        raise NoSuchRoute("swagger-ui-bundle is not installed. Install it.")
    return Path(spec.submodule_search_locations[0])


@cache
def _template(name: str) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string((FOLDER / f"{name}.j2").read_text(encoding="utf-8"))
