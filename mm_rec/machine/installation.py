"""What is installed beside the package: compilers, its extras, and whether the hub of data sets answers."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution

from mm_rec.cpp.build import BuildError, cpu_compiler, cuda_compiler
from mm_rec.errors import PACKAGE, requirements_of
from mm_rec.storage.hub.client import within

__all__ = ["compilers", "hub_address", "missing_of_extras", "reach"]


def compilers() -> dict[str, str | None]:
    """Returns the command of the C++ and of the CUDA compiler that would be taken; None where there is none."""
    try:
        cpu: str | None = " ".join(cpu_compiler())
    except BuildError:
        cpu = None
    return {"C++": cpu, "CUDA": cuda_compiler()}


def missing_of_extras() -> dict[str, list[str]]:
    """Returns, for each extra of the package, which of its requirements are missing; nothing if it is not installed.

    ``dev`` is left out: it is for work on the package itself.
    """
    try:
        metadata = distribution(PACKAGE)
    except PackageNotFoundError:
        return {}
    names = [name for name in metadata.metadata.get_all("Provides-Extra") or [] if name != "dev"]
    return {name: [one for one in requirements_of(name) if not _is_installed(one)] for name in names}


def _is_installed(requirement: str) -> bool:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    try:
        distribution(name[0])
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

    def ask() -> str | None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:  # an answer, too
            return None
        except (OSError, ValueError) as error:
            return str(getattr(error, "reason", error))
        return None

    try:
        return within(seconds, ask)
    except TimeoutError:
        return f"no answer in {seconds:g} seconds"
