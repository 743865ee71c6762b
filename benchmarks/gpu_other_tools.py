"""The model of transformers in other people's tools on a device: does it train, to which loss, how fast.

    python -m benchmarks.gpu_other_tools [--device cuda|cpu] [--preset small] [--result PATH]

Each trial runs a new model of a preset and GPT-2 of the same width and depth on the same rows: plain, autocast in
bfloat16 and in float16 with a gradient scaler, weights in bfloat16, torch.compile, Trainer with `bf16=True` and with
`fp16=True` (the latter on a GPU alone), and LoRA by PEFT on all linear layers where PEFT is installed. It ends with
status 1 if a trial fails or does not learn. Under five minutes on a GPU; `--device cpu` takes the smallest preset.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from mm_rec.bench.machine import describe_machine
from mm_rec.config import PRESETS
from mm_rec.hf import MMRecConfig, MMRecForCausalLM

RESULT = Path(__file__).parent / "results" / "gpu_other_tools.json"
STEPS, WARM_UP = 20, 4
RATE = 1e-3

Make = Callable[[], nn.Module]


def makers(preset: str) -> dict[str, Make]:
    """A new model of ours and the control, by name."""
    config = PRESETS[preset]

    def ours() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = MMRecForCausalLM(MMRecConfig(**config.to_dict(), domain="text"))
        return model

    def control() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"n_embd": config.d_model, "n_layer": config.n_layers, "n_head": config.n_heads, "n_positions": 1024}
        model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, **sizes))
        return model

    return {"mm_rec": ours, "gpt2": control}


def make_rows(vocabulary: int, rows: int, length: int) -> Tensor:
    """Rows that can be learned: each counts on from its first token."""
    first = torch.randint(vocabulary, (rows, 1), generator=torch.Generator().manual_seed(0))
    return (first + torch.arange(length)) % vocabulary


def train(model: nn.Module, rows: Tensor, *, autocast: torch.dtype | None = None, scaled: bool = False) -> Any:
    """Losses of the first and the last step, and tokens per second of those after the warm-up."""
    device = rows.device.type
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    scaler = torch.amp.GradScaler(device, enabled=scaled)
    losses, start = [], 0.0
    for step in range(STEPS):
        if step == WARM_UP:
            synchronize(device)
            start = time.perf_counter()
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(input_ids=rows, labels=rows).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    synchronize(device)
    seconds = time.perf_counter() - start
    return summary([float(loss) for loss in losses], rows.numel() * (STEPS - WARM_UP) / seconds)


def summary(losses: list[float], speed: float) -> dict[str, float | bool]:
    """What the result file keeps of a trial."""
    return {
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "learns": losses[-1] < losses[0] - 0.02,
        "tokens_per_second": round(speed),
    }


def synchronize(device: str) -> None:
    """Wait for what the device still has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def train_by_trainer(model: nn.Module, rows: Tensor, **settings: Any) -> Any:
    """The same by Trainer."""
    data = [{"input_ids": row, "labels": row} for row in rows.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=len(rows), learning_rate=RATE, report_to="none",
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True,
            use_cpu=rows.device.type == "cpu", **settings,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    speed = next(one["train_steps_per_second"] for one in trainer.state.log_history if "train_runtime" in one)
    return summary(losses, speed * rows.numel())


def trials(rows: Tensor) -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
    """Name and function of every trial."""
    yield "float32", lambda model: train(model, rows)
    yield "autocast bfloat16", lambda model: train(model, rows, autocast=torch.bfloat16)
    yield "autocast float16", lambda model: train(model, rows, autocast=torch.float16, scaled=True)
    yield "weights in bfloat16", lambda model: train(model.to(torch.bfloat16), rows)
    yield "compiled, autocast bfloat16", lambda model: train(compiled(model), rows, autocast=torch.bfloat16)
    yield "Trainer bf16", lambda model: train_by_trainer(model, rows, bf16=True)
    if rows.device.type == "cuda":
        yield "Trainer fp16", lambda model: train_by_trainer(model, rows, fp16=True)
    if importlib.util.find_spec("peft"):
        yield "LoRA, autocast bfloat16", lambda model: train(adapted(model), rows, autocast=torch.bfloat16)


def compiled(model: nn.Module) -> nn.Module:
    """``model`` as torch.compile makes it; anew, whatever was compiled before."""
    torch._dynamo.reset()
    result: Any = torch.compile(model)
    return cast(nn.Module, result)


def adapted(model: nn.Module) -> nn.Module:
    """``model`` with LoRA adapters of rank 16 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    result: nn.Module = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return result


def run(name: str, trial: Callable[[nn.Module], Any], make: Make, device: str) -> dict[str, Any]:
    """The result of a trial on a new model, with the memory that it took; an error is a result too."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = dict(trial(make().to(device)))
    except Exception as error:  # the next trial tells more than a traceback
        return {"trial": name, "error": f"{type(error).__name__}: {error}"[:500], "learns": False}
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return {"trial": name, **found}


def main() -> int:
    """Run all trials and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="small on a GPU, tiny on a CPU")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    preset = options.preset or ("small" if options.device == "cuda" else "tiny")
    rows, length = (16, 512) if options.device == "cuda" else (4, 48)
    batch = make_rows(PRESETS[preset].vocab_size, rows, length).to(options.device)
    results: dict[str, list[dict[str, Any]]] = {}
    for model, make in makers(preset).items():
        for name, trial in trials(batch):
            with contextlib.redirect_stdout(None):
                found = run(name, trial, make, options.device)
            results.setdefault(model, []).append(found)
            print(f"{model:7} {json.dumps(found)}", flush=True)
    with torch.device(options.device):
        machine = describe_machine()
    content = {"machine": machine, "preset": preset, "rows": rows, "tokens_of_a_row": length, "results": results}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(one["learns"] for found in results.values() for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
