"""The large counts behind the promises: runs workloads to their full number of trials, in as many goes as it takes.

    python tests/faults/soak.py                      everything
    python tests/faults/soak.py --row 7 --row 8      some rows
    python tests/faults/soak.py --seconds 300        for five minutes; the same command goes on from there

Each row has a file in ``benchmarks/results/soak`` that says what was tried, how often, with what outcome, at which
commit and on which machine, and ``docs/reliability.md`` is made of them at the end (``report.py``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
from workload import Complete, Impossible, Outcome, Workload, all_workloads, counted

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "soak"
SAVE_SECONDS = 5.0
MAX_FAILURES = 3
"""After so many broken promises a workload is stopped: there is something to mend first."""


@dataclass
class Record:
    """What a workload came to so far; the entry of its name in the file of its row."""

    what: str
    unit: str
    wanted: int
    done: int = 0
    complete: bool = False
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        counts = Counter(self.outcomes)
        counts.update(counted(outcome))
        self.outcomes = dict(counts)


def read_row(folder: Path, row: int) -> dict[str, Record]:
    """The records of a row by workload."""
    path = folder / f"row_{row:02d}.json"
    if not path.exists():
        return {}
    return {name: Record(**entry) for name, entry in json.loads(path.read_text())["workloads"].items()}


def read_record(folder: Path, one: Workload) -> Record:
    """The record of a workload; an empty one if it was never run."""
    return read_row(folder, one.row).get(one.name) or Record(one.what, one.unit, one.soak)


def write_row(folder: Path, row: int, records: dict[str, Record]) -> None:
    """Write the records of a row; what other processes wrote of other workloads meanwhile stays."""
    from mm_rec.storage.files import write_atomic
    from mm_rec.storage.lock import Lock

    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / ".lock", wait=True)
    try:
        merged = {name: vars(record) for name, record in {**read_row(folder, row), **records}.items()}
        content = json.dumps({"row": row, "workloads": merged}, indent=1) + "\n"
        write_atomic(folder / f"row_{row:02d}.json", content.encode())
    finally:
        lock.release()


def commit() -> str:
    """The commit of the working tree, marked if the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changes else "")


def machine() -> str:
    """This machine in a line: processor, cores, system, versions."""
    import torch

    from mm_rec import ops

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    kernels = ops.status()["cpu"]
    parts = [
        model or platform.machine(),
        f"{os.cpu_count()} cores",
        f"{platform.system()} {platform.release().partition('-')[0]}",
        f"Python {platform.python_version()}",
        f"PyTorch {torch.__version__}",
        f"{kernels.backend} kernels {kernels.level or ''}".strip(),
    ]
    return ", ".join(parts)


def soak(one: Workload, folder: Path, seconds: float) -> Record:
    """Go on with a workload until its count, for ``seconds`` or to too many failures; returns its record."""
    record = read_record(folder, one)
    record.what, record.unit, record.wanted = one.what, one.unit, one.soak
    record.complete = record.complete or record.done >= one.soak
    if record.complete or seconds <= 0:
        return record
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run = {"commit": commit(), "machine": machine(), "date": now, "first_seed": record.done, "trials": 0, "seconds": 0}
    record.runs.append(run)
    before, saved = record.seconds, time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as temporary, one.open(Path(temporary)) as trial:
            start = time.monotonic()
            while not record.complete and len(record.failures) < MAX_FAILURES:
                try:
                    record.add(trial(record.done))
                except Complete:
                    record.complete, record.wanted = True, record.done
                    break
                except Exception as error:
                    note = {"seed": record.done, "commit": run["commit"], "error": str(error)[:2000] or repr(error)}
                    record.failures.append(note)
                    print(f"{one.name}: BROKEN at seed {record.done}:\n{traceback.format_exc()}", flush=True)
                record.done += 1
                record.complete = record.done >= one.soak
                record.seconds = round(before + time.monotonic() - start, 1)
                run |= {"trials": record.done - run["first_seed"], "seconds": round(time.monotonic() - start, 1)}
                if time.monotonic() > saved + SAVE_SECONDS:
                    write_row(folder, one.row, {one.name: record})
                    saved = time.monotonic()
                if time.monotonic() - start >= seconds:
                    break
    except Impossible as error:
        record.runs.pop()
        print(f"{one.name}: not possible here: {error}", flush=True)
        return record
    write_row(folder, one.row, {one.name: record})
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int, action="append", help="of the promises; all if not given")
    parser.add_argument("--only", action="append", help="name of a workload")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of trials, the preparation not counted")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="count from zero again, after a fault was mended")
    parser.add_argument("--list", action="store_true", help="only say what there is and how far it has come")
    arguments = parser.parse_args()
    rows = arguments.row or ()
    chosen = [one for one in all_workloads(rows) if not arguments.only or one.name in arguments.only]
    if not chosen:
        parser.error("there is no such row or workload; --list names them")
    left, failed, seconds = 0, 0, arguments.seconds
    for one in chosen:
        if arguments.list:
            record = read_record(arguments.results, one)
        else:
            if arguments.fresh:
                write_row(arguments.results, one.row, {one.name: Record(one.what, one.unit, one.soak)})
            before = read_record(arguments.results, one).seconds
            record = soak(one, arguments.results, seconds)
            seconds -= record.seconds - before
        left += not record.complete
        failed += bool(record.failures)
        print(
            f"row {one.row:2} {one.name}: {record.done:,} of {record.wanted:,} {record.unit}, "
            f"{len(record.failures)} broken, {record.seconds:.0f} s; {record.outcomes}",
            flush=True,
        )
    if not arguments.list and arguments.results == RESULTS:
        report.main()
    print(f"{left} of {len(chosen)} workloads are not at their full count" if left else "all are at their full count")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
