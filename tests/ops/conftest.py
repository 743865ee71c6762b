from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from mm_rec.ops.cpu import common


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests are small: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for results starts as NaN, so that an element that a kernel leaves out is seen."""

    def poisoned(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(tuple(shape), torch.nan if dtype.is_floating_point else 0x7F7F7F7F, dtype=dtype)

    monkeypatch.setattr(common, "empty", poisoned)
