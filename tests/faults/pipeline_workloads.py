"""Rows 1, 4, 6, 11: training commands that are killed, asked to stop, changed or fed with bad losses.

Every stage is trained once undisturbed; whatever happens to it afterwards has to come out the same, byte for byte.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from supervisor import Child, Supervisor
from tiny_runs import (
    SAVE_EVERY,
    STAGES,
    STEPS,
    When,
    arguments,
    armed_at,
    as_argument,
    clear,
    difference,
    leftovers,
    processor_seconds,
    result,
    write_data,
)  # fmt: skip
from workload import Complete, Trial, workload

PLACES = {
    "mm_rec.storage.run_folder:RunFolder.save": 6,
    "mm_rec.storage.checkpoint:save": 5,
    "mm_rec.training.trainer:Trainer._evaluate": 3,
    "mm_rec.training.trainer:Trainer._sample": 3,
}
"""Where kills are biased to, and how often at least each is called in a run."""


class Pipeline:
    """Data, and the undisturbed run of each stage, each from the weights of the one before."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.supervisor = folder, Supervisor(folder)
        self.raw, self.data = folder / "raw", folder / "data"
        write_data(self.raw)
        shutil.copytree(self.raw, self.data)
        self.whole: dict[str, dict[str, bytes]] = {}
        self.batches: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self._starts: dict[str, Path | None] = dict.fromkeys(STAGES[:1])

    def start(self, stage: str) -> Path | None:
        """The run whose weights a stage starts from."""
        if stage not in self._starts:
            before = STAGES[STAGES.index(stage) - 1]
            self.undisturbed(before)
            self._starts[stage] = self.folder / "whole" / before
        return self._starts[stage]

    def command(self, stage: str, root: Path, data: Path | None = None, **changes: object) -> list[str]:
        return arguments(stage, data or self.data, root, self.start(stage), **changes)

    def undisturbed(self, stage: str) -> dict[str, bytes]:
        """The result of a stage that nothing disturbed."""
        if stage not in self.whole:
            notes = self.folder / f"{stage}.batches"
            child = self.supervisor.run(
                "tiny_runs.run", command=self.command(stage, self.folder / "whole"), batches=str(notes)
            )
            assert child.status == 0, child.log
            self.whole[stage] = result(self.folder / "whole" / stage)
            self.batches[stage] = read_batches(notes)
            self.seconds[stage] = processor_seconds(child.log)
        return self.whole[stage]

    def check(self, stage: str, root: Path) -> None:
        """Assert that the run in ``root`` is the undisturbed one, byte for byte, with nothing left over."""
        assert difference(result(root / stage), self.whole[stage]) == []
        assert leftovers(root) == []
        assert [path.name for path in root.glob(f"{stage}*")] == [stage]


@functools.cache
def shared_pipeline() -> Pipeline:
    """The pipeline of this process: its undisturbed runs serve all workloads, which change copies alone."""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Pipeline(folder)


def read_batches(path: Path) -> dict[str, str]:
    """Hashes of batches by step and part; asserts that a batch that was read twice was the same."""
    batches: dict[str, str] = {}
    for line in path.read_text().splitlines():
        place, _, digest = line.rpartition(" ")
        assert batches.setdefault(place, digest) == digest, place
    return batches


def last_step(run: Path) -> int:
    """The last step in the loss log; 0 if there is none."""
    log = run / "loss_log.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    return int(lines[-1].partition(",")[0]) if lines else 0


def resumed_step(log: str) -> int:
    """The step that a command said it goes on from."""
    return int(log.rpartition("goes on from step_")[2][:6]) if "goes on from step_" in log else 0


def random_kill(rng: random.Random, seconds: float) -> When:
    """Half of them anywhere in the command, half shortly after a save, an evaluation or a sample began."""
    if rng.random() < 0.5:
        return When("", 1, rng.uniform(0.0, seconds))
    place = rng.choice(list(PLACES))
    return When(place, rng.randint(1, PLACES[place]), rng.choice([0.0, rng.uniform(0, 0.03)]))


@workload(1, "kill -9 at random instants, half of them in saves and evaluations", unit="runs", quick=5, soak=200,
          idle=["came out byte for byte"])  # fmt: skip
