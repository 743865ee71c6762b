"""Work for the supervisor: a command of ``mm-rec`` with an output, a number of files or settings that are not right."""

from __future__ import annotations

import os
import resource
import sys

import torch

from mm_rec import cli
from mm_rec.data import prepare
from mm_rec.evaluation import report
from mm_rec.hf import compare
from mm_rec.inference import chat_session, export, loading
from mm_rec.scripts import bench_command, doctor_command, eval_command, export_command, serve_command, tokenizer_command
from mm_rec.training import finetune, run_stages

MORE_BYTES = 8 << 30
"""Address space for the command on top of what the process has: no trial may take the machine's memory."""

# What the commands import late, so that no trial has to.
IMPORTED = (
    bench_command, chat_session, compare, doctor_command, eval_command, export, export_command, finetune, loading,
    prepare, report, run_stages, serve_command, tokenizer_command,
)  # fmt: skip


def run(arguments: list[str], folder: str, output: str, encoding: str, files: int | None) -> int:
    """Run a command in ``folder`` as a shell would; returns its exit code."""
    os.chdir(folder)
    os.environ["MM_REC_MAX_STEPS"] = "2"  # of a million that may have been asked for
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, used + MORE_BYTES))
    if output == "closed":
        sys.stdout = None  # type: ignore[assignment]  # as Python has it then
    else:
        sys.stdout = open(output, "w", encoding=encoding)  # noqa: SIM115
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


torch.set_num_threads(1)
