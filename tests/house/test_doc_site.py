"""The documentation site: built once, complete, and without anything of another server."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT
from mkdocs.exceptions import PluginError

import echelon


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_of_both_languages_is_there(site):
    pages = {path.name for path in site.glob("*.html")}
    written = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert written <= pages
    assert {"index.html", "index.zh.html", "CHANGELOG.html", "API.html"} <= pages
    assert "只监听本机" in (site / "SERVING.zh.html").read_text("utf-8")


def test_the_api_is_described_by_its_docstrings(site):
    page = (site / "API.html").read_text("utf-8")
    for name in echelon.__all__:
        if not name.startswith("_"):
            kind = getattr(echelon, name)
            assert f'id="{kind.__module__}.{name}"' in page
    assert 'id="echelon.reranker.Reranker.rank"' in page
    assert ":class:" not in page


def test_links_to_files_beside_the_site_are_text(site):
    page = (site / "DEPLOY.html").read_text("utf-8")
    assert "../deploy" not in page
    assert 'href="SERVING.html#hosts-and-origins"' in page
    assert 'id="hosts-and-origins"' in (site / "SERVING.html").read_text("utf-8")


FOREIGN = (
    '<script src="https://example.org/a.js"></script>',
    "<link rel=stylesheet href=//example.org/a.css>",
    '<img alt="" src="http://example.org/a.png">',
    "<style>body { background: url(https://example.org/a.png) }</style>",
    '<style>@import "https://example.org/a.css";</style>',
)


@pytest.mark.parametrize("content", FOREIGN)
def test_a_page_that_loads_from_another_server_fails_the_build(tmp_path, content):
    spec = importlib.util.spec_from_file_location("doc_site", ROOT / "scripts/doc_site.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = tmp_path / "sub/page.html"
    page.parent.mkdir()
    page.write_text('<a href="https://example.org">a link</a>', encoding="utf-8")
    hooks.on_post_build(SimpleNamespace(site_dir=tmp_path))
    page.write_text(content, encoding="utf-8")
    with pytest.raises(PluginError, match="another server"):
        hooks.on_post_build(SimpleNamespace(site_dir=tmp_path))
