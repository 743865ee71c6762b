"""The documentation site: it builds without a warning, and its links lead somewhere and not to other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical":
            self.loaded.append(values.get("href", ""))
        elif "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(mkdocs: None, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The built pages. Every connection is refused while they are built."""
    folder = tmp_path_factory.mktemp("site")
    offline = "import socket, runpy\ndef refuse(*_): raise OSError('no network')\nsocket.socket.connect = refuse\n"
    start = offline + "runpy.run_module('mkdocs', run_name='__main__', alter_sys=True)"
    arguments = ["build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return {path: Page(path) for path in folder.rglob("*.html")}


def test_every_page_of_the_navigation_is_built(site: dict[Path, Page]) -> None:
    text = re.sub(r"!!python/name:\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entries: object) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        return [page for one in (entries.values() if isinstance(entries, dict) else entries) for page in pages(one)]

    [folder] = {path.parent for path in site if path.name == "404.html"}
    wanted = pages(yaml.safe_load(text)["nav"])
    assert len(wanted) > 20
    assert not [page for page in wanted if folder / page.replace(".md", ".html") not in site]


def test_links_lead_to_pages_and_anchors_that_are_there(site: dict[Path, Page]) -> None:
    broken = []
    count = 0
    for path, page in site.items():
        if path.name == "404.html":  # its links are those of the root of a host
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            count += 1
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in site[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert count > 1000
    assert not [link for link in broken if not link.endswith(": #__skip")]


def test_pages_load_nothing_from_other_hosts(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        assert page.loaded
        assert not [url for url in page.loaded if urlsplit(url).scheme not in ("", "data") or url.startswith("//")], (
            path
        )


def test_no_role_and_no_directive_is_left_in_a_page(site: dict[Path, Page]) -> None:
    for path in site:
        text = re.sub(r"<(pre|code).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r":(func|class|mod|meth):|\{\{|^::: ", text, re.MULTILINE), path
