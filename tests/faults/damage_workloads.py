"""Row 7: damaged checkpoints and session files: refused by name, and the last valid one is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import saving
import torch
from talking import CONFIG
from workload import Trial, refusal, workload

from mm_rec.errors import UserError
from mm_rec.inference import session_file
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.storage.checkpoint import CheckpointError


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    return content[:position] + bytes([content[position] ^ (1 << rng.randrange(8))]) + content[position + 1 :]


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randint(1, 9))


def zero(content: bytes, rng: random.Random) -> bytes:
    """A page that never reached the disk."""
    start = rng.randrange(len(content))
    return content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]


def swap_parts(content: bytes, rng: random.Random) -> bytes:
    """Two stretches in each other's place."""
    first, middle, last = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return content[:first] + content[middle:last] + content[first:middle] + content[last:]


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [flip_bit, truncate, append, zero, swap_parts]


def damaged(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """``content`` changed in at least one bit, and how; half of the changes are of one bit."""
    changed, damage = content, flip_bit
    while changed == content:
        damage = flip_bit if rng.random() < 0.5 else rng.choice(DAMAGES)
        changed = damage(content, rng)
    return changed, damage.__name__


def damage_folder(path: Path, other: Path, rng: random.Random) -> str:
    """Damage a checkpoint: the content of a file, or which files there are; ``other`` is a sound one."""
    files = sorted(path.iterdir())
    file = rng.choice([one for one in files if one.stat().st_size])
    kind = rng.choice(["content"] * 6 + ["delete", "swap", "take from another"])
    if kind == "delete":
        file.unlink()
    elif kind == "swap":
        one, two = rng.sample(files, 2)
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    elif kind == "take from another":
        file = rng.choice([one for one in files if one.read_bytes() != (other / one.name).read_bytes()])
        shutil.copyfile(other / file.name, file)
    else:
        content, kind = damaged(file.read_bytes(), rng)
        file.write_bytes(content)
    return kind.replace("_", " ")


@workload(
    7, "bit flips, cuts, zeroed pages, lost, swapped and foreign files in a checkpoint",
    unit="checkpoints", quick=500, soak=10_000,
)  # fmt: skip
def damaged_checkpoints(folder: Path) -> Iterator[Trial]:
    pristine, used = folder / "pristine", folder / "used"
    pristine.mkdir()
    for step in (50, 100):
        saving.save(str(pristine), step)
    shutil.copytree(pristine, used)
    path, other = used / "step_000100", pristine / "step_000050"
    sound = {file.name: file.read_bytes() for file in path.iterdir()}
    assert checkpoint.newest_valid(used) == path

    def trial(seed: int) -> str:
        kind = damage_folder(path, other, random.Random(seed))
        assert str(path) in refusal(CheckpointError, lambda: checkpoint.load(path), kind)
        events: list[str] = []
        assert checkpoint.newest_valid(used, events.append) == used / other.name, kind
        assert len(events) == 1
        assert str(path) in events[0]
        for name, content in sound.items():
            if not (path / name).exists() or (path / name).read_bytes() != content:
                (path / name).write_bytes(content)
        return f"{kind}: refused, the one before used"

    yield trial


@workload(
    7, "bit flips, cuts, zeroed pages, swapped stretches in a session file",
    unit="session files", quick=500, soak=10_000,
)  # fmt: skip
def damaged_sessions(folder: Path) -> Iterator[Trial]:
    torch.set_num_threads(1)
    model = MMRecModel(CONFIG, seed=0)
    session = ChatSession.start(model, saving.TOKENIZER, sampling=Sampling(max_new_tokens=3))
    list(session.reply("hello"))
    path = folder / "session.safetensors"
    session.save(path)
    sound = path.read_bytes()
    session_file.read(path)

    def trial(seed: int) -> str:
        content, kind = damaged(sound, random.Random(seed))
        path.write_bytes(content)
        assert str(path) in refusal(UserError, lambda: session_file.read(path), kind)
        return f"{kind.replace('_', ' ')}: refused"

    yield trial
