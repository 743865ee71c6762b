"""Which implementation runs, and what happens when there is none."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from mm_rec import ops
from mm_rec.cpp.build import LEVELS, hash_of_sources
from mm_rec.ops import backend, reference
from mm_rec.ops.backend import NativeUnavailableError
from mm_rec.ops.cpu import load_library as library
from mm_rec.ops.cpu.load_library import CpuLibrary
from mm_rec.ops.cuda import load_library as cuda_library

from .cases import CASES
from .compare import assert_agree, run, tolerance, widen

ROOT = Path(__file__).resolve().parents[2]
A = torch.rand(1, 3, 4)


@pytest.mark.native
def test_status_says_what_runs() -> None:
    status = ops.status()["cpu"]
    assert status.backend == "native"
    assert status.level in LEVELS
    assert status.threads == torch.get_num_threads()
    assert status.library == str(library.LIBRARY_PATH)
    assert status.reference_ops == ()
    assert f"level {status.level}" in str(ops.status())


def test_status_says_why_not() -> None:
    with ops.use_backend("reference"):
        assert str(ops.status()["cpu"]) == "cpu: reference (forced)"
    with pytest.raises(KeyError):
        ops.status()["tpu"]


@pytest.mark.native
def test_choice_is_per_thread_and_nests() -> None:
    seen = {}
    with ops.use_backend("reference"):
        with ops.use_backend(None):
            seen["inner none"] = ops.status()["cpu"].backend
        with ops.use_backend("native"):
            seen["inner native"] = ops.status()["cpu"].backend
        thread = threading.Thread(target=lambda: seen.update(other=ops.status()["cpu"].backend))
        thread.start()
        thread.join()
        seen["outer"] = ops.status()["cpu"].backend
    assert seen == {"inner none": "reference", "inner native": "native", "other": "native", "outer": "reference"}
    with pytest.raises(ValueError, match="backend must be one of"), ops.use_backend("fast"):
        pass


@pytest.mark.native
@pytest.mark.parametrize("op", ["memory_attention", "mixed_keys"])
def test_a_memory_op_that_does_not_fit_runs_as_it_is_defined(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels always fit, so those of a GPU are played by a back end that says they don't."""
    asked = []

    def fits(*question: object) -> bool:
        asked.append(question)
        return False

    small = dataclasses.replace(backend._load("cpu"), fits=fits)  # type: ignore[type-var]
    monkeypatch.setitem(backend._loaded, "cpu", small)
    monkeypatch.setattr(backend, "_warned", set())
    arguments = next(iter(CASES[op].values()))(torch.float32)
    with pytest.warns(RuntimeWarning, match=f"runs a slow reference op: {op} with heads of") as warned:
        found = [getattr(ops, op)(*arguments) for _ in range(2)]
    assert len(warned) == 1
    want = getattr(reference, op)(*arguments)
    for one in found:
        pairs = zip(one, want, strict=True) if op == "memory_attention" else [(one, want)]
        assert all(torch.equal(x, y) for x, y in pairs)
    dim, taps = arguments[1].shape[1:] if op == "mixed_keys" else (arguments[0].shape[-1], 0)
    assert asked == [(op, torch.float32, dim, taps)] * 2
    with ops.use_backend("native"), pytest.raises(NativeUnavailableError, match="more shared memory"):
        getattr(ops, op)(*arguments)


def test_float64_takes_the_reference() -> None:
    with ops.use_backend("native"):
        assert ops.scan(A.double(), A).dtype == torch.float64


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which files are loaded")
def test_one_openmp_runtime() -> None:
    """The library must share PyTorch's runtime: two pools of threads would fight for the cores."""
    code = (
        "from mm_rec import ops; from mm_rec.ops.cpu.load_library import openmp_runtimes;"
        "ops.status(); print(len(openmp_runtimes()))"
    )
    result = _python(code)  # a process of its own: what other tests import may bring another runtime
    assert result.stdout == "1\n", result.stderr


