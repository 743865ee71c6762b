"""Row 10: many processes want one run folder; one gets it, and its death frees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from supervisor import Child, Supervisor
from workload import Trial, workload

PROCESSES = 20


def wait_for_log(child: Child) -> str:
    deadline = time.monotonic() + 60
    while not child.log.endswith("\n"):
        assert time.monotonic() < deadline, f"process {child.pid} said nothing"
        time.sleep(0.002)
    return child.log


@workload(10, f"{PROCESSES} processes open one run folder at once; then the owner is killed", unit="folders",
          quick=3, soak=100)  # fmt: skip
def twenty_owners(folder: Path) -> Iterator[Trial]:
    supervisor = Supervisor(folder)

    def trial(seed: int) -> str:
        root = folder / f"runs{seed}"
        children = [supervisor.start("saving.own", root=str(root)) for _ in range(PROCESSES)]
        try:
            for child in children:
                child.go()
            logs = [wait_for_log(child) for child in children]
            owners = [child for child, log in zip(children, logs, strict=True) if log.startswith("owner of")]
            assert len(owners) == 1, logs
            refused = [log for log in logs if f"stage1 is in use by process {owners[0].pid} on " in log]
            assert len(refused) == PROCESSES - 1, logs
            assert [path.name for path in root.glob("stage1*")] == ["stage1"]

            owners[0].kill()
            assert owners[0].wait() == -9
            heir = supervisor.start("saving.own", root=str(root))
            children.append(heir)
            heir.go()
            assert wait_for_log(heir).startswith("owner of")
            took_over = f"took over from process {owners[0].pid} on "
            assert took_over in (root / "stage1" / "events.log").read_text()
        finally:
            for child in children:
                if child.status is None:
                    child.kill()
                    child.wait()
        return "one owner, 19 refused by name, taken over from the dead one"

    yield trial
