"""Scalars for TensorBoard."""

import sys
import types
from pathlib import Path

import pytest
from small_runs import settings, train

from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError

pytestmark = pytest.mark.usefixtures("small_world")


def test_tensorboard_is_there_for_those_who_ask(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="needs the package tensorboard"):
        train(data, settings(tmp_path / "without", tensorboard=True))
    written = []
    writer = types.SimpleNamespace(
        add_scalar=lambda *scalar: written.append(scalar), close=lambda: written.append("closed")
    )
    module = types.SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: written.append((folder, purge_step)) or writer
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(data, settings(tmp_path / "with", tensorboard=True, max_steps=4))
    assert written[0] == (str(tmp_path / "with" / "stage1" / "tensorboard"), 1)
    assert {name for name, _, step in written[1:-1] if step == 4} >= {"train/loss", "valid/text", "valid/code"}
    assert written[-1] == "closed"
