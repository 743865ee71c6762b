"""Loads the library of CUDA kernels with ctypes and calls its functions."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_rec.cpp.build import CUDA_LIBRARY, REBUILD_CUDA, hash_of_sources
from mm_rec.ops.backend import NativeUnavailableError

__all__ = ["LIBRARY_PATH", "CudaLibrary", "DoesNotFitError", "cuda_library"]

LIBRARY_PATH = Path(__file__).resolve().parents[2] / "cpp" / CUDA_LIBRARY
_PREFIX = "mm_rec_cuda_"
_DOES_NOT_FIT = 20_000  # kDoesNotFit of mm_rec/cpp/cuda/launch.cuh


class DoesNotFitError(RuntimeError):
    """The device has too little shared memory for a kernel."""


def _argument(value: Any) -> Any:
    """Convert a value for the C interface, which takes void*, int64_t and double."""
    if isinstance(value, ctypes.Array):
        return value
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


class CudaLibrary:
    """The loaded library. Its functions only enqueue work; nothing here waits for the device."""

    def __init__(self, path: Path = LIBRARY_PATH) -> None:
        """Open the library.

        Raises:
            NativeUnavailableError: it is missing, broken, or built from other sources than those installed.
        """
        self.path = path
        if not path.exists():
            raise NativeUnavailableError(
                "the CUDA kernels are not built; with nvcc on PATH, build them with: {command}",
                command=REBUILD_CUDA,
            )
        try:
            self._library = ctypes.CDLL(str(path))
            self._error_string = self._library.mm_rec_cuda_error_string
            self._library.mm_rec_cuda_sources.restype = ctypes.c_uint64
            sources = self._library.mm_rec_cuda_sources()
        except (OSError, AttributeError) as error:
            raise NativeUnavailableError(
                "{path} cannot be used ({error}); rebuild it with: {command}",
                path=path,
                error=error,
                command=REBUILD_CUDA,
            ) from error
        if sources != hash_of_sources("cuda"):
            raise NativeUnavailableError(
                "{path} was built from other sources than those installed; rebuild it with: {command}",
                path=path,
                command=REBUILD_CUDA,
            )
        self._error_string.restype = ctypes.c_char_p

    def call(self, name: str, like: Tensor, *arguments: Any) -> None:
        """Enqueue the function ``mm_rec_cuda_<name>`` on the current stream of the device of ``like``.

        Raises:
            DoesNotFitError: the device has too little shared memory for it.
            RuntimeError: the kernel could not be started.
        """
        with torch.cuda.device(like.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            error = self._library[_PREFIX + name](*map(_argument, arguments), stream)
        if error == _DOES_NOT_FIT:
            raise DoesNotFitError(f"this GPU has too little shared memory for the CUDA kernel {name}")
        if error:
            raise RuntimeError(f"the CUDA kernel {name} did not start: {self._error_string(error).decode()}")

    def size(self, name: str, like: Tensor, *sizes: int) -> int:
        """Returns the size of the scratch memory of a function, from ``mm_rec_cuda_<name>_workspace``."""
        function = self._library[f"{_PREFIX}{name}_workspace"]
        function.restype = ctypes.c_int64
        with torch.cuda.device(like.device):
            return int(function(*map(ctypes.c_int64, sizes)))


@functools.cache
def cuda_library() -> CudaLibrary:
    """Returns the library of this process, opened at the first call.

    Raises:
        NativeUnavailableError: it cannot be used.
    """
    return CudaLibrary()
