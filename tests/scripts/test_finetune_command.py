"""``mm-rec finetune`` and ``mm-rec pipeline``: every stage in its order, stopped and gone on, answers only."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mm_rec.cli import main
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.synthetic import write_synthetic
from mm_rec.inference.loading import load_model
from mm_rec.scripts import pipeline_command
from mm_rec.storage import checkpoint
from mm_rec.training import trainer

FLAGS = ["--checkpoint_interval", "2", "--eval_interval", "3", "--valid_bytes", "100", "--device", "cpu"]
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i * i}."}]}
    for i in range(40)
]


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model of one block an expert, short texts, no pictures, one thread."""
    config = ModelConfig(
        vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5
    )
    monkeypatch.setitem(PRESETS, "tiny", config)
    monkeypatch.setattr(trainer, "SAMPLE_TOKENS", 3)
    monkeypatch.setattr(pipeline_command, "TRANSCRIPT_TOKENS", 3)
    monkeypatch.setattr(trainer, "draw_losses", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_synthetic(tmp_path / "data", 12)
    for task, rows in (("instruct", ROWS[:20]), ("chat", ROWS)):
        (tmp_path / "data" / task).mkdir()
        (tmp_path / "data" / task / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    return main([*arguments, "--data_dir", str(folder / "data"), "--checkpoint_dir", str(folder / "runs"), *FLAGS])


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_pipeline_runs_every_stage_and_goes_on_where_it_was_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = folder / "pipeline.yaml"
    settings.write_text("preset: tiny\nseq_len: 16\nmax_steps: 4\nstages: {chat: {max_steps: 6}}\n")
    monkeypatch.setenv("MM_REC_MAX_STEPS", "3")
    assert run(folder, "pipeline", "--config", str(settings)) == 0
    monkeypatch.delenv("MM_REC_MAX_STEPS")
    assert [path.name for path in (folder / "runs" / "chat" / "checkpoints").iterdir()][-1:] != ["step_000006"]
    assert run(folder, "pipeline", "--config", str(settings)) == 0
    capsys.readouterr()
    before = sorted((folder / "runs").rglob("*.safetensors"))
    assert run(folder, "pipeline", "--config", str(settings)) == 0
    out = capsys.readouterr().out
    steps = {"stage1": 4, "stage2": 4, "stage3": 4, "instruct": 4, "chat": 6}
    for stage, count in steps.items():
        assert f"{stage} is finished" in out
        newest = max((folder / "runs").glob(f"{stage}*")) / "checkpoints" / checkpoint.checkpoint_name(count)
        assert checkpoint.load(newest).trainer["step"] == count
    assert sorted((folder / "runs").rglob("*.safetensors")) == before
    for phase in ("pretrain", "instruct", "chat"):
        said = (folder / "runs" / f"transcript_{phase}.txt").read_text()
        assert said.count("user: ") >= 3
        assert said.count("assistant: ") >= 3
    assert load_model(folder / "runs").path.parent.parent.name.startswith("chat")


def test_answers_are_learned_and_samples_are_conversations(folder: Path) -> None:
    assert run(folder, "train", "--preset", "tiny", "--seq_len", "32", "--max_steps", "2") == 0
    start = ["--init_from", str(folder / "runs" / "stage1")]
    tuning = ["finetune", "--task", "chat", "--seq_len", "32", "--max_steps", "60", "--lr", "0.1", *start]
    assert run(folder, *tuning) == 0
    done = folder / "runs" / "chat"
    losses = [record["loss"] for record in records(done) if "loss" in record]
    valid = [record["valid"]["chat"] for record in records(done) if "valid" in record]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert valid[-1] < 0.9 * valid[0]
    assert not any("valid_by_expert" in record for record in records(done))
    sample = (done / "samples" / "step_000060.txt").read_text()
    assert sample.startswith("user: Hello! Who are you?\nassistant: ")
    tokenizer = (done / "checkpoints" / "step_000060" / "tokenizer.json").read_bytes()
    assert tokenizer == (folder / "runs" / "stage1" / "checkpoints" / "step_000002" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["finetune", "--task", "instruct"], "instruct starts from a trained stage3 and there is none"),
        (["finetune", "--task", "chat"], "run `mm-rec finetune --task instruct` first"),
        (["finetune", "--data", "nowhere"], "mm-rec data --source alpaca"),
        (["pipeline", "--chat_data", "nowhere"], "mm-rec data --source ultrachat"),
    ],
)
def test_what_is_missing_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert run(folder, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert problem in err


def test_bad_rows_stop_it_unless_they_are_to_be_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "train", "--preset", "tiny", "--seq_len", "16", "--max_steps", "1") == 0
    rows = folder / "data" / "instruct" / "rows.jsonl"
    rows.write_text(rows.read_text() + '\n{"instruction": "Answer!", "output": ""}\n')
    start = ["--init_from", str(folder / "runs" / "stage1"), "--max_steps", "1", "--seq_len", "16"]
    assert run(folder, "finetune", *start) == 2
    assert f"{rows}:21: an answer of the assistant is empty" in capsys.readouterr().err
    assert run(folder, "finetune", *start, "--skip_bad", "1") == 0
    assert "20 conversations read, 1 bad rows left out" in capsys.readouterr().out


