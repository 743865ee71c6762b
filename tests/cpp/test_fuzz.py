"""The kernels' headers under AddressSanitizer and UndefinedBehaviorSanitizer, at every level of this processor.

MM_REC_FUZZ_SECONDS sets the time per level; the soak gives it ten minutes, the test run a few seconds.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mm_rec.cpp.build import HERE, LEVEL_FLAGS, cpu_compiler
from mm_rec.ops.native import LEVELS, CpuLibrary

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.parametrize(
    "level",
    [LEVELS[0], pytest.param(LEVELS[1], marks=pytest.mark.slow), pytest.param(LEVELS[3], marks=pytest.mark.slow)],
)
def test_no_finding(level: str, tmp_path: Path) -> None:
    if LEVELS.index(level) > LEVELS.index(CpuLibrary().best_level):
        pytest.skip("this processor stops before")
    program = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp", *SANITIZE, *LEVEL_FLAGS[level], f"-DMM_LEVEL={level}"]
    source = Path(__file__).with_name("fuzz.cpp")
    command = [cpu_compiler(), *flags, "-DMM_STANDALONE", f"-I{HERE / 'src'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    seconds = os.environ.get("MM_REC_FUZZ_SECONDS", "3")
    result = subprocess.run(
        [str(program), seconds, "1"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("runs\n")
