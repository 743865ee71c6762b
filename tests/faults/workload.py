"""What the fault tests and the soak share: workloads that try a promise again and again, each trial from its seed.

A workload is a context that prepares in a folder what all trials need and yields the trial, a function from a seed to
the outcome in a few words (or numbers by words), which say what was tried. It raises where the promise is broken. The
test run does the first few seeds of every workload (``test_workloads.py``), the soak all of them (``soak.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

Outcome = str | Mapping[str, int]
Trial = Callable[[int], Outcome]
Open = Callable[[Path], AbstractContextManager[Trial]]

MODULES = {
    "pipeline_workloads": (1, 4, 6, 11),
    "saving_workloads": (1, 2, 3),
    "resume_workloads": (5,),
    "damage_workloads": (7,),
    "data_workloads": (8,),
    "download_workloads": (4, 9),
    "ownership_workloads": (10, 21),
    "memory_workloads": (12,),
    "native_workloads": (13, 14),
    "serving_workloads": (15, 17),
    "session_workloads": (16,),
    "pickle_workloads": (18,),
    "prepared_workloads": (19,),
    "absence_workloads": (20,),
    "change_workloads": (22,),
    "connection_workloads": (23,),
    "forged_session_workloads": (24,),
    "bomb_workloads": (25,),
    "document_workloads": (25,),
    "stranger_workloads": (26,),
    "setting_workloads": (27,),
}
"""Where the workloads of each row are; a module registers its own when it is imported."""


class Impossible(Exception):  # noqa: N818 - not an error of the promise
    """This machine lacks what the workload needs."""


class Complete(Exception):  # noqa: N818
    """There are no more trials than there have been: every one of a finite number was tried."""


@dataclass(frozen=True)
class Workload:
    """One way of trying a promise.

    Attributes:
        row: of the table of promises.
        name: of the function that prepares it.
        what: is tried, in words for the report.
        unit: what one trial is, in the plural.
        quick: trials of a test run; none if something else in the tests does it.
        soak: trials of the soak.
        open: prepares it in an empty folder.
        idle: outcomes of trials in which nothing went wrong, so that nothing was tried.
    """

    row: int
    name: str
    what: str
    unit: str
    quick: int
    soak: int
    open: Open
    idle: Collection[str] = ()

    def tried(self, outcomes: Mapping[str, int]) -> int:
        """How many of ``outcomes``, counted by their words, say that something was tried."""
        return sum(count for outcome, count in outcomes.items() if outcome not in self.idle)


def counted(outcome: Outcome) -> Mapping[str, int]:
    """An outcome as numbers by words."""
    return {outcome: 1} if isinstance(outcome, str) else outcome


_registered: dict[str, Workload] = {}


def workload(
    row: int, what: str, *, unit: str, quick: int, soak: int, idle: Collection[str] = ()
) -> Callable[[Callable[[Path], Iterator[Trial]]], Open]:
    """Register a generator function as the workload of its name."""

    def register(function: Callable[[Path], Iterator[Trial]]) -> Open:
        name = function.__name__
        assert name not in _registered, name
        prepare = contextmanager(function)
        _registered[name] = Workload(row, name, what, unit, quick, soak, prepare, idle)
        return prepare

    return register


def refusal(kind: type[Exception], work: Callable[[], object], context: object = "") -> str:
    """The message of the error that ``work`` has to raise: one line."""
    try:
        work()
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"accepted: {context}")
    assert "\n" not in message, message
    return message


def all_workloads(rows: Collection[int] = ()) -> list[Workload]:
    """The workloads of some rows, or of all, in their order."""
    for name, its_rows in MODULES.items():
        if not rows or set(rows) & set(its_rows):
            importlib.import_module(name)
    return sorted((one for one in _registered.values() if not rows or one.row in rows), key=lambda one: one.row)
