"""``mm-rec eval``: the numbers are those of the library, the page holds them and its pictures, lm-eval agrees."""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mm_rec.cli import main
from mm_rec.config import PRESETS, ModelConfig
from mm_rec.evaluation.bits_per_byte import Documents, evaluate
from mm_rec.evaluation.lm_eval import run_harness
from mm_rec.evaluation.recall import KINDS, Haystack, Needles, find_needles
from mm_rec.evaluation.report import Measurements, write_report
from mm_rec.inference.loading import load_model
from mm_rec.model import MMRecModel
from mm_rec.scripts import eval_clock
from mm_rec.storage import checkpoint
from mm_rec.storage.run_config import read_config, write_config
from mm_rec.text.tokenizer import train_tokenizer
from mm_rec.training import trainer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)
TEXTS = ["The grass is green.", "One and two are three. " * 60, "Hello, what is your name? <b>&amp;"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "step_000001"
    weights = MMRecModel(CONFIG, seed=1).state_dict()
    weights["fusion.gate"] = torch.randn(weights["fusion.gate"].shape, generator=torch.Generator().manual_seed(1))
    tokenizer = train_tokenizer(TEXTS * 3, 320)
    checkpoint.save(path, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer)
    return path


def run(model: Path, output: Path, *arguments: object) -> int:
    flags = ["--device", "cpu", "--precision", "fp32", "--trials", "2"]
    return main(["eval", "--model", str(model), "--output", str(output), *flags, *map(str, arguments)])


def own_documents(model: Path) -> Documents:
    tokenizer = load_model(model, device="cpu", precision="fp32").tokenizer
    tokens = [np.array([tokenizer.bos_id, *tokenizer.encode(text)]) for text in TEXTS]
    return Documents(tokens, sum(len(text.encode()) for text in TEXTS))


def test_a_fusion_that_was_never_trained_has_no_number(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = checkpoint.load(model)
    untrained = tmp_path / "step_000001"
    weights = {**found.weights, "fusion.gate": torch.zeros_like(found.weights["fusion.gate"])}
    tokenizer = found.load_tokenizer()
    checkpoint.save(
        untrained, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer
    )
    (tmp_path / "own.txt").write_text(" ".join(TEXTS))
    assert run(untrained, tmp_path, "--documents", f"own={tmp_path / 'own.txt'}", "--distances", "none") == 0
    assert "fused" not in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["bits_per_byte"]["own"]) == set(results["by_position"]["own"]) == {"text", "code"}


def test_the_report_holds_what_was_measured(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = tmp_path / "texts.jsonl"
    documents.write_text("\n".join(map(json.dumps, TEXTS)))
    output = tmp_path / "deep" / "report"
    assert run(model, output, "--documents", f"own={documents}", "--distances", "20,0,9000") == 0
    results = json.loads((output / "results.json").read_text())
    loaded = load_model(model, device="cpu", precision="fp32")
    for reader, domain in (("text", "text"), ("code", "code"), ("fused", None)):
        expected = evaluate(loaded.model, own_documents(model), domain).bits_per_byte
        assert results["bits_per_byte"]["own"][reader] == pytest.approx(expected, rel=1e-6)
    haystack = Haystack(own_documents(model).tokens, loaded.tokenizer)
    cells = [(kind, distance) for kind in KINDS for distance in (0, 20, 9000) if kind.in_noise or distance < 9000]
    expected = [
        find_needles(loaded.model, loaded.tokenizer, None, kind, distance, haystack, trials=2)._asdict()
        for kind, distance in cells
    ]
    assert results["needles"] == expected
    by_position = results["by_position"]["own"]["text"]
    assert len([one for one in by_position if one is not None]) > 3
    assert min(filter(None, by_position)) <= results["bits_per_byte"]["own"]["text"] <= max(filter(None, by_position))
    assert results["model"]["state"].endswith(" kB by one")
    told = capsys.readouterr().out
    assert f"state: {results['model']['state']}\n" in told
    assert re.search(r"^reading takes about .* for documents, .* for needles$", told, re.M)
    assert told.count("needle, ") == len(cells)
    assert "too few tokens for needles over 9,000" in told
    page = (output / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert f"<td>{results['bits_per_byte']['own']['fused']:.4f}</td>" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)  # it needs no other file
    assert results["conversation"].startswith("user: ")
    assert f"report in {output / 'report.html'}" in told


PARAGRAPHS = [f"Paragraph {number} of this text is about the number {number * 7919}." for number in range(60)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on twelve documents of five paragraphs each."""
    home = tmp_path_factory.mktemp("run")
    (home / "mine").mkdir()
    for number in range(12):
        text = "\n\n".join(PARAGRAPHS[5 * number : 5 * number + 5]) + "\n"
        (home / "mine" / f"{number}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", CONFIG)
        patch.setattr(trainer, "SAMPLE_TOKENS", 3)
        flags = ["--preset", "tiny", "--max_steps", "2", "--seq_len", "16", "--valid_bytes", "1600", "--threads", "1"]
        flags += [
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--text_dir",
            str(home / "mine"),
            "--checkpoint_dir",
            str(home / "runs"),
        ]
        assert main(["train", *flags]) == 0
    return home


def test_what_the_run_held_out_is_read_by_default(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_path = run_folder / "runs" / "stage1"
    assert run(run_path, tmp_path, "--distances", "none") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    records = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    [validated] = [one["valid"]["text"] for one in records if one["step"] == 2 and "valid" in one]
    assert results["bits_per_byte"]["text"]["text"] == pytest.approx(validated, rel=1e-5)
    assert results["origin"]["text"].startswith("held out, ")
    told = capsys.readouterr().out
    [prepared] = (run_folder / "runs" / "prepared").glob("*/")
    assert f"held-out documents of {prepared}, which training has not seen:\n  text: " in told
    assert "held out, " in (tmp_path / "report.html").read_text()
    assert run(run_path, tmp_path, "--distances", "none", "--max_bytes", 10_000) == 0
    whole = sum(path.stat().st_size for path in (run_folder / "mine").iterdir())
    size = int(re.search(r"  text: \d+ documents, ([\d,]+) bytes", capsys.readouterr().out)[1])
    assert 200 < size < whole / 4


def test_documents_are_compared_with_the_training_data(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half.txt").write_text("\n\n".join([*PARAGRAPHS, *(one.upper() for one in PARAGRAPHS)]))
    (tmp_path / "new.txt").write_text("\n\n".join(one.upper() for one in PARAGRAPHS))
    named = ["--documents", f"half={tmp_path / 'half.txt'}", "--documents", f"new={tmp_path / 'new.txt'}"]
    assert run(run_folder / "runs", tmp_path / "report", *named, "--distances", "none") == 0
    told = capsys.readouterr().out
    count = int(re.search(r"half: 4\d% of its paragraphs \((\d+) of 120\) were seen in training", told)[1])
    assert 45 <= count < 60  # the others are held out
    assert "new: none of its 60 paragraphs was seen in training" in told
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["bits_per_byte"].keys() == {"half", "half, unseen part", "new"}
    loaded = load_model(run_folder / "runs", device="cpu", precision="fp32")
    texts = (tmp_path / "half.txt").read_text()
    tokens = [np.array([loaded.tokenizer.bos_id, *loaded.tokenizer.encode(texts)])]
    whole = evaluate(loaded.model, Documents(tokens, len(texts)), "text").bits_per_byte
    assert results["bits_per_byte"]["half"]["text"] == pytest.approx(whole, rel=1e-6)
    assert results["bits_per_byte"]["half, unseen part"]["text"] != pytest.approx(whole, rel=1e-3)


def test_what_training_saw_may_be_gone_or_unknown(
    model: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_folder / "runs", tmp_path / "runs")
    path = tmp_path / "runs" / "stage1" / "config.yaml"
    config = read_config(path.parent)
    config["trained_on"][0]["path"] = str(tmp_path / "gone")
    write_config(path.parent, config)
    (tmp_path / "new.txt").write_text(PARAGRAPHS[0])
    for source, why in ((tmp_path / "runs", "gone, which the model was trained on"), (model, "lies in no run folder")):
        assert run(source, tmp_path, "--distances", "none") == 0
        told = capsys.readouterr().out
        assert re.search(f"no held-out documents are read: .*{why}.*; name some with --documents NAME=PATH", told)
        assert run(source, tmp_path, "--distances", "none", "--documents", f"new={tmp_path / 'new.txt'}") == 0
        told = capsys.readouterr().out
        assert re.search(f"nothing says whether these documents were seen in training: .*{why}", told)


def test_needles_take_a_minute_unless_distances_are_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(eval_clock.DISTANCES, "cpu", [16, 32])
    assert run(model, tmp_path) == 0
    assert "needle, pass key, over 32 tokens" in capsys.readouterr().out
    monkeypatch.setattr(eval_clock, "NEEDLE_SECONDS", 0.0)
    assert run(model, tmp_path) == 0
    told = capsys.readouterr().out
    assert "needle, " not in told
    assert re.search(r"needles over 16, 32 tokens are left out: .* about .*; --distances 16,32 asks for them", told)


def test_a_long_measurement_tells_how_much_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(eval_clock, "PROGRESS_SECONDS", 0.0)
    assert run(model, tmp_path, "--distances", "200") == 0
    told = capsys.readouterr().out
    shares = [int(share) for share in re.findall(r"^  (\d+)%, about .* to go$", told, re.M)]
    assert shares
    assert shares == sorted(shares)
    assert shares[-1] <= 100
    assert "0.0 s for documents" in told
    assert "needle, pass key, over 200 tokens" in told
    assert "needle, word" not in told


def test_bad_rows_are_left_out_if_asked_for(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = tmp_path / "texts.jsonl"
    documents.write_text("\n".join([*map(json.dumps, TEXTS), '{"neither": 1}', "[", ""]))
    arguments = ["--documents", f"own={documents}", "--distances", "none"]
    for skip in (0, 1):
        assert run(model, tmp_path, *arguments, "--skip_bad", skip) == 2
        assert f"{documents}:{4 + skip}: " in capsys.readouterr().err
    assert run(model, tmp_path, *arguments, "--skip_bad", 2) == 0
    assert f"2 bad rows left out, the first: {documents}:4: " in capsys.readouterr().out


def test_what_was_not_measured_is_left_out_and_text_is_escaped(tmp_path: Path) -> None:
    measured = Measurements({"checkpoint": "<script>"}, conversation="<b>bold</b> \ud800")
    page = write_report(tmp_path, measured).read_text()
    assert "<script>" not in page
    assert "&lt;b&gt;bold" in page
    assert "<h2>Bits per byte" not in page
    assert "<img" not in page
    measured.needles = [Needles("<i>", 0, 2, 1, 1, 0.1, 0.9)]
    measured.tasks = {"quiz": {"acc": 0.25}}
    page = write_report(tmp_path, measured).read_text()
    assert page.count("<img") == 1
    assert "50.0% (10% to 90%), free 50%" in page
    assert "<i>" not in page
    assert "<td>0.2500</td>" in page


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--documents", "own=nowhere.jsonl"], "there is no file or folder nowhere.jsonl"),
        (["--domain", "music"], "there is no expert 'music'"),
        (["--distances", "none", "--tasks", "quiz"], "--tasks needs the package lm_eval; install it with: pip install"),
    ],
)
def test_what_cannot_be_done_is_an_error(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(model, tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert problem in err


@pytest.mark.parametrize("arguments", [["--distances", "1,x"], ["--distances", "-1"], ["--documents", "books.jsonl"]])
def test_flags_that_mean_nothing_are_refused(model: Path, tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(model, tmp_path, *arguments)
    assert stop.value.code == 2


def test_lm_eval_gives_our_own_numbers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": text, "choices": [" One", " three and two"], "answer": 0} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = (
        "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        "output_type: {kind}\ndoc_to_text: '{text}'\ndoc_to_target: '{target}'\n{more}\n"
    )
    common = {"rows": tmp_path / "rows.jsonl"}
    choice = task.format(
        name="own_quiz", kind="multiple_choice", text="{{question}}", target="{{answer}}",
        more="doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]", **common,
    )  # fmt: skip
    whole = task.format(
        name="own_texts", kind="loglikelihood_rolling", text="", target="{{question}}",
        more="metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]", **common,
    )  # fmt: skip
    (tmp_path / "quiz.yaml").write_text(choice)
    (tmp_path / "texts.yaml").write_text(whole)
    results = run_harness(model, ["own_quiz", "own_texts"], task_dir=tmp_path, batch_size=2)

    loaded = load_model(model, device="cpu", precision="fp32")
    expected = evaluate(loaded.model, own_documents(model), None).bits_per_byte
    assert results["own_texts"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    right = []
    for row in rows:
        nats = []
        context = loaded.tokenizer.encode(row["question"])
        for choice in row["choices"]:
            ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(row["question"] + choice)]
            with torch.no_grad():
                logits, _ = loaded.model(torch.tensor([ids[:-1]]))
            nll = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="none")
            nats.append(float(nll[len(context) :].sum()))
        right.append(nats[0] < nats[1])
    assert results["own_quiz"]["acc"] == pytest.approx(sum(right) / len(right))
