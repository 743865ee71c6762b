"""The training loop: a run that is stopped goes on bit for bit."""

import io
import itertools
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from small_runs import content, settings, signal_after, train

from mm_rec.data import blocks
from mm_rec.data.batches import EvenBatches
from mm_rec.data.prepare import prepare
from mm_rec.data.prepared import Prepared
from mm_rec.data.synthetic import write_synthetic
from mm_rec.errors import UserError
from mm_rec.machine.signals import Interrupted
from mm_rec.storage import checkpoint
from mm_rec.storage.run_folder import RunFolder
from mm_rec.training import trainer
from mm_rec.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_world")


@pytest.mark.parametrize(("stage", "accumulation"), [("stage1", 1), ("stage1", 3), ("stage2", 2), ("stage3", 1)])
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, accumulation: int
) -> None:
    start = train(data, settings(tmp_path / "start", max_steps=2))
    wanted = {"stage": stage, "accumulation": accumulation, "init_from": start}
    train(data, settings(tmp_path / "whole", **wanted))
    whole = content(tmp_path / "whole" / stage, 10)
    for step in (1, 4, 6, 10):
        folder = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:
            signal_after(patch, step)
            with pytest.raises(Interrupted):
                train(data, settings(folder, **wanted))
        assert checkpoint.newest_valid(folder / stage / "checkpoints").name == checkpoint.checkpoint_name(step)
        train(data, settings(folder, **wanted))
        assert content(folder / stage, 10) == whole


def test_a_run_that_died_goes_on_from_its_newest_valid_checkpoint(data: Prepared, tmp_path: Path) -> None:
    train(data, settings(tmp_path / "whole"))
    whole = content(tmp_path / "whole" / "stage1", 10)
    train(data, settings(tmp_path / "died", max_steps=10))
    run = tmp_path / "died" / "stage1"
    # As if it had died in step 8: later checkpoints and samples are gone, one is damaged, records are ahead.
    for name in ("step_000008", "step_000009", "step_000010"):
        for path in (run / "checkpoints" / name).iterdir():
            path.unlink()
        (run / "checkpoints" / name).rmdir()
    weights = run / "checkpoints" / "step_000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for path in (run / "samples").iterdir():
        path.unlink()
    train(data, settings(tmp_path / "died"))
    assert content(run, 10) == whole | {"samples": content(run, 10)["samples"]}
    assert "damaged" in (run / "events.log").read_text()


def test_half_a_step_is_given_up_for_a_signal(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"accumulation": 4, "max_steps": 4}
    train(data, settings(tmp_path / "whole", **wanted))
    compute = Trainer.micro_batch_loss
    calls = []

    def interrupted(self: Trainer, *arguments: object) -> object:
        calls.append(1)
        if self.progress.step == 2 and len(calls) % 4 == 0:  # the two passes of the estimate come before
            os.kill(os.getpid(), signal.SIGINT)
        return compute(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "micro_batch_loss", interrupted)
        with pytest.raises(Interrupted) as stop:
            train(data, settings(tmp_path / "stopped", **wanted))
    assert stop.value.exit_code == 130
    run = tmp_path / "stopped" / "stage1"
    assert checkpoint.newest_valid(run / "checkpoints").name == "step_000002"
    train(data, settings(tmp_path / "stopped", **wanted))
    assert content(run, 4) == content(tmp_path / "whole" / "stage1", 4)


@pytest.mark.parametrize("remedy", ["rename it back", "--resume_from"])
def test_a_run_that_was_renamed_says_what_goes_on_with_it_after_a_signal(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remedy: str
) -> None:
    root, renamed, output = tmp_path / "runs", tmp_path / "renamed", io.StringIO()

    def rename(*_: object) -> None:
        (root / "stage1").rename(renamed)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_sample", rename)
        with pytest.raises(Interrupted):
            train(data, settings(root), output)
    message = (
        f"rename {renamed} back to {root / 'stage1'}, or add --resume_from {renamed}, and the same command goes on"
    )
    assert message in " ".join(output.getvalue().split())
    if remedy == "rename it back":
        renamed.rename(root / "stage1")
        assert train(data, settings(root)).parent.parent == root / "stage1"
    else:
        assert train(data, settings(root, resume_from=renamed)).parent.parent == renamed
    assert not list(root.glob("stage1-*"))


@pytest.mark.parametrize(("work", "step"), [("evaluate", 0), ("generate", 4)])
def test_a_signal_in_the_evaluation_leaves_the_step_before_it(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, step: int
) -> None:
    wanted = {"eval_interval": 4, "checkpoint_interval": 3}
    train(data, settings(tmp_path / "whole", **wanted))
    original = getattr(trainer, work)

    def interrupted(*arguments: object, **keywords: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, work, interrupted)
        with pytest.raises(Interrupted) as stop:
            train(data, settings(tmp_path / "stopped", **wanted))
    assert stop.value.exit_code == 143
    assert checkpoint.newest_valid(tmp_path / "stopped" / "stage1" / "checkpoints").name == f"step_{step:06d}"
    train(data, settings(tmp_path / "stopped", **wanted))
    assert content(tmp_path / "stopped" / "stage1", 10) == content(tmp_path / "whole" / "stage1", 10)