def _python(code: str, emulator: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*emulator, sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@functools.cache  # for all levels
def _exact(op: str, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return run(getattr(reference, op), widen(CASES[op][name](dtype)))


@pytest.mark.native
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_agrees_with_the_reference(level: str, load_level: Callable[[str], None]) -> None:
    best = CpuLibrary().best_level
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this processor stops at {best}")
    load_level(level)
    for op, cases in CASES.items():
        for name, build in list(cases.items())[:4]:
            for dtype in (torch.float32, torch.bfloat16):
                with ops.use_backend("native"):
                    got = run(getattr(ops, op), build(dtype))
                assert_agree(got, _exact(op, name, dtype), tolerance(op, dtype))
    assert ops.status()["cpu"].level == level


SCAN = """  # without PyTorch, whose import takes minutes on an emulated processor
import array, ctypes, random
from mm_rec.cpp.build import CPU_LIBRARY, HERE, LEVELS
library = ctypes.CDLL(str(HERE / CPU_LIBRARY))
level = LEVELS[library.mm_rec_best_level()]
rows, width = 9, 40
a, x, s = (array.array("f", [random.random() for _ in range(rows * width)]) for _ in "axs")
scan, n, p = library[f"mm_rec_scan_forward_{level}"], ctypes.c_int64, ctypes.c_void_p
scan.argtypes, scan.restype = [n, n, n, p, n, p, n, p, p, p, ctypes.c_int], None
scan(1, rows, width, a.buffer_info()[0], width, x.buffer_info()[0], width, None, None, s.buffer_info()[0], 1)
expected = [0.0] * width
for row in range(rows):
    places = range(row * width, (row + 1) * width)
    expected = [a[i] * before + x[i] for i, before in zip(places, expected)]
    assert all(abs(s[i] - value) < 1e-5 for i, value in zip(places, expected))
print(level)
"""


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.parametrize(("processor", "level"), [("SandyBridge", "baseline"), ("Haswell", "avx2")])
def test_older_processors_run_the_level_they_have(processor: str, level: str) -> None:
    result = _python(SCAN, ["qemu-x86_64", "-cpu", processor])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == level


@pytest.mark.native
def test_levels_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_REC_CPU_LEVEL", "sse9")
    with pytest.raises(ValueError, match="MM_REC_CPU_LEVEL must be one of"):
        CpuLibrary()
    monkeypatch.setenv("MM_REC_CPU_LEVEL", "avx512")
    with pytest.raises(ValueError, match="supports at most baseline"):
        library._choose_level(0)


def test_environment_forces_the_reference() -> None:
    result = _python("from mm_rec import ops; print(ops.status())", MM_REC_BACKEND="reference", CUDA_VISIBLE_DEVICES="")
    assert result.stdout.strip() == "cpu: reference (forced)"
    result = _python("from mm_rec import ops; print(ops.status())", MM_REC_BACKEND="fast")
    assert "MM_REC_BACKEND must be one of" in result.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "is not built"), (b"not a library", "is broken"), (b"", "is broken")],
    ids=["missing", "garbage", "empty"],
)
def test_without_a_library(content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning that names the remedy, the reference's results, and an error only where native is forced."""
    if content is not None:
        (tmp_path / "library.so").write_bytes(content)
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "library.so")
    monkeypatch.setattr(backend, "_loaded", {})
    monkeypatch.setattr(backend, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [ops.scan(A, A) for _ in range(3)]
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert "python -m mm_rec.cpp.build" in str(caught[0].message)
    assert torch.equal(results[2], reference.scan(A, A))
    assert ops.status()["cpu"].backend == "reference"
    assert reason in ops.status()["cpu"].reason
    with pytest.raises(NativeUnavailableError, match=reason), ops.use_backend("native"):
        ops.scan(A, A)


@pytest.mark.native
def test_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "hash_of_sources", lambda kernels: 0)
    with pytest.raises(NativeUnavailableError, match=r"from other sources .* python -m mm_rec\.cpp\.build$"):
        CpuLibrary()