def killed_commands(folder: Path) -> Iterator[Trial]:
    pipeline = shared_pipeline()

    def trial(seed: int) -> Mapping[str, int]:
        rng, stage = random.Random(seed), STAGES[seed % len(STAGES)]
        pipeline.undisturbed(stage)
        root, notes = folder / f"killed{seed}", folder / f"killed{seed}.batches"
        data = folder / f"data{seed}"
        shutil.copytree(pipeline.raw if rng.random() < 0.5 else pipeline.data, data)  # prepared anew, or before
        command, kills = pipeline.command(stage, root, data), 0
        for _ in range(rng.choice([1, 1, 2, 3])):
            when = as_argument(random_kill(rng, pipeline.seconds[stage]))
            reached = last_step(root / stage)
            child = pipeline.supervisor.run("tiny_runs.run", command=command, when=when, batches=str(notes))
            if child.status == 0:
                break
            assert child.status == -signal.SIGKILL, child.log
            kills += 1
            if "goes on from step_" in child.log:
                assert reached - resumed_step(child.log) <= SAVE_EVERY, (reached, child.log)
        reached = last_step(root / stage)
        child = pipeline.supervisor.run("tiny_runs.run", command=command, batches=str(notes))
        assert child.status == 0, child.log
        if "goes on from step_" in child.log:
            assert reached - resumed_step(child.log) <= SAVE_EVERY, (reached, child.log)
        pipeline.check(stage, root)
        assert read_batches(notes) == pipeline.batches[stage]
        for path in (root, data):
            clear(path)
        return {f"{stage}: kills": kills, "came out byte for byte": 1}

    yield trial


PHASES = {
    "preparation": ["mm_rec.data.prepare:survey_domain", "mm_rec.data.prepare:_make", "mm_rec.data.prepare:_encode"],
    "warm-up": [
        "mm_rec.training.run_estimate:measure_activations",
        "mm_rec.training.run_estimate:_seconds_per_step",
        "mm_rec.training.run_stages:build_trainer",
    ],
    "evaluation": ["mm_rec.training.trainer:Trainer._evaluate", "mm_rec.training.trainer:Trainer._sample"],
    "save": [
        "mm_rec.storage.run_folder:RunFolder.save",
        "mm_rec.storage.checkpoint:save",
        "mm_rec.storage.files:_seal",
    ],
}
SIGNALS = {
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}
DEADLINE = 10.0


@workload(
    4, "SIGTERM, SIGINT and double Ctrl-C in data preparation, warm-up, evaluation and save",
    unit="signals", quick=4, soak=100 * len(PHASES),
)  # fmt: skip
def signalled_commands(folder: Path) -> Iterator[Trial]:
    pipeline = shared_pipeline()

    def trial(seed: int) -> str:
        rng, phase = random.Random(seed), list(PHASES)[seed % len(PHASES)]
        stages = STAGES[:1] if phase == "preparation" else STAGES
        stage, name = rng.choice(stages), rng.choice(list(SIGNALS))
        pipeline.undisturbed(stage)
        root, data = folder / f"signalled{seed}", folder / f"data{seed}"
        shutil.copytree(pipeline.raw if phase == "preparation" else pipeline.data, data)
        command, place = pipeline.command(stage, root, data), rng.choice(PHASES[phase])
        delay = rng.choice([0.0, rng.uniform(0, 0.02)])
        when = When(place, 1, delay, SIGNALS[name], rng.uniform(0.001, 0.02))
        child = pipeline.supervisor.run("tiny_runs.run", command=command, when=as_argument(when))
        check_stop(child, when)
        child = pipeline.supervisor.run("tiny_runs.run", command=command)
        assert child.status == 0, child.log
        pipeline.check(stage, root)
        for path in (root, data):
            clear(path)
        return f"{phase}: stopped and went on exactly"

    yield trial


def check_stop(child: Child, when: When) -> None:
    """Assert that a signalled process ended in time with the conventional code, and without a traceback."""
    (armed, queued), (ended, queued_at_end) = armed_at(child.log), child.ended
    assert child.status == 128 + when.signals[0], (when, child.status, child.log)
    taken = ended - armed - when.seconds - (queued_at_end - queued)  # a crowded machine is not its fault
    assert taken <= DEADLINE, (when, taken, child.log)
    assert "Traceback" not in child.log, (when, child.log)


@workload(11, "NaN or Inf in loss or gradient, or a spike, in random steps; killed and resumed", unit="runs",
          quick=2, soak=100)  # fmt: skip
