"""Installs the package with its native kernels; everything else is in pyproject.toml."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


class BuildKernels(build_ext):
    """Compiles the kernels. Without a compiler the package still installs and runs its reference ops."""

    def run(self) -> None:  # noqa: D102
        folder = HERE if self.inplace or self.editable_mode else Path(self.build_lib)
        build = runpy.run_path(str(HERE / "mm_rec" / "cpp" / "build.py"))
        try:
            for library in build["build_all"](folder / "mm_rec" / "cpp"):
                self.announce(f"built {library}", level=2)
        except build["BuildError"] as error:
            self.warn(f"native kernels not built, MM-Rec will run its slow reference ops: {error}")

    def get_outputs(self) -> list[str]:  # noqa: D102
        return [str(path) for path in Path(self.build_lib, "mm_rec", "cpp").glob("*.so")]

    def get_source_files(self) -> list[str]:  # noqa: D102
        sources = [path for folder in ("src", "cuda") for path in (HERE / "mm_rec" / "cpp" / folder).glob("*.*")]
        return [str(path.relative_to(HERE)) for path in sources]


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python 3: the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("mm_rec.cpp.kernels", sources=[])],  # marks the wheel as platform-specific
    package_data={"mm_rec": ["py.typed"], "mm_rec.cpp": ["src/*", "cuda/*"], "mm_rec.serve": ["*.html"]},
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
