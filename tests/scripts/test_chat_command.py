"""``mm-rec chat`` through a pipe and at a terminal: messages, commands, sessions that go on."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mm_rec.cli import main
from mm_rec.config import ModelConfig
from mm_rec.inference import session_file
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.folder_memory import read_folder
from mm_rec.inference.generate import generate
from mm_rec.inference.loading import load_model
from mm_rec.inference.sampling import Sampling
from mm_rec.inference.session_file import own
from mm_rec.model import MMRecModel
from mm_rec.scripts.chat_command import Conversation
from mm_rec.scripts.sampling_options import FLAGS
from mm_rec.storage import checkpoint
from mm_rec.storage.lock import Lock
from mm_rec.system import REMOVES_OPEN_FILES
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "step_000001"
    weights = MMRecModel(CONFIG, seed=1).state_dict()
    weights["fusion.gate"] = torch.ones_like(weights["fusion.gate"])
    tokenizer = train_tokenizer(["Hello, what is your name? My name is Memory."] * 3, 320)
    checkpoint.save(path, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer)
    return path


@pytest.fixture
def talk(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    def run(text: str | bytes, *flags: object, code: int = 0) -> tuple[str, str]:
        content = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        arguments = ["chat", "--model", str(model), "--max_new_tokens", "8", "--device", "cpu", *map(str, flags)]
        assert main(arguments) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_an_endless_message_is_refused(talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_rec.scripts.chat_command.MOST_CHARACTERS", 20)
    out, err = talk("Hello\n" + "a" * 100, code=2)
    assert len(out.splitlines()) == 1
    assert err.strip() == "error: a message has more than 20 characters; give less of it"


def test_answers_by_a_schema(talk, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": ["one", "two"]}')
    out, err = talk("Hello\nHello\n", "--json_schema", tmp_path / "schema.json", "--max_new_tokens", 30)
    assert set(out.splitlines()) <= {'"one"', '"two"'}
    assert not err
    for content, words in (("[]", "must hold a JSON schema, which is an object"), ("{", "is not JSON")):
        (tmp_path / "schema.json").write_text(content)
        assert words in talk("Hello\n", "--json_schema", tmp_path / "schema.json", code=2)[1]


def test_a_pipe_gives_the_answers_alone(talk) -> None:
    out, err = talk("Hello\n\n  \nWhat is your name?\n")
    first, _ = talk("Hello\n")
    assert out.startswith(first)
    assert len(out) > len(first) > 1
    assert not err
    assert talk("Hello\n", "--seed", 3)[0] != first
    assert talk("Hello\n/quit\nMore\n")[0] == first
    assert talk("")[0] == ""


def test_a_session_goes_on_as_if_never_stopped(talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    whole, _ = talk("One\nTwo\nThree\n", "--system", "Be brief.", "--temperature", 1)
    first, _ = talk("One\nTwo\n", "--system", "Be brief.", "--temperature", 1, "--session", file)
    size = file.stat().st_size
    second, _ = talk("Three\n", "--session", file, "--resume")
    assert first + second == whole
    assert file.stat().st_size == size


def test_flags_of_a_resumed_session_win(talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    talk("One\n", "--session", file)
    out, _ = talk("Two\n", "--session", file, "--resume", "--max_new_tokens", 0)
    assert out == "\n"


def test_commands(talk, tmp_path: Path) -> None:
    kept, copy, branch = (tmp_path / name for name in ("kept", "copy", "branch"))
    out, _ = talk(f"/save {copy}\nOne\n/save {copy}\n/fork {branch}\nTwo\n/save\n/help\n", "--session", kept)
    size = kept.stat().st_size
    assert f"saved in {copy}, {size:,} bytes" in out
    assert f"saved in {branch}, {size:,} bytes" in out
    assert "/fork FILE" in out
    three = [talk("Three\n", "--session", file, "--resume")[0] for file in (kept, copy, branch)]
    assert three[0] == three[1] != three[2]
    again, _ = talk("One\n/reset\nOne\n", "--temperature", 0)
    first, second = again.split("forgotten\n")
    assert first == second


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        ("/save\n", [], "there is no --session; use /save FILE"),
        ("/fork\n", [], "name the file to go on in"),
        ("/shout\n", [], "there is no command /shout"),
        ("/\n", [], "there is no command /;"),
        ("Hi\n", ["--session", "none", "--resume"], "cannot read the session"),
        ("Hi\n", ["--domain", "music"], "there is no expert 'music'"),
        ("Hi\n", ["--top_p", "2"], "top_p must be at least 0"),
    ],
)
def test_what_cannot_be_done_is_an_error(talk, text: str, flags: list[str], problem: str) -> None:
    _, err = talk(text, *flags, code=2)
    assert err.startswith("error: ")
    assert problem in err
    assert err.count("\n") == 1


def test_no_session_is_overwritten(talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    talk("One\n", "--session", file)
    before = file.read_bytes()
    assert "go on with --resume or name another file" in talk("One\n", "--session", file, code=2)[1]
    for command in ("save", "fork"):
        assert "is there already" in talk(f"One\n/{command} {file}\n", code=2)[1]
    assert file.read_bytes() == before


def test_input_that_is_no_text_does_no_harm(talk, tmp_path: Path) -> None:
    out, err = talk(b"\xff\xfe<|end|>\xed\xa0\x80\n /help\n")
    assert out.count("\n") >= 2
    assert not err


def test_ctrl_c_breaks_off_an_answer_but_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["first", "/shout", "second"])

    def line(prompt: str) -> str:
        assert prompt == "you: "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def reply(message: str, json_schema: None):
        yield f"<{message}"
        if message == "first":
            raise KeyboardInterrupt
        yield ">"

    monkeypatch.setattr("builtins.input", line)
    session = SimpleNamespace(reply=reply, turns=0)
    Conversation(session, lambda _: session, None, None, contextlib.ExitStack(), interactive=True).run()
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == ["model: <first", "model: <second>"]
    assert "there is no command /shout" in captured.err


def test_flags_and_sampling_agree() -> None:
    assert {name: default for name, (default, _) in FLAGS.items()} == {
        name: value for name, value in vars(Sampling()).items() if name != "stop"
    }


def test_a_session_has_one_owner(talk, tmp_path: Path) -> None:
    file, other = tmp_path / "talk.safetensors", tmp_path / "other.safetensors"
    talk("One\n", "--session", file)
    before = file.read_bytes()
    with own(file):
        for flags in (["--resume"], []):
            _, err = talk("Two\n", "--session", file, *flags, code=2)
            assert re.fullmatch(rf"error: {file} is in use by process {os.getpid()} on \S+ since .*; .*\n", err)
        assert file.read_bytes() == before
    with own(other):
        _, err = talk(f"/save {other}\n", code=2)
        assert f"{other} is in use by" in err
    talk(f"Two\n/fork {other}\nThree\n", "--session", file, "--resume")
    assert file.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "talk.safetensors"]


def test_the_sessions_of_a_running_server_are_its_own(talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    talk("One\n", "--session", file)
    with Lock(tmp_path / ".lock"):
        _, err = talk("Two\n", "--session", file, "--resume", code=2)
        assert f"{tmp_path} is in use by process {os.getpid()} on " in err
        assert err.count("\n") == 1
    talk("Two\n", "--session", file, "--resume")


@pytest.mark.skipif(not REMOVES_OPEN_FILES, reason="Windows does not remove what somebody has open")
def test_a_chat_whose_lock_file_was_removed_does_not_overwrite(talk, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "talk.safetensors"
    talk("One\n", "--session", file)
    before = file.read_bytes()

    def answer(self: ChatSession, text: str, json_schema: None) -> Iterator[str]:
        (tmp_path / ".talk.safetensors.lock").unlink()
        locks.enter_context(own(file))  # another chat
        yield "an answer"

    monkeypatch.setattr(ChatSession, "reply", answer)
    with contextlib.ExitStack() as locks:
        _, err = talk("Two\n", "--session", file, "--resume", code=2)
        assert f"{file} is not owned by this process any more" in err
        assert f"is in use by process {os.getpid()} on" in err
    assert file.read_bytes() == before


def test_a_conversation_begins_from_a_folder(talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "one.txt").write_text("My name is Memory. " * 20)
    session = tmp_path / "talk.safetensors"
    first, told = talk("Hello\n/reset\nHello\n", "--memory", notes, "--session", session)
    assert re.search(
        rf"^{re.escape(str(notes))} is read: \d+ tokens, remembered in .* by all experts; it took", told, re.M
    )
    answer, forgotten, again = first.splitlines()
    assert forgotten == "forgotten"
    assert answer == again  # what is forgotten is what was said, not the folder
    position = session_file.read(session)[0]["position"]
    assert int(position) > int(re.search(r"(\d+) tokens", told)[1]) > 50
    _, told = talk("Hello\n", "--memory", notes)
    assert "was read before" in told
    with pytest.raises(SystemExit):
        talk("Hello\n", "--session", session, "--resume", "--memory", notes)


def test_a_text_goes_on_from_a_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("My name is Memory. " * 20)
    prompt = ["--prompt", "Hello", "--max_new_tokens", "8", "--device", "cpu", "--precision", "fp32"]
    memory = ["--memory", str(tmp_path / "notes.txt")]
    assert main(["generate", "--model", str(model), *memory, *prompt]) == 0
    captured = capsys.readouterr()
    assert "notes.txt is read: " in captured.err
    loaded = load_model(model, device="cpu", precision="fp32")
    state = read_folder(tmp_path / "notes.txt", loaded).state
    sampling = Sampling(max_new_tokens=8)
    expected = "".join(generate(loaded.model, loaded.tokenizer, "Hello", sampling, None, None, state))
    assert captured.out == f"Hello{expected}\n"


def test_the_expert_that_reads_the_first_message_best_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step_000001"
    weights = MMRecModel(CONFIG, seed=1).state_dict()  # whose fusion is not trained
    tokenizer = train_tokenizer(["Hello, what is your name? My name is Memory."] * 3, 320)
    checkpoint.save(path, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer)
    loaded = load_model(path, device="cpu")
    chosen = {
        loaded.choose_domain(None, message): message for message in ("Hello", "name?", "is", "what", "y", "M", "a")
    }
    assert chosen.keys() == {"text", "code"}
    for expert, message in chosen.items():
        session = tmp_path / f"{expert}.safetensors"
        for flags in (["--session", str(session)], ["--domain", expert]):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{message}\nname\n".encode())))
            assert main(["chat", "--model", str(path), "--max_new_tokens", "8", "--device", "cpu", *flags]) == 0
        said = capsys.readouterr().out
        assert said[: len(said) // 2] == said[len(said) // 2 :]
        assert ChatSession.load(session, loaded.model, loaded.tokenizer).domain == expert
