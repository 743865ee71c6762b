"""What the tests of training share: a little data, and a model as small as it can be."""

from collections.abc import Iterator

import pytest
import torch

from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.prepare import prepare
from mm_rec.data.prepared import Prepared
from mm_rec.data.synthetic import write_synthetic
from mm_rec.training import trainer


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, 12)
    return prepare(folder, 320, filters=False)


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model of one block an expert with everything in it, short samples, no pictures, one thread."""
    config = ModelConfig(
        vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5
    )
    monkeypatch.setitem(PRESETS, "tiny", config)
    monkeypatch.setattr(trainer, "SAMPLE_TOKENS", 3)
    monkeypatch.setattr(trainer, "draw_losses", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
