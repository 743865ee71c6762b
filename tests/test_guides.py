"""Every command of the CPU training guide and the status report, as printed there, in order, in one folder."""

import importlib
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_up_entries import made_up_entries

import mm_rec
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data import download_data
from mm_rec.data.download import local
from mm_rec.data.download.hub import UnreachableError
from mm_rec.data.download.sources import Source
from mm_rec.program import run_program
from mm_rec.training import trainer

COMMANDS = [
    tuple(line.split("\t"))
    for line in Path(__file__).with_name("guide_commands.txt").read_text().splitlines()
    if not line.startswith("#")
]
QUICK = ["--preset", "tiny", "--seq_len", "32", "--valid_bytes", "100", "--threads", "1"]


def documents(kind: str, count: int) -> Iterator[str]:
    chance = random.Random(kind)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 8))) for _ in range(300)]
    common = ["the", "of", "and", "is", "in", "that"]
    for number in range(count):
        if kind == "code":
            name, other = chance.sample(words, 2)
            name = f"{name}_{number}"
            yield f"def {name}({other}):\n    return {other} + {number}\n\n\nprint({name}({number}))\n"
        else:
            body = [chance.choice(common if chance.random() < 0.4 else words) for _ in range(60)]
            yield " ".join(body).capitalize() + ".\n"


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, two steps a stage, a very small model; a hub and a machine that have a few documents at once."""

    def fetch(source: Source, samples: int, data_dir: Path, tell: object) -> Path:
        path = data_dir / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            rows: Iterator[object] = documents(source.kind, min(samples, 30))
            if source.kind in ("instruct", "chat"):
                rows = ({"prompt": "Go on.", "completion": text} for text in rows)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MM_REC_MAX_STEPS", "2")
    monkeypatch.setattr(download_data, "fetch", fetch)
    monkeypatch.setattr(local, "builtin_text", lambda: documents("text", 30))
    monkeypatch.setattr(local, "builtin_code", lambda: documents("code", 30))
    monkeypatch.setattr(local, "builtin_entries", lambda: made_up_entries(3000))
    monkeypatch.setattr(trainer, "SAMPLE_TOKENS", 3)
    monkeypatch.setattr(trainer, "draw_losses", lambda *_: None)
    small = ModelConfig(
        vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5
    )
    monkeypatch.setitem(PRESETS, "tiny", small)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(command: str) -> int:
    words = shlex.split(command, comments=True)[1:]
    module = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    arguments = words[2:] if words[0] == "-m" else words[1:]
    program = importlib.import_module(module)
    quick = QUICK if program is not download_data else []
    return run_program(lambda: program.main([*quick, *arguments]))


def test_every_command_of_the_guides_works_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expected, command in COMMANDS:
        assert run(command) == 0, f"{command}\n{capsys.readouterr().err}"
        assert (tmp_path / expected).exists(), command
        captured = capsys.readouterr()
        assert not [line for line in captured.err.splitlines() if "reference ops" not in line], command
    for file in ("text/wikitext.jsonl", "code/code.jsonl"):
        lines = (tmp_path / "data" / file).read_text().splitlines()
        assert all(isinstance(json.loads(line), str) for line in lines)
    first, *_ = (tmp_path / "checkpoints_cpu" / "stage1" / "loss_log.txt").read_text().splitlines()
    step, loss = first.split(",")
    assert (step, float(loss) > 0) == ("1", True)


def test_training_without_data_names_the_command_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("python3 -m mm_rec.scripts.train_cpu --stage stage1 --data_dir ./nowhere") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no data folder nowhere")
    assert "python3 -m mm_rec.data.download_data --output_dir nowhere" in error
    assert "--download_data" in error
    assert "--use_synthetic" in error


def test_without_a_hub_training_takes_what_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object) -> Path:
        raise UnreachableError("the hub cannot be reached")

    monkeypatch.setattr(download_data, "fetch", unreachable)
    assert run("python3 -m mm_rec.scripts.auto_train") == 0
    assert "the hub cannot be reached: taking the builtin text" in capsys.readouterr().out
    assert (tmp_path / "data" / "code" / "builtin.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--stage stage2", "starts from a trained stage1"),
        ("--batch_size 0", "--batch_size must be at least 1"),
        ("--seq_len 1", "--seq_len must be at least 2"),
        ("--stage stage7", "invalid choice"),
        ("--resume_from nowhere", "there is no nowhere"),
        ("--init_from nowhere", "there is no nowhere"),
        ("--device tpu", "unknown device"),
        ("--config nowhere.yaml", "cannot read the settings file"),
        ("--checkpoint_dir data/text/wikitext.jsonl", "cannot write"),
    ],
)
def test_bad_input_is_one_line(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("python3 -m mm_rec.data.download_data --text_samples 5 --code_samples 5") == 0
    capsys.readouterr()
    try:
        code = run(f"python3 -m mm_rec.scripts.train_cpu {arguments}")
    except SystemExit as stop:  # of the argument parser
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_broken_line_of_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "own.jsonl").write_text('"one fine line"\n{"text": \n')
    assert run("python3 -m mm_rec.scripts.train_cpu") == 2
    error = capsys.readouterr().err
    assert "own.jsonl" in error
    assert "2" in error
    assert error.count("\n") == 1


def test_pretrain_runs_as_a_file_from_a_checkout() -> None:
    script = Path(mm_rec.__file__).parent / "scripts" / "pretrain.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "data/pretrain" in done.stdout
