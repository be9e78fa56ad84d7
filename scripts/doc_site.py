"""Hooks of the documentation site (mkdocs.yml): pages that are not in docs/, links, and a check.

The site has the README as its start, the other pages of the root, and the Python API from its
docstrings. Links to files that are not on the site become text. A page that loads something from
another server fails the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import echelon

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "README.md": "index.md",
    "README.zh.md": "index.zh.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")},
}
"""Pages in the root of the repository, and their names on the site."""

LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":[a-z]+:(?=<code>)")
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
    r"|url\([\"']?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*",
    re.IGNORECASE,
)
"""What makes a browser load something from another server."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, name in ROOT_PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=content))
    files.append(File.generated(config, "API.md", content=_api()))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: object) -> str:
    """Turn links of the repository into links of the site, or into text."""
    sources = {name: source for source, name in ROOT_PAGES.items()}
    name = page.file.src_uri
    folder = (ROOT / sources.get(name, f"docs/{name}")).parent

    def linked(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        path = os.path.relpath(os.path.normpath(folder / target), ROOT)
        uri = ROOT_PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return text
        return f"{image}[{text}]({os.path.relpath(uri, Path(name).parent)}{anchor or ''})"

    return LINK.sub(linked, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Leave out the roles of docstrings (``:class:``), which the site does not read."""
    return ROLE.sub("", html)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail where a page or a style loads something from another server."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in {".html", ".css"}:
            found = LOADED.search(path.read_text(encoding="utf-8"))
            if found is not None:
                raise PluginError(f"{path} loads from another server: {found.group()[:200]}")


def _api() -> str:
    """The page of the public names, which mkdocstrings fills from their docstrings."""
    public = [getattr(echelon, name) for name in echelon.__all__ if not name.startswith("_")]
    # What is used first comes first, errors come last.
    public.sort(key=lambda kind: (issubclass(kind, Exception), kind is not echelon.Reranker))
    lines = [f"::: {kind.__module__}.{kind.__name__}" for kind in public]
    return "# Python API\n\n" + "\n\n".join(lines) + "\n"
