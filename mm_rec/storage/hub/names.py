"""Names of models on a hub: ``owner/name``, or ``owner/name@revision`` for a branch, a tag or a commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from mm_rec.errors import UserError

__all__ = ["HubName", "parse_hub_name", "require_repository"]

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_LONGEST = 96
"""Characters of owner and name together, by the rule of the hub."""


class HubName(NamedTuple):
    """A model on a hub.

    Attributes:
        repository: ``owner/name``.
        revision: a branch, a tag or a commit; None for the newest state of the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_name(path: Path) -> HubName | None:
    """Returns the model on a hub that ``path`` can be the name of; None if it has another form.

    >>> str(parse_hub_name(Path("ada/notes@v1.0")))
    'ada/notes@v1.0'
    >>> parse_hub_name(Path("runs/stage1/checkpoints")), parse_hub_name(Path("./runs")), parse_hub_name(Path("../runs"))
    (None, None, None)
    """
    match = _NAME.fullmatch(path.as_posix())
    if match is None or ".." in match[0] or "--" in match[1] or len(match[1]) > _LONGEST:
        return None
    return HubName(match[1], match[2])


def require_repository(text: str) -> str:
    """Returns ``text`` if it is the ``owner/name`` of a repository.

    Raises:
        UserError: if it is not.
    """
    name = parse_hub_name(Path(text))
    if name is None or str(name) != text or name.revision is not None:
        raise UserError("{text!r} is no name of a model on a hub; name it as owner/name, such as ada/notes", text=text)
    return text
