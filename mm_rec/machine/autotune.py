"""Threads and precision for this machine's processor, from a second of measuring that is kept for the next time.

More threads are not always faster (two may share one matrix unit), and bfloat16 is only where the processor multiplies
it. So both are measured on a product of the model's size. What the user set wins and is not measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from mm_rec import ops
from mm_rec.cpp.build import hash_of_sources
from mm_rec.regular_file import read_regular
from mm_rec.storage.files import write_atomic
from mm_rec.system import cores

__all__ = ["Tuning", "cache_file", "threads_are_given", "tune"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MACHINE_VARIABLES = (
    *THREAD_VARIABLES, "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY"
)  # fmt: skip
ROUNDS = 7
TOKENS, WIDTH, HIDDEN = 1024, 512, 2048  # the widest product of a block of `100m`
FEWER_THREADS_PAY = 1.1
"""By how much fewer threads, or the other precision, have to be faster to be chosen."""
QUIET_LOAD = 0.5
"""Busy threads per core up to which a measurement says something about the machine."""


@dataclass(frozen=True)
class Tuning:
    """What was chosen, and the operations a second that it was chosen by (``bf16, 2 threads`` and the like)."""

    threads: int
    bf16: bool
    rates: Mapping[str, float]


def cache_file() -> Path:
    """Where measurements are kept, by machine: under XDG_CACHE_HOME, or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mm_rec" / "tuning.json"


def threads_are_given() -> bool:
    """Whether the user has set a number of threads, in the environment or by ``torch.set_num_threads``."""
    if any(os.environ.get(name) for name in THREAD_VARIABLES):
        return True
    return torch.get_num_threads() not in (cores(), psutil.cpu_count(logical=False), psutil.cpu_count())


@functools.lru_cache(maxsize=1)
def tune(has_bf16: bool) -> Tuning:
    """The choice for this machine, from the cache or measured now; threads and precision are left as they are.

    A busy machine is not measured: all threads, and bfloat16 if the processor has it.

    Args:
        has_bf16: whether the processor has instructions for bfloat16; if not, it is not tried.
    """
    threads = torch.get_num_threads()
    candidates = [threads] if threads_are_given() else sorted({threads, threads // 2, 1} - {0}, reverse=True)
    machine = _machine(candidates, has_bf16)
    kept = _read_cache()
    with contextlib.suppress(KeyError, TypeError):
        return Tuning(**kept[machine])
    if (len(candidates) == 1 and not has_bf16) or psutil.getloadavg()[0] > QUIET_LOAD * cores():
        return Tuning(threads, has_bf16, {})  # the rounding of a run must not hang on what else the machine does
    found = _choose(_measure(candidates, ["fp32", *(["bf16"] if has_bf16 else [])]), candidates, has_bf16)
    with contextlib.suppress(OSError):  # a home that cannot be written to costs a second at every start
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache_file(), (json.dumps({**kept, machine: asdict(found)}, indent=1) + "\n").encode())
    return found


def _machine(candidates: list[int], has_bf16: bool) -> str:
    """What a choice holds for."""
    facts: dict[str, Any] = {"cores": cores(), "threads": candidates, "bf16": has_bf16, "torch": torch.__version__}
    facts["capability"] = torch.backends.cpu.get_cpu_capability()
    facts["kernels"] = [ops.status()["cpu"].level, hash_of_sources("cpu")]
    facts |= {name: os.environ[name] for name in MACHINE_VARIABLES if os.environ.get(name)}
    return json.dumps(facts, sort_keys=True)


def _read_cache() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(read_regular(cache_file()))
        if isinstance(kept, dict):
            return kept
    return {}


def _measure(candidates: list[int], precisions: list[str]) -> dict[tuple[str, int], float]:
    """Operations a second of the best of some runs, by precision and threads; all take turns."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    before = torch.get_num_threads()
    best: dict[tuple[str, int], float] = {}
    operands = {
        name: (torch.ones(1, TOKENS, WIDTH, dtype=types[name]), torch.ones(HIDDEN, WIDTH, dtype=types[name]))
        for name in precisions
    }
    try:
        for turn in range(ROUNDS + 1):
            for threads in candidates:
                torch.set_num_threads(threads)
                for name, (x, weight) in operands.items():
                    start = time.perf_counter()
                    ops.linear(x, weight)
                    seconds = time.perf_counter() - start
                    if turn:
                        rate = 2.0 * TOKENS * WIDTH * HIDDEN / seconds
                        best[name, threads] = max(best.get((name, threads), 0.0), rate)
    finally:
        torch.set_num_threads(before)
    return best


def _choose(rates: dict[tuple[str, int], float], candidates: list[int], has_bf16: bool) -> Tuning:
    """Most threads unless fewer are clearly faster, and bfloat16 where it is."""
    most = candidates[0]
    bf16 = has_bf16 and rates["bf16", most] > FEWER_THREADS_PAY * rates["fp32", most]
    name = "bf16" if bf16 else "fp32"
    fewer = max(candidates, key=lambda threads: rates[name, threads])
    threads = fewer if rates[name, fewer] > FEWER_THREADS_PAY * rates[name, most] else most
    return Tuning(threads, bf16, {f"{key}, {count} threads": rate for (key, count), rate in rates.items()})
