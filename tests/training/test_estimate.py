"""What a run will take."""

import gc
from pathlib import Path

import pytest
import torch
from small_runs import settings, train

from mm_rec.config import PRESETS
from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError
from mm_rec.model import MMRecModel
from mm_rec.training.estimate import (
    check_disk,
    check_memory,
    checkpoint_bytes,
    count_orthogonalized,
    count_parameters,
    measure_activations,
    measure_checkpointed,
    memory_remedy,
    sharded_bytes,
    tokens_that_fit,
    training_bytes,
    with_margin,
)

pytestmark = pytest.mark.usefixtures("small_world")


def test_measuring_activations_keeps_nothing() -> None:
    """What stayed would be nodes of autograd on the default stream, and then no CUDA graph could be recorded."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    model = MMRecModel(PRESETS["tiny"])
    measure_checkpointed(model, "text", measure_activations(model, "text"))
    before = tensors()
    measure_checkpointed(model, "text", measure_activations(model, "text"))
    assert tensors() <= before


def test_measuring_activations_leaves_the_model_as_it_was() -> None:
    for checkpointing in (False, True):
        model = MMRecModel(PRESETS["tiny"])
        model.gradient_checkpointing = checkpointing
        plain = measure_activations(model, None)
        assert 0 < measure_checkpointed(model, None, plain) <= plain
        assert model.gradient_checkpointing is checkpointing


def test_bytes_of_training_by_precision() -> None:
    assert count_parameters(PRESETS["tiny"]) == sum(p.numel() for p in MMRecModel(PRESETS["tiny"]).parameters())
    assert training_bytes(1000, "fp32") == 1000 * (4 + 4 + 4 + 4)  # weight, gradient, two moments
    assert training_bytes(1000, "bf16") == 1000 * (2 + 2 + 4 + 4 + 4 + 4)  # and master weight, widened gradient
    assert training_bytes(1000, "bf16", replicated=True) == training_bytes(1000, "bf16") + 4000
    # One moment in place of two; a direction, and on a GPU the wide gradient, of those that are updated at a time.
    assert training_bytes(10**9, "bf16", orthogonalized=9 * 10**8) == 20 * 10**9 - 4 * 9 * 10**8 + 6 * 2**25
    assert training_bytes(1000, "fp32", orthogonalized=100) == 16_000 - 400 + 600


@pytest.mark.parametrize(("precision", "value"), [("fp32", 4), ("bf16", 2)])
def test_a_process_of_many_has_its_part_and_two_units_whole(precision: str, value: int) -> None:
    config = PRESETS["tiny"]
    model = MMRecModel(config)
    block = sum(p.numel() for p in model.experts["text"].blocks[0].parameters())
    rest = count_parameters(config) - 2 * block  # the embedding and what else is in no block
    whole = 2 * 2 * max(block, rest) * value  # two of them, each with its gradient
    parameters = count_parameters(config)
    assert sharded_bytes(config, precision, 10**9) == whole
    assert sharded_bytes(config, precision, 2) == training_bytes(parameters, precision) // 2 + whole


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_takes_what_was_estimated(data: Prepared, tmp_path: Path, optimizer: str) -> None:
    path = train(data, settings(tmp_path, max_steps=1, optimizer=optimizer))
    parameters, orthogonalized = (count(PRESETS["tiny"]) for count in (count_parameters, count_orthogonalized))
    moments = 8 * parameters - (4 * orthogonalized if optimizer == "muon" else 0)
    assert moments < (path / "optimizer.safetensors").stat().st_size < moments + 20_000
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert 4 * parameters + moments < total
    assert total <= checkpoint_bytes(parameters, orthogonalized if optimizer == "muon" else 0)


def test_memory_that_is_just_enough_is_enough() -> None:
    check_memory(2000, 2000, "no remedy")
    with pytest.raises(UserError, match=r"would take 2\.0 kB of memory and 1\.9 kB are free; a remedy"):
        check_memory(2000, 1940, "a remedy")


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "first"),
    [
        (8, 512, "--batch_size 4, --seq_len 256, "),
        (1, 512, "--seq_len 256, "),
        (2, 64, "--batch_size 1, "),
        (1, 64, ""),
    ],
)
def test_the_remedy_names_what_can_be_smaller(batch_size: int, seq_len: int, first: str) -> None:
    wanted = f"try {first}--gradient_checkpointing on or a smaller --preset"
    assert memory_remedy(batch_size, seq_len) == wanted


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "most_tokens", "wanted"),
    [
        (10**9, 512, 5000, "try --batch_size 9, --gradient_checkpointing on or a smaller --preset"),
        (8, 512, 10**6, "try --batch_size 4, --gradient_checkpointing on or a smaller --preset"),
        (4, 10**9, 5000, "try --batch_size 1, --seq_len 5000, --gradient_checkpointing on or a smaller --preset"),
        (1, 512, 63, "not even a short sequence fits, so try a smaller --preset or a machine with more memory"),
        (10**9, 10**9, -5, "not even a short sequence fits, so try a smaller --preset or a machine with more memory"),
    ],
)
def test_the_remedy_is_one_that_fits(batch_size: int, seq_len: int, most_tokens: int, wanted: str) -> None:
    assert memory_remedy(batch_size, seq_len, most_tokens) == wanted


def test_what_fits_is_what_the_estimate_takes() -> None:
    tokens = tokens_that_fit(10**9, 1000.0, 3 * 10**9)
    assert with_margin(10**9, 1000.0 * tokens) <= 3 * 10**9 < with_margin(10**9, 1000.0 * (tokens + 2))


@pytest.mark.parametrize(("keep", "existing", "wanted"), [(2, 0, 4), (2, 1, 3), (2, 3, 1), (2, 9, 1), (1, 0, 3)])
def test_the_disk_has_to_hold_the_kept_ones_the_best_and_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, existing: int, wanted: int
) -> None:
    monkeypatch.setattr("mm_rec.training.estimate.free_bytes", lambda _: 1000 * wanted)
    check_disk(tmp_path, 1000, keep, existing)
    monkeypatch.setattr("mm_rec.training.estimate.free_bytes", lambda _: 1000 * wanted - 1)
    with pytest.raises(UserError, match=rf"would take {wanted}\.0 kB in .*; try --keep_checkpoints 1"):
        check_disk(tmp_path, 1000, keep, existing)
