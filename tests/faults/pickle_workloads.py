"""Row 18: nothing is unpickled, by an audit hook in every process of the whole suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from workload import Trial, workload

ROOT = Path(__file__).resolve().parents[2]
HOOK = """
import sys, traceback

def note(event, arguments):
    if event == "pickle.find_class":
        frames = traceback.extract_stack()[:-1]
        package = any(frame.filename.startswith({package!r}) for frame in frames)
        place = "".join(traceback.format_list(frames[-6:])) if package else ""
        with open({path!r}, "a") as file:
            file.write(f"{{'package' if package else 'elsewhere'}} {{arguments}}\\n{{place}}")

sys.addaudithook(note)
"""


@workload(18, "the whole suite with an audit hook on unpickling in each of its processes", unit="suites",
          quick=0, soak=1)  # fmt: skip
def suite_without_pickle(folder: Path) -> Iterator[Trial]:
    notes = folder / "notes"
    (folder / "sitecustomize.py").write_text(HOOK.format(path=str(notes), package=f"{ROOT / 'mm_rec'}{os.sep}"))
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", ""), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}

    def trial(seed: int) -> str:
        canary = "import pickle, pathlib; pickle.loads(pickle.dumps(pathlib.Path('x')))"
        subprocess.run([sys.executable, "-c", canary], env=environment, check=True)
        assert notes.read_text().startswith("elsewhere"), "the hook does not work"
        notes.unlink()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--ignore=tests/faults"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:]
        lines = notes.read_text().splitlines() if notes.exists() else []
        assert not [line for line in lines if line.startswith("package")], "\n".join(lines)[:3000]
        return f"no load by the package: {result.stdout.strip().splitlines()[-1].strip('= ')}"

    yield trial
