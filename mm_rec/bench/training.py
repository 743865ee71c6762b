"""Training steps of MM-Rec and of its peers, taken in turn on the same batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_rec.bench.limits import matrix_work, products_action
from mm_rec.bench.peers import ModernGPT, gpt2_110m
from mm_rec.bench.timing import timed
from mm_rec.config import ModelConfig
from mm_rec.data.batches import Batch
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.state import ModelState
from mm_rec.system import keep_freed_memory
from mm_rec.training.cuda_graphs import GraphedPass, run_pass

__all__ = [
    "Contender", "StepTime", "compare_steps", "contenders", "gpt", "gpt2", "mm_rec", "random_batch",
    "tune_threads",
]  # fmt: skip

RATE, CLIP = 1e-4, 1.0


@dataclass
class Contender:
    """A model with its optimizer.

    Attributes:
        label: for tables.
        step: forward, backward, clipping and update on (tokens, targets), both (B, T).
        flop_per_token: six times the parameters that a token meets in matrix products.
        threads: that it runs on.
    """

    label: str
    step: Callable[[Tensor, Tensor], object]
    flop_per_token: float
    threads: int


@dataclass(frozen=True)
class StepTime:
    """What :func:`compare_steps` found for one contender: seconds of every step, and the matrix rate beside them.

    Attributes:
        matrix_rate: floating-point operations a second of MM-Rec's own matrix products alone, in the same run.
    """

    label: str
    batch_size: int
    seq_len: int
    threads: int
    all_seconds: tuple[float, ...]
    flop_per_token: float
    matrix_rate: float

    @property
    def shape(self) -> str:
        """Batch times length, as in ``2x512``."""
        return f"{self.batch_size}x{self.seq_len}"

    @property
    def seconds(self) -> float:
        """The median step."""
        return statistics.median(self.all_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Read in training."""
        return self.batch_size * self.seq_len / self.seconds

    @property
    def flops(self) -> float:
        """Operations a second that its products need; what is not a product counts as nothing."""
        return self.flop_per_token * self.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.label,
            "shape": self.shape,
            "threads": self.threads,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "tflops": round(self.flops / 1e12, 3),
            "matrix_tflops": round(self.matrix_rate / 1e12, 3),
            "share_of_matrix_rate": round(self.flops / self.matrix_rate, 3),
            "all_seconds": [round(value, 4) for value in self.all_seconds],
        }


