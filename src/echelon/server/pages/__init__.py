"""The playground, the dashboard and /docs: files of this folder, of plotly and of Swagger UI.

The pages need no build step and load nothing from other servers. They hold no data, so they need no
API key; they send one with their requests for data.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from html import escape
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response

from echelon.errors import NoSuchRoute
from echelon.reports import PLOTLY_JS, PLOTLY_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def page(name: str, root: str, *, keys: bool) -> Response:
    """A page; ``root`` is the prefix of our paths behind a proxy."""
    filled = _template(name).substitute(
        root=escape(root.rstrip("/")), keys="yes" if keys else "no", plotly=PLOTLY_VERSION
    )
    headers = {"Content-Security-Policy": POLICIES[name], "Cache-Control": "no-cache"}
    return HTMLResponse(filled, headers=headers)


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
    for part in headers.get("accept-encoding", "").lower().split(","):
        name, _, weight = part.partition(";")
        if name.strip() in {"gzip", "*"}:
            return weight.replace(" ", "").rstrip("0").rstrip(".") not in {"q=", "q=0"}
    return False


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
    return Template((FOLDER / name).read_text(encoding="utf-8"))
