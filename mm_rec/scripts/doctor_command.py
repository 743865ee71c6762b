"""Check this machine, a run folder and its data, and say what can be done with them."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mm_rec import ops
from mm_rec.data.manifest import MANIFEST, check_files, read_manifest
from mm_rec.data.prepared import open_folder
from mm_rec.errors import UserError
from mm_rec.machine import installation
from mm_rec.machine.device import available_memory, select_device, select_precision
from mm_rec.program import Parser, run_program
from mm_rec.storage import checkpoint, files
from mm_rec.storage.best import best_or_newest, best_step
from mm_rec.storage.checkpoint import Checkpoint
from mm_rec.storage.lock import owner_of
from mm_rec.storage.resume import require_checkpoints
from mm_rec.storage.run_config import (
    CHECKPOINTS,
    RECORDS,
    Config,
    differences,
    read_config,
    versions,
    what_is_wrong,
)
from mm_rec.storage.run_folder import EVENTS, LOCK, TIMING

__all__ = ["Finding", "check_data", "check_installation", "check_machine", "check_prepared", "check_run", "main"]

EPILOG = """examples:
  mm-rec doctor                             this machine
  mm-rec doctor checkpoints_cpu/stage1      and a run: checkpoints, records, versions, disk
  mm-rec doctor --data_dir data             and the data: every file against its manifest, and what was made of them

The exit code is 0 if nothing is broken, else 1.
"""

Level = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``ok``, ``note`` (works, but may surprise) or ``broken`` (with what helps)."""

    level: Level
    text: str

    def __str__(self) -> str:
        return f"{self.level:6}  {self.text}"


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Print what was found; returns 1 if something is broken."""
    parser = Parser(prog=prog, description=__doc__, epilog=EPILOG)
    parser.add_argument("run", type=Path, nargs="*", help="run folder, or folder of runs")
    parser.add_argument("--data_dir", type=Path, help="folder with downloaded data")
    options = parser.parse_args(arguments)
    findings = [*check_machine(), *check_installation()]
    for path in options.run:
        runs = _runs_in(path)
        for run in runs:
            findings += check_run(run)
        for root in {run.parent for run in runs}:
            findings += check_prepared(root / "prepared")
    if options.data_dir is not None:
        findings += check_data(options.data_dir)
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    return int(any(finding.level == "broken" for finding in findings))


def check_machine() -> list[Finding]:
    """Versions, devices, back ends, precision, threads, memory."""
    device = select_device()
    found = versions()
    findings = [
        Finding("ok", f"MM-Rec {found['mm_rec']}, Python {found['python']}, PyTorch {found['torch']}"),
        Finding("ok", f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads in use"),
    ]
    for entry in ops.status().devices:
        findings.append(Finding("ok" if entry.backend == "native" else "note", f"kernels on {entry}"))
    free = files.format_bytes(available_memory(device))
    findings.append(Finding("ok", f"trains on {device} in {select_precision('auto', device)}, {free} of memory free"))
    return findings


def check_installation() -> list[Finding]:
    """Compilers, extras, and whether the hub of data sets answers; nothing here is more than a note."""
    found = ", ".join(f"{name}: {command or 'none'}" for name, command in installation.compilers().items())
    findings = [Finding("ok", f"compilers, which only building kernels needs: {found}")]
    for extra, missing in installation.missing_of_extras().items():
        if missing:
            quoted = " ".join(f'"{one}"' for one in missing)
            text = f"extra {extra} is not installed; what is missing of it: pip install {quoted}"
            findings.append(Finding("note", text))
        else:
            findings.append(Finding("ok", f"extra {extra} is installed"))
    address = installation.hub_address()
    problem = installation.reach(address)
    text = f"the hub at {address} cannot be reached ({problem}); only downloads need it, and HF_ENDPOINT names another"
    return [*findings, Finding("note", text) if problem else Finding("ok", f"the hub at {address} answers")]


def check_run(run: Path) -> list[Finding]:
    """Configuration, owner, checkpoints, records and disk of a run folder, and what the same command would do."""
    config = read_config(run)
    if config is None:
        return [Finding("broken", what_is_wrong(run) or f"{run} is not a run folder: it has no readable config.yaml")]
    findings = []
    owner = owner_of(run / LOCK)
    findings.append(Finding("note" if owner else "ok", f"{run} is in use by {owner}" if owner else f"{run} is free"))
    changed = differences(config.get("versions", {}), versions())
    if changed:
        findings.append(
            Finding("note", f"made with other versions: {'; '.join(changed)}; going on may not repeat bit for bit")
        )
    newest, of_checkpoints = _check_checkpoints(run, config)
    return [*findings, *of_checkpoints, *_check_records(run, newest), *_check_leftovers(run, owner)]


def check_data(data_dir: Path) -> list[Finding]:
    """Every file of the data's manifest: there, and with the SHA-256 that it should have; and what is prepared."""
    if not data_dir.is_dir():
        return [Finding("broken", f"there is no data folder {data_dir}")]
    try:
        findings = [_check_file(data_dir, name) for name in read_manifest(data_dir)]
    except UserError as error:
        findings = [Finding("broken", str(error))]
    if not findings:
        findings = [Finding("note", f"{data_dir} has no {MANIFEST}: nothing to compare its files with")]
    for folder in (data_dir, data_dir / "synthetic"):
        findings += check_prepared(folder / "prepared")
    return findings


