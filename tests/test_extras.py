"""What an installation without extras can do, and how it says what is missing."""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mm_rec import cli, errors
from mm_rec.config import PRESETS
from mm_rec.errors import EXTRA_OF, MissingPackageError, find_missing_package, install_command, requirements_of
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.text.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    """The packages that are required, by the names that they are imported by."""
    found = {re.split(r"[\[<>=]", one)[0].replace("-", "_") for one in requirements}
    return {{"pyyaml": "yaml"}.get(name, name) for name in found}


class Without(importlib.abc.MetaPathFinder):
    """An environment in which the packages of all extras are missing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name.partition(".")[0] in EXTRA_OF and name != "huggingface_hub":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "step_000001"
    config = PRESETS["tiny"]
    checkpoint.save(
        path, config=config, weights=MMRecModel(config, seed=1).state_dict(), optimizer={}, carried={}, trainer={},
        tokenizer=train_tokenizer(["A small text to train a tokenizer on."] * 3, config.vocab_size),
    )  # fmt: skip
    return path


def test_every_package_of_an_extra_is_known() -> None:
    for name, extra in EXTRA_OF.items():
        assert name in names(PROJECT["optional-dependencies"][extra])
    extras = [PROJECT["optional-dependencies"][extra] for extra in ("train", "documents", "json", "hf", "tensorboard")]
    listed = set().union(*map(names, extras))
    assert listed == {name for name, extra in EXTRA_OF.items() if extra != "eval"}
    assert not names(PROJECT["dependencies"]) & EXTRA_OF.keys()


def run_plain(code: str, folder: Path, **values: object) -> dict[str, list[str]]:
    """What the ``code`` says of each command, in a process that never sees the packages of the extras."""
    start = "import json, sys\nfrom test_extras import Without\nsys.meta_path.insert(0, Without())\n"
    settings = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    done = subprocess.run(
        [sys.executable, "-c", start + settings + code], input="Hello\n", cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)])}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {"out": done.stdout.splitlines(), "err": done.stderr.splitlines()}


def test_mere_use_needs_no_extra(model: Path, tmp_path: Path) -> None:
    code = """
from mm_rec import cli
from mm_rec.serve import server
for command in commands:
    assert cli.main(command) == 0, command
import mm_rec
found = mm_rec.load(model)
print(found.generate("The ", max_new_tokens=3))
found.chat().answer("Hello")
"""
    commands = [
        ["generate", "--model", str(model), "--prompt", "The ", "--max_new_tokens", "3"],
        ["chat", "--model", str(model), "--session", "talk"],
        ["export", "--model", str(model), "--output", "exported"],
        ["doctor"],
    ]
    said = run_plain(code, tmp_path, commands=commands, model=str(model))["out"]
    untried = "not tried in transformers: mm_rec.hf needs the package transformers; install"
    assert any(line.startswith(untried) for line in said)
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_what_is_missing_is_one_line_with_the_command(model: Path, tmp_path: Path) -> None:
    code = """
from mm_rec import cli
for command in commands:
    assert cli.main(command) == 2, command
import mm_rec
try:
    mm_rec.train("A text.")
except ImportError as error:
    print("error:", error, file=sys.stderr)
"""
    tasks = ["eval", "--model", str(model), "--distances", "none", "--tasks", "quiz"]
    commands = [["train", "--use_synthetic"], ["demo"], ["data", "--source", "wikitext"], tasks]
    said = run_plain(code, tmp_path, commands=commands)["err"]
    assert len(said) == len(commands) + 1
    names = ["mm-rec train", "mm-rec demo", "mm-rec data", "mm-rec eval", "mm_rec.train"]
    for line, name in zip(said, names, strict=True):
        assert re.fullmatch(rf'error: {name} needs the package \w+; install it with: pip install ("[\w>=.]+" ?)+', line)


def test_other_imports_that_fail_are_bugs() -> None:
    assert find_missing_package(ModuleNotFoundError(name="mm_rec.nowhere")) is None
    assert find_missing_package(ImportError("cannot import name", name="rich")) is None
    assert isinstance(find_missing_package(ModuleNotFoundError(name="rich.console")), MissingPackageError)


def test_a_command_names_what_the_extra_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = PROJECT["optional-dependencies"]
    lines = [f"{one}; extra == '{extra}'" for extra, required in extras.items() for one in required]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*PROJECT["dependencies"], *lines])
    for extra in ("train", "json", "hf", "tensorboard"):
        assert requirements_of(extra) == sorted(extras[extra])
    assert requirements_of("eval") == sorted([*extras["train"], *extras["hf"], "lm-eval[hf]>=0.4.13"])
    assert install_command("json") == 'pip install "llguidance>=1.9"'


def test_a_command_where_no_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", nowhere)
    assert install_command("eval") == 'pip install "lm_eval"'
    assert requirements_of("train") == ["datasets", "huggingface_hub", "matplotlib", "pyarrow", "rich"]


def test_no_text_installs_the_package_by_its_name() -> None:
    """Under its name alone an index may have something else."""
    named = re.compile(r"""pip install ['"`]?mm[-_]rec""")
    texts = [*Path(errors.__file__).parent.rglob("*.py"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    assert not [path for path in texts if named.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", ["Containerfile", "runs/Containerfile"])
def test_a_container_can_train(name: str) -> None:
    content = (ROOT / name).read_text(encoding="utf-8")
    installs = [line for line in content.splitlines() if "/pip install" in line and re.search(r"/src|\.whl", line)]
    assert installs
    assert all("[train]" in line for line in installs)


def test_demo_is_make_demo() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo: .*\n\t\$\(BIN\)/mm-rec demo$", makefile, re.MULTILINE)
    assert cli.COMMANDS["demo"].module == "mm_rec.scripts.demo_command"
