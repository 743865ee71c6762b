"""The ways to run the model compute the same thing, in value and in every gradient."""

import pytest
import torch

from benchmarks.agreement import PAIRS, compare_backends

BOUND = {torch.float64: (1e-13, 1e-12), torch.float32: (3e-6, 3e-5)}


@pytest.mark.parametrize("domain", ["text", None], ids=["one-domain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("pair", PAIRS)
def test_ways_to_run_agree(pair: str, dtype: torch.dtype, domain: str | None) -> None:
    errors = PAIRS[pair](dtype, domain)
    value_bound, gradient_bound = BOUND[dtype]
    assert errors.value < value_bound
    assert errors.gradient < gradient_bound


@pytest.mark.native
@pytest.mark.parametrize("domain", ["text", None], ids=["one-domain", "fused"])
def test_native_agrees_with_reference(domain: str | None) -> None:
    errors = compare_backends(domain)
    assert errors.value < 3e-6
    assert errors.gradient < 3e-5
