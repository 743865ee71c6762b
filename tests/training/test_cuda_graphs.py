"""CUDA graphs of a training pass: they must compute what the pass launched op by op computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mm_rec.config import PRESETS
from mm_rec.data.batches import Batch
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.state import ModelState, map_state
from mm_rec.training.cuda_graphs import GraphedPass, LossFunction, run_pass

pytestmark = pytest.mark.gpu


def micro_batch(index: int, domain: str | None) -> Batch:
    generator = torch.Generator().manual_seed(index)
    tokens, targets = torch.randint(512, (2, 3, 80), generator=generator).cuda()
    reset = torch.rand(3, 80, generator=generator) < 0.05
    return Batch(tokens, targets, torch.full((3, 80), 1 / 240, device="cuda"), reset.cuda(), domain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_by_graphs_is_training(precision: str, accumulation: int) -> None:
    losses, weights = {}, {}
    for graphed in (False, True):
        model = MMRecModel(PRESETS["tiny"]).cuda()
        apply_precision(model, precision)
        optimizer = AdamW(model.named_parameters())

        def loss_of(batch: Batch, state: ModelState | None, model: MMRecModel = model) -> tuple[Tensor, ModelState]:
            output, after = model(
                batch.tokens, state, batch.domain, batch.reset, targets=batch.targets, weight=batch.weight
            )
            return output.loss, after

        graphs = GraphedPass(loss_of, list(model.parameters()), accumulation) if graphed else None
        found: list[float] = []
        carried: dict[str | None, ModelState] = {}
        for step in range(6):
            for part in range(accumulation):
                domain = ("text", "code", None)[(step + part) % 3]
                batch = micro_batch(step * accumulation + part, domain)
                state = carried.get(domain) or model.initial_state(3, domain)
                loss, after = graphs(batch, state) if graphs else run_pass(loss_of, batch, state, accumulation)
                carried[domain] = map_state(after, lambda tensor: tensor.detach().clone())
                optimizer.accumulate()
                found.append(float(loss))
            optimizer.step(1e-2, 1.0)
        losses[graphed], weights[graphed] = found, optimizer.master_tensors()
    assert losses[True] == losses[False]
    for name, weight in weights[True].items():
        assert torch.equal(weight, weights[False][name]), name


def test_what_does_not_learn_gets_no_gradient() -> None:
    model = MMRecModel(PRESETS["tiny"]).cuda()

    def loss_of(batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        output, after = model(batch.tokens, state, batch.domain, batch.reset, targets=batch.targets)
        return output.loss, after

    graphs = GraphedPass(loss_of, list(model.parameters()), 1)
    for fusion_only in (True, False, True):
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(not fusion_only or name.startswith("fusion."))
        graphs(micro_batch(0, None), None)
        learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert learned == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_passes_side_by_side_share_nothing() -> None:
    """Products of few rows and columns over many tokens are split, and their parts meet in the workspace of cuBLAS."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(64, 2**15, generator=generator).cuda() for _ in range(2)]
    weights = [nn.Parameter(torch.randn(64, 64, generator=generator).cuda()) for _ in range(2)]
    batch = micro_batch(0, None)

    def loss_with(index: int) -> LossFunction:
        def loss_of(batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
            loss = batch.weight.sum()
            for _ in range(20):
                loss = loss + (weights[index] @ columns[index]).square().mean()
            return loss, ModelState(batch.reset[:, 0].long(), {})

        return loss_of

    passes = [GraphedPass(loss_with(index), [weights[index]], 1) for index in range(2)]
    alone = []
    for weight, one in zip(weights, passes, strict=True):
        one(batch, None)
        assert weight.grad is not None
        alone.append(weight.grad.clone())
    streams = [torch.cuda.Stream() for _ in passes]
    torch.cuda.synchronize()
    for _ in range(50):
        for weight, one, stream in zip(weights, passes, streams, strict=True):
            weight.grad = None
            with torch.cuda.stream(stream):
                one(batch, None)
        torch.cuda.synchronize()
        for weight, expected in zip(weights, alone, strict=True):
            assert torch.equal(weight.grad, expected)
