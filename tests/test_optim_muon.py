"""Muon for the blocks' matrices and AdamW for the rest: rules, state, exact resume."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from optimizer_cases import backend, parameters_of
from torch import Tensor, nn

from mm_rec import ops, optim
from mm_rec.config import PRESETS
from mm_rec.model import MMRecModel
from mm_rec.ops.reference import orthogonalize
from mm_rec.optim import AdamW, Muon, is_orthogonalized

__all__ = ["backend"]  # the fixture: each test runs with both back ends

BLOCK = "experts.text.blocks.0."
SHAPES = {
    "embedding.weight": (37, 8),
    f"{BLOCK}ffn_up": (24, 8),
    f"{BLOCK}ffn_down": (8, 24),
    f"{BLOCK}out_proj": (8, 8),
    f"{BLOCK}gate_bias": (13,),
    f"{BLOCK}score_proj": (6, 8),
}
MATRICES = [name for name in SHAPES if name.rpartition(".")[2] in ("ffn_up", "ffn_down", "out_proj")]
MUON = Muon(0.5)


make_parameters = functools.partial(parameters_of, SHAPES)


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    for name, parameter in parameters.items():
        parameter.grad = torch.randn(SHAPES[name], generator=generator).to(parameter.dtype)
    return {name: parameter.grad.float() for name, parameter in parameters.items() if parameter.grad is not None}


def test_the_wide_matrices_of_the_blocks_are_orthogonalised() -> None:
    named = dict(MMRecModel(PRESETS["tiny"]).named_parameters())
    found = {name.rpartition(".")[2] for name in named if is_orthogonalized(name)}
    assert found == {"in_proj", "decay_proj", "out_proj", "qkv_proj", "attention_out", "ffn_up", "ffn_down"}
    matrices = {name for name, parameter in named.items() if parameter.ndim == 2}
    rest = {name.rpartition(".")[2] for name in matrices if not is_orthogonalized(name)}
    assert {"score_proj", "weight"} <= rest  # of the embedding and the fusion
    assert all(named[name].ndim == 2 for name in named if is_orthogonalized(name))


def test_matrices_take_orthogonal_steps_and_everything_else_adamw_s() -> None:
    ours, plain = make_parameters(), make_parameters()
    optimizer, adamw = AdamW(ours.items(), muon=MUON), AdamW(plain.items())
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    gradients = set_gradients(ours, 0)
    set_gradients(plain, 0)
    norm = optimizer.step(lr=0.02, max_norm=1.0)
    assert torch.equal(norm, adamw.step(lr=0.02, max_norm=1.0))  # of all gradients together
    for name in SHAPES:
        if name not in MATRICES:
            assert torch.equal(ours[name], plain[name]), name
            continue
        direction = orthogonalize(gradients[name])  # whatever the momentum: it starts from zero
        wanted = before[name] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(max(SHAPES[name])) * direction
        torch.testing.assert_close(ours[name].detach(), wanted, rtol=0, atol=1e-3)
        assert not torch.equal(ours[name], plain[name])


def test_the_only_state_of_a_matrix_is_its_momentum() -> None:
    optimizer = AdamW(make_parameters().items(), muon=MUON)
    state = optimizer.state_tensors()
    assert {name for name in SHAPES if f"exp_avg.{name}" in state} == set(SHAPES)
    for kind in ("exp_avg_sq", "step"):
        assert {name for name in SHAPES if f"{kind}.{name}" in state} == set(SHAPES) - set(MATRICES)


def test_state_of_the_other_optimizer_is_refused_whole() -> None:
    muon, adamw = AdamW(make_parameters().items(), muon=MUON), AdamW(make_parameters().items())
    for one, other in ((muon, adamw), (adamw, muon)):
        with pytest.raises(ValueError, match="not the optimizer state of the model: exp_avg_sq"):
            one.load_state_tensors(other.state_tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", range(4))
def test_state_saved_and_loaded_at_any_step_continues_bitwise(dtype: torch.dtype, stop: int) -> None:
    straight = make_parameters(dtype)
    optimizer = AdamW(straight.items(), muon=MUON)
    for step in range(4):
        if step == stop:
            state = {name: t.clone() for name, t in optimizer.state_tensors().items()}
            weights = {name: t.clone() for name, t in optimizer.master_tensors().items()}
        set_gradients(straight, step)
        optimizer.step(1e-2, 1.0)
    resumed = make_parameters(dtype, seed=7)
    second = AdamW(resumed.items(), muon=MUON)
    second.load_master_tensors(weights)
    second.load_state_tensors(state)
    for step in range(stop, 4):
        set_gradients(resumed, step)
        second.step(1e-2, 1.0)
    for name in SHAPES:
        assert torch.equal(straight[name], resumed[name]), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[name]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_norm_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = AdamW(parameters.items(), muon=MUON)
    set_gradients(parameters, 0)
    optimizer.step(1e-2, 1.0)
    before = {name: t.clone() for name, t in (*optimizer.state_tensors().items(), *optimizer.master_tensors().items())}
    set_gradients(parameters, 1)
    gradient = parameters[MATRICES[0]].grad
    assert gradient is not None
    gradient[0, 0] = bad
    assert not optimizer.step(1e-2, 1.0).isfinite()
    for name, tensor in (*optimizer.state_tensors().items(), *optimizer.master_tensors().items()):
        assert torch.equal(tensor, before[name]), name


def test_gradients_of_micro_batches_are_summed() -> None:
    parts, whole = make_parameters(), make_parameters()
    optimizer, reference = AdamW(parts.items(), muon=MUON), AdamW(whole.items(), muon=MUON)
    first = set_gradients(parts, 0)
    optimizer.accumulate()
    second = set_gradients(parts, 1)
    for name, parameter in whole.items():
        parameter.grad = first[name] + second[name]
    assert torch.equal(optimizer.step(1e-2, 1.0), reference.step(1e-2, 1.0))
    assert all(torch.equal(parts[name], whole[name]) for name in SHAPES)


def test_matrices_without_gradient_are_untouched() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters.items(), muon=MUON)
    frozen = MATRICES[1]
    before = parameters[frozen].detach().clone()
    for step in range(2):
        set_gradients(parameters, step)
        parameters[frozen].grad = None
        optimizer.step(1e-2, 1.0)
    assert torch.equal(parameters[frozen], before)
    assert not optimizer.state_tensors()[f"exp_avg.{frozen}"].any()


def test_so_many_matrices_at_once_as_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = make_parameters(), make_parameters()
    calls: list[int] = []
    update = ops.muon_
    monkeypatch.setattr(ops, "muon_", lambda updates, *a, **k: calls.append(len(updates)) or update(updates, *a, **k))
    for parameters, most in ((together, 10_000), (apart, 200)):
        monkeypatch.setattr(optim, "ELEMENTS_AT_ONCE", most)
        set_gradients(parameters, 0)
        AdamW(parameters.items(), muon=MUON).step(1e-2, 1.0)
    assert calls == [3, 1, 1, 1]  # 192 + 192 + 64 elements; the second and the third are 256
    assert all(torch.equal(together[name], apart[name]) for name in SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("bad_step", [None, 2])
def test_cuda_equals_cpu_without_waiting(bad_step: int | None) -> None:
    on_cpu = make_parameters(torch.bfloat16)
    on_gpu = {name: nn.Parameter(p.detach().cuda()) for name, p in on_cpu.items()}
    ours, theirs = AdamW(on_cpu.items(), muon=MUON), AdamW(on_gpu.items(), muon=MUON)
    for step in range(4):
        gradients = set_gradients(on_cpu, step)
        if step == bad_step:
            gradients[MATRICES[0]][0, 0] = math.inf
        for name, parameter in on_gpu.items():
            parameter.grad = gradients[name].to(parameter.dtype).cuda()
            on_cpu[name].grad = gradients[name].to(parameter.dtype)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # libraries set things up in the first step
        try:
            norm = theirs.step(1e-2, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(norm.cpu(), ours.step(1e-2, 1.0), equal_nan=True)
    for name, master in theirs.master_tensors().items():
        torch.testing.assert_close(master.cpu(), ours.master_tensors()[name], rtol=0, atol=2e-3)
