"""What the tests of the optimizer's rules share: parameters, and a run with each back end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn

from mm_rec import ops

__all__ = ["backend", "parameters_of"]


@pytest.fixture(autouse=True, params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of a module that imports this runs with the kernels and with their definition."""
    with ops.use_backend(request.param):
        yield


def parameters_of(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Parameters of these shapes; the matrices are in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype if len(shape) == 2 else torch.float32))
        for name, shape in shapes.items()
    }
