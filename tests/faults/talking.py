"""Work for the supervisor: a turn of a chat whose session is loaded before and saved after it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from saving import TOKENIZER

from mm_rec.config import ModelConfig
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel

CONFIG = ModelConfig(vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5)
TEXTS = ("hello", "and what then?")


def turn(path: str, text: str) -> None:
    """Say ``text`` in the session at ``path``, a new one if there is none, print the answer and save."""
    torch.set_num_threads(1)
    model, file = MMRecModel(CONFIG, seed=0), Path(path)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=7)
    if file.exists():
        session = ChatSession.load(file, model, TOKENIZER)
    else:
        session = ChatSession.start(model, TOKENIZER, sampling=sampling)
    print(ascii("".join(session.reply(text))), flush=True)
    session.save(file)


def warm_up() -> None:
    """Let the fork server import what a turn imports late."""
    with tempfile.TemporaryDirectory() as folder:
        session = ChatSession.start(MMRecModel(CONFIG, seed=0), TOKENIZER)
        session.save(Path(folder) / "session.safetensors")


torch.set_num_threads(1)
warm_up()