def spoiled_losses(folder: Path) -> Iterator[Trial]:
    pipeline = shared_pipeline()

    def trial(seed: int) -> str:
        rng, stage = random.Random(seed), STAGES[seed % len(STAGES)]
        steps = rng.sample(range(1, STEPS + 1), rng.choice([1, 1, 2, 3]))
        kinds = ["nan loss", "inf loss", "nan gradient", "spike"]  # a spike shows once there were usual losses
        faults = {str(step): rng.choice(kinds if step >= 6 else kinds[:3]) for step in steps}
        results = []
        for name in ("whole", "killed"):
            root = folder / f"{name}{seed}"
            work = {"command": pipeline.command(stage, root), "faults": faults}
            if name == "killed":
                place = rng.choice([*PLACES, "mm_rec.training.trainer:Trainer._roll_back"])
                when = as_argument(When(place, 1 if "roll" in place else rng.randint(1, PLACES[place]), 0.002))
                child = pipeline.supervisor.run("tiny_runs.run", when=when, **work)
                assert child.status in (0, -signal.SIGKILL), child.log
            child = pipeline.supervisor.run("tiny_runs.run", **work)
            assert child.status == 0, child.log
            results.append(result(root / stage))
            events = (root / stage / "events.log").read_text()
            assert all(f" in step {step}: went back to step " in events for step in steps), events
            clear(root)
        assert difference(*results) == []
        metrics = results[0]["metrics.jsonl"].decode()
        assert all(f'"step": {step}, "skipped": true' in metrics for step in steps), metrics
        assert "NaN" not in metrics
        assert "Infinity" not in metrics
        return f"{stage}: rolled back, batch left out, exact after a kill"

    yield trial


CHANGES = {
    "seq_len": {"seq_len": 24},
    "batch_size": {"batch_size": 3},
    "accumulation": {"accumulation": 2},
    "threads": {"threads": 2},
    "seed": {"seed": 1},
    "rate": {"lr": 0.5},
    "weight_decay": {"weight_decay": 0.5},
    "clip": {"clip": 0.5},
    "precision": {"precision": "fp32"},
    "data": {},
    "tokenizer": {},
    "ops": {},
}
"""What may not be as it was when a run is resumed by name: as the identity of a run calls it, and the flags."""
NOTHING_TO_CHANGE = "fine-tuning takes the tokenizer of the model: nothing to change"


@workload(
    6, "--resume_from with other settings, threads, precision, processor level, data or tokenizer",
    unit="resumes", quick=3, soak=len(CHANGES) * len(STAGES), idle=[NOTHING_TO_CHANGE],
)  # fmt: skip
def changed_resumes(folder: Path) -> Iterator[Trial]:
    pipeline = shared_pipeline()
    others = {"data": folder / "other_data", "tokenizer": folder / "other_tokenizer"}
    for path, documents in zip(others.values(), (13, 30), strict=True):
        write_data(path, documents)
        for row in path.glob("*/rows.jsonl"):
            row.write_text(row.read_text() * 2 + row.read_text()[:200].splitlines()[0] + "\n")
    order = [(stage, name) for name in CHANGES for stage in STAGES]
    random.Random(0).shuffle(order)
    order.sort(key=lambda case: case != ("stage1", "ops"))  # what only this checks comes in every test run

    def trial(seed: int) -> str:
        if seed >= len(order):
            raise Complete
        stage, name = order[seed]
        if stage in STAGES[3:] and name == "tokenizer":
            return NOTHING_TO_CHANGE
        whole = pipeline.undisturbed(stage)
        root = folder / f"changed{seed}"
        (root / stage).parent.mkdir()
        shutil.copytree(pipeline.folder / "whole" / stage, root / stage)
        resume = {"resume_from": root / stage, "max_steps": STEPS + 2, **CHANGES[name]}
        data = others.get(name)
        environment = {"MM_REC_CPU_LEVEL": "baseline"} if name == "ops" else {}

        def run(**flags: object) -> Child:
            command = pipeline.command(stage, root, data, **resume, **flags)
            return pipeline.supervisor.run("tiny_runs.run", command=command, environment=environment)

        refused = run()
        assert refused.status == 2, (name, stage, refused.log)
        if "was trained with another tokenizer" in refused.log:  # no flag makes that right
            assert run(allow_changes=True).status == 2
            assert difference(result(root / stage), whole) == [], (name, stage)
            clear(root)
            return "another tokenizer: refused, --allow_changes or not"
        assert f"{name} was " in refused.log, (name, refused.log)
        assert "--allow_changes" in refused.log, (name, refused.log)
        assert difference(result(root / stage), whole) == [], (name, stage)
        accepted = run(allow_changes=True)
        assert accepted.status == 0, (name, stage, accepted.log)
        events = "".join(path.read_text() for path in root.glob(f"{stage}*/events.log"))
        assert f"{name} was " in events, (name, events)
        clear(root)
        return "refused, and with --allow_changes accepted and recorded"

    yield trial
