import os
import signal
import subprocess
import sys
import threading

import pytest

from mm_rec.machine.signals import Interrupted, SignalGuard


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def interrupt_at_once() -> None:
    with SignalGuard():
        send(signal.SIGTERM)
        pytest.fail("the signal did nothing")


def test_a_signal_raises_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        interrupt_at_once()
    assert stop.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_must_not_be_torn_ends_first() -> None:
    done = []

    def work() -> None:
        with SignalGuard() as guard, guard.deferred():
            send(signal.SIGINT)
            done.append("the rest")

    with pytest.raises(Interrupted) as stop:
        work()
    assert (stop.value.exit_code, done) == (130, ["the rest"])


def test_work_that_is_not_torn_may_ask() -> None:
    def work() -> None:
        with SignalGuard() as guard, guard.deferred():
            guard.check()
            send(signal.SIGTERM)
            guard.check()
            pytest.fail("check did nothing")

    with pytest.raises(Interrupted):
        work()


def test_guards_nest() -> None:
    with SignalGuard() as outer:
        with pytest.raises(Interrupted):
            interrupt_at_once()
        assert outer.requested is None
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
        assert outer.requested == signal.SIGTERM


def test_outside_of_the_main_thread_it_does_nothing() -> None:
    handlers = []

    def work() -> None:
        with SignalGuard() as guard:
            guard.check()
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


STUCK = """
import time
from mm_rec.machine import signals
signals.DEADLINE_SECONDS = {deadline}
with signals.SignalGuard() as guard, guard.deferred():
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.1)
"""


@pytest.mark.parametrize(("deadline", "sent"), [(0.2, 1), (500, 2)])
def test_the_second_signal_and_the_deadline_end_the_process(deadline: float, sent: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(deadline=deadline)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    if sent == 2:
        # Two that arrive together are one to the system, so the second has to come after the first was taken.
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    process.stdout.close()
