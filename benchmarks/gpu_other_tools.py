"""A folder for transformers in other people's tools on a device: does the model train, to which loss, how fast.

    python -m benchmarks.gpu_other_tools [--device cuda|cpu] [--preset small] [--result PATH]

Each trial loads a new model of a preset, and GPT-2 of the same width and depth as the control, and trains it on the
same rows: plain, autocast in bfloat16 and in float16 with a gradient scaler, weights in bfloat16, torch.compile,
Trainer with `bf16=True`, with `fp16=True` (on a GPU alone) and resumed half-way, LoRA by PEFT on all linear layers,
TRL's SFTTrainer, DPOTrainer and one step of its GRPOTrainer with their defaults, and `generate`. Some run on the
reference of each op in place of the kernels, too. It ends with status 1 if a trial fails or does not learn; the result
is written after each trial. Under five minutes on a GPU; `--device cpu` takes the smallest preset. Without PEFT or TRL
their trials are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import mm_rec.hf
from mm_rec import ops
from mm_rec.bench.machine import describe_machine
from mm_rec.config import PRESETS
from mm_rec.inference.export import compare_own, export
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import CONTROL_TOKENS, train_tokenizer

RESULT = Path(__file__).parent / "results" / "gpu_other_tools.json"
TEXTS = [path.read_text() for path in sorted(Path(mm_rec.__file__).parent.rglob("*.py"))]
STEPS, WARM_UP = 20, 4
RATE = 1e-3
TOOLS = ("transformers", "accelerate", "peft", "trl", "datasets")

Found = dict[str, Any]
Trial = Callable[[Path], Found]


def save_models(preset: str, root: Path) -> dict[str, Path]:
    """Export a new model of ours and save the control, both with one tokenizer; returns their folders by name."""
    tokenizer = train_tokenizer(TEXTS, PRESETS[preset].vocab_size)
    config = dataclasses.replace(PRESETS[preset], vocab_size=tokenizer.vocab_size)
    weights = MMRecModel(config, seed=0).state_dict()
    step = root / "step_000001"
    checkpoint.save(step, config=config, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer)
    ours, control = root / "mm_rec", root / "gpt2"
    export(step, ours, compare_own, domain="text")
    torch.manual_seed(0)
    sizes = {"n_embd": config.d_model, "n_layer": config.n_layers, "n_head": config.n_heads, "n_positions": 1024}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, **sizes, **ids)).save_pretrained(control)
    AutoTokenizer.from_pretrained(ours).save_pretrained(control)
    return {"mm_rec": ours, "gpt2": control}


def make_rows(vocabulary: int, rows: int, length: int) -> Tensor:
    """Rows that can be learned: each counts on from its first token."""
    first = torch.randint(vocabulary, (rows, 1), generator=torch.Generator().manual_seed(0))
    return (first + torch.arange(length)) % vocabulary


def train(model: nn.Module, rows: Tensor, *, autocast: torch.dtype | None = None, scaled: bool = False) -> Found:
    """Losses of the first and the last step, and tokens per second of those after the warm-up."""
    device = rows.device.type
    model.to(device).train()
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
    speed = rows.numel() * (STEPS - WARM_UP) / seconds
    return summary([float(loss) for loss in losses]) | {"tokens_per_second": round(speed)}


def summary(losses: list[float]) -> Found:
    """What the result file keeps of the losses of a trial."""
    return {
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "passes": losses[-1] < losses[0] - 0.02,
    }


def synchronize(device: str) -> None:
    """Wait for what the device still has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def settings_of_trainer(folder: str, rows: Tensor, **settings: Any) -> dict[str, Any]:
    """Settings that all trainers share; everything else is the trainer's default."""
    shared = {
        "output_dir": folder, "max_steps": STEPS, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": rows.device.type == "cpu",
    }  # fmt: skip
    return shared | settings


def logged_losses(trainer: Trainer) -> list[float]:
    """The loss of each step."""
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def train_by_trainer(folder: Path, rows: Tensor, **settings: Any) -> Found:
    """The same by Trainer."""
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(folder, rows, output, **settings)
        trainer.train()
    speed = next(one["train_steps_per_second"] for one in trainer.state.log_history if "train_runtime" in one)
    return summary(logged_losses(trainer)) | {"tokens_per_second": round(speed * rows.numel())}


