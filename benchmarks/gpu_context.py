"""A context of 100,000 tokens on one GPU: training and generation, and the memory that they take by length.

    python -m benchmarks.gpu_context [--lengths 10000 100000] [--result benchmarks/results/gpu_context.json]

Training reads one row of random tokens in chunks of 2,048, forward and backward, with the state carried, and makes one
optimizer step at its end. Generation reads the same row and then says 64 tokens one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops import machine
from mm_rec.config import PRESETS
from mm_rec.inference import decode
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.state import detach_state

RESULT = Path(__file__).parent / "results" / "gpu_context.json"
CHUNK, NEW_TOKENS = 2048, 64


def train(model: MMRecModel, optimizer: AdamW, tokens: Tensor) -> float:
    """Loss of a row, after one optimizer step on it."""
    length = tokens.shape[1] - 1
    state, losses = model.initial_state(1, "text"), []
    for first in range(0, length, CHUNK):
        part = slice(first, min(first + CHUNK, length))
        weight = torch.full((1, part.stop - part.start), 1 / length, device=tokens.device)
        targets = tokens[:, part.start + 1 : part.stop + 1]
        output, after = model(tokens[:, part], state, "text", targets=targets, weight=weight)
        output.loss.backward()
        optimizer.accumulate()
        losses.append(output.loss.detach())
        state = detach_state(after)
    optimizer.step(1e-4, 1.0)
    return float(torch.stack(losses).sum())


@torch.inference_mode()
def generate(model: MMRecModel, tokens: Tensor) -> tuple[float, float]:
    """Seconds to read a row, and for each token after it."""
    start, state = time.perf_counter(), model.initial_state(1, "text")
    for first in range(0, tokens.shape[1], CHUNK):
        _, state = model.features(tokens[:, first : first + CHUNK], state, "text")
    torch.cuda.synchronize()
    read = time.perf_counter() - start
    start, token = time.perf_counter(), tokens[:, -1]
    for _ in range(NEW_TOKENS):
        logits, state = decode.step(model, token, state, "text")
        token = logits.argmax(dim=-1)
    torch.cuda.synchronize()
    return read, (time.perf_counter() - start) / NEW_TOKENS


def measure(length: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = MMRecModel(PRESETS["100m"]).cuda()
    apply_precision(model, "bf16")
    optimizer = AdamW(model.named_parameters())
    tokens = torch.randint(model.config.vocab_size, (1, length + 1), device="cuda")
    train(model, optimizer, tokens[:, : 2 * CHUNK + 1])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = train(model, optimizer, tokens)
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    optimizer.zero_grad()
    generate(model, tokens[:, : 2 * CHUNK])
    torch.cuda.reset_peak_memory_stats()
    read, each = generate(model, tokens)
    return {
        "tokens": length,
        "loss": loss,
        "training tokens/s": length / seconds,
        "training peak GB": peak / 1e9,
        "reading tokens/s": length / read,
        "ms a new token": each * 1e3,
        "generation peak GB": torch.cuda.max_memory_allocated() / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--commit", help="of the code measured, where git does not know")
    arguments = parser.parse_args()
    rows = []
    for length in arguments.lengths:
        rows.append(measure(length))
        print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    found = {"machine": machine(arguments.commit), "chunk": CHUNK, "rows": rows}
    arguments.result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
