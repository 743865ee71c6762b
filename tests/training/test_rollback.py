"""Steps that must not be applied: rolled back, their batch left out."""

import json
from pathlib import Path

import pytest
from small_runs import content, settings, signal_after, train

from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError
from mm_rec.machine.signals import Interrupted
from mm_rec.optim import AdamW
from mm_rec.storage import checkpoint
from mm_rec.training import progress
from mm_rec.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_world")


def inject(monkeypatch: pytest.MonkeyPatch, faults: dict[int, float]) -> None:
    """Add to the loss of some steps, every time they are tried."""
    compute = Trainer.micro_batch_loss

    def faulty(self: Trainer, *arguments: object) -> object:
        loss, state = compute(self, *arguments)
        return loss + faults.get(self.progress.step + 1, 0.0), state

    monkeypatch.setattr(Trainer, "micro_batch_loss", faulty)


def test_a_loss_that_is_not_finite_is_rolled_back_and_its_batch_left_out(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {5: float("nan"), 7: float("inf")}
    inject(monkeypatch, faults)
    train(data, settings(tmp_path / "whole", eval_interval=100))
    run = tmp_path / "whole" / "stage1"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 6, 8, 9, 10]
    assert [line["step"] for line in metrics if "skipped" in line] == [5, 7]
    events = (run / "events.log").read_text()
    assert "is nan in step 5: went back to step 3" in events
    assert "is inf in step 7: went back to step 6" in events
    # Step 4 comes after the first time back, step 9 after the second.
    plain = tmp_path / "plain"
    faults.clear()
    train(data, settings(plain, eval_interval=100))
    usual = [json.loads(line) for line in (plain / "stage1" / "metrics.jsonl").read_text().splitlines()]
    rate = {line["step"]: line["rate"] for line in metrics if "rate" in line}
    usual_rate = {line["step"]: line["rate"] for line in usual if "rate" in line}
    assert [rate[step] / usual_rate[step] for step in (3, 4, 6, 9)] == pytest.approx([1, 0.5, 0.5, 0.25])


def test_rollbacks_are_repeated_exactly_by_a_run_that_was_stopped(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, {5: float("nan")})
    train(data, settings(tmp_path / "whole"))
    for step in (4, 6):
        with monkeypatch.context() as patch:
            signal_after(patch, step)
            with pytest.raises(Interrupted):
                train(data, settings(tmp_path / f"stopped{step}", checkpoint_interval=3))
        if step == 6:
            train(data, settings(tmp_path / f"stopped{step}"))
            assert content(tmp_path / "stopped6" / "stage1", 10) == content(tmp_path / "whole" / "stage1", 10)


def test_a_spike_is_rolled_back(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HISTORY", 2)
    inject(monkeypatch, {9: 1000.0})
    train(data, settings(tmp_path))
    assert "jumped" in (tmp_path / "stage1" / "events.log").read_text()
    assert checkpoint.load(tmp_path / "stage1" / "checkpoints" / "step_000010").trainer["position"]["skipped"] == [9]


@pytest.mark.parametrize("fault", [float("nan"), 1000.0])
def test_a_step_in_trouble_is_judged_before_its_update(
    fault: float, data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HISTORY", 2)
    inject(monkeypatch, {9: fault})
    applied: list[int] = []
    step, take = AdamW.step, Trainer._take_step
    monkeypatch.setattr(AdamW, "step", lambda self, *values: applied.append(at[-1]) or step(self, *values))
    monkeypatch.setattr(Trainer, "_take_step", lambda self: at.append(self.progress.step + 1) or take(self))
    at: list[int] = [0]
    train(data, settings(tmp_path))
    assert 9 in at
    assert 9 not in applied
    assert {8, 10} <= set(applied)


def test_training_that_stays_unstable_stops_with_a_remedy(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, dict.fromkeys(range(4, 11), float("nan")))
    with pytest.raises(UserError, match=r"unstable.*--lr"):
        train(data, settings(tmp_path))
    assert checkpoint.newest_valid(tmp_path / "stage1" / "checkpoints") is not None


def test_a_gradient_that_is_not_finite_changes_nothing(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Trainer.micro_batch_loss

    def faulty(self: Trainer, *arguments: object) -> object:
        loss, state = compute(self, *arguments)
        if self.progress.step + 1 == 2:
            loss = loss + (self.model.embedding.weight.sum() * 0).sqrt()  # finite loss, gradient 0 / 0
        return loss, state

    monkeypatch.setattr(Trainer, "micro_batch_loss", faulty)
    train(data, settings(tmp_path, max_steps=3))
    assert "the norm of the gradient is nan in step 2" in (tmp_path / "stage1" / "events.log").read_text()
