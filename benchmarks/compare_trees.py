"""Speed of two versions of this project, in turn: training, generation in bf16 and int8, the product's loop, serving.

    git worktree add /tmp/before COMMIT && cp mm_rec/cpp/*.so /tmp/before/mm_rec/cpp/
    python -m benchmarks.compare_trees --before /tmp/before [--device cuda] [--rounds 5]

Each round runs the same once with either tree (``parts``: steps and single tokens; ``train``: ``mm-rec train``;
``generate``: texts; ``serving``: streams over HTTP); which one comes first changes with the round. A figure is the
median over the rounds; the ratio is the median of the rounds' ratios, with the least and the most. The result is
written after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mm_rec.bench.machine import describe_machine
from mm_rec.program import positive_int

HERE = Path(__file__).resolve().parents[1]
STEPS = 12
"""Steps of a training; the first two, in which memory is first touched, don't count."""


KINDS = ("parts", "train", "generate", "serving")


def run(tree: Path, *arguments: str) -> str:
    """Run Python with the version in ``tree``; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=tree)
    if done.returncode:
        raise RuntimeError(f"{arguments} in {tree}: {done.stderr}")
    return done.stdout


def mm_rec(tree: Path, *arguments: str) -> float:
    """Run a command of the version in ``tree``; returns its seconds."""
    start = time.monotonic()
    run(tree, "-m", "mm_rec.cli", *arguments)
    return time.monotonic() - start


PROBE = """
import json, sys, torch
from mm_rec.bench.generation import compare_generation
from mm_rec.bench.training import compare_steps, contenders
from mm_rec.config import PRESETS
device, precision, shapes = sys.argv[1], sys.argv[2], sys.argv[3:]
torch.set_default_device(device)
rounds = 3 if device == "cpu" else 40
entries = contenders(PRESETS["100m"], precision, ["one_domain", "fused"])
for shape in shapes:
    batch, length = map(int, shape.split("x"))
    for one in compare_steps(PRESETS["100m"], precision, batch, length, entries, rounds).values():
        print(json.dumps([f"{one.label}, {shape}", one.tokens_per_second]))
for context in (128, 4096):
    for name, speed in compare_generation(PRESETS["100m"], precision, context, 5, peers=False).items():
        print(json.dumps([f"{name}, generation after {context}", speed]))
"""
"""Training steps and generation without the product around them, by functions that every version since b411fa1 has."""


def parts(tree: Path, device: str, precision: str, shapes: Sequence[str]) -> dict[str, float]:
    """Tokens a second of training steps and of generation."""
    return dict(json.loads(line) for line in run(tree, "-c", PROBE, device, precision, *shapes).splitlines())


def train(tree: Path, folder: Path, device: str, name: str) -> tuple[Path, dict[str, float]]:
    """A training by ``mm-rec train``: its runs, and its steps a second."""
    runs = folder / name
    mm_rec(
        tree, "train", "--use_synthetic", "--data_dir", str(folder / "data"), "--checkpoint_dir", str(runs),
        "--device", device, "--max_steps", str(STEPS), "--valid_bytes", "1000", "--fresh",
    )  # fmt: skip
    newest = max(runs.glob("stage1*"), key=lambda path: path.stat().st_mtime)
    seconds = [json.loads(line)["seconds"] for line in (newest / "timing.jsonl").read_text().splitlines()]
    return newest, {"train, steps a second": 1 / statistics.median(seconds[2:])}


GENERATE = """
import json, statistics, sys, time
from pathlib import Path
try:
    from mm_rec.inference.generate import generate
    from mm_rec.inference.loading import load_model
    from mm_rec.inference.sampling import Sampling
except ImportError:  # where they were until b411fa1
    from mm_rec.generate import Sampling, generate
    from mm_rec.loading import load_model
