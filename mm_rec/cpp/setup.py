"""Builds the native kernels by hand: ``python setup.py build_ext --inplace`` in this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] != "build_ext":
        sys.exit("usage: python setup.py build_ext --inplace")
    try:
        for library in build.build_all():
            print(f"built {library}")  # noqa: T201
    except build.BuildError as error:
        sys.exit(f"error: {error}")
