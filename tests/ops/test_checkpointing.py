"""Gradient checkpointing gives saved tensors out once, and runs a block again in whatever thread goes backward."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mm_rec import ops
from mm_rec.config import ModelConfig
from mm_rec.model import MMRecModel
from mm_rec.ops import backend

from .cases import CASES, FUSED_CASES

CHOSEN = {op: list(cases.values())[1] for op, cases in (CASES | FUSED_CASES).items()}
CHOSEN |= {"gated_loop": FUSED_CASES["gated_recurrence"]["2x63x64x1-loop-with-state"]}


@pytest.mark.parametrize("op", sorted(CHOSEN))
def test_every_kernel_can_be_checkpointed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By fake tensors, so that the backward passes of kernels are run that this machine has no device for."""
    for name in ("_native_serves", "_native_has", "_native_fits"):
        monkeypatch.setattr(backend, name, lambda *_: True)
    function = getattr(ops, op, ops.gated_recurrence)
    constants = (3,) if op == "linear_cross_entropy" else ()  # its weight
    for only in (None, 0, -1):  # the gradients of all results, and of one
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            arguments = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in CHOSEN[op](torch.float32)]
            for i, x in enumerate(arguments):
                if isinstance(x, Tensor):
                    x.requires_grad_(x.is_floating_point() and i not in constants)
            results = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
            results = [y for y in (results if isinstance(results, tuple) else (results,)) if y.requires_grad]
            torch.autograd.backward([y.sum() for y in (results if only is None else [results[only]])])
        assert any(x.grad is not None for x in arguments if isinstance(x, Tensor))


@pytest.mark.native
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chosen", backend.BACKENDS)
def test_a_block_runs_again_on_the_back_end_that_it_ran_on(chosen: str, device: str) -> None:
    """A GPU goes backward in a thread of its own, where nobody has chosen a back end."""
    config = ModelConfig(vocab_size=300, d_model=16, n_heads=2, n_layers=3, d_ff=16, window=8, experts=("text",))
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    gradients = {}
    for checkpointing in (False, True):
        model = MMRecModel(config, seed=1).to(device)
        model.gradient_checkpointing = checkpointing
        with ops.use_backend(chosen):
            output, _ = model(tokens, targets=tokens)
        problems: list[Exception] = []

        def backward(loss: Tensor = output.loss, problems: list[Exception] = problems) -> None:
            try:
                loss.backward()
            except Exception as problem:
                problems.append(problem)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert not problems
        gradients[checkpointing] = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-4, atol=1e-6)
