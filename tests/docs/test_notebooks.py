"""The notebooks run, and print what stands in them, numbers apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from docs_site.notebooks import code_cells, make_page
from docs_site.run_notebook import run

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


@pytest.fixture(autouse=True)
def same_generator() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def without_numbers(text: str) -> str:
    return re.sub(r"[\d.,]+", "0", text)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_shows(path: Path) -> None:
    cells = code_cells(path)
    assert len(cells) > 5
    *printed, written = run([source for source, _ in cells])
    *shown, _ = [output for _, output in cells]
    assert [without_numbers(text) for text in printed] == [without_numbers(text) for text in shown]
    assert len(written) > 40  # drawn by chance, so no text of its own
    losses = [float(loss) for loss in re.findall(r"^step .* loss ([\d.]+)$", "".join(printed), re.MULTILINE)]
    assert losses[-1] < losses[0] / 3


def test_the_page_of_a_notebook_has_its_code_and_output() -> None:
    page = make_page(FOLDER / "tokens_to_text.ipynb")
    assert page.startswith("# From tokens to text")
    assert page.count("```python") == len(code_cells(FOLDER / "tokens_to_text.ipynb"))
    assert "logits (1, 100, 512)" in page
