"""The one training loop: batch, forward, backward, update, log, save, evaluate, sample.

Everything that a run yields is a function of its identity: the batch of a step, the order of the work and the
random numbers of a sample follow from the seed and the step. So a run that was stopped goes on bit for bit as
if it never had been.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mm_rec import processes
from mm_rec.data.batches import Batch, Batches, EvenBatches
from mm_rec.data.prefetch import Feed
from mm_rec.errors import UserError, is_out_of_memory
from mm_rec.evaluation.bits_per_byte import Documents, evaluate
from mm_rec.inference.chat_session import QUESTIONS, ChatSession, transcript
from mm_rec.inference.generate import generate
from mm_rec.inference.sampling import Sampling
from mm_rec.machine.signals import Interrupted, SignalGuard
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.state import ModelState, detach_state, flatten_state, map_state, unflatten_state
from mm_rec.storage.best import BEST, STOPPED_EARLY
from mm_rec.storage.checkpoint import Checkpoint, checkpoint_name, prune
from mm_rec.storage.files import DamageError, write_atomic
from mm_rec.storage.run_folder import METRICS, Run
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.training.console import Meter, ProgressLine, StepReport
from mm_rec.training.cuda_graphs import GraphedPass, run_pass
from mm_rec.training.estimate import memory_remedy
from mm_rec.training.pace import Pace
from mm_rec.training.plan import Plan
from mm_rec.training.plots import draw_losses
from mm_rec.training.progress import TrainingProgress
from mm_rec.training.ranks import own_batch, rewind_run
from mm_rec.training.runtime import Runtime
from mm_rec.training.tensorboard import Board
from mm_rec.training.validations import Validations
from mm_rec.translation import Translatable, join_texts

__all__ = ["MIXED", "Trainer"]

MIXED = "mixed"
"""In records and carried states, the name of batches that hold all domains."""
PROMPTS = {"text": "The ", "code": "def "}
"""What a sample of English text and of code begins with; others begin with the first words of a held-out document."""
PROMPT_TOKENS = 8
"""Tokens of a document of which the whole words are taken."""
ENGLISH = re.compile(r"\b(?:the|and)\b", re.IGNORECASE)
ENGLISH_SHARE = 0.01
"""Share of these two words in English text, at least; in other languages they hardly occur."""
SAMPLE_TOKENS = 60
MAX_ROLLBACKS = 5


class Trainer:
    """Trains one stage in its run folder.

    Args:
        plan: sizes and schedule.
        model: on its device, in its precision.
        optimizer: of its parameters.
        batches: training data.
        even_batches: the data of the steps in which the fusion alone learns; needed if the plan has such.
        valid: held-out documents by domain; may be empty.
        bytes_per_token: of the training data by domain, to show losses in bits per byte.
        tokenizer: for samples and checkpoints.
        run: the run folder.
        runtime: what was chosen on this machine (precision, threads and the like), kept in the checkpoints.
        guard: tells of signals.
        console: to print on.
        board: for TensorBoard, if the user wants it.
        pace: decides how many steps there are, if the plan has a time for them.
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
        run: Run,
        runtime: Runtime,
        guard: SignalGuard,
        console: Console,
        board: Board | None = None,
        even_batches: EvenBatches | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.plan = plan
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.even_batches = even_batches
        self.valid = dict(valid)
        self.bytes_per_token = bytes_per_token
        self.tokenizer = tokenizer
        self.run = run
        self.runtime = runtime
        self.guard = guard
        self.console = console
        self.board = board
        self.pace = pace
        self.validations = Validations()
        self.device = model.embedding.weight.device
        self.progress = TrainingProgress()
        self.carried: dict[str, ModelState] = {}
        self.feed = Feed(self.device, own_batch)
        self._sharded = runtime.sharded
        self._graphs: GraphedPass | None = None
        self._between = guard.check if processes.world_size() == 1 else _do_nothing

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this stage.

        Raises:
            UserError: if it has the state of another optimizer.
        """
        self.optimizer.load_master_tensors(checkpoint.weights)
        try:
            self.optimizer.load_state_tensors(checkpoint.optimizer)
        except ValueError as error:
            raise UserError(
                "{path} was trained by another optimizer ({error}); train on by the same "
                "--optimizer, or start from its weights with --init_from",
                path=checkpoint.path,
                error=error,
            ) from None
        self.progress = TrainingProgress(**checkpoint.trainer["position"])
        self.carried = self._carried_in(checkpoint)

    def _carried_in(self, checkpoint: Checkpoint) -> dict[str, ModelState]:
        """The states of a checkpoint by domain; none if the user accepted a batch of another number of rows."""
        carried = dict(checkpoint.carried)  # once: with several processes each look at a tensor sends it
        rows = {len(tensor) for tensor in carried.values()}
        if rows - {self.plan.batch_size}:
            self.run.event(
                Translatable(
                    "the carried state of {rows} rows is left out: a batch has {batch_size}",
                    rows=max(rows),
                    batch_size=self.plan.batch_size,
                )
            )
            return {}
        flat: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in carried.items():
            key, _, rest = name.partition("/")
            flat[key][rest] = processes.own_rows(tensor).to(self.device)
        return {key: unflatten_state(tensors, self.model.config) for key, tensors in flat.items()}

    def fit(self) -> Path:
        """Train to the last step of the plan; returns the final checkpoint.

        A signal ends the step under way, which is then saved.

        Raises:
            Interrupted: after a signal.
            UserError: if memory runs out, training stays unstable or the data was changed meanwhile.
        """
        line = ProgressLine(self.console, self.plan.last_step, self.progress.step + 1, Meter(self.runtime.threads))
        self._read_validations()
        with line.running(), self.guard.deferred():
            try:
                self._loop(line)
            except Interrupted:
                path = self._save()
                line.message(
                    Translatable(
                        "stopped at step {step}, saved in {path}; {next_command}",
                        step=self.progress.step,
                        path=path,
                        next_command=self.run.next_command,
                    )
                )
                raise
            except DamageError:  # of the data, before an update
                self.optimizer.zero_grad()
                if processes.world_size() == 1:  # the others may not have seen it and would not save along
                    line.message(
                        Translatable(
                            "stopped at step {step}, saved in {path}", step=self.progress.step, path=self._save()
                        )
                    )
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.optimizer.zero_grad()
                traceback.clear_frames(error.__traceback__)  # lest they keep tensors and graphs
                remedy = memory_remedy(self.plan.batch_size, self.plan.seq_len)
                raise UserError(
                    "out of memory in step {step}; {remedy}", step=self.progress.step + 1, remedy=remedy
                ) from error
            finally:
                self._graphs = None
                if self.board is not None:
                    self.board.close()
        return self._save()

    def _loop(self, line: ProgressLine) -> None:
        if self.pace is not None:
            self.pace.start(self.progress.step)
        while True:
            plan = self.plan  # its length may have been revised
            last = self.progress.step >= plan.last_step
            evaluate_now = last or self.progress.step % plan.eval_interval == 0
            # Saved first: a failed evaluation loses nothing, and one that was stopped is done again from its start.
            if evaluate_now or self.progress.step % plan.checkpoint_interval == 0:
                with self._pausing("save"):
                    self._save()
            if evaluate_now and (processes.is_rank_zero() or self._sharded):  # all have to help with a sharded model
                with self._pausing("validate"):
                    self._evaluate(line)
                if self.progress.step > 0:
                    with self._pausing("sample"):
                        self._sample(line)
                if self.progress.step > 0 and processes.is_rank_zero():
                    title = f"{plan.stage.name}: {self.run.path}"
                    with self._pausing("draw"):
                        draw_losses(self.run.path / METRICS, self.run.path / "loss.png", title, self.bytes_per_token)
            if last or (evaluate_now and self._stops_early(line)):
                return
            processes.check_signals(self.guard)
            report = self._take_step()
            if report is not None:
                self._show(report, line)
            if self.pace is not None:
                self._decide_length(self.pace, line)

    def _read_validations(self) -> None:
        """Take the validations from the records, which were cut back to the step of this trainer."""
        if processes.is_rank_zero():
            self.validations = Validations.read(self.run.path / METRICS)
            self._note_best()

    def _note_best(self) -> None:
        step, score = self.validations.best_step, self.validations.best_score
        self.run.note(BEST, None if step is None else {"step": step, "bits_per_byte": score})

    def _stops_early(self, line: ProgressLine) -> bool:
        """Whether to end here, since validation rises and all data were read before; rank 0 decides for all.

        The decision follows from the records alone; it is noted so that the run counts as finished.
        """
        plan, progress = self.plan, self.progress
        rises = self.validations.is_rising and progress.tokens >= self.batches.tokens_per_epoch
        if not processes.all_max(int(plan.stops_early and rises and processes.is_rank_zero())):
            return False
        self.run.note(STOPPED_EARLY, progress.step)
        line.message(
            Translatable(
                "stopped early, at step {step} of {steps}: validation rises since step {best}, so more passes over the "
                "same data make the model worse on other texts; --no_early_stop trains on",
                step=progress.step,
                steps=plan.steps,
                best=self.validations.best_step,
            )
        )
        return True

    def _pausing(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.pace is None else self.pace.pausing(what)

    def _decide_length(self, pace: Pace, line: ProgressLine) -> None:
        """Fit the steps that are left into the time that is left, if it is time to; rank 0 decides for all."""
        step, plan = self.progress.step, self.plan
        if step <= plan.length.revised_at:  # steps that are done once more follow what was decided then
            return
        validations = max(1, math.ceil((plan.steps - step) / plan.eval_interval))
        decided = pace.decide(step, plan.steps, validations) if processes.is_rank_zero() else None
        steps = processes.all_max(decided or 0)
        if steps in (0, plan.steps):
            return
        self.run.note_length(step, steps, pace.used)
        self.plan = plan.with_revisions([(step, steps)])
        line.steps = self.plan.last_step

    def _show(self, report: StepReport, line: ProgressLine) -> None:
        """What depends on the clock, and so stays out of the records: the line, timing.jsonl, TensorBoard."""
        cpu, memory = line.update(report, None if self.pace is None else self.pace.left)
        self.run.log_timing(report.step, seconds=report.seconds, cpu_percent=cpu, memory_bytes=memory)
        if self.board is not None:
            values = {"loss": report.loss, "bits_per_byte": report.bits_per_byte, "grad_norm": report.grad_norm}
            values |= {"rate": report.rate, "tokens_per_second": report.tokens / report.seconds}
            self.board.add(report.step, {f"train/{name}": value for name, value in values.items()})

    def micro_batch_loss(self, batch: Batch, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Loss of a micro-batch on the device, to be differentiated, and the state after it."""
        output, after = self.model(
            batch.tokens, state, batch.domain, batch.reset, targets=batch.targets, weight=batch.weight
        )
        return output.loss, detach_state(after)

    def _pass(self, batch: Batch, state: ModelState | None) -> tuple[Tensor, ModelState]:
        """Forward and backward of a micro-batch: its loss, and the state after it.

        In one launch, where that can be: on GPUs that have the whole model, every block run once.
        """
        if self.device.type == "cpu" or self._sharded or self.model.gradient_checkpointing:
            return run_pass(self.micro_batch_loss, batch, state, self.plan.accumulation)
        if self._graphs is None:
            self._graphs = GraphedPass(self.micro_batch_loss, list(self.model.parameters()), self.plan.accumulation)
        return self._graphs(batch, state)

    def _take_step(self) -> StepReport | None:
        """One optimizer step; None if it was left out, rolled back or given up half way for a signal."""
        step, plan, start = self.progress.step + 1, self.plan, time.monotonic()
        if step in self.progress.skipped:
            self.progress.step = step
            self.run.log_metrics(step, skipped=True)
            return None
        fusion_only = step <= plan.fusion_steps
        self._choose_trainable(fusion_only)
        batches = self.even_batches if fusion_only else self.batches
        assert batches is not None, "the plan has steps for the fusion alone and there are no batches for them"
        carry = plan.stage.layout == "lanes" and not fusion_only
        carried = dict(self.carried) if carry else {}
        parts: list[tuple[str, Tensor]] = []
        for index in range((step - 1) * plan.accumulation, step * plan.accumulation):
            if parts and processes.world_size() == 1 and self.guard.requested is not None:
                self.optimizer.zero_grad()
                return None
            batch = self.feed.take(batches, index)
            key = batch.domain or MIXED
            loss, state = self._pass(batch, carried.get(key))
            self.optimizer.accumulate()
            parts.append((key, loss))
            if carry:
                carried[key] = map_state(state, _keep)
        numbers = processes.all_mean_(torch.stack([loss for _, loss in parts]))
        numbers = torch.cat([numbers, self.optimizer.gradient_norm().view(1)])
        self.feed.prefetch(batches, step * plan.accumulation)
        *values, norm = numbers.tolist()  # the one time in a step that the device is waited for
        losses: dict[str, list[float]] = defaultdict(list)
        for (key, _), value in zip(parts, values, strict=True):
            losses[key].append(value)
        means = {key: sum(some) / len(some) for key, some in losses.items()}
        trouble = self.progress.trouble(means)
        if trouble is None and not math.isfinite(norm):
            trouble = Translatable("the norm of the gradient is {norm}", norm=norm)
        if trouble is not None:
            self._roll_back(step, trouble)
            return None
        rate = plan.rate_at(step) * self.progress.rate_scale
        self.optimizer.step(rate, plan.clip or math.inf)
        self.carried = carried
        self.progress.step = step
        self.progress.tokens += plan.tokens_per_step
        self.progress.remember(means)
        total = sum(sum(some) for some in losses.values()) / plan.accumulation
        bits = sum(len(losses[key]) * means[key] / self.bytes_per_token[key] for key in means)
        bits /= plan.accumulation * math.log(2)
        self.run.log_loss(step, total)
        self.run.log_metrics(
            step, loss=total, losses=means, bits_per_byte=bits, grad_norm=norm, rate=rate, tokens=self.progress.tokens
        )
        return StepReport(step, total, bits, norm, rate, plan.tokens_per_step, time.monotonic() - start)

    def _choose_trainable(self, fusion_only: bool) -> None:
        """Where only the fusion learns, the experts get no gradients at all."""
        for name, parameter in self.model.named_parameters():
            learns = self.optimizer.trains(name) and (not fusion_only or name.startswith("fusion."))
            parameter.requires_grad_(learns)

    def _roll_back(self, step: int, trouble: str) -> None:
        """Back to the last good checkpoint; from there on this step's batch is left out and the rate halved."""
        self.optimizer.zero_grad()
        skipped, scale = [*self.progress.skipped, step], self.progress.rate_scale / 2
        if len(skipped) > MAX_ROLLBACKS:
            raise UserError(
                "training is unstable: {trouble} in step {step}, after {rollbacks} times back; "
                "the last good checkpoint is in {checkpoints}; start anew with a lower --lr (the "
                "peak was {rate:.1e})",
                trouble=trouble,
                step=step,
                rollbacks=MAX_ROLLBACKS,
                checkpoints=self.run.checkpoints,
                rate=self.plan.rate,
            )
        checkpoint = rewind_run(self.run)
        assert checkpoint is not None, "a run saves its start"
        self.restore(checkpoint)
        self._read_validations()
        self.progress.skipped, self.progress.rate_scale = skipped, scale
        self.run.event(
            Translatable(
                "{trouble} in step {step}: went back to step {good}; that batch is left out and the rate halved",
                trouble=trouble,
                step=step,
                good=self.progress.step,
            )
        )

    def _save(self) -> Path:
        """The checkpoint of the present step, written if it is not there yet."""
        carried = {
            f"{key}/{name}": tensor
            for key, state in self.carried.items()
            for name, tensor in processes.gather_rows(flatten_state(state)).items()
        }
        path = self.run.save(
            self.progress.step,
            config=self.model.config,
            weights=self.optimizer.master_tensors(),
            optimizer=self.optimizer.state_tensors(),
            carried=carried,
            trainer={"position": asdict(self.progress), "runtime": self.runtime.to_dict(), "steps": self.plan.steps},
            tokenizer=self.tokenizer,
            adapter=self.optimizer.adapter(),
        )
        if processes.is_rank_zero():
            prune(self.run.checkpoints, self.plan.keep_checkpoints, self.validations.best_step)
        return path

    def _evaluate(self, line: ProgressLine) -> None:
        """Bits per byte on held-out documents: as the stage runs the model and, where it fuses, by own expert too.

        Before the first step that trains the fusion there are those by own expert alone.
        """
        if not self.valid:
            return
        stage, records = self.plan.stage, {}
        scores: dict[str, float] = {}
        if not stage.fuses or self.progress.step > 0 or self.model.fusion.is_trained:
            scores = {name: self._score(name, None if stage.mixed else name) for name in self.valid}
            records["valid"] = scores
        shown: list[str] = [f"{name} {score:.3f}" for name, score in scores.items()]
        if stage.fuses:
            records["valid_by_expert"] = {name: self._score(name, name) for name in self.valid}
            shown += [
                Translatable("{name} by its expert {score:.3f}", name=name, score=score)
                for name, score in records["valid_by_expert"].items()
            ]
        self.run.log_metrics(self.progress.step, **records)
        self.validations.add(self.progress.step, scores)
        self._note_best()
        if self.board is not None:
            self.board.add(self.progress.step, {f"valid/{name}": score for name, score in scores.items()})
        line.message(
            Translatable(
                "validation at step {step}, bits per byte: {scores}",
                step=self.progress.step,
                scores=join_texts(", ", shown),
            )
        )
        if self.progress.step == 0:
            line.message(
                Translatable(
                    "  (so many bits the model needs, on average, to tell each byte of texts that it is not trained "
                    "on: fewer are better, and one that knows nothing needs 8)"
                )
            )

    def _score(self, name: str, domain: str | None) -> float:
        return evaluate(self.model, self.valid[name], domain, between=self._between).bits_per_byte

    def _sample(self, line: ProgressLine) -> None:
        """A short text of each domain, or a conversation: the same for the same seed and step."""
        sampling = Sampling(
            max_new_tokens=SAMPLE_TOKENS, seed=(self.plan.seed * 1_000_003 + self.progress.step) % 2**63
        )
        with self._same_logits():
            if self.plan.stage.conversations:
                session = ChatSession.start(self.model, self.tokenizer, sampling=sampling)
                sample = transcript(session, QUESTIONS, self._between)
            else:
                sample = self._continue_texts(sampling)
        if not processes.is_rank_zero():
            return
        write_atomic(self.run.samples / f"{checkpoint_name(self.progress.step)}.txt", sample.encode("utf-8", "replace"))
        line.message(Translatable("sample at step {step}:\n{sample}", step=self.progress.step, sample=sample))

    def _same_logits(self) -> contextlib.AbstractContextManager[None]:
        if not self._sharded:
            return contextlib.nullcontext()
        from mm_rec.training.fsdp import same_logits

        return same_logits(self.model)

    @functools.cached_property
    def _prompts(self) -> dict[str, str]:
        """What a sample of each domain begins with, which is looked for in the held-out documents once."""
        return {name: self._prompt(name) for name in self.bytes_per_token}

    def _prompt(self, name: str) -> str:
        """Words in the language of a domain's data."""
        if name == "code" or name not in self.valid:
            return PROMPTS.get(name, "")
        text = "\n".join(self.tokenizer.decode(tokens.tolist()) for tokens in self.valid[name].tokens)
        if name in PROMPTS and len(ENGLISH.findall(text)) >= ENGLISH_SHARE * len(text.split()):
            return PROMPTS[name]
        beginning = self.tokenizer.decode(self.valid[name].tokens[0][1 : 1 + PROMPT_TOKENS].tolist())
        line = next(filter(str.strip, beginning.rstrip("\ufffd").splitlines()), "")  # a character may be cut in two
        return line.rpartition(" ")[0] or line

    def _continue_texts(self, sampling: Sampling) -> str:
        texts = []
        for name in self.bytes_per_token:
            if name == MIXED:
                continue
            prompt, domain = self._prompts[name], None if self.plan.stage.mixed else name
            pieces = [prompt]
            for piece in generate(self.model, self.tokenizer, prompt, sampling, domain):
                self._between()
                pieces.append(piece)
            texts.append(f"[{name}] {''.join(pieces)}")
        return "\n\n".join(texts) + "\n"


def _do_nothing() -> None:
    """Do nothing between two pieces of work: with several processes, a signal must not end rank 0 alone."""


def _keep(tensor: Tensor) -> Tensor:
    """A tensor of the state cut off from its graph, and from the larger one that it may be a view of."""
    return tensor.detach().clone()
