"""Trainer, TRL and accelerate as their own documentation shows them, with GPT-2 of the same size as the control."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import mm_rec.hf  # noqa: F401 (registers the model)
from mm_rec import ops

Rows = list[dict[str, list[int]]]
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def make_trainer(folder: Path, output: Path, rows: Rows, **settings: Any) -> Trainer:
    values = {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **QUIET}
    arguments = TrainingArguments(str(output), **values | settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8])


def test_trainer_goes_on_as_if_never_stopped(folder: Path, rows: Rows, tmp_path: Path) -> None:
    whole = make_trainer(folder, tmp_path, rows)
    whole.train()
    again = make_trainer(folder, tmp_path, rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0] - 0.1


def test_trainer_keeps_the_best_model(folder: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(
        folder, tmp_path, rows, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,  # so the first is the best
    )  # fmt: skip
    trainer.train()
    scores = {one["step"]: one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one}
    assert scores[3] > scores[6] + 0.01
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[3], abs=1e-5)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_loss_and_gradients_of_full_precision(
    folder: Path, rows: Rows, backend: str, dtype: torch.dtype
) -> None:
    ids = torch.tensor([row["input_ids"] for row in rows[:4]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {}
    with ops.use_backend(backend):
        for enabled in (False, True):
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            assert all(one.dtype == torch.float32 for one in gradients)
            found[enabled] = loss.item(), torch.cat(gradients)
            model.zero_grad()
    assert found[True][0] == pytest.approx(found[False][0], abs=2e-2)
    assert torch.cosine_similarity(found[True][1], found[False][1], dim=0) > 0.99


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_trainer_in_bf16_learns(folder: Path, rows: Rows, tmp_path: Path, backend: str) -> None:
    with ops.use_backend(backend):
        trainer = make_trainer(folder, tmp_path, rows, bf16=True, save_strategy="no", gradient_checkpointing=True)
        trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert next(trainer.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_generate(folder: Path, dtype: torch.dtype) -> None:
    whole, half = (AutoModelForCausalLM.from_pretrained(folder, dtype=one) for one in (torch.float32, dtype))
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        expected, found = whole(ids).logits, half(ids).logits
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.02)
    assert half.generate(ids, max_new_tokens=4, eos_token_id=None, do_sample=False).shape == (1, 34)


def test_noise_on_the_embedding_acts(folder: Path, rows: Rows, tmp_path: Path) -> None:
    def first_loss(**settings: Any) -> float:
        trainer = make_trainer(folder, tmp_path, rows, max_steps=1, save_strategy="no", **settings)
        trainer.train()
        return losses(trainer)[0]

    quiet, again, noisy = first_loss(), first_loss(), first_loss(neftune_noise_alpha=50)
    assert quiet == again
    assert noisy != quiet


def test_the_model_compiles(folder: Path, rows: Rows) -> None:
    ids = torch.tensor([row["input_ids"] for row in rows[:2]])
    model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False)
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=folder.name == "exported")  # GPT-2 logs inside
    compiled(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


# --- TRL, with its defaults: bf16 and gradient checkpointing on -------------------------------------------------------

ANSWERS = [{"role": "assistant", "content": "Light is what the sun sends."}]
QUESTIONS = [{"role": "user", "content": "What is light?"}]


def test_sft_trainer_learns_and_saves_a_model(folder: Path, tmp_path: Path) -> None:
    trainer = trl.SFTTrainer(
        model=str(folder),
        args=trl.SFTConfig(str(tmp_path), max_steps=4, learning_rate=1e-2, save_strategy="no", **QUIET),
        train_dataset=datasets.Dataset.from_list([{"messages": QUESTIONS + ANSWERS}] * 16),
    )
    assert trainer.args.bf16
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()(ids).logits
        torch.testing.assert_close(again, trainer.model.eval().to("cpu")(ids).logits.float(), rtol=0.1, atol=0.1)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) <= 512


def test_dpo_trainer_learns(folder: Path, tmp_path: Path) -> None:
    rejected = [{"role": "assistant", "content": "No."}]
    trainer = trl.DPOTrainer(
        model=str(folder),
        args=trl.DPOConfig(str(tmp_path), max_steps=3, learning_rate=1e-2, save_strategy="no", **QUIET),
        train_dataset=datasets.Dataset.from_list([{"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": rejected}] * 16),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(trainer)[-1] < 0.69


def test_grpo_trainer_takes_a_step(folder: Path, tmp_path: Path) -> None:
    seen = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(token for ids in completion_ids for token in ids)
        return [float(sum(ids)) for ids in completion_ids]

    before = AutoModelForCausalLM.from_pretrained(folder)
    trainer = trl.GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            str(tmp_path), max_steps=1, max_completion_length=8, num_generations=4, per_device_train_batch_size=4,
            learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no", **QUIET,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "What is"}] * 4),
    )  # fmt: skip
    trainer.train()
    assert seen
    old, new = before.get_input_embeddings().weight, trainer.model.get_input_embeddings().weight
    assert not torch.equal(old, new)


# --- accelerate -------------------------------------------------------------------------------------------------------

ACCELERATE_SCRIPT = """
import sys, torch
import mm_rec.hf
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

accelerator = Accelerator(cpu=True)
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = torch.randint(10, 300, (32, 24), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    sums = accelerator.gather(plain.get_input_embeddings().weight.sum().detach()[None]).tolist()
    if accelerator.is_main_process:
        with open(sys.argv[1], "a") as file:
            print(accelerator.num_processes, len(loader), *sums, file=file)
"""


def test_accelerate_launch_trains_on_two_processes(exported: Path, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ACCELERATE_SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    arguments = [tmp_path / "train.py", tmp_path / "found", exported, gpt2]
    done = subprocess.run([*command, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in (tmp_path / "found").read_text().splitlines()]
    assert len(lines) == 2
    for processes, batches, *sums in lines:
        assert (processes, batches) == ("2", "4")
        assert sums[0] == sums[1]
