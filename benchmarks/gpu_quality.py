"""Loss per token and per minute on a GPU: the `100m` preset against a GPT of 110M.

Both get the same data, tokenizer, optimizer and number of tokens, and each the best of several learning rates and sizes
of a step; what counts is bits per byte on held-out documents, as training goes on and at its end. MM-Rec trains as the
product does in stage 1, each micro-batch of one domain, one or more of them a step; the GPT (12 blocks of 768, see
mm_rec.bench.peers) reads both domains in every micro-batch, through torch.compile and PyTorch's flash attention.

    python -m benchmarks.gpu_quality prepare --corpora DIR --data TOKENS     # once, on any machine
    python -m benchmarks.gpu_quality train --data TOKENS --model mm-rec --rates 1e-3 2e-3 --result one.json
    python -m benchmarks.gpu_quality train --data TOKENS --model gpt --rates 5e-4 1e-3 --result two.json
    python -m benchmarks.gpu_quality join one.json two.json                  # into one result and its picture

Minutes are those of training steps; compilation, capture and evaluation stand beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.gpu_ops import machine
from benchmarks.quality import CLIP, CONTEXT, DOMAINS, WEIGHT_DECAY, Data, prepare, sliding_windows
from mm_rec.bench.peers import ModernGPT
from mm_rec.config import ModelConfig
from mm_rec.data.batches import Batch, Batches
from mm_rec.data.pack import TokenStore
from mm_rec.data.prefetch import Feed
from mm_rec.evaluation import bits_per_byte as evaluation
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.state import ModelState
from mm_rec.training.cuda_graphs import GraphedPass
from mm_rec.training.schedule import betas, learning_rate

RESULT = Path(__file__).parent / "results" / "gpu_quality.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "gpu_quality.png"
VOCABULARY = 32_000
ROWS, TOKENS = 32, 16_000_000
SCORES = 8  # on the way, at shares of the tokens that grow by the square
SCORED_AT_ONCE = 64  # windows of the GPT
COLOURS = {"mm-rec": "#1f6fb4", "gpt": "#8c564b"}


class Contestant(ABC):
    """A model on the GPU, in bf16 with float32 masters in our AdamW."""

    mixed: bool
    model: nn.Module
    optimizer: AdamW

    @abstractmethod
    def learn(self, batch: Batch) -> Tensor:
        """Forward and backward of a micro-batch; returns its loss."""

    @abstractmethod
    def bits_per_byte(self, domain: str, store: TokenStore) -> float:
        """Over whole documents."""


class MMRec(Contestant):
    """The `100m` preset as the product trains it in stage 1."""

    mixed = False

    def __init__(self, vocabulary: int, accumulation: int) -> None:
        self.model: MMRecModel = MMRecModel(ModelConfig.preset("100m", vocab_size=vocabulary)).cuda()
        apply_precision(self.model, "bf16")
        self._graphs = GraphedPass(self._loss, list(self.model.parameters()), accumulation)

    def _loss(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        output, after = self.model(
            batch.tokens, state, batch.domain, batch.reset, targets=batch.targets, weight=batch.weight
        )
        return output.loss, after

    def learn(self, batch: Batch) -> Tensor:
        return self._graphs(batch, None)[0]

    def bits_per_byte(self, domain: str, store: TokenStore) -> float:
        return evaluation.evaluate(self.model, evaluation.select_documents(store, np.empty(0)), domain).bits_per_byte


class GPT(Contestant):
    """12 blocks of 768, with the initialisation of GPT-2."""

    mixed = True

    def __init__(self, vocabulary: int, accumulation: int) -> None:
        torch.manual_seed(0)
        self._accumulation = accumulation
        self.model = ModernGPT(vocabulary, 768, 12, 12)
        for name, parameter in self.model.named_parameters():
            is_residual = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(24) if is_residual else 0.02)
        self.model.cuda()
        apply_precision(self.model, "bf16")

        @torch.compile(dynamic=False)
        def nll(tokens: Tensor, targets: Tensor) -> Tensor:
            logits = self.model(tokens).flatten(0, 1).float()
            return F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=-1)

        self._nll: Callable[[Tensor, Tensor], Tensor] = nll

    def learn(self, batch: Batch) -> Tensor:
        loss = (self._nll(batch.tokens, batch.targets) * batch.weight.flatten()).sum()
        (loss / self._accumulation).backward()
        return loss.detach()

    @torch.no_grad()
    def bits_per_byte(self, domain: str, store: TokenStore) -> float:
        """Each token is predicted from at least the half context before it (all there is near the start)."""
        rows = [row for index in range(store.n_documents) for row in sliding_windows(store.document(index))]
        empty = torch.stack([torch.zeros(CONTEXT, dtype=torch.int64), torch.full((CONTEXT,), -1)])
        rows += [empty] * (-len(rows) % SCORED_AT_ONCE)
        nats = torch.zeros((), dtype=torch.float64, device="cuda")
        for begin in range(0, len(rows), SCORED_AT_ONCE):
            tokens, targets = torch.stack(rows[begin : begin + SCORED_AT_ONCE]).cuda().unbind(1)
            nats += self._nll(tokens, targets).double().sum()
        return float(nats) / math.log(2) / float(store.n_bytes.sum())


CONTESTANTS = {"mm-rec": MMRec, "gpt": GPT}


def train(name: str, rows: int, accumulation: int, rate: float, data: Data, tokens: int) -> dict[str, Any]:
    """Train one model at one rate for about so many tokens, in steps of so many rows, and score it on the way."""
    start = time.perf_counter()
    contestant = CONTESTANTS[name](data.tokenizer.padded_vocab_size, accumulation)
    per_step = rows * CONTEXT
    optimizer = AdamW(contestant.model.named_parameters(), betas=betas(per_step), weight_decay=WEIGHT_DECAY)
    micro = rows // accumulation
    batches = Batches(data.train, batch_size=micro, seq_len=CONTEXT, seed=0, layout="windows", mixed=contestant.mixed)
    feed = Feed(torch.device("cuda"))
    for index in range(4):  # compile, or capture the graph of each domain; nothing is learned
        contestant.learn(feed.take(batches, index))
        optimizer.zero_grad()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    steps = tokens // per_step
    marks = {round(steps * (i / SCORES) ** 2) for i in range(1, SCORES + 1)}
    curve, losses, seconds = [], [], 0.0
    row = {
        "model": name,
        "rows": rows,
        "accumulation": accumulation,
        "rate": rate,
        "parameters": sum(p.numel() for p in contestant.model.parameters()),
    }
    row |= {"tokens": steps * per_step, "start seconds": begin - start}
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        for index in range((step - 1) * accumulation, step * accumulation):
            losses.append(contestant.learn(feed.take(batches, index)))
            optimizer.accumulate()
            feed.prefetch(batches, index + 1)
        optimizer.step(learning_rate(step, steps, rate), CLIP)
        if step % 20 == 0:
            torch.cuda.synchronize()  # the host must not run ahead without end
        if step in marks:
            torch.cuda.synchronize()
            seconds += time.perf_counter() - begin
            bits = {DOMAINS[d]: contestant.bits_per_byte(d, store) for d, store in data.valid.items()}
            recent = float(torch.stack(losses[-50 * accumulation :]).mean())
            curve.append({"tokens": step * per_step, "seconds": seconds, "loss": recent, "bits_per_byte": bits})
            print(f"{name} {rows}/{accumulation} {rate:g} {json.dumps(curve[-1])}", flush=True)
            begin = time.perf_counter()
    return {**row, "seconds": seconds, "bits_per_byte": curve[-1]["bits_per_byte"], "curve": curve}


def mean(bits: dict[str, float]) -> float:
    """Of the two domains: the one number that chooses among runs."""
    return sum(bits.values()) / len(bits)


class Choice(NamedTuple):
    """The best run of the GPT, and those of MM-Rec over no more tokens, and in no more time."""

    gpt: dict[str, Any]
    same_tokens: dict[str, Any]
    same_minutes: dict[str, Any]


def choose(rows: Sequence[dict[str, Any]]) -> Choice:
    """The runs to compare."""

    def best(model: str, key: str, most: float) -> dict[str, Any]:
        chosen = [row for row in rows if row["model"] == model and row[key] <= most]
        return min(chosen, key=lambda row: mean(row["bits_per_byte"]))

    gpt = best("gpt", "tokens", TOKENS)
    return Choice(gpt, best("mm-rec", "tokens", TOKENS), best("mm-rec", "seconds", gpt["seconds"]))


def draw(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Held-out loss over tokens and over minutes; the runs to compare bold, all others thin."""
    figure = Figure(figsize=(10.4, 4.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    choice = choose(rows)
    labels = zip(choice, ("GPT, 110M", "MM-Rec 100m, the same tokens", "MM-Rec 100m, the same minutes"), strict=True)
    bold = {id(row): label for row, label in labels}
    for axes, key, scale, label in zip(
        panels, ("tokens", "seconds"), (1e6, 60), ("million tokens", "minutes of training"), strict=True
    ):
        for row in rows:
            name = bold.get(id(row))
            axes.plot(
                [point[key] / scale for point in row["curve"]],
                [mean(point["bits_per_byte"]) for point in row["curve"]],
                color=COLOURS[row["model"]],
                linewidth=2.4 if name else 0.7,
                linestyle="--" if row is choice.same_minutes and row is not choice.same_tokens else "-",
                alpha=1 if name else 0.4,
                label=name,
            )
        axes.set_xlabel(label, fontsize=12)
        axes.set_ylim(top=2.2)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("bits per byte, held out", fontsize=12)
    panels[0].legend(fontsize=11)
    figure.savefig(picture)


def show(row: dict[str, Any]) -> None:
    bits = "  ".join(f"{name} {value:.4f}" for name, value in row["bits_per_byte"].items())
    print(
        f"{row['model']:7s}{row['rows']:3d} rows in {row.get('accumulation', 1)}, rate {row['rate']:<7g}"
        f"{row['tokens']:11,} tokens in {row['seconds']:5.1f} s  mean {mean(row['bits_per_byte']):.4f}  {bits}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare")
    one.add_argument("--corpora", type=Path, required=True)
    one.add_argument("--data", type=Path, required=True)
    one = commands.add_parser("train")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--model", choices=CONTESTANTS, required=True)
    one.add_argument("--rates", type=float, nargs="+", required=True)
    one.add_argument("--rows", type=int, default=ROWS, help="of 512 tokens in a step")
    one.add_argument("--accumulation", type=int, default=1, help="micro-batches that share the rows of a step")
    one.add_argument("--tokens", type=int, default=TOKENS)
    one.add_argument("--result", type=Path, required=True)
    one.add_argument("--commit", help="of the code measured, where git does not know")
    one = commands.add_parser("join")
    one.add_argument("results", type=Path, nargs="+")
    one.add_argument("--output", type=Path, default=RESULT)
    one.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.corpora, options.data, VOCABULARY, 1)
    elif options.command == "train":
        evaluation.TOKENS_PER_BATCH, evaluation.CHUNK = 2**18, 2048  # of a GPU, for speed; the same result
        data = prepare(Path(), options.data)
        sizes = {DOMAINS[d]: [int(store.n_tokens), int(store.n_bytes.sum())] for d, store in data.train.items()}
        found: dict[str, Any] = {
            "machine": machine(options.commit),
            "context": CONTEXT,
            "data": sizes,
            "runs": [],
        }
        for rate in options.rates:
            found["runs"].append(train(options.model, options.rows, options.accumulation, rate, data, options.tokens))
            options.result.write_text(json.dumps(found, indent=1) + "\n")
            torch.cuda.empty_cache()
    else:
        parts = [json.loads(path.read_text()) for path in options.results]
        rows = [{"commit": part["machine"]["commit"], **row} for part in parts for row in part["runs"]]
        options.output.write_text(json.dumps({**parts[0], "runs": rows}, indent=1) + "\n")
        draw(rows, options.picture)
        for row in sorted(rows, key=lambda row: mean(row["bits_per_byte"])):
            show(row)
        print("to compare:")
        for row in choose(rows):
            show(row)


if __name__ == "__main__":
    main()
