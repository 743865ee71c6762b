"""Several GPUs of one host against one, the same steps in turn: speed, memory, and whether the losses agree.

    torchrun --nproc_per_node 2 -m benchmarks.gpu_ranks [--shapes 128x512 64x8192 ...]
    torchrun --nproc_per_node 2 -m benchmarks.gpu_ranks --parallel fsdp [--model large]

Each call puts its rows into the result. A row of `100m` is a batch: rows by tokens, long ones in chunks of 2,048 with
the state carried. All processes share the rows of each micro-batch as training does, with the whole model in each and
passes by CUDA graphs; between their turns the first process alone takes the same steps. With FSDP passes are launched
op by op. `large` is a model of 5.7 billion parameters, whose training state of 114 GB no GPU of 80 GB holds, so there
no single GPU takes a turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.gpu_ops import machine
from mm_rec import processes
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.batches import Batch
from mm_rec.data.prefetch import Feed
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.state import ModelState, detach_state, map_state
from mm_rec.training.cuda_graphs import GraphedPass, run_pass
from mm_rec.training.ddp import ReplicatedAdamW
from mm_rec.training.fsdp import ShardedAdamW, sharded_model
from mm_rec.training.ranks import own_batch
from mm_rec.training.schedule import learning_rate

RESULT = Path(__file__).parent / "results" / "gpu_ranks.json"
CHUNK, TURNS, WARM_UP = 2048, 3, 3  # the first steps of a turn don't count: a GPU that has waited must wake up
LARGE = ModelConfig(vocab_size=32_000, d_model=4096, n_heads=32, n_layers=12, d_ff=16_384)


class Shape(NamedTuple):
    """Of a training step: `rows` of `length` tokens, so many steps in all, and the highest learning rate."""

    config: ModelConfig
    rows: int
    length: int
    steps: int
    rate: float

    @property
    def parts(self) -> int:
        """Micro-batches of a step."""
        return max(1, self.length // CHUNK)


HUNDRED = PRESETS["100m"]
SHAPES = {
    "128x512": Shape(HUNDRED, 128, 512, 60, 1e-3),
    "64x8192": Shape(HUNDRED, 64, 8192, 15, 1e-3),
    "256x512": Shape(HUNDRED, 256, 512, 48, 1e-3),
    "32x2048": Shape(HUNDRED, 32, 2048, 60, 1e-3),
    "16x32768": Shape(HUNDRED, 16, 32_768, 15, 1e-3),
}
LARGE_SHAPE = Shape(LARGE, 16, 512, 60, 1e-4)


class Words:
    """Micro-batches with something to learn: each row repeats a random word of eight tokens."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def micro_batch(self, index: int) -> Batch:
        """Chunk ``index % parts`` of step ``index // parts``."""
        rows, time_, parts = self._shape.rows, self._shape.length // self._shape.parts, self._shape.parts
        generator = torch.Generator().manual_seed(index // parts)
        words = torch.randint(self._shape.config.vocab_size, (rows, 8), generator=generator)
        tokens = words.repeat(1, time_ // 8 + 1)  # a chunk begins where a word does
        reset = torch.zeros(rows, time_, dtype=torch.bool)
        reset[:, 0] = index % parts == 0
        weight = torch.full((rows, time_), 1 / (rows * time_))
        return Batch(tokens[:, :time_].contiguous(), tokens[:, 1 : time_ + 1].contiguous(), weight, reset, "text")


def sharded(config: ModelConfig, drawn_on_gpu: bool) -> tuple[MMRecModel, AdamW]:
    """The part of the model that this process holds, with its first weights; those ``drawn_on_gpu`` are others."""
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


class Contestant:
    """A model in training: on one GPU, or with its rows shared by all as ``parallel`` says."""

    def __init__(self, shape: Shape, parallel: str | None) -> None:
        self.shape, self.parallel = shape, parallel
        self.losses: list[float] = []
        self._times: list[float] = []
        self._peak = 0
        self._feed = Feed(torch.device("cuda"), own_batch if parallel else lambda batch: batch)
        self._source = Words(shape)
        self._pass: Callable[[Batch, ModelState | None], tuple[Tensor, ModelState]]
        if parallel == "fsdp":
            self.model, self.optimizer = sharded(shape.config, shape is LARGE_SHAPE)
            self._pass = partial(run_pass, self._loss, parts=shape.parts)
            return
        self.model = MMRecModel(shape.config).cuda()
        apply_precision(self.model, "bf16")
        self.optimizer = (ReplicatedAdamW if parallel else AdamW)(self.model.named_parameters())
        self._pass = GraphedPass(self._loss, list(self.model.parameters()), shape.parts)

    def _loss(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        output, after = self.model(
            batch.tokens, state, batch.domain, batch.reset, targets=batch.targets, weight=batch.weight
        )
        return output.loss, detach_state(after)

    def take_turn(self) -> None:
        """Take a part of the steps, and the time of each."""
        first, seen = len(self.losses), [time.perf_counter()]
        for step in range(first, first + self.shape.steps // TURNS):
            self.losses.append(self._step(step))
            seen.append(time.perf_counter())
        torch.cuda.synchronize()
        self._times += [after - before for before, after in pairwise(seen)][WARM_UP:]
        self._peak = self._peak or torch.cuda.max_memory_allocated()

    def _step(self, step: int) -> float:
        """As training takes it: its numbers are seen before the update, which the next pass follows at once."""
        parts, losses = self.shape.parts, []
        state: ModelState | None = None
        for index in range(step * parts, (step + 1) * parts):
            batch = self._feed.take(self._source, index)
            if parts > 1 and state is None:
                state = self.model.initial_state(len(batch.tokens), batch.domain)
            loss, after = self._pass(batch, state)
            self.optimizer.accumulate()
            state = map_state(after, torch.clone) if parts > 1 else None
            losses.append(loss)
        loss = torch.stack(losses).mean()
        numbers = torch.stack([processes.all_mean_(loss) if self.parallel else loss, self.optimizer.gradient_norm()])
        self._feed.prefetch(self._source, (step + 1) * parts)
        seen = float(numbers[0])
        self.optimizer.step(learning_rate(step + 1, self.shape.steps, self.shape.rate), 1.0)
        return seen

    def row(self) -> dict[str, Any]:
        """What was found. All processes ask for it; the last of them had no other model in its memory."""
        seconds, tokens = statistics.median(self._times), self.shape.rows * self.shape.length
        last = not self.parallel or dist.get_rank() == processes.world_size() - 1
        return {
            "model": "large" if self.shape is LARGE_SHAPE else "100m",
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "ranks": processes.world_size() if self.parallel else 1,
            "parallel": self.parallel,
            "rows": self.shape.rows,
            "length": self.shape.length,
            "ms": seconds * 1e3,
            "tokens/s": tokens / seconds,
            "peak GB": (processes.all_max(self._peak * last) if self.parallel else self._peak) / 1e9,
            "losses": self.losses,
        }


def measure(shape: Shape, parallel: str) -> list[dict[str, Any]]:
    """The rows of one GPU, where the model fits on one, and of all."""
    one = Contestant(shape, None) if processes.is_rank_zero() and shape is not LARGE_SHAPE else None
    several: Contestant | None = None
    for _ in range(TURNS):
        if one is not None:
            one.take_turn()
        processes.all_max(0)  # the others wait
        several = several or Contestant(shape, parallel)
        several.take_turn()
    assert several is not None
    rows = [several.row()]
    if one is not None:
        rows = [one.row(), *rows]
        rows[1]["times one"] = rows[0]["ms"] / rows[1]["ms"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--model", choices=("100m", "large"), default="100m")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="rows x tokens, of 100m")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--commit", help="of the code measured, where git does not know")
    arguments = parser.parse_args()
    shapes = [LARGE_SHAPE] if arguments.model == "large" else [SHAPES[name] for name in arguments.shapes]
    with processes.process_group("cuda"):
        for shape in shapes:
            rows = measure(shape, arguments.parallel)
            if processes.is_rank_zero():
                record(rows, arguments)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def record(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Put rows in the place of those of the same kind."""
    kind = ("model", "ranks", "parallel", "rows", "length")
    new = [[row[key] for key in kind] for row in rows]
    rows = [row | {"commit": machine(arguments.commit)["commit"]} for row in rows]
    before = json.loads(arguments.result.read_text())["rows"] if arguments.result.exists() else []
    rows_now = [*(one for one in before if [one[key] for key in kind] not in new), *rows]
    arguments.result.write_text(json.dumps({"machine": machine(arguments.commit), "rows": rows_now}, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['model']} {row['rows']}x{row['length']}, {row['ranks']} GPU(s): {row['ms']:.1f} ms a step, "
            f"{row['tokens/s']:,.0f} tokens/s, {row['peak GB']:.1f} GB, last loss {row['losses'][-1]:.4f}, "
            f"{row.get('times one', 1):.3f} times one",
            flush=True,
        )


if __name__ == "__main__":
    main()