def check_prepared(root: Path) -> list[Finding]:
    """Every folder of prepared data in ``root``: all of it as it was written, and no id beyond the vocabulary."""
    findings = []
    for path in sorted(root.glob("[0-9a-f]" * 16)):
        try:
            files.verify_folder(path)
            stores = open_folder(path).stores
        except files.DamageError as error:
            findings.append(Finding("broken", f"{error}; delete {path}, the next run makes it anew"))
        except UserError as error:
            findings.append(Finding("broken", str(error)))
        else:
            tokens = sum(store.n_tokens for store in stores.values())
            findings.append(Finding("ok", f"{path} is what was prepared, {tokens:,} tokens"))
    return findings


def _check_file(data_dir: Path, name: str) -> Finding:
    try:
        check_files(data_dir, [data_dir / name])
    except UserError as error:
        return Finding("broken", str(error))
    size = (data_dir / name).stat().st_size
    return Finding("ok", f"{data_dir / name} is what was downloaded, {files.format_bytes(size)}")


def _check_checkpoints(run: Path, config: Config) -> tuple[Checkpoint | None, list[Finding]]:
    """The newest valid checkpoint, and what there is to say about all of them."""
    paths = checkpoint.list_checkpoints(run / CHECKPOINTS)
    if not paths:
        try:
            require_checkpoints(run, config)
        except UserError as error:
            return None, [Finding("broken", str(error))]
        return None, [Finding("note", f"{run} has no checkpoint yet: the same command starts at step 0")]
    newest: Checkpoint | None = None
    damaged = []
    for path in paths:
        try:
            newest = checkpoint.load(path)
        except UserError as error:
            damaged.append(Finding("broken", str(error)))
    if newest is None:
        return None, [*damaged, Finding("broken", f"{run} has no valid checkpoint left; start beside it with --fresh")]
    size = sum(file.stat().st_size for file in newest.path.iterdir())
    free = files.free_bytes(run)
    room = f"{files.format_bytes(free)} free, a checkpoint takes {files.format_bytes(size)}"
    return newest, [
        *damaged,
        Finding("ok", f"{len(paths) - len(damaged)} of {len(paths)} checkpoints are whole"),
        *_check_best(run),
        Finding(
            "ok",
            f"the same command goes on from step {checkpoint.checkpoint_step(newest.path)}, "
            "if its data are as they were (--data_dir looks at them)",
        ),
        Finding("ok", room) if free > 2 * size else Finding("broken", f"{room}; make room before going on"),
    ]


def _check_best(run: Path) -> Iterable[Finding]:
    """Which checkpoint is best by validation, if there was one, and whether it can be loaded."""
    step, used = best_step(run), best_or_newest(run)
    if step is None or used is None:
        return
    if checkpoint.checkpoint_step(used) == step:
        yield Finding("ok", f"generate, chat, serve, export and eval load step {step}, the best by validation")
    else:
        where = run / CHECKPOINTS / checkpoint.checkpoint_name(step)
        yield Finding("broken", f"{where}, the best by validation, is not whole; {used.name} is loaded in its place")


def _check_records(run: Path, newest: Checkpoint | None) -> Iterable[Finding]:
    """Whether what training adds to are files, and the records reach as far as the newest checkpoint says."""
    sizes = newest.trainer.get("run", {}).get("records", {}) if newest else {}
    for name in (*RECORDS, TIMING, EVENTS, LOCK):
        path = run / name
        if path.exists() and not path.is_file():
            yield Finding("broken", f"{path} is a pipe, a device or a folder, not a file; move it away")
            continue
        size = path.stat().st_size if path.exists() else 0
        if size < sizes.get(name, 0):
            yield Finding("note", f"{path} has lost its end: {size} of {sizes[name]} bytes; training is not affected")


def _check_leftovers(run: Path, owner: str | None) -> Iterable[Finding]:
    found = () if owner else run.rglob(f"{files.TEMPORARY_PREFIX}*")
    leftovers = [path for path in found if files.is_temporary(path)]
    if leftovers:
        yield Finding("note", f"{len(leftovers)} interrupted writes; the next start of the run removes them")


def _runs_in(path: Path) -> list[Path]:
    """``path`` itself, or the runs in it."""
    if not _is_run(path) and path.is_dir():
        return sorted(child for child in path.iterdir() if _is_run(child)) or [path]
    return [path]


def _is_run(path: Path) -> bool:
    """Whether ``path`` is a run folder, sound or not."""
    return read_config(path) is not None or what_is_wrong(path) is not None


if __name__ == "__main__":
    raise SystemExit(run_program(main))
