"""LoRA adapters beside full training on the CPU: the memory of a process and tokens per second.

    python -m benchmarks.lora [--preset small] [--precision fp32] [--rank 16] [--result benchmarks/results/lora.json]

Each way runs in a process of its own, twice, in turns: all weights and adapters by this package's optimizer, as in
`mm-rec finetune` with and without `--lora`, and all weights and adapters by transformers with PEFT on all linear
layers, which needs PEFT. Memory is the most that the process had, less what it had before the model was made. Speed is
counted by the processor time of one thread, so that what else runs on the machine changes little.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_rec.bench.machine import describe_machine
from mm_rec.config import PRESETS
from mm_rec.machine.device import apply_precision
from mm_rec.model import MMRecModel
from mm_rec.optim import AdamW
from mm_rec.storage.adapter import LowRank
from mm_rec.training.lora import LoraAdamW

RESULT = Path(__file__).parent / "results" / "lora.json"
ROWS, LENGTH, STEPS, WARM_UP, ROUNDS = 1, 256, 8, 2, 2
Step = Callable[[], None]


def own_step(preset: str, precision: str, rank: int | None) -> tuple[Step, int]:
    """A training step of this package, with adapters if there is a rank; and how many numbers are trained."""
    model = MMRecModel(PRESETS[preset])
    apply_precision(model, precision)
    optimizer: AdamW
    if rank is None:
        optimizer = AdamW(model.named_parameters())
        trained = sum(parameter.numel() for parameter in model.parameters())
    else:
        optimizer = LoraAdamW(
            model.named_parameters(), rank=rank, alpha=2 * rank, seed=0, betas=(0.9, 0.95), weight_decay=0.1
        )
        trained = sum(one.down.numel() + one.up.numel() for one in map(_low_rank, optimizer.adapter().values()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(optimizer.trains(name))
    tokens = torch.randint(model.config.vocab_size, (ROWS, LENGTH))

    def step() -> None:
        output, _ = model(tokens, None, None, targets=tokens)
        output.loss.backward()
        optimizer.step(1e-4, 1.0)

    return step, trained


def _low_rank(one: tuple[Any, Any, float]) -> LowRank:
    return LowRank(*one)


def transformers_step(preset: str, precision: str, rank: int | None) -> tuple[Step, int]:
    """The same by transformers, PEFT and the AdamW of PyTorch."""
    from mm_rec.hf import MMRecConfig, MMRecForCausalLM

    model: nn.Module = MMRecForCausalLM(MMRecConfig(**PRESETS[preset].to_dict(), domain="all"))
    if rank is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)
    tokens = torch.randint(PRESETS[preset].vocab_size, (ROWS, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in learned)


WAYS: dict[str, tuple[Callable[[str, str, int | None], tuple[Step, int]], bool]] = {
    "mm-rec, all weights": (own_step, False),
    "mm-rec, adapters": (own_step, True),
    "transformers, all weights": (transformers_step, False),
    "transformers, adapters by PEFT": (transformers_step, True),
}


def resident(field: str) -> int:
    """Bytes that this process has (VmRSS) or at most had (VmHWM) in memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measure(way: str, preset: str, precision: str, rank: int) -> dict[str, Any]:
    """Memory and speed of one way, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, with_adapters = WAYS[way]
    if make is transformers_step:  # importing is not what is measured
        import mm_rec.hf  # noqa: F401

        if with_adapters:
            import peft  # noqa: F401
    before = resident("VmRSS")
    step, trained = make(preset, precision, rank if with_adapters else None)
    for _ in range(WARM_UP):
        step()
    start = time.process_time()
    for _ in range(STEPS):
        step()
    seconds = time.process_time() - start
    return {
        "trained_parameters": trained,
        "peak_bytes": resident("VmHWM") - before,
        "tokens_per_second": STEPS * ROWS * LENGTH / seconds,
    }


def main() -> None:
    """Measure each way in processes of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.preset, options.precision, options.rank)))
        return
    ways = [way for way in WAYS if not way.endswith("PEFT") or importlib.util.find_spec("peft")]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    settings = ["--preset", options.preset, "--precision", options.precision, "--rank", str(options.rank)]
    for _ in range(ROUNDS):
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.lora", "--way", way, *settings]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    results = {
        way: {name: round(statistics.median(one[name] for one in several)) for name in several[0]}
        for way, several in found.items()
    }
    for way, one in results.items():
        print(
            f"{way:31} {one['trained_parameters'] / 1e6:7.2f}M trained  {one['peak_bytes'] / 1e6:8.0f} MB "
            f"{one['tokens_per_second']:8,} tokens/s"
        )
    content = {
        "machine": describe_machine(),
        **{name: getattr(options, name) for name in ("preset", "precision", "rank")},
        "rows": ROWS,
        "tokens_of_a_row": LENGTH,
        "results": results,
    }
    options.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
