"""Row 19: prepared data that are damaged, and sources that change or vanish between two runs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from damage_workloads import damaged
from supervisor import Supervisor
from tiny_runs import arguments, clear, difference, result, write_data
from workload import Trial, refusal, workload

from mm_rec.data.pack import file_sha256
from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_conversations import prepare_conversations
from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError
from mm_rec.scripts.doctor_command import check_prepared
from mm_rec.storage.files import atomic_folder

VOCABULARY = 320


class Data:
    """Prepared documents and conversations, and how they are opened again."""

    def __init__(self, folder: Path) -> None:
        self.raw, self.cache = folder / "data", folder / "runs" / "prepared"
        write_data(self.raw, 30)
        self.cache.parent.mkdir()
        self.tokenizer = self.documents().tokenizer
        self.sound = {path: path.read_bytes() for prepared in (self.documents(), self.conversations())
                      for path in prepared.path.rglob("*") if path.is_file()}  # fmt: skip
        self.identities = (self.documents().data_sha256, self.conversations().data_sha256)

    def documents(self) -> Prepared:
        return prepare(self.raw, VOCABULARY, filters=False)

    def conversations(self) -> Prepared:
        return prepare_conversations(self.raw / "chat", self.tokenizer, name="chat", cache=self.cache)

    def open(self, path: Path) -> Prepared:
        """What a run that uses the file ``path`` does before anything else."""
        return self.conversations() if path.is_relative_to(self.cache) else self.documents()

    def restore(self, paths: list[Path]) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.sound[path])


def shift_offsets(content: bytes, rng: random.Random) -> bytes:
    """The documents' ends moved, or in another order, in a file of the same size."""
    head, numbers = content[:128], np.frombuffer(content[128:], np.int64).copy()
    while np.array_equal(numbers, np.frombuffer(content[128:], np.int64)):
        rng.choice([lambda: rng.shuffle(numbers), lambda: np.add.at(numbers, rng.randrange(len(numbers)), 1)])()
    return head + numbers.tobytes()


def reorder_tokens(content: bytes, rng: random.Random) -> bytes:
    tokens = np.frombuffer(content, np.uint16).copy()
    while tokens.tobytes() == content:
        first, second = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        tokens[[first, second]] = tokens[[second, first]]
    return tokens.tobytes()


@workload(19, "flipped bits, cut, reordered, swapped, lost and foreign files of prepared documents and conversations",
          unit="shards", quick=40, soak=1000)  # fmt: skip
def damaged_shards(folder: Path) -> Iterator[Trial]:
    data = Data(folder)

    def trial(seed: int) -> str:
        rng = random.Random(seed)
        path = rng.choice([one for one, content in data.sound.items() if content])
        content, changed = data.sound[path], [path]
        kind = rng.choice(["content"] * 4 + ["reordered"] * 2 + ["removed", "swapped"])
        if kind == "reordered":
            path = rng.choice([one for one in data.sound if one.name in ("tokens.bin", "offsets.npy")])
            changed, make = [path], shift_offsets if path.suffix == ".npy" else reorder_tokens
            path.write_bytes(make(data.sound[path], rng))
        elif kind == "removed":
            path.unlink()
        elif kind == "swapped":
            other = rng.choice([one for one, its in data.sound.items() if its != content])
            changed = [path, other]
            path.write_bytes(data.sound[other])
            other.write_bytes(content)
        else:
            content, kind = damaged(content, rng)
            path.write_bytes(content)
        try:
            for one in changed[:1] if kind != "swapped" else changed:
                message = refusal(UserError, lambda one=one: data.open(one), (kind, changed))
                # What is wrong in a manifest shows in the file that it speaks of.
                named = any(str(file) in message or file.name in message for file in changed)
                assert named or any(file.name == "manifest.json" for file in changed), (message, changed)
                assert "delete" in message
                findings = check_prepared(one.parents[1] if one.parents[1].name == "prepared" else one.parents[2])
                assert any(finding.level == "broken" for finding in findings), (kind, changed)
        finally:
            data.restore(changed)
        assert (data.documents().data_sha256, data.conversations().data_sha256) == data.identities
        return f"{kind.replace('_', ' ')}: refused, the file named"

    yield trial


