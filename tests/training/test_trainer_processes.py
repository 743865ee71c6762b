"""Training as users run it, in a process of its own that is killed, asked to stop, or run twice at once."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm_rec.data.synthetic import write_synthetic
from mm_rec.storage import checkpoint

STEPS = 14
PATIENCE = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    write_synthetic(path / "data", 40)
    return path


def start(folder: Path, name: str) -> "subprocess.Popen[str]":
    arguments = ["--preset", "tiny", "--seq_len", "48", "--checkpoint_interval", "4", "--eval_interval", "5"]
    arguments += ["--data_dir", str(folder / "data"), "--checkpoint_dir", str(folder / name)]
    arguments += ["--max_steps", str(STEPS), "--threads", "1", "--valid_bytes", "300", "--keep_checkpoints", "100"]
    return subprocess.Popen(
        [sys.executable, "-m", "mm_rec.scripts.train_cpu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def wait_for_step(process: "subprocess.Popen[str]", run: Path, step: int) -> None:
    """Until the step is logged, or the process ends."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        log = run / "loss_log.txt"
        if log.exists() and any(line.startswith(f"{step},") for line in log.read_text().splitlines()):
            return
        time.sleep(0.002)


def result(run: Path) -> dict[str, bytes]:
    """Everything of a run that has to come out the same: records, and every file of every checkpoint."""
    checkpoints = checkpoint.list_checkpoints(run / "checkpoints")
    files = [run / "loss_log.txt", run / "metrics.jsonl", *(run / "samples").iterdir()]
    files += [path for one in checkpoints for path in one.iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    code, output = finish(start(folder, "whole"))
    assert code == 0, output
    return result(folder / "whole" / "stage1")


def test_a_run_that_is_ended_again_and_again_comes_out_as_if_it_never_had_been(
    folder: Path, whole: dict[str, bytes]
) -> None:
    seed = 20
    chance = random.Random(seed)
    run = folder / "ended" / "stage1"
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
    for step, signum in zip(sorted(chance.sample(range(1, STEPS - 1), len(signals))), signals, strict=True):
        process = start(folder, "ended")
        wait_for_step(process, run, step)
        time.sleep(chance.random() * 0.03)  # into the save, the evaluation or the next step
        process.send_signal(signum)
        code, output = finish(process)
        if signum == signal.SIGKILL:
            assert code == -signum, output
            continue
        assert code == 128 + signum, output
        stopped = checkpoint.newest_valid(run / "checkpoints")
        assert stopped is not None
        assert checkpoint.checkpoint_step(stopped) >= step
        assert f"saved in {stopped}" in output
    code, output = finish(start(folder, "ended"))
    assert code == 0, output
    assert "goes on from" in output
    after = result(run)
    assert {name: after[name] for name in whole} == whole, f"seed {seed}"


def test_a_run_in_use_is_left_alone_and_two_signals_end_it_at_once(folder: Path) -> None:
    run = folder / "used" / "stage1"
    process = start(folder, "used")
    wait_for_step(process, run, 1)
    process.send_signal(signal.SIGSTOP)
    code, output = finish(start(folder, "used"))
    assert (code, output.count("error: ")) == (2, 1), output
    assert "in use" in output
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    code, output = finish(process)
    assert code in (130, 143), output
    assert checkpoint.newest_valid(run / "checkpoints") is not None
