"""The kernels' headers under AddressSanitizer and UndefinedBehaviorSanitizer, at the lowest and the highest level here.

A few seconds each; the soak gives every kernel ten minutes, with libFuzzer and at all levels (``faults/``, row 14).
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mm_rec.cpp.build import HERE, LEVEL_FLAGS, LEVELS, SHARED_SOURCES, cpu_compiler
from mm_rec.ops.cpu.load_library import CpuLibrary

# Without optimization: it would take the compiler twice as long, and save a few seconds of the runs.
FLAGS = ["-std=c++17", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SECONDS = "8"
# GCC 13 looks for uses after return by default, on a stack that it does not align for 64-byte vectors (its PR 110027).
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "ASAN_OPTIONS": "detect_stack_use_after_return=0"}


@pytest.mark.native
@pytest.mark.slow
def test_no_finding(tmp_path: Path) -> None:
    levels = {LEVELS[0], CpuLibrary().best_level}

    def build(level: str) -> None:
        command = [*cpu_compiler(), *FLAGS, *LEVEL_FLAGS[level], f"-DMM_LEVEL={level}", "-DMM_STANDALONE"]
        sources = [Path(__file__).with_name("fuzz.cpp"), *(HERE / "src" / source for source in SHARED_SOURCES)]
        command += [f"-I{HERE / 'src'}", *map(str, sources), "-o", str(tmp_path / level), "-ldl", "-pthread"]
        subprocess.run(command, check=True, capture_output=True)

    with ThreadPoolExecutor() as pool:  # half a minute of the compiler each
        list(pool.map(build, levels))
    for level in levels:
        command = [str(tmp_path / level), SECONDS, "1"]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
        assert result.returncode == 0, f"{level}: {result.stderr[-3000:]}"
        assert result.stdout.endswith("runs\n")
