"""The settings of training: what a user may ask for, and its defaults."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mm_rec.config import DEFAULT_PRESET, DOMAINS, PRESETS, ModelConfig, check_expert_name
from mm_rec.data.download.sources import ENGLISH
from mm_rec.errors import UserError
from mm_rec.options import Option
from mm_rec.stages import PRETRAINING, STAGES, Stage
from mm_rec.text.tokenizer import MIN_VOCAB_SIZE
from mm_rec.training.schedule import OPTIMIZERS
from mm_rec.translation import Translatable

__all__ = ["MODEL_SHAPE", "TrainSettings", "share_of_time", "step_cap"]

MODEL_SHAPE = (
    "vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "gate_every", "window", "kept_pairs", "rotary_base"
)  # fmt: skip
"""Settings that change the shape of a preset: fields of ModelConfig."""

LARGEST = 2**20
"""Largest of the sizes that can be asked for; what does not fit into memory is refused below it."""


def _size(help: str, minimum: float = 1, maximum: float = LARGEST) -> Option:
    """The option of a size of the model: if it is not given, it is that of the preset."""
    text = Translatable("{help}; that of the preset if not given", help=Translatable(help))
    return Option(text, minimum=minimum, maximum=maximum, shared=True)


@dataclass(frozen=True)
class TrainSettings:
    """What a training command takes. None means: derived from the preset, the stage, the device and the data."""

    stage: Annotated[str, Option("what to train", choices=(*PRETRAINING, "all"))] = "stage1"
    preset: Annotated[
        str | None,
        Option(
            Translatable(
                "size of the model; if not given {preset}, or with --minutes the one that learns most in the time",
                preset=DEFAULT_PRESET,
            ),
            choices=tuple(PRESETS),
            shared=True,
        ),
    ] = None
    minutes: Annotated[
        float | None,
        Option(
            "time that the stages may take together, in place of --max_steps", minimum=0.1, maximum=1e6, shared=True
        ),
    ] = None
    vocab_size: Annotated[int | None, _size("tokens of the tokenizer at most", minimum=MIN_VOCAB_SIZE)] = None
    d_model: Annotated[int | None, _size("width of the model")] = None
    n_heads: Annotated[int | None, _size("heads, into which the width is split")] = None
    n_layers: Annotated[int | None, _size("blocks of each expert", maximum=1000)] = None
    d_ff: Annotated[int | None, _size("width inside the feed-forward part of a block")] = None
    gate_every: Annotated[int | None, _size("every how many blocks one is a memory block, which attends")] = None
    window: Annotated[int | None, _size("tokens of short-term memory", minimum=2)] = None
    kept_pairs: Annotated[
        int | None, _size("pairs of a key and a value that a head keeps of the tokens before the window")
    ] = None
    rotary_base: Annotated[float | None, _size("base of the rotary encoding inside the window", maximum=1e9)] = None
    data_dir: Annotated[
        Path, Option("folder with the folders text and code, or with documents of your own", shared=True)
    ] = Path("data")
    text_dir: Annotated[
        Path | None, Option("file or folder of documents of your own to train on, in place of --data_dir", shared=True)
    ] = None
    code_dir: Annotated[Path | None, Option("the same for programs, which get an expert of their own", shared=True)] = (
        None
    )
    domain: Annotated[
        dict[str, Path],
        Option("the same for a domain of any name, which gets an expert of its own; may be given often", shared=True),
    ] = field(default_factory=dict)
    download_data: Annotated[bool, Option("download data into --data_dir if none is there", shared=True)] = False
    language: Annotated[
        str, Option("language of the text to download, such as tr, which then comes from wikipedia", shared=True)
    ] = ENGLISH
    use_synthetic: Annotated[bool, Option("made-up data for a quick test, nothing is downloaded", shared=True)] = False
    max_samples: Annotated[int | None, Option("documents of each domain to use", minimum=1, shared=True)] = None
    skip_bad: Annotated[
        int, Option("rows that cannot be read to leave out before giving up", minimum=0, shared=True)
    ] = 0
    encoding: Annotated[
        str | None, Option("encoding of your text files, such as cp1254; found out if not given", shared=True)
    ] = None
    columns: Annotated[
        str | None, Option("columns of tables and JSON that hold the text, such as title,body", shared=True)
    ] = None
    list: Annotated[bool, Option("name every document that is left out, and why", shared=True)] = False
    checkpoint_dir: Annotated[Path, Option("folder of run folders")] = Path("checkpoints_cpu")
    recall_share: Annotated[
        float | None,
        Option(
            "part of the tokens that are rows made to train recall; if not given 0.05 in stage2 and 0 in other stages",
            minimum=0,
            maximum=0.9,
        ),
    ] = None
    batch_size: Annotated[int | None, Option("rows of a micro-batch", minimum=1)] = None
    seq_len: Annotated[int | None, Option("tokens of a row", minimum=2)] = None
    accumulation: Annotated[int, Option("micro-batches of an optimizer step", minimum=1)] = 1
    max_steps: Annotated[int | None, Option("optimizer steps of a stage", minimum=1)] = None
    lr: Annotated[float | None, Option("peak learning rate of stage1; later stages take their share", minimum=0)] = None
    optimizer: Annotated[
        str,
        Option(
            "adamw; muon, which learns more from the same tokens and takes longer for a step; auto: muon where a step "
            "reads so many tokens that it pays",
            choices=("auto", *OPTIMIZERS),
        ),
    ] = "auto"
    weight_decay: Annotated[float, Option("decay of matrices, times the learning rate", minimum=0)] = 0.1
    clip: Annotated[float, Option("largest norm of the gradient", minimum=0)] = 1.0
    seed: Annotated[
        int, Option("of the initial weights, the order of the data and the samples", minimum=0, maximum=2**63 - 1)
    ] = 0
    checkpoint_interval: Annotated[int | None, Option("steps between two checkpoints", minimum=1)] = None
    keep_checkpoints: Annotated[int, Option("newest checkpoints to keep, beside the best by validation", minimum=1)] = 3
    eval_interval: Annotated[int | None, Option("steps between two validations and samples", minimum=1)] = None
    no_early_stop: Annotated[
        bool, Option("train to the last step, also where validation rises while the data are read again")
    ] = False
    valid_bytes: Annotated[int, Option("held-out bytes of each domain to validate on", minimum=1)] = 32_768
    precision: Annotated[str, Option("type of the matrices", choices=("auto", "bf16", "fp32"))] = "auto"
    threads: Annotated[int | None, Option("CPU threads; if not given, as many as pay here", minimum=1)] = None
    device: Annotated[str, Option("cpu, cuda, or auto: CUDA if it is there")] = "auto"
    parallel: Annotated[
        str,
        Option(
            "what each of several processes holds: ddp, the whole model; fsdp, a part; auto: fsdp if the whole "
            "does not fit",
            choices=("auto", "ddp", "fsdp"),
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        str,
        Option("save memory by running blocks twice; auto: if nothing else fits", choices=("auto", "on", "off")),
    ] = "auto"
    lora: Annotated[
        int | None,
        Option("fine-tune thin adapters of this rank in place of all weights; 16 is usual", minimum=1, maximum=LARGEST),
    ] = None
    lora_alpha: Annotated[
        float | None, Option("of the adapters, which count alpha / rank times; twice the rank if not given", minimum=0)
    ] = None
    fresh: Annotated[bool, Option("start a new run beside an earlier one of the same settings")] = False
    resume_from: Annotated[Path | None, Option("run folder or checkpoint to continue")] = None
    allow_changes: Annotated[bool, Option("accept a --resume_from of other data, settings or machine")] = False
    init_from: Annotated[
        Path | None, Option("run folder, checkpoint or OWNER/NAME on the hub whose weights to start from")
    ] = None
    tensorboard: Annotated[bool, Option("also write TensorBoard event files into the run folder")] = False
    stages: Annotated[Mapping[str, Mapping[str, Any]], Option("settings of single stages", section=True)] = field(
        default_factory=dict
    )

    def stage_names(self) -> tuple[str, ...]:
        """The stages to run, in order."""
        return PRETRAINING if self.stage == "all" else (self.stage,)

    def recall_share_of(self, stage: Stage) -> float:
        """Returns the part of a stage's tokens that are rows made to train recall; conversations have none."""
        return stage.recall_share if self.recall_share is None or stage.conversations else self.recall_share

    def for_stage(self, name: str) -> TrainSettings:
        """The settings of one stage: what its section of the file says wins over the rest of the file."""
        values = {**self.stages.get(name, {}), "stage": name, "stages": {}}
        if self.minutes is not None:
            names = self.stage_names()
            values["minutes"] = share_of_time(self.minutes, (name,), names if name in names else (name,))
        return dataclasses.replace(self, **values)

    def domain_folders(self) -> dict[str, Path]:
        """Returns the user's own file or folder for each domain that one is named for.

        Raises:
            UserError: if a name can't be that of an expert or is given twice, or other data are asked for as well.
        """
        own = {name: path for name, path in (("text", self.text_dir), ("code", self.code_dir)) if path is not None}
        for name, path in self.domain.items():
            if name in own:
                raise UserError(
                    "the domain {name} is named twice, as --{name}_dir and as --domain {name}={path}",
                    name=name,
                    path=path,
                )
            check_expert_name(name)
        own |= self.domain
        for name, is_set in (("use_synthetic", self.use_synthetic), ("download_data", self.download_data)):
            if own and is_set:
                raise UserError(
                    "--{name} and folders of your own both say what to train on; leave one of them out", name=name
                )
        return own

    def model_shape(self) -> dict[str, Any]:
        """Returns the fields of :class:`ModelConfig` that were set, by name."""
        return {name: value for name in MODEL_SHAPE if (value := getattr(self, name)) is not None}

    @property
    def preset_name(self) -> str:
        """The preset that was set, else the default."""
        return self.preset or DEFAULT_PRESET

    def model_config(self, vocab_size: int | None = None, experts: tuple[str, ...] = DOMAINS) -> ModelConfig:
        """Returns the shape of a new model: the preset with what was set beside it.

        Args:
            vocab_size: rows of the embedding; those of the settings if None.
            experts: names of the experts, one for each domain.

        Raises:
            UserError: if the sizes do not fit together.
        """
        shape = self.model_shape()
        if vocab_size is None and "vocab_size" in shape:
            vocab_size = -(-shape["vocab_size"] // 64) * 64
        if vocab_size is not None:
            shape["vocab_size"] = vocab_size
        try:
            return ModelConfig.preset(self.preset_name, experts=experts, **shape)
        except ValueError as error:
            raise UserError("these sizes do not make a model: {error}", error=error) from None


def share_of_time(minutes: float, stages: Iterable[str], among: Iterable[str]) -> float:
    """Returns the part of ``minutes`` that some of the stages take that share it.

    >>> share_of_time(10.0, ["stage1"], ["stage1", "stage2", "stage3"])
    8.0
    """
    shares = {name: STAGES[name].time_share for name in among}
    return minutes * sum(shares[name] for name in stages) / sum(shares.values())


def step_cap() -> int | None:
    """The cap on the steps of every command, from MM_REC_MAX_STEPS; None without one."""
    text = os.environ.get("MM_REC_MAX_STEPS", "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError("MM_REC_MAX_STEPS must be a whole number of at least 1, got {text!r}", text=text)
    return int(text)
