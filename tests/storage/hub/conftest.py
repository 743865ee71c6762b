"""A hub of models on this machine in place of the real one, and a small model to put there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "data"))  # the hub of data sets lies there

from hub_stub import serving
from model_stub import Models, ModelsHandler, ModelsHub

from mm_rec.config import ModelConfig
from mm_rec.inference.export import compare_own, export
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `mm-rec export` wrote."""
    root = tmp_path_factory.mktemp("exported")
    tokenizer = train_tokenizer(["Hello, what is your name? My name is Memory."] * 3, 320)
    checkpoint.save(
        root / "step_000001", config=CONFIG, weights=MMRecModel(CONFIG, seed=1).state_dict(), optimizer={}, carried={},
        trainer={}, tokenizer=tokenizer,
    )  # fmt: skip
    export(root / "step_000001", root / "model", compare_own)
    return root / "model"


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[dict[str, Models]], ModelsHub]]:
    """Start a hub with the given models and make it the one that is asked; the cache is empty, and nobody is known."""
    from huggingface_hub import constants

    with ExitStack() as stack:

        def start(models: dict[str, Models]) -> ModelsHub:
            hub = stack.enter_context(serving(ModelsHub(models), ModelsHandler))
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            return hub

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield start
