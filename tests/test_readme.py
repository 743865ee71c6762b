"""Every command of the READMEs, in order, in one folder; both languages give the same ones."""

import io
import re
import shlex
from pathlib import Path

import pytest
import uvicorn
import yaml
from test_guides import QUICK, quick, run

from mm_rec import cli
from mm_rec.config import PRESETS
from mm_rec.data.synthetic import synthetic_text
from mm_rec.options import from_values
from mm_rec.training.settings import TrainSettings

__all__ = ["quick"]  # the fixture: small model, two steps, a hub of a few documents

SHORT = {
    "train": QUICK,
    "finetune": QUICK[2:],
    "eval": ["--distances", "0", "--trials", "1"],
    "serve": ["--port", "0"],  # another program may have the usual one
    "bench": ["--preset", "tiny", "--shapes", "1x32", "--rounds", "1"],
}
ROOT = Path(__file__).parents[1]


def commands(name: str) -> list[str]:
    """The lines of the ``bash`` blocks of a README, then the ``mm-rec`` commands of its sentences."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return lines + re.findall(r"`(mm-rec [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_both_languages_show_the_same_commands() -> None:
    bare = [[line.split("#")[0].strip() for line in commands(name)] for name in ("README.md", "README.tr.md")]
    assert bare[0] == bare[1]
    assert len(bare[0]) > 15


@pytest.mark.parametrize("name", ["README.md", "README.tr.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def mm_rec(words: list[str]) -> int:
    """The exit code of the program."""
    try:
        return cli.main(words)
    except SystemExit as ended:  # --help
        return int(ended.code or 0)


def examples(name: str) -> list[str]:
    """The ``python`` blocks of a README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.usefixtures("quick")
def test_every_python_example_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert examples("README.md") == examples("README.tr.md")
    monkeypatch.setitem(PRESETS, "small", PRESETS["tiny"])  # the fixture's two steps, on a model that is quick
    Path("books").mkdir()
    Path("books/one.txt").write_text("\n".join(synthetic_text(12)))
    Path("books/two.txt").write_text("\n".join(synthetic_text(12, seed=1)))
    for example in examples("README.md"):
        exec(example, {})
    assert (tmp_path / "checkpoints_cpu" / "stage1" / "metrics.jsonl").exists()
    assert (tmp_path / "talk.safetensors").exists()


def test_the_settings_file_of_the_readme_is_read() -> None:
    for name in ("README.md", "README.tr.md"):
        [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
        settings = from_values(TrainSettings, yaml.safe_load(block))
        assert settings.model_config().d_model == 384
        assert settings.for_stage("stage2").max_steps == 500


@pytest.mark.usefixtures("quick")
def test_every_command_of_the_readme_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "small", PRESETS["tiny"])  # for the demo
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))  # to chat
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # to serve until the end
    for file, text in (
        ("books/one.txt", "It was a bright cold day in April. " * 9),
        ("src/one.py", "def f(x):\n    return x\n" * 9),
    ):
        (tmp_path / "home" / file).parent.mkdir(parents=True)
        (tmp_path / "home" / file).write_text(text)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands("README.md"):
        program, *words = shlex.split(command, comments=True)
        if program == "make":
            assert words[0] in targets
        elif program == "mm-rec":
            words = [word.replace("~", str(tmp_path / "home")) for word in words]
            assert mm_rec([words[0], *SHORT.get(words[0], []), *words[1:]]) == 0, (
                f"{command}\n{capsys.readouterr().err}"
            )
        else:
            assert run(command) == 0, f"{command}\n{capsys.readouterr().err}"
