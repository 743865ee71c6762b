"""Damaged checkpoints: whatever was changed, it is refused by name and the one before is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import saving
from supervisor import rounds

from mm_rec import checkpoint
from mm_rec.checkpoint import CheckpointError


def flip_bit(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(file for file in path.iterdir() if file.stat().st_size))
    content = bytearray(file.read_bytes())
    position = rng.randrange(len(content))
    content[position] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return file.name


def truncate(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(file for file in path.iterdir() if file.stat().st_size))
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])
    return file.name


def append(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 9)))
    return file.name


def delete(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(path.iterdir()))
    file.unlink()
    return file.name


def swap(path: Path, rng: random.Random) -> str:
    """Two files of one checkpoint under each other's name."""
    one, other = rng.sample(sorted(path.iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return one.name


def take_from_other(path: Path, rng: random.Random) -> str:
    """A file of the other checkpoint, sound in itself."""
    other = path.with_name("step_000050")
    different = [file for file in sorted(path.iterdir()) if file.read_bytes() != (other / file.name).read_bytes()]
    file = rng.choice(different)
    shutil.copyfile(other / file.name, file)
    return file.name


MUTATIONS: list[Callable[[Path, random.Random], str]] = [flip_bit, truncate, append, delete, swap, take_from_other]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two checkpoints, not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (50, 100):
        saving.save(str(folder), step)
    return folder


def mutate_and_check(pristine: Path, folder: Path, seed: int) -> None:
    """Damage the newest checkpoint; it has to be refused by name, and the one before it used."""
    rng = random.Random(seed)
    path = folder / "step_000100"
    shutil.copytree(pristine / path.name, path)
    mutation = flip_bit if rng.random() < 0.5 else rng.choice(MUTATIONS)
    name = mutation(path, rng)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value), (seed, mutation.__name__, name)
    events: list[str] = []
    assert checkpoint.newest_valid(folder, events.append) == folder / "step_000050", (seed, mutation.__name__, name)
    assert len(events) == 1
    assert str(path) in events[0]


def test_no_damage_is_accepted(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine / "step_000050", tmp_path / "step_000050")
    for seed in range(rounds(500, 10_000)):
        mutate_and_check(pristine, tmp_path, seed)
        shutil.rmtree(tmp_path / "step_000100")
