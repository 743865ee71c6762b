"""Folders that other tools saved: added tokens, commands of this package, lm-eval, a machine without the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import mm_rec.hf  # noqa: F401 (registers the model)
from mm_rec.cli import main
from mm_rec.errors import UserError
from mm_rec.inference.loading import load_model
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import CONTROL_TOKENS, Tokenizer

Rows = list[dict[str, list[int]]]


def one_step(model: torch.nn.Module, tokenizer: object, rows: Rows, output: Path) -> Path:
    """Train a step with Trainer and save; returns the folder."""
    arguments = TrainingArguments(
        str(output), max_steps=1, learning_rate=1e-2, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(output))
    return output


def test_offloaded_blocks_are_brought_back_whole(exported: Path, tmp_path: Path) -> None:
    """Offloaded weights are on "meta", where no autocast and no state can be."""
    ids = torch.arange(300, 320)[None]
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    expected = model(ids).logits
    blocks = ["MMRecLayeredBlock"]
    kept = accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=blocks)
    assert kept.model.embedding.weight.device.type == "meta"
    assert torch.equal(kept(ids).logits, expected)
    assert kept.generate(ids, max_new_tokens=3).shape == (1, 23)
    stored = AutoModelForCausalLM.from_pretrained(exported).eval()
    accelerate.disk_offload(stored, str(tmp_path), execution_device="cpu", preload_module_classes=blocks)
    assert torch.equal(stored(ids).logits, expected)


def test_added_tokens_are_trained_saved_and_loaded(folder: Path, rows: Rows, tmp_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<think>", "</think>", "düşün 漢"], special_tokens=True) == 3
    model.resize_token_embeddings(len(tokenizer))
    text = "<think>so</think> def f"
    ids = tokenizer(text)["input_ids"]
    assert {size, size + 1} <= set(ids)
    saved = one_step(model, tokenizer, [{"input_ids": ids, "labels": ids}] * 8, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert again.get_input_embeddings().num_embeddings == len(AutoTokenizer.from_pretrained(saved)) == size + 3
    found = again(**tokenizer(text, return_tensors="pt")).logits
    torch.testing.assert_close(found, model.eval()(**tokenizer(text, return_tensors="pt")).logits)
    if folder.name == "exported":
        loaded = load_model(saved, device="cpu", precision="fp32")
        assert loaded.tokenizer.vocab_size == loaded.model.config.vocab_size == size + 3
        torch.testing.assert_close(loaded.model(torch.tensor([ids]), None, "text")[0], found)
        assert loaded.tokenizer.token_bytes[size:] == (b"<think>", b"</think>", "düşün 漢".encode())
        logits, _ = loaded.model(torch.tensor([ids]), None, "text", targets=torch.tensor([ids]))
        assert logits.loss.isfinite()


def test_tokens_without_rows_are_named(exported: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokenizer.add_tokens([f"<{i}>" for i in range(600)])
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(saved)
    with pytest.raises(UserError, match=r"tokenizer is written there with tokenizer.save_pretrained"):
        load_model(saved)
    tokenizer.save_pretrained(saved)
    with pytest.raises(UserError, match="resize_token_embeddings"):
        load_model(saved)


def test_a_saved_folder_works_in_every_command(
    exported: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, domain="code", dtype=torch.bfloat16)
    saved = one_step(model, tokenizer, rows, tmp_path / "saved")
    loaded = load_model(saved, device="cpu", precision="fp32")
    assert loaded.domain == "code"
    assert loaded.tokenizer.sha256 == Tokenizer.load(exported).sha256
    options = ["--max_new_tokens", "3", "--device", "cpu"]
    assert main(["generate", "--model", str(saved), "--prompt", "def", *options]) == 0
    (tmp_path / "own.jsonl").write_text('"some text"\n"and more"\n')
    assert main([
        "eval", "--model", str(saved), "--documents", f"own={tmp_path / 'own.jsonl'}", "--distances", "none",
        "--output", str(tmp_path / "report"), "--device", "cpu",
    ]) == 0  # fmt: skip
    assert main(["export", "--model", str(saved), "--output", str(tmp_path / "again")]) == 0
    talks = [{"prompt": f"What is {i}?", "completion": "This."} for i in range(12)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    tune = ["finetune", "--data", str(tmp_path / "talks.jsonl"), "--checkpoint_dir", str(tmp_path / "runs")]
    small = ["--max_steps", "1", "--seq_len", "16", "--batch_size", "1", "--device", "cpu", "--init_from", str(saved)]
    assert main([*tune, *small]) == 0
    capsys.readouterr()
    assert main([*tune, *small]) == 0
    assert "instruct is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="--init_from starts a new run"):
        checkpoint.load(saved)


def test_the_server_takes_a_saved_folder(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(saved)
    AutoTokenizer.from_pretrained(exported).save_pretrained(saved)
    command = [sys.executable, "-m", "mm_rec.cli", "serve", "--model", str(saved), "--port", "0", "--device", "cpu"]
    command += ["--session_dir", str(tmp_path / "sessions")]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            found = (re.search(r"serving at (http://\S+/)", line) for line in server.stdout)
            address = next(one[1] for one in found if one)
            with urllib.request.urlopen(f"{address}v1/models", timeout=60) as answer:
                assert json.load(answer)["data"][0]["id"] == "mm-rec"
        finally:
            server.terminate()


def test_an_exported_folder_that_is_saved_over_is_read_again(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embedding.weight += 1
    model.save_pretrained(folder)
    assert torch.equal(load_model(folder, device="cpu", precision="fp32").model.embedding.weight, model.lm_head.weight)


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json"])
def test_a_saved_folder_that_is_damaged_is_named(exported: Path, tmp_path: Path, damage: str) -> None:
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path)
    (tmp_path / damage).write_bytes((tmp_path / damage).read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be") as error:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


def test_weights_that_are_read_without_a_mapping_stay_what_they_were(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", disable_mmap=True)
    ids = torch.arange(12)[None]
    before = model(ids).logits
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.write(bytes(os.fstat(file.fileno()).st_size))
        file.truncate(0)
    assert torch.equal(model(ids).logits, before)


def test_large_models_come_in_several_files(exported: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    found, expected = (load_model(one, device="cpu", precision="fp32").model for one in (tmp_path, exported))
    assert all(torch.equal(one, expected.state_dict()[name]) for name, one in found.state_dict().items())


def test_generate_never_draws_a_control_token(exported: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    ends = model.generation_config.eos_token_id
    control = [i for i in range(len(CONTROL_TOKENS)) if i not in ends]
    with torch.no_grad():  # of all tokens, those that must not be drawn are the likeliest by far
        direction = model.model(torch.arange(10, 20)[None]).last_hidden_state[0, -1]
        model.model.embedding.weight[control] = 50 * direction
    ids = torch.arange(10, 20)[None]
    assert model(ids).logits[0, -1].argmax() in control
    model.save_pretrained(tmp_path)
    earlier = json.loads((tmp_path / "generation_config.json").read_text())
    del earlier["suppress_tokens"]  # as folders had it before
    for values in (None, earlier):
        if values is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(values))
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        for options in ({"do_sample": False}, {"do_sample": True, "temperature": 5.0, "num_return_sequences": 4}):
            drawn = again.generate(ids, max_new_tokens=12, eos_token_id=None, **options)[:, 10:]
            assert not set(drawn.flatten().tolist()) & set(control)


QUIZ = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{question}}}}'
doc_to_target: '{{{{answer}}}}'
doc_to_choice: '{{{{choices}}}}'
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_finds_its_batch_size(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM._DEFAULT_MAX_LENGTH", 64)  # it tries rows of this length
    rows = [{"question": "import", "choices": [" os", " three and two"], "answer": 0}] * 6
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "quiz.yaml").write_text(QUIZ.format(name="tool_quiz", rows=tmp_path / "rows.jsonl"))
    arguments = {
        "model": "hf", "model_args": {"pretrained": str(folder), "dtype": "float32"}, "tasks": ["tool_quiz"],
        "task_manager": TaskManager(include_path=str(tmp_path)), "device": "cpu", "bootstrap_iters": 0,
    }  # fmt: skip
    found = lm_eval.simple_evaluate(batch_size="auto", max_batch_size=8, **arguments)
    assert found["results"]["tool_quiz"]["acc,none"] in (0.0, 1.0)


def test_without_the_package_the_folder_says_where_to_get_it(exported: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mm_rec': raise ModuleNotFoundError('No module named mm_rec', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program, exported], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this model runs by the package mm_rec, which is not installed here")
