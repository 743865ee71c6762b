"""Row 24: damaged and forged session files are asked for beside running streams: their own request ends, no other."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from connection_workloads import read_stream
from damage_workloads import damaged
from serving_workloads import PATHS, check_reply, socket_of
from torch import Tensor
from workload import Trial, workload

from mm_rec.inference import session_file

STREAMS = 3
STREAM_TOKENS = 60
TYPES = (torch.float16, torch.float64, torch.uint8, torch.bool)
Forge = Callable[[random.Random, dict[str, Tensor], dict[str, Any]], object]


def some(rng: random.Random, tensors: dict[str, Tensor]) -> str:
    """The name of a tensor of the state."""
    return rng.choice([name for name in tensors if name not in ("turns", "generator")])


def set_number(rng: random.Random, tensors: dict[str, Tensor], value: float) -> None:
    """Set one number of a tensor that has a fraction, or all of them."""
    floating = [tensor for name, tensor in tensors.items() if tensor.is_floating_point() and name != "position"]
    flat = rng.choice(floating).view(-1)
    flat[slice(None) if rng.random() < 0.5 else rng.randrange(len(flat))] = value


def replace(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors[name] = change(tensors[name]).contiguous()


FORGERIES: dict[str, Forge] = {
    "position below zero": lambda rng, tensors, _: tensors["position"].fill_(-rng.randint(1, 2**63)),
    "position beyond counting": lambda rng, tensors, _: tensors["position"].fill_(rng.randint(2**48, 2**63 - 1)),
    "many positions": lambda rng, tensors, _: replace(tensors, "position", lambda one: one.repeat(10**5)),
    "no rows": lambda rng, tensors, _: tensors.update({name: one[:0] for name, one in tensors.items() if one.ndim}),
    "rows of another count": lambda rng, tensors, _: replace(
        tensors, some(rng, tensors), lambda one: torch.cat([one, one])
    ),
    "NaN": lambda rng, tensors, _: set_number(rng, tensors, float("nan")),
    "infinity": lambda rng, tensors, _: set_number(rng, tensors, rng.choice([1, -1]) * float("inf")),
    "huge numbers": lambda rng, tensors, _: set_number(rng, tensors, rng.choice([1, -1]) * 3e38),
    "another type": lambda rng, tensors, _: replace(
        tensors, some(rng, tensors), lambda one: one.to(rng.choice(TYPES))
    ),
    "another shape": lambda rng, tensors, _: replace(tensors, some(rng, tensors), lambda one: one[None]),
    "a tensor less": lambda rng, tensors, _: tensors.pop(rng.choice(list(tensors))),
    "a tensor more": lambda rng, tensors, _: tensors.update({rng.choice(["x", "experts.text.h", ""]): torch.zeros(2)}),
    "turns": lambda rng, tensors, _: tensors.update(
        turns=rng.choice([torch.tensor(-1), torch.ones(2), torch.tensor(0.5), torch.zeros(0), torch.tensor(2**62)])
    ),
    "generator": lambda rng, tensors, _: replace(tensors, "generator", lambda one: rng.choice([one[:9], one.float()])),
    "identity": lambda rng, _, settings: settings.update(
        {rng.choice(["tokenizer", "precision", "model", "domain"]): rng.choice([5, [], "0" * 64, {"a": 1}])}
    ),
    "settings": lambda rng, _, settings: settings.update(
        {rng.choice(["format", "sampling", "system"]): rng.choice([None, 2, -1, [], "x" * 10**5, {"a": 10**400}])}
    ),
}  # fmt: skip


def forge(rng: random.Random, sound: Path, path: Path) -> str:
    """Write to ``path`` a session that is damaged, or whole by its digest and wrong in its content; says how."""
    if rng.random() < 0.3:
        content, kind = damaged(sound.read_bytes(), rng)
        path.write_bytes(content)
        return kind.replace("_", " ")
    tensors, settings = session_file.read(sound)
    kind = rng.choice(list(FORGERIES))
    FORGERIES[kind](rng, tensors, settings)
    # settings come after the number of the format and win over it
    session_file.write(path, {name: tensor.clone() for name, tensor in tensors.items()}, settings)
    return kind


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@workload(24, "session files that are damaged, or forged with a right digest, asked for beside three streams",
          unit="session files", quick=12, soak=500)  # fmt: skip
def sessions_beside_streams(folder: Path) -> Iterator[Trial]:
    with socket_of(folder, max_tokens=STREAM_TOKENS) as (port, _), without_log():
        sessions = folder / "sessions"

        def ask(name: str) -> int:
            message = {"role": "user", "content": "hi"}
            body = {"model": "tiny", "messages": [message], "session": name, "max_tokens": 2}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection):
                connection.request("POST", PATHS[1], json.dumps(body), {"Content-Type": "application/json"})
                reply = connection.getresponse()
                text = reply.read().decode()
            check_reply(reply.status, {}, text, name)
            assert str(folder) not in text
            assert "delete" not in text.lower()
            return reply.status

        assert ask("sound") == 200

        def trial(seed: int) -> str:
            kind = forge(random.Random(seed), sessions / "sound.safetensors", sessions / "forged.safetensors")
            pieces: list[list[str]] = [[] for _ in range(STREAMS)]
            begun = [threading.Event() for _ in pieces]
            body = {"model": "tiny", "prompt": "a", "max_tokens": STREAM_TOKENS, "stream": True}
            threads = [
                threading.Thread(target=read_stream, args=(port, PATHS[0], {**body, "seed": index}, *one))
                for index, one in enumerate(zip(pieces, begun, strict=True))
            ]
            for thread in threads:
                thread.start()
            assert all(one.wait(60) for one in begun)
            status = ask("forged")
            for thread in threads:
                thread.join()
            for one in pieces:
                assert one[-1] == "[DONE]", (kind, one[-3:])
                assert json.loads(one[-2])["choices"][0]["finish_reason"] in ("stop", "length"), (kind, one[-2])
            assert ask("sound") == 200, kind
            if status == 200:  # what a server does not look at, or numbers that the model takes
                assert kind in ("huge numbers", "settings"), kind
                return f"{kind}: taken, as it does no harm"
            assert status == 409, (kind, status)
            return f"{kind}: refused"

        yield trial
