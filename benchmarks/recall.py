"""How well the memory recalls.

    python -m benchmarks.recall mqar --tokens 512 --pairs 32 --state mqar.state --result one.json   # from scratch

`mqar` trains a small model, or a Transformer of the same width, on rows of multi-query associative recall
(benchmarks/mqar.py) until it meets the bar at every distance: all rates of all seeds side by side on one device, and a
seed is done when one of its rates has met the bar. After `--seconds` it stops; the same command with the same `--state`
goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from benchmarks import mqar
from benchmarks.gpu_ops import commit_of
from mm_rec import ops
from mm_rec.machine.device import select_device
from mm_rec.storage.files import write_atomic


def machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What the numbers were measured on."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "library": str(ops.status()["cuda" if is_cuda else "cpu"].level),
        "commit": commit_of(commit),
    }


def load_state(path: Path, runs: list[mqar.Run], settings: dict[str, Any]) -> None:
    """Let the runs that an earlier command began go on."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    if json.loads(metadata["settings"]) != settings:
        raise SystemExit(f"{path} is of other settings; name another --state")
    progress, tensors = json.loads(metadata["progress"]), safetensors.torch.load_file(path)
    for run in runs:
        if run.name in progress:
            run.restore(tensors, progress[run.name])


def save_state(path: Path, runs: list[mqar.Run], settings: dict[str, Any]) -> None:
    progress = {run.name: run.progress() for run in runs}
    tensors = {name: tensor.contiguous() for run in runs for name, tensor in run.tensors().items()}
    metadata = {"settings": json.dumps(settings), "progress": json.dumps(progress)}
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def run_mqar(options: argparse.Namespace) -> None:
    """Train, or go on; then write and print accuracies by distance."""
    device = select_device(options.device)
    task = mqar.Task(
        options.tokens,
        options.pairs,
        options.filler,
        options.width or (256 if options.pairs >= 128 else 128),
        options.rows,
        options.steps,
        options.bar or (0.95 if options.pairs >= 128 else 0.99),
        options.precision,
        options.vocabulary,
    )
    settings = mqar.settings(task, options.model)
    runs = [mqar.Run(task, options.model, seed, rate, device) for seed in options.seeds for rate in options.rates]
    if options.state and options.state.exists():
        load_state(options.state, runs, settings)
    mqar.learn(runs, options.seconds, lambda: save_state(options.state, runs, settings) if options.state else None)
    found = {"machine": machine(device, options.commit), "label": options.label or options.model, "settings": settings}
    found["runs"] = [run.result() for run in runs]
    options.result.write_text(json.dumps(found, indent=1) + "\n")
    for run in found["runs"]:
        parts = "  ".join(f"<{part['to']} {part['accuracy']:.1%}" for part in run["by_distance"])
        state = "met the bar" if run["met"] else "stopped" if run["steps"] < task.steps else "at its end"
        print(f"{found['label']} seed {run['seed']} rate {run['rate']:g}: {state} after {run['steps']} steps: {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("mqar", help="learn to recall from scratch")
    one.add_argument("--tokens", type=int, required=True, help="of a row")
    one.add_argument("--pairs", type=int, required=True)
    one.add_argument("--filler", choices=mqar.FILLERS, default="values")
    one.add_argument("--model", choices=mqar.MODELS, default="mm-rec")
    one.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--rows", type=int, default=64, help="of a step")
    one.add_argument("--steps", type=int, default=4000)
    one.add_argument("--width", type=int, help="of the model; if not given 128, or 256 from 128 pairs on")
    one.add_argument("--vocabulary", type=int, default=8192)
    one.add_argument("--bar", type=float, help="accuracy at every distance; if not given .99, or .95 from 128 pairs on")
    one.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    one.add_argument("--device", default="auto")
    one.add_argument("--seconds", type=float, default=float("inf"), help="after which to stop")
    one.add_argument("--state", type=Path, help="file to go on from, and to write")
    one.add_argument("--result", type=Path, required=True)
    one.add_argument("--label", help="of the model in tables and pictures")
    one.add_argument("--commit", help="of the code measured, where git does not know")
    one.set_defaults(run=run_mqar)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
