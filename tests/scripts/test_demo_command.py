"""``mm-rec demo``: everything once, then five questions; the second time it goes on and learns nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_up_entries import made_up_entries

from mm_rec.cli import main
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.download import local
from mm_rec.training import trainer


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A tiny model, little data, no pictures, one thread."""
    config = ModelConfig(
        vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5
    )
    monkeypatch.setitem(PRESETS, "small", config)
    monkeypatch.setattr(trainer, "SAMPLE_TOKENS", 3)
    monkeypatch.setattr(trainer, "draw_losses", lambda *_: None)
    monkeypatch.setattr(local, "builtin_text", lambda: (f"A text of {at} words and more of them." for at in range(99)))
    monkeypatch.setattr(local, "builtin_code", lambda: (f"def f{at}():\n    return {at}\n" for at in range(99)))
    monkeypatch.setattr(local, "builtin_entries", lambda: made_up_entries(3000))
    monkeypatch.setenv("MM_REC_MAX_STEPS", "2")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_demo_ends_with_five_questions_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "at most 20 minutes and 1 GB of disk, all of it in demo" in out.splitlines()[0]
    for at, stage in enumerate(("stage1", "instruct", "chat"), 1):
        assert f"step {at} of 3, {stage}" in out
        assert (tmp_path / "demo" / "runs" / stage / "checkpoints" / "step_000002").is_dir()
    assert "of the 15 minutes of training that are left" in out
    assert out.count("\n   answer: ") == 5
    assert out.count("\n   right would be: ") == 5
    assert out.splitlines()[-1] == "talk to it: mm-rec chat --model demo/runs --temperature 0"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "runs").rglob("*.safetensors")}
    assert main(["demo"]) == 0
    again = capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert all(f"{stage} is finished" in again for stage in ("stage1", "instruct", "chat"))
    answers = [one[one.index("5 questions") : one.index("done in")] for one in (out, again)]
    assert answers[0] == answers[1]
