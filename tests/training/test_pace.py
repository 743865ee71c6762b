"""A run with a time budget: it ends on time at any speed, and goes on after a stop with what it had decided."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_runs import content, settings, signal_after, train

from mm_rec.data.prepared import Prepared
from mm_rec.errors import UserError
from mm_rec.machine.signals import Interrupted
from mm_rec.storage.run_folder import RunFolder
from mm_rec.training.pace import Pace
from mm_rec.training.schedule import Length


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(seconds: float, seconds_of_step: Callable[[int], float], first_guess: int) -> tuple[float, Length]:
    """When a run of these steps ends, on a machine that takes 2 s for each of five validations and saves."""
    clock = Clock()
    pace = Pace(seconds, 0.0, clock(), clock)
    clock.now += 1.0  # the model is built
    length = Length(((0, first_guess),))
    pace.start(0)
    for step in itertools.count(1):
        clock.now += seconds_of_step(step)
        interval = math.ceil(first_guess / 5)
        validations = max(1, math.ceil((length.steps - step) / interval))
        steps = pace.decide(step, length.steps, validations)
        if steps is not None and steps != length.steps:
            length = length.revised(step, steps)
        if step == length.steps or step % interval == 0:
            with pace.pausing("save"):
                clock.now += 0.5
            with pace.pausing("validate"):
                clock.now += 1.5
        if step == length.steps:
            break
    return pace.used, length


@pytest.mark.parametrize("first_guess", [20, 1000, 20_000])
@pytest.mark.parametrize(
    ("name", "speed"),
    [
        ("even", lambda step: 0.6),
        ("slower from the middle on", lambda step: 0.3 if step < 500 else 1.5),
        ("faster from the middle on", lambda step: 1.5 if step < 200 else 0.3),
        ("now and then", lambda step: 0.2 + 0.8 * (step // 60 % 2)),
    ],
)
def test_a_run_ends_on_time(name: str, speed: Callable[[int], float], first_guess: int) -> None:
    used, length = run(600.0, speed, first_guess)
    assert used == pytest.approx(600.0, rel=0.03)
    assert length.share(length.steps, 0) == pytest.approx(1.0)


def test_a_time_that_is_over_at_once_takes_few_steps() -> None:
    used, length = run(1.0, lambda step: 5.0, 100)
    assert length.steps == 1
    assert used < 10


def test_earlier_processes_count() -> None:
    clock = Clock()
    pace = Pace(60.0, 50.0, clock(), clock)
    clock.now += 4.0
    assert (pace.used, pace.left) == (54.0, 6.0)


def test_the_length_of_a_schedule_never_jumps() -> None:
    length = Length(((0, 100),)).revised(40, 400).revised(100, 110)
    shares = [length.share(step, 5) for step in range(5, 111)]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert max(after - before for before, after in itertools.pairwise(shares)) < 0.1
    assert Length(((0, 100),)).share(40, 20) == 20 / 80
    for step, steps in ((40, 50), (100, 99), (20, 200)):
        with pytest.raises(ValueError, match="cannot follow"):
            length.revised(step, steps)


DECISIONS = {2: 9, 4: 7, 6: 8}


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions by step in place of those by the clock."""
    monkeypatch.setattr(Pace, "decide", lambda self, step, steps, pauses: DECISIONS.get(step))
    monkeypatch.setattr("mm_rec.training.run_stages._first_length", lambda pace, estimate: (0, 5, 0.0))


TIMED = {"minutes": 1.0, "max_steps": None}


@pytest.mark.usefixtures("small_world", "decided")
@pytest.mark.parametrize("stopped_after", [1, 3, 4, 7])
def test_a_stopped_run_goes_on_bit_for_bit(
    data: Prepared, tmp_path: Path, stopped_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(data, settings(tmp_path / "whole", **TIMED))
    assert whole.name == "step_000008"
    signal_after(monkeypatch, stopped_after)
    wanted = settings(tmp_path / "stopped", **TIMED)
    with pytest.raises(Interrupted):
        train(data, wanted)
    assert train(data, wanted).name == "step_000008"
    assert content(tmp_path / "stopped" / "stage1", 8) == content(tmp_path / "whole" / "stage1", 8)
    assert [path.name for path in (tmp_path / "stopped").iterdir() if path.is_dir()] == ["stage1"]


@pytest.mark.usefixtures("small_world", "decided")
def test_decisions_are_kept_before_a_step_depends_on_them(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill, steps that are done once more follow what was decided in them before."""
    log_loss = RunFolder.log_loss

    def fail_at_5(run: RunFolder, step: int, loss: float) -> None:
        if step == 5:
            raise OSError("the power is out")
        log_loss(run, step, loss)

    whole = train(data, settings(tmp_path / "whole", **TIMED))
    wanted = settings(tmp_path / "killed", **TIMED)
    monkeypatch.setattr(RunFolder, "log_loss", fail_at_5)
    with pytest.raises(OSError, match="power"):
        train(data, wanted)
    monkeypatch.setattr(RunFolder, "log_loss", log_loss)
    config = yaml.safe_load((tmp_path / "killed" / "stage1" / "config.yaml").read_text())
    assert [pair[:2] for pair in config["lengths"]] == [[0, 5], [2, 9], [4, 7]]
    train(data, wanted)
    assert content(tmp_path / "killed" / "stage1", 8) == content(whole.parent.parent, 8)


@pytest.mark.usefixtures("small_world")
def test_a_time_and_a_number_of_steps_exclude_each_other(data: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave one of them out"):
        train(data, settings(tmp_path, minutes=1.0))


@pytest.mark.usefixtures("small_world")
def test_stages_share_the_time(tmp_path: Path) -> None:
    wanted = settings(tmp_path, stage="all", **TIMED)
    shares = [wanted.for_stage(name).minutes for name in ("stage1", "stage2", "stage3")]
    assert shares == pytest.approx([0.8, 0.1, 0.1])
    assert wanted.for_stage("stage1").for_stage("stage1").minutes == pytest.approx(0.8)
