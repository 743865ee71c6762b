"""The page of all settings, made from the dataclasses that define them."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Annotated, Any

from docs_site.markdown import code, table
from mm_rec.options import MAX_INT, Option
from mm_rec.scripts.demo_command import DemoSettings
from mm_rec.scripts.finetune_command import FinetuneSettings
from mm_rec.scripts.pipeline_command import PipelineSettings
from mm_rec.scripts.serve_command import ServeSettings
from mm_rec.training.settings import TrainSettings

__all__ = ["SETTINGS", "fields_of", "make_page"]

SETTINGS: dict[type, str] = {
    TrainSettings: "mm-rec train",
    FinetuneSettings: "mm-rec finetune",
    PipelineSettings: "mm-rec pipeline",
    DemoSettings: "mm-rec demo",
    ServeSettings: "mm-rec serve",
}

INTRODUCTION = """# Settings

A setting has one name everywhere: `--max_steps 200` as a flag, `max_steps: 200` in the YAML file of `--config`, and
`max_steps=200` in `mm_rec.train`. Flags win over the file. An unknown name and a value outside of its limits end in
one line before anything is read. A setting without a default is derived from the preset, the stage, the device and
the data.

A setting that is marked *for all stages* has one value for a whole command; every other can differ by stage in the
file, as in `stages: {stage2: {max_steps: 100}}`.
"""


def fields_of(cls: type) -> dict[str, tuple[Any, Option]]:
    """Returns type and :class:`Option` of every setting of a class, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: typing.get_args(hint)[:2] for name, hint in hints.items() if typing.get_origin(hint) is Annotated}


def make_page() -> str:
    """Returns the page in Markdown."""
    known: set[str] = set()
    pages = [INTRODUCTION]
    for cls, command in SETTINGS.items():
        fields = fields_of(cls)
        is_training = issubclass(cls, TrainSettings)
        new = {name: field for name, field in fields.items() if not (is_training and name in known)}
        also = "" if cls is TrainSettings or not is_training else " It takes most of those of `mm-rec train` as well."
        rows = [
            [code(name), _meaning(option, is_training), _type(hint), code(_default(cls, name)), _limits(option)]
            for name, (hint, option) in new.items()
        ]
        pages.append(
            f"\n## {command}\n\nThe settings of `{command}`.{also}\n\n"
            + table(["name", "meaning", "type", "default", "limits"], rows)
        )
        known |= fields.keys() if is_training else set()
    return "\n".join(pages)


def _type(hint: Any) -> str:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(one for one in kinds if one is not types.NoneType)
    names: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    return names.get(kind, "mapping")


def _default(cls: type, name: str) -> str:
    [field] = [one for one in dataclasses.fields(cls) if one.name == name]
    if field.default is dataclasses.MISSING or field.default is None:
        return ""
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def _limits(option: Option) -> str:
    if option.choices:
        return ", ".join(map(code, option.choices))
    least = "" if option.minimum is None else f"from {option.minimum:,}"
    most = "" if option.maximum in (float("inf"), MAX_INT) else f"to {option.maximum:,.0f}"
    return " ".join(filter(None, (least, most)))


def _meaning(option: Option, stages: bool) -> str:
    text = option.help.replace("|", r"\|").replace("*", r"\*")
    return text + (" (for all stages)" if stages and option.shared else "")
