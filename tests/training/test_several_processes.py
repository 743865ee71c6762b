"""Training in several processes, the model whole in each or in parts: losses of one, same checkpoints, exact resume."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mm_rec.config import ModelConfig
from mm_rec.storage import checkpoint
from mm_rec.training.estimate import count_parameters, training_bytes, with_margin

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--use_synthetic", "--max_samples", "12", "--preset", "tiny", "--precision", "fp32", "--device", "cpu",
    "--batch_size", "4", "--seq_len", "32", "--accumulation", "2", "--eval_interval", "100", "--valid_bytes", "200",
    "--checkpoint_interval", "2", "--keep_checkpoints", "9", "--max_steps", "4",
]  # fmt: skip
FSDP = ["--parallel", "fsdp"]
LAST = Path("stage1/checkpoints/step_000004")

# One interpreter imports everything once; its children, forked before PyTorch has a thread, are the processes.
RANKS = """
import os, socket, sys
import torch._dynamo  # which the checkpointed pass of the estimate would import in each process
import mm_rec.scripts.train_command, mm_rec.training.load_data, mm_rec.training.run_stages, mm_rec.training.fsdp
from mm_rec.training import runtime, trainer
from mm_rec.program import run_program
trainer.SAMPLE_TOKENS, trainer.draw_losses = 2, lambda *_: None
measured = runtime.available_memory
for size, last, memory, arguments in eval(sys.argv[1]):
    runtime.available_memory = (lambda _, bytes=memory * size: bytes) if memory else measured
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # free, and still so at once
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        os.environ["MM_REC_MAX_STEPS"] = str(last)
        if size > 1:
            os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        code = run_program(lambda: mm_rec.scripts.train_command.main([*arguments, "--threads", "1"]))
        sys.stdout.flush()
        os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"processes ended with {codes}")