def make_trainer(folder: Path, rows: Tensor, output: str, **settings: Any) -> Trainer:
    """A Trainer of a new model."""
    data = [{"input_ids": row, "labels": row} for row in rows.tolist()]
    settings = settings_of_trainer(output, rows, per_device_train_batch_size=len(rows), **settings)
    return Trainer(model=load(folder), args=TrainingArguments(**settings), train_dataset=data)


def resume_by_trainer(folder: Path, rows: Tensor) -> Found:
    """How far the losses are from those of a run that was never stopped, after a resume at half of the steps."""
    half = STEPS // 2
    with tempfile.TemporaryDirectory() as output:
        settings = {"bf16": True, "save_strategy": "steps", "save_steps": half}
        whole, again = (make_trainer(folder, rows, output, **settings) for _ in range(2))
        whole.train()
        again.train(resume_from_checkpoint=f"{output}/checkpoint-{half}")
    expected, found = logged_losses(whole), logged_losses(again)
    difference = max(abs(one - other) for one, other in zip(expected, found, strict=True))
    return summary(found) | {"largest_difference": difference, "passes": difference < 0.02}


def train_by_trl(folder: Path, rows: Tensor, kind: str, steps: int = STEPS) -> Found:
    """SFT or DPO by TRL on conversations about this package's own code."""
    trl, datasets = map(importlib.import_module, ("trl", "datasets"))
    prompt = [{"role": "user", "content": "Write a module."}]
    answers = [[{"role": "assistant", "content": text[: 2 * rows.shape[1]]}] for text in TEXTS[:64]]
    rejected = [{"role": "assistant", "content": "No."}]
    if kind == "SFT":
        data = [{"messages": prompt + answer} for answer in answers]
    else:
        data = [{"prompt": prompt, "chosen": answer, "rejected": rejected} for answer in answers]
    with tempfile.TemporaryDirectory() as output:
        arguments = getattr(trl, f"{kind}Config")(**settings_of_trainer(output, rows, max_steps=steps))
        make = getattr(trl, f"{kind}Trainer")
        trainer = make(model=str(folder), args=arguments, train_dataset=datasets.Dataset.from_list(data))
        trainer.train()
    return summary(logged_losses(trainer)) | {"bf16": arguments.bf16, "steps": steps}


def step_by_grpo(folder: Path, rows: Tensor) -> Found:
    """One step of TRL's GRPOTrainer, after which the weights are others and finite."""
    trl, datasets = map(importlib.import_module, ("trl", "datasets"))

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as output:
        settings = settings_of_trainer(output, rows, max_steps=1, max_completion_length=16)
        data = datasets.Dataset.from_list([{"prompt": "import"}] * 8)
        trainer = trl.GRPOTrainer(
            model=str(folder), reward_funcs=reward, args=trl.GRPOConfig(**settings), train_dataset=data
        )
        trainer.train()
    before = load(folder).get_input_embeddings().weight
    change = (trainer.model.get_input_embeddings().weight.float().cpu() - before).norm().item()
    return {"change_of_embedding": change, "passes": 0 < change < float("inf")}


def generate(folder: Path, rows: Tensor) -> Found:
    """Tokens per second of `generate` with sampling, of rows padded at the left; no control token may be drawn."""
    model = load(folder, dtype=torch.bfloat16).to(rows.device).eval()
    prompts, mask = rows[:, :32], torch.ones_like(rows[:, :32])
    mask[0, :9] = 0
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": True}
    model.generate(input_ids=prompts, attention_mask=mask, **settings | {"max_new_tokens": 4, "min_new_tokens": 4})
    synchronize(rows.device.type)
    start = time.perf_counter()
    drawn = model.generate(input_ids=prompts, attention_mask=mask, **settings)[:, 32:]
    synchronize(rows.device.type)
    speed = drawn.numel() / (time.perf_counter() - start)
    ours = folder.name == "mm_rec"
    passes = drawn.shape[1] == 64 and not (ours and bool((drawn < len(CONTROL_TOKENS)).any()))
    return {"tokens_per_second": round(speed), "passes": passes}


