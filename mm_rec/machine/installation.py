"""What is installed beside the package: compilers, its extras, and whether the hub of data sets answers."""

from __future__ import annotations

import os
import re
import threading
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution

from mm_rec.cpp.build import BuildError, cpu_compiler, cuda_compiler

__all__ = ["compilers", "hub_address", "missing_of_extras", "reach"]

PACKAGE = "mm-rec"


def compilers() -> dict[str, str | None]:
    """Returns the command of the C++ and of the CUDA compiler that would be taken; None where there is none."""
    try:
        cpu: str | None = " ".join(cpu_compiler())
    except BuildError:
        cpu = None
    return {"C++": cpu, "CUDA": cuda_compiler()}


def missing_of_extras() -> dict[str, list[str]]:
    """Returns, for each extra of the package, those of its packages that are missing; nothing if it is not installed.

    ``dev`` is left out: it is for work on the package itself.
    """
    try:
        metadata = distribution(PACKAGE)
    except PackageNotFoundError:
        return {}
    names = metadata.metadata.get_all("Provides-Extra") or []
    requirements = metadata.requires or []
    return {name: sorted(_missing(name, requirements)) for name in names if name != "dev"}


def _missing(extra: str, requirements: list[str]) -> set[str]:
    """Returns what is missing of one extra, of lines like ``mm-rec[hf]>=1; extra == "eval"``."""
    found: set[str] = set()
    for line in requirements:
        if not re.search(rf"\bextra == ['\"]{extra}['\"]", line):
            continue
        parts = re.match(r"([\w.-]+)(?:\[([\w., -]*)\])?", line)
        assert parts is not None, line
        if parts[1] == PACKAGE:
            found.update(*(_missing(name.strip(), requirements) for name in parts[2].split(",")))
        elif not _is_installed(parts[1]):
            found.add(parts[1])
    return found


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def hub_address() -> str:
    """Returns the address of the hub that data sets come from."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def reach(address: str, seconds: float = 3.0) -> str | None:
    """Returns None if a server answers at an address, whatever it says, else what went wrong.

    Waits no longer than ``seconds``, also for a name server, whose own limit cannot be set.
    """
    problem: list[str | None] = [f"no answer in {seconds:g} seconds"]

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            problem[0] = None  # an answer, too
        except (OSError, ValueError) as error:
            problem[0] = str(getattr(error, "reason", error))
        else:
            problem[0] = None

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return problem[0]
