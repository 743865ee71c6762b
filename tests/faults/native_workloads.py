"""Rows 13, 14: the native library missing, broken or at the level of an older processor; kernels under sanitizers."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from workload import Complete, Impossible, Trial, workload

from mm_rec.cpp.build import HERE, LEVEL_FLAGS, LEVELS, SHARED_SOURCES
from mm_rec.ops.cpu.load_library import LIBRARY_PATH, CpuLibrary

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "tests" / "cpp"
FUZZ_SECONDS = 60
PIECES = 10
"""For each kernel, so that it comes to ten minutes; the levels of this processor take turns."""


def kernels() -> dict[str, list[int]]:
    """The kernels of fuzz.cpp and the cases of its switch that are theirs, one for each type."""
    found: dict[str, list[int]] = {}
    for case, name in re.findall(r"case (\d+): fuzz_(\w+)", (FUZZ / "fuzz.cpp").read_text()):
        found.setdefault(name, []).append(int(case))
    return found


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _build_fuzzer(level: str) -> Path:
    """The program for a level; built once for these sources."""
    sources = [FUZZ / "fuzz_kernel.cpp", *(HERE / "src" / source for source in SHARED_SOURCES)]
    read = [*sorted((HERE / "src").glob("*.h")), FUZZ / "fuzz.cpp", *sources]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:12]
    program = ROOT / "build" / "fuzz" / f"{level}-{digest}" / "fuzz"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        flags = [
            "-std=c++17",
            "-O1",
            "-g",
            "-fno-sanitize-recover=all",
            "-fsanitize=fuzzer,address,undefined",
        ]
        command = ["clang++", *flags, *LEVEL_FLAGS[level], f"-DMM_LEVEL={level}", f"-I{HERE / 'src'}"]
        built = program.with_name(f"fuzz.{os.getpid()}")
        subprocess.run([*command, *map(str, sources), "-o", str(built), "-ldl", "-pthread"], check=True)
        built.rename(program)
    return program


@workload(
    14, "libFuzzer with ASan and UBSan on the kernels' headers", unit=f"runs of {FUZZ_SECONDS} s",
    quick=0, soak=len(kernels()) * PIECES,
)  # fmt: skip
def fuzzed_kernels(folder: Path) -> Iterator[Trial]:
    if shutil.which("clang++") is None:
        raise Impossible("clang++ is not installed")
    names, best = kernels(), LEVELS.index(CpuLibrary().best_level)

    def trial(seed: int) -> Mapping[str, int]:
        name = list(names)[seed % len(names)]
        level = LEVELS[best - seed // len(names) % (best + 1)]
        program = _build_fuzzer(level)
        corpus = program.with_name(name)
        corpus.mkdir(exist_ok=True)
        options = [f"-max_total_time={FUZZ_SECONDS}", "-max_len=128", f"-seed={seed + 1}", "-print_final_stats=1"]
        options += [f"-artifact_prefix={corpus}-", "-timeout=60", "-rss_limit_mb=3000"]
        environment = {"MM_REC_FUZZ_CASES": ",".join(map(str, names[name])), "OMP_WAIT_POLICY": "passive"}
        before = processor_seconds()
        result = subprocess.run(
            [str(program), *options, str(corpus)], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{name} at level {level}: {result.stderr[-3000:]}"
        executed = re.search(r"number_of_executed_units: (\d+)", result.stderr)
        assert executed is not None, result.stderr[-3000:]
        return {f"processor seconds of {name}": round(processor_seconds() - before), "inputs": int(executed[1])}

    yield trial


BROKEN = {"no library": None, "an empty library": b"", "a library that is none": b"not a library"}


@workload(
    13, "the whole suite with no native library, an empty and a broken one, and each processor level up to this one's",
    unit="suites", quick=0, soak=len(BROKEN) + len(LEVELS),
)  # fmt: skip
def suites_with_other_kernels(folder: Path) -> Iterator[Trial]:
    best = LEVELS.index(CpuLibrary().best_level)
    copy = folder / "copy"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)  # with its mode: scripts are run
    library = copy / LIBRARY_PATH.relative_to(ROOT)

    def trial(seed: int) -> str:
        if seed > len(BROKEN) + best:
            raise Complete
        environment = {**os.environ, "PYTHONPATH": str(copy), "MM_REC_REQUIRE_NATIVE": "1"}
        arguments = ["-q", "-p", "no:cacheprovider", "--ignore=tests/faults"]
        library.unlink(missing_ok=True)
        if seed < len(BROKEN):
            name = list(BROKEN)[seed]
            content = BROKEN[name]
            if content is not None:
                library.write_bytes(content)
            arguments.append("--ignore=tests/cpp")  # builds the library
            environment.pop("MM_REC_REQUIRE_NATIVE")
        else:
            environment["MM_REC_CPU_LEVEL"] = LEVELS[seed - len(BROKEN)]
            name = f"level {LEVELS[seed - len(BROKEN)]}"
            shutil.copyfile(LIBRARY_PATH, library)
        result = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=copy, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{name}: {result.stdout[-3000:]}"
        return f"{name}: {result.stdout.strip().splitlines()[-1].strip('= ')}"

    yield trial
