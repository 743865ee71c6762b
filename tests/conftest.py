"""What every test needs: a cache of its own, so that none reads or writes the user's. And what some need of a machine.

Tests marked ``gpu`` are skipped where there is no CUDA device. Tests marked ``native`` are skipped where the CPU
kernels cannot be used, as on a machine without a compiler, and fail there if MM_REC_REQUIRE_NATIVE is set, as
``.ci/run`` does.

MM_REC_TEST_SYSTEM=bare runs all tests on a system that plays Windows, as ``tests/system/bare/sitecustomize.py`` says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if os.environ.get("MM_REC_TEST_SYSTEM") == "bare":  # before the package is imported, and in every process of the tests
    BARE = str(Path(__file__).parent / "system" / "bare")
    os.environ["PYTHONPATH"] = os.pathsep.join([BARE, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, BARE)
    sys.modules.pop("sitecustomize", None)
    import sitecustomize  # noqa: F401

os.environ["MM_REC_LANG"] = "en"  # whatever the locale of this machine
if "PYTEST_XDIST_WORKER" in os.environ:  # before OpenMP is loaded: its threads spin, and processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from mm_rec import ops
from mm_rec.ops import backend


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def load_level() -> Iterator[Callable[[str], None]]:
    """Gives a function that has the CPU kernels of a level run to the end of the test, in this process."""
    with pytest.MonkeyPatch.context() as patch:

        def load(level: str) -> None:
            patch.setenv("MM_REC_CPU_LEVEL", level)
            backend._loaded.pop("cpu", None)

        yield load
    backend._loaded.pop("cpu", None)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a test, which may need the kernels too
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("native"):
        status = ops.status()["cpu"]
        if status.backend != "native":
            reason = f"needs the native CPU kernels: {status.reason}"
            if os.environ.get("MM_REC_REQUIRE_NATIVE"):
                pytest.fail(f"{reason} (MM_REC_REQUIRE_NATIVE is set)", pytrace=False)
            pytest.skip(reason)
