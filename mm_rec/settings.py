"""Run settings: defaults, then a YAML file, then the command line. Unknown keys are errors.

A settings class is a frozen dataclass whose fields are annotated with :class:`Option`; the command line
flags, the keys of the YAML file and their checks all follow from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import yaml

from mm_rec.config import DEFAULT_PRESET, PRESETS
from mm_rec.errors import UserError
from mm_rec.stages import PRETRAINING, STAGES

__all__ = ["Option", "Parser", "TrainSettings", "add_arguments", "from_arguments", "step_cap"]

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """What a setting is for and which values it takes.

    ``section`` marks one that only the file has, ``shared`` one that cannot differ between the stages of a command.
    """

    help: str
    minimum: float | None = None
    maximum: float = float("inf")
    choices: tuple[str, ...] | None = None
    section: bool = False
    shared: bool = False


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line that points to ``--help``."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


@dataclass(frozen=True)
class TrainSettings:
    """What a training command takes. None means: derived from the stage, the device and the data."""

    stage: Annotated[str, Option("what to train", choices=(*PRETRAINING, "all"))] = "stage1"
    preset: Annotated[str, Option("size of the model", choices=tuple(PRESETS), shared=True)] = DEFAULT_PRESET
    data_dir: Annotated[Path, Option("folder with text/*.jsonl and code/*.jsonl", shared=True)] = Path("data")
    download_data: Annotated[bool, Option("download data into --data_dir if none is there", shared=True)] = False
    use_synthetic: Annotated[bool, Option("made-up data for a quick test, nothing is downloaded", shared=True)] = False
    max_samples: Annotated[int | None, Option("documents of each domain to use", minimum=1, shared=True)] = None
    skip_bad: Annotated[
        int, Option("rows that cannot be read to leave out before giving up", minimum=0, shared=True)
    ] = 0
    checkpoint_dir: Annotated[Path, Option("folder of run folders")] = Path("checkpoints_cpu")
    batch_size: Annotated[int | None, Option("rows of a micro-batch", minimum=1)] = None
    seq_len: Annotated[int | None, Option("tokens of a row", minimum=2)] = None
    accumulation: Annotated[int, Option("micro-batches of an optimizer step", minimum=1)] = 1
    max_steps: Annotated[int | None, Option("optimizer steps of a stage", minimum=1)] = None
    lr: Annotated[float | None, Option("peak learning rate of stage1; later stages take their share", minimum=0)] = None
    weight_decay: Annotated[float, Option("decay of matrices, times the learning rate", minimum=0)] = 0.1
    clip: Annotated[float, Option("largest norm of the gradient", minimum=0)] = 1.0
    seed: Annotated[
        int, Option("of the initial weights, the order of the data and the samples", minimum=0, maximum=2**63 - 1)
    ] = 0
    checkpoint_interval: Annotated[int | None, Option("steps between two checkpoints", minimum=1)] = None
    keep_checkpoints: Annotated[int, Option("newest checkpoints to keep", minimum=1)] = 3
    eval_interval: Annotated[int | None, Option("steps between two validations and samples", minimum=1)] = None
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
    fresh: Annotated[bool, Option("start a new run beside an earlier one of the same settings")] = False
    resume_from: Annotated[Path | None, Option("run folder or checkpoint to continue")] = None
    allow_changes: Annotated[bool, Option("accept a --resume_from of other data, settings or machine")] = False
    init_from: Annotated[Path | None, Option("run folder or checkpoint whose weights to start from")] = None
    tensorboard: Annotated[bool, Option("also write TensorBoard event files into the run folder")] = False
    stages: Annotated[Mapping[str, Mapping[str, Any]], Option("settings of single stages", section=True)] = field(
        default_factory=dict
    )

    def stage_names(self) -> tuple[str, ...]:
        """The stages to run, in order."""
        return PRETRAINING if self.stage == "all" else (self.stage,)

    def for_stage(self, name: str) -> TrainSettings:
        """The settings of one stage: what its section of the file says wins over the rest of the file."""
        values = {**self.stages.get(name, {}), "stage": name, "stages": {}}
        return dataclasses.replace(self, **values)


def _fields(cls: type) -> dict[str, tuple[Any, Option]]:
    """Name, type and :class:`Option` of every setting."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Annotated}


