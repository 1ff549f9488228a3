"""What mkdocs does beside its configuration: CONTRIBUTING.md is a page, and the built site fetches nothing."""

from __future__ import annotations

import pathlib
import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
# Files outside docs/ that pages link to, as they must on a git host -> their page here.
PAGES = {"CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
# Whatever a browser loads by itself; a link that a reader clicks is not that.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:url\(|@import\s)["']?((?:https?:)?//[^"'\s)]+)"""
)


def on_files(files, config):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    files.append(File.generated(config, PAGES["CONTRIBUTING.md"], content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    for source, target in PAGES.items():
        markdown = re.sub(rf"\]\(((?:\.\./)*)\.\./{source}\b", rf"](\1{target}", markdown)
    return markdown


def on_post_build(config):
    site = pathlib.Path(config.site_dir)
    for file in sorted(site.rglob("*")):
        if file.suffix in (".html", ".css"):
            for match in _FETCHED.finditer(file.read_text(encoding="utf-8")):
                address = next(filter(None, match.groups()))
                raise PluginError(f"{file.relative_to(site)} fetches {address}")
