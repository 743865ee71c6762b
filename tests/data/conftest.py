"""What the tests of downloading share: a hub on this machine in place of the real one, and no waiting."""

import gzip
import json
import time

import pytest
from hub_stub import Repository, serve

CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n"
PYTHON = "codeparrot/codeparrot-clean"


def code_rows(n, first=0):
    """Rows of a data set of small different modules; every tenth is too short to be kept."""
    return [
        {
            "content": "x = 1\n"
            if i % 10 == 3
            else f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}({i}), 'of many')\n"
        }
        for i in range(first, first + n)
    ]


def compressed(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


@pytest.fixture
def python_hub(connect):
    """A hub with the Python source: 2 files of 1,500 rows each."""
    files = {
        "README.md": CARD.format("file-*.json.gz").encode(),
        "file-1.json.gz": compressed(code_rows(1500)),
        "file-2.json.gz": compressed(code_rows(1500, 1500)),
    }
    return connect({PYTHON: Repository(files)})


@pytest.fixture
def connect(monkeypatch, tmp_path_factory):
    """Start a hub with the given repositories and make it the one that is asked."""
    import datasets
    from huggingface_hub import constants

    running = []

    def start(repositories):
        running.append(serve(repositories))
        hub = running[-1].__enter__()
        point_to(hub.url)
        return hub

    def point_to(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)

    cache = tmp_path_factory.mktemp("hub_cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    start.point_to = point_to
    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture
def slept(monkeypatch):
    """The seconds that anything slept, in order, without having slept."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds
