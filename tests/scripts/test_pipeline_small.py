"""``runs/pipeline_small.sh`` on a few rows: every stage, the report, and nothing done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mm_rec.data.synthetic import write_synthetic
from mm_rec.stages import STAGES

RUNS = Path(__file__).parents[2] / "runs"
ROWS = [{"instruction": f"What is {i}?", "input": "", "output": f"It is {i * i}."} for i in range(12)]


@pytest.mark.slow
def test_the_script_runs_to_the_report_and_goes_on(tmp_path: Path) -> None:
    corpora = tmp_path / "corpora"
    write_synthetic(corpora, 12)
    for name, folder in (("books", "text"), ("code", "code")):
        (text,) = (corpora / folder).glob("*.jsonl")
        for split in ("train", "valid"):
            (corpora / f"{name}.{split}.jsonl").write_bytes(text.read_bytes())
    (corpora / "instruct_rows.json").write_text(json.dumps(ROWS))
    (corpora / "chat_rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    command = [RUNS / "pipeline_small.sh", corpora, tmp_path / "runs", "--preset", "tiny", "--seq_len", "16"]
    env = os.environ | {
        "MM_REC": f"{sys.executable} -m mm_rec.cli",
        "MM_REC_MAX_STEPS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(RUNS.parent),
    }
    subprocess.run(command, env=env, check=True, capture_output=True)
    again = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert all(f"{stage} is finished" in again for stage in STAGES)
    results = json.loads((tmp_path / "runs" / "evaluation" / "results.json").read_text())
    # The files to evaluate on are those of training, of which a part was held out.
    assert results["bits_per_byte"].keys() == {"books", "books, unseen part", "code", "code, unseen part"}
    assert all("were seen in training" in results["origin"][name] for name in ("books", "code"))
    assert results["model"]["checkpoint"].endswith("chat/checkpoints/step_000001")


def test_its_settings_name_every_stage() -> None:
    settings = yaml.safe_load((RUNS / "pipeline_small.yaml").read_text())
    assert list(settings["stages"]) == list(STAGES)
    assert settings["preset"] == "small"
