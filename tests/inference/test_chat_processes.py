"""A session is saved, its process ends, another goes on: the next logits are the same bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest

from mm_rec.config import ModelConfig
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)

TALK = """
import os, sys, torch
from pathlib import Path
from mm_rec.inference import decode
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.loading import load_model
from mm_rec.inference.sampling import Sampling

model, tokenizer, domain, *_ = load_model(Path(sys.argv[1]), device="cpu", precision=sys.argv[2])
folder = Path(sys.argv[3])
sys.stdout.reconfigure(encoding="utf-8")


def talk(session, first, last):
    for turn in range(first, last):
        "".join(session.reply(f"Question {turn}? " + "again " * (turn % 9)))


def next_logits(session):
    logits, _ = decode.step(model, torch.tensor([tokenizer.control_ids["<|user|>"]]), session.state, domain)
    return logits.float().numpy().tobytes()
"""
SAVE = """
session = ChatSession.start(model, tokenizer, sampling=Sampling(max_new_tokens=12, seed=5), domain=domain, system="Hi.")
talk(session, 0, 5)
session.save(folder / "5.safetensors")
talk(session, 5, 50)
session.save(folder / "50.safetensors")
(folder / "logits").write_bytes(next_logits(session))
sys.stdout.write("".join(session.reply("And now?")))
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""
RESTORE = """
session = ChatSession.load(folder / "50.safetensors", model, tokenizer)
assert session.turns == 50 and session.n_tokens > 1000
assert next_logits(session) == (folder / "logits").read_bytes(), "the logits differ"
sys.stdout.write("".join(session.reply("And now?")))
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fifty_turns_later_in_another_process(tmp_path: Path, precision: str) -> None:
    model = tmp_path / "step_000001"
    weights = MMRecModel(CONFIG, seed=1).state_dict()
    tokenizer = train_tokenizer(["Question 1? Question 2? again again Hi. And now?"] * 3, 320)
    checkpoint.save(model, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer)

    def run(program: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", TALK + program, str(model), precision, str(tmp_path)]
        return subprocess.run(command, capture_output=True, encoding="utf-8")

    first = run(SAVE)
    assert first.returncode == -9, first.stderr
    assert (tmp_path / "5.safetensors").stat().st_size == (tmp_path / "50.safetensors").stat().st_size
    second = run(RESTORE)
    assert second.returncode == 0, second.stderr
    assert len(first.stdout) > 5
    assert second.stdout == first.stdout
