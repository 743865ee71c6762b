"""Which implementation an op runs: the native library of its device, or the reference.

A native back end is one package per device type, :mod:`mm_rec.ops.cpu` and :mod:`mm_rec.ops.cuda`, with
one function ``load() -> Native`` that raises :class:`NativeUnavailableError` with the reason if it cannot run.
Back ends import this module and not the other way round: :mod:`mm_rec.ops` hands their ``load`` to :func:`register`.
It is called at most once per process, at the first op on that device, never at import.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mm_rec.errors import SettingError
from mm_rec.translation import Translatable, join_texts

__all__ = [
    "BACKENDS",
    "DeviceStatus",
    "Native",
    "NativeUnavailableError",
    "Status",
    "expect",
    "fits",
    "keeps_backend",
    "kernel",
    "register",
    "runs_fused",
    "runs_native",
    "status",
    "use_backend",
]

BACKENDS = ("native", "reference")
_NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16})
T = TypeVar("T")


class NativeUnavailableError(RuntimeError):
    """Raised if the native library of a device cannot be used; the message gives the reason and the remedy."""

    def __init__(self, template: str, /, **fields: object) -> None:
        super().__init__(Translatable(template, **fields))


@dataclass(frozen=True)
class Native:
    """A loaded native back end.

    Attributes:
        library: path of the shared library.
        level: what the kernels are compiled for, for example ``avx512`` or ``sm_90``.
        kernels: a function for each op name it serves, with the arguments of the op's schema.
        fits: whether the kernels of a memory op can run, by name, type, size of a head and number of taps (0
            for an op without); None if all can.
    """

    library: str
    level: str
    kernels: Mapping[str, Callable[..., Any]]
    fits: Callable[[str, torch.dtype, int, int], bool] | None = None


@dataclass(frozen=True)
class DeviceStatus:
    """What runs on one device type, and why."""

    device: str
    backend: str
    reason: str
    library: str | None = None
    level: str | None = None
    threads: int | None = None
    reference_ops: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.describe())

    def describe(self) -> Translatable:
        """Returns all of it in one line."""
        line = Translatable(
            "{device}: {backend} ({reason})", device=self.device, backend=self.backend, reason=Translatable(self.reason)
        )
        if self.backend != "native":
            return line
        parts = [Translatable("level {level}", level=self.level)]
        if self.threads is not None:
            parts.append(Translatable("{count} threads", count=self.threads))
        line = join_texts("; ", [line, join_texts(", ", [*parts, self.library or ""])])
        if self.reference_ops:
            ops = Translatable("in the reference: {ops}", ops=", ".join(self.reference_ops))
            line = join_texts("; ", [line, ops])
        return line


@dataclass(frozen=True)
class Status:
    """What :func:`status` returns: one entry per device type of this machine."""

    devices: tuple[DeviceStatus, ...]

    def __getitem__(self, device: str) -> DeviceStatus:
        for entry in self.devices:
            if entry.device == device:
                return entry
        raise KeyError(device)

    def __str__(self) -> str:
        return "\n".join(map(str, self.devices))


class _Forced(threading.local):  # not a ContextVar: torch.compile cannot trace those
    name: str | None = None


_forced = _Forced()
_loaders: dict[str, Callable[[], Native]] = {}  # per device type
_expected: set[str] = set()
_loaded: dict[str, Native | str] = {}  # per device type: the back end, or why there is none
_warned: set[str] = set()
_load_lock = threading.Lock()


def register(device_type: str, load: Callable[[], Native]) -> None:
    """Let ``load`` give the native back end of a device type; it is called when the first op needs it."""
    _loaders[device_type] = load


def expect(*ops: str) -> None:
    """Count ``ops`` among those that every native back end should serve: :func:`status` names the ones it lacks."""
    _expected.update(ops)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force ``"native"`` or ``"reference"`` inside a ``with`` block, for this thread only.

    None leaves the choice as it is. Wins over the environment variable ``MM_REC_BACKEND``. A function compiled
    by ``torch.compile`` keeps the choice that it was traced with.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    before = _forced.name
    _forced.name = before if name is None else name
    try:
        yield
    finally:
        _forced.name = before


def keeps_backend(function: Callable[..., T]) -> Callable[..., T]:
    """Returns ``function`` with the choice of :func:`use_backend` as it is now, whatever thread calls it and when.

    The backward pass on a GPU runs in a thread of its own, and what gradient checkpointing runs again there has to be
    what ran before.
    """
    name = _forced.name

    def call(*arguments: Any) -> T:
        with use_backend(name):
            return function(*arguments)

    return call


def _from_environment() -> str | None:
    name = os.environ.get("MM_REC_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise SettingError(
            "MM_REC_BACKEND must be one of {choices}, got {name!r}", choices=", ".join(BACKENDS), name=name
        )
    return name


def _load(device_type: str) -> Native | str:
    with _load_lock:
        if device_type not in _loaded:
            if device_type not in _loaders:
                _loaded[device_type] = Translatable(
                    "no native kernels are written for {device} devices", device=device_type
                )
            else:
                try:
                    _loaded[device_type] = _loaders[device_type]()
                except NativeUnavailableError as error:
                    _loaded[device_type] = error.args[0]
        return _loaded[device_type]


def _native_serves(op: str, device_type: str, forced: str | None) -> bool:
    """Whether the native library of ``device_type`` has ``op``; warns once if there is no library.

    Raises:
        NativeUnavailableError: the library lacks the op, or there is none, and ``native`` is forced.
    """
    loaded = _load(device_type)
    if isinstance(loaded, Native):
        if op in loaded.kernels or forced is None:
            return op in loaded.kernels
        loaded = Translatable("{library} has no kernel for {op}", library=loaded.library, op=op)
    if forced == "native":
        raise NativeUnavailableError("the native back end is forced but cannot run: {loaded}", loaded=loaded)
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            Translatable(
                "mm_rec runs its slow reference ops on {device_type}: {loaded}", device_type=device_type, loaded=loaded
            ),
            RuntimeWarning,
            stacklevel=4,
        )
    return False


def _native_has(op: str, device_type: str) -> bool:
    """Whether the native library of ``device_type`` is there and has ``op``."""
    loaded = _load(device_type)
    return isinstance(loaded, Native) and op in loaded.kernels


def _native_fits(op: str, device_type: str, dtype: torch.dtype, dim: int, taps: int, forced: str | None) -> bool:
    """Whether the kernels of a memory op fit the device; warns once of each that does not.

    Raises:
        NativeUnavailableError: they don't fit, and ``native`` is forced.
    """
    loaded = _load(device_type)
    if not isinstance(loaded, Native) or loaded.fits is None or loaded.fits(op, dtype, dim, taps):
        return True
    kind = str(dtype).removeprefix("torch.")
    size = Translatable("heads of {dim}", dim=dim)
    if taps:
        size = Translatable("{heads} and {taps} taps", heads=size, taps=taps)
    problem = Translatable(
        "{op} with {size} in {kind} needs more shared memory than this GPU has", op=op, size=size, kind=kind
    )
    if forced == "native":
        raise NativeUnavailableError("the native back end is forced but cannot run: {problem}", problem=problem)
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(
            Translatable("mm_rec runs a slow reference op: {problem}", problem=problem), RuntimeWarning, stacklevel=4
        )
    return False


# The same as torch.compiler.assume_constant_result, which would import the compiler: two seconds at every start.
_native_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]
_native_has._dynamo_marked_constant = True  # type: ignore[attr-defined]
_native_fits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_native(op: str, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether ``op`` on these floating-point inputs runs natively; only float32 and bfloat16 ever do."""
    if x.dtype not in _NATIVE_DTYPES or any(y is not None and y.dtype not in _NATIVE_DTYPES for y in others):
        return False
    forced = _forced.name or _from_environment()
    return forced != "reference" and _native_serves(op, x.device.type, forced)