def mm_rec(config: ModelConfig, precision: str) -> dict[str, Contender]:
    """One model of ours as two contenders, one expert at work and both fused; on a GPU by graphs, as in training."""
    keep_freed_memory()  # as training does; the peers beside it profit too
    with torch.device("cpu"):
        model = MMRecModel(config)
    device = torch.get_default_device()
    model.to(device)
    apply_precision(model, precision)
    optimizer = AdamW(model.named_parameters())

    def loss_of(batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        output, after = model(
            batch.tokens, state, batch.domain, batch.reset, targets=batch.targets, weight=batch.weight
        )
        return output.loss, after

    run = (
        GraphedPass(loss_of, list(model.parameters()), 1)
        if device.type == "cuda"
        else partial(run_pass, loss_of, parts=1)
    )

    def step(domain: str | None, tokens: Tensor, targets: Tensor) -> None:
        reset = torch.zeros_like(tokens, dtype=torch.bool)
        weight = torch.full(tokens.shape, 1 / tokens.numel())
        run(Batch(tokens, targets, weight, reset, domain), None)
        float(optimizer.step(RATE, CLIP))

    head = config.vocab_size * config.d_model
    expert = matrix_work(config, 1) - 6.0 * head
    fusion = 6.0 * sum(parameter.numel() for parameter in model.fusion.parameters())
    threads = torch.get_num_threads()
    one = Contender("MM-Rec, one domain", partial(step, config.experts[0]), expert + 6.0 * head, threads)
    every = len(config.experts) * expert + fusion + 6.0 * head
    return {"one_domain": one, "fused": Contender("MM-Rec, fused", partial(step, None), every, threads)}


def gpt2(precision: str) -> Contender:
    """GPT-2 110M as people train it: autocast, clipping, fused AdamW. Needs ``transformers``."""
    model = gpt2_110m()
    return _peer("GPT-2 110M (transformers)", model, lambda tokens: model(tokens).logits, precision)


def gpt(precision: str, *, compiled: bool) -> Contender:
    """A modern GPT with as many active parameters as one domain of `100m`, compiled by ``torch.compile`` or not."""
    model = ModernGPT(vocab_size=32_000, width=512, blocks=12, heads=8)
    logits: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
    return _peer(f"GPT 56M ({'torch.compile' if compiled else 'eager'})", model, logits, precision)


def _peer(label: str, model: nn.Module, logits: Callable[[Tensor], Tensor], precision: str) -> Contender:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> None:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(logits(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    matrices = 6.0 * sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2)
    return Contender(label, step, matrices, torch.get_num_threads())


def contenders(config: ModelConfig, precision: str, names: Sequence[str]) -> dict[str, Contender]:
    """Those of ``one_domain``, ``fused``, ``gpt2``, ``gpt`` and ``gpt_compiled`` that are asked for."""
    ours = mm_rec(config, precision) if {"one_domain", "fused"} & set(names) else {}
    makers: dict[str, Callable[[], Contender]] = {
        "gpt2": lambda: gpt2(precision),
        "gpt": lambda: gpt(precision, compiled=False),
        "gpt_compiled": lambda: gpt(precision, compiled=True),
    }
    return {name: ours[name] if name in ours else makers[name]() for name in names}


def random_batch(config: ModelConfig, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, the same at every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch_size, seq_len + 1), generator=generator, device="cpu")
    ids = ids.to(torch.get_default_device())
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def tune_threads(contender: Contender, config: ModelConfig, candidates: Sequence[int]) -> None:
    """Give a contender the number of threads that it is fastest with, on 1 x 256 tokens."""
    batch = random_batch(config, 1, 256)
    seconds = {}
    for threads in candidates:
        contender.threads = threads
        _run(contender, batch)
        seconds[threads] = min(timed(partial(_run, contender, batch)) for _ in range(2))
    contender.threads = min(seconds, key=lambda threads: seconds[threads])


def _run(contender: Contender, batch: tuple[Tensor, Tensor]) -> None:
    if torch.get_num_threads() != contender.threads:
        torch.set_num_threads(contender.threads)
    contender.step(*batch)


def _seconds(contender: Contender, batch: tuple[Tensor, Tensor]) -> float | None:
    """Of a step; None if the GPU has no memory for it."""
    try:
        return timed(partial(_run, contender, batch))
    except torch.OutOfMemoryError:
        return None


def compare_steps(
    config: ModelConfig, precision: str, batch_size: int, seq_len: int, entries: Mapping[str, Contender], rounds: int
) -> dict[str, StepTime]:
    """Let every contender take a step in turn, ``rounds`` times after one to warm up, the limit measured in between.

    Returns:
        By name, without those that the GPU has no memory for.
    """
    batch = random_batch(config, batch_size, seq_len)
    threads = torch.get_num_threads()
    measure_rate = products_action(config, precision, batch_size * seq_len)
    times: dict[str, list[float]] = {name: [] for name in entries}
    rates = []
    try:
        for turn in range(rounds + 1):
            torch.set_num_threads(threads)
            rates.append(measure_rate())
            for name in list(times):
                seconds = _seconds(entries[name], batch)
                if seconds is None:
                    del times[name]
                    torch.cuda.empty_cache()
                elif turn:
                    times[name].append(seconds)
    finally:
        torch.set_num_threads(threads)
    rate = statistics.median(rates)
    return {
        name: StepTime(one.label, batch_size, seq_len, one.threads, tuple(times[name]), one.flop_per_token, rate)
        for name, one in entries.items()
        if name in times
    }
