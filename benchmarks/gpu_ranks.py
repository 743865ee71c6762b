"""Several GPUs of one host against one, the same steps of 65,536 tokens: speed, and whether the losses agree.

    torchrun --nproc_per_node 1 -m benchmarks.gpu_ranks
    torchrun --nproc_per_node 2 -m benchmarks.gpu_ranks [--result benchmarks/results/gpu_ranks.json]

Each call adds its row to the result; the processes share the rows of `100m` at 128 x 512 as training does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_ops import machine
from mm_rec import distributed
from mm_rec.config import PRESETS
from mm_rec.data.batches import Batch
from mm_rec.data.feed import Feed
from mm_rec.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW

RESULT = Path(__file__).parent / "results" / "gpu_ranks.json"
ROWS, LENGTH, STEPS, WARM_UP = 128, 512, 24, 4


class Words:
    """Micro-batches with something to learn: each row repeats a random word of eight tokens."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def micro_batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(self._vocabulary, (ROWS, 8), generator=generator)
        tokens = words.repeat(1, LENGTH // 8 + 1)
        reset = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        reset[:, 0] = True
        weight = torch.full((ROWS, LENGTH), 1 / (ROWS * LENGTH))
        return Batch(tokens[:, :LENGTH].contiguous(), tokens[:, 1 : LENGTH + 1].contiguous(), weight, reset, "text")


def measure() -> dict[str, Any]:
    model = MMRecModel(PRESETS["100m"]).cuda()
    apply_precision(model, "bf16")
    optimizer = AdamW(model.named_parameters())
    loss_of = distributed.averaged(model)
    feed, source = Feed(torch.device("cuda"), distributed.own_batch), Words(model.config.vocab_size)
    losses, times = [], []
    for step in range(STEPS):
        batch = feed.take(source, step)
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss, _ = loss_of(batch, None)
        loss.backward()
        optimizer.step(1e-3, 1.0)
        feed.prefetch(source, step + 1)
        losses.append(float(distributed.mean_(loss.detach().clone())))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[WARM_UP:])
    return {
        "ranks": distributed.size(),
        "ms": seconds * 1e3,
        "tokens/s": ROWS * LENGTH / seconds,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--commit", help="of the code measured, where git does not know")
    arguments = parser.parse_args()
    with distributed.joined("cuda"):
        row = measure()
        if not distributed.is_first():
            return
    before = json.loads(arguments.result.read_text())["rows"] if arguments.result.exists() else []
    rows = [*(one for one in before if one["ranks"] != row["ranks"]), row]
    arguments.result.write_text(json.dumps({"machine": machine(arguments.commit), "rows": rows}, indent=1) + "\n")
    print(f"{row['ranks']} GPUs: {row['ms']:.1f} ms a step, {row['tokens/s']:,.0f} tokens/s, last {row['losses'][-1]}")


if __name__ == "__main__":
    main()
