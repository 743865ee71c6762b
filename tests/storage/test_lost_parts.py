"""Run folders of which something is absent, changed, renamed or removed, while they are idle or in use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run_folders import open_small, records, save, train

from mm_rec.errors import UserError
from mm_rec.inference.loading import find_checkpoint
from mm_rec.scripts import doctor_command
from mm_rec.storage.checkpoint import CheckpointError
from mm_rec.storage.files import StorageError
from mm_rec.storage.resume import cut_back, find_newest, rewind
from mm_rec.storage.run_config import read_config
from mm_rec.system import REMOVES_OPEN_FILES
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.training.initial_weights import starting_checkpoint
from mm_rec.training.settings import TrainSettings

open_files_stay = pytest.mark.skipif(
    not REMOVES_OPEN_FILES, reason="Windows neither removes nor renames what somebody has open, nor its folder"
)

# --- absence is not a beginning -------------------------------------------------------------------------------------


def remove(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def empty(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


def unmount(run: Path) -> None:
    shutil.move(run / "checkpoints", run.parent.parent / "disk")
    (run / "checkpoints").symlink_to(run.parent.parent / "disk")
    shutil.move(run.parent.parent / "disk", run.parent.parent / "unmounted")


@pytest.mark.parametrize("lose", [remove, empty, unmount])
@pytest.mark.parametrize("earlier", [False, True], ids=["this-version", "an-earlier-version"])
def test_lost_checkpoints_are_no_beginning(tmp_path: Path, tokenizer: Tokenizer, lose: Any, earlier: bool) -> None:
    root = tmp_path / "runs"
    with open_small(root) as run:
        train(run, tokenizer, until=7)
    if earlier:
        config = dict(run.config)
        del config["completed"]
        (run.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before = records(run.path)
    lose(run.path)
    with open_small(root) as again, pytest.raises(CheckpointError) as error:
        rewind(again)
    message = str(error.value)
    assert str(run.path) in message
    assert ("a checkpoint" if earlier else "the checkpoint of step 5") in message
    assert "put" in message or "mount its disk" in message
    assert records(run.path) == before
    with pytest.raises(CheckpointError, match="has completed"):
        find_checkpoint(root)
    assert "has completed" in str(doctor_command.check_run(run.path)[-1])
    with open_small(root, fresh=True) as fresh:
        assert fresh.path.name == "stage1-2"


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=3)
    shutil.rmtree(run.path / "checkpoints")
    shutil.rmtree(run.path / "samples")
    with open_small(tmp_path) as run:
        assert rewind(run) is None
        assert records(run.path) == {"metrics.jsonl": b"", "loss_log.txt": b""}
        train(run, tokenizer, until=5)


def test_checkpoints_that_are_partly_gone_are_gone_on_from_with_a_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=12)
    shutil.rmtree(run.checkpoints / "step_000010")
    events: list[str] = []
    with open_small(tmp_path, events=events) as run:
        assert rewind(run) is not None
        assert run.step == 5
    assert "step_000010 was completed and is not there any more" in events
    assert (read_config(run.path) or {})["completed"] == 5


def test_finding_the_newest_checkpoint_changes_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=12)
    (run.checkpoints / "step_000010" / "model.safetensors").write_bytes(b"")
    with open_small(tmp_path) as run:
        before = {
            path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != "events.log"
        }
        newest = find_newest(run)
        assert newest is not None
        assert newest.path.name == "step_000005"
        assert before == {path: path.read_bytes() for path in before}
        cut_back(run, newest.trainer)
        assert (run.checkpoints / "step_000010.damaged").is_dir()


def test_a_run_that_was_stopped_before_its_first_step_is_not_the_newest_model(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with open_small(tmp_path) as run:
        rewind(run)
        only = save(run, 0, tokenizer)
        assert find_checkpoint(tmp_path) == only
        trained = save(run, 5, tokenizer)
    for name in ("stage1-2", "stage1-3"):
        with open_small(tmp_path, fresh=True) as fresh:
            rewind(fresh)
            untrained = save(fresh, 0, tokenizer)
            assert fresh.path.name == name
    with pytest.warns(UserWarning, match="stopped before its first step") as warned:
        assert find_checkpoint(tmp_path) == trained
    assert len(warned) == 2
    assert find_checkpoint(fresh.path) == untrained  # asked for by its name


# --- one byte of the configuration ----------------------------------------------------------------------------------


def test_every_changed_byte_of_a_configuration_is_noticed(tmp_path: Path) -> None:
    with open_small(tmp_path) as run:
        path = run.path / "config.yaml"
    sound = path.read_bytes()
    for place in range(len(sound)):
        for mask in (1, 32):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ mask]) + sound[place + 1 :])
            assert read_config(run.path) is None
    for content in (b"", sound[:-1], sound[: len(sound) // 2], sound + b"\n", None):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.yaml .*; put it back, or go on beside it with --resume_from"):
            open_small(tmp_path)
        assert doctor_command.check_run(run.path)[0].level == "broken"
        assert [one.name for one in tmp_path.glob("stage1*")] == ["stage1"]
    with open_small(tmp_path, fresh=True) as fresh:
        assert fresh.path.name == "stage1-2"
    path.write_bytes(sound)
    (tmp_path / "stage1-2").rename(tmp_path / "elsewhere")
    open_small(tmp_path).release()


def test_a_run_with_a_damaged_configuration_goes_on_beside_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=5)
    (run.path / "config.yaml").write_text("stage: ")
    with open_small(tmp_path, resume_from=run.path) as beside:
        assert rewind(beside) is not None
        assert (beside.path.name, beside.step) == ("stage1-2", 5)


def test_a_link_to_a_run_that_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    open_small(root).release()
    (root / "stage1").rename(tmp_path / "disk")
    (root / "stage1").symlink_to(tmp_path / "disk")
    open_small(root).release()
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"stage1 is a link to .*disk, which cannot be reached; mount its disk"):
        open_small(root)


def test_a_run_under_another_name_is_not_started_anew(tmp_path: Path) -> None:
    open_small(tmp_path).release()
    (tmp_path / "stage1").rename(tmp_path / "good")
    with pytest.raises(UserError, match=r"good is this run under another name; rename it to .*stage1 to go on"):
        open_small(tmp_path)
    (tmp_path / "good").rename(tmp_path / "stage1")
    shutil.copytree(tmp_path / "stage1", tmp_path / "a copy")
    with open_small(tmp_path) as run:
        assert run.path.name == "stage1"
    (tmp_path / "stage1").rename(tmp_path / "good")
    open_small(tmp_path, fresh=True).release()


def test_a_checkpoint_under_a_name_of_the_users_is_gone_on_from(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=5)
    shutil.copytree(run.checkpoints / "step_000005", tmp_path / "best")
    with open_small(tmp_path, resume_from=tmp_path / "best") as beside:
        assert rewind(beside) is not None
        assert beside.step == 5


# --- a folder that is renamed while it is owned ---------------------------------------------------------------------


@open_files_stay
def test_a_renamed_run_is_gone_on_with_where_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path / "straight") as straight:
        train(straight, tokenizer, until=10)
    with open_small(tmp_path / "runs") as run:
        train(run, tokenizer, until=4)
        run.path.rename(tmp_path / "runs" / "renamed")
        run.log_loss(5, 2.0)
        run.log_metrics(5, loss=2.0)
        save(run, 5, tokenizer)
        assert run.path == tmp_path / "runs" / "renamed"
        run.path.rename(tmp_path / "moved")
        open_small(tmp_path / "runs").release()  # another run under the old name
        rewind(run)
        train(run, tokenizer, until=10)
    assert records(tmp_path / "moved") == records(straight.path)
    assert "renamed was renamed to" in (tmp_path / "moved" / "events.log").read_text()
    assert not (tmp_path / "runs" / "stage1" / "loss_log.txt").exists()


def test_a_run_that_is_removed_ends_with_a_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=4)
        shutil.rmtree(run.path)
        for write in (lambda: run.log_loss(5, 1.0), lambda: save(run, 5, tokenizer)):
            with pytest.raises(StorageError, match="stage1 was removed or moved to another disk"):
                write()


@open_files_stay
def test_a_lock_file_that_is_removed_makes_no_second_owner(tmp_path: Path) -> None:
    with open_small(tmp_path) as run:
        (run.path / "run.lock").unlink()
        with pytest.raises(UserError, match=f"stage1 is in use by process {os.getpid()} on"):
            open_small(tmp_path)
        run.log_loss(1, 1.0)
    open_small(tmp_path).release()


def test_a_damaged_newest_checkpoint_is_not_passed_over_in_silence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=10)
    (run.checkpoints / "step_000010" / "model.safetensors").write_bytes(b"")
    for path in (tmp_path, run.path):
        with pytest.warns(UserWarning, match=r"passed over a checkpoint: .*step_000010/model\.safetensors is damaged"):
            assert find_checkpoint(path).name == "step_000005"
    with pytest.raises(UserError, match=r"step_000010/model\.safetensors is damaged.*; name the checkpoint to start"):
        starting_checkpoint(TrainSettings(stage="stage2", init_from=run.path))


@open_files_stay
def test_a_record_that_is_removed_or_cut_while_it_is_written_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    events: list[str] = []
    with open_small(tmp_path, events=events) as run:
        train(run, tokenizer, until=7)
        (run.path / "loss_log.txt").unlink()
        os.truncate(run.path / "metrics.jsonl", 10)
        run.log_loss(8, 1.0)
        run.log_metrics(8, loss=1.0)
        run.log_loss(9, 1.0)
        told = [event for event in events if "was removed or cut while it was written" in event]
        assert [Path(event.split()[0]).name for event in told] == ["loss_log.txt", "metrics.jsonl"]
        cut_back(run, None)
        run.log_loss(1, 1.0)
    assert len([event for event in events if "was removed or cut" in event]) == 2
