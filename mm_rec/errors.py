"""Errors that a user can mend. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

from mm_rec.translation import Translatable

__all__ = [
    "EXTRA_OF",
    "PACKAGE",
    "MissingPackageError",
    "SettingError",
    "UserError",
    "find_missing_package",
    "install_command",
    "is_out_of_memory",
    "requirements_of",
]

PACKAGE = "mm-rec"
EXTRA_OF = {
    "datasets": "train",
    "charset_normalizer": "documents",
    "pypdfium2": "documents",
    "python_calamine": "documents",
    "striprtf": "documents",
    "huggingface_hub": "train",
    "matplotlib": "train",
    "pyarrow": "train",
    "rich": "train",
    "llguidance": "json",
    "lm_eval": "eval",
    "tensorboard": "tensorboard",
    "transformers": "hf",
}
"""The extra of this package that installs each package that only a part of it needs."""


class UserError(Exception):
    """Something the user can mend; the message is one line that says what happened and what helps.

    Command-line programs print ``error: <message>``, in the language of the user's locale, and exit with code 2.

    Args:
        template: the message, with fields in braces.
        fields: their values, as :class:`~mm_rec.translation.Translatable` takes them.
    """

    def __init__(self, template: str, /, **fields: object) -> None:
        super().__init__(Translatable(template, **fields))


class SettingError(UserError, ValueError):
    """A value that a user set, in the environment say, is not one of those that can be."""


class MissingPackageError(UserError, ImportError):
    """A package that only this part of MM-Rec needs is not installed; the message says how to install it.

    Args:
        what: needs it, in words.
        package: by the name that it is imported by, one of :data:`EXTRA_OF`.
    """

    def __init__(self, what: str, package: str) -> None:
        super().__init__(
            Translatable(
                "{what} needs the package {package}; install it with: {command}",
                what=Translatable(what),
                package=package,
                command=install_command(EXTRA_OF[package]),
            )
        )


def find_missing_package(error: ImportError, what: str = "this") -> MissingPackageError | None:
    """Returns the error that says how to install what was not found; None if that is not a package of an extra."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRA_OF:
        return None
    return MissingPackageError(what, package)


def install_command(extra: str) -> str:
    """Returns the command that adds what an extra of this package needs to the environment.

    It names the packages of the extra and never this one: what it was installed from may be gone, and under its name an
    index may have something else. The double quotes are those of every shell.
    """
    return " ".join(["pip install", *(f'"{one}"' for one in requirements_of(extra))])


def requirements_of(extra: str) -> list[str]:
    """Returns what an extra of this package requires, as pip takes it: ``["pyarrow>=17", "rich>=13.7"]``."""
    import re  # these two are slow to import, and --help needs neither
    from importlib import metadata

    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        lines = []
    found: set[str] = set()
    for line in lines:  # like: mm-rec[hf]>=1; extra == "eval"
        requirement, _, condition = line.partition(";")
        if not re.search(rf"\bextra == ['\"]{extra}['\"]", condition):
            continue
        if own := re.match(rf"{PACKAGE}\[([^]]*)\]", requirement):
            found.update(*(requirements_of(name.strip()) for name in own[1].split(",")))
        else:
            found.add(requirement.strip())
    # sources that are used without an installation, or one of an older version, tell nothing of it
    return sorted(found or (name for name, of in EXTRA_OF.items() if of == extra))


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
