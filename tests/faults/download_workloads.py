"""Rows 4, 9: downloads from a hub on this machine that breaks off, damages, refuses; and that are killed or stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pipeline_workloads import SIGNALS, check_stop
from supervisor import Supervisor
from tiny_runs import When, as_argument, leftovers
from workload import Trial, workload

from mm_rec.data.download import fetch as fetch_module
from mm_rec.data.download.fetch import fetch
from mm_rec.data.download.sources import SOURCES
from mm_rec.data.manifest import check_files, read_manifest
from mm_rec.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))

from hub_samples import CARD, PYTHON, code_rows, compressed
from hub_stub import Fault, Hub, Repository, serve

ROWS, CHUNK = 700, 100
GOOD = [row["content"] for row in code_rows(2 * ROWS) if row["content"] != "x = 1\n"]
SAMPLES = 1000
FOREVER = 10**9


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub with one source of two files."""
    files = {
        "README.md": CARD.format("file-*.json.gz").encode(),
        "file-1.json.gz": compressed(code_rows(ROWS)),
        "file-2.json.gz": compressed(code_rows(ROWS, ROWS)),
    }
    with serve({PYTHON: Repository(files)}) as one:
        yield one


def read(folder: Path) -> list[str]:
    path = folder / "code" / "code.jsonl"
    check_files(folder, [path])
    return [json.loads(line) for line in path.read_text().splitlines()]


def random_fault(rng: random.Random) -> Fault:
    match = rng.choice(["file-1", "file-2", "file", "codeparrot", "revision/main", "tree", "README"])
    skip, times = rng.randrange(3), rng.choice([1, 1, 2, 4, FOREVER])
    match rng.choice(["status", "wait", "refused", "cut", "flip"]):
        case "status":
            return Fault(match, times, skip, status=rng.choice([429, 500, 502, 503, 504]))
        case "wait":
            return Fault(match, times, skip, status=rng.choice([429, 503]), headers={"Retry-After": "7"})
        case "refused":
            return Fault(match, times, skip, status=rng.choice([401, 403, 404]))
        case "cut":
            return Fault(match, times, skip, cut_after=rng.randrange(9_000))
        case _:
            return Fault(rng.choice(["file-1", "file-2"]), times, skip, flip=rng.randrange(5_000))


@workload(
    9, "downloads cut at any byte, wrong bytes, 401, 403, 404, 429, 5xx, Retry-After; then once more undisturbed",
    unit="downloads", quick=15, soak=500, idle=["right bytes, no fault was met"],
)  # fmt: skip
def faulty_downloads(folder: Path) -> Iterator[Trial]:
    import datasets
    from huggingface_hub import constants

    with hub() as one, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", one.url)
        template = one.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(datasets.config, "HF_ENDPOINT", one.url)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(fetch_module, "_CHUNK", CHUNK)
        patch.setattr(time, "sleep", lambda seconds: None)

        def trial(seed: int) -> str:
            rng, target = random.Random(seed), folder / f"data{seed}"
            one.faults[:] = [random_fault(rng) for _ in range(rng.randint(1, 4))]
            samples = rng.choice([100, 600, SAMPLES, 9999])
            planned = sum(fault.times for fault in one.faults)
            outcome = "right bytes in spite of it"
            try:
                fetch(SOURCES["python"], samples, target, lambda line: None)
            except UserError as error:
                message = str(error)
                assert "\n" not in message, message
                assert not (target / "code" / "code.jsonl").exists()
                assert read_manifest(target) == {}
                outcome = "a clear error; right bytes from the same command later"
            if sum(fault.times for fault in one.faults) == planned:
                outcome = "right bytes, no fault was met"
            one.faults.clear()
            fetch(SOURCES["python"], samples, target, lambda line: None)
            assert read(target) == GOOD[:samples]
            assert [path.name for path in target.rglob(".*")] == []
            shutil.rmtree(target)
            return outcome

        yield trial


@contextmanager
def downloader(folder: Path) -> Iterator[tuple[Hub, Any]]:
    """The hub, and a function that starts the command ``mm-rec data`` in a child."""
    supervisor = Supervisor(folder)

    with hub() as one:

        def start(target: Path, when: When | None = None) -> Any:
            command = ["data", "--output_dir", str(target), "--no_wikitext", "--code_samples", str(SAMPLES)]
            argument = None if when is None else as_argument(when)
            return supervisor.start(
                "downloading.run", command=command, url=one.url, cache=str(folder), when=argument, chunk=CHUNK
            )

        yield one, start


PLACES = {
    "mm_rec.data.download.fetch:_Download._commit": 10,
    "mm_rec.data.download.fetch:write_atomic": 10,
    "mm_rec.data.download.fetch:_Download._line": 900,
    "mm_rec.data.download.fetch:_Download.finish": 1,
}


def random_place(rng: random.Random) -> tuple[str, int, float]:
    place = rng.choice(list(PLACES))
    return place, rng.randint(1, PLACES[place]), rng.choice([0.0, rng.uniform(0, 0.01)])


@workload(4, "SIGTERM, SIGINT and double Ctrl-C in a download", unit="signals", quick=3, soak=100,
          idle=["download: had ended before the signal"])  # fmt: skip
def signalled_downloads(folder: Path) -> Iterator[Trial]:
    with downloader(folder) as (_, start):

        def trial(seed: int) -> str:
            rng, target = random.Random(seed), folder / f"data{seed}"
            name = rng.choice(list(SIGNALS))
            when = When(*random_place(rng), SIGNALS[name], rng.uniform(0.001, 0.02))
            child = start(target, when)
            child.go()
            if child.wait() == 0:  # it was at its end
                outcome = "download: had ended before the signal"
            else:
                check_stop(child, when)
                outcome = "download: stopped and went on exactly"
            again = start(target)
            again.go()
            assert again.wait() == 0, again.log
            assert read(target) == GOOD[:SAMPLES]
            assert leftovers(target) == []
            shutil.rmtree(target)
            return outcome

        yield trial


@workload(9, "two downloads into one folder at once, one or both of them killed", unit="folders", quick=2, soak=60,
          idle=["exit codes [0, 0], right bytes at the end"])  # fmt: skip
def downloads_at_once(folder: Path) -> Iterator[Trial]:
    with downloader(folder) as (one, start):

        def trial(seed: int) -> str:
            rng, target = random.Random(seed), folder / f"data{seed}"
            one.requests.clear()
            children = [start(target, When(*random_place(rng)) if rng.random() < 0.6 else None) for _ in range(2)]
            for child in children:
                child.go()
            statuses = [child.wait() for child in children]
            logs = [child.log for child in children]
            assert all(status in (0, 2, -signal.SIGKILL) for status in statuses), logs
            for status, log in zip(statuses, logs, strict=True):
                assert status != 2 or "is in use by" in log, log  # maybe by one that has not named itself yet
            child = start(target)
            child.go()
            assert child.wait() == 0, child.log
            assert read(target) == GOOD[:SAMPLES]
            left = [path.name for path in target.rglob(".*") if path.name != ".lock"]
            assert left == [], left
            shutil.rmtree(target)
            return f"exit codes {sorted(statuses)}, right bytes at the end"

        yield trial
