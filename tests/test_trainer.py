import dataclasses
import gc
import io
import itertools
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mm_rec import checkpoint, trainer, training_progress
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.batches import EvenBatches
from mm_rec.data.prepare import Prepared, prepare
from mm_rec.data.synthetic import write_synthetic
from mm_rec.errors import UserError
from mm_rec.estimate import FIXED_BYTES, count_parameters, measure_activations, training_bytes, with_margin
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.run_folder import RunFolder
from mm_rec.run_stages import train_stages
from mm_rec.settings import TrainSettings
from mm_rec.signals import Interrupted, SignalGuard
from mm_rec.trainer import Trainer

RECORDS = ("loss_log.txt", "metrics.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, 12)
    return prepare(folder, 320, filters=False)


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model of one block an expert with everything in it, short samples, no pictures, one thread."""
    config = ModelConfig(vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, slots=2)
    monkeypatch.setitem(PRESETS, "tiny", config)
    monkeypatch.setattr(trainer, "SAMPLE_TOKENS", 3)
    monkeypatch.setattr(trainer, "draw_losses", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(folder: Path, **changes: object) -> TrainSettings:
    values = {
        "preset": "tiny",
        "checkpoint_dir": folder,
        "seq_len": 16,
        "max_steps": 10,
        "checkpoint_interval": 3,
        "keep_checkpoints": 100,
        "eval_interval": 4,
        "valid_bytes": 200,
        "device": "cpu",
        **changes,
    }
    return TrainSettings(**values)


def train(data: Prepared, wanted: TrainSettings, output: io.StringIO | None = None) -> Path:
    with SignalGuard() as guard:
        return train_stages(wanted, data, guard, Console(file=output or io.StringIO(), width=200))


def content(run: Path, step: int) -> dict[str, object]:
    """All of a run that has to come out the same."""
    found = checkpoint.load(run / "checkpoints" / checkpoint.checkpoint_name(step))
    tensors = {**found.weights, **found.optimizer, **found.carried}
    return {
        **{name: (run / name).read_bytes() for name in RECORDS},
        **{name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()},
        "trainer": json.dumps(found.trainer),
        "samples": sorted((path.name, path.read_bytes()) for path in (run / "samples").iterdir()),
    }


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGTERM) -> None:
    """Send a signal in the middle of a step, once."""
    log_loss = RunFolder.log_loss
    sent = []

    def log_and_signal(run: RunFolder, at: int, loss: float) -> None:
        log_loss(run, at, loss)
        if at == step and not sent:
            sent.append(at)
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(RunFolder, "log_loss", log_and_signal)


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


def test_stages_carry_on_the_weights(data: Prepared, tmp_path: Path) -> None:
    first = checkpoint.load(train(data, settings(tmp_path, max_steps=2)))
    train(data, settings(tmp_path, stage="stage2", max_steps=1))
    start = checkpoint.load(tmp_path / "stage2" / "checkpoints" / "step_000000")
    assert all(torch.equal(first.weights[name], start.weights[name]) for name in first.weights)
    assert not any(tensor.any() for tensor in start.optimizer.values())


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


def inject(monkeypatch: pytest.MonkeyPatch, faults: dict[int, float]) -> None:
    """Add to the loss of some steps, every time they are tried."""
    compute = Trainer.micro_batch_loss

    def faulty(self: Trainer, *arguments: object) -> object:
        loss, state = compute(self, *arguments)
        return loss + faults.get(self.progress.step + 1, 0.0), state

    monkeypatch.setattr(Trainer, "micro_batch_loss", faulty)


def test_the_carried_state_of_another_batch_size_is_left_out(data: Prepared, tmp_path: Path) -> None:
    start = train(data, settings(tmp_path / "first", max_steps=1))
    run = train(data, settings(tmp_path, stage="stage2", init_from=start, max_steps=3, batch_size=2))
    more = {"stage": "stage2", "init_from": start, "max_steps": 5, "resume_from": run, "allow_changes": True}
    train(data, settings(tmp_path, batch_size=3, **more))
    events = (tmp_path / "stage2-2" / "events.log").read_text()
    assert "the carried state of 2 rows is left out: a batch has 3" in events
    assert "batch_size was 2, is 3" in events


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
    monkeypatch.setattr(training_progress, "HISTORY", 2)
    inject(monkeypatch, {9: 1000.0})
    train(data, settings(tmp_path))
    assert "jumped" in (tmp_path / "stage1" / "events.log").read_text()
    assert checkpoint.load(tmp_path / "stage1" / "checkpoints" / "step_000010").trainer["position"]["skipped"] == [9]


@pytest.mark.parametrize("fault", [float("nan"), 1000.0])
def test_a_step_in_trouble_is_judged_before_its_update(
    fault: float, data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_progress, "HISTORY", 2)
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


def test_what_cannot_fit_is_refused_before_it_starts(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def available(count: float) -> None:
        monkeypatch.setattr("mm_rec.runtime.available_memory", lambda _: int(count))

    large = settings(tmp_path, batch_size=8, seq_len=4096)
    available(1000)
    with pytest.raises(UserError, match=r"would take .* of memory and 1.0 kB are free; .* a smaller --preset"):
        train(data, large)
    available(FIXED_BYTES + 1e6)
    with pytest.raises(UserError, match=r"would take .* are free; try --batch_size 4, --seq_len 2048"):
        train(data, large)
    available(1e12)
    monkeypatch.setattr("mm_rec.estimate.free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"checkpoints would take .* --keep_checkpoints 1"):
        train(data, large)
    assert not list((tmp_path / "stage1" / "checkpoints").iterdir())


def test_gradient_checkpointing_comes_when_nothing_else_fits(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = ModelConfig(vocab_size=320, d_model=16, n_heads=2, n_layers=8, d_ff=16, gate_every=8, window=8, slots=2)
    monkeypatch.setitem(PRESETS, "tiny", deep)
    wanted = settings(tmp_path, batch_size=2, seq_len=512, max_steps=1, precision="fp32")
    training = training_bytes(count_parameters(deep), "fp32")
    saved = measure_activations(MMRecModel(deep), "text")
    assert saved.checkpointed < 0.7 * saved.plain
    between = with_margin(training, (saved.checkpointed + saved.plain) / 2 * 1024)
    monkeypatch.setattr("mm_rec.runtime.available_memory", lambda _: between)
    output = io.StringIO()
    train(data, wanted, output)
    assert "gradient checkpointing" in output.getvalue()
    with pytest.raises(UserError, match="of memory"):
        train(data, dataclasses.replace(wanted, gradient_checkpointing="off", seed=1))


def test_measuring_activations_keeps_nothing() -> None:
    """What stayed would be nodes of autograd on the default stream, and then no CUDA graph could be recorded."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    model = MMRecModel(PRESETS["tiny"])
    measure_activations(model, "text")
    before = tensors()
    measure_activations(model, "text")
    assert tensors() <= before


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


def test_precision_and_threads_are_kept(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_rec.device.has_fast_bf16", lambda _: False)
    train(data, settings(tmp_path, max_steps=1))
    monkeypatch.setattr("mm_rec.device.has_fast_bf16", lambda _: True)
    final = train(data, settings(tmp_path, max_steps=2))
    assert checkpoint.load(final).trainer["runtime"]["precision"] == "fp32"
    monkeypatch.setattr("mm_rec.runtime._describe_ops", lambda _: "other kernels")
    train(data, settings(tmp_path, max_steps=3))
    assert 'is "other kernels"' in (tmp_path / "stage1" / "events.log").read_text()


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


def test_one_domain_alone_trains_through_all_stages(data: Prepared, tmp_path: Path) -> None:
    text = dataclasses.replace(data, train={"text": data.train["text"]}, valid={"text": data.valid["text"]})
    assert train(text, settings(tmp_path, stage="all", max_steps=2)).is_dir()


def test_tensorboard_is_there_for_those_who_ask(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        train(data, settings(tmp_path / "without", tensorboard=True))
    written = []
    writer = types.SimpleNamespace(
        add_scalar=lambda *scalar: written.append(scalar), close=lambda: written.append("closed")
    )
    module = types.SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: written.append((folder, purge_step)) or writer
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(data, settings(tmp_path / "with", tensorboard=True, max_steps=4))
    assert written[0] == (str(tmp_path / "with" / "stage1" / "tensorboard"), 1)
    assert {name for name, _, step in written[1:-1] if step == 4} >= {"train/loss", "valid/text", "valid/code"}
    assert written[-1] == "closed"
