"""Settings files that are none, or stand for far more than they hold, end in one line."""

from pathlib import Path

import pytest

from mm_rec.errors import UserError
from mm_rec.storage.run_config import read_config
from mm_rec.storage.yaml_file import read_yaml

BOMB = "\n".join(["a0: &a0 [x, y]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 10,000 values"),
        ("a: &a [*a]", "more than 20 levels"),
        ("[" * 100_000, "nested too deeply"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 0b_", "not valid YAML"),
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("? [a]\n: b", "unhashable key"),
        ("x" * 300_000, "more than 200 kB"),
        ("\xff", "not valid YAML"),
    ],
    ids=range(10),
)
def test_what_is_no_settings_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    assert read_config(tmp_path) is None


def test_names_for_values_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("stages: {stage1: &s {max_steps: 2}, stage2: *s}\n")
    assert read_yaml(path) == {"stages": {"stage1": {"max_steps": 2}, "stage2": {"max_steps": 2}}}
    path.write_text("")
    assert read_yaml(path) is None
