"""Work for the supervisor: commands of ``mm-rec`` in a process of their own, with a model of a few thousand numbers.

What goes wrong, and when, is said by :class:`When` so that it follows from a seed and not from the load of the machine:
the kernel sends the signal, a time after a function was called for the k-th time or after a share of the processor's
time that an undisturbed run takes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import itertools
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import changing
import psutil
from supervisor import clocks

from mm_rec import cli
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data import blocks
from mm_rec.data.batches import Batch
from mm_rec.data.synthetic import write_synthetic
from mm_rec.ops import backend
from mm_rec.scripts import finetune_command, train_command
from mm_rec.storage.checkpoint import list_checkpoints
from mm_rec.training import progress, run_estimate, trainer
from mm_rec.training.trainer import Trainer

LOADED_BEFORE_THE_FORK = (train_command, finetune_command)
"""Modules that a command imports when it is called: here once, not in each child."""
STAGES = ("stage1", "stage2", "stage3", "instruct", "chat")
CONFIG = ModelConfig(vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5)
STEPS, SAVE_EVERY, EVALUATE_EVERY = 10, 3, 4


@dataclass(frozen=True)
class When:
    """Send ``signals`` to this process, one every ``gap`` seconds, ``seconds`` after the ``count``-th call of ``what``.

    ``what`` is "module:function" or "module:Class.method". Empty stands for the start of the command, and then
    ``seconds`` are of processor time.
    """

    what: str
    count: int
    seconds: float
    signals: tuple[int, ...] = (signal.SIGKILL,)
    gap: float = 0.01


def write_data(folder: Path, documents: int = 12) -> None:
    """Data for every stage: documents and conversations."""
    write_synthetic(folder, documents)
    for task in ("instruct", "chat"):
        (folder / task).mkdir()
        rows = (
            f'{{"messages": [{{"role": "user", "content": "What is {i}?"}}, '
            f'{{"role": "assistant", "content": "It is {i * i}."}}]}}\n'
            for i in range(40)
        )
        (folder / task / "rows.jsonl").write_text("".join(rows))


def arguments(stage: str, data: Path, root: Path, start: Path | None, **changes: Any) -> list[str]:
    """The command line that trains ``stage`` in ``root``, from the weights in ``start``."""
    values = {
        "data_dir": data, "checkpoint_dir": root, "seq_len": 16, "max_steps": STEPS, "threads": 1, "device": "cpu",
        "checkpoint_interval": SAVE_EVERY, "eval_interval": EVALUATE_EVERY, "valid_bytes": 200,
    }  # fmt: skip
    if start is not None:
        values["init_from"] = start
    command = ["finetune", "--task", stage] if stage in STAGES[3:] else ["train", "--stage", stage, "--preset", "tiny"]
    for name, value in (values | changes).items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command


def run(
    command: list[str],
    when: dict[str, Any] | None = None,
    batches: str = "",
    faults: dict[str, str] | None = None,
    environment: dict[str, str] | None = None,
    change: dict[str, Any] | None = None,
) -> int:
    """Run ``mm-rec`` with these arguments; returns its exit code.

    Args:
        command: the arguments.
        when: a :class:`When` as a dictionary.
        batches: file to note the SHA-256 of every micro-batch in.
        faults: what goes wrong in the losses, by step, as for :func:`spoil_losses`.
        environment: variables to set.
        change: what to do to a file or folder, and when: the arguments of :func:`change_at`.
    """
    os.environ.update(environment or {})
    backend._loaded.clear()  # the process that this one was forked from may have chosen another level
    PRESETS["tiny"] = CONFIG
    trainer.SAMPLE_TOKENS = 3
    run_estimate.PROBE_PARAMETERS = 1000  # only times an update
    trainer.draw_losses = lambda *_: None  # type: ignore[assignment]
    if batches:
        note_batches(batches)
    if faults:
        spoil_losses({int(step): kind for step, kind in faults.items()})
    if when is not None:
        arm(When(**{**when, "signals": tuple(when["signals"])}))
    if change is not None:
        change_at(**change)
    start = time.process_time()
    code = cli.main(command)
    print(f"\nprocessor seconds: {time.process_time() - start}", flush=True)
    return code


def change_at(what: str, count: int, kind: str, path: str, small_blocks: bool = False) -> None:
    """Do :data:`changing.CHANGES` of a kind to ``path`` just before a call, as :func:`at_call`.

    With ``small_blocks`` prepared data are read from the disk for every row and stay in no memory.
    """
    if small_blocks:
        blocks._BLOCK_BYTES, blocks._CACHED_BLOCKS = 64, 1

    def do() -> None:
        changing.CHANGES[kind](Path(path))
        print(f"\nchanged {path}: {kind}", flush=True)

    at_call(what, count, do, to=Path(path))


def run_limited(command: list[str], n_bytes: int) -> int:
    """As :func:`run`, with ``n_bytes`` of address space left."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + n_bytes, hard))
    return run(command)


