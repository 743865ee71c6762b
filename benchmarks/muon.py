"""What Muon's update costs beside AdamW's, by the tokens of a step.

    python -m benchmarks.muon --presets small 100m --shapes 2x512 4x512 8x512 16x512

Two models of each preset, one with either optimizer, take steps of random tokens in turn, one expert as in stage 1; the
medians count. ``price`` is how much longer a step with Muon takes; ``price_in_operations`` what it would be if all
products ran at one rate and nothing else took time, which no other work on the machine changes. With ``--products`` it
also times the polar factor of one matrix of each shape of the `100m` preset. Seconds are the clock's or, with one
thread, those of the processor, which other work on the machine changes less. What the update gains is measured by
`benchmarks.quality`, with ``--steps`` and ``--optimizers``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mm_rec import ops
from mm_rec.bench.machine import describe_machine
from mm_rec.config import PRESETS
from mm_rec.machine.device import apply_precision, select_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW, Muon, is_orthogonalized
from mm_rec.training.schedule import OPTIMIZERS, betas, muon_rate_factor

RESULT = Path(__file__).parent / "results" / "muon.json"
MATRICES = ((512, 512), (1536, 512), (1664, 512), (2048, 512), (512, 2048))


def clock() -> float:
    """Seconds, of the processor where there is one thread."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Contestant(NamedTuple):
    """A model and its optimizer."""

    model: MMRecModel
    optimizer: AdamW

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """One step; returns the seconds of its pass and of its update."""
        start = clock()
        output, _ = self.model(ids, None, self.model.config.experts[0], targets=ids)
        output.loss.backward()
        middle = clock()
        self.optimizer.step(1e-4, 1.0)
        return middle - start, clock() - middle


def price_in_operations(preset: str, tokens: int) -> float:
    """Operations of the polar factors of one expert over those of a step's pass."""
    config = PRESETS[preset]
    with torch.device("meta"):
        named = dict(MMRecModel(config).named_parameters())
    of_expert = {name: one for name, one in named.items() if name.startswith(f"experts.{config.experts[0]}.")}
    weights = named["embedding.weight"].numel() + sum(one.numel() for one in of_expert.values() if one.ndim == 2)
    update = 0
    for name, one in of_expert.items():
        if is_orthogonalized(name):
            n, m = sorted(one.shape)
            update += 2 * n * n * (3 * m + 5 * n)  # four steps, two at a time; symmetric products count half
    return update / (6 * weights * tokens)


def measure(preset: str, shape: str, precision: str, rounds: int) -> dict[str, Any]:
    """Steps of both optimizers in turn."""
    batch, length = (int(part) for part in shape.split("x"))
    contestants = {}
    for name in OPTIMIZERS:
        model = MMRecModel(PRESETS[preset])
        apply_precision(model, precision)
        muon = Muon(muon_rate_factor(batch * length)) if name == "muon" else None
        contestants[name] = Contestant(model, AdamW(model.named_parameters(), betas=betas(batch * length), muon=muon))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(PRESETS[preset].vocab_size, (batch, length), generator=generator)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            times[name].append(contestant.step(ids))
    # A pass is the same whatever the optimizer, so all count; the first round only warms up.
    passes = statistics.median(seconds for of_one in times.values() for seconds, _ in of_one[1:])
    updates = {name: statistics.median(update for _, update in of_one[1:]) for name, of_one in times.items()}
    row: dict[str, Any] = {"preset": preset, "batch": batch, "length": length, "tokens": batch * length}
    row |= {"rounds": rounds, "pass_seconds": round(passes, 5)}
    for name, seconds in updates.items():
        row[name] = {"update_seconds": round(seconds, 5), "share_of_step": round(seconds / (passes + seconds), 4)}
    row["price_in_operations"] = round(price_in_operations(preset, batch * length), 4)
    row["price"] = round((updates["muon"] - updates["adamw"]) / (passes + updates["adamw"]), 4)
    return row


def measure_matrices(rounds: int) -> list[dict[str, Any]]:
    """The polar factor of one matrix in bfloat16, beside as many products as five plain iterations have."""
    rows = []
    for shape in MATRICES:
        x = torch.randn(shape).bfloat16()
        short, long = min(shape), max(shape)
        wide, gram = torch.randn(short, long).bfloat16(), torch.randn(short, short).bfloat16()
        out, small = torch.empty(short, long, dtype=torch.bfloat16), torch.empty_like(gram)
        ours, plain = [], []
        for _ in range(rounds + 1):
            start = clock()
            ops.orthogonalize_([x.clone()])
            ours.append(clock() - start)
            start = clock()
            for _ in range(5):
                ops.matmul(wide, wide.t(), small)
                ops.matmul(gram, gram, small)
                ops.matmul(gram, wide, out)
            plain.append(clock() - start)
        seconds, usual = (statistics.median(values[1:]) for values in (ours, plain))
        rows.append({"shape": list(shape), "seconds": round(seconds, 6), "plain_products_seconds": round(usual, 6)})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=tuple(PRESETS), default=["small", "100m"])
    parser.add_argument("--shapes", nargs="+", default=["2x512", "4x512", "8x512", "16x512"], metavar="BxT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--products", action="store_true", help="also time single matrices")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    precision = select_precision(options.precision, torch.device("cpu"))
    machine = describe_machine() | {"precision": precision, "threads": options.threads}
    result: dict[str, Any] = {"settings": machine, "rows": []}
    if options.products:
        result["matrices"] = measure_matrices(options.rounds)
        for row in result["matrices"]:
            print(f"{row['shape']} {1e3 * row['seconds']:8.2f} ms, plain {1e3 * row['plain_products_seconds']:8.2f} ms")
    for preset in options.presets:
        for shape in options.shapes:
            result["rows"].append(row := measure(preset, shape, precision, options.rounds))
            print(
                f"{preset:6} {shape:>7} pass {row['pass_seconds']:.4f} s, AdamW {row['adamw']['update_seconds']:.4f} s"
                f", Muon {row['muon']['update_seconds']:.4f} s, price {row['price']:.1%}",
                flush=True,
            )
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