@workload(19, "forged shards whose hashes fit: token ids beyond the vocabulary, documents that end before they start",
          unit="shards", quick=4, soak=100)  # fmt: skip
def forged_shards(folder: Path) -> Iterator[Trial]:
    data = Data(folder)
    prepared = data.documents().path

    def trial(seed: int) -> str:
        rng = random.Random(seed)
        name = rng.choice(["text-train", "text-valid", "code-train", "code-valid"])
        shutil.move(prepared, folder / "sound")
        try:
            with atomic_folder(prepared) as forged:
                for path in (folder / "sound").iterdir():
                    if path.name != "manifest.json":
                        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, forged / path.name)
                kind, expected = forge(forged / name, rng)
            message = refusal(UserError, data.documents, kind)
            assert expected in message
            assert name in message
        finally:
            shutil.rmtree(prepared)
            shutil.move(folder / "sound", prepared)
        return f"{kind}: refused, the store named"

    yield trial


def forge(store: Path, rng: random.Random) -> tuple[str, str]:
    """Change a store so that its index fits it; returns what was changed, and what the refusal has to say."""
    kind = rng.choice(["ids beyond the vocabulary", "offsets out of order"])
    if kind == "ids beyond the vocabulary":
        tokens = np.fromfile(store / "tokens.bin", np.uint16)
        tokens[rng.randrange(len(tokens))] = rng.randint(VOCABULARY, 65_535)
        tokens.tofile(store / "tokens.bin")
        expected = "and the vocabulary has"
    else:
        offsets = np.load(store / "offsets.npy")
        offsets[rng.randrange(len(offsets))] += rng.choice([-1, 1]) * rng.randint(len(offsets) ** 2, 10**6)
        np.save(store / "offsets.npy", offsets)
        expected = "its offsets do not fit its tokens"
    index = json.loads((store / "index.json").read_bytes())
    for name, entry in index["files"].items():
        entry |= {"bytes": (store / name).stat().st_size, "sha256": file_sha256(store / name)}
    (store / "index.json").write_text(json.dumps(index))
    return kind, expected


@workload(19, "sources changed, added, emptied or removed between two runs of one command", unit="pairs of runs",
          quick=1, soak=20)  # fmt: skip
def changed_sources(folder: Path) -> Iterator[Trial]:
    supervisor = Supervisor(folder)
    raw = folder / "raw"
    write_data(raw)
    write_data(folder / "longer", 13)

    def trial(seed: int) -> str:
        rng, root, data = random.Random(seed), folder / f"runs{seed}", folder / f"data{seed}"
        shutil.copytree(raw, data)
        command = arguments("stage1", data, root, None)
        first = supervisor.run("tiny_runs.run", command=[*command, "--max_steps", "4"])
        assert first.status == 0, first.log
        before, path = result(root / "stage1"), data / rng.choice(["text", "code"]) / "synthetic.jsonl"
        sound = path.read_bytes()
        kind = rng.choice(["a row changed", "a row added", "emptied", "removed"])
        match kind:
            case "a row changed":
                path.write_bytes(sound.replace(b"e", b"a", 1))
            case "a row added":
                *_, row = (folder / "longer" / path.relative_to(data)).read_bytes().splitlines(keepends=True)
                path.write_bytes(sound + row)
            case "emptied":
                path.write_bytes(b"")
            case "removed":
                path.unlink()
        again = supervisor.run("tiny_runs.run", command=command)
        assert difference(result(root / "stage1"), before) == [], "another run's data changed a run"
        if again.status == 2:
            lines = [line for line in again.log.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, again.log
            outcome = "refused, the file named"
            assert path.name in lines[0] or str(path.parent) in lines[0], lines
        else:
            assert again.status == 0, again.log
            assert "new run " in again.log, again.log
            assert "stage1 is another run: data was" in again.log, again.log
            outcome = "another run, and it says why; the first is as it was"
        path.write_bytes(sound)
        back = supervisor.run("tiny_runs.run", command=command)
        assert back.status == 0, back.log
        assert "goes on from step_000004" in back.log or "new run" not in back.log, back.log
        clear(root)
        clear(data)
        return f"{kind}: {outcome}"

    yield trial
