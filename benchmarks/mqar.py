"""Multi-query associative recall (MQAR, arXiv 2312.04927) from scratch: rows, runs, accuracy by distance.

A row of T tokens begins with K pairs of a key and a value. After them each key comes once more, at a random place, and
its value is to be predicted at that place. All other places are filler. The loss counts the questions alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_rec.bench.peers import ModernGPT
from mm_rec.config import ModelConfig
from mm_rec.data.batches import Batch
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.state import ModelState
from mm_rec.training.cuda_graphs import GraphedPass, run_pass
from mm_rec.training.schedule import betas

HEAD_DIM, BLOCKS, DOMAIN = 64, 4, "text"
FLOOR = 0.05  # share of the peak rate at which the schedule ends
CLIP = 1.0
CHECK_EVERY = 50  # steps between two looks at the accuracy
TEST_ROWS, TEST_SEED = 1024, 2**31  # the CPU's generator takes 32 bits of a seed
FILLERS = ("values", "others")


@dataclass(frozen=True)
class Task:
    """What is to be recalled, and the size of the model that learns it.

    Attributes:
        tokens: T, of a row.
        pairs: K.
        filler: ``values`` fills with random values, those of the pairs among them, ``others`` with random keys and
            values that are not among the row's pairs.
        width: D of the model.
        rows: of a step.
        steps: of the schedule.
        bar: accuracy at every distance at which a run stops.
        precision: of the matrices.
        vocabulary: V; the first half are keys, the second values.
    """

    tokens: int
    pairs: int
    filler: str
    width: int
    rows: int
    steps: int
    bar: float
    precision: str = "fp32"
    vocabulary: int = 8192

    def edges(self) -> list[int]:
        """Bounds of the ranges of distance: 0, 64, 128, 256, ... up to T.

        >>> Task(512, 32, "values", 128, 64, 4000, 0.99).edges()
        [0, 64, 128, 256, 512]
        """
        edges = [0, min(64, self.tokens)]
        while edges[-1] < self.tokens:
            edges.append(min(2 * edges[-1], self.tokens))
        return edges


@dataclass(frozen=True)
class Rows:
    """Rows of MQAR: tokens (B, T); of each pair the place of its question, its value and its distance, (B, K)."""

    tokens: Tensor
    where: Tensor
    values: Tensor
    distance: Tensor

    def batches(self, rows: int) -> list[Batch]:
        """The rows as a trainer takes them, so many at once, with weight at the questions alone."""
        targets = torch.zeros_like(self.tokens).scatter_(1, self.where, self.values)
        weights = torch.zeros(self.tokens.shape, device=self.tokens.device)
        weights.scatter_(1, self.where, 1 / (rows * self.where.shape[1]))
        resets = torch.zeros_like(self.tokens, dtype=torch.bool)
        resets[:, 0] = True
        parts = zip(*(whole.split(rows) for whole in (self.tokens, targets, weights, resets)), strict=True)
        return [Batch(token, target, weight, reset, DOMAIN) for token, target, weight, reset in parts]


def make_rows(task: Task, rows: int, seed: int, device: torch.device) -> Rows:
    """Returns so many rows; the same seed on the same kind of device gives the same ones."""
    generator = torch.Generator(device).manual_seed(seed)

    def shuffled(length: int) -> Tensor:
        return torch.rand(rows, length, generator=generator, device=device).argsort(1)

    def below(limit: int) -> Tensor:
        return torch.randint(limit, (rows, task.tokens), generator=generator, device=device)

    pairs, first, half = task.pairs, 2 * task.pairs, task.vocabulary // 2
    keys, values = shuffled(half), half + shuffled(half)
    if task.filler == "values":
        tokens = half + below(half)
    else:
        others = torch.cat([keys[:, pairs:], values[:, pairs:]], dim=1)
        tokens = others.gather(1, below(others.shape[1]))
    keys, values = keys[:, :pairs], values[:, :pairs]
    where = first + shuffled(task.tokens - first)[:, :pairs]
    tokens[:, :first:2], tokens[:, 1:first:2] = keys, values
    tokens.scatter_(1, where, keys)
    return Rows(tokens, where, values, where - torch.arange(0, first, 2, device=device))


class Transformer(ModernGPT):
    """The Transformer of as many blocks, heads and columns, with the initialisation of GPT-2."""

    def __init__(self, task: Task, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(task.vocabulary, task.width, BLOCKS, task.width // HEAD_DIM)
        for name, parameter in self.named_parameters():
            is_residual = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * BLOCKS) if is_residual else 0.02)


def mm_rec(task: Task, seed: int) -> MMRecModel:
    """The model with the settings of the presets and a memory block in every second place."""
    sizes = {"d_model": task.width, "n_heads": task.width // HEAD_DIM, "n_layers": BLOCKS, "d_ff": 4 * task.width}
    changes = {"vocab_size": task.vocabulary, "experts": (DOMAIN,), "gate_every": 2, **sizes}
    return MMRecModel(ModelConfig.preset("100m", **changes), seed=seed)


MODELS: dict[str, Callable[[Task, int], MMRecModel | ModernGPT]] = {"mm-rec": mm_rec, "transformer": Transformer}


def rate_at(step: int, steps: int, peak: float) -> float:
    """Learning rate of step ``step`` (from 1): warm-up over a twentieth, at most 200 steps, then cosine to 5%."""
    warmup = max(1, min(200, steps // 20))
    if step <= warmup:
        return peak * step / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))


class Run:
    """One model that learns a task at one rate, on a CUDA stream of its own, where several share a GPU."""

    def __init__(self, task: Task, name: str, seed: int, rate: float, device: torch.device) -> None:
        self.task, self.seed, self.rate, self.device = task, seed, rate, device
        self.done = 0
        self._batches: list[Batch] = []
        self.met = False
        self.seconds = 0.0
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(self._stream):
            self.curve = torch.zeros(task.steps, 2, device=device)  # loss and accuracy of each step
            self._last = torch.zeros(2, device=device)
            self.model = MODELS[name](task, seed)
            self.model.to(device)
            apply_precision(self.model, task.precision)
            tokens_per_step = task.rows * task.tokens
            self.optimizer = AdamW(self.model.named_parameters(), betas=betas(tokens_per_step))
        self._graphs = GraphedPass(self._loss, list(self.model.parameters()), 1) if self._stream else None

    @property
    def name(self) -> str:
        """Tells the run from others of the same task and model."""
        return f"{self.seed}/{self.rate:g}"

    @property
    def finished(self) -> bool:
        return self.met or self.done == self.task.steps

    def step(self) -> None:
        """One optimizer step; on a GPU it is only launched."""
        with torch.cuda.stream(self._stream):
            turn = self.done % CHECK_EVERY
            if turn == 0:  # rows of many steps at once: launched one by one they would cost more than the step
                rows = make_rows(self.task, CHECK_EVERY * self.task.rows, self.seed * 100_000 + self.done, self.device)
                self._batches = rows.batches(self.task.rows)
            if self._graphs:
                self._graphs(self._batches[turn], None)
            else:
                run_pass(self._loss, self._batches[turn], None, 1)
            self.curve[self.done] = self._last
            self.done += 1
            self.optimizer.step(rate_at(self.done, self.task.steps, self.rate), CLIP)

    def recent(self) -> tuple[float, float]:
        """Mean loss and accuracy of the last steps; waits for them."""
        with torch.cuda.stream(self._stream):
            loss, accuracy = self.curve[max(0, self.done - CHECK_EVERY // 2) : self.done].mean(0).tolist()
        return loss, accuracy

    def look(self) -> str:
        """Measure the accuracy by distance if it may have reached the bar; returns a line that says how it stands."""
        loss, accuracy = self.recent()
        if accuracy >= self.task.bar:
            self.met = min(part["accuracy"] for part in self.by_distance() if part["answers"]) >= self.task.bar
        return f"{self.name:>8s} step {self.done:5d}  loss {loss:6.3f}  accuracy {accuracy:6.1%}"

    @torch.no_grad()
    def by_distance(self) -> list[dict[str, Any]]:
        """Share of right answers for each range of distance, over rows of which none was learned from."""
        edges = self.task.edges()
        with torch.cuda.stream(self._stream):
            counts = torch.zeros(2, len(edges) - 1, dtype=torch.float64, device=self.device)  # right ones, and all
            inner = torch.tensor(edges[1:-1], device=self.device)
            for index in range(-(-TEST_ROWS // self.task.rows)):
                rows = make_rows(self.task, self.task.rows, TEST_SEED + index, self.device)
                logits = self._logits(rows.tokens, rows.where)
                found = (logits.argmax(-1) == rows.values).double().flatten()
                part = torch.bucketize(rows.distance, inner, right=True).flatten()
                counts[0].index_add_(0, part, found)
                counts[1].index_add_(0, part, torch.ones_like(found))
            right, asked = counts.tolist()
        return [
            {"from": low, "to": high, "accuracy": hits / max(answers, 1.0), "answers": int(answers)}
            for low, high, hits, answers in zip(edges, edges[1:], right, asked, strict=False)
        ]

    def result(self) -> dict[str, Any]:
        """What a result file holds of this run; the curve has the mean of every 20 steps."""
        parts = self.curve[: self.done].split(20)
        curve = [[round(value, 4) for value in part.mean(0).tolist()] for part in parts]
        return {
            "seed": self.seed,
            "rate": self.rate,
            "steps": self.done,
            "met": self.met,
            "seconds": round(self.seconds, 1),
            "by_distance": self.by_distance(),
            "curve of loss and accuracy": curve,
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that a later command needs to go on, by name."""
        optimizer = self.optimizer
        held = {**optimizer.master_tensors(), **optimizer.state_tensors(), "curve": self.curve}
        return {f"{self.name}/{name}": tensor for name, tensor in held.items()}

    def restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Go on where :meth:`tensors` was taken; ``progress`` is that of :meth:`progress`."""
        optimizer, prefix = self.optimizer, f"{self.name}/"
        with torch.cuda.stream(self._stream):
            self.curve.copy_(tensors[prefix + "curve"])
            optimizer.load_master_tensors({name: tensors[prefix + name] for name in optimizer.master_tensors()})
            optimizer.load_state_tensors({name: tensors[prefix + name] for name in optimizer.state_tensors()})
        self.done, self.met, self.seconds = progress["steps"], progress["met"], progress["seconds"]

    def progress(self) -> dict[str, Any]:
        return {"steps": self.done, "met": self.met, "seconds": self.seconds}

    def _logits(self, tokens: Tensor, where: Tensor) -> Tensor:
        """(B, K, V), at the questions alone."""
        if isinstance(self.model, MMRecModel):
            features, _ = self.model.features(tokens, None, DOMAIN)
        else:
            features = self.model.features(tokens)
        asked = features.gather(1, where[:, :, None].expand(-1, -1, features.shape[-1]))
        return F.linear(asked, self.model.embedding.weight).float()

    def _loss(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        where = batch.weight.topk(self.task.pairs, dim=1).indices  # of a known shape, as a graph needs it
        logits, values = self._logits(batch.tokens, where), batch.targets.gather(1, where)
        loss = F.cross_entropy(logits.flatten(0, 1), values.flatten())
        right = (logits.argmax(-1) == values).float().mean()
        self._last.copy_(torch.stack([loss.detach(), right]))
        return loss, ModelState(batch.reset[:, 0].long(), {})


def learn(runs: Sequence[Run], seconds: float, save: Callable[[], None]) -> None:
    """Let all runs of all seeds go on side by side for so long; a seed is done when one of its rates meets the bar.

    Args:
        runs: of one task and model.
        seconds: until when, from now.
        save: called every minute and at the end.
    """
    start = last = saved = time.perf_counter()
    while True:
        learned = {run.seed for run in runs if run.met}
        open_runs = [run for run in runs if not run.finished and run.seed not in learned]
        now = time.perf_counter()
        if not open_runs or now - start > seconds:
            break
        if now - saved > 60:
            save()
            saved = last = time.perf_counter()
        for _ in range(CHECK_EVERY):
            for run in open_runs:
                if not run.finished:
                    run.step()
        lines = [run.look() for run in open_runs]
        now, before = time.perf_counter(), last
        last = now
        for run in open_runs:
            run.seconds += (now - before) / len(open_runs)
        if any(run.done % 500 == 0 or run.finished for run in open_runs):
            print("\n".join(lines), f" {now - start:5.0f} s", flush=True)
    save()


def settings(task: Task, name: str) -> dict[str, Any]:
    """What a result says of how it was made."""
    fixed = {"blocks": BLOCKS, "head size": HEAD_DIM, "clip": CLIP, "cosine to": FLOOR}
    return {"model": name, **asdict(task), **fixed}
