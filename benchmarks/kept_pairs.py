"""Runs another module with models whose long-term memory is a few exact pairs in place of a matrix, for comparison.

    python -m benchmarks.kept_pairs --pairs 128 mm_rec.cli train --preset 100m ...
    python -m benchmarks.kept_pairs --pairs 128 benchmarks.recall trained --model RUN ...

Each head keeps the keys and values of those tokens that it scores highest among all that have left the window, and one
softmax reads window and kept pairs together. A score is a product of the token's features (the rows of ``memory_gates``
that say how much a matrix would be written); log sigmoid of it is added where the pair is read, and so it is learned.
It is plain PyTorch and looks after the pairs every 64 tokens: right for training and evaluation on any device, but not
for the native call that generates a token on the CPU.
"""

from __future__ import annotations

import argparse
import math
import runpy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mm_rec.model
import mm_rec.state
from mm_rec import ops
from mm_rec.blocks.mm_rec_block import MMRecBlock
from mm_rec.ops import reference
from mm_rec.state import BlockState, MemoryState, ModelState

CHUNK = 64
NOWHERE = -1e9  # place of a pair that is none
OF_AN_OLDER_DOCUMENT = 1e6  # less than every score of the document that is read

_pairs = 128
_initial_state = mm_rec.state.initial_state


def initial_state(config: Any, batch_size: int, experts: tuple[str, ...], **options: Any) -> ModelState:
    """Stands in for :func:`mm_rec.state.initial_state`.

    In place of the matrix there is (B, H, K + W, 2 d + 2): K pairs, each key, value, score and place (counted from the
    next token, so below -W; 0 for none), and the scores of the tokens in the window.
    """
    state = _initial_state(config, batch_size, experts, **options)

    def block(one: BlockState) -> BlockState:
        if one.memory is None:
            return one
        rows, heads, d, _ = one.memory.matrix.shape
        kept = one.memory.matrix.new_zeros(rows, heads, _pairs + config.window, 2 * d + 2)
        return BlockState(one.h, one.memory._replace(matrix=kept))

    return ModelState(state.position, {name: [block(one) for one in blocks] for name, blocks in state.experts.items()})


def attention(self: MMRecBlock, n: Tensor, position: Tensor, memory: MemoryState) -> tuple[Tensor, MemoryState]:
    """Stands in for :meth:`MMRecBlock._attention`."""
    config = self.config
    rows, time, width = n.shape
    window, heads, d = config.window, config.n_heads, config.head_dim
    q, own, v = ops.memory_context(ops.linear(n, self.qkv_proj), memory.own, memory.v)
    key = ops.delta_keys(own, self.key_taps, position)
    k = torch.cat([memory.k, key], dim=1)
    score = (ops.linear(n, self.memory_gates[:heads]).float() + self.memory_gate_bias[:heads]).transpose(1, 2)
    # All that may be read: the pairs of the state, the window before the chunk, the chunk. Places count from its start.
    stored = memory.matrix
    here = torch.arange(-window, time, device=n.device)
    stored_places = stored[:, :, :_pairs, -1]
    stored_places = stored_places.masked_fill(stored_places == 0, NOWHERE)
    places = torch.cat([stored_places, here.expand(rows, heads, -1)], dim=-1)  # (B, H, K + W + T)
    scores = torch.cat([stored[..., -2], score], dim=-1)
    keys = torch.cat([stored[:, :, :_pairs, :d], k.float().transpose(1, 2)], dim=2)
    values = torch.cat([stored[:, :, :_pairs, d : 2 * d], v.float().transpose(1, 2)], dim=2)
    begin = torch.arange(time, device=n.device) - position  # place of the first token of each token's document

    out = _read(q, places, scores, keys, values, begin, window, config.rotary_base)
    last = torch.full((1,), time - 1 - window, device=n.device)
    _, chosen = _best(places, scores, begin[:, -1:], last)
    index = chosen[:, :, 0]
    picked = [_pick(keys, index), _pick(values, index), _pick(scores[..., None], index)]
    kept = torch.cat([*picked, _pick(places[..., None].float() - time, index)], dim=-1)
    ring = F.pad(scores[..., -window:, None], (2 * d, 1))
    state = MemoryState(k[:, -window:], v[:, -window:], own[:, time:], torch.cat([kept, ring], dim=2).detach())
    return ops.linear(out.to(n.dtype).reshape(rows, time, width), self.attention_out), state