device, path = sys.argv[1], Path(sys.argv[2])
for weights in ("full", "int8"):
    loaded = load_model(path, device=device, weights=weights)
    rates = []
    for seed in (0, 0, 1, 2, 3, 4):
        start = time.perf_counter()
        sampling = Sampling(max_new_tokens=200, seed=seed)
        text = "".join(generate(loaded.model, loaded.tokenizer, "The ", sampling, "text"))
        rates.append(200 / (time.perf_counter() - start))
    print(json.dumps([f"generate, {weights}", statistics.median(rates[1:])]))
"""
"""Texts of 200 tokens by the product's own loop; the first, in which kernels are loaded, does not count."""


def generate(tree: Path, model: Path, device: str) -> dict[str, float]:
    """Tokens a second of generating texts, by kind of weights."""
    return dict(json.loads(line) for line in run(tree, "-c", GENERATE, device, str(model)).splitlines())


SERVE = """
import json, statistics, sys, tempfile
from pathlib import Path
from benchmarks import serving
with tempfile.TemporaryDirectory() as folder:
    with serving.served(serving.build(sys.argv[1], "text", Path(folder))) as url:
        for streams in (1, 8):
            rates = [serving.ask(url, streams)["tokens_per_second"] for _ in range(6)]
            print(json.dumps([f"serving, {streams} streams", statistics.median(rates[1:])]))
"""
"""Streams of 64 tokens from the `100m` preset; clients have a process of their own, and the first ones don't count."""


def serving(tree: Path, precision: str) -> dict[str, float]:
    """Tokens a second of the server on the CPU, by the number of streams."""
    return dict(json.loads(line) for line in run(tree, "-c", SERVE, precision).splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the tree of the earlier version")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--shapes", nargs="+", default=["1x256", "2x512"])
    parser.add_argument("--measure", nargs="+", choices=KINDS, default=("parts", "train", "generate"))
    parser.add_argument("--commits", nargs=2, metavar="HASH", help="before and after, where a copy has no git")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "benchmarks" / "results" / "compare_trees.json")
    options = parser.parse_args()
    trees = {"before": options.before.resolve(), "after": HERE}
    rounds: list[dict[str, dict[str, float]]] = []
    table: dict[str, dict[str, float]] = {}
    commits = dict(zip(trees, options.commits or map(commit, trees.values()), strict=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "generate" in options.measure:
            models = {label: train(tree, folder, options.device, f"model-{label}")[0] for label, tree in trees.items()}
        for index in range(options.rounds):
            found = {}
            for label in sorted(trees, reverse=bool(index % 2)):
                tree = trees[label]
                speeds: dict[str, float] = {}
                if "parts" in options.measure:
                    speeds |= parts(tree, options.device, options.precision, options.shapes)
                if "train" in options.measure:
                    speeds |= train(tree, folder, options.device, label)[1]
                if "generate" in options.measure:
                    speeds |= generate(tree, models[label], options.device)
                if "serving" in options.measure:
                    speeds |= serving(tree, options.precision)
                found[label] = speeds
            rounds.append(found)
            print(f"round {index + 1} of {options.rounds}", flush=True)
            table = compare(rounds)
            result = {"machine": describe_machine(), "commits": commits, "rounds": index + 1, "speeds": table}
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in table.items():
        print(f"{name:48} {one['ratio']:.3f} ({one['least']:.3f} to {one['most']:.3f})")


def compare(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns the medians of both sides, and of their ratio with its least and most, by what was measured."""
    table = {}
    for name in rounds[0]["before"]:
        ratios = [one["after"][name] / one["before"][name] for one in rounds]
        table[name] = {label: round(statistics.median(one[label][name] for one in rounds), 2) for label in rounds[0]}
        table[name] |= {"ratio": round(statistics.median(ratios), 3)}
        table[name] |= {"least": round(min(ratios), 3), "most": round(max(ratios), 3)}
    return table


def commit(tree: Path) -> str:
    done = subprocess.run(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
