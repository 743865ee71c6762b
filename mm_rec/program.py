"""What every command-line program of the package shares: its parser, its printing, and its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from mm_rec.errors import UserError, is_out_of_memory
from mm_rec.machine.signals import Interrupted, SignalGuard

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Parser", "positive_int", "run_program", "say"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line that points to ``--help``."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def positive_int(text: str) -> int:
    """Returns the whole number of at least 1 that ``text`` holds; used as the ``type`` of an argument.

    >>> positive_int("12")
    12
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def say(console: Console, text: str) -> None:
    """Print ``text`` as it is: square brackets are no markup, numbers get no colour, and long lines stay whole."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def run_program(program: Callable[[], int]) -> int:
    """Run a program and turn what ends it into an exit code.

    A :class:`UserError` becomes ``error: ...`` and 2, Ctrl-C 130, SIGTERM 143, a closed output pipe 141.
    Warnings become one line each. Other errors are bugs and keep their traceback.
    """
    warnings.showwarning = _show_warning
    try:
        with SignalGuard(last=True):
            code = program()
        sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (MemoryError, RuntimeError, SystemError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write("error: out of memory; free some, or use less data or a smaller model\n")
        return 2
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"warning: {message}\n")
