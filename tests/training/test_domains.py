"""A model has an expert for each domain of its data: one, two or four, through every command, export and resume."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from rich.console import Console
from small_runs import content, settings, train

from mm_rec.api.model import Model
from mm_rec.cli import main
from mm_rec.config import ModelConfig
from mm_rec.data.synthetic import synthetic_code, synthetic_text
from mm_rec.errors import UserError
from mm_rec.inference.loading import Loaded, load_model
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import train_tokenizer
from mm_rec.training.load_data import load_data
from mm_rec.training.settings import TrainSettings

ROWS = [{"instruction": f"What is {i}?", "input": "", "output": f"It is {i * i}."} for i in range(12)]
QUICK = {
    "preset": "tiny", "vocab_size": 320, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "gate_every": 2,
    "window": 8, "seq_len": 16, "max_steps": 4, "checkpoint_interval": 2, "eval_interval": 4, "valid_bytes": 200,
    "device": "cpu",
}  # fmt: skip
FLAGS = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]
FINETUNING = [word for name in ("seq_len", "max_steps", "device") for word in (f"--{name}", str(QUICK[name]))]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def folders(root: Path, names: list[str]) -> list[Path]:
    """A folder of documents for each name."""
    made = []
    for place, name in enumerate(names):
        folder = root / f"documents of {name}"
        folder.mkdir()
        texts = synthetic_code(25) if name == "code" else synthetic_text(100)[25 * place : 25 * (place + 1)]
        for number, text in enumerate(texts):
            (folder / f"{number}{'.py' if name == 'code' else '.txt'}").write_text(text)
        made.append(folder)
    return made


def ask_twice(app: Any) -> list[int]:
    """The status of a request of a session and of the next one, which goes on with it."""
    with TestClient(app, base_url="http://localhost") as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        hello = {"role": "user", "content": "Hello"}
        body = {"model": name, "messages": [hello], "max_tokens": 3, "session": "one"}
        return [client.post("/v1/chat/completions", json=body).status_code for _ in range(2)]


@pytest.mark.parametrize("names", [["text"], ["law", "code"], ["a", "b", "c", "d"]], ids=["one", "two", "four"])
def test_the_whole_way(
    tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, where = tmp_path / "runs", zip(names, folders(tmp_path, names), strict=True)
    flags = [f"--{name}_dir={path}" if name in ("text", "code") else f"--domain={name}={path}" for name, path in where]
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert main(["train", "--stage", "all", *flags, "--checkpoint_dir", str(runs), *FLAGS]) == 0
    said = capsys.readouterr().out
    fuses = len(names) > 1
    assert ("stage3 is skipped: the model has one domain, so there is nothing to fuse" in said) is not fuses
    assert (runs / "stage3").exists() is fuses
    for task in ("instruct", "chat"):
        command = ["finetune", "--task", task, "--data", str(tmp_path / "rows.json"), "--checkpoint_dir", str(runs)]
        assert main([*command, *FINETUNING]) == 0
    loaded = load_model(runs / "chat", device="cpu", precision="fp32")
    assert sorted(loaded.model.config.experts) == sorted(names)
    assert loaded.domain == (None if fuses else names[0])

    capsys.readouterr()
    model = ["--model", str(runs / "chat"), "--device", "cpu"]
    for domain in ([], ["--domain", names[0]], ["--domain", "all"]):
        assert main(["generate", *model, "--prompt", "The ", "--max_new_tokens", "4", *domain]) == 0
    talk = ["chat", *model, "--session", str(tmp_path / "talk"), "--max_new_tokens", "4"]
    for command in (talk, [*talk, "--resume"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
        assert main(command) == 0
    answers: list[int] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: answers.extend(ask_twice(server.config.app)))
    assert main(["serve", *model, "--port", "0", "--session_dir", str(tmp_path / "sessions")]) == 0
    assert answers == [200, 200]
    evaluated = ["eval", *model, "--output", str(tmp_path / "report"), "--distances", "none", "--max_bytes", "300"]
    assert main([*evaluated, "--documents", f"mine={tmp_path / f'documents of {names[0]}'}"]) == 0
    scores = json.loads((tmp_path / "report" / "results.json").read_text())["bits_per_byte"]["mine"]
    assert set(scores) == {*names, *(["fused"] if fuses else [])}
    capsys.readouterr()
    assert main(["export", "--model", str(runs / "chat"), "--output", str(tmp_path / "exported")]) == 0
    assert "the same in transformers" in capsys.readouterr().out


def test_one_domain_takes_half_and_the_fusion_of_one_expert_is_that_expert(tmp_path: Path) -> None:
    (folder,) = folders(tmp_path, ["text"])
    wanted = TrainSettings(text_dir=folder, checkpoint_dir=tmp_path / "runs", **QUICK)
    data = load_data(wanted, Console(file=io.StringIO()))
    found = checkpoint.load(train(data, wanted))
    assert found.config.experts == ("text",)
    assert found.domain == "text"
    model = load_model(found.path, device="cpu", precision="fp32").model
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids)[0], model(ids, None, "text")[0])
    with torch.no_grad():
        model.fusion.mix.add_(1)
    assert torch.equal(model(ids)[0], model(ids, None, "text")[0])


def test_a_stopped_run_of_one_domain_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = folders(tmp_path, ["text"])
    found = []
    for name, caps in (("whole", [None]), ("stopped", ["3", None])):
        wanted = settings(tmp_path / name, text_dir=folder, stage="stage1")
        for cap in caps:
            monkeypatch.setenv("MM_REC_MAX_STEPS", cap or "10")
            path = train(load_data(wanted, Console(file=io.StringIO())), wanted)
        found.append(content(path.parent.parent, 10))
    assert found[0].keys() == found[1].keys()
    assert all(found[0][key] == found[1][key] for key in found[0] if key not in ("trainer", "samples"))


def test_the_expert_that_reads_a_prompt_best_answers_it(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=320, d_model=16, n_heads=2, n_layers=2, d_ff=24, experts=("a", "b"), window=8)
    model, tokenizer = MMRecModel(config, seed=3), train_tokenizer(["A text. " * 9], 320)
    loaded = Loaded(model, tokenizer, "a", tmp_path, "full")
    prompts = ["A text.", "Another one", "xyz", "1 2 3 4 5", "ğış"]
    bits = Model(loaded).bits_per_byte
    for prompt in prompts:
        assert loaded.choose_domain(None, prompt) == min("ab", key=lambda name: bits(prompt, domain=name))
    before = [loaded.choose_domain(None, prompt) for prompt in prompts]
    swapped = {"a": "b", "b": "a"}
    weights = model.state_dict()
    names = {name: re.sub(r"(?<=^experts\.)[ab]", lambda found: swapped[found[0]], name) for name in weights}
    model.load_state_dict({names[name]: one.clone() for name, one in weights.items()})
    assert [loaded.choose_domain(None, prompt) for prompt in prompts] == [swapped[name] for name in before]
    assert loaded.choose_domain("b", prompts[0]) == loaded.choose_domain("b") == "b"
    assert loaded.choose_domain(None) == "a"
    with torch.no_grad():
        model.fusion.gate.add_(1)
    assert loaded._replace(domain=None).choose_domain(None, prompts[0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain": {"keys": Path("x")}}, "a domain can't have the name 'keys'"),
        ({"domain": {"all": Path("x")}}, "a domain can't have the name 'all'"),
        ({"domain": {"two words": Path("x")}}, "a domain can't have the name 'two words'"),
        ({"domain": {"text": Path("x")}, "text_dir": Path("y")}, "the domain text is named twice"),
        ({"text_dir": Path("y"), "use_synthetic": True}, "--use_synthetic and folders of your own both say"),
    ],
)
def test_names_that_no_domain_can_have(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings(**changes).domain_folders()


@pytest.mark.parametrize("given", ["law", "=x", "law="])
def test_a_domain_is_a_name_and_a_path(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--domain", given]) == 2
    assert "--domain must be NAME=PATH, each name once" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["stage1", "instruct"])
def test_what_a_model_was_taught_travels_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    (folder,) = folders(tmp_path, ["text"])
    runs = tmp_path / "runs"
    assert main(["train", f"--text_dir={folder}", "--checkpoint_dir", str(runs), *FLAGS]) == 0
    if stage == "instruct":
        (tmp_path / "rows.json").write_text(json.dumps(ROWS))
        command = ["finetune", "--data", str(tmp_path / "rows.json"), "--checkpoint_dir", str(runs)]
        assert main([*command, "--init_from", str(runs / "stage1"), *FINETUNING]) == 0
    exported = tmp_path / "exported"
    assert main(["export", "--model", str(runs), "--output", str(exported)]) == 0
    for place, known in ((runs, True), (exported, False)):  # what is exported does not say
        loaded = load_model(place, device="cpu", precision="fp32")
        assert loaded.learned_to_chat == ((stage == "instruct") if known else None)
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
        assert main(["chat", "--model", str(place), "--device", "cpu", "--max_new_tokens", "4"]) == 0
        told = capsys.readouterr().err
        told_apps: list[Any] = []
        monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets, to=told_apps: to.append(server.config.app))
        served = ["serve", "--model", str(place), "--device", "cpu", "--port", "0"]
        assert main([*served, "--session_dir", str(tmp_path / "sessions")]) == 0
        said = capsys.readouterr().out
        with TestClient(told_apps[0], base_url="http://localhost") as client:
            assert client.get("/health").json()["learned_to_chat"] is loaded.learned_to_chat
            assert 'id="untaught"' in client.get("/").text
        for words in (told, said):
            assert ("never learned to chat" in words) == (known and stage == "stage1")
            assert ("mm-rec finetune --task instruct --init_from" in words) == (known and stage == "stage1")


def test_a_fusion_has_no_number_before_it_is_trained(tmp_path: Path) -> None:
    names = ["law", "medicine"]
    flags = [f"--domain={name}={path}" for name, path in zip(names, folders(tmp_path, names), strict=True)]
    runs = tmp_path / "runs"
    assert main(["train", "--stage", "all", *flags, "--checkpoint_dir", str(runs), *FLAGS]) == 0
    lines = map(json.loads, (runs / "stage3" / "metrics.jsonl").read_text().splitlines())
    first, *others = [record for record in lines if "valid_by_expert" in record]
    assert first["step"] == 0
    assert "valid" not in first
    assert others
    assert all(set(record["valid"]) == set(names) for record in others)