def load(folder: Path, **settings: Any) -> Any:
    """A new model, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def on_reference(trial: Trial) -> Trial:
    """``trial`` with the reference of each op in place of its kernels."""

    def run(folder: Path) -> Found:
        with ops.use_backend("reference"):
            return trial(folder)

    return run


def trials(rows: Tensor, name: str) -> Iterator[tuple[str, Trial]]:
    """Name and function of every trial of the model ``name``."""
    half, ours = torch.bfloat16, name == "mm_rec"
    yield "float32", lambda folder: train(load(folder), rows)
    yield "autocast bfloat16", lambda folder: train(load(folder), rows, autocast=half)
    yield "autocast float16", lambda folder: train(load(folder), rows, autocast=torch.float16, scaled=True)
    yield "weights in bfloat16", lambda folder: train(load(folder, dtype=half), rows)
    yield "Trainer bf16", lambda folder: train_by_trainer(folder, rows, bf16=True)
    yield "Trainer bf16, resumed", lambda folder: resume_by_trainer(folder, rows)
    if rows.device.type == "cuda":
        yield "Trainer fp16", lambda folder: train_by_trainer(folder, rows, fp16=True)
    if importlib.util.find_spec("peft"):
        yield "LoRA, autocast bfloat16", lambda folder: train(adapted(load(folder)), rows, autocast=half)
    yield "generate", lambda folder: generate(folder, rows)
    if importlib.util.find_spec("trl"):
        yield "SFTTrainer", lambda folder: train_by_trl(folder, rows, "SFT")
        yield "DPOTrainer", lambda folder: train_by_trl(folder, rows, "DPO")
        yield "GRPOTrainer, one step", lambda folder: step_by_grpo(folder, rows)
    yield "compiled, autocast bfloat16", lambda folder: train(compiled(load(folder)), rows, autocast=half)
    if ours:
        yield "reference, autocast bfloat16", on_reference(lambda folder: train(load(folder), rows, autocast=half))
        if importlib.util.find_spec("trl"):
            yield "reference, SFTTrainer", on_reference(lambda folder: train_by_trl(folder, rows, "SFT", steps=5))
            yield "reference, DPOTrainer", on_reference(lambda folder: train_by_trl(folder, rows, "DPO", steps=5))


def compiled(model: nn.Module) -> nn.Module:
    """``model`` as torch.compile makes it; anew, whatever was compiled before."""
    torch._dynamo.reset()
    return cast(nn.Module, torch.compile(model))


def adapted(model: nn.Module) -> nn.Module:
    """``model`` with LoRA adapters of rank 16 on all linear layers."""
    peft = importlib.import_module("peft")
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return cast(nn.Module, peft.get_peft_model(model, settings))


def run(name: str, trial: Trial, folder: Path, device: str) -> Found:
    """The result of a trial, with its seconds and the memory that it took; an error is a result too."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        found = trial(folder)
    except Exception as error:  # the next trial tells more than a traceback
        found = {"error": f"{type(error).__name__}: {error}"[:500], "passes": False}
    found |= {"seconds": round(time.perf_counter() - start, 1)}
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return {"trial": name, **found}


def versions() -> dict[str, str]:
    """The version of each tool that is installed."""
    return {name: importlib.metadata.version(name) for name in TOOLS if importlib.util.find_spec(name)}


def main() -> int:
    """Run all trials and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="small on a GPU, tiny on a CPU")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    preset = options.preset or ("small" if options.device == "cuda" else "tiny")
    rows, length = (16, 512) if options.device == "cuda" else (4, 48)
    with torch.device(options.device):
        machine = describe_machine()
    results: dict[str, list[Found]] = {}
    content = {"machine": machine, "tools": versions(), "preset": preset, "rows": rows, "tokens_of_a_row": length}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for model, folder in save_models(preset, Path(root)).items():
            batch = make_rows(load(folder).config.vocab_size, rows, length).to(options.device)
            for name, trial in trials(batch, model):
                with contextlib.redirect_stdout(None):
                    found = run(name, trial, folder, options.device)
                results.setdefault(model, []).append(found)
                print(f"{model:7} {json.dumps(found)}", flush=True)
                options.result.write_text(json.dumps(content | {"results": results}, indent=1) + "\n")
    return 0 if all(one["passes"] for found in results.values() for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
