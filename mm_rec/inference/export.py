"""A model in a folder in the layout of `transformers`, compared with the model that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mm_rec.errors import UserError
from mm_rec.inference.loading import Loaded, load_model
from mm_rec.storage import checkpoint, files, hf_folder
from mm_rec.translation import Translatable

__all__ = ["Compare", "compare_own", "export"]

WEIGHTS = "model.safetensors"
CARD = "README.md"
SMALL_FILES_BYTES = 16_000_000

Compare = Callable[[Path, Loaded], list[str]]
"""Loads an exported folder and compares it with the model; returns what was compared, in lines for people."""


def export(
    source: Path,
    output: Path,
    compare: Compare,
    domain: str | None = None,
    adapter: Path | None = None,
    card: Callable[[Loaded], str] | None = None,
) -> list[str]:
    """Write the model that ``source`` names to the folder ``output``, load it and compare.

    Nothing is left behind if the loaded model differs. The folder has a manifest, so that the commands of this
    package take it for a checkpoint.

    Args:
        source: checkpoint, run folder or folder of runs.
        output: must not exist.
        compare: :func:`compare_own`, or :func:`mm_rec.hf.compare.compare`, which loads it with `transformers`.
        domain: the expert that is to answer by default, ``all`` for all fused; None keeps what training reached.
        adapter: folder of a LoRA adapter to merge.
        card: returns the text of ``README.md``, which may be edited later, so the manifest leaves it out; None writes
            none.

    Returns:
        What was compared, in lines for people.

    Raises:
        UserError: if there is no such model or expert, the disk is full, or what was
            loaded is not what was written.
    """
    loaded = load_model(source, device="cpu", precision="fp32", adapter=adapter)
    text = None if card is None else card(loaded)
    weights = loaded.model.state_dict()
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    with files.atomic_folder(output, n_bytes + SMALL_FILES_BYTES, unlisted=(CARD,)) as folder:
        hf_folder.write_model_files(folder, loaded.model.config, loaded.tokenizer, loaded.choose_domain(domain))
        checkpoint.write_tensors(folder / WEIGHTS, hf_folder.module_names(weights))
        if text is not None:
            (folder / CARD).write_text(text, encoding="utf-8", newline="\n")
        return compare(folder, loaded)


def compare_own(folder: Path, loaded: Loaded) -> list[str]:
    """Load ``folder`` without `transformers`, by the names that the model has there, and compare the weights.

    Raises:
        UserError: if they differ.
    """
    expected, found = loaded.model.state_dict(), load_model(folder, device="cpu", precision="fp32")
    weights = found.model.state_dict()
    same = weights.keys() == expected.keys() and all(torch.equal(expected[name], weights[name]) for name in expected)
    if not same or found.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            "{folder} holds another model than was written; nothing was exported, please report this", folder=folder
        )
    return [Translatable("{count} weights and the tokenizer", count=len(expected))]
