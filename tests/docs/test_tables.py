"""The pages that are made from the code have all of it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path

import pytest
from docs_site import ROOT, command_pages, environment, excerpts, file_formats, op_files, settings_page

from mm_rec import formats, ops
from mm_rec.cli import COMMANDS
from mm_rec.ops import backend
from mm_rec.ops.reference import __all__ as DEFINITIONS

pytestmark = pytest.mark.usefixtures("sources")


def test_every_variable_that_is_read_has_a_sentence() -> None:
    described = {**environment.USE, **environment.DEVELOPMENT, **environment.OTHERS}
    assert sorted(environment.find_variables()) == sorted(described)
    assert all(text.endswith(".") and len(text) > 20 for text in described.values())
    page = environment.make_page()
    assert all(f"`{name}`" in page for name in described)


def test_variables_are_found_in_all_kinds_of_files() -> None:
    found = environment.find_variables()
    assert "mm_rec/ops/backend.py" in found["MM_REC_BACKEND"]
    assert "mm_rec/cpp/cuda/device.cuh" in found["MM_REC_CUDA_SHARED_MEMORY"]
    assert "scripts/setup.sh" in found["MM_REC_BUILD"]
    assert "mm_rec/machine/autotune.py" in found["OMP_NUM_THREADS"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_explained(name: str) -> None:
    actions = [action for _, action in command_pages.options_of(command_pages.parser_of(name))]
    assert actions
    assert not [action.dest for action in actions if not action.help or action.help == argparse.SUPPRESS]


def test_the_page_of_commands_has_every_option() -> None:
    page = command_pages.make_page()
    for name in COMMANDS:
        section = page[page.index(f"## mm-rec {name}\n") :].split("\n## mm-rec")[0]
        for _, action in command_pages.options_of(command_pages.parser_of(name)):
            assert (action.option_strings or [action.dest])[0] in section


def test_the_page_of_settings_has_every_setting() -> None:
    page = settings_page.make_page()
    for cls in settings_page.SETTINGS:
        fields = settings_page.fields_of(cls)
        assert set(fields) == {field.name for field in dataclasses.fields(cls)} - ({"stage"} - set(fields))
        assert all(f"`{name}`" in page for name in fields)


def test_every_format_has_its_number_and_says_what_it_is() -> None:
    assert file_formats.descriptions().keys() == formats.VERSIONS.keys()
    page = file_formats.make_page()
    for kind, version in formats.VERSIONS.items():
        assert f"| {kind} | {file_formats.descriptions()[kind]} | {version} | " in page
        assert len(file_formats.descriptions()[kind]) > 20


def test_the_table_of_ops_has_every_registered_op() -> None:
    rows = {one.name: one for one in op_files.find_ops()}
    assert {name for name in backend._expected if not name.endswith("_backward")} <= rows.keys()
    for name in ops.__all__:  # public functions that a reference defines, under their own name or that of their parts
        if name in DEFINITIONS and name not in ("rotate", "gated_recurrence"):
            assert name in rows
    for one in rows.values():
        for file in (one.module, *one.cpu, *one.cpu_sources, *one.cuda, *one.cuda_sources):
            assert (ROOT / "mm_rec" / file).is_file()
        assert one.cpu or one.cuda
        assert not one.cpu or one.cpu_sources, one


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_of_ops_agrees_with_the_kernels_of_a_back_end(device: str) -> None:
    kernels = {"mm", "linear"} if device == "cpu" else set()  # those that only some processors have
    for path in (ROOT / "mm_rec" / "ops" / device).glob("[a-z]*.py"):
        module = importlib.import_module(f"mm_rec.ops.{device}.{path.stem}")
        kernels |= {kernel.__name__ for kernel in getattr(module, "KERNELS", ())}
    assert len(kernels) > 15
    assert {one.name for one in op_files.find_ops() if getattr(one, device)} == {
        name for name in kernels if not name.endswith("_backward")
    }


def test_excerpts_are_whole_definitions() -> None:
    definition = excerpts.find("mm_rec/ops/reference.py", "def add_rms_norm")
    assert definition.splitlines()[-1] == "    return total, rms_norm(total, delta.dtype)"
    kernel = excerpts.find("mm_rec/cpp/cuda/norm.cu", "add_rms_norm_kernel(")
    assert kernel.startswith("template <")
    assert kernel.endswith("\n}")
    assert excerpts.find("mm_rec/ops/cpu/norm.py", "KERNELS = (").endswith(")  # fmt: skip")


def test_an_excerpt_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no line of mm_rec/errors.py begins with 'def gone'"):
        excerpts.insert("{{ excerpt mm_rec/errors.py def gone }}")
    with pytest.raises(ValueError, match=r"there is no file gone.py"):
        excerpts.insert("{{ excerpt gone.py x }}")


def test_every_excerpt_of_the_pages_is_in_the_source() -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
    with_excerpts = [page for page in pages.values() if "{{ excerpt" in page]
    assert with_excerpts
    for page in with_excerpts:
        assert "{{" not in excerpts.insert(page)


def test_generated_pages_have_no_source_in_the_repository() -> None:
    hooks = (ROOT / "scripts" / "docs_hooks.py").read_text(encoding="utf-8")
    for name in ("commands", "settings", "environment", "formats", "ops"):
        assert f'"reference/{name}.md"' in hooks
        assert not Path(ROOT / "docs" / "reference" / f"{name}.md").exists()
