"""The shape of a model by settings: beside a preset, in flags, file and stages."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mm_rec.errors import UserError
from mm_rec.options import add_arguments, from_arguments, from_values
from mm_rec.program import Parser
from mm_rec.scripts import train_command
from mm_rec.storage import checkpoint
from mm_rec.training.settings import MODEL_SHAPE, TrainSettings

QUICK = [
    "--use_synthetic", "--max_samples", "12", "--preset", "tiny", "--device", "cpu", "--precision", "fp32",
    "--seq_len", "32", "--max_steps", "1", "--eval_interval", "100", "--valid_bytes", "200", "--threads", "1",
]  # fmt: skip


def parse(*flags: str) -> TrainSettings:
    parser = Parser(prog="train")
    add_arguments(parser, TrainSettings)
    return from_arguments(TrainSettings, parser.parse_args([*flags]))


def test_sizes_stand_beside_a_preset() -> None:
    config = parse("--preset", "tiny", "--d_model", "96", "--n_heads", "6", "--window", "64").model_config(512)
    assert (config.d_model, config.n_heads, config.window, config.n_layers) == (96, 6, 64, 3)
    assert parse("--preset", "small").model_shape() == {}


def test_every_size_of_the_model_can_be_set() -> None:
    values = {
        "vocab_size": 640, "d_model": 48, "n_heads": 3, "n_layers": 4, "d_ff": 80, "gate_every": 2, "window": 32,
        "kept_pairs": 9, "rotary_base": 500.0,
    }  # fmt: skip
    assert set(values) == set(MODEL_SHAPE)
    config = from_values(TrainSettings, {"preset": "tiny", **values}).model_config()
    assert {name: getattr(config, name) for name in values} == values


def test_sizes_that_make_no_model_are_an_error() -> None:
    with pytest.raises(UserError, match="d_model 100 does not split into 8 heads"):
        parse("--preset", "100m", "--d_model", "100").model_config(512)
    with pytest.raises(UserError, match="--window must be at least 2"):
        parse("--window", "1")
    for name in set(MODEL_SHAPE):
        with pytest.raises(UserError, match=f"--{name} must be at most"):
            parse(f"--{name}", "99999999999999999998")


def test_sizes_cannot_differ_between_stages(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("d_model: 96\nstages: {stage2: {d_model: 64}}\n")
    with pytest.raises(UserError, match="d_model cannot differ between stages"):
        parse("--config", str(file))


def test_a_run_has_the_shape_that_was_set_and_later_stages_take_it_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = ["--d_model", "32", "--n_heads", "2", "--n_layers", "2", "--gate_every", "2", "--vocab_size", "300"]
    flags = [*QUICK, *shape, "--checkpoint_dir", "runs"]
    assert train_command.main(flags) == 0
    config = checkpoint.load(tmp_path / "runs" / "stage1" / "checkpoints" / "step_000001").config
    assert (config.d_model, config.n_heads, config.n_layers, config.gate_every, config.vocab_size) == (32, 2, 2, 2, 320)
    assert train_command.main([*flags, "--stage", "stage2"]) == 0
    with pytest.raises(UserError, match=r"stage2 starts from .* whose d_model is 32, not 64; leave out d_model"):
        train_command.main([*flags, "--stage", "stage2", "--d_model", "64"])
    with pytest.raises(UserError, match=r"runs/stage1 is a model whose n_layers is 2, not 3; leave out n_layers"):
        train_command.main([*flags, "--resume_from", "runs/stage1", "--n_layers", "3"])
    with pytest.raises(UserError, match=r"trained with another tokenizer .* --vocab_size"):
        train_command.main([*flags, "--resume_from", "runs/stage1", "--vocab_size", "290", "--allow_changes"])


def test_values_of_python_are_checked_as_those_of_a_file_are(tmp_path: Path) -> None:
    settings = from_values(TrainSettings, {"checkpoint_dir": tmp_path, "data_dir": "data", "max_steps": 3})
    assert (settings.checkpoint_dir, settings.data_dir, settings.max_steps) == (tmp_path, Path("data"), 3)
    with pytest.raises(UserError, match="unknown setting max_step; did you mean max_steps"):
        from_values(TrainSettings, {"max_step": 3})
    with pytest.raises(UserError, match="max_steps must be a whole number"):
        from_values(TrainSettings, {"max_steps": 2.5})


def test_the_help_names_the_sizes() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, TrainSettings)
    assert all(f"--{name} " in parser.format_help() for name in MODEL_SHAPE)