def test_fusion_learns_alone_at_first(data: Prepared, tmp_path: Path) -> None:
    train(data, settings(tmp_path, max_steps=1))
    train(data, settings(tmp_path, stage="stage2", max_steps=1))
    train(data, settings(tmp_path, stage="stage3", checkpoint_interval=1))
    steps = [
        checkpoint.load(tmp_path / "stage3" / "checkpoints" / checkpoint.checkpoint_name(step)).weights
        for step in range(11)
    ]
    for number, (before, after) in enumerate(itertools.pairwise(steps), 1):
        fusion_only = number <= 5  # half of a run this short
        for name in before:
            changed = not torch.equal(before[name], after[name])
            assert changed == (name.startswith("fusion.") or not fusion_only), (number, name)


def test_fusion_alone_reads_even_batches_and_carries_nothing(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = train(data, settings(tmp_path, max_steps=1))
    read: list[int] = []
    micro_batch = EvenBatches.micro_batch
    monkeypatch.setattr(EvenBatches, "micro_batch", lambda self, index: read.append(index) or micro_batch(self, index))
    train(data, settings(tmp_path, stage="stage3", init_from=start, accumulation=2, checkpoint_interval=1))
    assert read == list(range(10))  # two in each of five steps
    saved = tmp_path / "stage3" / "checkpoints"
    for step in range(11):
        assert bool(checkpoint.load(saved / checkpoint.checkpoint_name(step)).carried) == (step > 5)


def test_memory_that_runs_out_is_a_message(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Trainer.micro_batch_loss

    def full(self: Trainer, *arguments: object) -> object:
        if self.progress.step == 2:
            torch.empty(2**60)
        return compute(self, *arguments)

    monkeypatch.setattr(Trainer, "micro_batch_loss", full)
    with pytest.raises(UserError, match=r"out of memory in step 3; try --batch_size 1, --seq_len 64"):
        train(data, settings(tmp_path, seq_len=128))


def test_gradient_checkpointing_does_not_change_the_run(data: Prepared, tmp_path: Path) -> None:
    for mode in ("off", "on"):
        train(data, settings(tmp_path / mode, gradient_checkpointing=mode, max_steps=4))
    off, on = (content(tmp_path / mode / "stage1", 4) for mode in ("off", "on"))
    assert on == off


def test_bf16_trains_and_keeps_float32_masters(data: Prepared, tmp_path: Path) -> None:
    final = checkpoint.load(train(data, settings(tmp_path, precision="bf16", max_steps=6)))
    assert all(tensor.dtype == torch.float32 for tensor in final.weights.values())
    weight = final.weights["embedding.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_old_checkpoints_are_pruned(data: Prepared, tmp_path: Path) -> None:
    train(data, settings(tmp_path, keep_checkpoints=2))
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path / "stage1" / "checkpoints")]
    assert names == ["step_000009", "step_000010"]


def test_training_works_outside_of_the_main_thread(data: Prepared, tmp_path: Path) -> None:
    worker = threading.Thread(target=train, args=(data, settings(tmp_path, max_steps=1)))
    worker.start()
    worker.join()
    assert checkpoint.newest_valid(tmp_path / "stage1" / "checkpoints").name == "step_000001"


def test_data_that_change_in_a_run_end_it_with_its_steps_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic(tmp_path, 12)
    train(prepare(tmp_path, 320, filters=False), settings(tmp_path / "whole"))
    monkeypatch.setattr(blocks, "_CACHED_BLOCKS", 1)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 64)
    data = prepare(tmp_path, 320, filters=False)
    tokens = data.path / "text-train" / "tokens.bin"
    sound, log_loss = tokens.read_bytes(), RunFolder.log_loss

    def log_and_overwrite(run: RunFolder, step: int, loss: float) -> None:
        log_loss(run, step, loss)
        if step == 4:
            tokens.write_bytes(bytes(len(sound)))

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log_loss", log_and_overwrite)
        with pytest.raises(
            UserError, match=r"tokens\.bin was changed while it was in use; delete .*prepared/[0-9a-f]+,"
        ):
            train(data, settings(tmp_path / "run"))
    run = tmp_path / "run" / "stage1"
    newest = checkpoint.newest_valid(run / "checkpoints")
    assert newest is not None
    assert 4 <= checkpoint.checkpoint_step(newest) < 10
    with pytest.raises(UserError, match=r"tokens\.bin does not match its SHA-256"):
        prepare(tmp_path, 320, filters=False)
    tokens.write_bytes(sound)
    train(prepare(tmp_path, 320, filters=False), settings(tmp_path / "run"))
    assert content(run, 10) == content(tmp_path / "whole" / "stage1", 10)


def test_samples_begin_in_the_language_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "data" / "text").mkdir(parents=True)
    weather = ("güneşli", "yağmurlu", "karlı", "sisli", "rüzgârlı", "açık")
    lines = [f"Şehirde {day}. gün hava {weather[day % 6]}ydı ve {day * 7} kişi köprüden geçti." for day in range(60)]
    texts = ["\n".join(lines[start : start + 3]) for start in range(0, 60, 3)]
    for index, text in enumerate(texts):
        (tmp_path / "data" / "text" / f"{index}.txt").write_text(text, encoding="utf-8")
    data = prepare(tmp_path / "data", 320, filters=False)
    train(data, settings(tmp_path / "runs", max_steps=1))
    samples = [path.read_text(encoding="utf-8") for path in (tmp_path / "runs" / "stage1" / "samples").iterdir()]
    assert samples
    assert all(sample.startswith("[text] Şehirde") for sample in samples)
