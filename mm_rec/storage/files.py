"""Files and folders that are whole or not there.

Everything is written to a temporary sibling, flushed to the disk and then renamed, so that whatever happens at
whatever instant leaves the old content or the new one. A folder carries a manifest with the size and the SHA-256
of every file, by which :func:`verify_folder` tells damage. The writer of a temporary holds a lock on it, which
ends with the process: what can be locked was left over and is removed by :func:`remove_leftovers`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mm_rec import system
from mm_rec.errors import UserError
from mm_rec.formats import KEY, VERSIONS
from mm_rec.regular_file import NotRegularError, open_regular, read_regular
from mm_rec.translation import Translatable, join_texts

__all__ = [
    "MANIFEST",
    "DamageError",
    "Entry",
    "InUseError",
    "StorageError",
    "atomic_folder",
    "format_bytes",
    "free_bytes",
    "is_temporary",
    "manifest_sha256",
    "read_manifest",
    "remove_folder",
    "remove_leftovers",
    "reporting_errors",
    "require_space",
    "some_names",
    "verify_folder",
    "write_atomic",
]

MANIFEST = "manifest.json"

Entry = Mapping[str, int | str]
"""What a manifest says of a file: its size as ``bytes``, and its ``sha256``."""

TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY = re.compile(r"\.tmp-.+-[0-9a-f]{16}(\.lock)?", re.DOTALL)
HASH_THREADS = 4
_NAMES_SHOWN = 3

_REMEDIES = {
    errno.ENOSPC: Translatable("free some space or use a folder on another disk"),
    errno.EDQUOT: Translatable("free some of your quota or use a folder on another disk"),
    errno.EFBIG: Translatable("raise the limit on file sizes (ulimit -f)"),
    errno.EIO: Translatable("the disk reports a fault: check it, or use a folder on another one"),
    errno.EROFS: Translatable("use a folder that can be written to"),
    errno.EACCES: Translatable("use a folder that you may write to"),
    errno.EPERM: Translatable("use a folder that you may write to"),
    errno.ENOENT: Translatable("the folder was moved or removed: put it back, or use another one"),
    errno.ENOTDIR: Translatable("a file stands where a folder should be: move it or use another folder"),
    errno.EEXIST: Translatable("nothing is overwritten: move what is there or use another folder"),
    errno.ENOTEMPTY: Translatable("nothing is overwritten: move what is there or use another folder"),
    errno.ENAMETOOLONG: Translatable("use a shorter path"),
}


class StorageError(UserError):
    """Something could not be written; the message names the path, the bytes needed and the bytes free."""


class InUseError(StorageError):
    """Somebody has a file open that can't be changed meanwhile, as on Windows."""


class DamageError(UserError):
    """What was read is not what was written; the message names the file."""


def write_atomic(path: Path, content: bytes) -> None:
    """Replace or create the file ``path``: afterwards it holds ``content``, or what it held before.

    Raises:
        StorageError: if the disk is full, broken or not writable.
    """
    path = Path(path)
    with reporting_errors(path, len(content)), _temporary_sibling(path, _create_file) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            system.sync_descriptor(file.fileno())
        system.replace(temporary, path)
        system.sync(path.parent)


@contextlib.contextmanager
def atomic_folder(
    path: Path, n_bytes: int = 0, *, manifest: bool = True, unlisted: Collection[str] = ()
) -> Iterator[Path]:
    """Make the folder ``path`` out of what is written into the temporary folder that this context yields.

    When the context ends, all files are flushed to the disk, the manifest is written and the folder gets its
    name. If it ends by an error, the temporary is removed.

    Args:
        path: must not exist.
        n_bytes: an estimate of what will be written, for the check before the first byte and the message.
        manifest: write one; not for a folder that will change later.
        unlisted: names of files that may be changed later, and that the manifest leaves out.

    Raises:
        StorageError: if ``path`` exists or the disk is full, broken or not writable.
    """
    path = Path(path)
    with reporting_errors(path, n_bytes):
        require_space(path, n_bytes)
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        with _temporary_sibling(path, Path.mkdir) as temporary:
            yield temporary
            _seal(temporary, manifest, unlisted)
            system.rename(temporary, path)
            system.sync(path.parent)


def verify_folder(path: Path, skip: Collection[str] = ()) -> list[str]:
    """Compare a folder with its manifest: the size and the SHA-256 of every file in it.

    Files that the manifest does not name are none of its business.

    Args:
        path: made by :func:`atomic_folder`.
        skip: names not to compare.

    Returns:
        The names in the manifest, relative to ``path``.

    Raises:
        DamageError: naming the first file that is missing, unreadable or changed.
    """
    entries = read_manifest(Path(path))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        names = [name for name in entries if name not in skip]
        futures = [pool.submit(_fingerprint, Path(path) / name) for name in names]
        for name, future in zip(names, futures, strict=True):
            try:
                found = future.result()
            except OSError as error:
                raise DamageError(
                    "{path} cannot be read: {reason}", path=Path(path) / name, reason=error.strerror
                ) from error
            if found != entries[name]:
                raise DamageError("{path} is damaged: it is not what the manifest says", path=Path(path) / name)
    return list(entries)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Returns what the manifest of ``folder`` says of each file, by its name relative to ``folder``.

    Raises:
        DamageError: if it is missing, or not byte for byte what :func:`atomic_folder` writes.
    """
    path = folder / MANIFEST
    try:
        content = read_regular(path)
    except OSError as error:
        raise DamageError("{path} cannot be read: {reason}", path=path, reason=error.strerror) from error
    try:
        entries: dict[str, Entry] = dict(json.loads(content)["files"])
        intact = content == _manifest_bytes(entries) and all(
            _is_inside(name) and entry.keys() == {"bytes", "sha256"} for name, entry in entries.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamageError("{path} is damaged", path=path)
    return entries


def manifest_sha256(entries: Mapping[str, Entry]) -> str:
    """Returns the SHA-256 of the manifest that has these entries, of which there is only one."""
    return hashlib.sha256(_manifest_bytes(entries)).hexdigest()


def remove_folder(path: Path) -> None:
    """Remove a folder; an interruption leaves it whole or leaves a temporary, never half of it under its name."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(8)}")
    with reporting_errors(path):
        system.rename(path, doomed)
    _remove(doomed)


