"""Training from Python: what data may be, what a run is, and that it is what the command line does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mm_rec
from mm_rec import cli
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.synthetic import synthetic_code, synthetic_text, write_synthetic
from mm_rec.storage.run_folder import RunFolder

QUICK = {
    "preset": "tiny", "seq_len": 16, "max_steps": 2, "valid_bytes": 100, "device": "cpu", "precision": "fp32",
    "threads": 1, "checkpoint_dir": "runs",
}  # fmt: skip
TEXTS, PROGRAMS = synthetic_text(12), synthetic_code(12)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, a very small model and one thread."""
    config = ModelConfig(
        vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5
    )
    monkeypatch.setitem(PRESETS, "tiny", config)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_documents_as_strings_become_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    run = mm_rec.train(TEXTS, quiet=True, **QUICK)
    assert capsys.readouterr().out == ""
    assert run.folder == Path("runs/stage1").resolve()
    assert run.checkpoint == run.folder / "checkpoints" / "step_000002"
    steps = [record["step"] for record in run.metrics if "loss" in record]
    assert steps == [1, 2]
    assert all(0 < record["valid"]["text"] < 20 for record in run.metrics if "valid" in record)
    assert len(run.model.generate("The ", max_new_tokens=5)) > 0
    assert run.model is run.model
    assert run._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def test_it_is_the_run_of_the_command_line() -> None:
    write_synthetic(Path("data"), 12)
    run = mm_rec.train("data", quiet=True, **QUICK)
    assert cli.main(["train", "--data_dir", "data", *(str(one) for pair in QUICK.items() for one in flag(*pair))]) == 0
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["stage1"]
    assert run.model.domains == ("text", "code")


def flag(name: str, value: object) -> tuple[str, object]:
    return f"--{name}", value


def test_the_same_call_goes_on_and_other_documents_make_another_run() -> None:
    first = mm_rec.train(TEXTS, quiet=True, **QUICK)
    again = mm_rec.train(iter(TEXTS), quiet=True, **{**QUICK, "max_steps": 3})
    assert (again.folder, again.checkpoint.name) == (first.folder, "step_000003")
    assert mm_rec.train(TEXTS[1:], quiet=True, **QUICK).folder == Path("runs/stage1-2").resolve()


@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_a_folder_and_domains(tmp_path: Path, as_text: bool) -> None:
    Path("book.txt").write_text("\n".join(TEXTS))
    Path("src").mkdir()
    for index, program in enumerate(PROGRAMS):
        Path(f"src/{index}.py").write_text(program)
    kind = str if as_text else Path
    run = mm_rec.train({"text": kind("book.txt"), "code": kind("src")}, quiet=True, **QUICK)
    seen = {name for record in run.metrics for name in record.get("losses", {})}
    assert seen == {"text", "code"}
    alone = mm_rec.train(kind("book.txt"), quiet=True, **QUICK)
    assert {name for record in alone.metrics for name in record.get("losses", {})} == {"text"}
    mixed = mm_rec.train({"text": TEXTS, "code": kind("src")}, quiet=True, **QUICK)
    assert len({run.folder, alone.folder, mixed.folder}) == 3


def test_domains_have_any_name() -> None:
    run = mm_rec.train({"law": TEXTS, "code": PROGRAMS}, quiet=True, **QUICK)
    assert sorted(run.model.domains) == ["code", "law"]


def test_settings_name_the_data_without_an_argument() -> None:
    run = mm_rec.train(use_synthetic=True, max_samples=12, quiet=True, **QUICK)
    assert run.metrics[-1]["step"] == 2


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("no such folder", {}, "no file or folder 'no such folder'; documents as strings are given as a list"),
        ("", {}, "no file or folder ''"),
        ({"code": "nowhere"}, {}, "no file or folder 'nowhere'"),
        ({"all": TEXTS}, {}, "a domain can't have the name 'all'"),
        ({}, {}, "no documents: the dict of domains is empty"),
        ([], {}, "no documents of text: the list is empty"),
        (["short", "too"], {}, "too little text data"),
        (TEXTS, {"use_synthetic": True}, "data and use_synthetic both say what to train on"),
        (TEXTS, {"data_dir": "data"}, "data and data_dir both say what to train on"),
        ([b"bytes"], {}, "document 0 of text is a bytes; documents are strings"),
        (TEXTS, {"max_step": 3}, "unknown setting max_step; did you mean max_steps"),
        (TEXTS, {"preset": "huge"}, "preset must be one of tiny, small, 100m"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(data: object, settings: dict[str, object], message: str) -> None:
    with pytest.raises(mm_rec.UserError, match=message) as error:
        mm_rec.train(data, quiet=True, **{**QUICK, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [42, b"bytes", {"text": 5}])
def test_what_are_no_documents(data: object) -> None:
    with pytest.raises(TypeError, match="text must be a path or documents as strings, not of type"):
        mm_rec.train(data, quiet=True, **QUICK)


def test_ctrl_c_saves_and_is_a_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    log_loss = RunFolder.log_loss

    def log_and_interrupt(run: RunFolder, step: int, loss: float) -> None:
        log_loss(run, step, loss)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunFolder, "log_loss", log_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        mm_rec.train(TEXTS, quiet=True, **QUICK)
    assert json.loads(Path("runs/stage1/checkpoints/step_000001/trainer.json").read_text())["step"] == 1
    monkeypatch.setattr(RunFolder, "log_loss", log_loss)
    assert mm_rec.train(TEXTS, quiet=True, **QUICK).checkpoint.name == "step_000002"


def test_a_second_ctrl_c_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt_twice(run: RunFolder, step: int, loss: float) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunFolder, "log_loss", interrupt_twice)
    before = signal.getsignal(signal.SIGINT)  # Python's own, or that of a shell that lets background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        mm_rec.train(TEXTS, quiet=True, **QUICK)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_several_processes_train_more_than_once() -> None:
    Path("book.txt").write_text("\n".join(TEXTS))
    Path("twice.py").write_text(
        "import mm_rec\n"
        f"settings = {QUICK | {'batch_size': 3}!r}\n"
        "for steps in (1, 2):\n"
        "    run = mm_rec.train('book.txt', quiet=True, **{**settings, 'max_steps': steps})\n"
        "    assert run.checkpoint.name == f'step_00000{steps}', run.checkpoint\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "twice.py"]
    path = os.pathsep.join([str(Path(mm_rec.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path("runs/stage1/checkpoints/step_000002").is_dir()
