from pathlib import Path

import pytest

from mm_rec.errors import UserError
from mm_rec.options import add_arguments, from_arguments
from mm_rec.program import Parser
from mm_rec.training.plan import make_plan
from mm_rec.training.settings import TrainSettings, step_cap


def parse(*arguments: str, defaults: dict | None = None) -> TrainSettings:
    parser = Parser(prog="test")
    add_arguments(parser, TrainSettings, defaults)
    return from_arguments(TrainSettings, parser.parse_args(arguments), defaults)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_wins_over_file_over_defaults(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "batch_size: 3\nseq_len: 96\nlr: 1e-3\nfresh: true\n")
    defaults = {"batch_size": 5, "seq_len": 32, "preset": "small"}
    settings = parse("--config", config, "--seq_len", "64", defaults=defaults)
    assert (settings.batch_size, settings.seq_len, settings.preset) == (3, 64, "small")
    assert (settings.lr, settings.fresh, settings.accumulation) == (1e-3, True, 1)
    assert parse() == TrainSettings()


def test_a_stage_has_its_section_unless_a_flag_wins(tmp_path: Path) -> None:
    config = write(
        tmp_path / "run.yaml",
        "max_steps: 400\nseed: 3\nstages:\n  stage2: {max_steps: 100, seq_len: 64}\n  stage3:\n    lr: 0.5\n",
    )
    settings = parse("--config", config, "--stage", "all")
    steps = [settings.for_stage(name).max_steps for name in settings.stage_names()]
    assert steps == [400, 100, 400]
    assert settings.for_stage("stage2").seq_len == 64
    assert settings.for_stage("stage3").lr == 0.5
    assert settings.for_stage("stage2").seed == 3
    flagged = parse("--config", config, "--stage", "all", "--max_steps", "7")
    assert [flagged.for_stage(name).max_steps for name in flagged.stage_names()] == [7, 7, 7]
    assert flagged.for_stage("stage2").seq_len == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 2", ["unknown", "batchsize", "did you mean batch_size"]),
        ("batch_size: two", ["batch_size", "whole number", "two"]),
        ("batch_size: 1.5", ["batch_size", "whole number"]),
        ("batch_size: true", ["batch_size", "whole number"]),
        ("batch_size: [1]", ["batch_size", "whole number"]),
        ("batch_size: 0", ["batch_size", "at least 1"]),
        ("lr: .nan", ["lr", "at least 0"]),
        ("lr: .inf", ["lr", "finite"]),
        ("fresh: 1", ["fresh", "true or false"]),
        ("preset: huge", ["preset", "tiny, small, 100m"]),
        ("- a", ["name: value"]),
        ("a: [", ["not valid YAML"]),
        ("stages: {stage9: {lr: 1}}", ["unknown stage", "stage9"]),
        ("stages: {stage1: {lrr: 1}}", ["unknown", "stages.stage1.lrr"]),
        ("stages: {stage1: {stages: {}}}", ["unknown", "stages.stage1.stages"]),
        ("stages: {stage2: {preset: tiny}}", ["stages.stage2.preset", "outside of"]),
        ("stages: {stage1: {data_dir: elsewhere}}", ["stages.stage1.data_dir", "outside of"]),
        ("stages: {stage1: {max_samples: 5}}", ["stages.stage1.max_samples", "outside of"]),
        ("stages: [1]", ["stages"]),
        ("\x00", ["not valid YAML"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_setting(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse("--config", write(tmp_path / "run.yaml", text))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [str(tmp_path), *words])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no\\.yaml"):
        parse("--config", str(tmp_path / "no.yaml"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch_size", "0"],
        ["--seq_len", "x"],
        ["--lr", "-1"],
        ["--max_steps", "1e3"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
    ],
)
def test_a_flag_out_of_range_is_named(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=arguments[0]):
        parse(*arguments)


@pytest.mark.parametrize("arguments", [["--nosuch"], ["--preset", "huge"], ["--batch_siz", "1"], ["--batch_size"]])
def test_what_argparse_refuses_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--help" in error


def test_the_cap_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_cap() is None
    monkeypatch.setenv("MM_REC_MAX_STEPS", "20")
    assert step_cap() == 20
    assert make_plan(TrainSettings(), "cpu", 10**6).last_step == 20
    assert make_plan(TrainSettings(), "cpu", 10**6).steps == 1000
    for wrong in ("0", "-1", "x", "1.5"):
        monkeypatch.setenv("MM_REC_MAX_STEPS", wrong)
        with pytest.raises(UserError, match="MM_REC_MAX_STEPS"):
            step_cap()


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for flag in ("--batch_size", "--seq_len", "--max_steps", "--use_synthetic", "--config", "--resume_from", "--fresh"):
        assert flag in text
    assert "--stages" not in text
