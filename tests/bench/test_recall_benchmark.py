"""The measurements of trained models, and the picture of all results."""

import json

import pytest
import torch

from benchmarks import recall
from benchmarks.recall_picture import draw
from mm_rec.config import ModelConfig
from mm_rec.data.synthetic import synthetic_text
from mm_rec.evaluation import bits_per_byte
from mm_rec.inference.loading import load_model
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "step_000001"
    tokenizer = train_tokenizer(synthetic_text(50), 320)
    weights = MMRecModel(CONFIG, seed=1).state_dict()
    checkpoint.save(path, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer)
    return path


def test_emptying_leaves_window_and_recurrence():
    model = MMRecModel(CONFIG, seed=1)
    tokens = torch.randint(320, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, state = model(tokens)
    emptied = recall.empty_long_term(state)
    assert torch.equal(emptied.position, state.position)
    for name, blocks in state.experts.items():
        for before, after in zip(blocks, emptied.experts[name], strict=True):
            assert torch.equal(before.h, after.h)
            assert (before.memory is None) == (after.memory is None)
            if before.memory is None:
                continue
            assert before.memory.kept_score.isfinite().any()
            assert not after.memory.kept_score.isfinite().any()
            for field in ("k", "v", "own", "score"):
                assert torch.equal(getattr(after.memory, field), getattr(before.memory, field))


def test_a_trained_model_is_measured_and_drawn(model, tmp_path, monkeypatch, capsys):
    texts = [" ".join(synthetic_text(300, seed)) for seed in range(2)]
    documents = tmp_path / "text.jsonl"
    documents.write_text("\n".join(map(json.dumps, [*texts, "too short"])))
    result, picture = tmp_path / "trained.json", tmp_path / "picture.png"
    options = ["--documents", f"text={documents}", "--device", "cpu", "--precision", "fp32", "--distances", "100"]
    command = ["recall", "trained", "--model", str(model), *options, "--result", str(result)]
    command += ["--trials", "2", "--rows", "3"]
    monkeypatch.setattr("sys.argv", command)
    recall.main()
    found = json.loads(result.read_text())
    inside = found["answers inside rows"]["text"]
    assert sum(part["answers"] for part in inside) > 20
    assert all(0 <= part["accuracy"] <= 1 < part["nats"] for part in inside)  # the model has learned nothing
    assert [cell["kind"] for cell in found["needles"]][:2] == ["pass key", "number"]
    row = found["loss by position"]["text"]
    assert row["documents"] == 2
    loaded = load_model(model, device="cpu", precision="fp32")
    chosen = recall.read_documents(documents, loaded)
    score = bits_per_byte.evaluate(loaded.model, chosen, "text")
    assert score.n_bytes == sum(len(text.encode()) for text in texts)
    assert row["carried"] == pytest.approx(
        [
            bits / size
            for bits, size in zip(
                score.bits_by_position,
                bits_per_byte.bytes_by_position(chosen, loaded.tokenizer.token_sizes),
                strict=True,
            )
            if size
        ],
        abs=1e-5,
    )
    assert row["carried"][:4] == row["emptied"][:4]  # up to place 512
    assert row["carried past 2048"] != row["emptied past 2048"]
    parts = [{"from": 0, "to": 64, "accuracy": 0.5, "answers": 9}, {"from": 64, "to": 128, "accuracy": 0, "answers": 9}]
    mqar = {"label": "new", "settings": {"tokens": 128, "pairs": 2}, "runs": [{"by_distance": parts}]}
    draw([mqar, {**mqar, "label": "old"}, found], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps("too short"))
    with pytest.raises(SystemExit, match=r"no document in .* has 4,096 tokens"):
        recall.read_documents(short, loaded)