def as_argument(when: When) -> dict[str, Any]:
    return asdict(when)


def arm(when: When) -> None:
    """Make it happen."""
    if not when.what:
        send_later(when, time.CLOCK_PROCESS_CPUTIME_ID)
        return

    def set_timers() -> None:
        print("\narmed at {} {}".format(*clocks()), flush=True)
        send_later(when, time.CLOCK_MONOTONIC)

    at_call(when.what, when.count, set_timers)


def at_call(what: str, count: int, do: Callable[[], None], to: Path | None = None) -> None:
    """Let ``do`` be called just before the ``count``-th call of ``what``, which is named as in :class:`When`.

    With ``to``, it is called before the first call from the ``count``-th on for which this file or folder is there.
    """
    module, _, path = what.partition(":")
    *holders, name = path.split(".")
    holder = functools.reduce(getattr, holders, importlib.import_module(module))
    original, calls, done = getattr(holder, name), 0, False

    @functools.wraps(original)
    def counted(*args: Any, **keywords: Any) -> Any:
        nonlocal calls, done
        calls += 1
        if calls >= count and not done and (to is None or to.exists()):
            done = True
            do()
        return original(*args, **keywords)

    setattr(holder, name, counted)


class _Event(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("_", ctypes.c_char * 48),
    )


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Timer(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


def send_later(when: When, clock: int) -> None:
    """Have the kernel send the signals; no thread and no handler of this process is needed for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    for index, signum in enumerate(when.signals):
        timer = ctypes.c_void_p()
        nanoseconds = max(int((when.seconds + index * when.gap) * 1e9), 1)
        event = _Event(None, signum, 0)
        if libc.timer_create(clock, ctypes.byref(event), ctypes.byref(timer)):
            raise OSError(ctypes.get_errno(), "timer_create")
        at = _Timer(_Time(0, 0), _Time(nanoseconds // 10**9, nanoseconds % 10**9))
        if libc.timer_settime(timer, 0, ctypes.byref(at), None):
            raise OSError(ctypes.get_errno(), "timer_settime")


def note_batches(path: str) -> None:
    """Append step, part and SHA-256 of every micro-batch that is trained on to a file."""
    take, compute = Trainer._take_step, Trainer.micro_batch_loss
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    parts = itertools.count()

    def taken(self: Trainer) -> Any:
        nonlocal parts
        parts = itertools.count()
        return take(self)

    def noted(self: Trainer, batch: Batch, *args: Any) -> Any:
        digest = hashlib.sha256(f"{batch.domain}".encode())
        for tensor in (batch.tokens, batch.targets, batch.weight, batch.reset):
            digest.update(tensor.numpy().tobytes())
        if sys._getframe(1).f_code.co_name == "_take_step":  # not one that is only timed
            os.write(descriptor, f"{self.progress.step + 1} {next(parts)} {digest.hexdigest()}\n".encode())
        return compute(self, batch, *args)

    Trainer._take_step = taken  # type: ignore[method-assign]
    Trainer.micro_batch_loss = noted  # type: ignore[method-assign]


def spoil_losses(faults: dict[int, str]) -> None:
    """Make the loss or the gradient of some steps what it must not be, every time they are tried."""
    progress.HISTORY = 1  # a spike shows from the second loss of a domain on
    compute = Trainer.micro_batch_loss

    def spoiled(self: Trainer, *args: Any) -> Any:
        loss, state = compute(self, *args)
        match faults.get(self.progress.step + 1):
            case "nan loss":
                loss = loss + float("nan")
            case "inf loss":
                loss = loss + float("inf")
            case "spike":
                loss = loss + 1000.0
            case "nan gradient":  # of a loss that is finite: 0 / 0 in the derivative of the root
                some = next(one for one in self.model.parameters() if one.requires_grad)
                loss = loss + (some.sum() * 0).sqrt()
        return loss, state

    Trainer.micro_batch_loss = spoiled  # type: ignore[method-assign]


# --- what the trials compare ----------------------------------------------------------------------------------------


def result(run: Path) -> dict[str, bytes]:
    """Everything of a run that has to come out the same: records, samples, every file of every checkpoint."""
    files = [run / "loss_log.txt", run / "metrics.jsonl", *(run / "samples").iterdir()]
    files += [path for one in list_checkpoints(run / "checkpoints") for path in one.iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def difference(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Names of the files in which two results differ."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


def processor_seconds(log: str) -> float:
    return float(log.rpartition("processor seconds: ")[2].split()[0])


def armed_at(log: str) -> tuple[float, float]:
    """The clocks of a process when its signals were set."""
    assert "armed at " in log, log
    now, queued = log.partition("armed at ")[2].split()[:2]
    return float(now), float(queued)


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
