"""Small data sets for the hub of the tests."""

import gzip
import json

CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n"
PYTHON = "codeparrot/codeparrot-clean"


def code_rows(n, first=0):
    """Rows of a data set of small different modules; every tenth is too short to be kept."""
    return [
        {
            "content": "x = 1\n"
            if i % 10 == 3
            else f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}({i}), 'of many')\n"
        }
        for i in range(first, first + n)
    ]


def compressed(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
