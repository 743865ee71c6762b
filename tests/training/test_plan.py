"""The plan of a stage: every number that follows from settings, stage, device and data."""

import dataclasses

import pytest

from mm_rec.errors import UserError
from mm_rec.optim import Muon
from mm_rec.stages import STAGES
from mm_rec.training.plan import make_plan
from mm_rec.training.settings import TrainSettings


def test_the_guide_s_sizes_are_the_defaults() -> None:
    cpu = make_plan(TrainSettings(), "cpu", 10**7)
    assert (cpu.batch_size, cpu.seq_len, cpu.steps, cpu.checkpoint_interval) == (2, 512, 1000, 50)
    gpu = make_plan(TrainSettings(stage="stage2"), "cuda", 10**9)
    assert (gpu.batch_size, gpu.seq_len, gpu.checkpoint_interval) == (4, 8192, 100)
    assert all(5000 <= stage.gpu.steps <= 10_000 for stage in STAGES.values())


def test_steps_follow_from_the_data_only_where_a_sample_is_asked_for() -> None:
    tokens = 5000
    assert make_plan(TrainSettings(), "cpu", tokens).steps == 1000
    sampled = make_plan(TrainSettings(use_synthetic=True, max_samples=10), "cpu", tokens)
    assert sampled.steps == 98  # 20 passes of 5000 tokens, 1024 a step
    assert make_plan(TrainSettings(max_samples=10, max_steps=7), "cpu", tokens).steps == 7
    assert make_plan(TrainSettings(max_samples=10**6), "cpu", 10**9).steps == 1000


def test_later_stages_take_their_share_of_the_rate() -> None:
    rates = [make_plan(TrainSettings(stage=name, lr=0.6), "cpu", 10**6).rate for name in STAGES]
    assert rates == pytest.approx([0.6, 0.2, 0.1, 0.06, 0.06])
    assert make_plan(TrainSettings(), "cpu", 10**6).rate == 2e-3


def test_fusion_alone_has_a_schedule_of_its_own_and_steps_enough() -> None:
    plan = make_plan(TrainSettings(stage="stage3", max_steps=400, lr=0.6), "cpu", 10**6)
    assert plan.fusion_steps == 80
    rates = [plan.rate_at(step) for step in range(1, 401)]
    assert max(rates[:80]) == rates[3] == pytest.approx(0.6)  # the full peak, after a short rise
    assert rates[79] == pytest.approx(0.06)
    assert max(rates[80:]) == rates[95] == pytest.approx(0.1)  # risen anew over a twentieth of the 320 steps left
    short = {steps: make_plan(TrainSettings(stage="stage3", max_steps=steps), "cpu", 10**6) for steps in (1, 20, 100)}
    assert {steps: plan.fusion_steps for steps, plan in short.items()} == {1: 1, 20: 10, 100: 30}
    assert make_plan(TrainSettings(stage="chat"), "cpu", 10**6).fusion_steps == 0


@pytest.mark.parametrize(("steps", "interval", "tenth"), [(1000, 50, 100), (1000, 30, 120), (7, 50, 50), (20, 1, 2)])
def test_the_model_is_evaluated_every_tenth_of_a_run_when_it_is_saved(steps: int, interval: int, tenth: int) -> None:
    wanted = TrainSettings(max_steps=steps, checkpoint_interval=interval)
    assert make_plan(wanted, "cpu", 10**6).eval_interval == tenth
    assert make_plan(dataclasses.replace(wanted, eval_interval=3), "cpu", 10**6).eval_interval == 3


def test_how_far_and_how_often_is_no_part_of_a_run_s_identity() -> None:
    plan = make_plan(TrainSettings(accumulation=4), "cpu", 10**6)
    assert plan.tokens_per_step == 4 * 2 * 512
    assert not plan.identity().keys() & plan.intervals().keys()
    longer = make_plan(TrainSettings(accumulation=4, max_steps=3000, keep_checkpoints=1), "cpu", 10**6)
    assert longer.identity() == plan.identity()
    assert longer.intervals() != plan.intervals()
    for change in ({"batch_size": 3}, {"seq_len": 64}, {"accumulation": 2}, {"lr": 0.1}, {"clip": 0.1}, {"seed": 7}):
        assert make_plan(TrainSettings(**{"accumulation": 4, **change}), "cpu", 10**6).identity() != plan.identity()


def test_the_optimizer_is_part_of_a_run_s_identity_unless_it_is_adamw() -> None:
    small, large = TrainSettings(), TrainSettings(batch_size=8)
    adamw = make_plan(small, "cpu", 10**6)
    assert adamw.muon is None
    assert "optimizer" not in adamw.identity()  # so that runs go on which know of no other
    assert make_plan(dataclasses.replace(small, optimizer="adamw"), "cpu", 10**6).identity() == adamw.identity()
    for settings, factor in ((large, 1.0), (dataclasses.replace(small, optimizer="muon"), 0.5)):
        plan = make_plan(settings, "cpu", 10**6)
        assert plan.muon == Muon(factor)
        assert plan.identity()["optimizer"] == "muon"


def test_adapters_are_trained_by_adamw() -> None:
    settings = TrainSettings(stage="instruct", lora=4, batch_size=64)
    assert make_plan(settings, "cpu", 10**6).muon is None
    with pytest.raises(UserError, match="leave --optimizer muon out"):
        make_plan(dataclasses.replace(settings, optimizer="muon"), "cpu", 10**6)
