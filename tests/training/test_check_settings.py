"""What no data can make right is refused before any are read, which may take hours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mm_rec.api.train import train
from mm_rec.errors import UserError
from mm_rec.scripts import finetune_command, pipeline_command, train_command
from mm_rec.stages import PRETRAINING
from mm_rec.training.check_settings import check_settings
from mm_rec.training.settings import TrainSettings

WRONG: dict[str, tuple[dict[str, str], list[str], str]] = {
    "steps": ({"MM_REC_MAX_STEPS": "abc"}, [], "MM_REC_MAX_STEPS"),
    "backend": ({"MM_REC_BACKEND": "abc"}, [], "MM_REC_BACKEND"),
    "device": ({}, ["--device", "abc"], "device 'abc'"),
    "threads": ({}, ["--threads", "2048"], "2048 threads"),
}
OF_PRETRAINING: dict[str, tuple[dict[str, str], list[str], str]] = {
    "heads": ({}, ["--n_heads", "7"], "7 heads"),
    "weights": ({}, ["--init_from", "nowhere"], "there is no nowhere"),
    "run": ({}, ["--resume_from", "nowhere"], "there is no nowhere"),
    "stage before": ({}, ["--stage", "stage2"], "starts from a trained stage1"),
}


@pytest.fixture(autouse=True)
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read and nothing is there."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("data were read")

    for place in ("mm_rec.training.load_data.load_data", "mm_rec.training.finetune.prepare_conversations"):
        monkeypatch.setattr(place, read)
    monkeypatch.setattr("mm_rec.api.train.load_data", read)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()


def refused(environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return pytest.raises(UserError, match=words)


@pytest.mark.parametrize("case", WRONG | OF_PRETRAINING)
def test_training_refuses_before_data_are_read(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, arguments, words = (WRONG | OF_PRETRAINING)[case]
    with refused(environment, words, monkeypatch):
        train_command.main(arguments)
    with refused(environment, words, monkeypatch):
        train(**dict(zip((name.removeprefix("--") for name in arguments[::2]), arguments[1::2], strict=True)))
    assert not Path("checkpoints_cpu").exists()


@pytest.mark.parametrize("case", WRONG)
def test_fine_tuning_and_the_pipeline_refuse_before_data_are_read(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, arguments, words = WRONG[case]
    for main, rows in (
        (finetune_command.main, ["--data"]),
        (pipeline_command.main, ["--instruct_data", "--chat_data"]),
    ):
        with refused(environment, words, monkeypatch):
            main([*arguments, *(word for name in rows for word in (name, "rows.jsonl"))])


def test_each_stage_is_checked() -> None:
    settings = TrainSettings(stage="all")
    check_settings(settings, PRETRAINING)
    with pytest.raises(UserError, match="2048 threads"):
        check_settings(dataclasses.replace(settings, stages={"stage3": {"threads": 2048}}), PRETRAINING)
