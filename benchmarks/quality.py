"""Loss per minute against a Transformer: the `small` preset and a GPT-2 of about the same size.

Both get the same data, tokenizer, batch and number of CPU minutes, and each the best of several learning rates;
runs alternate. What counts is bits per byte on held-out documents.

    python -m benchmarks.quality --corpora DIR
    python -m benchmarks.quality --corpora DIR --batch_size 8 --steps 366 --rates_gpt2 --optimizers adamw muon

With ``--steps`` every run takes as many steps, so that optimizers are compared at equal tokens whatever else the
machine has to do.

Runs on other cores of one machine may go side by side, one learning rate a call; rows of several results can be put
into one file (``--picture RESULT`` draws such a file alone). DIR holds ``books`` and ``code`` as ``NAME.train.jsonl``
and ``NAME.valid.jsonl`` (any format that mm_rec.data reads), one document a line. Needs `transformers`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from mm_rec.config import ModelConfig
from mm_rec.data.batches import Batch, Batches
from mm_rec.data.files import BadRows, read_texts
from mm_rec.data.pack import Document, TokenStore, write_store
from mm_rec.evaluation.bits_per_byte import evaluate, select_documents
from mm_rec.machine.device import apply_precision, select_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW, Muon
from mm_rec.text.tokenizer import Tokenizer, train_tokenizer
from mm_rec.training.schedule import OPTIMIZERS, betas, learning_rate, muon_rate_factor

RESULT = Path(__file__).parent / "results" / "quality.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "quality.png"
DOMAINS = {"text": "books", "code": "code"}
VOCABULARY = 8192
TOKENIZER_BYTES = 6_000_000  # of each domain
CONTEXT = 512
SCORED_AT_ONCE = 2  # windows; more are slower, their logits leave the cache
VALID_STRIDE = 3  # every third held-out document is scored
WEIGHT_DECAY, CLIP = 0.1, 1.0
CURVE_POINTS = 60
LABELS = {"small": "MM-Rec small", "gpt2": "GPT-2"}
COLOURS = {"small": "#1f6fb4", "gpt2": "#d9730d"}


class Data(NamedTuple):
    tokenizer: Tokenizer
    train: dict[str, TokenStore]
    valid: dict[str, TokenStore]


def prepare(corpora: Path, folder: Path, vocabulary: int = VOCABULARY, valid_stride: int = VALID_STRIDE) -> Data:
    """Train the tokenizer on the training documents and pack both splits, or open what an earlier call packed."""
    if (folder / "tokenizer").exists():
        opened = [{d: TokenStore.open(folder / f"{d}.{split}") for d in DOMAINS} for split in ("train", "valid")]
        return Data(Tokenizer.load(folder / "tokenizer"), *opened)

    def texts(domain: str, split: str) -> Iterator[str]:
        (path,) = corpora.glob(f"{DOMAINS[domain]}.{split}.jsonl*")
        yield from read_texts(path, BadRows())

    def tokenizer_sample() -> Iterator[str]:
        for domain in DOMAINS:
            left = TOKENIZER_BYTES
            for text in texts(domain, "train"):
                yield text[:left]
                left -= min(len(text), left)
                if not left:
                    break

    tokenizer = train_tokenizer(tokenizer_sample(), vocabulary)

    def store(domain: str, split: str) -> TokenStore:
        kept = itertools.islice(texts(domain, split), None, None, valid_stride if split == "valid" else 1)
        documents = (Document([tokenizer.bos_id, *tokenizer.encode(text)], len(text.encode())) for text in kept)
        return write_store(folder / f"{domain}.{split}", documents, vocab_size=tokenizer.vocab_size)

    train, valid = ({domain: store(domain, split) for domain in DOMAINS} for split in ("train", "valid"))
    tokenizer.save(folder / "tokenizer")
    return Data(tokenizer, train, valid)


class Contestant(ABC):
    """A model with its optimizer."""

    model: nn.Module

    @abstractmethod
    def learn(self, batch: Batch, rate: float) -> Tensor:
        """One optimizer step; returns the loss."""

    @abstractmethod
    def bits_per_byte(self, domain: str, store: TokenStore) -> float:
        """Over whole documents."""


class MMRec(Contestant):
    """The `small` preset as the product trains it in stage 1."""

    def __init__(self, vocabulary: int, precision: str, per_step: int, optimizer: str) -> None:
        self.model: MMRecModel = MMRecModel(ModelConfig.preset("small", vocab_size=vocabulary))
        apply_precision(self.model, precision)
        muon = Muon(muon_rate_factor(per_step)) if optimizer == "muon" else None
        parameters = self.model.named_parameters()
        self.optimizer = AdamW(parameters, betas=betas(per_step), weight_decay=WEIGHT_DECAY, muon=muon)

    def learn(self, batch: Batch, rate: float) -> Tensor:
        output, _ = self.model(
            batch.tokens, None, batch.domain, batch.reset, targets=batch.targets, weight=batch.weight
        )
        output.loss.backward()
        self.optimizer.step(rate, CLIP)
        loss: Tensor = output.loss.detach()
        return loss

    def bits_per_byte(self, domain: str, store: TokenStore) -> float:
        documents = select_documents(store, np.empty(0))
        return evaluate(self.model, documents, domain).bits_per_byte


class GPT2(Contestant):
    """GPT-2 of transformers: six layers of 384, the shape that this size is usually given."""

    def __init__(self, vocabulary: int, precision: str, per_step: int, optimizer: str) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        shape = {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": CONTEXT}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, use_cache=False, **shape, **dropout))
        self.autocast = precision == "bf16"
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=betas(per_step), fused=True)

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits: Tensor = self.model(tokens).logits
        return logits.float()

    def learn(self, batch: Batch, rate: float) -> Tensor:
        logits = self.logits(batch.tokens)
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        loss = (nll * batch.weight.flatten()).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.inference_mode()
    def bits_per_byte(self, domain: str, store: TokenStore) -> float:
        """Each token is predicted from at least the half context before it (all there is near the start)."""
        rows = [row for index in range(store.n_documents) for row in sliding_windows(store.document(index))]
        nats = 0.0
        for begin in range(0, len(rows), SCORED_AT_ONCE):
            tokens, targets = torch.stack(rows[begin : begin + SCORED_AT_ONCE]).unbind(1)
            counted = targets >= 0
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                logits = self.model.lm_head(self.model.transformer(tokens).last_hidden_state[counted])
            nats += float(F.cross_entropy(logits.float(), targets[counted], reduction="sum"))
        return nats / math.log(2) / float(store.n_bytes.sum())


def sliding_windows(document: NDArray[Any]) -> Iterator[Tensor]:
    """(2, context) inputs and targets, every half context; -1 for targets of an earlier window and filling."""
    ids = torch.from_numpy(document.astype(np.int64))
    scored = 0
    while scored < len(ids) - 1:
        start = max(0, scored - CONTEXT // 2)
        window = ids[start : start + CONTEXT + 1]
        row = torch.zeros(2, CONTEXT, dtype=torch.int64)
        row[0, : len(window) - 1] = window[:-1]
        row[1] = -1
        row[1, scored - start : len(window) - 1] = window[1 + scored - start :]
        yield row
        scored = start + len(window) - 1


CONTESTANTS = {"small": MMRec, "gpt2": GPT2}


def train_and_score(
    name: str,
    optimizer: str,
    rate: float,
    data: Data,
    batch_size: int,
    cpu_seconds: float,
    most_steps: int | None,
    precision: str,
) -> dict[str, Any]:
    """Train one model for ``cpu_seconds`` of processor time, or for so many steps, then score it."""
    contestant = CONTESTANTS[name](data.tokenizer.padded_vocab_size, precision, batch_size * CONTEXT, optimizer)
    batches = Batches(data.train, batch_size=batch_size, seq_len=CONTEXT, seed=0, layout="windows")
    bits_of_a_nat = sum(map(len, (one.tokens for one in data.train.values()))) / math.log(2)
    bits_of_a_nat /= sum(int(one.n_bytes.sum()) for one in data.train.values())
    steps, used, losses = 0, 0.0, []
    curve: list[tuple[float, int, float]] = []  # CPU seconds, tokens, training loss since the point before
    drawn = 0
    wall = time.perf_counter()
    start = time.process_time()
    done = 0.0
    while done < 1:
        share = int(done * 10_000) + 1  # the schedule follows the clock, or the number of steps if there is one
        losses.append(contestant.learn(batches.micro_batch(steps), learning_rate(share, 10_000, rate)))
        steps += 1
        used = time.process_time() - start
        done = steps / most_steps if most_steps else used / cpu_seconds
        if done >= (len(curve) + 1) / CURVE_POINTS:
            bits = float(torch.stack(losses[drawn:]).mean()) * bits_of_a_nat
            curve.append((round(used, 1), steps * batch_size * CONTEXT, round(bits, 4)))
            drawn = len(losses)
        if steps % 100 == 0:
            recent = torch.stack(losses[-50:]).mean()
            print(f"  {name} {optimizer} {rate:g} step {steps:5d} loss {recent:.3f} {used:6.0f} CPU s", flush=True)
    wall = time.perf_counter() - wall
    scores = {DOMAINS[d]: round(contestant.bits_per_byte(d, store), 4) for d, store in data.valid.items()}
    return {
        "model": name,
        "optimizer": optimizer,
        "parameters": sum(p.numel() for p in contestant.model.parameters()),
        "learning_rate": rate,
        "steps": steps,
        "tokens": steps * batch_size * CONTEXT,
        "cpu_seconds": round(used, 1),
        "wall_seconds": round(wall, 1),
        "final_loss": round(float(torch.stack(losses[-50:]).mean()), 4),
        "bits_per_byte": scores,
        "curve": curve,
    }


def draw(result: dict[str, Any], picture: Path) -> None:
    """The best run of each model: training loss by minutes and by tokens, with what was reached on held-out text."""
    best: dict[str, dict[str, Any]] = {}
    with_curve = (row for row in result["runs"] if "curve" in row)  # earlier results have none
    for row in sorted(with_curve, key=lambda row: -sum(row["bits_per_byte"].values())):
        best[row["model"]] = row
    figure = Figure(figsize=(9.6, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    by_time, by_tokens = figure.subplots(1, 2, sharey=True)
    for name, row in sorted(best.items(), reverse=True):
        seconds, tokens, bits = np.array(row["curve"]).T
        books, code = row["bits_per_byte"]["books"], row["bits_per_byte"]["code"]
        label = f"{LABELS[name]}, {row['parameters'] / 1e6:.1f}M; held out: {books:.2f} books, {code:.2f} code"
        for axes, values in ((by_time, seconds / 60), (by_tokens, tokens / 1e6)):
            axes.plot(values, bits, color=COLOURS[name], linewidth=2, label=label)
    by_time.set_xlabel("minutes of one CPU core", fontsize=12)
    by_tokens.set_xlabel("million tokens", fontsize=12)
    by_time.set_ylabel("training loss (bits per byte)", fontsize=12)
    for axes in (by_time, by_tokens):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_tokens.legend(fontsize=9.5, loc="upper right")  # where no curve is
    figure.savefig(picture)


def main(argv: list[str] | None = None) -> int:
    """Run all contestants at all rates, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=5.0, help="of all threads together, per run")
    parser.add_argument("--steps", type=int, help="steps of a run, in place of its minutes")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw"], help="of MM-Rec")
    parser.add_argument("--rates_small", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--rates_gpt2", type=float, nargs="*", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument(
        "--prepared", type=Path, metavar="DIR", help="keep tokenizer and tokens there, for another call"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, metavar="RESULT", help="only draw an earlier result")
    options = parser.parse_args(argv)
    if options.picture:
        draw(json.loads(options.picture.read_text()), PICTURE)
        return 0
    if options.corpora is None:
        parser.error("name the folder of --corpora")
    precision = select_precision(options.precision, torch.device("cpu"))
    cpu_seconds = options.minutes * 60 * torch.get_num_threads()
    runs = {("small", optimizer): options.rates_small for optimizer in options.optimizers}
    runs["gpt2", "adamw"] = options.rates_gpt2
    turns = itertools.zip_longest(*([(*run, rate) for rate in rates] for run, rates in runs.items()))
    order = [run for turn in turns for run in turn if run is not None]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(options.corpora, options.prepared or Path(folder))
        for name, optimizer, rate in order:
            rows.append(
                train_and_score(name, optimizer, rate, data, options.batch_size, cpu_seconds, options.steps, precision)
            )
            print(json.dumps(rows[-1]), flush=True)
    settings = {
        "minutes": None if options.steps else options.minutes,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
        "batch": [options.batch_size, CONTEXT],
        "precision": precision,
        "vocabulary": data.tokenizer.vocab_size,
        "held-out bytes": {DOMAINS[d]: int(store.n_bytes.sum()) for d, store in data.valid.items()},
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    result = {"settings": settings, "runs": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    if options.output == RESULT:
        draw(result, PICTURE)
    print(f"\n{'model':6} {'optimizer':9} {'parameters':>11} {'rate':>7} {'tokens':>9} {'books':>7} {'code':>7}")
    for row in sorted(rows, key=lambda row: sum(row["bits_per_byte"].values())):
        bits = row["bits_per_byte"]
        print(
            f"{row['model']:6} {row['optimizer']:9} {row['parameters']:11,} {row['learning_rate']:7g}"
            f" {row['tokens']:9,} {bits['books']:7.4f} {bits['code']:7.4f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
