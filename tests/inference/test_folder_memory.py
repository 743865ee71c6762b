"""A folder read once into the state that a conversation begins from."""

from pathlib import Path

import pytest
import torch

from mm_rec.config import ModelConfig
from mm_rec.errors import UserError
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.folder_memory import read_folder
from mm_rec.inference.generate import generate, read_prompt
from mm_rec.inference.loading import Loaded
from mm_rec.inference.sampling import Sampling
from mm_rec.model import MMRecModel
from mm_rec.state import ModelState, flatten_state
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)
FIRST, SECOND = "The lamp stands on the table. " * 9, "def f(x):\n    return x\n" * 5


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(FIRST)
    (folder / "deep" / "b.md").write_text(SECOND)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def make(seed: int = 1) -> Loaded:
    tokenizer = train_tokenizer([FIRST, SECOND] * 3, 320)
    return Loaded(MMRecModel(CONFIG, seed=seed).eval(), tokenizer, "text", Path("none"), "full")


def same(one: ModelState, other: ModelState) -> bool:
    pairs = zip(flatten_state(one).values(), flatten_state(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_it_is_the_state_after_all_documents(notes: Path) -> None:
    loaded, told = make(), list[str]()
    memory = read_folder(notes, loaded, "code", told.append)
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(FIRST)]
    _, state = read_prompt(loaded.model, ids, "code")
    _, state = read_prompt(loaded.model, loaded.tokenizer.encode("\n\n" + SECOND), "code", state)
    assert same(memory.state, state)
    assert memory.n_tokens == int(state.position[0]) > 50
    assert memory.domain == "code"
    assert any(line.startswith(f"{notes}: 3 files, 2 read and 1 left out") for line in told)
    assert told[-1].startswith(f"{notes} is read: {memory.n_tokens} tokens, remembered in ")
    assert " by the expert code; it took " in told[-1]


def test_it_is_kept_for_the_same_model_and_documents(notes: Path) -> None:
    loaded, told = make(), list[str]()
    first = read_folder(notes, loaded, "text", told.append)
    size = first.file.stat().st_size
    again = read_folder(notes, loaded, "text", told.append)
    assert again.file == first.file
    assert same(again.state, first.state)
    assert "was read before" in told[-1]
    others = [read_folder(notes, make(2), "text", told.append), read_folder(notes, loaded, "all", told.append)]
    (notes / "a.txt").write_text(FIRST * 40)
    others.append(read_folder(notes, loaded, "text", told.append))
    assert len({first.file, *(one.file for one in others)}) == 4
    assert others[-1].file.stat().st_size == size  # however much was read
    assert not any("was read before" in line for line in told[-3:])


def test_a_damaged_file_is_read_anew_and_said(notes: Path) -> None:
    loaded, told = make(), list[str]()
    memory = read_folder(notes, loaded, "text")
    content = bytearray(memory.file.read_bytes())
    content[-9] ^= 1
    memory.file.write_bytes(content)
    assert same(read_folder(notes, loaded, "text", told.append).state, memory.state)
    assert told[0].endswith("the documents are read again")
    told.clear()
    read_folder(notes, loaded, "text", told.append)
    assert "was read before" in told[-1]


def test_where_it_cannot_be_kept_that_is_said(notes: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    told: list[str] = []
    assert read_folder(notes, make(), "text", told.append).n_tokens > 50
    assert any(line.startswith("the memory is not kept for the next time: ") for line in told)


def test_the_best_expert_reads_where_nothing_is_fused(notes: Path) -> None:
    loaded = make()
    memory = read_folder(notes, loaded)
    assert memory.domain == loaded.choose_domain(None, f"{FIRST}\n\n{SECOND}\n\n")


def test_a_folder_without_documents_is_refused(notes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there are no documents in .*empty that can be read"):
        read_folder(tmp_path / "empty", make())
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"there is no text in the documents in .*blank"):
        read_folder(tmp_path / "blank", make(), "text")


def test_conversations_and_texts_go_on_from_it_and_leave_it_as_it_is(notes: Path) -> None:
    loaded = make()
    model, tokenizer = loaded.model, loaded.tokenizer
    memory = read_folder(notes, loaded, "text")
    before = {name: tensor.clone() for name, tensor in flatten_state(memory.state).items()}
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    for system in ("", "Be brief."):
        start = ChatSession.start(
            model, tokenizer, sampling=sampling, domain="text", system=system, memory=memory.state
        )
        first = start.answer("Where is the lamp?")
        kept = ChatSession.load(memory.file, model, tokenizer, sampling=sampling)
        assert kept.n_tokens == memory.n_tokens
        if not system:
            assert kept.answer("Where is the lamp?") == first
        assert start.n_tokens > memory.n_tokens
    texts = ["".join(generate(model, tokenizer, "The", sampling, "text", None, memory.state)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in flatten_state(memory.state).items())
