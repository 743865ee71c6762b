"""PEFT's ways to adapt a model, with GPT-2 of the same size as the control; its adapters in our own commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mm_rec.hf  # noqa: F401 (registers the model)
from mm_rec import ops
from mm_rec.cli import main
from mm_rec.errors import UserError
from mm_rec.inference.loading import load_model
from mm_rec.storage.adapter import LowRank, adapter_files, read_adapter

peft = pytest.importorskip("peft", reason="PEFT is not installed")
LoraConfig = peft.LoraConfig

OURS, CONTROL = ["in_proj", "ffn_down"], ["c_attn", "c_proj"]


def train(model: nn.Module, rows: list[dict[str, list[int]]], steps: int = 5) -> list[float]:
    """A few steps on the same rows; returns the losses."""
    ids = torch.tensor([row["input_ids"] for row in rows[:8]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(10, 50)[None]).logits
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": "by name", "r": 4, "lora_alpha": 16, "use_rslora": True},
        {"target_modules": "all-linear", "lora_dropout": 0.1},
        {"target_modules": "all-linear", "use_dora": True},
    ],
    ids=["default", "all-linear", "by-name", "dropout", "dora"],
)
def test_lora_trains_merges_saves_and_loads(
    folder: Path, rows: list[dict[str, list[int]]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    if settings.get("target_modules") == "by name":
        settings = settings | {"target_modules": OURS if folder.name == "exported" else CONTROL}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(base)
    model = peft.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    losses = train(model, rows)
    assert losses[-1] < losses[0] - 0.003
    after = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    said = model.generate(input_ids=torch.arange(10, 30)[None], **options)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), after)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(torch.arange(10, 30)[None], **options), said)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=pytest.mark.native), "reference"])
def test_gradients_of_adapters_are_those_of_peft(
    exported: Path, rows: list[dict[str, list[int]]], backend: str
) -> None:
    """The model runs on W + s B A; PEFT's own layer computes W x + s B (A x), which has to be the same."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(exported), LoraConfig(target_modules=["ffn_down"], init_lora_weights=False)
    )
    layer = model.base_model.model.model.experts["text"].blocks[0].ffn_down
    part, n = model.base_model.model.model.experts["text"].blocks[0], torch.randn(2, 5, 32)
    with ops.use_backend(backend):
        ours = ops.feed_forward(n, part.with_matrices().ffn_up, part.with_matrices().ffn_down)
    theirs = layer(part.ffn_up(n).relu().square())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for found, expected in zip(
        torch.autograd.grad(ours.square().sum(), weights),
        torch.autograd.grad(theirs.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_lora_on_the_embedding_acts(folder: Path, rows: list[dict[str, list[int]]]) -> None:
    name = "embedding" if folder.name == "exported" else "wte"
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=[name]))
    losses = train(model, rows)
    assert losses[-1] < losses[0] - 0.1
    assert train(model, rows, steps=1)[0] < losses[-1]


def test_other_adapters_than_lora_train_too(exported: Path, rows: list[dict[str, list[int]]]) -> None:
    for config in (
        peft.IA3Config(target_modules=OURS, feedforward_modules=["ffn_down"]),
        peft.LoHaConfig(target_modules=OURS),
    ):
        torch.manual_seed(0)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(exported), config)
        losses = train(model, rows)
        assert losses[-1] < losses[0]
        after = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), after, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_a_bias_is_refused(exported: Path) -> None:
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(exported), LoraConfig(target_modules=OURS, lora_bias=True)
    )
    with pytest.raises(ValueError, match="no bias"):
        logits(model)


