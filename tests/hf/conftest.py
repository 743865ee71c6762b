"""The folder of a small model, and that of GPT-2 of the same size: what a tool does with it is the measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mm_rec.config import ModelConfig
from mm_rec.hf.compare import compare
from mm_rec.inference.export import export
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=512, d_model=32, n_heads=2, n_layers=3, d_ff=64, window=16, kept_pairs=6)
TEXTS = [path.read_text() for path in sorted(Path(checkpoint.__file__).parent.glob("*.py"))]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of ours, not trained."""
    root = tmp_path_factory.mktemp("ours")
    weights = MMRecModel(CONFIG, seed=1).state_dict()
    tokenizer = train_tokenizer(TEXTS, 512)
    checkpoint.save(
        root / "step_000001", config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer
    )
    export(root / "step_000001", root / "exported", compare)
    return root / "exported"


@pytest.fixture(scope="session")
def gpt2(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The control: GPT-2 with the same tokenizer and of the same width and depth."""
    folder = tmp_path_factory.mktemp("control") / "gpt2"
    torch.manual_seed(1)
    sizes = {"vocab_size": 512, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    GPT2LMHeadModel(GPT2Config(**sizes, **ids, **dropout)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(exported).save_pretrained(folder)
    return folder


@pytest.fixture(params=["mm-rec", "gpt2"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Both, one after the other."""
    found: Path = request.getfixturevalue("exported" if request.param == "mm-rec" else "gpt2")
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Rows of tokens that a model can learn: some follow each other."""
    starts = torch.randint(10, 300, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [[0, *range(start, start + 23)] for start in starts]
    return [{"input_ids": row, "labels": row} for row in tokens]
