"""Work for the supervisor: ``mm-rec data`` from a hub on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub  # noqa: F401 - so that no forked process imports what takes long
from huggingface_hub import constants
from tiny_runs import When, arm

from mm_rec import cli
from mm_rec.data import download_data  # noqa: F401
from mm_rec.data.download import fetch as fetch_module


def run(command: list[str], url: str, cache: str, when: dict[str, Any] | None, chunk: int) -> int:
    """Run ``mm-rec`` with these arguments against the hub at ``url``, as :func:`tiny_runs.run`."""
    constants.ENDPOINT = datasets.config.HF_ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(Path(cache) / "hub")
    datasets.config.HF_DATASETS_CACHE = Path(cache) / "datasets"
    fetch_module._CHUNK = chunk
    if when is not None:
        arm(When(**{**when, "signals": tuple(when["signals"])}))
    return cli.main(command)
