"""Training in several processes: the losses of one, the same checkpoints, exact resume."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mm_rec import checkpoint

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--use_synthetic", "--max_samples", "12", "--preset", "tiny", "--precision", "fp32", "--device", "cpu",
    "--batch_size", "4", "--seq_len", "32", "--accumulation", "2", "--eval_interval", "100", "--valid_bytes", "200",
    "--checkpoint_interval", "2", "--keep_checkpoints", "9", "--max_steps", "4",
]  # fmt: skip

# One interpreter imports everything once; its children, forked before PyTorch has a thread, are the processes.
RANKS = """
import os, sys
import mm_rec.scripts.train, mm_rec.scripts.training
from mm_rec import trainer
from mm_rec.cli import run_program
trainer.SAMPLE_TOKENS, trainer.draw_losses = 2, lambda *_: None
for size, port, last, arguments in eval(sys.argv[1]):
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        os.environ["MM_REC_MAX_STEPS"] = str(last)
        if size > 1:
            os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        code = run_program(lambda: mm_rec.scripts.train.main([*arguments, "--threads", "1"]))
        sys.stdout.flush()
        os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"processes ended with {codes}")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(folder: Path, *runs: tuple[int, str, int]) -> str:
    """Train one run after the other: number of processes, folder of runs, where to stop. Returns what was printed."""
    flags = [*FLAGS, "--data_dir", str(folder / "data")]
    calls = [(size, free_port(), last, [*flags, "--checkpoint_dir", str(folder / name)]) for size, name, last in runs]
    result = subprocess.run([sys.executable, "-c", RANKS, repr(calls)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(run: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (run / "stage1" / "loss_log.txt").read_text().splitlines()]


@pytest.mark.slow
def test_any_number_of_processes_trains_alike(tmp_path: Path) -> None:
    whole = [(1, "one", 4), (2, "two", 4), (4, "four", 4)]
    printed = train(tmp_path, *whole, (2, "stopped", 2), (2, "stopped", 4), (2, "moved", 2), (4, "moved", 4))
    assert printed.count("stage1: 4 steps done") == 5  # the first process alone speaks
    one = losses(tmp_path / "one")
    assert len(one) == 4
    for name in ("two", "four", "stopped", "moved"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=2e-5), name
        assert events(tmp_path / name).count("new run") == 1
    assert "processes was 2, is 4" in events(tmp_path / "moved")
    assert "not the same machine" not in events(tmp_path / "stopped")
    last = Path("stage1/checkpoints/step_000004")
    for file in ("model.safetensors", "optimizer.safetensors", "carried.safetensors", "trainer.json"):
        assert (tmp_path / "two" / last / file).read_bytes() == (tmp_path / "stopped" / last / file).read_bytes(), file
    assert checkpoint.load(tmp_path / "four" / last).trainer["runtime"]["processes"] == 4


def events(run: Path) -> str:
    return (run / "stage1" / "events.log").read_text()
