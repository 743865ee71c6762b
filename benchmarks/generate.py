"""Speed of generation on the CPU against GPT-2 with its cache, in one run: alternating turns, medians.

    python -m benchmarks.generate --cases 1x128 1x4096 8x128 64x128

A case is sequences x tokens of context. A turn is some greedy tokens for all sequences, from the same context each
time; contexts are random, since no model's time depends on what it has read. Seconds are those of one step, which is
one token of each sequence.

bf16, int8      the `100m` preset, one domain, weights as named; bfloat16 packed as `mm-rec generate` does
fused           the same in bfloat16 with both experts
gpt2            GPT-2 110M of transformers, bfloat16, its positions raised, with its cache

`share` is the rate at which a step's weights and states are read, as a part of the rate of a plain copy of 256 MB
(bytes read and written) in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_rec import ops
from mm_rec.bench.limits import copy_action
from mm_rec.bench.peers import gpt2_110m
from mm_rec.bench.timing import timed
from mm_rec.config import PRESETS
from mm_rec.inference import decode
from mm_rec.inference.quantize import pack_matrices, quantize_int8
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.ops.inference import Int8Matrix
from mm_rec.state import ModelState, flatten_state, map_state

RESULT = Path(__file__).parent / "results" / "generation.json"
NAMES = ("bf16", "int8", "fused", "gpt2")
COPY_BYTES = 256_000_000
POSITIONS = 8192  # that GPT-2 has room for
Turn = Callable[[], int]  # generates and returns how many steps that took


def mm_rec_model(weights: str) -> MMRecModel:
    """The `100m` preset, its activations bfloat16."""
    model = MMRecModel(PRESETS["100m"])
    apply_precision(model, "bf16")
    if weights == "int8":
        quantize_int8(model)
    else:
        pack_matrices(model)
    return model.eval()


def context_state(model: MMRecModel, domain: str | None, batch: int, context: int) -> ModelState:
    """A state as after ``context`` random tokens."""
    generator = torch.Generator().manual_seed(context)

    def fill(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator).to(tensor.dtype)

    state = map_state(model.initial_state(batch, domain), fill)
    return state._replace(position=torch.full((batch,), context))


def mm_rec_turn(model: MMRecModel, domain: str | None, batch: int, context: int, steps: int) -> Turn:
    """Greedy tokens with :func:`mm_rec.inference.decode.step`."""
    start = context_state(model, domain, batch, context)

    @torch.inference_mode()
    def turn() -> int:
        tokens, state = torch.zeros(batch, dtype=torch.int64), start
        for _ in range(steps):
            logits, state = decode.step(model, tokens, state, domain, donate=state is not start)
            tokens = logits.argmax(-1)
        return steps

    return turn


def gpt2_turn(model: Any, batch: int, context: int, steps: int) -> Turn:
    """Greedy tokens with the cache that transformers uses by default."""
    from transformers import DynamicCache

    config = model.config
    size = (batch, config.n_head, context, config.n_embd // config.n_head)
    cache = DynamicCache()
    for layer in range(config.n_layer):
        cache.update(torch.randn(size).to(torch.bfloat16), torch.randn(size).to(torch.bfloat16), layer)

    @torch.inference_mode()
    def turn() -> int:
        tokens = torch.zeros(batch, 1, dtype=torch.int64)
        for _ in range(steps):
            logits = model(tokens, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1:].argmax(-1)
        cache.crop(-steps)  # takes away as many tokens
        return steps

    return turn


def bytes_per_step(model: MMRecModel, domain: str | None, batch: int) -> int:
    """Weights that a step reads, and the states of its sequences."""
    names = model.config.experts if domain is None else (domain,)
    parameters = {"embedding.weight": model.embedding.weight}
    parameters |= {f"experts.{name}.{key}": p for name in names for key, p in model.experts[name].named_parameters()}
    read = 0
    for name, parameter in parameters.items():
        matrix = decode.compressed_matrices(model).get(name)
        if isinstance(matrix, Int8Matrix):
            read += matrix.data.nbytes + matrix.scale.nbytes
        elif matrix is not None:
            read += matrix.data.nbytes + matrix.base.nbytes
        else:
            read += parameter.nbytes
    return read + sum(tensor.nbytes for tensor in flatten_state(model.initial_state(batch, domain)).values())


def measure(case: str, models: dict[str, Any], rounds: int, steps: int, peer_steps: int) -> list[dict[str, Any]]:
    """Alternate the models' turns on one case."""
    batch, context = (int(part) for part in case.split("x"))
    turns: dict[str, Turn] = {}
    for name, model in models.items():
        if name == "gpt2":
            turns[name] = gpt2_turn(model, batch, context, peer_steps)
        else:
            turns[name] = mm_rec_turn(model, None if name == "fused" else "text", batch, context, steps)
    copy = copy_action(2 * COPY_BYTES)
    times: dict[str, list[float]] = {name: [] for name in turns}
    copies = []
    for round_ in range(rounds + 1):
        copies.append(2 * COPY_BYTES / timed(copy))
        for name, turn in turns.items():
            seconds = timed(turn) / (peer_steps if name == "gpt2" else steps)
            if round_:  # the first one warms up
                times[name].append(seconds)
    copy_rate = statistics.median(copies[1:])
    rows = []
    for name, model in models.items():
        seconds = statistics.median(times[name])
        row = {
            "case": case,
            "model": name,
            "seconds_per_step": round(seconds, 6),
            "tokens_per_second": round(batch / seconds, 1),
            "copy_gb_per_second": round(copy_rate / 1e9, 1),
            "all_seconds_per_step": [round(value, 6) for value in times[name]],
        }
        if name != "gpt2":
            read = bytes_per_step(model, None if name == "fused" else "text", batch)
            row |= {"megabytes_read": round(read / 1e6, 1), "share_of_copy_rate": round(read / seconds / copy_rate, 3)}
        if "gpt2" in times:
            row["times_gpt2"] = round(statistics.median(times["gpt2"]) / seconds, 2)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["1x128", "1x4096", "8x128", "64x128"], metavar="BxT")
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=64, help="of a turn of MM-Rec (default 64: one write of the slots)"
    )
    parser.add_argument("--peer_steps", type=int, default=8, help="of a turn of GPT-2 (default 8)")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    models: dict[str, Any] = {}
    for name in options.models:
        if name == "gpt2":
            models[name] = gpt2_110m(POSITIONS).to(torch.bfloat16).eval()
        else:
            models[name] = models["bf16"] if name == "fused" and "bf16" in models else mm_rec_model(name)
    settings = {
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "features": [name for name, there in torch.cpu.get_capabilities().items() if there is True],
        "torch": torch.__version__,
        "ops": str(ops.status()["cpu"]).split(", ")[0],
    }
    if "gpt2" in models:
        import transformers

        settings["transformers"] = transformers.__version__
    rows = []
    for case in options.cases:
        rows += measure(case, models, options.rounds, options.steps, options.peer_steps)
        for row in rows[-len(models) :]:
            share = f"{row['share_of_copy_rate']:4.0%} of the copy rate" if "share_of_copy_rate" in row else ""
            ratio = f"{row['times_gpt2']:6.2f}x gpt2" if "times_gpt2" in row else ""
            print(
                f"{case:>7} {row['model']:5} {1e3 * row['seconds_per_step']:8.2f} ms a step"
                f" {row['tokens_per_second']:8,.0f} tokens/s {ratio} {share}",
                flush=True,
            )
        options.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
