"""AdamW against PyTorch's own, and what it adds: masters, accumulation, clipping, skipped steps, exact state."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from optimizer_cases import backend, parameters_of
from torch import Tensor, nn

from mm_rec.optim import AdamW, check_shapes, is_decayed

__all__ = ["backend"]  # the fixture: each test runs with both back ends

SHAPES = {
    "embedding.weight": (37, 8),
    "blocks.0.bias": (13,),
    "blocks.0.w_g": (2, 5, 5),
    "blocks.0.key_taps": (2, 3, 5),
}


make_parameters = functools.partial(parameters_of, SHAPES)


def gradients(step: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def set_gradients(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.grad = values[name].to(parameter.dtype) if name in values else None


def test_ten_steps_equal_torch_adamw() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = AdamW(ours.items(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    groups = [
        {"params": [p for name, p in theirs.items() if is_decayed(name, p)], "weight_decay": 0.1},
        {"params": [p for name, p in theirs.items() if not is_decayed(name, p)], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(10):
        lr = 1e-2 / (step + 1)
        scale = 0.01 if step % 2 else 1.0  # below and above the clipping bound
        set_gradients(ours, gradients(step, scale))
        set_gradients(theirs, gradients(step, scale))
        expected = nn.utils.clip_grad_norm_(theirs.values(), 1.0, foreach=False)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        norm = optimizer.step(lr, max_norm=1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "decays"),
    [("embedding.weight", True), ("blocks.0.w_g", True), ("blocks.0.bias", False), ("blocks.0.key_taps", False)],
)
def test_only_matrices_decay(name: str, decays: bool) -> None:
    parameters = make_parameters()
    before = parameters[name].detach().clone()
    optimizer = AdamW(parameters.items(), weight_decay=0.5)
    set_gradients(parameters, {name: torch.zeros(SHAPES[name])})
    optimizer.step(lr=0.1, max_norm=1.0)
    torch.testing.assert_close(parameters[name].detach(), before * (0.95 if decays else 1.0))


def test_parameters_without_gradient_are_untouched() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters.items())
    frozen = "embedding.weight"
    before = parameters[frozen].detach().clone()
    for step in range(3):
        set_gradients(parameters, {name: g for name, g in gradients(step).items() if name != frozen})
        optimizer.step(1e-2, 1.0)
    state = optimizer.state_tensors()
    assert torch.equal(parameters[frozen], before)
    assert state[f"step.{frozen}"].item() == 0
    assert not state[f"exp_avg.{frozen}"].any()
    assert state["step.blocks.0.bias"].item() == 3


def test_a_late_parameter_is_corrected_by_its_own_step_count() -> None:
    late, alone = make_parameters(), make_parameters()
    optimizer, fresh = AdamW(late.items()), AdamW(alone.items())
    name = "blocks.0.bias"
    for step in range(5):
        set_gradients(late, {other: g for other, g in gradients(step).items() if other != name})
        optimizer.step(1e-2, math.inf)
    for one, owner in ((late, optimizer), (alone, fresh)):
        set_gradients(one, {name: gradients(9)[name]})
        owner.step(1e-2, 0)
    assert torch.equal(late[name], alone[name])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_norm_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = AdamW(parameters.items())
    set_gradients(parameters, gradients(0))
    optimizer.step(1e-2, 1.0)
    before = {name: t.clone() for name, t in (*optimizer.state_tensors().items(), *optimizer.master_tensors().items())}
    values = gradients(1)
    values["blocks.0.bias"][3] = bad
    set_gradients(parameters, values)
    assert not optimizer.step(1e-2, 1.0).isfinite()
    for name, tensor in (*optimizer.state_tensors().items(), *optimizer.master_tensors().items()):
        assert torch.equal(tensor, before[name]), name
    set_gradients(parameters, gradients(2))
    assert optimizer.step(1e-2, 1.0).isfinite()  # the bad gradient is gone


def test_the_norm_may_be_asked_for_before_the_step_and_changes_nothing() -> None:
    asked, plain = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16)
    optimizer, reference = AdamW(asked.items()), AdamW(plain.items())
    before = {name: tensor.clone() for name, tensor in optimizer.master_tensors().items()}
    for parameters in (asked, plain):
        set_gradients(parameters, gradients(0))
    norm = optimizer.gradient_norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.master_tensors().items())
    assert torch.equal(optimizer.step(1e-2, 1.0), norm)
    assert torch.equal(reference.step(1e-2, 1.0), norm)
    assert all(torch.equal(asked[name], plain[name]) for name in SHAPES)
    set_gradients(asked, gradients(1))
    optimizer.gradient_norm()
    set_gradients(asked, gradients(2))  # one that comes after the norm was asked for counts
    set_gradients(plain, gradients(1))
    reference.accumulate()
    set_gradients(plain, gradients(2))
    assert torch.equal(optimizer.step(1e-2, 1.0), reference.step(1e-2, 1.0))


def test_masters_keep_what_bfloat16_rounds_away() -> None:
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = AdamW([("weight", parameter)], weight_decay=0.0)
    for _ in range(10):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(lr=1e-4, max_norm=0)
    master = optimizer.master_tensors()["weight"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full((4, 4), 1 - 1e-3))
    assert torch.equal(parameter, master.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_is_a_float32_sum(dtype: torch.dtype) -> None:
    parameters, summed = make_parameters(dtype), make_parameters(dtype)
    optimizer, reference = AdamW(parameters.items()), AdamW(summed.items())
    for update in range(2):  # twice: the second update must not see the first one's sums
        total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for micro in range(4):
            values = gradients(10 * update + micro)
            set_gradients(parameters, values)
            for name, parameter in parameters.items():
                total[name] += values[name].to(parameter.dtype).float()
            optimizer.accumulate()
            assert all(parameter.grad is None for parameter in parameters.values())
        optimizer.step(1e-2, 1.0)
        for slot in reference._slots:
            slot.total = total[slot.name].clone()
        reference.step(1e-2, 1.0)
        for name, master in optimizer.master_tensors().items():
            assert torch.equal(master, reference.master_tensors()[name]), name


def test_zero_grad_forgets_accumulated_gradients() -> None:
    parameters = make_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = AdamW(parameters.items())
    set_gradients(parameters, gradients(0))
    optimizer.accumulate()
    set_gradients(parameters, gradients(1))
    optimizer.zero_grad()
    assert optimizer.step(1e-2, 1.0).item() == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", range(6))
def test_state_saved_and_loaded_at_any_step_continues_bitwise(dtype: torch.dtype, stop: int) -> None:
    straight = make_parameters(dtype)
    optimizer = AdamW(straight.items())
    for step in range(6):
        if step == stop:
            state = {name: t.clone() for name, t in optimizer.state_tensors().items()}
            weights = {name: t.clone() for name, t in optimizer.master_tensors().items()}
        set_gradients(straight, gradients(step))
        optimizer.step(1e-2, 1.0)
    resumed = make_parameters(dtype, seed=7)
    second = AdamW(resumed.items())
    second.load_master_tensors(weights)
    second.load_state_tensors(state)
    for step in range(stop, 6):
        set_gradients(resumed, gradients(step))
        second.step(1e-2, 1.0)
    for name in SHAPES:
        assert torch.equal(straight[name], resumed[name]), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[name]), name


def test_state_of_another_model_is_refused_whole() -> None:
    optimizer = AdamW(make_parameters().items())
    state = {name: torch.full_like(t, 5.0) for name, t in optimizer.state_tensors().items()}
    with pytest.raises(ValueError, match=r"exp_avg\.other"):
        optimizer.load_state_tensors({**state, "exp_avg.other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"step\.blocks\.0\.bias"):
        optimizer.load_state_tensors({**state, "step.blocks.0.bias": torch.zeros(2)})
    assert not any(t.any() for t in optimizer.state_tensors().values())


@pytest.mark.parametrize(
    ("tensors", "named"),
    [({"a": torch.zeros(2)}, "b"), ({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, "c"),
     ({"a": torch.zeros(2), "b": torch.zeros(4)}, "b")],
)  # fmt: skip
def test_other_names_and_shapes_are_named(tensors: dict[str, torch.Tensor], named: str) -> None:
    wanted = {"a": torch.Size([2]), "b": torch.Size([3])}
    check_shapes(wanted, {"a": torch.zeros(2), "b": torch.zeros(3)}, "weights")
    with pytest.raises(ValueError, match=f"not the weights of the model: {named}$"):
        check_shapes(wanted, tensors, "weights")


@pytest.mark.gpu
@pytest.mark.parametrize("bad_step", [None, 4])
def test_cuda_equals_cpu_without_waiting(bad_step: int | None) -> None:
    on_cpu = make_parameters(torch.bfloat16)
    on_gpu = {name: nn.Parameter(p.detach().cuda()) for name, p in on_cpu.items()}
    ours, theirs = AdamW(on_cpu.items()), AdamW(on_gpu.items())
    for step in range(10):
        values = gradients(step, math.inf if step == bad_step else 1.0)
        moved = {name: value.cuda() for name, value in values.items()}
        set_gradients(on_cpu, values)
        set_gradients(on_gpu, moved)
        torch.cuda.set_sync_debug_mode("error")
        try:
            norm = theirs.step(1e-2, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(norm.cpu(), ours.step(1e-2, 1.0), equal_nan=True)
    for name, master in theirs.master_tensors().items():
        torch.testing.assert_close(master.cpu(), ours.master_tensors()[name], rtol=0, atol=1e-6)
    for name, tensor in theirs.state_tensors().items():
        torch.testing.assert_close(tensor.cpu(), ours.state_tensors()[name], rtol=1e-5, atol=1e-7)
