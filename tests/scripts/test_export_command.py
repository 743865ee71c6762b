"""``mm-rec export``: a folder that transformers loads and that is the same model, or none."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mm_rec.cli import main
from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.inference.loading import load_model
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint, hf_folder
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "step_000001"
    weights = MMRecModel(CONFIG, seed=1).state_dict()
    tokenizer = train_tokenizer(["Hello, what is your name? My name is Memory."] * 3, 320)
    optimizer = {"moment": torch.ones(3)}
    checkpoint.save(
        path, config=CONFIG, weights=weights, optimizer=optimizer, carried={}, trainer={}, tokenizer=tokenizer
    )
    return path


def test_the_folder_is_the_same_model_without_training(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "exported"
    assert main(["export", "--model", str(model), "--output", str(output), "--domain", "code"]) == 0
    assert capsys.readouterr().out.count("the same in transformers") == 2
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json",
        "model.safetensors", "modeling_mm_rec.py", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.arange(30)[None]
    ours = load_model(output, device="cpu", precision="fp32").model
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids, None, "code")[0])
    assert main(["export", "--model", str(output), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert load_file(output / "model.safetensors").keys() == theirs.state_dict().keys() - {"lm_head.weight"}


def test_an_exported_folder_starts_a_run_and_resumes_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "exported"
    assert main(["export", "--model", str(model), "--output", str(output)]) == 0
    with pytest.raises(UserError, match="--init_from starts a new run from its weights"):
        checkpoint.load(output)


def test_weights_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    found = checkpoint.load(model)
    weights = {f"other.{name}": tensor for name, tensor in found.weights.items()}
    tokenizer = found.load_tokenizer()
    path = tmp_path / "step_000001"
    checkpoint.save(
        path, config=found.config, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer
    )
    with pytest.raises(UserError, match=r"not of the model in its config\.json"):
        load_model(path)


def test_nothing_is_overwritten(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("keep")
    assert main(["export", "--model", str(model), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_differs_is_not_exported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = hf_folder.write_model_files

    def write_wrong(folder: Path, config: ModelConfig, *rest: object) -> None:
        write(folder, dataclasses.replace(config, rotary_base=17.0), *rest)

    monkeypatch.setattr(hf_folder, "write_model_files", write_wrong)
    assert main(["export", "--model", str(model), "--output", str(tmp_path / "exported")]) == 2
    assert "transformers gives other logits than mm-rec" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
