"""Size of an installation and how long its commands take to start, of two versions of this project in turn.

    git worktree add /tmp/before COMMIT && cd /tmp/before && python -m mm_rec.cpp.build
    python -m benchmarks.install --before /tmp/before [--rounds 7]

An installation is what ``pyproject.toml`` asks for, with all that it needs in turn, by the metadata of the packages in
the running environment, which has them all; its size is that of their files there. PyTorch and what it needs itself
are counted apart. Times are medians over the rounds: seconds, and the processor's seconds, which other work on the
machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mm_rec.bench.machine import describe_machine
from mm_rec.program import positive_int

HERE = Path(__file__).resolve().parents[1]


def needed(requirements: Iterable[str]) -> set[str]:
    """Returns the packages that ``requirements`` bring along, themselves included."""
    waiting = [Requirement(one) for one in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        for extra in ("", *one.extras):
            if (name, extra) in seen or name == "mm-rec":
                continue
            seen.add((name, extra))
            for text in metadata.requires(name) or []:
                inner = Requirement(text)
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    waiting.append(inner)
    return {name for name, _ in seen}


def size(name: str) -> int:
    """Returns the bytes of an installed package, compiled Python left out."""
    files = metadata.distribution(name).files or []
    paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def installations(tree: Path) -> dict[str, object]:
    """Returns number and size of the packages of the default installation and with each extra."""
    project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    of_torch = needed(["torch"])

    def expanded(requirements: Iterable[str]) -> list[str]:
        found = []
        for text in requirements:
            one = Requirement(text)
            own = canonicalize_name(one.name) == "mm-rec"
            found += [inner for extra in sorted(one.extras) for inner in expanded(extras[extra])] if own else [text]
        return found

    sizes: dict[str, object] = {"torch": describe(of_torch)}
    for extra in ("", *(name for name in extras if name not in ("dev", "tensorboard"))):
        packages = needed([*project["dependencies"], *expanded(extras.get(extra, []))])
        sizes[f"default and {extra}" if extra else "default"] = describe(packages - of_torch)
    return sizes


def describe(packages: set[str]) -> dict[str, object]:
    """Returns number and size of some packages, and the largest of them."""
    by_size = sorted(((size(name), name) for name in packages), reverse=True)
    return {
        "packages": len(packages),
        "MB": round(sum(one for one, _ in by_size) / 1e6, 1),
        "largest": {name: round(one / 1e6, 1) for one, name in by_size[:6]},
    }


def start(tree: Path, *arguments: str) -> tuple[float, float, str]:
    """Run Python with the version in ``tree``; returns its seconds, the processor's seconds, and its errors."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=tree)
    seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{arguments} in {tree}: {done.stderr}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


def imported(tree: Path, module: str) -> dict[str, float]:
    """Returns the milliseconds of ``python -X importtime`` for a module and all that it imports, and their number."""
    _, _, told = start(tree, "-X", "importtime", "-c", f"import {module}")
    lines = [line.split("|") for line in told.splitlines() if line.startswith("import time:")]
    return {"milliseconds": float(lines[-1][1]) / 1000, "modules": float(len(lines) - 1)}


def commands(tree: Path, folder: Path) -> dict[str, list[str]]:
    """Returns the commands to time; the version in ``tree`` trains a model for them, which another could not read."""
    training = ["--stage", "stage1", "--use_synthetic", "--preset", "tiny", "--max_steps", "1", "--seq_len", "64"]
    places = ["--data_dir", str(folder / "data"), "--checkpoint_dir", str(folder / "runs")]
    start(tree, "-m", "mm_rec.scripts.train_cpu", *training, *places)
    sampling = ["--prompt", "The ", "--max_new_tokens", "8", "--precision", "fp32"]
    generate = ["-m", "mm_rec.cli", "generate"]
    return {
        "mm-rec --help": ["-m", "mm_rec.cli", "--help"],
        "mm-rec generate --help": [*generate, "--help"],
        "mm-rec generate, 8 tokens of tiny": [*generate, "--model", str(folder / "runs" / "stage1"), *sampling],
    }


def main() -> None:
    """Measure both versions and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="tree of the version to compare with")
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "benchmarks" / "results" / "install.json")
    options = parser.parse_args()
    trees = {"before": options.before.resolve(), "after": HERE}
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        all_commands = {name: commands(tree, Path(folder) / name) for name, tree in trees.items()}
        for turn in range(options.rounds):
            for name in sorted(trees, reverse=bool(turn % 2)):
                for module in ("mm_rec.cli", "mm_rec.inference.loading", "mm_rec.scripts.doctor_command"):
                    for unit, value in imported(trees[name], module).items():
                        times[name][f"import {module}, {unit}"].append(value)
                for command, arguments in all_commands[name].items():
                    seconds, processor, _ = start(trees[name], *arguments)
                    times[name][f"{command}, seconds"].append(seconds)
                    times[name][f"{command}, processor seconds"].append(processor)
    result = {
        name: {
            "sizes": installations(tree),
            "times": {what: round(statistics.median(values), 3) for what, values in times[name].items()},
        }
        for name, tree in trees.items()
    }
    machine = {"machine": describe_machine(), "rounds": options.rounds}
    options.output.write_text(json.dumps({**machine, **result}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
