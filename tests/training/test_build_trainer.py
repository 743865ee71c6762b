"""A trainer put together: what fits this machine, what a resumed run keeps."""

import dataclasses
import io
from pathlib import Path

import pytest
from small_runs import settings, train

from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.training.estimate import (
    FIXED_BYTES,
    count_parameters,
    measure_activations,
    measure_checkpointed,
    training_bytes,
    with_margin,
)

pytestmark = pytest.mark.usefixtures("small_world")


def test_the_carried_state_of_another_batch_size_is_left_out(data: Prepared, tmp_path: Path) -> None:
    start = train(data, settings(tmp_path / "first", max_steps=1))
    run = train(data, settings(tmp_path, stage="stage2", init_from=start, max_steps=3, batch_size=2))
    more = {"stage": "stage2", "init_from": start, "max_steps": 5, "resume_from": run, "allow_changes": True}
    train(data, settings(tmp_path, batch_size=3, **more))
    events = (tmp_path / "stage2-2" / "events.log").read_text()
    assert "the carried state of 2 rows is left out: a batch has 3" in events
    assert "batch_size was 2, is 3" in events


def test_what_cannot_fit_is_refused_before_it_starts(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def available(count: float) -> None:
        monkeypatch.setattr("mm_rec.training.runtime.available_memory", lambda _: int(count))

    large = settings(tmp_path, batch_size=8, seq_len=4096)
    available(1000)
    with pytest.raises(UserError, match=r"would take .* of memory and 1.0 kB are free; .* a smaller --preset"):
        train(data, large)
    available(FIXED_BYTES + 1e6)
    with pytest.raises(UserError, match=r"would take .* are free; try --batch_size 1, --seq_len \d{2,3}, "):
        train(data, large)
    available(1e12)
    monkeypatch.setattr("mm_rec.training.estimate.free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"checkpoints would take .* --keep_checkpoints 1"):
        train(data, large)
    assert not list((tmp_path / "stage1" / "checkpoints").iterdir())


def test_gradient_checkpointing_comes_when_nothing_else_fits(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = ModelConfig(vocab_size=320, d_model=16, n_heads=2, n_layers=8, d_ff=16, gate_every=8, window=8)
    monkeypatch.setitem(PRESETS, "tiny", deep)
    wanted = settings(tmp_path, batch_size=2, seq_len=512, max_steps=1, precision="fp32")
    training = training_bytes(count_parameters(deep), "fp32")
    plain = measure_activations(MMRecModel(deep), "text")
    checkpointed = measure_checkpointed(MMRecModel(deep), "text", plain)
    assert checkpointed < 0.7 * plain
    between = with_margin(training, (checkpointed + plain) / 2 * 1024)
    monkeypatch.setattr("mm_rec.training.runtime.available_memory", lambda _: between)
    output = io.StringIO()
    train(data, wanted, output)
    assert "gradient checkpointing" in output.getvalue()
    with pytest.raises(UserError, match="of memory"):
        train(data, dataclasses.replace(wanted, gradient_checkpointing="off", seed=1))


def test_precision_and_threads_are_kept(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_rec.machine.device.has_fast_bf16", lambda _: False)
    train(data, settings(tmp_path, max_steps=1))
    monkeypatch.setattr("mm_rec.machine.device.has_fast_bf16", lambda _: True)
    final = train(data, settings(tmp_path, max_steps=2))
    assert checkpoint.load(final).trainer["runtime"]["precision"] == "fp32"
    monkeypatch.setattr("mm_rec.training.runtime._describe_ops", lambda _: "other kernels")
    train(data, settings(tmp_path, max_steps=3))
    assert 'is "other kernels"' in (tmp_path / "stage1" / "events.log").read_text()
