"""What a run will take: memory before it is taken, disk before it is filled, time before it is spent."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from mm_rec.blocks.mm_rec_block import MMRecBlock
from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.model import MMRecModel
from mm_rec.optim import ELEMENTS_AT_ONCE, is_orthogonalized
from mm_rec.storage.files import format_bytes, free_bytes
from mm_rec.translation import Translatable

__all__ = [
    "check_disk",
    "check_memory",
    "checkpoint_bytes",
    "count_orthogonalized",
    "count_parameters",
    "measure_activations",
    "measure_checkpointed",
    "memory_remedy",
    "sharded_bytes",
    "tokens_that_fit",
    "training_bytes",
    "with_margin",
]

PROBE_TOKENS = 256
FEWEST_TOKENS = 64
"""Tokens of a sequence that advice does not go below."""
MARGIN = 1.15
"""Over the sum of what is known: buffers of the libraries, fragmentation."""
FIXED_BYTES = 300_000_000
"""What threads, libraries and the tokenizer take on top, whatever the model."""


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters of a model, counted on one without values the first time."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MMRecModel(config).parameters())


@functools.cache
def count_orthogonalized(config: ModelConfig) -> int:
    """Returns the number of parameters whose updates are orthogonalised where Muon is used."""
    with torch.device("meta"):
        named = MMRecModel(config).named_parameters()
        return sum(parameter.numel() for name, parameter in named if is_orthogonalized(name))


def training_bytes(
    parameters: int, precision: str, *, orthogonalized: int = 0, replicated: bool = False, lora: bool = False
) -> int:
    """Bytes that weights, gradients and the optimizer's state take.

    Float32 takes 4 for the weight, 4 for the gradient and 8 for the moments; bfloat16 takes 2, 2 and 8, and
    4 each for the master weight and the widened gradient. The parameters that are ``orthogonalized`` have one moment;
    those that are updated at a time also have a direction in bfloat16 and, on GPUs, the gradient in float32. Where the
    model is ``replicated``, whole in each of several processes, the message by which they average gradients takes 4.
    Where ``lora`` adapters are trained, there are the weight, its gradient and in float32 the weight that the adapters
    change.
    """
    if lora:
        return parameters * (8 if precision == "bf16" else 12)
    each = (20 if precision == "bf16" else 16) + (4 if replicated else 0)
    return parameters * each - 4 * orthogonalized + 6 * min(orthogonalized, ELEMENTS_AT_ONCE)


def sharded_bytes(config: ModelConfig, precision: str, processes: int, *, muon: bool = False) -> int:
    """Bytes that a process takes of what :func:`training_bytes` counts, if FSDP spreads it over all processes.

    On top of its part it has two units (blocks, or the embedding) whole at a time, each with its gradient. With Muon an
    update has in their place as many whole matrices as there are processes.
    """
    with torch.device("meta"):
        model = MMRecModel(config)
    sizes = [sum(p.numel() for p in one.parameters()) for one in model.modules() if isinstance(one, MMRecBlock)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    largest = max(*sizes, parameters - sum(sizes))
    orthogonalized = count_orthogonalized(config) if muon else 0
    own = training_bytes(parameters, precision, orthogonalized=orthogonalized) // processes
    return own + 4 * largest * (2 if precision == "bf16" else 4)


def checkpoint_bytes(parameters: int, orthogonalized: int = 0) -> int:
    """Bytes of a checkpoint: weights and two moments in float32, and a tokenizer of a few megabytes.

    The parameters that are ``orthogonalized`` have one moment.
    """
    return 12 * parameters - 4 * orthogonalized + 4_000_000


def measure_activations(model: MMRecModel, domain: str | None) -> float:
    """Returns the bytes that autograd keeps for the backward pass, per token of a micro-batch.

    They are counted in a short forward pass, in which everything grows with the tokens.
    """
    return _saved_bytes(model, domain, checkpointing=False) / PROBE_TOKENS


def measure_checkpointed(model: MMRecModel, domain: str | None, plain: float) -> float:
    """Returns what :func:`measure_activations` counts (``plain``) with gradient checkpointing.

    The block that is run again in the backward pass is included. The first checkpointed pass of a process imports
    PyTorch's compiler, which takes two seconds.
    """
    boundaries = _saved_bytes(model, domain, checkpointing=True) / PROBE_TOKENS
    one_block = (plain - boundaries) / (model.config.n_layers * (1 if domain else len(model.config.experts)))
    return boundaries + max(one_block, 0)


def _saved_bytes(model: MMRecModel, domain: str | None, *, checkpointing: bool) -> int:
    """Bytes of the distinct storages that a forward pass over PROBE_TOKENS tokens keeps for its backward."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # By their type, not by where they are: parameters of a sharded model are put together anew in each pass.
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own node keeps would keep that node, and so itself, for ever

    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=model.embedding.weight.device)
    before, model.gradient_checkpointing = model.gradient_checkpointing, checkpointing
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, _ = model(ids, None, domain, targets=ids)
    finally:
        model.gradient_checkpointing = before
    total = sum(sizes.values())
    del output
    return total


def check_memory(needed: int, available: int, remedy: str) -> None:
    """Refuse a run that does not fit.

    Raises:
        UserError: naming what is needed, what there is and the remedy.
    """
    if needed > available:
        raise UserError(
            "training would take {needed} of memory and {available} are free; {remedy}",
            needed=format_bytes(needed),
            available=format_bytes(available),
            remedy=remedy,
        )


def memory_remedy(batch_size: int, seq_len: int, most_tokens: int | None = None) -> str:
    """What to change when the activations don't fit.

    Args:
        batch_size, seq_len: what was asked for.
        most_tokens: tokens of a micro-batch that would fit with gradient checkpointing; None if that is not known, and
            half of what was asked for is the advice.
    """
    if most_tokens is not None and most_tokens < FEWEST_TOKENS:
        return Translatable("not even a short sequence fits, so try a smaller --preset or a machine with more memory")
    smaller = []
    rows = batch_size // 2 if most_tokens is None else min(batch_size // 2, most_tokens // seq_len)
    if batch_size > 1:
        smaller.append(f"--batch_size {max(rows, 1)}")
    if seq_len > FEWEST_TOKENS and (most_tokens is None or rows < 1):
        length = seq_len // 2 if most_tokens is None else min(seq_len // 2, most_tokens)
        smaller.append(f"--seq_len {length}")
    flags = ", ".join([*smaller, "--gradient_checkpointing on"])
    return Translatable("try {flags} or a smaller --preset", flags=flags)


def tokens_that_fit(training: int, checkpointed: float, available: int) -> int:
    """Returns how many tokens of a micro-batch fit, by the bytes of :func:`with_margin`; negative if none does."""
    return math.floor(((available - FIXED_BYTES) / MARGIN - training) / checkpointed)


def with_margin(training: int, activations: float) -> int:
    """Bytes to expect in all of training on top of what the process has now."""
    return round((training + activations) * MARGIN) + FIXED_BYTES


def check_disk(folder: Path, checkpoint: int, keep: int, existing: int) -> None:
    """Refuse a run whose checkpoints would fill the disk: those kept, the best by validation, one being written.

    Args:
        folder: where they go; need not exist yet.
        checkpoint: bytes of one.
        keep: how many are kept.
        existing: how many are there already.
    """
    needed = checkpoint * max(1, keep + 2 - existing)
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            "checkpoints would take {needed} in {folder} and {free} are free; try "
            "--keep_checkpoints 1, another --checkpoint_dir, or free some space",
            needed=format_bytes(needed),
            folder=folder,
            free=format_bytes(free),
        )
