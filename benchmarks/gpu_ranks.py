"""Several GPUs of one host against one, the same steps of 65,536 tokens: speed, memory, and whether the losses agree.

    torchrun --nproc_per_node 1 -m benchmarks.gpu_ranks
    torchrun --nproc_per_node 2 -m benchmarks.gpu_ranks --parallel ddp
    torchrun --nproc_per_node 2 -m benchmarks.gpu_ranks --parallel fsdp [--model large]

Each call adds its row to the result. The processes share the rows of `100m` at 128 x 512 as training does: with DDP by
CUDA graphs, with FSDP op by op. `large` is a model of 5.7 billion parameters, whose training state of 114 GB no GPU
of 80 GB holds; it reads 16 x 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from benchmarks.gpu_ops import machine
from mm_rec import distributed
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.batches import Batch
from mm_rec.data.feed import Feed
from mm_rec.device import apply_precision
from mm_rec.graphs import GraphedPass, LossFunction, run_pass
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.replicas import averaged
from mm_rec.sharding import ShardedAdamW, sharded_model
from mm_rec.stages import learning_rate

RESULT = Path(__file__).parent / "results" / "gpu_ranks.json"
LENGTH, STEPS, WARM_UP = 512, 60, 10
LARGE = ModelConfig(vocab_size=32_000, d_model=4096, n_heads=32, n_layers=12, d_ff=16_384)
MODELS = {"100m": (PRESETS["100m"], 128, 1e-3), "large": (LARGE, 16, 1e-4)}


class Words:
    """Micro-batches with something to learn: each row repeats a random word of eight tokens."""

    def __init__(self, vocabulary: int, rows: int) -> None:
        self._vocabulary, self._rows = vocabulary, rows

    def micro_batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(self._vocabulary, (self._rows, 8), generator=generator)
        tokens = words.repeat(1, LENGTH // 8 + 1)
        reset = torch.zeros(self._rows, LENGTH, dtype=torch.bool)
        reset[:, 0] = True
        weight = torch.full((self._rows, LENGTH), 1 / (self._rows * LENGTH))
        return Batch(tokens[:, :LENGTH].contiguous(), tokens[:, 1 : LENGTH + 1].contiguous(), weight, reset, "text")


def make(config: ModelConfig, sharded: bool, drawn_on_gpu: bool) -> tuple[MMRecModel, AdamW]:
    """The model with its first weights, and its optimizer; those ``drawn_on_gpu`` differ from all others."""
    if not sharded:
        model = MMRecModel(config).cuda()
        apply_precision(model, "bf16")
        return model, AdamW(model.named_parameters())
    model = sharded_model(config, "bf16", torch.device("cuda"))
    if drawn_on_gpu:
        torch.manual_seed(0)  # what every process holds whole has to be the same in all
        with torch.no_grad():
            for parameter in model.parameters():
                (parameter.to_local() if isinstance(parameter, DTensor) else parameter).normal_(0, 0.01)
    optimizer = ShardedAdamW(model.named_parameters())
    if not drawn_on_gpu:
        optimizer.load_master_tensors({name: p.detach() for name, p in MMRecModel(config).named_parameters()})
    return model, optimizer


def measure(name: str, parallel: str) -> dict[str, Any]:
    config, rows, rate = MODELS[name]
    sharded = parallel == "fsdp"
    model, optimizer = make(config, sharded, name == "large")
    loss_of: LossFunction = averaged(model, sharded=sharded)
    feed, source = Feed(torch.device("cuda"), distributed.own_batch), Words(config.vocab_size, rows)
    graphed = None if sharded else GraphedPass(loss_of, list(model.parameters()), 1)
    losses, times = [], []
    for step in range(STEPS):
        batch = feed.take(source, step)
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss, _ = graphed(batch, None) if graphed else run_pass(loss_of, batch, None, 1)
        optimizer.step(learning_rate(step + 1, STEPS, rate), 1.0)
        feed.prefetch(source, step + 1)
        losses.append(float(distributed.mean_(loss.detach().clone())))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[WARM_UP:])
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ranks": distributed.size(),
        "parallel": parallel,
        "ms": seconds * 1e3,
        "tokens/s": rows * LENGTH / seconds,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--model", choices=MODELS, default="100m")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--commit", help="of the code measured, where git does not know")
    arguments = parser.parse_args()
    with distributed.joined("cuda"):
        row = measure(arguments.model, arguments.parallel)
        if not distributed.is_first():
            return
    before = json.loads(arguments.result.read_text())["rows"] if arguments.result.exists() else []
    same = ("model", "ranks", "parallel")
    rows = [*(one for one in before if any(one[key] != row[key] for key in same)), row]
    arguments.result.write_text(json.dumps({"machine": machine(arguments.commit), "rows": rows}, indent=1) + "\n")
    print(
        f"{row['model']}, {row['ranks']} GPUs, {row['parallel']}: {row['ms']:.1f} ms a step, "
        f"{row['tokens/s']:,.0f} tokens/s, {row['peak GB']:.1f} GB, last loss {row['losses'][-1]:.4f}"
    )


if __name__ == "__main__":
    main()
