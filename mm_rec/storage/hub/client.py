"""What every request to the hub shares: its address, a limit on the wait for it, and what its client's errors mean."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mm_rec.errors import UserError
from mm_rec.translation import Translatable

__all__ = [
    "DEADLINE_SECONDS",
    "causes",
    "explaining",
    "first_line",
    "hub_address",
    "is_connection_error",
    "reach_problem",
    "status_of",
    "within",
]

T = TypeVar("T")

DEADLINE_SECONDS = 8.0
"""The longest wait for the first answer of the hub."""


def hub_address() -> str:
    """Returns the address of the hub that is asked, which HF_ENDPOINT may set."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def within(seconds: float, ask: Callable[[], T]) -> T:
    """Returns the result of ``ask``, or raises TimeoutError after ``seconds``.

    Looking up a name may hang far longer than any time-out of a client.
    """
    answer: list[T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return answer[0]


def causes(error: BaseException | None) -> Iterator[Exception]:
    """Yields the error and those that led to it."""
    seen: set[int] = set()
    while isinstance(error, Exception) and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status with which the hub answered; None if ``error`` is of another kind."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def is_connection_error(error: Exception) -> bool:
    """Returns whether no answer came. The client's HTTP library changes from version to version, its names less so."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(("httpx", "httpcore"))


def reach_problem(error: Exception) -> Translatable | None:
    """Returns in words that the hub cannot be reached, if one error says that no answer came or of which status."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if status is None and not is_connection_error(error):
        return None
    if status:
        reason = Translatable("status {status}", status=status)
    else:
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = Translatable("HF_HUB_OFFLINE is set" if offline else first_line(error))
    return Translatable("the hub at {hub} cannot be reached ({reason})", hub=hub_address(), reason=reason)


@contextmanager
def explaining(explain: Callable[[Exception], UserError | None]) -> Iterator[None]:
    """Raises in place of an error of the hub's client what ``explain`` makes of it; other errors, None, pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        raise explained from error


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
