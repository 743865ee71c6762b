"""Errors that a user can mend. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

__all__ = ["SettingError", "UserError"]


class UserError(Exception):
    """Something the user can mend; the message is one line that says what happened and what helps.

    Command-line programs print ``error: <message>`` and exit with code 2.
    """


class SettingError(UserError, ValueError):
    """A value that a user set, in the environment say, is not one of those that can be."""
