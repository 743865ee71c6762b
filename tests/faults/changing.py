"""What happens to files and folders behind a program's back: each change takes a path, and many can be taken back."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

Change = Callable[[Path], None]


def _rng(path: Path) -> random.Random:
    return random.Random(path.name)


def elsewhere(path: Path) -> Path:
    """Where a moved file or folder goes: another folder of the same disk."""
    folder = path.parent.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    return folder / path.name


# --- of one file, in place or by its name ---------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    """Other bytes of the same size, as by ``rsync --inplace``."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(_rng(path).randbytes(size))


def zero(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def reorder(path: Path) -> None:
    """The two halves in each other's place, but for the head of the file."""
    content = path.read_bytes()
    head, body = content[:128], content[128:]
    middle = len(body) // 2
    with path.open("r+b") as file:
        file.write(head + body[middle:] + body[:middle])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[_rng(path).randrange(len(content))] ^= 1 << _rng(path).randrange(8)
    with path.open("r+b") as file:
        file.write(content)


def replace(path: Path) -> None:
    """Another file under the name, as by ``rsync``."""
    other = path.with_name(f"{path.name}.new")
    other.write_bytes(_rng(path).randbytes(path.stat().st_size))
    other.replace(path)


def unlink(path: Path) -> None:
    path.unlink()


IN_PLACE: dict[str, Change] = {
    "truncated": truncate,
    "cut to nothing": cut_to_nothing,
    "overwritten": overwrite,
    "zeroed": zero,
    "reordered": reorder,
    "a bit flipped": flip_bit,
    "replaced": replace,
    "removed": unlink,
}
"""Of a file that a program reads."""


# --- of a run folder ------------------------------------------------------------------------------------------------


def remove_checkpoints(run: Path) -> None:
    shutil.move(run / "checkpoints", elsewhere(run).with_name("checkpoints"))


def empty_checkpoints(run: Path) -> None:
    remove_checkpoints(run)
    (run / "checkpoints").mkdir()


def unmount_checkpoints(run: Path) -> None:
    remove_checkpoints(run)
    (run / "checkpoints").symlink_to(run.parent / "not mounted")


def link_checkpoints(run: Path) -> None:
    remove_checkpoints(run)
    (run / "checkpoints").symlink_to(elsewhere(run).with_name("checkpoints").resolve())


def lose_newest(run: Path) -> None:
    """The newest checkpoint, if it isn't the only one."""
    found = sorted((run / "checkpoints").glob("step_*"))
    if len(found) > 1:
        shutil.move(found[-1], elsewhere(run).with_name(found[-1].name))


def lose_oldest(run: Path) -> None:
    found = sorted((run / "checkpoints").glob("step_*"))
    if len(found) > 1:
        shutil.move(found[0], elsewhere(run).with_name(found[0].name))


def remove_samples(run: Path) -> None:
    shutil.move(run / "samples", elsewhere(run).with_name("samples"))


def rename(run: Path) -> None:
    run.rename(run.with_name("renamed"))


def move(run: Path) -> None:
    run.rename(elsewhere(run))


def move_and_link(run: Path) -> None:
    move(run)
    run.symlink_to(elsewhere(run).resolve())


def unmount(run: Path) -> None:
    move(run)
    run.symlink_to(run.parent / "not mounted")


def copy(run: Path) -> None:
    shutil.copytree(run, run.with_name(f"{run.name}-copy"))


def remove_lock(run: Path) -> None:
    (run / "run.lock").unlink()


def flip_configuration(run: Path) -> None:
    flip_bit(run / "config.yaml")


def remove_configuration(run: Path) -> None:
    shutil.move(run / "config.yaml", elsewhere(run).with_name("config.yaml"))


OF_A_RUN: dict[str, Change] = {
    "checkpoints removed": remove_checkpoints,
    "checkpoints emptied": empty_checkpoints,
    "checkpoints on a disk that is not mounted": unmount_checkpoints,
    "checkpoints on another disk": link_checkpoints,
    "newest checkpoint removed": lose_newest,
    "oldest checkpoint removed": lose_oldest,
    "samples removed": remove_samples,
    "renamed": rename,
    "moved": move,
    "moved and linked": move_and_link,
    "on a disk that is not mounted": unmount,
    "copied": copy,
    "lock file removed": remove_lock,
    "a bit of config.yaml flipped": flip_configuration,
    "config.yaml removed": remove_configuration,
}
"""Of a run folder, while it is idle or trained in."""

CHANGES = IN_PLACE | OF_A_RUN
