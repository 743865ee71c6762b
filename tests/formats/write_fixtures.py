"""Writes ``fixtures/COMMIT.tar.xz``: what that commit wrote, and what it made of it when it went on.

Run once, with the package of that commit and not with a later one:

    git worktree add ../base COMMIT         # with its native library, which is loaded even if it is not used
    PYTHONPATH=../base python tests/formats/write_fixtures.py tests/formats/fixtures/COMMIT.tar.xz

The archive holds

    written.json               commit, versions, environment, model and settings that it was written with
    data/                      documents and conversations as JSONL, and prepared/, what was made of the documents
    stopped/STAGE/             the run of each stage after step 4 of 7
    stopped/prepared/          what was made of the conversations
    finished/STAGE/            the same runs, never stopped, after step 7
    batches.json               SHA-256 of the first micro-batches of each stage
    session.safetensors        a conversation with finished/chat after two turns
    third_turn.txt, session_after.safetensors      what the third turn says, and the session after it
    exported/                  finished/chat for `transformers`
    logits.safetensors         the logits that `transformers` gets from exported/ for IDS, by each expert and by all

It was written with Python 3.11.7, PyTorch 2.13.0+cpu, transformers 5.23.0 and glibc 2.36 on x86-64
(written.json has the whole list), one thread, float32, and the environment below, in which nothing depends on the
kind of processor: the ops are the plain PyTorch definitions, since a kernel that adds in another order changes no
format, and PyTorch, oneDNN, MKL and the C library are held at instructions that every x86-64 has. On a processor with
AMX it wrote the same bytes again, without GLIBC_TUNABLES, and where MKL_ENABLE_INSTRUCTIONS let MKL see SSE4.2 or AVX2
alone. Without this environment, weights differed by some 1e-6, with native kernels by some 1e-5. (Only the header of a
session file is not repeated byte for byte: the safetensors library writes its two entries in either order.)

This program is a record and not maintained: it uses the names that the package had then.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

COMMIT = "f9e3b80"
ENVIRONMENT = {
    "MM_REC_BACKEND": "reference",
    "MM_REC_CPU_LEVEL": "baseline",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-FMA,-FMA4,-AVX512F",
    "PYTHONHASHSEED": "0",
}
MODEL = {
    "vocab_size": 320, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "gate_every": 2, "window": 8,
    "kept_pairs": 5,
}  # fmt: skip
SETTINGS = {
    "data_dir": "data", "batch_size": 2, "seq_len": 16, "max_steps": 7, "checkpoint_interval": 4, "eval_interval": 7,
    "keep_checkpoints": 1, "valid_bytes": 200, "precision": "fp32", "threads": 1, "device": "cpu",
}  # fmt: skip
STAGES = ("stage1", "stage2", "stage3", "instruct", "chat")
STOP = 4
BATCHES = 8
IDS = [0, *range(7, 60), 4, *range(100, 130)]
TURNS = ("What is 3?", "And what is 12, in one word?", "Tell me about the apples.")
NOT_PACKED = {"events.log", "timing.jsonl", "run.lock", "loss.png", ".lock", "lock"}
"""What says when and where; nothing is read from it."""


def main(target: Path) -> None:
    """Write the archive from a folder of its own, in a process whose environment is set before it starts."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **ENVIRONMENT, "XDG_CACHE_HOME": folder + "/.cache"}
        subprocess.run([sys.executable, __file__, "--inside"], cwd=folder, env=environment, check=True)
        with tarfile.open(target, "w:xz", preset=9) as archive:
            for path in sorted(Path(folder).rglob("*")):
                name = path.relative_to(folder)
                if path.is_file() and path.name not in NOT_PACKED and name.parts[0] != ".cache":
                    entry = archive.gettarinfo(path, name.as_posix())
                    entry.mtime, entry.mode, entry.uid, entry.gid, entry.uname, entry.gname = 0, 0o644, 0, 0, "", ""
                    with path.open("rb") as file:
                        archive.addfile(entry, file)


