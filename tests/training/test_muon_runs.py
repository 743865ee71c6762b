"""Runs whose matrices are orthogonalised: exact resume and roll-back, what a checkpoint holds, other optimizers."""

from pathlib import Path

import pytest
import yaml
from small_runs import content, settings, signal_after, train

from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError
from mm_rec.machine.signals import Interrupted
from mm_rec.optim import is_orthogonalized
from mm_rec.storage import checkpoint
from mm_rec.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_world")


def test_a_run_that_was_stopped_after_a_roll_back_goes_on_exactly(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Trainer.micro_batch_loss

    def faulty(self: Trainer, *arguments: object) -> object:
        loss, state = compute(self, *arguments)
        return loss + (float("nan") if self.progress.step == 4 else 0.0), state

    monkeypatch.setattr(Trainer, "micro_batch_loss", faulty)
    whole, stopped = (settings(tmp_path / name, optimizer="muon", accumulation=2) for name in ("whole", "stopped"))
    train(data, whole)
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        with pytest.raises(Interrupted):
            train(data, stopped)
    train(data, stopped)
    assert "is nan in step 5: went back to step 4" in (tmp_path / "stopped" / "stage1" / "events.log").read_text()
    assert content(tmp_path / "stopped" / "stage1", 10) == content(tmp_path / "whole" / "stage1", 10)


def test_a_checkpoint_has_one_moment_of_each_matrix(data: Prepared, tmp_path: Path) -> None:
    runs = {name: train(data, settings(tmp_path / name, optimizer=name, max_steps=1)) for name in ("adamw", "muon")}
    adamw, muon = (set(checkpoint.load(path).optimizer) for path in runs.values())
    lacking = {name for name in adamw if is_orthogonalized(name.partition(".")[2])}
    lacking = {name for name in lacking if not name.startswith("exp_avg.")}
    assert lacking
    assert muon == adamw - lacking
    identities = [
        yaml.safe_load((path.parent.parent / "config.yaml").read_text())["identity"] for path in runs.values()
    ]
    assert identities[1] == identities[0] | {"optimizer": "muon"}


@pytest.mark.parametrize(("first", "second"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_does_not_go_on_with_another_optimizer(data: Prepared, tmp_path: Path, first: str, second: str) -> None:
    path = train(data, settings(tmp_path, optimizer=first, max_steps=1))
    wanted = {"optimizer": second, "max_steps": 2}
    with pytest.raises(UserError, match="optimizer"):
        train(data, settings(tmp_path, resume_from=path, **wanted))
    with pytest.raises(UserError, match="--init_from"):
        train(data, settings(tmp_path, resume_from=path, allow_changes=True, **wanted))
    train(data, settings(tmp_path, init_from=path, **wanted))
