"""The model card of an exported folder: what the runs, the data and the measurements say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from mm_rec.cli import main
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.data.manifest import record_file
from mm_rec.data.pack import file_sha256
from mm_rec.data.prepare import PART
from mm_rec.data.synthetic import write_synthetic
from mm_rec.evaluation import model_card
from mm_rec.evaluation.run_history import read_history
from mm_rec.inference.loading import load_model
from mm_rec.storage import checkpoint
from mm_rec.training import trainer

FLAGS = ["--seq_len", "16", "--max_steps", "2", "--eval_interval", "2", "--valid_bytes", "100", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of stage1, on a download and documents of one's own, and of chat after it, of two steps."""
    root, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    config = ModelConfig(
        vocab_size=320, d_model=16, n_heads=2, n_layers=1, d_ff=16, gate_every=1, window=8, kept_pairs=5
    )
    data = root / "data"
    write_synthetic(data, 12)
    (data / "chat").mkdir()
    text, code = (next((data / name).iterdir()).relative_to(data).as_posix() for name in ("text", "code"))
    rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i * i}."}] for i in range(40)]
    (data / "chat" / "builtin.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    entries = {
        text: {
            "source": "wikitext", "origin": {"hub_id": "Salesforce/wikitext"}, "revision": "b08601e0",
            "licence": "CC BY-SA 3.0 | GFDL",
        },
        code: {"source": "own", "origin": {"path": "/home/ada/secret"}},
        "chat/builtin.jsonl": {"source": "builtin", "revision": "3.11", "licence": "as each package"},
    }  # fmt: skip
    for name, entry in entries.items():
        record_file(data, name, {**entry, "samples": 60, "sha256": file_sha256(data / name)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", config)
        patch.setattr(trainer, "SAMPLE_TOKENS", 3)
        patch.setattr(trainer, "draw_losses", lambda *_: None)
        torch.set_num_threads(1)
        here = ["--data_dir", str(data), "--checkpoint_dir", str(root / "runs"), *FLAGS]
        assert main(["train", "--preset", "tiny", *here]) == 0
        assert main(["finetune", "--task", "chat", "--init_from", str(root / "runs" / "stage1"), *here]) == 0
        torch.set_num_threads(threads)
    return root


def card_of(model: Path, output: Path, *options: str) -> tuple[dict, str]:
    """The metadata and the text of the card that an export of ``model`` writes."""
    assert main(["export", "--model", str(model), "--output", str(output), *options]) == 0
    _, metadata, text = (output / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def last_validation(run: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [one["valid"] for one in records if "valid" in one][-1]


def test_the_card_tells_what_the_runs_say(trained: Path, tmp_path: Path) -> None:
    metadata, text = card_of(trained / "runs", tmp_path / "my-model")
    assert metadata == {
        "library_name": "mm-rec",
        "pipeline_tag": "text-generation",
        "tags": ["mm-rec"],
        "datasets": ["Salesforce/wikitext"],
    }
    loaded = load_model(trained / "runs", device="cpu")
    assert text.lstrip().startswith("# my-model\n")
    assert f"| parameters | {sum(p.numel() for p in loaded.model.parameters()):,}, in float32 |" in text
    assert text.index("| stage1 | local consistency") < text.index("| chat | ")
    assert "wikitext (Salesforce/wikitext at b08601e0), licence: CC BY-SA 3.0 / GFDL |" in text
    assert "| builtin, licence: as each package |" in text
    assert "no download that is noted |" in text
    assert "secret" not in text, "paths of this machine stay here"
    assert str(trained) not in text
    assert f"| chat | chat | {last_validation(trained / 'runs' / 'chat')['chat']:.3f} |" in text
    assert "Recall over long distances was not measured" in text
    assert "mm-rec chat --model my-model" in text
    assert 'mm_rec.load("my-model")' in text
    assert "No licence was chosen for the weights" in text


def test_the_history_is_the_stages_in_their_order(trained: Path) -> None:
    history = read_history(load_model(trained / "runs", device="cpu").path)
    assert [(one.stage, one.settings["seq_len"]) for one in history] == [("stage1", 16), ("chat", 16)]
    assert history[0].starts_from is None
    assert history[0].bits_per_byte == pytest.approx(last_validation(trained / "runs" / "stage1"))
    assert {name for one in history if one.data for name in one.data.report} == {"text", "code", "chat"}


def test_what_is_not_known_is_said_to_be_unknown(trained: Path, tmp_path: Path) -> None:
    first, _ = tmp_path / "first", card_of(trained / "runs" / "stage1", tmp_path / "first")
    metadata, text = card_of(first, tmp_path / "again")
    assert "datasets" not in metadata
    assert "What it was trained on is not known." in text
    assert "exported from a folder without the records of its training" in text
    assert "No validation is on record." in text


def test_recall_is_that_of_this_checkpoint_or_an_error(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chat, stage1 = trained / "runs" / "chat", trained / "runs" / "stage1"
    assert main(["eval", "--model", str(chat), "--distances", "32", "--trials", "2", "--device", "cpu"]) == 0
    needle = json.loads(Path("evaluation/results.json").read_text())["needles"][0]
    _, text = card_of(chat, tmp_path / "measured")
    assert f"| {needle['kind']} | 32 | {needle['right'] / 2:.1%} |" in text
    assert "Recall over long distances was not measured" in card_of(stage1, tmp_path / "another")[1]
    capsys.readouterr()
    for model, folder, problem in (
        (stage1, "evaluation", "evaluation/results.json is of another checkpoint"),
        (chat, "nowhere", "there is no nowhere/results.json; measure the model with `mm-rec eval --output nowhere`"),
    ):
        arguments = ["export", "--model", str(model), "--output", "refused", "--evaluation", folder]
        assert main(arguments) == 2
        assert problem in capsys.readouterr().err
        assert not Path("refused").exists()


def test_the_card_may_be_edited(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    card_of(trained / "runs", output)
    (output / "README.md").write_text("# Mine\n")
    assert load_model(output, device="cpu").path == output
    (output / "generation_config.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match=r"generation_config\.json"):
        load_model(output, device="cpu")


def test_a_validation_on_a_document_that_was_trained_on_is_told(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage1 = trained / "runs" / "stage1"
    assert "the end of a document" not in card_of(stage1, tmp_path / "whole")[1]
    [stage] = read_history(load_model(stage1, device="cpu").path)
    assert stage.data is not None
    stage.data.report["text"]["valid"][PART] = True
    monkeypatch.setattr(model_card, "read_history", lambda path: [stage])
    assert "Of text, what is held out is the end of a document" in card_of(stage1, tmp_path / "part")[1]


def test_data_that_are_gone_are_said_to_be_gone(trained: Path, tmp_path: Path) -> None:
    prepared = trained / "data" / "prepared"
    prepared.rename(tmp_path / "prepared")
    try:
        _, text = card_of(trained / "runs" / "stage1", tmp_path / "model")
    finally:
        (tmp_path / "prepared").rename(prepared)
    assert "| stage1 | not known any more: the prepared data are gone |" in text
