"""Every command of the guide, in the order of the pages and in one folder, with the quick sizes of README's test."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn
import yaml
from test_guides import QUICK, quick
from test_readme import SHORT, commands, mm_rec

from mm_rec.config import PRESETS
from mm_rec.data.synthetic import synthetic_code, synthetic_text

__all__ = ["quick"]  # the fixture: small model, two steps, a hub of a few documents

ROOT = Path(__file__).parents[2]
LAUNCHER = "runs/torchrun.sh"
DEMO = "mm-rec demo"
QUICK_GUIDE = SHORT | {"tokenizer": [], "pipeline": QUICK}


def guide() -> list[str]:
    """The names of the pages of the guide, in the order of the navigation."""
    text = re.sub(r"!!python/name:\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    [pages] = [entry["Guide"] for entry in yaml.safe_load(text)["nav"] if isinstance(entry, dict) and "Guide" in entry]
    return [f"docs/{page}" for page in pages]


def lines(page: str) -> list[str]:
    """The lines of the ``bash`` blocks of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_guide_has_ten_pages_with_commands_each() -> None:
    assert len(guide()) == 10
    assert all(lines(page) for page in guide())
    assert sorted(guide()) == sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/guide").glob("*.md"))


def test_the_demo_is_the_line_that_the_readme_has() -> None:
    assert DEMO in lines("docs/guide/first_model.md")
    assert DEMO in commands("README.md")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with books, programs and a manual, and what the programs of the guide wait for."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # to serve until the end
    for name in ("small", "100m"):
        monkeypatch.setitem(PRESETS, name, PRESETS["tiny"])
    answer = "is a thing of many pieces that gives light."
    manual = "\n\n".join(f"# What is part {n}?\n\nPart {n} {answer}" for n in range(40))
    for file, text in {
        "books/one.txt": "\n".join(synthetic_text(12)),
        "books/two.txt": "\n".join(synthetic_text(12, seed=1)),
        "src/one.py": "def f(x):\n    return x\n" * 9,
        "src/two.py": "def g(x):\n    return x + 1\n" * 9,
        "manual/manual.md": manual,
    }.items():
        (tmp_path / "home" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / file).write_text(text)
    return tmp_path / "home"


def run_line(line: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command of the guide, with quick sizes."""
    words = [word.replace("~", str(home)) for word in shlex.split(line, comments=True)]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    if words[0] == "make":
        return 0 if words[1] in re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE) else 2
    if words[0] == LAUNCHER:  # takes the flags of train, and hands them on
        words = ["mm-rec", "train", *words[1:]]
    assert words[0] == "mm-rec", line
    if line == DEMO:  # README's test runs it; here a model stands where the demo leaves one
        words = ["mm-rec", "train", "--use_synthetic", "--max_samples", "10", "--checkpoint_dir", "demo/runs"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))  # to chat
    if words[1] == "serve":  # whose end, which gives its folder up, does not come here
        words += ["--session_dir", f"sessions-{'key' if '--host' in words else 'local'}"]
    return mm_rec([words[1], *QUICK_GUIDE.get(words[1], []), *words[2:]])


@pytest.mark.usefixtures("quick")
def test_every_command_of_the_guide_works(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in guide():
        for line in lines(page):
            with monkeypatch.context() as environment:
                assert run_line(line, home, environment) == 0, f"{page}: {line}\n{capsys.readouterr().err}"
    assert Path("report/report.html").exists()
    assert Path("talk.safetensors").exists()
    assert Path("long_run_exported/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the launcher is a shell script")
def test_the_launcher_of_the_guide_trains_with_two_processes(tmp_path: Path) -> None:
    [line] = [line for line in lines("docs/guide/several_gpus.md") if line.startswith("PROCESSES=2 ")]
    for domain, texts in (("text", synthetic_text(12)), ("code", synthetic_code(12))):
        (tmp_path / "data" / domain).mkdir(parents=True)
        (tmp_path / "data" / domain / "some.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    short = " ".join([*QUICK, "--max_steps", "2"])
    done = subprocess.run(
        ["bash", "-c", f"{line.replace(LAUNCHER, str(ROOT / LAUNCHER))} {short}"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((tmp_path / "two_processes/stage1/checkpoints/step_000002/trainer.json").read_text())
    assert state["runtime"]["processes"] == 2


@pytest.mark.usefixtures("quick")
def test_the_python_example_of_the_reference_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_other_pages_show_commands_that_are_tested() -> None:
    tested = {
        line.split("#")[0].strip()
        for line in [*commands("README.md"), *(one for page in guide() for one in lines(page))]
    }
    others = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    shown = {line.split("#")[0].strip() for page in others for line in lines(page)}
    assert shown
    assert shown <= tested
