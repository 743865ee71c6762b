"""Run folders: which run a command means, one owner, records that do not show an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run_folders import IDENTITY, open_small, records, save, train

from mm_rec.errors import UserError
from mm_rec.storage import checkpoint
from mm_rec.storage.checkpoint import CheckpointError
from mm_rec.storage.resume import open_run, rewind
from mm_rec.storage.run_config import differences, plain, read_config, write_config
from mm_rec.text.tokenizer import Tokenizer

# --- which run ------------------------------------------------------------------------------------------------------


def test_a_new_run_has_its_configuration(tmp_path: Path) -> None:
    with open_small(tmp_path / "made" / "for it") as run:
        assert rewind(run) is None
        assert run.step == 0
        assert run.path == tmp_path / "made" / "for it" / "stage1"
        written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["stage"] == "stage1"
    assert written["identity"] == plain(IDENTITY)
    assert written["settings"] == {"max_steps": 100}
    assert written["versions"]["torch"] == torch.__version__


def test_the_same_command_continues_its_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=7)
    with open_small(tmp_path) as run:
        assert run.path == tmp_path / "stage1"
        resumed = rewind(run)
        assert resumed is not None
        assert (run.step, resumed.trainer["note"], resumed.weights["w"][0].item()) == (5, 5, 5.0)
    assert [path.name for path in tmp_path.glob("stage1*")] == ["stage1"]


def test_another_identity_starts_the_next_number_and_says_why(tmp_path: Path) -> None:
    open_small(tmp_path).release()
    events: list[str] = []
    with open_small(tmp_path, {**IDENTITY, "lr": 2e-5}, events) as run:
        assert run.path.name == "stage1-2"
    assert "new run" in events[0]
    assert "stage1 is another run: lr was 1e-05, is 2e-05" in events[0]
    assert events[0] in (run.path / "events.log").read_text()
    with open_small(tmp_path) as run:
        assert run.path.name == "stage1"
    with open_small(tmp_path, {**IDENTITY, "lr": 3e-5}) as run:
        assert run.path.name == "stage1-3"


def test_fresh_starts_beside_and_is_the_newest_from_then_on(tmp_path: Path) -> None:
    open_small(tmp_path).release()
    events: list[str] = []
    open_small(tmp_path, IDENTITY, events, fresh=True).release()
    assert "--fresh" in events[0]
    with open_small(tmp_path) as run:
        assert run.path.name == "stage1-2"


def test_stages_do_not_mix(tmp_path: Path) -> None:
    open_small(tmp_path).release()
    for name in ("stage1-x", "stage1-02", "stage10", "stage1-2.bak"):
        (tmp_path / name).mkdir()
    with open_run(tmp_path, "stage2", IDENTITY) as run:
        assert run.path.name == "stage2"
    with open_small(tmp_path, {**IDENTITY, "lr": 1.0}) as run:
        assert run.path.name == "stage1-2"


def test_a_name_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "thesis.txt").write_text("mine")
    (tmp_path / "stage1-2").write_text("a file")
    with open_small(tmp_path) as run:
        assert run.path.name == "stage1-3"
    assert (tmp_path / "stage1" / "thesis.txt").read_text() == "mine"


def test_settings_may_change_and_are_noted(tmp_path: Path) -> None:
    open_small(tmp_path).release()
    events: list[str] = []
    with open_small(tmp_path, IDENTITY, events, settings={"max_steps": 200}) as run:
        assert run.path.name == "stage1"
    assert "settings changed: max_steps was 100, is 200" in events
    assert (read_config(tmp_path / "stage1") or {})["settings"] == {"max_steps": 200}


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs"):
        open_small(tmp_path / "runs")


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(identity=st.dictionaries(st.text(), plain_values, max_size=4))
def test_any_identity_survives_its_file(tmp_path_factory: pytest.TempPathFactory, identity: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    config = plain({"stage": "stage1", "identity": identity})
    write_config(folder, config)
    assert read_config(folder) == config
    assert differences(config, read_config(folder)) == []


# --- resume by name -------------------------------------------------------------------------------------------------


def test_resume_from_the_newest_checkpoint_goes_on_in_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=10)
    for source in (run.path, run.checkpoints / "step_000010"):
        with open_small(tmp_path / "elsewhere", resume_from=source) as resumed:
            rewind(resumed)
            assert (resumed.path, resumed.step) == (run.path, 10)


def test_resume_from_an_earlier_checkpoint_starts_beside(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=12)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != "run.lock"}
    source = run.checkpoints / "step_000005"
    for until in (7, 12):  # stopped at 7 and started again with the same command
        with open_small(tmp_path, resume_from=source) as branch:
            assert branch.path.name == "stage1-2"
            train(branch, tokenizer, until=until)
    assert records(branch.path) == records(run.path)
    assert before == {path: path.read_bytes() for path in before}
    assert str(source) in (branch.path / "events.log").read_text()


def test_resume_from_another_identity_needs_the_flag(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=5)
    other = {**IDENTITY, "data_sha256": "ff", "threads": 4}
    with pytest.raises(UserError, match=r'data_sha256 was "1e10", is "ff"; .*threads was null, is 4.*--allow_changes'):
        open_small(tmp_path, other, resume_from=run.path)
    assert [path.name for path in tmp_path.glob("stage1*")] == ["stage1"]
    with open_small(tmp_path, other, resume_from=run.path, allow_changes=True) as changed:
        rewind(changed)
        assert (changed.path.name, changed.step) == ("stage1-2", 5)
    assert 'data_sha256 was "1e10", is "ff"' in (changed.path / "events.log").read_text()
    assert (read_config(run.path) or {})["identity"] == plain(IDENTITY)


def test_resume_from_a_damaged_checkpoint_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=10)
    source = run.checkpoints / "step_000010"
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_small(tmp_path, resume_from=source)


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(3,), (5,), (7, 8), (9, 10, 11), (1, 2, 4, 5, 6)])
def test_records_do_not_show_an_interruption(tmp_path: Path, tokenizer: Tokenizer, stops: tuple[int, ...]) -> None:
    with open_small(tmp_path / "straight") as straight:
        train(straight, tokenizer, until=13)
    for until in (*stops, 13):
        with open_small(tmp_path / "stopped") as run:
            train(run, tokenizer, until=until)
        with open(run.path / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "lo')  # a line cut off by the end of the process
    with open_small(tmp_path / "stopped") as run:
        train(run, tokenizer, until=13)
    assert records(run.path) == records(straight.path)
    steps = [json.loads(line)["step"] for line in (run.path / "timing.jsonl").read_text().splitlines()]
    assert set(steps) == set(range(1, 14))


def test_rewinding_cuts_back_to_the_newest_checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=5)
        at_checkpoint = records(run.path)["loss_log.txt"]
        run.log_loss(6, float("nan"))
        resumed = rewind(run)
        assert resumed is not None
        assert resumed.trainer["step"] == run.step == 5
        assert records(run.path)["loss_log.txt"] == at_checkpoint


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=15)
    (run.checkpoints / "step_000015" / "trainer.json").write_text("{}")
    (run.checkpoints / "step_000010" / "manifest.json").unlink()
    events: list[str] = []
    with open_small(tmp_path, IDENTITY, events) as run:
        train(run, tokenizer, until=15)
    assert sum("passed over" in event for event in events) == 2
    assert (run.checkpoints / "step_000015.damaged" / "trainer.json").read_text() == "{}"
    assert checkpoint.load(run.checkpoints / "step_000015").trainer["step"] == 15


def test_a_run_without_any_valid_checkpoint_is_not_started_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=5)
    kept = records(run.path)
    (run.checkpoints / "step_000005" / "model.safetensors").write_bytes(b"")
    with open_small(tmp_path) as run, pytest.raises(CheckpointError, match="--fresh"):
        rewind(run)
    assert records(run.path) == kept


def test_a_record_that_lost_its_end_is_noted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=5)
    (run.path / "loss_log.txt").unlink()
    events: list[str] = []
    with open_small(tmp_path, IDENTITY, events) as run:
        rewind(run)
    assert any("loss_log.txt has lost its end" in event for event in events)


def test_a_step_is_saved_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=5)
        manifest = (run.checkpoints / "step_000005" / "manifest.json").read_bytes()
        run.log_loss(6, 1.0)
        assert (save(run, 5, tokenizer) / "manifest.json").read_bytes() == manifest


def test_more_steps_continue_a_run_as_if_it_had_always_been_longer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for until in (10, 15):
        with open_small(tmp_path, settings={"max_steps": until}) as run:
            train(run, tokenizer, until=until)
    with open_small(tmp_path / "straight") as straight:
        train(straight, tokenizer, until=15)
    assert records(run.path) == records(straight.path)


def test_leftovers_of_a_dead_writer_are_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with open_small(tmp_path) as run:
        train(run, tokenizer, until=5)
    shutil.copytree(run.checkpoints / "step_000005", run.checkpoints / ".tmp-step_000010-0123456789abcdef")
    (run.path / ".tmp-config.yaml-0123456789abcdef").write_text("stage")
    shutil.copytree(run.path, tmp_path / ".tmp-stage1-0123456789abcdef")  # killed while a run folder was being made
    (tmp_path / ".tmp-notes").write_text("the user's")
    events: list[str] = []
    with open_small(tmp_path, IDENTITY, events) as run:
        pass
    assert sum("left over" in event for event in events) == 2
    assert list(tmp_path.rglob(".tmp-*")) == [tmp_path / ".tmp-notes"]


# --- one owner: many processes at once and the death of one are in tests/faults/ownership_workloads.py ----------------


def test_a_dead_owner_is_named(tmp_path: Path) -> None:
    open_small(tmp_path).release()
    (tmp_path / "stage1" / "run.lock").write_text('{"pid": 4321, "host": "there", "since": "then"}')
    events: list[str] = []
    open_small(tmp_path, IDENTITY, events).release()
    assert events[0] == "took over from process 4321 on there since then, which ended without releasing the folder"


def test_a_released_folder_has_no_dead_owner(tmp_path: Path) -> None:
    open_small(tmp_path).release()
    events: list[str] = []
    with open_small(tmp_path, IDENTITY, events), pytest.raises(UserError, match="in use"):
        open_small(tmp_path)
    assert not any("took over" in event for event in events)


def test_a_failed_opening_gives_the_folder_back(tmp_path: Path) -> None:
    open_small(tmp_path).release()
    with pytest.raises(TypeError):
        open_small(tmp_path, settings={"path": tmp_path})
    open_small(tmp_path).release()
