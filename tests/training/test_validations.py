"""The best checkpoint by validation is kept and used; a run ends where validation rises; both as if never stopped."""

import io
import json
import shutil
from pathlib import Path

import pytest
from small_runs import content, settings, signal_after, train

from mm_rec.data.prepared import Prepared
from mm_rec.inference.loading import find_checkpoint
from mm_rec.machine.signals import Interrupted
from mm_rec.storage import checkpoint
from mm_rec.storage.run_config import read_config
from mm_rec.storage.run_folder import read_metrics
from mm_rec.training import trainer
from mm_rec.training.initial_weights import starting_checkpoint
from mm_rec.training.plots import draw_losses
from mm_rec.training.settings import TrainSettings
from mm_rec.training.trainer import Trainer
from mm_rec.training.validations import Validations

pytestmark = pytest.mark.usefixtures("small_world")

FALLS_AND_RISES = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.6, 10: 2.7}
PASSES = {"batch_size": 16, "seq_len": 64}  # a few steps read all data


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The outcome of each validation by step; later ones are as the last."""
    chosen = dict(FALLS_AND_RISES)
    monkeypatch.setattr(Trainer, "_score", lambda self, *_: chosen.get(self.progress.step, 2.7))
    return chosen


def wanted(folder: Path, **changes: object) -> TrainSettings:
    return settings(folder, **{"checkpoint_interval": 2, "eval_interval": 2, "keep_checkpoints": 1, **changes})


def steps_of(run: Path) -> list[int]:
    return [checkpoint.checkpoint_step(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]


def config_of(run: Path) -> dict[str, object]:
    config = read_config(run)
    assert config is not None
    return config


def test_the_best_checkpoint_is_kept_and_used(data: Prepared, tmp_path: Path, scores: dict[int, float]) -> None:
    output = io.StringIO()
    run = tmp_path / "stage1"
    best = run / "checkpoints" / "step_000004"
    assert train(data, wanted(tmp_path), output) == best
    assert steps_of(run) == [4, 10]
    assert config_of(run)["best"] == {"step": 4, "bits_per_byte": 2.0}
    assert f"best by validation is {best}, which other commands and stages take" in output.getvalue()
    assert find_checkpoint(run) == find_checkpoint(tmp_path) == best
    assert find_checkpoint(run / "checkpoints" / "step_000010").name == "step_000010"
    assert train(data, wanted(tmp_path), output) == best
    stage2 = wanted(tmp_path, stage="stage2", max_steps=2)
    assert starting_checkpoint(stage2) == best
    train(data, stage2)
    assert config_of(tmp_path / "stage2")["identity"]["starts_from"] == checkpoint.load(best).sha256
    scores[12] = 1.5
    assert train(data, wanted(tmp_path, max_steps=12)).name == "step_000012"
    assert steps_of(run) == [12]


def test_without_its_best_checkpoint_a_run_has_its_newest(
    data: Prepared, tmp_path: Path, scores: dict[int, float]
) -> None:
    best = train(data, wanted(tmp_path))
    (best / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="passed over the best checkpoint: .*step_000004"):
        assert find_checkpoint(tmp_path).name == "step_000010"
    shutil.rmtree(best)
    with pytest.warns(UserWarning, match="passed over the best checkpoint"):
        assert find_checkpoint(tmp_path / "stage1").name == "step_000010"


def test_a_run_ends_where_validation_rises(data: Prepared, tmp_path: Path, scores: dict[int, float]) -> None:
    output = io.StringIO()
    longer = wanted(tmp_path, max_steps=20, **PASSES)
    run = tmp_path / "stage1"
    assert train(data, longer, output).name == "step_000004"
    assert "stopped early, at step 10 of 20: validation rises since step 4" in output.getvalue()
    assert steps_of(run) == [4, 10]
    before = (run / "metrics.jsonl").read_bytes()
    assert train(data, longer, output).name == "step_000004"
    assert f"stage1 is finished: {run / 'checkpoints' / 'step_000004'}" in output.getvalue()
    assert (run / "metrics.jsonl").read_bytes() == before
    assert train(data, wanted(tmp_path, stage="stage2", max_steps=2)).parent.parent == tmp_path / "stage2"
    to_the_end = wanted(tmp_path, max_steps=20, no_early_stop=True, **PASSES)
    train(data, to_the_end)
    train(data, wanted(tmp_path / "never", max_steps=20, no_early_stop=True, **PASSES))
    assert steps_of(run) == [4, 20]
    assert content(run, 20) == content(tmp_path / "never" / "stage1", 20)


def test_a_first_pass_over_the_data_is_never_cut_short(
    data: Prepared, tmp_path: Path, scores: dict[int, float]
) -> None:
    train(data, wanted(tmp_path, max_steps=14))
    assert steps_of(tmp_path / "stage1") == [4, 14]


@pytest.mark.parametrize("step", [3, 4, 7, 10])
def test_a_run_that_was_stopped_decides_alike(
    data: Prepared, tmp_path: Path, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    longer = {"max_steps": 20, **PASSES}
    train(data, wanted(tmp_path / "never", **longer))
    signal_after(monkeypatch, step)
    with pytest.raises(Interrupted):
        train(data, wanted(tmp_path / "stopped", **longer))
    train(data, wanted(tmp_path / "stopped", **longer))
    runs = [tmp_path / name / "stage1" for name in ("never", "stopped")]
    assert content(runs[1], 10) == content(runs[0], 10)
    assert [steps_of(run) for run in runs] == [[4, 10], [4, 10]]
    assert all(config_of(runs[1])[key] == config_of(runs[0])[key] for key in ("best", "stopped_early", "completed"))


def test_a_run_goes_on_without_a_part_of_its_records(
    data: Prepared, tmp_path: Path, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "draw_losses", draw_losses)  # which reads them, too
    train(data, wanted(tmp_path))
    metrics = tmp_path / "stage1" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-150])
    assert train(data, wanted(tmp_path, max_steps=12)).name == "step_000004"
    assert "has lost its end" in (tmp_path / "stage1" / "events.log").read_text()
    assert [record["step"] for record in read_metrics(metrics)][-2:] == [12, 12]


def test_validations_are_read_from_records(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"step": 0, "valid": {"text": 0.5}}, {"step": 1, "loss": 1.0}]
    records += [{"step": step, "valid": {"text": step, "code": 6 - 2 * step}} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = Validations.read(tmp_path / "metrics.jsonl")
    assert (found.best_step, found.best_score) == (2, 2.0)
