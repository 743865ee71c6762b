"""The one training loop: batch, forward, backward, update, log, save, evaluate, sample.

Everything that a run yields is a function of its identity: the batch of a step, the order of the work and the
random numbers of a sample follow from the seed and the step. So a run that was stopped goes on bit for bit as
if it never had been.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mm_rec.chat import QUESTIONS, ChatSession, transcript
from mm_rec.checkpoint import Checkpoint, prune
from mm_rec.data.batches import Batch, Batches
from mm_rec.errors import UserError
from mm_rec.estimate import memory_remedy
from mm_rec.evaluate import Documents, evaluate
from mm_rec.generate import Sampling, generate
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.plan import Plan
from mm_rec.plots import draw_losses
from mm_rec.progress import Meter, Progress, StepReport
from mm_rec.run_folder import METRICS, RunFolder
from mm_rec.signals import Interrupted, SignalGuard
from mm_rec.stages import learning_rate
from mm_rec.state import ModelState, flatten_state, map_state, unflatten_state
from mm_rec.storage import write_atomic
from mm_rec.tokenizer import Tokenizer

__all__ = ["Position", "Trainer"]

MIXED = "mixed"
"""In records and carried states, the name of batches that hold all domains."""
PROMPTS = {"text": "The ", "code": "def "}
SAMPLE_TOKENS = 60
MAX_ROLLBACKS = 5
HISTORY = 32
SPIKE_NATS = 1.0
SPIKE_DEVIATIONS = 8.0


@dataclass
class Position:
    """Where a run is; all of it is in its checkpoints.

    Attributes:
        step: optimizer steps taken.
        tokens: read so far.
        rate_scale: on the learning rate, halved by each rollback.
        skipped: steps whose batch made trouble and is left out.
        losses: the last losses of each domain, by which a spike is told.
    """

    step: int = 0
    tokens: int = 0
    rate_scale: float = 1.0
    skipped: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def trouble(self, losses: Mapping[str, float]) -> str | None:
        """Why a step with these losses must not be applied; None if it may.

        A spike is a loss more than one nat and eight standard deviations above the last 32 of its domain.
        """
        for domain, loss in losses.items():
            if not math.isfinite(loss):
                return f"the loss of {domain} is {loss}"
            recent = self.losses.get(domain, [])
            if len(recent) == HISTORY:
                usual, spread = float(np.mean(recent)), float(np.std(recent))
                if loss > usual + SPIKE_NATS + SPIKE_DEVIATIONS * spread:
                    return f"the loss of {domain} jumped from {usual:.3f} to {loss:.3f}"
        return None

    def remember(self, losses: Mapping[str, float]) -> None:
        """Add the losses of an applied step."""
        for domain, loss in losses.items():
            self.losses[domain] = [*self.losses.get(domain, []), loss][-HISTORY:]


class Trainer:
    """Trains one stage in its run folder.

    Args:
        plan: sizes and schedule.
        model: on its device, in its precision.
        optimizer: of its parameters.
        batches: training data.
        valid: held-out documents by domain; may be empty.
        bytes_per_token: of the training data by domain, to show losses in bits per byte.
        tokenizer: for samples and checkpoints.
        run: the run folder.
        runtime: what was chosen on this machine (precision, threads and the like), kept in the checkpoints.
        guard: tells of signals.
        console: to print on.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        model: MMRecModel,
        optimizer: AdamW,
        batches: Batches,
        valid: Mapping[str, Documents],
        bytes_per_token: Mapping[str, float],
        tokenizer: Tokenizer,
        run: RunFolder,
        runtime: Mapping[str, Any],
        guard: SignalGuard,
        console: Console,
    ) -> None:
        self.plan = plan
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.valid = dict(valid)
        self.bytes_per_token = bytes_per_token
        self.tokenizer = tokenizer
        self.run = run
        self.runtime = dict(runtime)
        self.guard = guard
        self.console = console
        self.device = model.embedding.weight.device
        self.at = Position()
        self.carried: dict[str, ModelState] = {}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this stage."""
        self.optimizer.load_master_tensors(checkpoint.weights)
        self.optimizer.load_state_tensors(checkpoint.optimizer)
        self.at = Position(**checkpoint.trainer["position"])
        flat: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in checkpoint.carried.items():
            key, _, rest = name.partition("/")
            flat[key][rest] = tensor.to(self.device)
        self.carried = {key: unflatten_state(tensors, self.model.config) for key, tensors in flat.items()}

    def fit(self) -> Path:
        """Train to the last step of the plan; returns the final checkpoint.

        A signal ends the step under way, which is then saved.

        Raises:
            Interrupted: after a signal.
            UserError: if memory runs out or training stays unstable.
        """
        progress = Progress(self.console, self.plan.last_step, self.at.step + 1, Meter(self.runtime["threads"]))
        with progress.running(), self.guard.deferred():
            try:
                self._loop(progress)
            except Interrupted:
                path = self._save()
                progress.message(
                    f"stopped at step {self.at.step}, saved in {path}; the same command goes on from there"
                )
                raise
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                self.optimizer.zero_grad()
                remedy = memory_remedy(self.plan.batch_size, self.plan.seq_len)
                raise UserError(f"out of memory in step {self.at.step + 1}; {remedy}") from error
        return self._save()

    def _loop(self, progress: Progress) -> None:
        plan = self.plan
        while True:
            last = self.at.step >= plan.last_step
            if last or self.at.step % plan.checkpoint_interval == 0:
                self._save()
            if last or (self.at.step and self.at.step % plan.eval_interval == 0):
                self._evaluate(progress)
                self._sample(progress)
                draw_losses(self.run.path / METRICS, self.run.path / "loss.png", f"{plan.stage.name}: {self.run.path}")
            if last:
                return
            self.guard.check()
            report = self._take_step()
            if report is not None:
                cpu, memory = progress.update(report)
                self.run.log_timing(report.step, seconds=report.seconds, cpu_percent=cpu, memory_bytes=memory)

    def micro_batch_loss(self, batch: Batch, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Loss of a micro-batch, to be differentiated, and the state after it."""
        output, after = self.model(
            batch.tokens.to(self.device),
            state,
            batch.domain,
            batch.reset.to(self.device),
            targets=batch.targets.to(self.device),
            weight=batch.weight.to(self.device),
        )
        return output.loss, after

    def _take_step(self) -> StepReport | None:
        """One optimizer step; None if it was left out, rolled back or given up half way for a signal."""
        step, plan, start = self.at.step + 1, self.plan, time.monotonic()
        if step in self.at.skipped:
            self.at.step = step
            self.run.log_metrics(step, skipped=True)
            return None
        self._choose_trainable(step)
        carried = dict(self.carried)
        losses: dict[str, list[float]] = defaultdict(list)
        for part in range(plan.accumulation):
            if part and self.guard.requested is not None:
                self.optimizer.zero_grad()
                return None
            batch = self.batches.micro_batch((step - 1) * plan.accumulation + part)
            key = batch.domain or MIXED
            loss, state = self.micro_batch_loss(batch, carried.get(key))
            (loss / plan.accumulation).backward()
            self.optimizer.accumulate()
            losses[key].append(float(loss.detach()))
            if plan.stage.layout == "lanes":
                carried[key] = map_state(state, _keep)
        means = {key: sum(values) / len(values) for key, values in losses.items()}
        rate = learning_rate(step, plan.steps, plan.rate) * self.at.rate_scale
        trouble, norm = self.at.trouble(means), math.nan
        if trouble is None:
            norm = float(self.optimizer.step(rate, plan.clip or math.inf))
            trouble = None if math.isfinite(norm) else f"the norm of the gradient is {norm}"
        if trouble is not None:
            self._roll_back(step, trouble)
            return None
        self.carried = carried
        self.at.step = step
        self.at.tokens += plan.tokens_per_step
        self.at.remember(means)
        total = sum(sum(values) for values in losses.values()) / plan.accumulation
        bits = sum(len(losses[key]) * means[key] / self.bytes_per_token[key] for key in means)
        bits /= plan.accumulation * math.log(2)
        self.run.log_loss(step, total)
        self.run.log_metrics(
            step, loss=total, losses=means, bits_per_byte=bits, grad_norm=norm, rate=rate, tokens=self.at.tokens
        )
        return StepReport(step, total, bits, norm, rate, plan.tokens_per_step, time.monotonic() - start)

    def _choose_trainable(self, step: int) -> None:
        """In the first phase of fusion only the fusion learns: the experts get no gradients at all."""
        fusion_only = step <= self.plan.fusion_steps
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not fusion_only or name.startswith("fusion."))

    def _roll_back(self, step: int, trouble: str) -> None:
        """Back to the last good checkpoint; from there on this step's batch is left out and the rate halved."""
        self.optimizer.zero_grad()
        skipped, scale = [*self.at.skipped, step], self.at.rate_scale / 2
        if len(skipped) > MAX_ROLLBACKS:
            raise UserError(
                f"training is unstable: {trouble} in step {step}, after {MAX_ROLLBACKS} times back; "
                f"the last good checkpoint is in {self.run.checkpoints}; start anew with a lower --lr "
                f"(the peak was {self.plan.rate:.1e})"
            )
        checkpoint = self.run.rewind()
        assert checkpoint is not None, "a run saves its start"
        self.restore(checkpoint)
        self.at.skipped, self.at.rate_scale = skipped, scale
        self.run.event(
            f"{trouble} in step {step}: went back to step {self.at.step}; that batch is left out and the rate halved"
        )

    def _save(self) -> Path:
        """The checkpoint of the present step, written if it is not there yet."""
        carried = {
            f"{key}/{name}": tensor
            for key, state in self.carried.items()
            for name, tensor in flatten_state(state).items()
        }
        path = self.run.save(
            self.at.step,
            config=self.model.config,
            weights=self.optimizer.master_tensors(),
            optimizer=self.optimizer.state_tensors(),
            carried=carried,
            trainer={"position": asdict(self.at), "runtime": self.runtime, "steps": self.plan.steps},
            tokenizer=self.tokenizer,
        )
        prune(self.run.checkpoints, self.plan.keep_checkpoints)
        return path

    def _evaluate(self, progress: Progress) -> None:
        """Bits per byte on held-out documents: as the stage runs the model and, where it fuses, by own expert too."""
        if not self.valid:
            return
        mixed = self.plan.stage.mixed
        scores = {name: self._score(name, None if mixed else name) for name in self.valid}
        shown = [f"{name} {score:.3f}" for name, score in scores.items()]
        records = {"valid": scores}
        if mixed and not self.plan.stage.conversations:
            records["valid_by_expert"] = {name: self._score(name, name) for name in self.valid}
            shown += [f"{name} by its expert {score:.3f}" for name, score in records["valid_by_expert"].items()]
        self.run.log_metrics(self.at.step, **records)
        progress.message(f"validation at step {self.at.step}, bits per byte: {', '.join(shown)}")

    def _score(self, name: str, domain: str | None) -> float:
        return evaluate(self.model, self.valid[name], domain, between=self.guard.check).bits_per_byte

    def _sample(self, progress: Progress) -> None:
        """A short text of each domain, or a conversation: the same for the same seed and step."""
        sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, seed=(self.plan.seed * 1_000_003 + self.at.step) % 2**63)
        if self.plan.stage.conversations:
            session = ChatSession.start(self.model, self.tokenizer, sampling=sampling)
            sample = transcript(session, QUESTIONS, self.guard.check)
        else:
            sample = self._continue_texts(sampling)
        write_atomic(self.run.samples / f"step_{self.at.step:06d}.txt", sample.encode("utf-8", "replace"))
        progress.message(f"sample at step {self.at.step}:\n{sample}")

    def _continue_texts(self, sampling: Sampling) -> str:
        texts = []
        for name in self.bytes_per_token:
            if name == MIXED:
                continue
            prompt, domain = PROMPTS.get(name, ""), None if self.plan.stage.mixed else name
            pieces = [prompt]
            for piece in generate(self.model, self.tokenizer, prompt, sampling, domain):
                self.guard.check()
                pieces.append(piece)
            texts.append(f"[{name}] {''.join(pieces)}")
        return "\n\n".join(texts) + "\n"


def _keep(tensor: Tensor) -> Tensor:
    """A tensor of the state cut off from its graph, and from the larger one that it may be a view of."""
    return tensor.detach().clone()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
