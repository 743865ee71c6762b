"""TensorBoard event files, for those who ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mm_rec.errors import MissingPackageError

__all__ = ["Board"]


class Board:
    """Writes scalars into ``folder``; what an earlier process wrote from ``first_step`` on no longer counts.

    Raises:
        UserError: if the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingPackageError("--tensorboard", "tensorboard") from None
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()
