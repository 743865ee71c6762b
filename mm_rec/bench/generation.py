"""Tokens a second in generation, one sequence, after a context of given length; GPT-2 with its cache beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_rec.bench.peers import gpt2_110m
from mm_rec.bench.timing import Action, median_seconds
from mm_rec.config import ModelConfig
from mm_rec.inference import decode
from mm_rec.inference.quantize import pack_matrices
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel

__all__ = ["compare_generation"]

STEPS = 16
"""Tokens of one timing."""


def compare_generation(
    config: ModelConfig, precision: str, context: int, rounds: int, *, peers: bool
) -> dict[str, float]:
    """Tokens a second of MM-Rec (one domain), and of GPT-2 with ``peers``, taking turns of a few tokens each."""
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, context), generator=generator, device="cpu")
    ids = ids.to(torch.get_default_device())
    actions = {"MM-Rec, one domain": _mm_rec(config, precision, ids)}
    if peers:
        actions["GPT-2 110M (transformers)"] = _gpt2(precision, ids)
    with torch.inference_mode():
        seconds = median_seconds(actions, rounds)
    return {name: STEPS / value for name, value in seconds.items()}


def _mm_rec(config: ModelConfig, precision: str, ids: Tensor) -> Action:
    with torch.device("cpu"):
        model = MMRecModel(config)
    model.to(ids.device)
    apply_precision(model, precision)
    pack_matrices(model)
    domain = config.experts[0]
    state = model.initial_state(1, domain)
    with torch.inference_mode():
        for piece in ids.split(512, dim=1):
            logits, state = model(piece, state, domain)
        token = logits[:, -1].argmax(dim=-1)

    def generate() -> None:
        nonlocal token, state
        for _ in range(STEPS):
            logits, state = decode.step(model, token, state, domain)
            token = logits.argmax(dim=-1)

    return generate


@torch.inference_mode()
def _gpt2(precision: str, ids: Tensor) -> Action:
    model = gpt2_110m(positions=ids.shape[1] + 4096).eval()
    if precision == "bf16":
        model = model.bfloat16()
    first = model(ids, use_cache=True, logits_to_keep=1)
    token, cache = first.logits[:, -1].argmax(dim=-1), first.past_key_values

    def generate() -> None:
        nonlocal token, cache
        for _ in range(STEPS):
            output: Any = model(token[:, None], past_key_values=cache, use_cache=True)
            token, cache = output.logits[:, -1].argmax(dim=-1), output.past_key_values

    return generate