@pytest.mark.parametrize(("built_from", "refused"), [(0, True), (hash_of_sources("cuda"), False)])
def test_cuda_library_of_another_version(
    built_from: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = SimpleNamespace(mm_rec_cuda_error_string=Mock(), mm_rec_cuda_sources=Mock(return_value=built_from))
    monkeypatch.setattr(cuda_library.ctypes, "CDLL", lambda path: played)
    (tmp_path / "library.so").touch()
    with (
        pytest.raises(NativeUnavailableError, match=r"from other sources .* python -m mm_rec\.cpp\.build cuda$")
        if refused
        else nullcontext()
    ):
        cuda_library.CudaLibrary(tmp_path / "library.so")


def test_importing_loads_nothing() -> None:
    result = _python("import mm_rec.ops; print('libmm_rec' in open('/proc/self/maps').read())")
    assert result.stdout.strip() == "False", result.stderr


WRONG = [
    ("scan", 0, lambda x: x.long(), "a must be floating-point"),
    ("scan", 0, lambda x: x[0], "a must have 3 axes"),
    ("scan", 0, lambda x: x[:, :0], "a is empty"),
    ("scan", 1, lambda x: x[:, :-1], "x must have shape"),
    ("scan", 1, lambda x: x.to("meta"), "x is on meta"),
    ("scan", 2, lambda x: x[:, :-1], "s0 must have shape"),
    ("scan", 3, lambda x: x.float(), "reset must be torch.bool"),
    ("recurrence", 1, lambda x: x[:1], "u must have shape"),
    ("recurrence", 2, lambda x: x.int(), "gamma must be floating-point"),
    ("recurrence", 3, lambda x: x[:-1], "w_g must be"),
    ("recurrence", 3, lambda x: x[:, :-1], "w_g must"),
    ("recurrence", 4, lambda x: x[0], "h0 must have shape"),
    ("mdi", 1, lambda x: x[:-1], "decay_bias must have shape"),
    ("mdi", 4, lambda x: None, "gate_logits and gate_bias"),
    ("readout", 2, lambda x: x + 0.5 if False else 1000, "heads must divide"),
    ("rms_norm", 0, lambda x: x.bool(), "x must be floating-point"),
    ("add_rms_norm", 1, lambda x: x[..., :-1], "delta must have shape"),
    ("relu_squared", 0, lambda x: [1.0], "x must be a tensor"),
    ("memory_attention", 0, lambda x: x[:, :, :-1], "q must have shape"),
    ("memory_attention", 1, lambda x: x[:, -150:], "k must hold a window"),
    ("memory_attention", 2, lambda x: x[:, :-1], "v must have shape"),
    ("memory_attention", 3, lambda x: x[:, 1:], "score must have shape"),
    ("memory_attention", 4, lambda x: x.int(), "position must be torch.int64"),
    ("memory_attention", 4, lambda x: x[:1], r"position must be \(2, T\)"),
    ("memory_attention", 5, lambda x: x[:, :, 0], "kept_k must have 4 axes"),
    ("memory_attention", 6, lambda x: x[:, :, 1:], "kept_v must have shape"),
    ("memory_attention", 7, lambda x: x[:, :, 1:], "kept_score must have shape"),
    ("mixed_keys", 0, lambda x: x[0], "k must have 4 axes"),
    ("mixed_keys", 1, lambda x: x[:, :-1], "taps must have shape"),
    ("mixed_keys", 1, lambda x: x[..., :1].expand(-1, -1, 130), "taps must reach back at most the window of 128"),
    ("linear_cross_entropy", 1, lambda x: x[:, :-1], "embedding must have shape"),
    ("linear_cross_entropy", 2, lambda x: x.float(), "targets must be torch.int64"),
    ("linear_cross_entropy", 3, lambda x: x[:-1], "weight must have shape"),
    ("linear_cross_entropy", 3, lambda x: x.requires_grad_(), "weight must not require"),
]


@pytest.mark.parametrize(("op", "index", "spoil", "message"), WRONG)
def test_wrong_arguments_are_named(op: str, index: int, spoil: object, message: str) -> None:
    """The same errors whichever implementation would have run."""
    arguments = list(list(CASES[op].values())[3 if len(CASES[op]) > 3 else 1](torch.float32))
    arguments[index] = spoil(arguments[index])  # type: ignore[operator]
    for name in backend.BACKENDS:
        with pytest.raises((TypeError, ValueError), match=message), ops.use_backend(name):
            getattr(ops, op)(*arguments)


@pytest.mark.native
def test_impossible_positions() -> None:
    arguments = list(CASES["memory_attention"]["first-token"](torch.float32))
    arguments[4] = arguments[4] - 1
    with pytest.raises(ValueError, match="position must not be negative"), ops.use_backend("native"):
        ops.memory_attention(*arguments)
