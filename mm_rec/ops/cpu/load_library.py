"""Loads the library of CPU kernels with ctypes and picks the level that the processor can run."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch  # loads its OpenMP runtime, whose threads the kernels run in

from mm_rec import system
from mm_rec.cpp.build import CPU_LIBRARY, LEVELS, REBUILD, hash_of_sources
from mm_rec.errors import SettingError
from mm_rec.ops.backend import NativeUnavailableError

__all__ = ["LIBRARY_PATH", "CpuLibrary", "openmp_runtimes"]

LIBRARY_PATH = Path(__file__).resolve().parents[2] / "cpp" / CPU_LIBRARY

_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
# Arguments of each function of mm_rec/cpp/src/kernels.cpp, then its result: p pointer, n int64, i int, f float,
# d double, - nothing.
_SIGNATURES = {
    "scan_forward": ("nnn pn pn p p p i", "-"),
    "scan_backward": ("nnn pn p pn p p p p p i", "-"),
    "recurrence_forward": ("i nnnn pn pn pn p p p p p i", "i"),
    "recurrence_groups": ("nn", "n"),
    "recurrence_backward": ("i nnnn pn pn pn p p p p pn p p p p p p i", "i"),
    "mdi_forward": ("i nn pn p pn pn p p p i", "-"),
    "mdi_backward_scratch": ("nn", "n"),
    "mdi_backward": ("i nn pn pn pn p pn pn p p p p p p p i", "-"),
    "gated_scan_forward": ("i nnnn ppp n pn p p p p p p i", "-"),
    "gated_scan_backward": ("i nnnn ppp n pn p p p p p pn p ppp n p p p p i", "i"),
    "rms_norm_forward": ("ii nn pnnn p i", "-"),
    "rms_norm_backward": ("ii nn pnnn pnnn p i", "-"),
    "add_rms_norm_forward": ("i nn pn pn p p i", "-"),
    "add_rms_norm_backward": ("i nn pn pn p p p i", "-"),
    "readout_forward": ("i nnn pn pn p i", "-"),
    "readout_backward": ("i nnn pn pn pn p p i", "-"),
    "relu_squared_forward": ("i n p p i", "-"),
    "relu_squared_backward": ("i n p p p i", "-"),
    "window_attention": ("i nnnnn p pnn pnn pnn pp p p i", "i"),
    "window_attention_backward": ("i nnnnn p pnn pnn pnn pp pnn p p ppp i", "i"),
    "retain": ("nnnnn p pp pp i", "i"),
    "retained_attention": ("i nnnnnn p pnn pnn pnn ppp ppp p p i", "i"),
    "retained_attention_backward": ("i nnnnnn p pnn pnn pnn ppp ppp pnn p p pppp ppp i", "i"),
    "mixed_keys": ("i nnnnnn p pnn p p i", "i"),
    "mixed_keys_backward": ("i nnnnnn p pnn p pnn pp i", "i"),
    "cross_entropy": ("i nn p p p p i i", "i"),
    "adamw_many": ("n p ppp pp p p i", "-"),
    "muon_momentum": ("n p pp p p i f f i", "-"),
    "muon_step": ("n p p p i p p i", "-"),
    "sum_of_squares": ("n p p p i", "d"),
    "tile_product": ("i nnn pni pni pn i i", "i"),
    "vector_product": ("i nnn pni pni pn i i", "i"),
    "tile_orthogonalize": ("n p p p n p n i", "i"),
    "vector_orthogonalize": ("n p p p n p n i", "i"),
    "step_scratch": ("p n i", "n"),
    "step": ("p p n p p p i", "i"),
    "pack_layout": ("nn p p p i", "n"),
    "pack": ("nn p p p p i", "-"),
    "sample_scratch": ("n i", "n"),
    "sample": ("nn pn p p p i", "-"),
}
OF_TILES = ("tile_product", "tile_orthogonalize")


class CpuLibrary:
    """The loaded library at one level.

    Attributes:
        path: of the shared library.
        best_level, level: what the processor can run, and what was chosen; of :data:`mm_rec.cpp.build.LEVELS`.
        threads: "OpenMP" or "own": whose threads the kernels run in; see ``src/parallel.cpp``.
        call: the functions of ``kernels.cpp`` as attributes, without prefix and level.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open the library.

        Raises:
            NativeUnavailableError: it is missing, broken, or built from other sources than those installed.
        """
        self.path = path or LIBRARY_PATH
        if not self.path.exists():
            raise NativeUnavailableError("the native library is not built; build it with: {command}", command=REBUILD)
        try:
            library = ctypes.CDLL(str(self.path))
            library.mm_rec_sources.restype = ctypes.c_uint64
            sources = library.mm_rec_sources()
            best = library.mm_rec_best_level()
        except (OSError, AttributeError) as error:
            raise NativeUnavailableError(
                "the native library is broken ({error}); rebuild it with: {command}", error=error, command=REBUILD
            ) from None
        if sources != hash_of_sources("cpu"):
            raise NativeUnavailableError(
                "the native library was built from other sources than those installed; rebuild it with: {command}",
                command=REBUILD,
            )
        self.best_level = LEVELS[best]
        self.level = _choose_level(best)
        self._use_openmp = library.mm_rec_use_openmp
        self._use_openmp.argtypes = [ctypes.c_char_p]
        self.threads = "OpenMP" if self.use_openmp(_wants_openmp()) else "own"
        self.call = SimpleNamespace()
        for name, (arguments, result) in _SIGNATURES.items():
            try:
                function = library[f"mm_rec_{name}_{_compiled_for(name, self.level)}"]
            except AttributeError as error:
                raise NativeUnavailableError(
                    "the native library is broken ({error}); rebuild it with: {command}", error=error, command=REBUILD
                ) from None
            function.argtypes = [_TYPES[code] for code in arguments.replace(" ", "")]
            function.restype = None if result == "-" else _TYPES[result]
            setattr(self.call, name, function)

    def use_openmp(self, wanted: bool, user: str = torch._C.__file__) -> bool:
        """Run the kernels in the threads of the OpenMP runtime that ``user``, a loaded library, was linked with.

        They run in threads of their own if it has none, or if OpenMP is not wanted. Returns whether they are OpenMP's.
        """
        return bool(self._use_openmp(os.fsencode(user) if wanted else None))


def _compiled_for(name: str, level: str) -> str:
    """Returns the level whose function runs at ``level``: amx has its own matrix products, the rest is avx512bf16."""
    return "avx512bf16" if level == "amx" and name not in OF_TILES else level


def _wants_openmp() -> bool:
    """Returns whether threads of PyTorch's OpenMP are wanted, where there are any: not if MM_REC_THREADS is "own"."""
    name = os.environ.get("MM_REC_THREADS") or "openmp"
    if name not in ("openmp", "own"):
        raise SettingError("MM_REC_THREADS must be openmp or own, got {name!r}", name=name)
    return name == "openmp"


def _choose_level(best: int) -> str:
    """Returns the best level of the processor, or the lower one that MM_REC_CPU_LEVEL asks for."""
    name = os.environ.get("MM_REC_CPU_LEVEL")
    if not name:
        return LEVELS[best]
    if name not in LEVELS:
        raise SettingError(
            "MM_REC_CPU_LEVEL must be one of {choices}, got {name!r}", choices=", ".join(LEVELS), name=name
        )
    if LEVELS.index(name) > best:
        raise SettingError(
            "MM_REC_CPU_LEVEL={name}: this processor supports at most {choices}", name=name, choices=LEVELS[best]
        )
    return name


def openmp_runtimes() -> list[str]:
    """Returns the paths of the OpenMP runtimes in this process. Two of them compete for the cores with two pools."""
    return [path for path in system.loaded_files() if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
