"""Flags that several commands share: how text is drawn, and by which expert."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mm_rec.config import WEIGHTS
from mm_rec.errors import UserError
from mm_rec.options import with_default
from mm_rec.regular_file import read_regular
from mm_rec.translation import Translatable, translate

__all__ = [
    "ADAPTER_HELP",
    "FLAGS",
    "MEMORY_HELP",
    "MODEL_HELP",
    "MOST_CHARACTERS",
    "WEIGHTS_HELP",
    "add_adapter_argument",
    "add_domain_argument",
    "add_json_argument",
    "add_memory_argument",
    "add_sampling_arguments",
    "add_weights_argument",
    "given_sampling",
    "read_json_schema",
    "tell_on_stderr",
]

ADAPTER_HELP = "folder of a LoRA adapter to add to the model, as PEFT or `mm-rec finetune --lora` writes it"
MODEL_HELP = "checkpoint, run folder, folder of runs, or OWNER/NAME or OWNER/NAME@REVISION on the hub"
MEMORY_HELP = "file or folder of documents to read first; what is remembered of it is kept and has a fixed size"
WEIGHTS_HELP = "full, or int8: fewer bytes, so faster on the CPU, at a small loss of quality"

MOST_CHARACTERS = 50_000_000
"""Of a prompt or a message: an endless input must not take all memory."""

# Defaults are those of Sampling, which is not imported here: it brings PyTorch, and --help should be quick.
FLAGS: dict[str, tuple[int | float, Translatable]] = {
    "max_new_tokens": (200, Translatable("tokens to draw at most")),
    "repetition_penalty": (1.0, Translatable("above 1 avoids what was said")),
    "temperature": (0.8, Translatable("0 takes the likeliest token each time")),
    "top_k": (0, Translatable("keep the k likeliest tokens; 0 keeps all")),
    "top_p": (0.95, Translatable("keep the likeliest tokens with this much probability")),
    "min_p": (0.0, Translatable("keep tokens this share as likely as the likeliest")),
    "seed": (0, Translatable("the same seed gives the same text")),
}

OTHER_NAMES = {"max_new_tokens": ("max_tokens",)}
"""Names that the same flag has in `mm-rec serve` and in its requests."""


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of ``Sampling``; what is not given leaves no trace in the namespace."""
    group = parser.add_argument_group("sampling")
    for name, (default, text) in FLAGS.items():
        kind = type(default)
        flags = [f"--{one}" for one in (name, *OTHER_NAMES.get(name, ()))]
        shown = kind.__name__.upper()
        group.add_argument(
            *flags, dest=name, type=kind, default=argparse.SUPPRESS, metavar=shown, help=with_default(text, default)
        )
    text = Translatable("end before this string; may be given often")
    group.add_argument("--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT", help=text)


def given_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``Sampling`` that were given as flags."""
    given = {name: value for name, value in vars(options).items() if name in FLAGS}
    return given | ({"stop": tuple(options.stop)} if "stop" in options else {})


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--json_schema``, for :func:`read_json_schema`."""
    text = Translatable("let the text be JSON that follows the schema in this file; needs the extra `json`")
    parser.add_argument("--json_schema", type=Path, metavar="FILE", help=text)


def read_json_schema(path: Path | None) -> dict[str, Any] | None:
    """The JSON schema in a file; None if there is none.

    Raises:
        UserError: if the file can't be read or holds no JSON object.
    """
    if path is None:
        return None
    try:
        schema = json.loads(read_regular(path))
    except OSError as error:
        raise UserError("cannot read the schema {path}: {reason}", path=path, reason=error.strerror or error) from error
    except (ValueError, RecursionError) as error:
        raise UserError("{path} is not JSON: {error}", path=path, error=" ".join(str(error).split())) from error
    if not isinstance(schema, dict):
        raise UserError('{path} must hold a JSON schema, which is an object, as {{"type": "object"}}', path=path)
    return schema


def add_domain_argument(parser: argparse.ArgumentParser, default: str = Translatable("what training reached")) -> None:
    """Add ``--domain``, for ``Loaded.choose_domain``, whose choice without it is ``default`` in words."""
    text = Translatable("the expert to use, or `all` to fuse them (default: {default})", default=default)
    parser.add_argument("--domain", help=text)


def tell_on_stderr(line: str) -> None:
    """Print a line that is no part of what the model writes, in the language of the user's locale."""
    print(translate(line), file=sys.stderr, flush=True)


def add_memory_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--memory``, for :func:`mm_rec.inference.folder_memory.read_folder`."""
    parser.add_argument("--memory", type=Path, metavar="DIR", help=MEMORY_HELP)


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--adapter``, for ``load_model``."""
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help=ADAPTER_HELP)


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights``, for ``load_model``."""
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help=WEIGHTS_HELP)