def is_temporary(path: Path) -> bool:
    """Whether a name is one that a write of ours had before it was done."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove temporaries in ``folder`` whose writer is dead; returns them."""
    removed = []
    for temporary in sorted(Path(folder).glob(f"{TEMPORARY_PREFIX}*")):
        if not is_temporary(temporary) or not temporary.exists():  # the user's, or removed with what it belongs to
            continue
        give_up = system.claim(temporary, required=True)
        if give_up is not None:
            _remove(temporary)
            give_up()
            removed.append(temporary)
    return removed


def require_space(path: Path, n_bytes: int) -> None:
    """Raise StorageError if the disk of ``path`` (which need not exist yet) has less than ``n_bytes`` free."""
    free = free_bytes(path)
    if free < n_bytes:
        raise _storage_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), n_bytes)


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the disk of ``path``, which need not exist yet."""
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def format_bytes(n_bytes: int) -> str:
    """A size for people.

    >>> format_bytes(1_234_567_890)
    '1.2 GB'
    """
    size, units = float(n_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def some_names(names: Sequence[object]) -> Translatable:
    """A few of many names, for a line.

    >>> some_names(["a", "b"]), some_names(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    shown = ", ".join(str(name) for name in names[:_NAMES_SHOWN])
    if len(names) <= _NAMES_SHOWN:
        return Translatable(shown)
    return Translatable("{names} and {count:,} more", names=shown, count=len(names) - _NAMES_SHOWN)


@contextlib.contextmanager
def reporting_errors(path: Path, n_bytes: int = 0) -> Iterator[None]:
    """Turn an error of the disk while writing ``path`` into a StorageError."""
    try:
        yield
    except NotRegularError as error:
        raise StorageError(
            "cannot use {filename}: it is a pipe, a device or another thing that is no file; move it away",
            filename=error.filename,
        ) from error
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        if system.is_in_use(error):
            raise InUseError(
                "cannot write {path}: another program has it open, or you may not write to it; end "
                "that program, or use another place",
                path=path,
            ) from error
        raise _storage_error(path, error, n_bytes) from error


def _storage_error(path: Path, error: OSError, n_bytes: int) -> StorageError:
    assert error.errno is not None
    reason, remedy = Translatable(os.strerror(error.errno).lower()), _REMEDIES[error.errno]
    if error.errno == errno.EEXIST:
        return StorageError("cannot write {path}: {reason}; {remedy}", path=path, reason=reason, remedy=remedy)
    space = [Translatable("{size} needed", size=format_bytes(n_bytes))] if n_bytes else []
    with contextlib.suppress(OSError):
        space.append(Translatable("{size} free", size=format_bytes(free_bytes(path))))
    return StorageError(
        "cannot write {path}: {reason} ({space}); {remedy}",
        path=path,
        reason=reason,
        space=join_texts(", ", space),
        remedy=remedy,
    )


def _create_file(path: Path) -> None:
    path.touch(exist_ok=False)


@contextlib.contextmanager
def _temporary_sibling(path: Path, create: Callable[[Path], Any]) -> Iterator[Path]:
    """A new temporary beside ``path``, locked by this process and gone at the end if it was not renamed."""
    if not path.parent.is_dir():
        raise StorageError("cannot write {path}: there is no folder {parent}", path=path, parent=path.parent)
    problem = system.name_problem(path.name)
    if problem is not None:
        raise StorageError("cannot write {path}: {problem}; use another name", path=path, problem=problem)
    give_up = None
    with contextlib.ExitStack() as stack:
        while give_up is None:  # remove_leftovers may come between the creation and the claim
            temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(8)}")
            stack.callback(_remove, temporary)
            create(temporary)
            give_up = system.claim(temporary)
        stack.callback(give_up)
        yield temporary


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _seal(folder: Path, manifest: bool, unlisted: Collection[str]) -> None:
    """Flush all that is in ``folder`` to the disk and, if asked for, write its manifest."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file() and path.name not in unlisted] if manifest else []
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        fingerprints = pool.map(_fingerprint, files)  # while the disk writes
        for path in paths:
            system.sync(path)
        entries = {path.relative_to(folder).as_posix(): found for path, found in zip(files, fingerprints, strict=True)}
    if manifest:
        (folder / MANIFEST).write_bytes(_manifest_bytes(entries))
        system.sync(folder / MANIFEST)
    system.sync(folder)


def _fingerprint(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file. (hashlib lets other threads run meanwhile.)"""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _manifest_bytes(entries: Mapping[str, Entry]) -> bytes:
    content = {KEY: VERSIONS["manifest"], "files": entries}
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder."""
    parts = name.split("/")
    return not ("\0" in name or name.startswith("/") or ".." in parts or any(map(system.name_problem, parts)))
