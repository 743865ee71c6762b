"""``mm-rec export --push``: what is uploaded comes back byte for byte, and what cannot be uploaded is said at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_stub import Fault
from model_stub import TOKEN, Models, ModelsHub

from mm_rec.cli import main
from mm_rec.inference.loading import load_model

Connect = Callable[[dict[str, Models]], ModelsHub]
NAME = "ada/notes"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, connect: Connect) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def push(exported: Path, *options: str, output: str = "out", name: str = NAME) -> int:
    return main(["export", "--model", str(exported), "--output", output, "--push", name, *options])


@pytest.mark.usefixtures("token")
def test_what_is_uploaded_comes_back_byte_for_byte(
    connect: Connect, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = connect({})
    assert push(exported) == 0
    assert f"uploaded to {hub.url}/{NAME}, which is private" in capsys.readouterr().out
    repository = hub.models[NAME]
    assert repository.private
    assert repository.history[-1] == files_of(Path("out"))
    assert set(hub.objects.values()) >= {Path("out/model.safetensors").read_bytes()}
    fetched = load_model(Path(NAME), device="cpu").path
    assert all(content == Path("out", name).read_bytes() for name, content in files_of(fetched).items())
    card = Path("out/README.md").read_text()
    assert f'mm_rec.load("{NAME}")' in card
    assert card.startswith("---\nlibrary_name: mm-rec\n")


@pytest.mark.usefixtures("token")
def test_a_second_upload_replaces_the_first(connect: Connect, exported: Path) -> None:
    old = {"model.safetensors.index.json": b"{}", "model-00001-of-00001.safetensors": b"old", "notes.txt": b"mine"}
    hub = connect({NAME: Models([old], private=True)})
    assert push(exported) == 0
    assert hub.models[NAME].history[-1] == files_of(Path("out")) | {"notes.txt": b"mine"}


@pytest.mark.usefixtures("token")
def test_a_public_model_is_asked_for(connect: Connect, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = connect({"ada/seen": Models()})
    assert push(exported, name="ada/seen") == 2
    assert "ada/seen is public, and --public was not given; the exported folder out is kept" in capsys.readouterr().err
    assert hub.models["ada/seen"].history == [{}]
    assert push(exported, "--public", name="ada/seen", output="again") == 0
    assert push(exported, "--public", output="third") == 0
    assert not hub.models[NAME].private
    assert f"{NAME}, which is public" in capsys.readouterr().out


def test_without_a_token_nothing_is_exported(
    connect: Connect, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = connect({})
    assert push(exported) == 2
    assert "--push needs a token that may write: set HF_TOKEN" in capsys.readouterr().err
    assert not Path("out").exists()
    assert not hub.requests


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("name", ["notes", "ada/notes@main", "ada/notes/", "../notes", "a b/c"])
def test_a_name_that_is_none_is_refused_first(
    connect: Connect, exported: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    hub = connect({})
    assert push(exported, name=name) == 2
    assert "is no name of a model on a hub; name it as owner/name" in capsys.readouterr().err
    assert not Path("out").exists()
    assert not hub.requests


@pytest.mark.usefixtures("token")
def test_what_the_hub_refuses_leaves_the_folder(
    connect: Connect, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = connect({})
    assert push(exported, name="somebody/notes") == 2
    said = capsys.readouterr().err
    assert "does not let you write to somebody/notes (status 403)" in said
    assert "the exported folder out is kept" in said
    assert Path("out/model.safetensors").is_file()
    hub.faults = [Fault("/commit/", times=99, status=500)]
    assert push(exported, output="second") == 2
    assert "so upload it later with `hf upload ada/notes second`" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "another")
    assert push(exported, output="third") == 2
    assert "(status 401)" in capsys.readouterr().err


def test_public_goes_with_push(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--model", str(exported), "--output", "out", "--public"])
    assert "name the model with --push OWNER/NAME" in capsys.readouterr().err
