"""The doctor: a healthy run is ok, each fault is named, and nothing is changed by looking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mm_rec.config import ModelConfig
from mm_rec.data.manifest import record_file
from mm_rec.data.pack import file_sha256
from mm_rec.data.prepare import prepare
from mm_rec.data.prepare_recall import add_recall_rows
from mm_rec.data.synthetic import write_synthetic
from mm_rec.scripts.doctor_command import (
    Finding,
    check_data,
    check_installation,
    check_machine,
    check_prepared,
    check_run,
    main,
)
from mm_rec.storage.resume import open_run, rewind
from mm_rec.storage.run_config import read_config, write_config
from mm_rec.text.tokenizer import train_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 1 and 2."""
    tokenizer = train_tokenizer(["a small text, a small tokenizer"] * 4, 300)
    config = ModelConfig.preset("tiny", vocab_size=320, d_model=8, n_layers=1, d_ff=16)
    with open_run(tmp_path / "runs", "stage1", {"lr": 1.0}) as folder:
        rewind(folder)
        for step in (1, 2):
            folder.log_loss(step, 1.0)
            folder.save(
                step,
                config=config,
                weights={"w": torch.ones(3)},
                optimizer={},
                carried={},
                trainer={},
                tokenizer=tokenizer,
            )
    return folder.path


def texts(findings: list[Finding], level: str) -> str:
    return "\n".join(finding.text for finding in findings if finding.level == level)


def test_a_healthy_run(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    findings = check_run(run)
    assert {finding.level for finding in findings} == {"ok"}
    assert "2 of 2 checkpoints are whole" in texts(findings, "ok")
    assert "goes on from step 2" in texts(findings, "ok")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step_000002" / "model.safetensors").write_bytes(b"")
    findings = check_run(run)
    assert "step_000002/model.safetensors is damaged" in texts(findings, "broken")
    assert "goes on from step 1" in texts(findings, "ok")
    (run / "checkpoints" / "step_000001" / "trainer.json").unlink()
    assert "no valid checkpoint left; start beside it with --fresh" in texts(check_run(run), "broken")


def test_the_best_checkpoint(run: Path) -> None:
    assert "best by validation" not in texts(check_run(run), "ok")
    config = read_config(run)
    assert config is not None
    write_config(run, {**config, "best": {"step": 1, "bits_per_byte": 2.0}})
    assert "export and eval load step 1, the best by validation" in texts(check_run(run), "ok")
    (run / "checkpoints" / "step_000001" / "model.safetensors").write_bytes(b"")
    broken = texts(check_run(run), "broken")
    assert "step_000001, the best by validation, is not whole; step_000002 is loaded in its place" in broken


def test_other_versions(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["versions"]["torch"] = "1.0"
    write_config(run, config)
    assert 'torch was "1.0", is' in texts(check_run(run), "note")


def test_a_run_in_use(run: Path) -> None:
    with open_run(run.parent, "stage1", {"lr": 1.0}):
        assert "is in use by process" in texts(check_run(run), "note")
    assert "is free" in texts(check_run(run), "ok")


def test_interrupted_writes_and_lost_records(run: Path) -> None:
    (run / "checkpoints" / ".tmp-step_000003-0123456789abcdef").mkdir()
    (run / ".tmp-of-the-user").mkdir()
    (run / "loss_log.txt").write_text("")
    findings = check_run(run)
    assert "1 interrupted writes" in texts(findings, "note")
    assert "loss_log.txt has lost its end: 0 of 12 bytes" in texts(findings, "note")


def test_a_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_rec.storage.files.free_bytes", lambda path: 1000)
    assert "1.0 kB free, a checkpoint takes" in texts(check_run(run), "broken")


def test_a_run_without_checkpoints_and_what_is_no_run(tmp_path: Path) -> None:
    open_run(tmp_path, "stage1", {"lr": 1.0}).release()
    assert "starts at step 0" in texts(check_run(tmp_path / "stage1"), "note")
    assert "is not a run folder" in texts(check_run(tmp_path / "other"), "broken")


def test_data_against_its_manifest(tmp_path: Path) -> None:
    assert "nothing to compare" in texts(check_data(tmp_path), "note")
    assert "there is no data folder" in texts(check_data(tmp_path / "nowhere"), "broken")
    for name in ("text/a.jsonl", "code/b.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('"a line"\n')
        record_file(tmp_path, name, {"sha256": file_sha256(tmp_path / name)})
    assert [finding.level for finding in check_data(tmp_path)] == ["ok", "ok"]
    (tmp_path / "text" / "a.jsonl").write_text('"another line"\n')
    (tmp_path / "code" / "b.jsonl").unlink()
    findings = check_data(tmp_path)
    assert [finding.level for finding in findings] == ["broken", "broken"]
    assert "a.jsonl is not what was downloaded" in texts(findings, "broken")
    assert "b.jsonl cannot be read" in texts(findings, "broken")
    (tmp_path / "manifest.json").write_text("[")
    assert "cannot be used" in texts(check_data(tmp_path), "broken")


def test_prepared_data_against_their_hashes(tmp_path: Path) -> None:
    write_synthetic(tmp_path, 12)
    path = prepare(tmp_path, 320, filters=False).path
    assert f"{path} is what was prepared" in texts(check_data(tmp_path), "ok")
    for name in ("text-train/tokens.bin", "code-valid/offsets.npy", "tokenizer/chat_template.jinja", "report.json"):
        sound = (path / name).read_bytes()
        (path / name).write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        assert f"{path / name} is damaged" in texts(check_data(tmp_path), "broken")
        (path / name).write_bytes(sound)
    path.parent.rename(tmp_path / "runs")
    (tmp_path / "conversations").mkdir()
    (tmp_path / "runs").rename(tmp_path / "conversations" / "prepared")
    (tmp_path / "conversations" / "prepared" / path.name / "manifest.json").unlink()
    assert "manifest.json cannot be read" in texts(check_prepared(tmp_path / "conversations" / "prepared"), "broken")


def test_rows_that_train_recall_are_prepared_data_too(tmp_path: Path) -> None:
    write_synthetic(tmp_path, 12)
    path = add_recall_rows(prepare(tmp_path, 320, filters=False), 0.2).recall["text"].path
    assert f"{path.parent} is what was prepared" in texts(check_data(tmp_path), "ok")
    (path / "tokens.bin").write_bytes(b"")
    assert f"{path / 'tokens.bin'} is damaged" in texts(check_data(tmp_path), "broken")


def test_this_machine_is_described() -> None:
    report = "\n".join(map(str, check_machine()))
    for text in (f"PyTorch {torch.__version__}", "kernels on cpu:", "trains on", "of memory free"):
        assert text in report


def test_an_installation_is_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    findings = check_installation()
    assert {finding.level for finding in findings} <= {"ok", "note"}
    assert "C++: " in texts(findings, "ok")
    assert "the hub at http://127.0.0.1:1 cannot be reached" in texts(findings, "note")


def test_the_exit_code_says_whether_something_is_broken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.parent)]) == 0
    assert f"{run} is free" in capsys.readouterr().out
    (run / "checkpoints" / "step_000001" / "manifest.json").write_text("")
    assert main([str(run)]) == 1
    assert "broken  " in capsys.readouterr().out
