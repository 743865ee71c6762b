"""What a model of each preset learns from so many tokens: a fit to runs of our own.

Bits per byte on held-out books and Python code fall by about the same amount with each doubling of the tokens, as long
as the tokens are new. The runs behind the figures, and how far off the fit is, are in docs/LOG.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["FITS", "Fit"]

REFERENCE_TOKENS = 2_000_000


@dataclass(frozen=True)
class Fit:
    """Bits per byte by tokens, of text and of code.

    Attributes:
        bits: after 2M tokens of training, half of them of each domain.
        per_doubling: by how much they fall with each doubling of the tokens.
    """

    bits: tuple[float, float]
    per_doubling: tuple[float, float]

    def bits_per_byte(self, tokens: float) -> tuple[float, float]:
        """Returns the bits per byte of text and of code to expect after ``tokens`` tokens.

        >>> text, code = FITS["small"].bits_per_byte(4_000_000)
        >>> round(text, 3), round(code, 3)
        (1.762, 1.584)
        """
        doublings = math.log2(max(tokens, 1) / REFERENCE_TOKENS)
        text, code = (at - fall * doublings for at, fall in zip(self.bits, self.per_doubling, strict=True))
        return text, code


FITS = {
    "small": Fit((1.827, 1.729), (0.065, 0.145)),
    "100m": Fit((1.753, 1.708), (0.088, 0.249)),
}
"""By preset. ``tiny`` is for tests and has none."""
