"""A file of another version of its format ends in one line that names what still works, and that does work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from continue_fixtures import commands
from transformers import AutoModelForCausalLM

import mm_rec.hf
from mm_rec import cli, formats
from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_conversations import prepare_conversations
from mm_rec.formats import KEY, VERSIONS, FormatError, is_current
from mm_rec.inference import session_file
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.loading import load_model
from mm_rec.scripts import doctor_command
from mm_rec.storage import checkpoint, files
from mm_rec.storage.checkpoint import CheckpointError
from mm_rec.text.tokenizer import Tokenizer

STOPPED, FINISHED = "checkpoints/step_000004", "checkpoints/step_000007"
OTHERS = [9, 0, -1, 10**400, "1", "", "new\nline", True, False, None, 1.0, float("nan"), [1], {"1": 1}]

Edit = Callable[[Path], None]


def set_version(value: Any) -> Edit:
    """An edit of a JSON file that states the version ``value``."""

    def edit(path: Path) -> None:
        path.write_text(json.dumps({KEY: value, **json.loads(path.read_bytes())} | {KEY: value}))

    return edit


def edited(source: Path, target: Path, name: str, edit: Edit) -> Path:
    """A copy of a sealed folder with one file changed, sealed again."""
    with files.atomic_folder(target) as folder:
        for path in source.iterdir():
            if path.name != files.MANIFEST:
                shutil.copyfile(path, folder / path.name)
        edit(folder / name)
    return target


def in_one_line(error: BaseException, *parts: str) -> bool:
    """Whether an error is a line that a person can read, with all ``parts`` in it."""
    text = str(error)
    return "\n" not in text and len(text) < 500 and all(part in text for part in parts)


def raised(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Let this be the MM-Rec that comes after a change of the format ``kind``."""
    monkeypatch.setitem(VERSIONS, kind, VERSIONS[kind] + 1)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VERSIONS)
@pytest.mark.parametrize("found", OTHERS)
def test_nothing_but_the_number_itself_is_current(kind: str, found: Any) -> None:
    assert is_current(kind, VERSIONS[kind])
    assert not is_current(kind, found)


@pytest.mark.parametrize("kind", ["model", "training", "session", "token store"])
@pytest.mark.parametrize("found", OTHERS)
def test_every_other_value_is_refused_in_one_line(kind: str, found: Any) -> None:
    with pytest.raises(FormatError) as error:
        formats.check_version(kind, found, "some/file")
    assert in_one_line(error.value, "some/file", kind, f"reads {VERSIONS[kind]}; ")


def test_what_is_written_states_its_version(written: Path, tmp_path: Path) -> None:
    found = checkpoint.load(written / "stopped" / "stage3" / STOPPED)
    checkpoint.save(
        tmp_path / "step_000004",
        config=found.config,
        weights=found.weights,
        optimizer=found.optimizer,
        carried=found.carried,
        trainer=found.trainer,
        tokenizer=found.load_tokenizer(),
    )
    for name, kind in (("config.json", "model"), ("trainer.json", "training")):
        values = json.loads((tmp_path / "step_000004" / name).read_bytes())
        assert is_current(kind, values[KEY])
    AutoModelForCausalLM.from_pretrained(tmp_path / "step_000004").save_pretrained(tmp_path / "theirs")
    assert is_current("model", json.loads((tmp_path / "theirs" / "config.json").read_bytes())[KEY])


# --- model: config.json of checkpoints and exported folders -----------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3, 5, -1, True, None, "1", 10**400])
def test_a_model_of_another_version(written: Path, tmp_path: Path, version: Any) -> None:
    for source in ("exported", f"finished/chat/{FINISHED}"):
        path = edited(written / source, tmp_path / Path(source).name, "config.json", set_version(version))
        loads = [
            lambda path=path: checkpoint.load(path, weights_only=True),
            lambda path=path: load_model(path, device="cpu"),
            lambda path=path: AutoModelForCausalLM.from_pretrained(path),
            lambda path=path: mm_rec.hf.MMRecForCausalLM.from_pretrained(path),
        ]
        for load in loads:
            with pytest.raises(FormatError) as error:
                load()
            assert in_one_line(error.value, str(path), "model format", "still runs, trains and exports it")
        if source != "exported":
            with pytest.raises(FormatError, match="model format"):
                checkpoint.load(path)