def _best(places: Tensor, scores: Tensor, begin: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of highest score at C moments: their scores and their index, (B, H, C, K); -inf for none.

    Args:
        places, scores: (B, H, N) of all that there is.
        begin: (B, C), where the document that is read begins; what is older comes last.
        last: (C), the last place that may be kept.
    """
    rank = scores.detach()[:, :, None] - OF_AN_OLDER_DOCUMENT * (places[:, :, None] < begin[:, None, :, None])
    rank = rank.masked_fill(places[:, :, None] > last[:, None], -math.inf)
    best, index = rank.topk(_pairs, dim=-1)
    return best, index


def _read(
    q: Tensor, places: Tensor, scores: Tensor, keys: Tensor, values: Tensor, begin: Tensor, window: int, base: float
) -> Tensor:
    """What T queries read from window and kept pairs, (B, T, H, d) float32."""
    rows, time, heads, d = q.shape
    chunks = -(-time // CHUNK)
    pad = chunks * CHUNK - time
    place = torch.arange(chunks * CHUNK, device=q.device).view(chunks, CHUNK)
    begin = F.pad(begin, (0, pad), value=time).view(rows, 1, chunks, CHUNK, 1)
    q = F.pad(q.float(), (0, 0, 0, 0, 0, pad)).transpose(1, 2)  # (B, H, T, d)

    def rotated(x: Tensor, first: int) -> Tensor:
        spots = torch.arange(first, first + x.shape[2], device=x.device)
        return reference.rotate(x.transpose(1, 2), spots, base).transpose(1, 2)

    def by_chunk(x: Tensor) -> Tensor:
        """The window and the chunk of each chunk, (B, H, chunks, W + C, d)."""
        return F.pad(x, (0, 0, 0, pad)).unfold(2, window + CHUNK, CHUNK).transpose(-1, -2)

    near_places = torch.arange(-window, CHUNK, device=q.device) + CHUNK * torch.arange(chunks, device=q.device)[:, None]
    near_places = near_places[:, None]  # (chunks, 1, W + C)
    seen = (near_places <= place[..., None]) & (near_places > place[..., None] - window) & (near_places >= begin)
    asked = rotated(q, 0).view(rows, heads, chunks, CHUNK, d)
    near = asked @ by_chunk(rotated(keys[:, :, _pairs:], -window)).transpose(-1, -2)
    last = place[:, -1] - window
    best, index = _best(places, scores, begin[:, 0, :, -1, 0], last)
    flat = index.flatten(2)

    def chosen(x: Tensor) -> Tensor:
        return _pick(x, flat).view(rows, heads, chunks, _pairs, -1)

    far_places = _pick(places[..., None], flat).view(rows, heads, chunks, 1, _pairs)
    read = (far_places <= place[..., None] - window) & (far_places >= begin) & (best[:, :, :, None] > -math.inf)
    far = q.view(rows, heads, chunks, CHUNK, d) @ chosen(keys).transpose(-1, -2)
    far = far + F.logsigmoid(chosen(scores[..., None])).transpose(-1, -2)
    logits = torch.cat([near.masked_fill(~seen, -math.inf), far.masked_fill(~read, -math.inf)], dim=-1)
    near_weight, far_weight = logits.softmax(-1).nan_to_num().split([window + CHUNK, _pairs], dim=-1)
    out: Tensor = near_weight @ by_chunk(values[:, :, _pairs:]) + far_weight @ chosen(values)
    return out.view(rows, heads, chunks * CHUNK, d)[:, :, :time].transpose(1, 2)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, H, M, n) of x (B, H, N, n)."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def install(pairs: int) -> None:
    """Let all models keep so many pairs a head."""
    global _pairs
    _pairs = pairs
    MMRecBlock._attention = attention  # type: ignore[method-assign]
    mm_rec.state.initial_state = initial_state
    mm_rec.model.initial_state = initial_state  # type: ignore[attr-defined]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=_pairs, help="of each head")
    parser.add_argument("module", help="to run, with all that follows")
    options, rest = parser.parse_known_args()
    install(options.pairs)
    sys.argv = [options.module, *rest]
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)
