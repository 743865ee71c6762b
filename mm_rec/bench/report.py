"""``mm-rec bench``: the whole table for this machine, as text, JSON and a roofline."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_rec.bench.generation import compare_generation
from mm_rec.bench.kernels import KernelTime, measure_kernels, measure_recurrence
from mm_rec.bench.limits import copy_rate, products_action
from mm_rec.bench.machine import describe_machine
from mm_rec.bench.memory import peak_memory
from mm_rec.bench.picture import Point, draw_roofline
from mm_rec.bench.training import Contender, StepTime, compare_steps, contenders, tune_threads
from mm_rec.config import PRESETS
from mm_rec.storage.files import format_bytes, write_atomic
from mm_rec.translation import Translatable, join_texts

__all__ = ["BenchSettings", "run_bench"]

CONTEXTS = (128, 4096)
KERNEL_SHAPE = {"cpu": (8, 2048), "cuda": (128, 512)}  # activations that no cache holds
OPTIMIZER_BYTES = 28  # of AdamW for each bfloat16 weight: master and two moments read and written, gradient, weight


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        preset: of the model.
        shapes: (batch, length) of training steps.
        rounds: runs that the medians are of.
        precision: bf16 or fp32.
        peers: whether GPT-2 and a modern GPT run beside it.
        output: folder for ``bench.json`` and ``roofline.png``.
        device: what to measure.
    """

    preset: str
    shapes: Sequence[tuple[int, int]]
    rounds: int
    precision: str
    peers: bool
    output: Path
    device: torch.device


def run_bench(settings: BenchSettings, write: Callable[[str], object]) -> dict[str, Any]:
    """Measure everything, write a line for each as it comes, then the JSON and the picture."""
    # All that is made from here on is made there; for the CPU that is so anyway.
    with settings.device if settings.device.type == "cuda" else contextlib.nullcontext():
        return _run(settings, write)


def _run(settings: BenchSettings, write: Callable[[str], object]) -> dict[str, Any]:
    config, precision = PRESETS[settings.preset], settings.precision
    tokens = max(batch * length for batch, length in settings.shapes)
    matrix_rate, memory_rate = products_action(config, precision, tokens)(), copy_rate()
    machine = describe_machine() | {"threads": torch.get_num_threads(), "precision": precision}
    parts = [str(machine["processor"])]
    if settings.device.type == "cpu":
        parts.append(Translatable("{count} threads", count=machine["threads"]))
    where = join_texts(", ", parts)
    write(join_texts(", ", [where, precision, Translatable("{ops} kernels", ops=machine["kernels"])]))
    write(
        Translatable(
            "limits: matrix products {products:.2f} TFLOP/s, copies {copies:.1f} GB/s",
            products=matrix_rate / 1e12,
            copies=memory_rate / 1e9,
        )
    )

    steps = _measure_training(settings, write)
    memory = peak_memory(settings.preset, precision, *max(settings.shapes, key=lambda shape: shape[0] * shape[1]))
    write(Translatable("  most memory of training steps, one domain: {memory}", memory=format_bytes(memory)))
    generation = {}
    for context in CONTEXTS:
        speeds = compare_generation(config, precision, context, settings.rounds, peers=settings.peers)
        generation[str(context)] = {name: round(speed, 1) for name, speed in speeds.items()}
        said = Translatable(
            "generation after {context:,} tokens: {speeds}", context=context, speeds=_list_speeds(speeds)
        )
        write(said)
    recurrence = measure_recurrence(config, 2, 512, settings.rounds)
    write(
        Translatable(
            "recurrence, forward and backward, {shape}: {ms:.1f} ms, {gru:.1f} times nn.GRU, {loop:.0f} times the "
            "reference loop",
            shape=recurrence["shape"],
            ms=recurrence["ms"],
            gru=recurrence["times_faster_than_gru"],
            loop=recurrence["times_faster_than_loop"],
        )
    )
    batch, length = KERNEL_SHAPE[settings.device.type]
    kernels = measure_kernels(config, batch, length, matrix_rate, settings.rounds)
    write(
        Translatable(
            "kernels at {batch} x {length} tokens: bytes a second against a copy, share of their limit",
            batch=batch,
            length=length,
        )
    )
    for one in kernels:
        write(f"  {one.name:38} {one.seconds * 1e3:8.2f} ms  {one.share_of_copy:5.0%} {one.share_of_limit:5.0%}")

    result = {
        "settings": machine | {"preset": settings.preset, "rounds": settings.rounds},
        "limits": {"matrix_tflops": round(matrix_rate / 1e12, 3), "copy_gb_per_s": round(memory_rate / 1e9, 2)},
        "training": [step.to_dict() for step in steps],
        "peak_memory_bytes": memory,
        "generation_tokens_per_second": generation,
        "recurrence": recurrence,
        "kernels": [one.to_dict() for one in kernels],
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    write_atomic(settings.output / "bench.json", (json.dumps(result, indent=1) + "\n").encode())
    points = _points(steps, kernels, settings)
    picture = settings.output / "roofline.png"
    draw_roofline(points, matrix_rate, memory_rate, picture, where)
    write(Translatable("written: {path}, {picture}", path=settings.output / "bench.json", picture=picture))
    return result


def _measure_training(settings: BenchSettings, write: Callable[[str], object]) -> list[StepTime]:
    config = PRESETS[settings.preset]
    names = ["one_domain", "fused", *(["gpt2", "gpt_compiled"] if settings.peers else [])]
    entries: dict[str, Contender] = contenders(config, settings.precision, names)
    threads = torch.get_num_threads()
    if settings.peers and threads > 1 and settings.device.type == "cpu":
        tune_threads(entries["gpt2"], config, sorted({1, threads // 2, threads}))
    found: list[StepTime] = []
    write(
        Translatable(
            "training: seconds a step, tokens a second, share of the rate of the model's own matrix products beside it"
        )
    )
    for batch, length in settings.shapes:
        times = compare_steps(config, settings.precision, batch, length, entries, settings.rounds)
        for one in times.values():
            ratio = f"  {times['gpt2'].seconds / one.seconds:5.2f} x GPT-2" if "gpt2" in times else ""
            write(
                f"  {one.shape:>6} {one.label:26} {one.seconds:8.3f} s {one.tokens_per_second:9,.0f}"
                f" {one.flops / one.matrix_rate:6.0%}{ratio}"
            )
            found.append(one)
        for name in [name for name in entries if name not in times]:
            label = f"{batch}x{length} {entries[name].label:26}"
            write(Translatable("  {label} does not fit into the memory", label=label))
    return found


def _list_speeds(speeds: dict[str, float]) -> Translatable:
    parts = (Translatable("{name} {speed:.1f} tokens/s", name=name, speed=speed) for name, speed in speeds.items())
    return join_texts(", ", parts)


def _points(steps: Sequence[StepTime], kernels: Sequence[KernelTime], settings: BenchSettings) -> list[Point]:
    """Kernels that have products, and training steps; a step has to move its optimizer's bytes at least."""
    points = [Point(one.name, "kernel", one.flop, one.size, one.seconds) for one in kernels if one.flop]
    for step in steps:
        weights = step.flop_per_token / 6
        flop = step.flop_per_token * step.batch_size * step.seq_len
        kind = "training" if step.label.startswith("MM-Rec") else "peer"
        label = f"{step.label} {step.shape}"
        points.append(Point(label, kind, flop, OPTIMIZER_BYTES * weights, step.seconds))
    return points
