"""Look at every page of the built documentation in Chromium, at the width of a desktop and of a phone.

    make docs
    python scripts/docs_screenshots.py --all /tmp/pages

Takes the pictures of docs/images; with --all one of each page, into that folder. Fails if a page asks for anything from
another address, logs an error, or is wider than the window.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

from screenshots import Browser, Shot, browser, check_requests, wait_for

SIZES = ((1280, 800, 1.0), (390, 844, 1.0))
PICTURES = {"architecture.html": (1280, "site-architecture"), "guide/own_documents.html": (390, "site-phone")}
"""Pages whose picture is committed: the width of the window, and the name of the file."""


def take(page: Browser, url: str, path: str, shot: Shot) -> bytes:
    """Open a page and return its picture.

    Raises:
        RuntimeError: if the page is wider than the window.
    """
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=shot.width, height=shot.height, deviceScaleFactor=shot.scale, mobile=shot.width < 600,
    )  # fmt: skip
    page.call("Page.navigate", url=url + path)
    wait_for(page, f"document.readyState === 'complete' && location.href.endsWith('{path}')", 20)
    width = page.evaluate("document.documentElement.scrollWidth")
    if width > shot.width:
        raise RuntimeError(f"{path} is {width} pixels wide in a window of {shot.width}")
    check_requests(page, url)
    return base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])


def main() -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path("site"))
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="take a picture of every page into this folder")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    if options.chromium is None:
        parser.error("there is no Chromium; install it or name it with --chromium")
    pages = sorted(path.relative_to(options.site).as_posix() for path in options.site.rglob("*.html"))
    if "index.html" not in pages:
        parser.error(f"there is no site in {options.site}; make it with `make docs`")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(options.site))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        with browser(options.chromium, "en") as page:
            for domain in ("Network", "Log", "Runtime", "Page"):
                page.call(f"{domain}.enable")
            for path in pages if options.all else PICTURES:
                for width, height, scale in SIZES:
                    shot = Shot(path, width, height, scale, "en", "light", ())
                    picture = take(page, url, path, shot)
                    if options.all:
                        options.all.mkdir(parents=True, exist_ok=True)
                        name = path.removesuffix(".html").replace("/", "-")
                        (options.all / f"{name}-{width}.png").write_bytes(picture)
                    if PICTURES.get(path, (0, ""))[0] == width:
                        (options.folder / f"{PICTURES[path][1]}.png").write_bytes(picture)
        server.shutdown()
    sys.stdout.write(f"{len(pages) if options.all else len(PICTURES)} pages looked at\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
