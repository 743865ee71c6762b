"""Row 27: output closed, full or in another encoding, few descriptors, absurd settings: one line, exit code not 0."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving_workloads import CONFIG, tokenizer
from supervisor import Supervisor, clocks
from workload import Trial, workload

from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.training.settings import TrainSettings

SECONDS = 120.0
LOG_BYTES = 6000
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 65, 1000, 2048, 10**6, 5 * 10**8, 2**31, 2**32, 2**53 + 1, 10**12, 2**63 - 1, 2**63, 2**64,
    10**30, "9" * 5000, "1e9", "1e308", "-1e308", 1e-300, 0.5, "nan", "inf", "-inf", "", " ", "0x10", "१", "1_000",
    "None", "true",
)  # fmt: skip
TEXTS = (
    "",
    "/",
    ".",
    "..",
    "nowhere",
    "a" * 300,
    "/dev/null",
    "/dev/null/x",
    "/proc/x",
    "a/" * 3000,
    "ışık\n",
    "-",
    "~",
    "*",
)
TRAIN = {"use_synthetic": True, "max_samples": 10, "preset": "tiny", "seq_len": 32, "max_steps": 1}


def odd_settings(rng: random.Random, folder: Path) -> list[str]:
    """``mm-rec train`` with settings that are absurd, as flags or in a file."""
    values: dict[str, Any] = {**TRAIN, "checkpoint_dir": "runs", "data_dir": "data"}
    kinds = typing.get_type_hints(TrainSettings)
    names = [one.name for one in dataclasses.fields(TrainSettings) if one.name not in ("download_data", "stages")]
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(names)
        numeric = any(kind in str(kinds[name]) for kind in ("int", "float"))
        values[name] = rng.choice(NUMBERS if numeric or rng.random() < 0.2 else TEXTS)
    if rng.random() < 0.5:
        flags = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in values.items()]
        return ["train", *(part for flag in flags for part in flag)]
    path = folder / "settings.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items()))
    return ["train", "--config", str(path)]


def odd_file(rng: random.Random, folder: Path) -> list[str]:
    """``mm-rec train`` with a settings file that is none, or stands for far more than it holds."""
    bomb = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])
    contents = [
        bomb, f"preset: *a\n{bomb}", f"{bomb}\nmax_steps: *a29", "[" * 10**5, "a: " + "{a: " * 10**4,
        "max_steps: 2024-13-45", "max_steps: " + "9" * 5000, "max_steps: 0x" + "f" * 5000, "&a [*a]", "? [a]\n: b",
        "max_steps: " + ":".join(["59"] * 3000), "preset: !!python/object/apply:os.system [echo]",
        "preset: !!binary '@'",
        "- a", "5", "", "\t", "preset: {}", "stages: {stage1: {max_steps: 2024-02-30}}", "stages: [" * 50, "x" * 10**6,
        "preset: .nan", "max_steps: [1]", "data_dir: 'a\\0b'", 'data_dir: "a\\0b"', "<<: 5", "max_steps: 0b_",
        "a: " * 1000,
        "stages: {stage1: &s {max_steps: 1}, stage2: *s}",
    ]  # fmt: skip
    path = folder / "settings.yaml"
    path.write_text(rng.choice(contents))
    small = [part for name, value in TRAIN.items() if value is not True for part in (f"--{name}", str(value))]
    return ["train", "--use_synthetic", *small, "--config", str(path)]


def odd_place(rng: random.Random, folder: Path) -> list[str]:
    """A command with files and folders that are none, or have odd names."""
    model = str(folder / "step_000001")
    place = rng.choice(TEXTS)
    return rng.choice(
        [
            ["generate", "--model", place, "--prompt", "a"],
            ["generate", "--model", model, "--prompt", "a", "--max_new_tokens", str(rng.choice(NUMBERS[:9]))],
            ["tokenizer", "--show", "a", "--tokenizer", place],
            ["tokenizer", "--data_dir", place, "--output", rng.choice(TEXTS)],
            ["eval", "--model", model, "--distances", "none", "--output", place],
            ["export", "--model", model, "--output", place],
            ["doctor", "--run", place],
            ["finetune", "--data", place, "--checkpoint_dir", rng.choice(TEXTS)],
            ["serve", "--model", place, "--threads", "2048"],
            ["bench", "--threads", str(rng.choice([2048, 10**9]))],
            [place, place],
        ]
    )


def plain(rng: random.Random, folder: Path) -> list[str]:
    """A command with which nothing is wrong."""
    model = str(folder / "step_000001")
    return rng.choice(
        [
            ["--help"],
            ["train", "--help"],
            ["doctor"],
            ["generate", "--model", model, "--prompt", "ışık", "--max_new_tokens", "3"],
            ["tokenizer", "--show", "ışık 漢字", "--tokenizer", model],
            [
                "train",
                "--use_synthetic",
                "--max_samples",
                "10",
                "--preset",
                "tiny",
                "--seq_len",
                "32",
                "--max_steps",
                "1",
            ],
        ]
    )


@workload(27, "commands with output closed, full or in another encoding, few descriptors, absurd settings and names",
          unit="commands", quick=12, soak=300, idle=["it ran"])  # fmt: skip
def odd_commands(folder: Path) -> Iterator[Trial]:
    supervisor = Supervisor(folder)
    weights = MMRecModel(CONFIG, seed=3).state_dict()
    checkpoint.save(
        folder / "step_000001", config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={"step": 1},
        tokenizer=tokenizer(),
    )  # fmt: skip

    def trial(seed: int) -> str:
        rng, work = random.Random(seed), folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        output, encoding, files = str(work / "output"), "utf-8", None
        kind = rng.choice(
            ["settings", "settings", "file", "file", "place", "place", "output", "encoding", "descriptors"]
        )
        match kind:
            case "settings":
                arguments = odd_settings(rng, folder)
            case "file":
                arguments = odd_file(rng, folder)
            case "place":
                arguments = odd_place(rng, folder)
            case _:
                arguments = plain(rng, folder)
        if kind == "output":
            output = rng.choice(["/dev/full", "closed"])
        elif kind == "encoding":
            encoding = rng.choice(["ascii", "latin-1", "cp1254", "utf-16"])
        elif kind == "descriptors":
            files = rng.randint(8, 90)
        child = supervisor.start(
            "odd_commands.run", arguments=arguments, folder=str(work), output=output, encoding=encoding, files=files
        )
        start, waited = clocks(child.pid)
        child.go()
        child.wait()
        seconds = child.ended[0] - start - (child.ended[1] - waited)  # without the wait for a processor
        context = (
            arguments if len(str(arguments)) < 2000 else arguments[:3],
            output,
            encoding,
            files,
            child.log[-3000:],
        )
        assert child.status in (0, 2), (child.status, context)
        assert seconds < SECONDS, (seconds, context)
        assert len(child.log) < LOG_BYTES, (len(child.log), context)
        assert "Traceback" not in child.log, context
        if child.status == 0:
            assert kind != "output", context
            return "it ran"
        assert child.log.splitlines()[-1].startswith("error: "), context
        assert child.log.count("error: ") == 1 or kind == "place", context
        return f"{kind}: one line, exit code 2"

    yield trial
