"""The whole way on a system that plays Windows: train, kill, resume, generate, chat, export, serve; each a process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mm_rec.cli import COMMANDS
from mm_rec.data.synthetic import write_synthetic
from mm_rec.storage.checkpoint import list_checkpoints

BARE = Path(__file__).parent / "bare"
ROOT = Path(__file__).parents[2]
PATIENCE = 600
SIGBREAK = 21
TRAIN = [
    "train", "--data_dir", "Data with ışık", "--checkpoint_dir", "runs", "--stage", "stage1", "--preset", "tiny",
    "--seq_len", "48", "--checkpoint_interval", "4", "--eval_interval", "5", "--threads", "1",
    "--valid_bytes", "300", "--keep_checkpoints", "2",
]  # fmt: skip


class Shell:
    """Runs ``mm-rec`` in a folder, in the system of ``bare/sitecustomize.py``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "MM_REC_TEST_SYSTEM": "bare", "PYTHONPATH": os.pathsep.join([str(BARE), str(ROOT)]),
        }  # fmt: skip
        self.environment.pop("PYTHONIOENCODING", None)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "mm_rec.cli", *arguments], cwd=self.folder, env=self.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, said: str = "", code: int = 0) -> str:
        """Returns what the command wrote, which is UTF-8 although the streams began with a code page."""
        process = self.start(*arguments)
        out, err = (text.decode("utf-8") for text in process.communicate(said.encode("utf-8"), timeout=PATIENCE))
        assert process.returncode == code, out + err
        return out if code == 0 else err


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder = tmp_path_factory.mktemp("bare")
    write_synthetic(folder / "Data with ışık", 40)
    return Shell(folder)


@pytest.fixture(scope="module")
def run(shell: Shell) -> Path:
    """The run of a training that was killed and gone on with; meanwhile nobody else got its folder."""
    folder = shell.folder / "runs" / "stage1"
    process = shell.start(*TRAIN, "--max_steps", "100000")
    deadline = time.monotonic() + PATIENCE
    while not list_checkpoints(folder / "checkpoints"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    refused = shell.run(*TRAIN, "--max_steps", "100000", code=2)
    assert re.search(rf"runs.stage1 is in use by process {process.pid} on \S+ since", refused)
    process.kill()
    process.communicate()
    killed_at = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step_"))
    assert f"{killed_at + 5} steps done" in shell.run(*TRAIN, "--max_steps", str(killed_at + 5))
    return folder


def test_killed_and_resumed_it_is_whole(shell: Shell, run: Path) -> None:
    events = (run / "events.log").read_text(encoding="utf-8")
    assert "took over from process" in events
    losses = (run / "loss_log.txt").read_bytes().split(b"\n")
    steps = [int(line.split(b",")[0]) for line in losses if line]
    assert steps == list(range(1, len(steps) + 1))
    assert b"\r" not in (run / "config.yaml").read_bytes() + (run / "metrics.jsonl").read_bytes()
    assert len(list_checkpoints(run / "checkpoints")) == 2
    assert f"the same command goes on from step {steps[-1]}" in shell.run("doctor", "runs/stage1")
    assert not [path for path in run.parent.rglob("*") if path.name.startswith(".tmp-")]


def test_ctrl_break_saves(shell: Shell, run: Path) -> None:
    steps = int(list_checkpoints(run / "checkpoints")[-1].name.removeprefix("step_"))
    process = shell.start(*TRAIN, "--max_steps", "100000")
    deadline = time.monotonic() + PATIENCE
    while len((run / "loss_log.txt").read_bytes().splitlines()) <= steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(SIGBREAK)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    saved = int(list_checkpoints(run / "checkpoints")[-1].name.removeprefix("step_"))
    assert saved > steps
    assert len((run / "loss_log.txt").read_bytes().splitlines()) == saved


def test_text_passes_whatever_the_code_page_is(shell: Shell, run: Path) -> None:
    sampling = ["--model", "runs", "--max_new_tokens", "8", "--temperature", "0"]
    assert shell.run("generate", *sampling, "--prompt", "漢字 😀 ışık").startswith("漢字 😀 ışık")
    assert shell.run("generate", *sampling, said="漢字 😀 ışık").startswith("漢字 😀 ışık")
    for command in COMMANDS:
        assert "usage: " in shell.run(command, "--help")


def test_a_conversation_goes_on_from_its_file(shell: Shell, run: Path) -> None:
    chat = ["chat", "--model", "runs", "--session", "Sohbet ışık.safetensors", "--max_new_tokens", "5"]
    shell.run(*chat, said="Merhaba, ışık!\n/save copy.safetensors\n")
    first = shell.start(*chat, "--resume")
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write(b"And then?\n")
    first.stdin.flush()
    first.stdout.readline()
    refused = shell.run(*chat, "--resume", said="Me too\n", code=2)
    assert f"is in use by process {first.pid}" in refused
    first.communicate(timeout=PATIENCE)
    assert first.returncode == 0
    shell.run(*chat, "--resume", said="Go on.\n/fork other.safetensors\nAnd there?\n")
    assert "Windows keeps the name nul for a device" in shell.run(*chat[:4], "nul.safetensors", said="x\n", code=2)
    kept = sorted(path.name for path in shell.folder.iterdir() if path.suffix in (".safetensors", ".lock"))
    assert kept == ["Sohbet ışık.safetensors", "copy.safetensors", "other.safetensors"]


def test_an_export_is_a_model(shell: Shell, run: Path) -> None:
    assert "exported to my-model" in shell.run("export", "--model", "runs", "--output", "my-model")
    assert "nothing is overwritten" in shell.run("export", "--model", "runs", "--output", "my-model", code=2)
    options = ["--max_new_tokens", "8", "--temperature", "0", "--prompt", "The ", "--precision", "fp32"]
    expected = shell.run("generate", "--model", "runs", *options)
    assert shell.run("generate", "--model", "my-model", *options) == expected


def test_a_server_answers_and_keeps_its_sessions(shell: Shell, run: Path) -> None:
    serve = ["serve", "--model", "runs", "--port", "0", "--session_dir", "talks"]
    process = shell.start(*serve)
    assert process.stdout is not None
    address = next(filter(None, (re.search(rb"http://\S+/", line) for line in process.stdout)))
    url = address[0].decode()

    def ask(session: str) -> tuple[int, str]:
        body = {"model": "mm-rec", "session": session, "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
        request = urllib.request.Request(
            f"{url}v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        return refused.value.code, refused.value.read().decode()

    assert ask("talk")[0] == ask("talk")[0] == 200
    assert ask("Talk")[0] == 400, "names that differ in case alone would be one file"
    status, text = ask("aux")
    assert (status, "Windows keeps the name aux for a device" in text) == (400, True)
    assert "is in use by process" in shell.run(*serve, code=2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert [path.name for path in sorted((shell.folder / "talks").iterdir())] == [".lock", "talk.safetensors"]
