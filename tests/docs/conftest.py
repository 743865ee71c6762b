"""Says what to install where the packages that build the documentation are missing."""

from __future__ import annotations

import importlib.util

import pytest

REMEDY = 'needs the extra docs; in a checkout: pip install -c constraints.txt ".[docs]"'


@pytest.fixture(scope="session")
def mkdocs() -> None:
    """Skips a test where MkDocs with its theme and plugin is not installed."""
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(REMEDY)
