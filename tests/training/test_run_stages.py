"""Which run a command means: stages in a row, resuming, refusals."""

import dataclasses
import io
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import content, settings, signal_after, train

from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_recall import add_recall_rows
from mm_rec.data.prepared import Prepared
from mm_rec.data.synthetic import write_synthetic
from mm_rec.errors import UserError
from mm_rec.machine.signals import Interrupted
from mm_rec.storage import checkpoint

pytestmark = pytest.mark.usefixtures("small_world")


def test_all_stages_run_and_are_found_finished(data: Prepared, tmp_path: Path) -> None:
    wanted = settings(tmp_path, stage="all", max_steps=3)
    final = train(data, wanted)
    assert final == tmp_path / "stage3" / "checkpoints" / "step_000003"
    output = io.StringIO()
    before = content(tmp_path / "stage2", 3)
    assert train(data, wanted, output) == final
    assert [name for name in ("stage1", "stage2", "stage3") if f"{name} is finished" in output.getvalue()] == [
        "stage1",
        "stage2",
        "stage3",
    ]
    assert content(tmp_path / "stage2", 3) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["stage1", "stage2", "stage3"]
    # One stage by itself finds the one before it, and so the run that there is.
    output = io.StringIO()
    train(data, settings(tmp_path, stage="stage2", max_steps=3), output)
    assert "stage2 is finished" in output.getvalue()


@pytest.mark.parametrize(
    ("passes", "expected"), [(2, ""), (6, "each later one teaches less"), (20, "the rest only teach it by heart")]
)
def test_little_data_is_told_before_the_first_step(data: Prepared, tmp_path: Path, passes: int, expected: str) -> None:
    rows = round(passes * sum(store.n_tokens for store in data.train.values()) / (2 * 64))
    output = io.StringIO()
    train(data, settings(tmp_path, max_steps=2, batch_size=rows, seq_len=64, valid_bytes=50), output)
    told = " ".join(output.getvalue().split())
    assert f"({passes}.0 passes over the data)" in told
    assert ("little data: " in told) == bool(expected)
    assert told.count("fewer are better, and one that knows nothing needs 8") == 1
    assert expected in told
    assert ("training ends where validation rises" in told) == bool(expected)


def test_stages_carry_on_the_weights(data: Prepared, tmp_path: Path) -> None:
    first = checkpoint.load(train(data, settings(tmp_path, max_steps=2)))
    train(data, settings(tmp_path, stage="stage2", max_steps=1))
    start = checkpoint.load(tmp_path / "stage2" / "checkpoints" / "step_000000")
    assert all(torch.equal(first.weights[name], start.weights[name]) for name in first.weights)
    assert not any(tensor.any() for tensor in start.optimizer.values())


def test_rows_that_train_recall_are_part_of_stage2_in_their_share(data: Prepared, tmp_path: Path) -> None:
    def identity_of_data(stage: str, **changes: object) -> str:
        run = train(data, settings(tmp_path, stage=stage, max_steps=1, **changes), output).parent.parent
        identity: dict[str, str] = yaml.safe_load((run / "config.yaml").read_text())["identity"]
        return identity["data"]

    output = io.StringIO()
    assert identity_of_data("stage1") == data.data_sha256
    assert "rows that train recall" not in output.getvalue()
    usual = identity_of_data("stage2")
    assert usual == add_recall_rows(data, 0.05).data_sha256
    assert "rows that train recall" in output.getvalue()
    assert identity_of_data("stage2", recall_share=0.0) == data.data_sha256
    assert identity_of_data("stage2", recall_share=0.5) == add_recall_rows(data, 0.5).data_sha256
    short = identity_of_data("stage1", recall_share=0.5, fresh=True)
    assert short == add_recall_rows(data, 0.5, longest=8).data_sha256  # rows that fit into windows of 16


def test_more_steps_continue_a_finished_run(data: Prepared, tmp_path: Path) -> None:
    train(data, settings(tmp_path, max_steps=4))
    output = io.StringIO()
    final = train(data, settings(tmp_path, max_steps=6), output)
    assert final == tmp_path / "stage1" / "checkpoints" / "step_000006"
    steps = [int(line.split(",")[0]) for line in (tmp_path / "stage1" / "loss_log.txt").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "steps was 4, is 6" in (tmp_path / "stage1" / "events.log").read_text()


def test_the_cap_stops_early_on_the_same_schedule(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, settings(tmp_path / "whole"))
    monkeypatch.setenv("MM_REC_MAX_STEPS", "4")
    train(data, settings(tmp_path / "capped"))
    monkeypatch.delenv("MM_REC_MAX_STEPS")
    train(data, settings(tmp_path / "capped"))
    whole, capped = (content(tmp_path / name / "stage1", 10) for name in ("whole", "capped"))
    assert whole["loss_log.txt"] == capped["loss_log.txt"]
    assert whole["embedding.weight"] == capped["embedding.weight"]


def test_another_identity_starts_the_next_number_and_says_why(data: Prepared, tmp_path: Path) -> None:
    train(data, settings(tmp_path, max_steps=1))
    output = io.StringIO()
    train(data, settings(tmp_path, max_steps=1, batch_size=3), output)
    assert "batch_size was 2, is 3" in output.getvalue()
    assert (tmp_path / "stage1-2").is_dir()
    train(data, settings(tmp_path, max_steps=1, fresh=True))
    assert (tmp_path / "stage1-3").is_dir()


def test_a_named_run_goes_on_only_as_it_was(data: Prepared, tmp_path: Path) -> None:
    train(data, settings(tmp_path, max_steps=2))
    run = tmp_path / "stage1"
    with pytest.raises(UserError, match=r"batch_size was 2, is 4.*--allow_changes"):
        train(data, settings(tmp_path, batch_size=4, resume_from=run))
    train(data, settings(tmp_path, max_steps=3, resume_from=run))
    assert checkpoint.newest_valid(run / "checkpoints").name == "step_000003"
    train(data, settings(tmp_path, max_steps=4, batch_size=4, resume_from=run, allow_changes=True))
    assert "batch_size was 2, is 4" in (tmp_path / "stage1-2" / "events.log").read_text()


def test_a_stage_without_the_one_before_says_what_to_do(data: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage2 starts from a trained stage1.*--stage stage1.*--init_from"):
        train(data, settings(tmp_path, stage="stage2"))


def test_a_stage_waits_for_the_one_before_to_finish(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(data, settings(tmp_path))
    with pytest.raises(UserError, match=r"not finished \(2 of 10 steps\)"):
        train(data, settings(tmp_path, stage="stage2"))


def test_another_tokenizer_is_refused(data: Prepared, tmp_path: Path) -> None:
    start = train(data, settings(tmp_path, max_steps=1))
    write_synthetic(tmp_path / "other", 12, seed=1)
    other = prepare(tmp_path / "other", 300, filters=False)
    with pytest.raises(UserError, match="another tokenizer"):
        train(other, settings(tmp_path, stage="stage2", init_from=start))


def test_one_domain_alone_trains_through_all_stages(data: Prepared, tmp_path: Path) -> None:
    text = dataclasses.replace(data, train={"text": data.train["text"]}, valid={"text": data.valid["text"]})
    assert train(text, settings(tmp_path, stage="all", max_steps=2)).is_dir()
