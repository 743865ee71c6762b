"""One fork server for all fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from supervisor import Supervisor


@pytest.fixture(scope="session")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    one = Supervisor(tmp_path_factory.mktemp("children"))
    yield one
    one.close()
