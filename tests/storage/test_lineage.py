"""What the weights of a checkpoint were trained on, through all stages."""

from pathlib import Path

import pytest

from mm_rec.errors import UserError
from mm_rec.storage.lineage import TRAINED_ON, DataFolder, extended, run_of, trained_on
from mm_rec.storage.run_config import write_config


def make_run(path: Path, **more: object) -> Path:
    """A run folder with a checkpoint, which is returned."""
    (path / "checkpoints" / "step_000001").mkdir(parents=True)
    write_config(path, {"stage": "stage1", "identity": {}, **more})
    return path / "checkpoints" / "step_000001"


def test_each_stage_adds_its_data_to_those_before(tmp_path: Path) -> None:
    text, talks = (tmp_path / name for name in ("text", "talks"))
    first = make_run(tmp_path / "stage1", **{TRAINED_ON: extended(None, text, "a")})
    again = make_run(tmp_path / "stage2", **{TRAINED_ON: extended(first, text, "a")})
    chat = make_run(tmp_path / "chat", **{TRAINED_ON: extended(again, talks, "b")})
    assert trained_on(again) == [DataFolder(text, "a")]
    assert trained_on(chat) == [DataFolder(text, "a"), DataFolder(talks, "b")]
    assert trained_on(make_run(tmp_path / "new", **{TRAINED_ON: extended(chat, text, "c")})) == [
        DataFolder(text, "a"), DataFolder(talks, "b"), DataFolder(text, "c"),
    ]  # fmt: skip


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old")
    with pytest.raises(UserError, match="old does not say what it was trained on, since an earlier version"):
        trained_on(old)
    alone = tmp_path / "exported"
    alone.mkdir()
    with pytest.raises(UserError, match="exported lies in no run folder"):
        trained_on(alone)
    assert run_of(alone) is None
    assert extended(old, tmp_path / "text", "a") == [{"path": str(tmp_path / "text"), "sha256": "a"}]