"""


class Run(NamedTuple):
    """One call: number of processes, folder of runs, where to stop, further flags, memory of a process if not all."""

    size: int
    folder: str
    last: int
    flags: Sequence[str] = ()
    memory: int | None = None


def train(folder: Path, *runs: Run) -> str:
    """Train one run after the other; returns what was printed."""
    flags = [*FLAGS, "--data_dir", str(folder / "data")]
    calls = [
        (run.size, run.last, run.memory, [*flags, "--checkpoint_dir", str(folder / run.folder), *run.flags])
        for run in runs
    ]
    result = subprocess.run([sys.executable, "-c", RANKS, repr(calls)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(run: Path, stage: str = "stage1") -> list[float]:
    return [float(line.split(",")[1]) for line in (run / stage / "loss_log.txt").read_text().splitlines()]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors", "carried.safetensors", "trainer.json"):
        assert (one / LAST / file).read_bytes() == (other / LAST / file).read_bytes(), file


@pytest.mark.slow
def test_any_number_of_processes_trains_alike(tmp_path: Path) -> None:
    whole = [Run(1, "one", 4), Run(2, "two", 4), Run(4, "four", 4)]
    stopped = [Run(2, "stopped", 2), Run(2, "stopped", 4), Run(2, "moved", 2), Run(4, "moved", 4)]
    half = ["--precision", "bf16", "--accumulation", "1"]  # gradients are averaged in bfloat16
    printed = train(tmp_path, *whole, *stopped, Run(1, "half", 4, half), Run(2, "half of two", 4, half))
    assert printed.count("stage1: 4 steps done") == 7  # the first process alone speaks
    one = losses(tmp_path / "one")
    assert len(one) == 4
    for name in ("two", "four", "stopped", "moved"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=2e-5), name
        assert events(tmp_path / name).count("new run") == 1
    assert losses(tmp_path / "half of two") == pytest.approx(losses(tmp_path / "half"), rel=1e-3)
    assert "processes was 2, is 4" in events(tmp_path / "moved")
    assert "not the same machine" not in events(tmp_path / "stopped")
    assert_same_checkpoint(tmp_path / "two", tmp_path / "stopped")
    runtime = checkpoint.load(tmp_path / "four" / LAST).trainer["runtime"]
    assert (runtime["processes"], runtime["parallel"]) == (4, "ddp")


@pytest.mark.slow
def test_sharded_models_train_alike(tmp_path: Path) -> None:
    """FSDP: the losses of one process, exact resume, and going on with more processes or with one."""
    runs = [
        Run(1, "one", 4),
        Run(2, "two", 4, FSDP),
        Run(2, "stopped", 2, FSDP),
        Run(2, "stopped", 4, FSDP),
        Run(2, "moved", 2, FSDP),
        Run(4, "moved", 4, FSDP),
        Run(2, "left", 2, FSDP),
        Run(1, "left", 4),
    ]
    printed = train(tmp_path, *runs)
    assert printed.count("2 processes (fsdp)") == 5
    assert printed.count("sample at step 4") == 5
    for name in ("two", "stopped", "moved", "left"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=2e-5), name
        assert events(tmp_path / name).count("new run") == 1
    assert "processes was 2, is 4" in events(tmp_path / "moved")
    assert "not the same machine" not in events(tmp_path / "stopped")
    assert_same_checkpoint(tmp_path / "two", tmp_path / "stopped")
    samples = [(tmp_path / name / "stage1/samples/step_000004.txt").read_text() for name in ("one", "two", "stopped")]
    assert samples[0] == samples[1] == samples[2]


@pytest.mark.slow
def test_matrices_are_orthogonalised_alike(tmp_path: Path) -> None:
    """Dealt out to the processes, whole or gathered from their parts: losses of one process, and exact resume."""
    muon = ["--optimizer", "muon"]
    runs = [Run(1, "one", 4, muon), Run(2, "two", 4, muon), Run(2, "parts", 4, [*muon, *FSDP])]
    stopped = [Run(2, "stopped", 2, [*muon, *FSDP]), Run(2, "stopped", 4, [*muon, *FSDP])]
    train(tmp_path, *runs, *stopped, Run(3, "three", 4, [*muon, "--batch_size", "3"]), Run(1, "adamw", 4))
    one = losses(tmp_path / "one")
    assert one != pytest.approx(losses(tmp_path / "adamw"), rel=1e-3)
    for name in ("two", "parts"):  # directions are rounded to bfloat16 where it has products, so a bit may change more
        assert losses(tmp_path / name) == pytest.approx(one, rel=1e-3), name
    assert_same_checkpoint(tmp_path / "parts", tmp_path / "stopped")
    assert len(losses(tmp_path / "three")) == 4  # and some processes have more matrices than others


@pytest.mark.slow
def test_fusion_in_several_processes(tmp_path: Path) -> None:
    """Steps of the fusion alone, then of all, with the state carried; whole, by FSDP, and by FSDP by itself."""
    whole = with_margin(training_bytes(count_parameters(ModelConfig.preset("tiny")), "fp32"), 0)
    stage3 = ["--stage", "stage3", "--init_from", str(tmp_path / "one" / "stage1"), "--accumulation", "1"]
    runs = [
        Run(1, "one", 4),
        Run(1, "one", 4, stage3),
        Run(2, "ddp", 4, stage3),
        Run(4, "fsdp", 4, [*stage3, *FSDP]),
        Run(4, "auto", 2, stage3, whole - 1),  # bytes: too few for the whole model
        Run(
            4,
            "auto",
            4,
            ["--resume_from", str(tmp_path / "auto" / "stage3"), "--stage", "stage3", "--accumulation", "1"],
        ),
    ]
    train(tmp_path, *runs)
    for name, parallel in (("ddp", "ddp"), ("fsdp", "fsdp"), ("auto", "fsdp")):
        assert losses(tmp_path / name, "stage3") == pytest.approx(losses(tmp_path / "one", "stage3"), rel=2e-5), name
        last = checkpoint.load(tmp_path / name / "stage3" / LAST.relative_to("stage1"))
        assert last.trainer["runtime"]["parallel"] == parallel


@pytest.mark.gpu
def test_training_on_gpus(tmp_path: Path) -> None:
    """The command itself, by CUDA graphs: losses of the CPU, on one GPU and on two, whole and by FSDP; resuming."""
    cuda = ["--device", "cuda"]
    runs = [Run(1, "cpu", 4), Run(1, "one", 4, cuda)]
    if torch.cuda.device_count() > 1:
        runs += [Run(2, "ddp", 4, cuda), Run(2, "fsdp", 4, [*cuda, *FSDP])]
        runs += [
            Run(2, "stopped", 2, cuda),
            Run(2, "stopped", 4, cuda),
            Run(2, "moved", 2, cuda),
            Run(1, "moved", 4, cuda),
        ]
    train(tmp_path, *runs)
    for run in runs[1:]:
        assert losses(tmp_path / run.folder) == pytest.approx(losses(tmp_path / "cpu"), rel=2e-4), run.folder
    if torch.cuda.device_count() > 1:
        assert_same_checkpoint(tmp_path / "ddp", tmp_path / "stopped")


def events(run: Path) -> str:
    return (run / "stage1" / "events.log").read_text()