def add_arguments(
    parser: argparse.ArgumentParser,
    cls: type,
    defaults: Mapping[str, Any] | None = None,
    without: Container[str] = (),
) -> None:
    """Add ``--config`` and a flag for every field of a settings class.

    Flags that are not given leave no trace in the namespace, so that :func:`from_arguments` can tell.

    Args:
        parser: to add to.
        cls: the settings class.
        defaults: those of this command where they differ from the class's, for the help text.
        without: settings that mean nothing to this command.
    """
    group = parser.add_argument_group("settings")
    group.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the settings below")
    for name, (hint, option) in _fields(cls).items():
        default = (defaults or {}).get(name, getattr(cls, name, None))
        if option.section or name in without:
            continue
        if hint is bool:
            group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=option.help)
            continue
        group.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            choices=option.choices,
            metavar=None if option.choices else _kind(hint).__name__.upper(),
            help=option.help + ("" if default is None else f" (default {default})"),
        )


def from_arguments(cls: type[T], arguments: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> T:
    """Settings from parsed arguments: defaults, then the file of ``--config``, then the flags.

    Raises:
        UserError: for an unreadable file, an unknown key or a value that does not fit.
    """
    fields = _fields(cls)
    flags = _checked({name: value for name, value in vars(arguments).items() if name in fields}, fields, "--")
    path: Path | None = getattr(arguments, "config", None)
    values = dict(defaults or {})
    if path is not None:
        values |= _checked(_read_yaml(path), fields, f"{path}: ")
    for name, (_, option) in fields.items():
        if option.section and name in values:
            values[name] = {
                stage: {key: value for key, value in section.items() if key not in flags}
                for stage, section in values[name].items()
            }
    return cls(**(values | flags))


def step_cap() -> int | None:
    """The cap on the steps of every command, from MM_REC_MAX_STEPS; None without one."""
    text = os.environ.get("MM_REC_MAX_STEPS", "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"MM_REC_MAX_STEPS must be a whole number of at least 1, got {text!r}")
    return int(text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the settings file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings as `name: value` lines, not a {type(content).__name__}")
    return content


def _checked(values: Mapping[str, Any], fields: Mapping[str, tuple[Any, Option]], origin: str) -> dict[str, Any]:
    """Settings by name, each converted to its type; ``origin`` says in errors where they come from."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{origin}{name}"
        if name not in fields:
            raise UserError(f"unknown setting {where}{_suggestion(str(name), fields)}")
        hint, option = fields[name]
        checked[name] = _section(where, value, fields) if option.section else _convert(where, value, hint, option)
    return checked


def _section(where: str, value: Any, fields: Mapping[str, tuple[Any, Option]]) -> dict[str, dict[str, Any]]:
    """Settings of single stages, as ``stages: {stage2: {max_steps: 100}}`` in the file."""
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise UserError(f"{where} must hold the settings of each stage under its name")
    unknown = [name for name in value if name not in STAGES]
    if unknown:
        raise UserError(f"unknown stage {where}.{unknown[0]}{_suggestion(str(unknown[0]), STAGES)}")
    for name, one in value.items():
        for key in one:
            if key in fields and fields[key][1].shared:
                raise UserError(f"{where}.{name}.{key} cannot differ between stages; set {key} outside of {where}")
    plain = {name: entry for name, entry in fields.items() if not entry[1].section and name != "stage"}
    return {name: _checked(one, plain, f"{where}.{name}.") for name, one in value.items()}


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"


def _kind(hint: Any) -> type:
    """The one type of an annotation such as ``int`` or ``int | None``."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind: type = next(one for one in kinds if one is not types.NoneType)
    return kind


def _convert(where: str, value: Any, hint: Any, option: Option) -> Any:
    """``value`` as the type of its setting; a value that does not fit is an error that says what does."""
    kind = _kind(hint)
    if value is None and isinstance(hint, types.UnionType):
        return None
    try:
        if (kind is bool) != isinstance(value, bool) or isinstance(value, list | dict) or value is None:
            raise ValueError
        converted = value if kind is bool else kind(str(value))
    except ValueError:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}.get(kind, "text")
        raise UserError(f"{where} must be {wanted}, got {value!r}") from None
    if option.minimum is not None and not option.minimum <= converted < float("inf"):
        raise UserError(f"{where} must be at least {option.minimum} and finite, got {value}")
    if option.minimum is not None and converted > option.maximum:
        raise UserError(f"{where} must be at most {option.maximum}, got {value}")
    if option.choices and converted not in option.choices:
        raise UserError(f"{where} must be one of {', '.join(option.choices)}, got {value!r}")
    return converted
