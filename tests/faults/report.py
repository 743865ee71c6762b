"""Make the tables of ``docs/reliability.md`` from the results of the soak: ``python tests/faults/report.py``.

What stands between the two marks is replaced; the rest of the page is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "soak"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- made by tests/faults/report.py -->\n", "<!-- end -->\n"

PROMISES = {
    1: "A run that is killed at any instant loses at most the steps since its last checkpoint, and what comes out is, "
    "byte for byte, what a run never stopped writes.",
    2: "A kill in a save leaves the old checkpoint or the new one, never a mix.",
    3: "A disk that is full or broken: the previous checkpoint is whole, the message names path and space, "
    "nothing is left over.",
    4: "SIGTERM and Ctrl-C: saved or already safe, exit code 143 or 130 within 10 seconds, exact resume.",
    5: "Resume at any step is bitwise exact.",
    6: "A run resumed by name with anything else than it had is refused, or accepted by a flag and recorded.",
    7: "No damage of a checkpoint or session file is accepted; the last valid checkpoint is used.",
    8: "Bad rows are named with file and line, or counted up to a cap; no data file does more than raise an error.",
    9: "A download yields the right bytes or a clear error, and goes on where it stopped.",
    10: "A run folder has one owner; a dead owner's folder is taken over.",
    11: "A loss or gradient that is not finite, or a spike, is never applied; the run rolls back and says so.",
    12: "A run that does not fit into memory is refused before it starts, or ends with a clear message.",
    13: "Without a usable native library, or on an older processor, everything works, with one warning.",
    14: "The C++ kernels touch no byte that is not theirs, whatever the shapes and values.",
    15: "Whatever is sent to the server, it answers what HTTP says, stays bounded and frees what clients leave.",
    16: "A session's name leads nowhere but to its file; a killed save leaves the turn before or after it.",
    17: "No text of a user becomes a control token.",
    18: "Nothing is unpickled.",
    19: "Prepared data that are not what was prepared are refused with the file named; other sources are another run.",
    20: "A run that lost a part is refused or gone on with, in one line; absence is no beginning, no record is cut.",
    21: "Everything that is written has one owner, and the other is told who, even if the lock file is removed.",
    22: "What a server or a training has loaded stays what it was, or it ends in one line; no crash, no other weights.",
    23: "However many clients hold connections, health is answered within a second, and log and memory are bounded; "
    "a server that is stopped tells its streams.",
    24: "A damaged or forged session ends its own request, no other.",
    25: "A file that stands for far more than it is, is read in bounded memory and time, or refused in one line.",
    26: "A stranger's model folder is loaded, or refused in one line, in bounded memory and time.",
    27: "Output that is closed, full or of another encoding, few descriptors, absurd settings and names: one line, "
    "exit code not 0.",
}


def read_results(folder: Path = RESULTS) -> dict[int, dict[str, Any]]:
    """The workloads of each row that has results."""
    rows = {}
    for row in PROMISES:
        path = folder / f"row_{row:02d}.json"
        if path.exists():
            rows[row] = json.loads(path.read_text())["workloads"]
    return rows


def summary(rows: dict[int, dict[str, Any]]) -> list[str]:
    lines = ["| # | promise | tried | broken |", "|---|---|---|---|"]
    for row, promise in PROMISES.items():
        entries = rows.get(row, {}).values()
        tried = "; ".join(_count(entry) for entry in entries) or "not yet"
        broken = sum(len(entry["failures"]) for entry in entries)
        lines.append(f"| [{row}](#row-{row}) | {promise} | {tried} | {broken if entries else ''} |")
    return lines


def details(rows: dict[int, dict[str, Any]]) -> list[str]:
    lines = []
    for row, workloads in rows.items():
        lines += ["", f'<a id="row-{row}"></a>', "", f"### Row {row}", ""]
        for name, entry in workloads.items():
            lines.append(f"**{entry['what'][0].upper()}{entry['what'][1:]}** (`{name}`): {_count(entry)}, ")
            lines[-1] += f"{len(entry['failures'])} broken."
            lines += ["", *(f"- {outcome}: {count:,}" for outcome, count in sorted(entry["outcomes"].items()))]
            lines += [f"- BROKEN at seed {one['seed']}: {one['error'].splitlines()[0]}" for one in entry["failures"]]
            lines += [f"- {line}" for line in _runs(entry)] + [""]
    return lines


def _count(entry: dict[str, Any]) -> str:
    part = "" if entry["complete"] else f" of {entry['wanted']:,}"
    return f"{entry['done']:,}{part} {entry['unit']}"


def _runs(entry: dict[str, Any]) -> list[str]:
    """At which commits and on which machines, with what seeds and for how long."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in entry["runs"]:
        if run["trials"]:
            found.setdefault((run["commit"], run["machine"]), []).append(run)
    lines = []
    for (commit, machine), runs in found.items():
        runs = sorted(runs, key=lambda run: run["first_seed"])
        first, last = runs[0]["first_seed"], runs[-1]["first_seed"] + runs[-1]["trials"] - 1
        count = sum(run["trials"] for run in runs)
        seeds = f"seeds {first} to {last}" if count == last - first + 1 else f"{count} seeds of {first} to {last}"
        seconds = sum(run["seconds"] for run in runs)
        lines.append(f"at {commit}, {seeds}, {seconds:,.0f} s, {runs[-1]['date'][:10]}; {machine}")
    return lines


def tables(folder: Path = RESULTS) -> str:
    """What stands between the marks."""
    rows = read_results(folder)
    return "\n".join(["", *summary(rows), *details(rows), ""])


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + tables() + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
