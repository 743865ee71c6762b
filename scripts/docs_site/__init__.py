"""Makes the pages of the documentation site that describe the code, from the code.

Only MkDocs and the tests import it; the package itself does not.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The root of the checkout."""
