"""Installs the package with its native kernels; everything else is in pyproject.toml.

MM_REC_BUILD says which: ``cpu``, those of the CPU (where nothing is said); ``all``, those of CUDA too where nvcc is,
which takes many minutes; ``pure``, none, for a package without libraries, which runs everywhere, but far slower.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
KERNELS = os.environ.get("MM_REC_BUILD") or "cpu"
if KERNELS not in ("cpu", "all", "pure"):
    raise SystemExit(f"error: MM_REC_BUILD must be cpu, all or pure, got {KERNELS!r}")


class CleanBuild(build):
    """Starts from nothing: what an earlier build left would be packed, too."""

    def run(self) -> None:  # noqa: D102
        for folder in {self.build_lib, self.build_purelib, self.build_platlib}:
            shutil.rmtree(folder, ignore_errors=True)
        super().run()


class BuildKernels(build_ext):
    """Compiles the kernels. A package without them has to be asked for."""

    built: tuple[Path, ...] = ()

    def run(self) -> None:  # noqa: D102
        root = HERE if self.inplace or self.editable_mode else Path(self.build_lib)
        folder = root / "mm_rec" / "cpp"
        kernels = runpy.run_path(str(HERE / "mm_rec" / "cpp" / "build.py"))
        try:
            self.built = tuple(kernels["build_all"](folder) if KERNELS == "all" else [kernels["build_cpu"](folder)])
        except kernels["BuildError"] as error:
            raise SystemExit(
                f"error: the native kernels cannot be built: {error}\n"
                "To install without them, for far slower reference ops, set MM_REC_BUILD=pure"
            ) from None

    def get_outputs(self) -> list[str]:  # noqa: D102
        return [str(path) for path in self.built]

    def get_source_files(self) -> list[str]:  # noqa: D102
        sources = [path for folder in ("src", "cuda") for path in (HERE / "mm_rec" / "cpp" / folder).glob("*.*")]
        return [str(path.relative_to(HERE)) for path in sources]


class PlatformWheel(bdist_wheel):
    """A wheel for one platform, or with no libraries for any, and for every Python 3: they know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102
        target = super().get_tag()[2].replace("universal2", platform.machine())  # the compiler builds for one processor
        return "py3", "none", target


setup(
    # an extension marks the wheel as one of a platform
    ext_modules=[] if KERNELS == "pure" else [Extension("mm_rec.cpp.kernels", sources=[])],
    package_data={
        "mm_rec": ["py.typed"],
        "mm_rec.cpp": ["src/*", "cuda/*"],
        "mm_rec.serve": ["*.html"],
        "mm_rec.translation": ["*.po"],
    },
    cmdclass={"build": CleanBuild, "build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