def lora_run(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, stopped_at: int | None) -> Path:
    """Three steps of adapters on the same start, stopped once in between if so asked; returns the final checkpoint."""
    start = ["--init_from", str(folder / "runs" / "stage1" / "checkpoints" / "step_000002")]
    tuning = ["finetune", "--task", "instruct", "--seq_len", "32", "--max_steps", "40", "--lora", "2", "--lr", "0.3"]
    tuning += [*start, "--data_dir", str(folder / "data"), "--checkpoint_dir", str(folder / name), *FLAGS]
    tuning += ["--eval_interval", "100"]  # at the end alone, so that the last checkpoint is the best
    if stopped_at is not None:
        monkeypatch.setenv("MM_REC_MAX_STEPS", str(stopped_at))
        assert main(tuning) == 0
        monkeypatch.delenv("MM_REC_MAX_STEPS")
    assert main(tuning) == 0
    return folder / name / "instruct" / "checkpoints" / "step_000040"


def test_adapters_are_trained_in_place_of_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "train", "--preset", "tiny", "--seq_len", "32", "--max_steps", "2") == 0
    whole, stopped = (lora_run(folder, monkeypatch, name, at) for name, at in (("one", None), ("two", 5)))
    for name in ("model.safetensors", "optimizer.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    losses = [record["loss"] for record in records(whole.parent.parent) if "loss" in record]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5

    base = folder / "runs" / "stage1"
    before, after = (checkpoint.load(path, weights_only=True).weights for path in (checkpoint.resolve(base), whole))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n, one in before.items() if n.startswith("experts.") and one.ndim == 2}
    for name in changed:  # of the rank that was asked for, at most
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4) <= 2, name

    for path in (whole, whole / "adapter", whole.parent.parent):
        added = load_model(base, device="cpu", precision="fp32", adapter=path).model.state_dict()
        assert all(torch.equal(added[name], tensor) for name, tensor in after.items())
    prompt = ["--prompt", "What", "--temperature", "0", "--max_new_tokens", "5", "--device", "cpu"]
    capsys.readouterr()
    assert main(["generate", "--model", str(base), "--adapter", str(whole), *prompt, "--domain", "all"]) == 0
    assert main(["generate", "--model", str(whole), *prompt, "--domain", "all"]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == second
    for path in (whole, whole / "adapter"):  # the merged model has it already
        assert main(["generate", "--model", str(folder / "one"), "--adapter", str(path), *prompt]) == 2
        assert "was not trained on" in capsys.readouterr().err
    merged = folder / "merged"
    assert main(["export", "--model", str(base), "--adapter", str(whole), "--output", str(merged)]) == 0
    exported = checkpoint.load(merged, weights_only=True).weights
    assert all(torch.equal(exported[name], tensor) for name, tensor in after.items())

    file = whole / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x40")
    for path in (whole, whole / "adapter"):
        assert main(["generate", "--model", str(base), "--adapter", str(path), *prompt]) == 2
        assert "is not what the manifest says" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="passed over a checkpoint"):
        load_model(base, device="cpu", precision="fp32", adapter=whole.parent.parent)


def test_what_an_adapter_cannot_do_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "train", "--preset", "tiny", "--seq_len", "32", "--max_steps", "2") == 0
    config = folder / "runs" / "lora.yaml"
    config.write_text("lora: 2\n")
    assert run(folder, "train", "--preset", "tiny", "--max_steps", "3", "--config", str(config)) == 2
    assert "--lora is for fine-tuning (mm-rec finetune)" in capsys.readouterr().err
    model = str(folder / "runs" / "stage1")
    assert main(["generate", "--model", model, "--adapter", str(folder / "data"), "--prompt", "x"]) == 2
    assert "there is no adapter in" in capsys.readouterr().err


def test_questions_are_made_from_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = folder / "documents"
    documents.mkdir()
    for word in ("shelf", "board", "chair", "table", "lamp", "door", "wall", "roof", "floor", "stair", "post", "gate"):
        text = f"# Of the {word}\n\nThe {word} is a thing of wood that stands in every house.\n"
        (documents / f"{word}.md").write_text(text)
    flags = ["--preset", "tiny", "--seq_len", "16", "--max_steps", "3"]
    assert run(folder, "train", "--stage", "stage1", *flags) == 0
    capsys.readouterr()
    made = ["finetune", "--init_from", str(folder / "runs" / "stage1"), "--pairs_from", str(documents), *flags[2:]]
    assert run(folder, *made, "--preview") == 0
    out = capsys.readouterr().out
    assert "pairs to train on" in out
    assert "question: The " in out
    assert "answer: The " in out
    assert not (folder / "runs" / "instruct").exists()
    assert run(folder, *made) == 0
    assert run(folder, *made) == 0
    assert "instruct is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(folder, *made, "--data", str(documents))
    with pytest.raises(SystemExit):
        run(folder, "finetune", "--preview")
