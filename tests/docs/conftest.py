"""Says what is missing where the documentation cannot be built: its packages, or the sources that it describes."""

from __future__ import annotations

import importlib.util

import pytest
from docs_site import ROOT

REMEDY = 'needs the extra docs; in a checkout: pip install -c constraints.txt ".[docs]"'


@pytest.fixture(scope="session")
def sources() -> None:
    """Skips a test where the sources are not in the checkout, as where an installed wheel is tested."""
    if not (ROOT / "mm_rec").is_dir():
        pytest.skip("needs the sources of a checkout")


@pytest.fixture(scope="session")
def mkdocs(sources: None) -> None:
    """Skips a test where MkDocs with its theme and plugin is not installed."""
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(REMEDY)
