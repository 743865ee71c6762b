"""Row 22: files that are changed in place, replaced or removed under a server and under a training."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import talking
from absence_workloads import end_of, one_line
from changing import IN_PLACE
from pipeline_workloads import shared_pipeline
from supervisor import Supervisor
from tiny_runs import clear, difference
from workload import Trial, workload

from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint

STAGES = ("stage1", "stage2", "instruct")
MOMENTS = {
    "mm_rec.training.run_stages:find_starting_point": 1,
    "mm_rec.training.run_stages:build_trainer": 1,
    "mm_rec.training.trainer:Trainer.fit": 1,
    "mm_rec.storage.run_folder:RunFolder.log_loss": 10,
    "mm_rec.training.trainer:Trainer._evaluate": 3,
}
"""Functions just before a call of which a file is changed, and how often at least each is called."""


@workload(22, "a file of a served model truncated, overwritten, replaced or removed", unit="changes",
          quick=3, soak=50)  # fmt: skip
def changed_under_a_server(folder: Path) -> Iterator[Trial]:
    supervisor = Supervisor(folder)
    sound = folder / "step_000001"
    weights = MMRecModel(talking.CONFIG, seed=0).state_dict()
    checkpoint.save(
        sound, config=talking.CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=talking.TOKENIZER
    )

    def trial(seed: int) -> str:
        rng, root = random.Random(seed), folder / f"served{seed}"
        shutil.copytree(sound, root / sound.name)
        name = rng.choice(["model.safetensors"] * 4 + ["tokenizer.json", "config.json", "manifest.json"])
        kind = rng.choice(list(IN_PLACE))
        child = supervisor.run(
            "serving_files.serve", root=str(root), checkpoint=str(root / sound.name), name=name, kind=kind,
            precision=rng.choice(["fp32", "bf16"]), weights=rng.choice(["full", "full", "int8"]),
        )  # fmt: skip
        assert child.status == 0, (name, kind, child.status, child.log)
        clear(root)
        return f"{name} {kind}: the same answers and weights; refused when loaded anew"

    yield trial


@workload(22, "a file of prepared data, sources or starting weights truncated, overwritten, replaced or removed under "
          "a training", unit="changes", quick=2, soak=50)  # fmt: skip
def changed_under_a_training(folder: Path) -> Iterator[Trial]:
    pipeline = shared_pipeline()

    def trial(seed: int) -> str:
        rng, stage = random.Random(seed), STAGES[seed % len(STAGES)]
        pipeline.undisturbed(stage)
        base = folder / f"changed{seed}"
        data, root, start = base / "data", base / "runs", base / "start"
        shutil.copytree(pipeline.data, data)
        changes: dict[str, object] = {}
        if (source := pipeline.start(stage)) is not None:
            shutil.copytree(source, start)
            changes["init_from"] = start
        if stage == "instruct":
            shutil.copytree(pipeline.folder / "whole" / "prepared", root / "prepared")
        path = rng.choice(files_read(data, root, start, stage))
        sound, kind = path.read_bytes(), rng.choice(list(IN_PLACE))
        what = rng.choice(list(MOMENTS))
        change = {"what": what, "count": rng.randint(1, MOMENTS[what]), "kind": kind, "path": str(path)}
        command = pipeline.command(stage, root, data, **changes)
        child = pipeline.supervisor.run("tiny_runs.run", command=command, change={**change, "small_blocks": True})
        assert f"changed {path}: {kind}" in child.log, child.log
        if child.status == 0:
            outcome = "came out byte for byte"
        else:
            assert child.status == 2, child.log
            line = one_line(child.log)
            assert path.name in line or str(path.parent) in line, line
            outcome = "ended in a line; byte for byte when put back"
            path.write_bytes(sound)
            again = pipeline.supervisor.run("tiny_runs.run", command=command)
            assert again.status == 0, again.log
        # A run that ends so has saved the step that it had come to: one checkpoint more.
        assert difference(end_of(root / stage), end_of(pipeline.folder / "whole" / stage)) == [], (path, kind, what)
        clear(base)
        return f"{path.name} {kind}: {outcome}"

    yield trial


def files_read(data: Path, root: Path, start: Path, stage: str) -> list[Path]:
    """What a training of ``stage`` reads: most often its tokens."""
    prepared = root / "prepared" if stage == "instruct" else data / "prepared"
    found = sorted(path for path in prepared.glob("*/*-*/*") if path.is_file())
    found += [path for path in found if path.suffix == ".bin" and "train" in path.parent.name] * 4
    found += sorted(prepared.glob("*/report.json")) + sorted(prepared.glob("*/tokenizer/tokenizer.json"))
    found += sorted((data / "instruct").glob("*")) if stage == "instruct" else sorted(data.glob("*/synthetic.jsonl"))
    if start.exists():
        newest = checkpoint.list_checkpoints(start / "checkpoints")[-1]
        found += [newest / "model.safetensors", newest / "tokenizer.json"] * 4
    return found
