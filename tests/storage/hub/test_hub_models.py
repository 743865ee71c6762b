"""Models by owner/name, fetched by the real client from a hub on this machine."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_stub import Fault
from model_stub import TOKEN, Models, ModelsHub

import mm_rec
from mm_rec.cli import main
from mm_rec.errors import MissingPackageError, UserError
from mm_rec.inference.loading import load_model
from mm_rec.storage.hub import models
from mm_rec.storage.hub.models import find_model

NAME = "ada/notes"
Connect = Callable[[dict[str, Models]], ModelsHub]


@pytest.fixture
def published(exported: Path) -> Models:
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    return Models([files | {"pytorch_model.bin": pickle.dumps({}), "sub/config.json": b"{}"}])


def changed(files: dict[str, bytes], **values: object) -> dict[str, bytes]:
    """The files of a model with other values in its config.json."""
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | values).encode()}


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_model(path, device="cpu", precision="fp32").model.state_dict() for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_is_fetched_by_its_name_and_only_what_is_listed(
    connect: Connect, published: Models, exported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub = connect({NAME: published})
    model = mm_rec.load(NAME, device="cpu")
    assert model.generate("Hello", max_new_tokens=3, seed=1) == mm_rec.load(exported, device="cpu").generate(
        "Hello", max_new_tokens=3, seed=1
    )
    assert same_weights(Path(NAME), exported)
    fetched = sorted(path.name for path in model.path.iterdir())
    assert fetched == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    said = capfd.readouterr().err
    size = sum(len(published.history[0][name]) for name in fetched)
    assert f"fetching {NAME} from {hub.url}: 5 files, {size / 1000:.1f} kB" in said
    asked = " ".join(one.path for one in hub.requests)
    assert not any(name in asked for name in ("modeling_mm_rec.py", "pytorch_model.bin", "sub/", "chat_template"))
    before = hub.bytes_sent("/resolve/")
    assert main(["generate", "--model", NAME, "--prompt", "Hello", "--max_new_tokens", "2", "--device", "cpu"]) == 0
    assert hub.bytes_sent("/resolve/") == before, "what is there is not sent again"
    assert "fetching" not in capfd.readouterr().err


def test_a_folder_of_that_name_wins(connect: Connect, published: Models, exported: Path) -> None:
    hub = connect({NAME: published})
    Path("ada").mkdir()
    exported_here = Path(NAME)
    exported_here.symlink_to(exported, target_is_directory=True)
    assert load_model(exported_here, device="cpu").path == exported_here
    assert not hub.requests


def test_a_revision_is_named_after_the_at(connect: Connect, published: Models) -> None:
    first = published.history[0]
    second = changed(first, rotary_base=500.0)
    hub = connect({NAME: Models([first, second], tags={"v1": 0})})
    commit = hub.models[NAME].commit_of("v1")
    assert load_model(Path(NAME), device="cpu").model.config.rotary_base == 500.0
    for revision in ("v1", commit):
        found = load_model(Path(f"{NAME}@{revision}"), device="cpu")
        assert found.model.config.rotary_base != 500.0
        assert found.path.name == commit
    with pytest.raises(UserError, match=r"ada/notes at .* has no revision v9; name a branch, a tag or a commit"):
        load_model(Path(f"{NAME}@v9"))


def test_what_was_fetched_serves_without_a_network(
    connect: Connect, published: Models, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    hub = connect({NAME: published})
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set\), and ada/notes was not fetched completely"):
            load_model(Path(NAME))
    path = load_model(Path(NAME), device="cpu").path
    requests = len(hub.requests)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert load_model(Path(NAME), device="cpu").path == path
    assert len(hub.requests) == requests
    capfd.readouterr()
    hub.faults = [Fault("/api/models", times=9, status=503)]
    assert load_model(Path(NAME), device="cpu").path == path
    assert "cannot be reached (status 503); taking ada/notes as it was fetched before" in capfd.readouterr().err
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="was not fetched completely before; try the same command again"):
        load_model(Path(NAME))


def test_without_a_network_the_remedies_are_named(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    connect({})
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["chat", "--model", NAME]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: there is no folder ada/notes, the hub at http://127.0.0.1:9 cannot be reached (")
    assert "set HF_ENDPOINT to a mirror, or name a folder" in said


def test_without_the_package_its_extra_is_named(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = connect({})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"there is no folder ada/notes.*needs the package huggingface_hub"):
        load_model(Path(NAME))
    assert not hub.requests


def test_what_may_not_be_read_is_refused(connect: Connect, published: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    private, gated = Models(published.history, private=True), Models(published.history, gated=True)
    hub = connect({"ada/private": private, "ada/gated": gated})
    for name in ("ada/private", "nobody/nothing"):
        with pytest.raises(UserError, match=rf"there is no folder {name}, and the hub at .* has no model {name}"):
            load_model(Path(name))
    with pytest.raises(UserError, match=r"ada/gated is gated: accept its terms at .*/ada/gated and set HF_TOKEN"):
        load_model(Path("ada/gated"))
    assert hub.bytes_sent("/resolve/") == 0
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("ada/private", "ada/gated"):
        assert load_model(Path(name), device="cpu").path.is_dir()


@pytest.mark.parametrize("name", ["runs/stage1/checkpoints", "../ada/notes", "/nowhere/notes", "notes", "ada/no..tes"])
def test_other_paths_are_not_asked_for(connect: Connect, name: str) -> None:
    hub = connect({})
    with pytest.raises(UserError, match="there is no folder"):
        load_model(Path(name))
    assert not hub.requests


def test_a_model_of_another_kind_is_not_fetched(connect: Connect, published: Models) -> None:
    files = published.history[0]
    cases = {
        "ada/llama": (changed(files, model_type="llama"), "holds a model of type llama, not one of MM-Rec"),
        "ada/later": (changed(files, format=99), "has model format 99"),
        "ada/pickle": (
            {name: content for name, content in files.items() if name != "model.safetensors"},
            "is no model of MM-Rec: it has no model.safetensors",
        ),
        "ada/broken": (files | {"config.json": b"{"}, "config.json cannot be used"),
    }
    hub = connect({name: Models([contents]) for name, (contents, _) in cases.items()})
    for name, (_, problem) in cases.items():
        with pytest.raises(UserError, match=problem.replace(".", r"\.")):
            load_model(Path(name))
    assert hub.bytes_sent("model.safetensors") == 0


def test_weights_that_are_none_are_refused(connect: Connect, published: Models) -> None:
    files = published.history[0]
    index = json.dumps({"weight_map": {"embedding.weight": "../../outside.safetensors"}}).encode()
    cases = {
        "ada/junk": (files | {"model.safetensors": b"no tensors" * 200}, "cannot be read"),
        "ada/outside": (files | {"model.safetensors.index.json": index}, "names a file outside of the folder"),
        "ada/wide": (changed(files, window=10**12), "memory of one text takes|cannot be used"),
        "ada/other": (changed(files, n_layers=2), "not of the model in its config"),
    }
    connect({name: Models([contents]) for name, (contents, _) in cases.items()})
    for name, (_, problem) in cases.items():
        with pytest.raises(UserError, match=problem):
            load_model(Path(name))


def test_what_arrives_damaged_is_removed_and_fetched_again(connect: Connect, published: Models, exported: Path) -> None:
    hub = connect({NAME: published})
    content = bytearray(published.history[0]["model.safetensors"])
    content[-5] ^= 1
    hub.lies["model.safetensors"] = bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors arrived damaged and was removed"):
        load_model(Path(NAME))
    hub.lies.clear()
    assert same_weights(Path(NAME), exported)


def test_what_does_not_fit_the_disk_is_not_fetched(
    connect: Connect, published: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = connect({NAME: published})
    monkeypatch.setattr("mm_rec.storage.files.free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"no space left on device .*1\.0 kB free"):
        load_model(Path(NAME))
    assert hub.bytes_sent("model.safetensors") == 0


def test_training_starts_from_a_model_of_the_hub(
    connect: Connect, published: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    connect({NAME: published})
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"It is {i * i}."},
            ]
        }
        for i in range(40)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [
        "--data",
        "rows.jsonl",
        "--checkpoint_dir",
        "runs",
        "--seq_len",
        "16",
        "--max_steps",
        "1",
        "--device",
        "cpu",
    ]
    assert main(["finetune", "--task", "chat", "--init_from", NAME, *options]) == 0
    assert load_model(Path("runs"), device="cpu").stage == "chat"
    assert main(["finetune", "--task", "chat", "--init_from", "nobody/nothing", *options]) == 2
    assert "has no model nobody/nothing" in capsys.readouterr().err


def test_the_lines_go_where_they_are_told(connect: Connect, published: Models) -> None:
    connect({NAME: published})
    lines: list[str] = []
    assert find_model(Path(NAME), lines.append).is_dir()
    assert len(lines) == 1
    assert models.is_fetched("model-00001-of-00009.safetensors")