def fits(op: str, x: torch.Tensor, dim: int, taps: int = 0) -> bool:
    """Whether a memory op that runs natively fits the device of ``x``, given the size of a head and its taps if any."""
    return _native_fits(op, x.device.type, x.dtype, dim, taps, _forced.name or _from_environment())


def runs_fused(op: str, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the fused ``op`` runs on these floating-point inputs; where it does not, the ops it is made of run."""
    if x.dtype not in _NATIVE_DTYPES or any(y is not None and y.dtype not in _NATIVE_DTYPES for y in others):
        return False
    return (_forced.name or _from_environment()) != "reference" and _native_has(op, x.device.type)


def kernel(op: str, device_type: str) -> Callable[..., Any]:
    """Returns the native function of ``op`` on a device type.

    Raises:
        NativeUnavailableError: there is none.
    """
    loaded = _load(device_type)
    if isinstance(loaded, str):
        raise NativeUnavailableError(loaded)
    if op not in loaded.kernels:
        raise NativeUnavailableError("{library} has no kernel for {op}", library=loaded.library, op=op)
    return loaded.kernels[op]


def _device_status(device_type: str) -> DeviceStatus:
    forced = _forced.name or _from_environment()
    if forced == "reference":
        return DeviceStatus(device_type, "reference", Translatable("forced"))
    loaded = _load(device_type)
    if isinstance(loaded, str):
        return DeviceStatus(device_type, "reference", loaded)
    return DeviceStatus(
        device_type,
        "native",
        Translatable("forced") if forced else Translatable("the library is there"),
        library=loaded.library,
        level=loaded.level,
        threads=torch.get_num_threads() if device_type == "cpu" else None,
        reference_ops=tuple(sorted(_expected - loaded.kernels.keys())),
    )


def status() -> Status:
    """Returns what runs on each device type of this machine, and why. Loads the libraries, warns of nothing."""
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return Status(tuple(_device_status(device_type) for device_type in device_types))
