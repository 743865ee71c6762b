"""What Linux tells of processes and machines in files; elsewhere these are missing, and nothing is known."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

__all__ = [
    "control_group_room",
    "flock_holder",
    "keep_freed_memory",
    "loaded_files",
    "most_resident",
    "processor_name",
]

_KEPT_BYTES = 2**31 - 1
"""Most that the C library's ``mallopt`` takes."""


def control_group_room() -> list[int]:
    """Returns the bytes that the control groups of this process leave, if they limit memory (version 2)."""
    room: list[int] = []
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        group = root / next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root) or not (folder / "memory.max").exists():
                continue
            limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
            if limit != "max":
                stat = (folder / "memory.stat").read_text(encoding="utf-8")
                counts = dict(line.split() for line in stat.splitlines())
                current = int((folder / "memory.current").read_text(encoding="utf-8"))
                room.append(int(limit) - (current - int(counts["inactive_file"])))
    return room


def flock_holder(descriptor: int) -> int | None:
    """Returns the process that holds the lock on an open file or folder; None if that cannot be told."""
    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if place in fields and "->" not in fields and "FLOCK" in fields:
                return int(fields[fields.index(place) - 1])
    return None


def keep_freed_memory() -> None:
    """Let the C library keep what tensors give back, so that the next step need not ask the system for it again.

    A step frees hundreds of megabytes, and every fresh page costs a fault and is filled with zeros: a tenth of a step
    of 1 x 256 tokens. Only glibc has the setting; MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ of the user win.
    """
    import ctypes

    if not sys.platform.startswith("linux") or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    for parameter, name in ((-1, "MALLOC_TRIM_THRESHOLD_"), (-3, "MALLOC_MMAP_THRESHOLD_")):
        if name not in os.environ:
            library.mallopt(parameter, _KEPT_BYTES)


def loaded_files() -> list[str]:
    """Returns the paths of the files, such as shared libraries, in the memory of this process; empty if unknown."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if line.count("/")})


def most_resident() -> int | None:
    """Returns the most bytes that this process had resident, without those of its parent; None if unknown."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8", errors="replace").splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def processor_name() -> str:
    """Returns the processor's name, where the system tells it, else its architecture."""
    import platform

    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
