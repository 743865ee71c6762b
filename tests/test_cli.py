import contextlib
import errno
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mm_rec import __version__, system
from mm_rec.cli import COMMANDS, main
from mm_rec.data.synthetic import write_synthetic
from mm_rec.errors import UserError
from mm_rec.program import run_program


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TRAIN = ["train", "--use_synthetic", "--max_samples", "10", "--preset", "tiny", "--seq_len", "32", "--max_steps", "2"]


def test_help_names_every_command_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and command.summary in text for name, command in COMMANDS.items())
    assert main([]) == 2
    code = "import sys, mm_rec.cli; mm_rec.cli.main(['--help']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mm-rec {__version__}\n"
    assert main(["tran"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no command 'tran'")
    assert error.count("\n") == 1


def test_no_command_waits_for_the_compiler_of_pytorch(tmp_path: Path) -> None:
    """Many parts of PyTorch import it when they are called first, which takes two seconds."""
    data, runs = tmp_path / "data", tmp_path / "runs"
    code = f"""if True:
        import sys
        from mm_rec.cli import main
        assert main({[*TRAIN, "--data_dir", str(data), "--checkpoint_dir", str(runs)]}) == 0
        assert main({["generate", "--model", str(runs), "--prompt", "The", "--max_new_tokens", "2"]}) == 0
        assert "torch._dynamo" not in sys.modules
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["data", "tokenizer", "train", "generate", "doctor", "bench"])
def test_each_command_explains_itself_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(COMMANDS[name].module).main(["--help"], prog=f"mm-rec {name}")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: mm-rec {name}" in text
    assert "examples:" in text


def raise_it(error: Exception) -> int:
    raise error


def test_what_ends_a_program_becomes_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise UserError("the disk is full; free some space")

    def stop(signum: int) -> int:
        os.kill(os.getpid(), signum)
        return 0

    def warn() -> int:
        warnings.warn("slow", RuntimeWarning, stacklevel=1)
        return 0

    with warnings.catch_warnings():
        assert run_program(fail) == 2
        assert capsys.readouterr().err == "error: the disk is full; free some space\n"
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        for signum in handlers:
            assert run_program(functools.partial(stop, signum)) == 128 + signum
            os.kill(os.getpid(), signal.SIGINT)  # another one, on the way out, does nothing
            for one, handler in handlers.items():
                signal.signal(one, handler)
        assert run_program(lambda: 7) == 7
        warnings.simplefilter("always")
        assert run_program(warn) == 0
        assert capsys.readouterr().err == "warning: slow\n"
        assert run_program(lambda: torch.empty(2**60).nbytes) == 2
        assert run_program(lambda: raise_it(RuntimeError("can't start new thread"))) == 2
        assert run_program(lambda: raise_it(ImportError("lib.so: failed to map segment from shared object"))) == 2
        assert capsys.readouterr().err.count("error: out of memory; ") == 3
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="a bug"):
        run_program(lambda: raise_it(RuntimeError("a bug")))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys, mm_rec.program as p; sys.exit(p.run_program(lambda: [print('x' * 1000) for _ in range(1000)]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_from_training_to_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--checkpoint_dir", "runs", "--valid_bytes", "200"]) == 0
    assert "mm-rec generate --model runs/stage1" in capsys.readouterr().out
    assert (tmp_path / "runs" / "stage1" / "loss.png").stat().st_size > 1000

    texts = []
    for model in ("runs", "runs/stage1", "runs/stage1/checkpoints/step_000002"):
        assert main(["generate", "--model", model, "--prompt", "Ada had", "--max_new_tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("Ada had")
    assert len(set(texts)) == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ada had"))
    assert main(["generate", "--model", "runs", "--max_new_tokens", "20"]) == 0
    assert capsys.readouterr().out == texts[0]
    monkeypatch.setattr("mm_rec.scripts.generate_command.MOST_CHARACTERS", 6)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ada had"))
    assert main(["generate", "--model", "runs"]) == 2
    assert "the prompt has more than 6 characters" in capsys.readouterr().err
    monkeypatch.setattr("mm_rec.scripts.generate_command.MOST_CHARACTERS", 10**6)
    by_expert = []
    for name in ("text", "code"):
        by_prompt = ["--prompt", "Ada had", "--max_new_tokens", "20", "--domain", name]
        assert main(["generate", "--model", "runs", *by_prompt]) == 0
        by_expert.append(capsys.readouterr().out)
    assert by_expert[0] != by_expert[1]
    assert texts[0] in by_expert
    Path("schema.json").write_text(json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 3}))
    assert main(["generate", "--model", "runs", "--prompt", "Ada had", "--json_schema", "schema.json"]) == 0
    assert all(isinstance(one, bool) for one in json.loads(capsys.readouterr().out.removeprefix("Ada had")))
    Path("schema.json").write_text(json.dumps({"type": "array", "uniqueItems": True}))
    assert main(["generate", "--model", "runs", "--prompt", "Ada had", "--json_schema", "schema.json"]) == 2
    output = capsys.readouterr()
    assert (output.out, "uniqueItems" in output.err) == ("", True)

    assert main(["tokenizer", "--show", "Ada", "--tokenizer", "runs"]) == 0
    assert "bytes a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "nowhere", "--prompt", "a"], "there is no folder nowhere"),
        (["generate", "--model", ".", "--prompt", "\udcff"], "not UTF-8 text"),
        (["generate", "--model", ".", "--prompt", "a"], "neither a run folder nor a checkpoint"),
        (["generate", "--model", ".", "--prompt", "a", "--temperature", "-1"], "temperature must be at least 0"),
        (
            ["generate", "--model", ".", "--prompt", "a", "--json_schema", "none.json"],
            "cannot read the schema none.json",
        ),
        (["tokenizer"], "--output"),
        (["tokenizer", "--show", "a"], "--tokenizer"),
        (["tokenizer", "--output", "t", "--vocab_size", "10"], "--vocab_size must be at least"),
        (["tokenizer", "--output", "t"], "there is no data folder"),
        (["tokenizer", "--output", "."], "nothing is overwritten"),
        (["train"], "there is no data folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_a_tokenizer_is_trained_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_synthetic(tmp_path / "data", 60)
    assert main(["tokenizer", "--vocab_size", "300", "--output", "tokenizer"]) == 0
    assert "300 tokens, written to tokenizer" in capsys.readouterr().out
    assert main(["tokenizer", "--tokenizer", "tokenizer", "--show", "ğ"]) == 0
    assert "2 tokens, 2 bytes" in capsys.readouterr().out


def test_bench_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--preset", "tiny", "--shapes", "1x32", "--rounds", "1", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("TFLOP/s", "1x32 MM-Rec, one domain", "generation after 4,096", "adamw_"))
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [row["shape"] for row in result["training"]] == ["1x32", "1x32"]
    assert result["limits"]["copy_gb_per_s"] > 0
    assert result["peak_memory_bytes"] > 50_000_000
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["bench", "--shapes", "512"])
    assert "as in 2x512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">&-", "standard output is closed"),
        (">/dev/full", "no space left on device"),
    ],
)
def test_an_output_that_takes_nothing_is_one_line(redirection: str, message: str) -> None:
    command = f"exec {sys.executable} -m mm_rec.cli --help {redirection}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(system.open_files_limit() is None, reason="there is no limit on open files")
def test_few_descriptors_are_one_line() -> None:
    command = f"ulimit -n 12; exec {sys.executable} -m mm_rec.cli doctor"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: a process may have only 12 files open here; raise the limit with `ulimit -n 1024`\n"


def test_what_the_system_refuses_is_one_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    errors = [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "a" * 10**5),
        UserError("a\nb" * 10**5),
        UnicodeEncodeError("ascii", "ı", 0, 1, "ordinal not in range"),
    ]
    for error in errors:
        assert run_program(functools.partial(raise_it, error)) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        assert len(line) < 2100


@pytest.mark.parametrize("arguments", [["a/" * 3000], ["--domain", "a/" * 3000], ["--stage", "a\n" * 3000]])
def test_an_error_shows_no_argument_at_full_length(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["train", "--use_synthetic", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert len(line) < 2100
