"""Row 26: model folders of strangers, whole by their manifest: loaded, or refused in one line and little time."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from serving_workloads import CONFIG, tokenizer
from torch import Tensor
from workload import Trial, workload

from mm_rec.errors import UserError
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.loading import load_model
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint, files
from mm_rec.storage.checkpoint import TRAINING_FILES

SECONDS, MEMORY_BYTES = 20.0, 1_500_000_000
SIZES = ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "gate_every", "window")
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 64, 10**6, 10**9, 2**31, 2**63, 10**30, 10**4000, 0.5, 4.0, 1e308, float("nan"),
    float("inf"), "", "4", "x" * 10**6, [], [4], {}, {"a": 1}, [[]],
)  # fmt: skip
NAMES: tuple[Any, ...] = (
    "", ".", "a.b", "..", "/", "a/b", "text", "code", "keys", "items", "forward", "training", "_modules", "all", "\0",
    "ışık", " ", "<|end|>", 5, None, [], "a" * 10**5, "text ", "TEXT", "__class__", "0",
)  # fmt: skip
TRUNCATION = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}


def change_config(rng: random.Random, folder: Path) -> str:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 2, 3])):
        match rng.choice(["size", "size", "size", "experts", "other", "missing"]):
            case "size":
                values[rng.choice(SIZES)] = rng.choice(ODD)
            case "experts":
                names = rng.choices(NAMES, k=rng.choice([0, 1, 2, 2, 3, 1000]))
                values["experts"] = rng.choice([names, rng.choice(ODD), dict.fromkeys(map(str, names), 1)])
            case "other":
                values[rng.choice(["rotary_base", "format", "domain", "model_type", "x"])] = rng.choice(ODD)
            case "missing":
                values.pop(rng.choice(list(values)), None)
    path.write_text(json.dumps(values))
    return "config.json"


def change_json(rng: random.Random, folder: Path) -> str:
    name = rng.choice(["config.json", "tokenizer.json"])
    text = (folder / name).read_text()
    contents = [
        "",
        "[]",
        "5",
        "null",
        '"x"',
        "[" * 100_000,
        '{"a":' * 100_000,
        text * 2,
        text.replace("1", "1" * 5000, 1),
    ]
    (folder / name).write_text(rng.choice([*contents, text[: rng.randrange(len(text))]]))
    return f"{name} that is none"


def change_weights(rng: random.Random, folder: Path) -> str:
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {name: one.clone() for name, one in load_file(path).items()}
    name = rng.choice(list(tensors))
    types = (torch.int64, torch.uint8, torch.bool, torch.float64, torch.complex64, torch.float16, torch.float8_e4m3fn)
    changes: list[Callable[[], object]] = [
        lambda: tensors.pop(name),
        lambda: tensors.update(
            {rng.choice(["x", "experts.text.blocks.999.h", "experts.x.blocks.0.w"]): torch.zeros(2)}
        ),
        lambda: tensors.update({name: tensors[name].to(rng.choice(types))}),
        lambda: tensors.update({name: tensors[name][None]}),
        lambda: tensors.update({name: tensors[name].reshape(-1)[:1]}),
        lambda: tensors.update({name: torch.full_like(tensors[name], rng.choice([float("nan"), float("inf"), 3e38]))}),
        lambda: tensors.update({f"experts.text.blocks.{i}.more": torch.zeros(1) for i in range(5000)}),
        lambda: tensors.clear(),
    ]
    rng.choice(changes)()
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    return "weights"


def change_tokenizer(rng: random.Random, folder: Path) -> str:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    model = values["model"]
    names = list(model["vocab"])
    changes: list[Callable[[], object]] = [
        lambda: model["vocab"].pop(rng.choice(names)),
        lambda: model["vocab"].update({rng.choice(names): rng.choice([-1, 10**6, 2**32, 2**40, 0, 1.5, "a", None])}),
        lambda: model["vocab"].update({rng.choice(["漢", "\n", " ", "é", "", "new"]): len(names)}),
        lambda: model["vocab"].update({f"t{i}": len(names) + i for i in range(2000)}),
        lambda: model.update({"merges": rng.choice([[], [["a"]], [["q", "zzzz"]], "x", None, [[1, 2]]])}),
        lambda: model.update({"type": rng.choice(["WordPiece", "Unigram", "WordLevel", "x", 5])}),
        lambda: values.update({"normalizer": rng.choice([{"type": "Lowercase"}, {"type": "x"}, {"type": "NFKC"}, 5])}),
        lambda: values.update({"pre_tokenizer": rng.choice([None, {"type": "Whitespace"}, [], "x"])}),
        lambda: values.update({"decoder": rng.choice([None, {"type": "Metaspace"}, {"type": "WordPiece"}, 5])}),
        lambda: values.update({"post_processor": rng.choice([None, {"type": "x"}, 5])}),
        lambda: values.update({"added_tokens": rng.choice([[], None, values["added_tokens"][:3], [5]])}),
        lambda: values.update({"truncation": TRUNCATION}),
        lambda: values.pop(rng.choice(list(values))),
    ]  # fmt: skip
    rng.choice(changes)()
    path.write_text(json.dumps(values))
    return "tokenizer"


CHANGES = (change_config, change_config, change_config, change_json, change_weights, change_tokenizer, change_tokenizer)


@workload(26, "model folders with odd sizes, names, types, tokenizers and weights, whole by their manifest",
          unit="folders", quick=20, soak=500, idle=["the model answers"])  # fmt: skip
def models_of_strangers(folder: Path) -> Iterator[Trial]:
    torch.set_num_threads(1)
    sound, copy, path = folder / "step_000001", folder / "copy", folder / "stranger"
    weights = MMRecModel(CONFIG, seed=3).state_dict()
    checkpoint.save(
        sound, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={"step": 1}, tokenizer=tokenizer()
    )
    kept = [one for one in sound.iterdir() if one.name not in (*TRAINING_FILES, files.MANIFEST)]

    def trial(seed: int) -> str:
        rng = random.Random(seed)
        for old in (copy, path):
            shutil.rmtree(old, ignore_errors=True)
        copy.mkdir()
        for file in kept:
            shutil.copyfile(file, copy / file.name)
        kind = rng.choice(CHANGES)(rng, copy)
        with files.atomic_folder(path) as written:
            for file in copy.iterdir():
                shutil.copyfile(file, written / file.name)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()  # the load of the machine does not move it
        try:
            loaded = load_model(path, device="cpu", precision="fp32")
            session = ChatSession.start(loaded.model, loaded.tokenizer, sampling=Sampling(max_new_tokens=3))
            session.answer("Hello, ışık!")
            outcome = "the model answers"
        except UserError as error:
            message = str(error)
            assert "\n" not in message, message
            assert len(message) < 1000, message[:2000]
            outcome = f"{kind}: refused"
        assert time.process_time() - start < SECONDS, (kind, time.process_time() - start)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
        assert grown < MEMORY_BYTES, (kind, grown)
        return outcome

    yield trial
