"""Goes on from the fixtures with this version of the package; run by conftest.py in a process of its own.

The current folder holds a copy of the fixtures. ``stopped/STAGE`` is trained to its end; everything else that is
made goes into ``new/``, under the names that it has in the fixtures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import mm_rec.hf  # noqa: F401 - registers the model
from mm_rec import cli
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.batches import Batches
from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_conversations import prepare_conversations
from mm_rec.data.prepared import Prepared
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.loading import load_model
from mm_rec.stages import STAGES
from mm_rec.text.tokenizer import Tokenizer

NEW = Path("new")


def main() -> None:
    written = json.loads(Path("written.json").read_text())
    PRESETS["tiny"] = ModelConfig(**written["model"])
    NEW.mkdir()
    for stage, command in commands(written).items():
        assert cli.main(command) == 0, stage
    prepared = prepare_all(written, Path("data"), Path("stopped/prepared"))
    (NEW / "batches.json").write_text(json.dumps(batches(written, prepared)))
    shutil.copytree("data", NEW / "data", ignore=shutil.ignore_patterns("prepared"))
    prepare_all(written, NEW / "data", NEW / "prepared")
    talk(written["turns"][-1])
    assert cli.main(["export", "--model", "finished/chat", "--output", str(NEW / "exported")]) == 0
    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)  # by the code in the folder
    with torch.inference_mode():
        logits = {name: model(torch.tensor([written["ids"]]), domain=name).logits for name in ("text", "code", "all")}
    save_file(logits, NEW / "logits.safetensors")


def commands(written: dict[str, Any]) -> dict[str, list[str]]:
    """The command by stage that goes on with its run in ``stopped``: the one that it was started with."""
    made: dict[str, list[str]] = {}
    for stage in written["stages"]:
        if STAGES[stage].conversations:
            command = ["finetune", "--task", stage]
        else:
            command = ["train", "--stage", stage, "--preset", "tiny", "--recall_share", "0"]
        for name, value in {**written["settings"], "checkpoint_dir": "stopped"}.items():
            command += [f"--{name}", str(value)]
        made[stage] = command + ([] if not made else ["--init_from", f"finished/{STAGES[stage].follows}"])
    return made


def prepare_all(written: dict[str, Any], data: Path, cache: Path) -> dict[str, Prepared]:
    """The data of each stage."""
    documents = prepare(data, written["model"]["vocab_size"])
    tokenizer = Tokenizer.load(documents.path / "tokenizer")
    return {
        stage: prepare_conversations(data / stage, tokenizer, name=stage, cache=cache)
        if STAGES[stage].conversations
        else documents
        for stage in written["stages"]
    }


def batches(written: dict[str, Any], prepared: dict[str, Prepared]) -> dict[str, list[str]]:
    """SHA-256 of the first micro-batches of each stage."""
    sizes = {"batch_size": written["settings"]["batch_size"], "seq_len": written["settings"]["seq_len"], "seed": 0}
    found: dict[str, list[str]] = {}
    for name, data in prepared.items():
        stage = STAGES[name]
        made = Batches(data.train, **sizes, layout=stage.layout, mixed=stage.mixed, document_limit=stage.document_limit)
        found[name] = []
        for batch in map(made.micro_batch, range(written["batches"])):
            digest = hashlib.sha256(str(batch.domain).encode())
            for tensor in (batch.tokens, batch.targets, batch.weight, batch.reset):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
            found[name].append(digest.hexdigest())
    return found


def talk(question: str) -> None:
    """Save the session as it was loaded, and again after one more turn."""
    loaded = load_model(Path("finished/chat"), device="cpu", precision="fp32")
    session = ChatSession.load(Path("session.safetensors"), loaded.model, loaded.tokenizer)
    dataclasses.replace(session).save(NEW / "session.safetensors")
    said = "".join(session.reply(question))
    (NEW / "third_turn.txt").write_text(said, encoding="utf-8")
    session.save(NEW / "session_after.safetensors")


if __name__ == "__main__":
    main()
