"""What a format looks like on the disk, without its values: names, types, shapes and keys.

    python tests/formats/layout.py KIND PATH > tests/formats/layouts/KIND-VERSION.json

writes it down for a new version; test_layouts.py compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

FILES = {
    "model": (
        *("config.json", "generation_config.json", "modeling_mm_rec.py", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    ),
    "training": ("trainer.json", "optimizer.safetensors", "carried.safetensors"),
}

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is <|end|><|<|end|>end|>?\n"},
    {"role": "assistant", "content": "The end, <|eos|>."},
]


def layout(kind: str, path: Path) -> dict[str, Any]:
    """The layout of the format ``kind`` in ``path``: a file, or a folder whose files are looked at one by one."""
    if path.is_file():
        return {"file": of_file(path)}
    names = FILES.get(kind) or sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return {name: None if "/" in name else of_file(path / name) for name in names}  # what is inside has its own format


def of_file(path: Path) -> Any:
    """The layout of one file; None for one whose content has a format of its own."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.pop("__metadata__", {})
        tensors = {name: f"{entry['dtype']} {entry['shape']}" for name, entry in header.items()}
        settings = of_value(json.loads(metadata["settings"])) if "settings" in metadata else {}
        return {"metadata": sorted(metadata), "settings": settings, "tensors": dict(sorted(tensors.items()))}
    if path.suffix == ".json" and path.name not in ("manifest.json", "tokenizer.json"):
        return of_value(json.loads(path.read_bytes()))
    if path.suffix == ".npy":
        return str(np.load(path, allow_pickle=False).dtype)
    if path.suffix == ".jinja":  # other texts make other tokens
        return rendered(path)
    return None


def rendered(template: Path) -> list[str]:
    """What the chat template of a folder makes of beginnings of a conversation, and which tokens of it are answers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(template.parent)
    starts = [CONVERSATION[:length] for length in range(1, len(CONVERSATION) + 1)]
    whole, prompts = (
        [tokenizer.apply_chat_template(start, tokenize=False, add_generation_prompt=prompt) for start in starts]
        for prompt in (False, True)
    )
    mask = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    return [*whole, *prompts, "".join(map(str, mask["assistant_masks"]))]


def of_value(value: Any) -> Any:
    """Keys and types of a JSON value."""
    if isinstance(value, dict):
        return {key: of_value(one) for key, one in value.items()}
    if isinstance(value, list):
        return [of_value(one) for one in value[:1]]
    return type(value).__name__


if __name__ == "__main__":
    json.dump(layout(sys.argv[1], Path(sys.argv[2])), sys.stdout, indent=1)
    print()
