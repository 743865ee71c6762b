"""Checkpoints: what is written comes back, nothing damaged is accepted, nothing is pickled."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.storage import checkpoint
from mm_rec.storage.checkpoint import CheckpointError
from mm_rec.storage.files import StorageError
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer

CONFIG = ModelConfig.preset("tiny", vocab_size=320, d_model=8, n_layers=1, d_ff=16)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a small text, a small tokenizer"] * 4, 300)


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding.weight": torch.randn(320, 8, generator=generator),
        "step": torch.tensor(float(seed)),
        "position": torch.arange(seed, seed + 3),
        "half": torch.randn(2, 5, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }


def save(path: Path, tokenizer: Tokenizer, step: int = 50, **changes: object) -> Path:
    content: dict[str, object] = {
        "config": CONFIG,
        "weights": tensors(step),
        "optimizer": {f"exp_avg.{name}": value for name, value in tensors(step + 1).items()},
        "carried": tensors(step + 2),
        "trainer": {"step": step, "rng": [1, 2, 3], "lr": 0.1 + 0.2},
        "tokenizer": tokenizer,
        **changes,
    }
    checkpoint.save(path, **content)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def pristine(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two checkpoints, not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (50, 100):
        save(folder / checkpoint.checkpoint_name(step), tokenizer, step)
    return folder


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


def test_what_is_saved_is_loaded(pristine: Path, tokenizer: Tokenizer) -> None:
    loaded = checkpoint.load(pristine / "step_000050")
    assert loaded.config == CONFIG
    assert_same(loaded.weights, tensors(50))
    assert_same(loaded.optimizer, {f"exp_avg.{name}": value for name, value in tensors(51).items()})
    assert_same(loaded.carried, tensors(52))
    assert loaded.trainer == {"step": 50, "rng": [1, 2, 3], "lr": 0.1 + 0.2}
    assert loaded.load_tokenizer().sha256 == tokenizer.sha256


def test_only_weights_can_be_loaded_without_the_training_files(pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(pristine / "step_000050", path)
    (path / "optimizer.safetensors").unlink()
    loaded = checkpoint.load(path, weights_only=True)
    assert_same(loaded.weights, tensors(50))
    assert (loaded.optimizer, loaded.carried, loaded.trainer) == ({}, {}, {})
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        checkpoint.load(path)


def test_layout_is_that_of_hugging_face(pristine: Path, tokenizer: Tokenizer) -> None:
    path = pristine / "step_000050"
    assert {file.name for file in path.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("modeling_mm_rec.py", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("optimizer.safetensors", "carried.safetensors", "trainer.json", "manifest.json"),
    }
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "mm_rec"
    assert config["architectures"] == ["MMRecForCausalLM"]
    assert config["eos_token_id"] == tokenizer.eos_id
    assert config["d_model"] == 8
    assert json.loads((path / "generation_config.json").read_text())["bos_token_id"] == tokenizer.bos_id


def test_files_are_as_readable_as_any_other(pristine: Path) -> None:
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (pristine / "step_000050").iterdir()}
    assert len(modes) == 1


def test_a_checkpoint_is_never_overwritten(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "step_000050", tokenizer)
    with pytest.raises(StorageError, match="nothing is overwritten"):
        save(path, tokenizer, trainer={"step": 51})
    assert checkpoint.load(path).trainer["step"] == 50
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000050"]


def test_a_failing_save_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path / "step_000050", tokenizer, trainer={"step": object()})
    assert list(tmp_path.iterdir()) == []


# --- damage (mutations of every kind are in tests/faults/damage_workloads.py) -----------------------------------------


def test_every_part_of_the_manifest_counts(pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "step_000100"
    shutil.copytree(pristine / "step_000100", path)
    content = (path / "manifest.json").read_bytes()
    for position in range(0, len(content), 3):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (path / "manifest.json").write_bytes(changed)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{}", b'{"files": 3}', b'{"files": {}, "format": 1}', b"[" * 100_000, b"\xff\xfe"],
)
def test_a_manifest_that_is_none_is_refused(pristine: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step_000100"
    shutil.copytree(pristine / "step_000100", path)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="manifest"):
        checkpoint.load(path)


def test_a_foreign_file_does_not_matter(pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "step_000100"
    shutil.copytree(pristine / "step_000100", path)
    (path / "README.md").write_text("notes")
    assert checkpoint.load(path).trainer["step"] == 100


# --- which one, and for how long ------------------------------------------------------------------------------------


def test_the_newest_is_that_of_the_highest_step(pristine: Path, tmp_path: Path) -> None:
    assert checkpoint.newest_valid(tmp_path) is None
    for step in (50, 999_999, 1_000_000, 150):
        shutil.copytree(pristine / "step_000050", tmp_path / checkpoint.checkpoint_name(step))
    (tmp_path / "step_2000000_copy").mkdir()
    (tmp_path / ".tmp-step_3000000-0").mkdir()
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "step_1000000"


@pytest.mark.parametrize(("keep_last", "kept"), [(3, [80, 90, 100]), (1, [100]), (20, list(range(10, 101, 10)))])
def test_prune(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    for step in range(10, 101, 10):
        (tmp_path / checkpoint.checkpoint_name(step)).mkdir()
    (tmp_path / "notes").mkdir()
    removed = checkpoint.prune(tmp_path, keep_last)
    assert [checkpoint.checkpoint_step(path) for path in checkpoint.list_checkpoints(tmp_path)] == kept
    assert len(removed) == 10 - len(kept)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", *(checkpoint.checkpoint_name(step) for step in kept)}


def test_prune_keeps_one_of_a_step_that_is_named(tmp_path: Path) -> None:
    for step in range(10, 101, 10):
        (tmp_path / checkpoint.checkpoint_name(step)).mkdir()
    checkpoint.prune(tmp_path, 2, 30)
    assert [checkpoint.checkpoint_step(path) for path in checkpoint.list_checkpoints(tmp_path)] == [30, 90, 100]


def test_prune_keeps_as_many_damaged_ones_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        (tmp_path / checkpoint.checkpoint_name(step)).mkdir()
        os.utime(tmp_path / checkpoint.checkpoint_name(step), (step, step))
        checkpoint.set_aside(tmp_path / checkpoint.checkpoint_name(step))
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000030.damaged", "step_000040.damaged"]


def test_prune_always_keeps_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last"):
        checkpoint.prune(tmp_path, 0)


def test_set_aside_never_overwrites(tmp_path: Path) -> None:
    for expected in ("step_000010.damaged", "step_000010.damaged-2", "step_000010.damaged-3"):
        (tmp_path / "step_000010").mkdir()
        assert checkpoint.set_aside(tmp_path / "step_000010").name == expected
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_resolve_takes_a_checkpoint_or_a_run(pristine: Path, tmp_path: Path) -> None:
    run = tmp_path / "stage1"
    shutil.copytree(pristine, run / "checkpoints")
    assert checkpoint.resolve(run) == run / "checkpoints" / "step_000100"
    assert checkpoint.resolve(run / "checkpoints" / "step_000050") == run / "checkpoints" / "step_000050"
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        checkpoint.resolve(tmp_path / "new")
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint"):
        checkpoint.resolve(tmp_path)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    program = """
import sys
seen = []
sys.addaudithook(lambda name, arguments: seen.append(name) if name.startswith("pickle.") else None)
import pickle
class Canary(pickle.Unpickler):
    pass
from pathlib import Path
import torch
from mm_rec.storage import checkpoint
from mm_rec.config import ModelConfig
from mm_rec.text.tokenizer import train_tokenizer
seen.clear()
path = Path(sys.argv[1]) / "step_000001"
checkpoint.save(path, config=ModelConfig.preset("tiny"), weights={"w": torch.ones(2)}, optimizer={}, carried={},
                trainer={"step": 1}, tokenizer=train_tokenizer(["text"], 300))
checkpoint.load(path)
assert seen == [], seen
pickle.loads(pickle.dumps(Path("x")))  # the hook works: finding a class is an event
assert seen == ["pickle.find_class"], seen
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
