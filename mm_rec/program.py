"""What every command-line program of the package shares: its parser, its printing, and its exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from mm_rec import system
from mm_rec.errors import UserError, find_missing_package, is_out_of_memory
from mm_rec.machine.signals import Interrupted, SignalGuard
from mm_rec.translation import HelpFormatter, Translatable, join_texts, translate, translated_argparse

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Parser", "positive_int", "run_program", "say", "wrong_argument"]

LONGEST_LINE = 2000
"""Characters of an error message at most; the midst of a longer one is left out."""

FEWEST_FILES = 64
"""Open files that a program needs for itself and its libraries."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, in the language of the user's locale, as its help is."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **keywords)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns what :class:`argparse.ArgumentParser` does."""
        with translated_argparse():
            return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Returns the help in the language of the user's locale."""
        with translated_argparse():
            return super().format_help()

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:  # argparse itself keeps quiet about an output that takes nothing
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line that points to ``--help``."""
        problem = Translatable(_one_line(message))
        line = translate("{problem}; see {command} --help", problem=problem, command=self.prog)
        self.exit(2, f"{translate('error')}: {line}\n")


def wrong_argument(template: str, /, **fields: object) -> argparse.ArgumentTypeError:
    """Returns the error of a value that the ``type`` of an argument refuses, in the language of the user's locale."""
    return argparse.ArgumentTypeError(translate(template, **fields))


def positive_int(text: str) -> int:
    """Returns the whole number of at least 1 that ``text`` holds; used as the ``type`` of an argument.

    >>> positive_int("12")
    12
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise wrong_argument("must be a whole number of at least 1, got {text!r}", text=text)
    return int(text)


def say(console: Console, text: str) -> None:
    """Print ``text`` in the language of the user's locale, and else as it is.

    Square brackets are no markup, numbers get no colour, and long lines stay whole.
    """
    console.print(translate(text), markup=False, highlight=False, soft_wrap=True)


def run_program(program: Callable[[], int]) -> int:
    """Run a program and turn what ends it into an exit code.

    A :class:`UserError` becomes ``error: ...`` and 2, as does what the system refuses (files, memory, output), Ctrl-C
    130, SIGTERM 143, a closed output pipe 141. Warnings become one line each. Other errors are bugs and keep their
    traceback.
    """
    warnings.showwarning = _show_warning
    try:
        _check_process()
        system.prepare_console()
        with SignalGuard(last=True):
            try:
                code = program()
            except SystemExit:  # of --help, whose text may be on its way
                sys.stdout.flush()
                raise
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(translate(error))
    except (MemoryError, RuntimeError, SystemError, ImportError) as error:
        if isinstance(error, ImportError) and (missing := find_missing_package(error)):
            return _fail(translate(missing))
        if not is_out_of_memory(error):
            raise
        return _fail(translate("out of memory; free some, or use less data or a smaller model"))
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except UnicodeEncodeError as error:
        if error.encoding.lower().replace("-", "") == "utf8":
            raise
        sign = ascii(error.object[error.start : error.start + 1])
        text = Translatable(
            "the output has no place for {sign} in {encoding}; set PYTHONIOENCODING=utf-8",
            sign=sign,
            encoding=error.encoding,
        )
        return _fail(translate(text))
    except OSError as error:
        if error.errno is None:
            raise
        return _fail(translate(_describe(error)))


def _check_process() -> None:
    """Refuse to run where the first file or line of output would fail.

    Raises:
        UserError: naming what is missing.
    """
    if sys.stdin is None:  # closed; what is opened first takes its number, so that no file of ours does
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        raise UserError("standard output is closed; open it, for example on /dev/null")
    limit = system.open_files_limit()
    if limit is not None and limit < FEWEST_FILES:
        raise UserError(
            "a process may have only {limit} files open here; raise the limit with `ulimit -n 1024`", limit=limit
        )


def _one_line(message: str) -> str:
    """Returns a message in one line of bounded length: arguments and paths of a user may be of any length."""
    line = " ".join(message.split("\n"))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


def _fail(message: str) -> int:
    """Print an error in one line; returns the exit code."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed or full: the exit code is left
        sys.stderr.write(f"{translate('error')}: {_one_line(message)}\n")
        sys.stderr.flush()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return 2
    _drop_output()
    return 2


def _describe(error: OSError) -> Translatable:
    """What the system refused, with its file and a remedy where there is one."""
    remedies = {
        errno.EMFILE: Translatable("raise the limit on open files with `ulimit -n 1024`"),
        errno.ENOSPC: Translatable("free some space"),
        errno.ENAMETOOLONG: Translatable("use a shorter name"),
        errno.EACCES: Translatable("use a place that you may use"),
        errno.ENOTDIR: Translatable("a file stands where a folder should be"),
    }
    where = Translatable(str(error.filename)) if error.filename else Translatable("a file or the output")
    problem = Translatable((error.strerror or str(error)).lower())
    if error.errno in remedies:
        problem = join_texts("; ", [problem, remedies[error.errno]])
    return problem if error.errno == errno.EMFILE and not error.filename else join_texts(": ", [where, problem])


def _drop_output() -> None:
    """Let what is left of the output go nowhere: Python would complain again while flushing at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        text = translate(message)[:LONGEST_LINE]
        sys.stderr.write(f"{translate('warning')}: {text}\n")