def test_hooks_on_a_layer_act(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    block = model.model.experts["text"].blocks[1]
    before = logits(model)
    handle = block.ffn_up.register_forward_hook(lambda _module, _inputs, output: output * 2)
    doubled = logits(model)
    handle.remove()
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        block.ffn_up.weight *= 2
    assert not torch.allclose(doubled, before)
    torch.testing.assert_close(doubled, logits(model))


# --- adapters in this package -----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(exported: Path, rows: list[dict[str, list[int]]], tmp_path: Path) -> Path:
    """An adapter that PEFT trained and saved, and beside it the model that it merged."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["in_proj", "qkv_proj"], r=4, alpha_pattern={"qkv_proj": 32})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(exported, domain="all"), config)
    train(model, rows)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "adapter"


def test_commands_take_an_adapter_of_peft(
    exported: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").model.state_dict()
    loaded = load_model(exported, device="cpu", precision="fp32", adapter=adapter)
    changed = 0
    for name, tensor in loaded.model.state_dict().items():
        found = merged.get(f"{name}.weight", merged.get(name))
        torch.testing.assert_close(tensor, found, rtol=1e-5, atol=1e-6)
        changed += name.endswith(("in_proj", "qkv_proj"))
    assert changed == 2 * (3 + 1)
    assert main(["export", "--model", str(exported), "--adapter", str(adapter), "--output", str(tmp_path / "x")]) == 0
    exported_logits = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x", domain="all"))
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", domain="all"))
    torch.testing.assert_close(exported_logits, expected, rtol=1e-4, atol=1e-5)


def test_peft_takes_an_adapter_of_finetune(exported: Path, tmp_path: Path) -> None:
    weights = load_model(exported, device="cpu", precision="fp32").model.state_dict()
    shapes = {name: one.shape for name, one in weights.items() if name.endswith(("in_proj", "ffn_up"))}
    torch.manual_seed(0)
    changes = {
        name: LowRank(torch.randn(3, columns), torch.randn(rows, 3) / 10, 2.0)
        for name, (rows, columns) in shapes.items()
    }
    config, tensors = adapter_files(changes)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(exported), tmp_path).merge_and_unload()
    for name, one in changes.items():
        found = model.model.get_parameter(f"{name}.weight")
        torch.testing.assert_close(found, weights[name] + one.change(), rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, read_adapter(tmp_path)[name][:2], one[:2]))


@pytest.mark.parametrize(
    ("settings", "tensor", "problem"),
    [
        ({"use_dora": True}, None, "more than plain LoRA.*use_dora"),
        ({"init_lora_weights": "pissa"}, None, "more than plain LoRA.*init_lora_weights"),
        ({"init_lora_weights": "olora"}, None, "more than plain LoRA.*init_lora_weights"),
        ({"alora_invocation_tokens": [5]}, None, "more than plain LoRA.*alora_invocation_tokens"),
        ({"of_a_later_peft": {"a": 1}}, None, "more than plain LoRA.*of_a_later_peft"),
        ({"peft_type": "IA3"}, None, "more than plain LoRA"),
        ({"lora_alpha": None}, None, "cannot be read"),
        ({"lora_alpha": 10**400}, None, "cannot be read"),
        ({"lora_alpha": float("inf")}, None, "not finite"),
        ({"alpha_pattern": {"[": 1}}, None, "cannot be read"),
        ({}, "base_model.model.lm_head.weight", "merge_and_unload"),
        ({}, "base_model.model.model.experts.text.blocks.9.in_proj.lora_A.weight", "no A and B of one rank"),
    ],
)
def test_what_cannot_be_added_is_named(
    adapter: Path, settings: dict[str, Any], tensor: str | None, problem: str
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if tensor:
        weights = load_file(adapter / "adapter_model.safetensors")
        save_file({**weights, tensor: torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=problem) as error:
        read_adapter(adapter)
    assert "\n" not in str(error.value)


def test_an_adapter_without_a_rank_is_refused(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: one[:0] if "lora_A" in name else one[:, :0].contiguous() for name, one in weights.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="no A and B of one rank"):
        read_adapter(adapter)


def test_an_adapter_of_another_model_is_refused(exported: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: one[:, :-1].contiguous() if "lora_A" in name else one for name, one in weights.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="of another model"):
        load_model(exported, device="cpu", adapter=adapter)