def write_all() -> None:
    """Write everything into the current folder."""
    import numpy
    import safetensors
    import tokenizers
    import torch
    import transformers

    import mm_rec
    from mm_rec.config import PRESETS, ModelConfig

    PRESETS["tiny"] = ModelConfig(**MODEL)
    versions = {"mm_rec": mm_rec.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {module.__name__: module.__version__ for module in (numpy, safetensors, tokenizers, transformers)}
    written = {
        "commit": COMMIT, "versions": versions, "libc": " ".join(platform.libc_ver()), "environment": ENVIRONMENT,
        "model": MODEL, "settings": SETTINGS, "stages": STAGES, "stop": STOP, "batches": BATCHES, "ids": IDS,
        "turns": TURNS,
    }  # fmt: skip
    write_data(Path("data"))
    train()
    Path("written.json").write_text(json.dumps(written, indent=2) + "\n")
    Path("batches.json").write_text(json.dumps(batches(), indent=2) + "\n")
    talk()
    export()


def write_data(folder: Path) -> None:
    """Documents, and conversations for both tasks."""
    from mm_rec.data.synthetic import write_synthetic

    write_synthetic(folder, 12)
    for task in ("instruct", "chat"):
        (folder / task).mkdir()
        rows = [
            [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i * i}."}]
            for i in range(40)
        ]
        content = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
        (folder / task / "rows.jsonl").write_text(content)


def train() -> None:
    """Every stage twice, from the weights of the one before: to the end, and stopped by the cap on steps."""
    from mm_rec.cli import main

    before: str | None = None
    for stage in STAGES:
        command = ["finetune", "--task", stage] if stage in STAGES[3:] else ["train", "--stage", stage]
        command += [] if stage in STAGES[3:] else ["--preset", "tiny", "--recall_share", "0"]
        for name, value in SETTINGS.items():
            command += [f"--{name}", str(value)]
        if before is not None:
            command += ["--init_from", before]
        for root, cap in (("finished", ""), ("stopped", str(STOP))):
            os.environ["MM_REC_MAX_STEPS"] = cap
            assert main([*command, "--checkpoint_dir", root]) == 0
        before = f"finished/{stage}"
    os.environ["MM_REC_MAX_STEPS"] = ""


def batches() -> dict[str, list[str]]:
    """SHA-256 of the first micro-batches of each stage."""
    from mm_rec.data.batches import Batches
    from mm_rec.data.prepare import prepare
    from mm_rec.data.prepare_conversations import prepare_conversations
    from mm_rec.stages import STAGES as TABLE
    from mm_rec.text.tokenizer import Tokenizer

    sizes = {"batch_size": SETTINGS["batch_size"], "seq_len": SETTINGS["seq_len"], "seed": 0}
    documents = prepare(Path("data"), MODEL["vocab_size"]).train
    tokenizer = Tokenizer.load(Path("finished/stage1/checkpoints/step_000007"))
    found = {}
    for name in STAGES:
        stage, stores = TABLE[name], documents
        if stage.conversations:
            stores = prepare_conversations(
                Path("data", name), tokenizer, name=name, cache=Path("stopped/prepared")
            ).train
        made = Batches(
            stores,
            **sizes,
            layout=stage.layout,
            mixed=stage.mixed,
            document_limit=stage.document_limit,  # type: ignore[arg-type]
        )
        found[name] = []
        for batch in map(made.micro_batch, range(BATCHES)):
            digest = hashlib.sha256(str(batch.domain).encode())
            for tensor in (batch.tokens, batch.targets, batch.weight, batch.reset):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
            found[name].append(digest.hexdigest())
    return found


def talk() -> None:
    """A conversation of three turns, saved before and after the last."""
    from mm_rec.inference.chat_session import ChatSession
    from mm_rec.inference.loading import load_model
    from mm_rec.inference.sampling import Sampling

    loaded = load_model(Path("finished/chat"), device="cpu", precision="fp32")
    sampling = Sampling(max_new_tokens=24, seed=5)
    session = ChatSession.start(
        loaded.model, loaded.tokenizer, sampling=sampling, domain=loaded.domain, system="Be brief."
    )
    for turn in TURNS[:-1]:
        "".join(session.reply(turn))
    session.save(Path("session.safetensors"))
    said = "".join(session.reply(TURNS[-1]))
    Path("third_turn.txt").write_text(said, encoding="utf-8")
    session.save(Path("session_after.safetensors"))


def export() -> None:
    """A folder for `transformers`, and the logits that it gives."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    import mm_rec.hf  # noqa: F401
    from mm_rec.cli import main

    assert main(["export", "--model", "finished/chat", "--output", "exported"]) == 0
    model = AutoModelForCausalLM.from_pretrained("exported")
    with torch.inference_mode():
        logits = {name: model(torch.tensor([IDS]), domain=name).logits for name in ("text", "code", "all")}
    save_file(logits, "logits.safetensors")


if __name__ == "__main__":
    write_all() if sys.argv[1] == "--inside" else main(Path(sys.argv[1]).resolve())
