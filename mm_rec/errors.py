"""Errors that a user can mend. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

__all__ = ["MissingPackageError", "SettingError", "UserError", "is_out_of_memory"]


class UserError(Exception):
    """Something the user can mend; the message is one line that says what happened and what helps.

    Command-line programs print ``error: <message>`` and exit with code 2.
    """


class SettingError(UserError, ValueError):
    """A value that a user set, in the environment say, is not one of those that can be."""


class MissingPackageError(UserError, ImportError):
    """A package that only this part of MM-Rec needs is not installed; the message says how to install it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, that of Python, of PyTorch on the CPU (which says so in words only) or of a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # PyTorch's: not imported for this, so that --help is quick
        or "allocate memory" in str(error)
        or "can't start new thread" in str(error)  # no room for its stack
        or "failed to map segment" in str(error)  # of a library, no room for its code
        # CPython, where an allocation failed and the exception for that could not be made either
        or (isinstance(error, SystemError) and "exception" in str(error))
    )
