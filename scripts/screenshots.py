"""Talk with the chat page of a running server in Chromium and take the pictures of the documentation.

    mm-rec serve --model checkpoints_cpu/chat &
    python scripts/screenshots.py --url http://127.0.0.1:8000/

Chromium is driven over its debugging pipe, so nothing but Chromium has to be installed. Fails if the page asks for
anything from another address, logs an error, or an answer doesn't come.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 300


@dataclass(frozen=True)
class Shot:
    """One picture: its size in CSS pixels, how many device pixels each has, and who looks at it."""

    name: str
    width: int
    height: int
    scale: float
    language: str
    scheme: str
    questions: tuple[str, ...]


SHOTS = (
    Shot(
        "chat-desktop",
        1280,
        800,
        1,
        "en",
        "light",
        ("Find me a good place to eat in Berlin.", "Something cheap, please."),
    ),
    Shot("chat-phone", 390, 844, 1.5, "tr", "dark", ("I want to book a room in a hotel.", "For two nights, please.")),
)


class Browser:
    """A headless Chromium; :meth:`call` runs a command of its DevTools protocol on the one page."""

    def __init__(self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int) -> None:
        self._process = process
        self._to, self._from = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command and return its result; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self.events.append(answer)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 20)
            if not part:
                raise RuntimeError("Chromium ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextlib.contextmanager
def browser(program: str, language: str) -> Iterator[Browser]:
    """A Chromium of its own, gone at the end."""
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
        command = [program, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}", f"--lang={language}"]
        wiring = f'exec "$@" 3<&{their_input} 4>&{their_output}'
        process = subprocess.Popen(
            ["bash", "-c", wiring, "chromium", *command],
            pass_fds=(their_input, their_output),
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        try:
            yield Browser(process, our_output, our_input)
        finally:
            process.terminate()
            process.wait(20)
            os.close(our_output)
            os.close(our_input)


def take(program: str, url: str, shot: Shot, folder: Path) -> Path:
    """Open the page, say what is to be said, wait for the answers, take the picture."""
    with browser(program, shot.language) as page:
        agent = page.evaluate("navigator.userAgent")
        page.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=shot.language)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": shot.scheme}])
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=shot.width, height=shot.height, deviceScaleFactor=shot.scale, mobile=shot.width < 600,
        )  # fmt: skip
        for domain in ("Network", "Log", "Runtime", "Page"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        wait_for(page, "document.readyState === 'complete' && typeof running !== 'undefined' && model !== null", 20)
        for question in shot.questions:
            page.evaluate("document.getElementById('input').focus()")
            page.call("Input.insertText", text=question)
            for kind in ("keyDown", "keyUp"):
                page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
            wait_for(page, "running === null", ANSWER_SECONDS)
        assert page.evaluate("document.querySelectorAll('.trouble').length") == 0, page.evaluate(
            "document.body.innerText"
        )
        assert page.evaluate("turns.length") == len(shot.questions)
        check_requests(page, url)
        picture = base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])
    path = folder / f"{shot.name}.png"
    path.write_bytes(picture)
    return path


def wait_for(page: Browser, condition: str, seconds: float) -> None:
    """Wait until a JavaScript expression is true in the page; RuntimeError after so many seconds."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        if time.monotonic() > end:
            raise RuntimeError(f"this did not come true in {seconds} s: {condition}")
        time.sleep(0.1)


def check_requests(page: Browser, url: str) -> None:
    """Nothing was asked from elsewhere, and nothing went wrong."""
    for event in page.events:
        if event["method"] == "Network.requestWillBeSent":
            asked = event["params"]["request"]["url"]
            assert asked.startswith((url, "data:")), f"the page asked for {asked}"
        assert event["method"] != "Runtime.exceptionThrown", event["params"]
        assert event["method"] != "Log.entryAdded" or event["params"]["entry"]["level"] != "error", event["params"]


def main() -> int:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    if options.chromium is None:
        parser.error("there is no Chromium; install it or name it with --chromium")
    options.folder.mkdir(parents=True, exist_ok=True)
    for shot in SHOTS:
        path = take(options.chromium, options.url, shot, options.folder)
        sys.stdout.write(f"{path}: {path.stat().st_size / 1000:.0f} kB\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
