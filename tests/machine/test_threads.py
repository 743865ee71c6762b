"""How many threads a process may be asked to run."""

import pytest
import torch

from mm_rec.errors import UserError
from mm_rec.machine.device import FEW_THREADS, set_threads


def test_more_threads_than_make_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("mm_rec.machine.device.cores", lambda: 2)
    with pytest.raises(UserError, match=f"2048 threads are too many for the 2 cores here; use {FEW_THREADS} at most"):
        set_threads(2048)
    assert torch.get_num_threads() == before
    monkeypatch.setattr("mm_rec.machine.device.cores", lambda: 100)
    with pytest.raises(UserError, match="use 400 at most"):
        set_threads(401)
