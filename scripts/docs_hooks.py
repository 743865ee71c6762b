"""Hooks of MkDocs: add the pages that are made from the code, insert excerpts of it, and check links to its files."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from docs_site import command_pages, environment, excerpts, file_formats, notebooks, op_files, settings_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

GENERATED: dict[str, Callable[[], str]] = {
    "reference/commands.md": command_pages.make_page,
    "reference/settings.md": settings_page.make_page,
    "reference/environment.md": environment.make_page,
    "reference/formats.md": file_formats.make_page,
    "reference/ops.md": op_files.make_page,
}

_OUTSIDE = re.compile(r"\[([^]]*)\]\((\.\./[^)#:]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and a page in place of each notebook."""
    for path, make in GENERATED.items():
        files.append(File.generated(config, path, content=make()))
    for file in list(files):
        if file.src_uri.endswith(".ipynb") and file.abs_src_path is not None:
            files.remove(file)
            content = notebooks.make_page(Path(file.abs_src_path))
            files.append(File.generated(config, file.src_uri.removesuffix(".ipynb") + ".md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert the excerpts that a page names, and show links to files outside of the site as their names."""
    try:
        markdown = excerpts.insert(markdown)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error

    def name_file(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), found[2]))
        if target.startswith("docs/"):
            return found[0]
        if not (ROOT / target).exists():
            raise PluginError(f"{page.file.src_uri}: there is no file {target}")
        return f"{found[1]} (`{target}`)" if found[1].strip("`") != target else f"`{target}`"

    return _OUTSIDE.sub(name_file, markdown)