def test_a_model_after_a_change(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised(monkeypatch, "model")
    for name in ("exported", f"finished/chat/{FINISHED}"):
        with pytest.raises(FormatError, match="has model format 4"):
            load_model(written / name, device="cpu")
        with pytest.raises(FormatError, match="has model format 4"):
            AutoModelForCausalLM.from_pretrained(written / name)


def test_what_had_another_memory_ends_in_one_line(
    before: Path, written: Path, about: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that is given a model, run or session of b411fa1 says what still works, and changes nothing."""
    runs = tmp_path / "stopped"
    shutil.copytree(before / "stopped", runs)
    run, files_before = runs / "stage1", sorted(runs.rglob("*"))
    data = [
        "--data_dir",
        str(shutil.copytree(written / "data", tmp_path / "data")),
        "--checkpoint_dir",
        str(tmp_path / "new"),
        "--preset",
        "tiny",
    ]
    session = ["--session", str(before / "session.safetensors"), "--resume"]
    for command, kind in (
        (["generate", "--model", str(before / "exported"), "--prompt", "The "], "model"),
        (["eval", "--model", str(run)], "model"),
        (["export", "--model", str(run), "--output", str(tmp_path / "export")], "model"),
        (["train", "--stage", "stage2", "--init_from", str(run), *data], "model"),
        (["chat", "--model", str(written / "exported"), *session], "session"),
    ):
        assert cli.main(command) == 2, command
        output = capsys.readouterr()
        assert f"has {kind} format 1, and MM-Rec" in output.err, command
        assert "still" in output.err
        assert output.err.count("\n") == 1, command
    with pytest.raises(FormatError, match="has model format 1"):
        AutoModelForCausalLM.from_pretrained(before / "exported")
    assert sorted(runs.rglob("*")) == files_before
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "export").exists()


def test_a_command_says_it_and_ends(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edited(written / "exported", tmp_path / "later", "config.json", set_version(5))
    assert cli.main(["generate", "--model", str(path), "--prompt", "The "]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {path / 'config.json'} has model format 5")
    assert output.err.count("\n") == 1


# --- training: trainer.json of checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3, 5, -1, True, None, "1", 10**400])
def test_a_training_state_of_another_version_leaves_its_weights(written: Path, tmp_path: Path, version: Any) -> None:
    source = written / "stopped" / "stage2" / STOPPED
    path = edited(source, tmp_path / "step_000004", "trainer.json", set_version(version))
    for load in (checkpoint.load, lambda path: checkpoint.load_newest(path.parent)):
        with pytest.raises(FormatError) as error:
            load(path)
        assert not isinstance(error.value, CheckpointError), "an older checkpoint would be taken in its place"
        assert in_one_line(error.value, str(path / "trainer.json"), "training format", "--init_from", "generate")
    weights = checkpoint.load(source, weights_only=True).weights
    found = checkpoint.load(path, weights_only=True).weights
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_other_files_of_another_version_are_not_missed(written: Path, tmp_path: Path) -> None:
    def other_files(trainer: Path) -> None:
        set_version(5)(trainer)
        trainer.with_name("optimizer.safetensors").rename(trainer.with_name("moments.safetensors"))

    path = edited(written / "stopped" / "stage2" / STOPPED, tmp_path / "step_000004", "trainer.json", other_files)
    with pytest.raises(FormatError, match="training format 5"):
        checkpoint.load(path)
    with pytest.raises(FormatError, match="training format 5"):
        checkpoint.newest_valid(tmp_path)


@pytest.fixture
def later_run(copy: Path, written: Path) -> Path:
    """A run in the current folder, stopped/stage2, that has a training state of version 4."""
    path = Path("stopped/stage2") / STOPPED
    shutil.rmtree(path)
    return edited(written / path, path, "trainer.json", set_version(5)).parent.parent


def test_a_run_of_another_version_is_left_as_it_is(
    later_run: Path, about: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(later_run.rglob("*"))
    assert cli.main(commands(about)["stage2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {later_run / STOPPED / 'trainer.json'} has training format 5")
    assert error.count("\n") == 1
    assert set(before) == {path for path in later_run.rglob("*") if path.name not in ("events.log", "run.lock")}
    assert [finding.level for finding in doctor_command.check_run(later_run)].count("broken") > 0


def test_a_new_run_starts_from_the_weights_of_another_version(later_run: Path, about: dict[str, Any]) -> None:
    command = [*commands(about)["stage3"], "--init_from", str(later_run), "--checkpoint_dir", "anew"]
    first = Path("anew/stage3/checkpoints/step_000000")
    assert cli.main([*command, "--max_steps", "1", "--keep_checkpoints", "2"]) == 0
    weights, expected = (checkpoint.load(path, weights_only=True).weights for path in (first, later_run / STOPPED))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_runs_after_a_change(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised(monkeypatch, "training")
    for stage in ("stage1", "stage2", "stage3", "instruct", "chat"):
        path = written / "stopped" / stage / STOPPED
        with pytest.raises(FormatError, match=r"has training format 4.*--init_from"):
            checkpoint.load(path)
        assert checkpoint.load(path, weights_only=True).weights


# --- session ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3, 5, -1, True, None, "1", 10**400])
def test_a_session_of_another_version(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: Any
) -> None:
    tensors, settings = session_file.read(written / "session.safetensors")
    path = tmp_path / "session.safetensors"
    with monkeypatch.context() as patch:
        patch.setitem(VERSIONS, "session", version)
        session_file.write(path, tensors, settings)
    loaded = load_model(written / "exported", device="cpu", precision="fp32")
    with pytest.raises(FormatError) as error:
        ChatSession.load(path, loaded.model, loaded.tokenizer)
    assert in_one_line(error.value, str(path), "session format", "a new session can be started")


def test_a_session_after_a_change(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised(monkeypatch, "session")
    with pytest.raises(FormatError, match="has session format 4"):
        session_file.read(written / "session.safetensors")


# --- prepared data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, -1, True, None, "1", 10**400])
def test_a_token_store_of_another_version_is_made_anew(
    written: Path, about: dict[str, Any], tmp_path: Path, version: Any
) -> None:
    shutil.copytree(written / "data", tmp_path / "data")
    prepared = prepare(tmp_path / "data", about["model"]["vocab_size"]).path
    prepared.rename(tmp_path / "sound")
    with files.atomic_folder(prepared) as folder:
        shutil.copytree(tmp_path / "sound", folder, dirs_exist_ok=True)
        (folder / files.MANIFEST).unlink()
        set_version(version)(folder / "text-train" / "index.json")
    with pytest.raises(FormatError) as error:
        prepare(tmp_path / "data", about["model"]["vocab_size"])
    assert in_one_line(error.value, f"{prepared} has token store format", "delete it")
    shutil.rmtree(prepared / "text-train")
    with pytest.raises(formats.UserError, match=f"delete {prepared}, the next run makes it anew"):
        prepare(tmp_path / "data", about["model"]["vocab_size"])
    shutil.rmtree(prepared)
    anew = prepare(tmp_path / "data", about["model"]["vocab_size"]).path
    assert anew.parent == prepared.parent
    assert (anew / "text-train" / "index.json").exists()


def test_prepared_data_after_a_change_is_made_anew_beside_it(
    written: Path, about: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written / "data", tmp_path / "data")
    shutil.copytree(written / "stopped" / "prepared", tmp_path / "conversations")
    tokenizer = Tokenizer.load(written / "exported")

    def both() -> list[Path]:
        documents = prepare(tmp_path / "data", about["model"]["vocab_size"])
        conversations = prepare_conversations(
            tmp_path / "data" / "chat", tokenizer, name="chat", cache=tmp_path / "conversations"
        )
        return [documents.path, conversations.path]

    before = both()
    for folder, path in zip(("data/prepared", "stopped/prepared"), before, strict=True):
        assert (written / folder / path.name).exists()
    for kind in ("documents", "conversations"):
        raised(monkeypatch, kind)
    after = both()
    assert not set(before) & set(after)
    assert all(path.exists() for path in before)
