"""What the tests of downloading share: a hub on this machine in place of the real one, and no waiting."""

import time

import pytest
from hub_samples import CARD, PYTHON, code_rows, compressed
from hub_stub import Repository, serve


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
