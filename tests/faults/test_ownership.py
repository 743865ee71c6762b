"""Many processes want one run folder; one gets it, and its death frees it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from supervisor import Child, Supervisor, rounds

PROCESSES = 20


def wait_for_log(child: Child) -> str:
    deadline = time.monotonic() + 30
    while not child.log.endswith("\n"):
        assert time.monotonic() < deadline, f"process {child.pid} said nothing"
        time.sleep(0.002)
    return child.log


@pytest.mark.parametrize("trial", range(rounds(3, 50)))
def test_of_twenty_processes_exactly_one_is_the_owner(supervisor: Supervisor, tmp_path: Path, trial: int) -> None:
    children = [supervisor.start("saving.own", root=str(tmp_path)) for _ in range(PROCESSES)]
    try:
        for child in children:
            child.go()
        logs = [wait_for_log(child) for child in children]
        owners = [child for child, log in zip(children, logs, strict=True) if log.startswith("owner of")]
        assert len(owners) == 1, logs
        refused = [log for log in logs if f"stage1 is in use by process {owners[0].pid} on " in log]
        assert len(refused) == PROCESSES - 1, logs
        assert [path.name for path in tmp_path.glob("stage1*")] == ["stage1"]

        owners[0].kill()
        assert owners[0].wait() == -9
        heir = supervisor.start("saving.own", root=str(tmp_path))
        children.append(heir)
        heir.go()
        assert wait_for_log(heir).startswith("owner of")
        took_over = f"took over from process {owners[0].pid} on "
        assert took_over in (tmp_path / "stage1" / "events.log").read_text()
    finally:
        for child in children:
            if child.status is None:
                child.kill()
                child.wait()
