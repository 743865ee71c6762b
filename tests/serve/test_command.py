"""The command starts, serves, says what is wrong with its settings, and ends as a program should."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import uvicorn

from mm_rec.errors import UserError
from mm_rec.model import MMRecModel
from mm_rec.scripts.serve_command import main
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import Tokenizer


@pytest.fixture
def saved(model: MMRecModel, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "step_000001"
    weights = model.state_dict()
    checkpoint.save(
        path, config=model.config, weights=weights, optimizer={}, carried={}, trainer={"step": 1}, tokenizer=tokenizer
    )
    return path


def test_it_serves_until_it_is_told_to_stop(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mm_rec.cli", "serve", "--model", str(saved), "--port", "0", "--name", "small"]
    command += ["--session_dir", str(tmp_path / "talks"), "--precision", "fp32", "--threads", "1"]
    command += ["--cors_origins", "https://chat.example.org/, http://localhost:3000"]
    environment = {**os.environ, "MM_REC_API_KEY": "secret"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            described, place = server.stdout.readline(), server.stdout.readline()
            assert re.fullmatch(rf"model {saved}, torch.float32, expert chosen by the prompt\n", described)
            address = re.fullmatch(r"serving at (http://127\.0\.0\.1:\d+/) \(Ctrl-C stops\)\n", place)
            assert address is not None
            with openai.OpenAI(base_url=f"{address[1]}v1", api_key="secret") as client:
                fields = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
                assert client.chat.completions.create(**fields, extra_body={"session": "a"}).choices
                pages = {"http://localhost:3000": True, "https://chat.example.org": True, "null": False}
                for page, allowed in pages.items():
                    reply = client.models.with_raw_response.list(extra_headers={"Origin": page})
                    assert (reply.headers.get("access-control-allow-origin") == page) is allowed
                with pytest.raises(openai.AuthenticationError):
                    client.with_options(api_key="guess").models.list()
            assert (tmp_path / "talks" / "a.safetensors").is_file()
        finally:
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=120)
    assert server.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the model to serve with --model"),
        (["--model", "nowhere"], "there is no folder nowhere"),
        (["--model", "{saved}", "--domain", "poetry"], "there is no expert 'poetry'"),
        (["--model", "{saved}", "--host", "0.0.0.0"], "set MM_REC_API_KEY first"),
        (["--model", "{saved}", "--host", "192.0.2.1", "--api_key", "k"], "cannot listen on 192.0.2.1 port 0"),
        (["--model", "{saved}", "--port", "70000"], "cannot listen on 127.0.0.1 port 70000"),
        (["--model", "{saved}", "--port", "-1"], "--port must be at least 0"),
        (["--model", "{saved}", "--max_streams", "0"], "--max_streams must be at least 1"),
        (
            ["--model", "{saved}", "--cors_origins", "*"],
            "lets every web page in; name the pages, or set MM_REC_API_KEY",
        ),
        (
            ["--model", "{saved}", "--cors_origins", "https://a.org,b.org"],
            "like https://example.org, without a path, not",
        ),
        (["--model", "{saved}", "--cors_origins", "https://a.org/chat"], "without a path, not 'https://a.org/chat'"),
    ],
)
def test_what_is_wrong_is_said(
    saved: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MM_REC_API_KEY", raising=False)
    port = [] if "--port" in arguments else ["--port", "0"]
    with pytest.raises(UserError, match=re.escape(message)):
        main([argument.format(saved=saved) for argument in arguments] + port)


def test_it_reads_a_folder_first(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    (tmp_path / "notes.txt").write_text("The lamp stands on the table. " * 9)
    flags = ["--model", str(saved), "--port", "0", "--session_dir", str(tmp_path / "talks"), "--threads", "1"]
    assert main([*flags, "--memory", str(tmp_path / "notes.txt")]) == 0
    captured = capsys.readouterr()
    read = re.search(r"notes\.txt is read: \d+ tokens, remembered in .* by the expert (\w+); it took", captured.err)
    assert read is not None
    assert f"expert {read[1]}\n" in captured.out


def test_a_taken_port_is_said(saved: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"cannot listen on 127.0.0.1 port {port}: .*; use another --host or --port"
        ):
            main(["--model", str(saved), "--port", str(port)])
