import argparse
from typing import Any

import pytest

from mm_rec.scripts.sampling_options import FLAGS, add_sampling_arguments, given_sampling


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        *[([f"--{name}", "1"], {name: 1}) for name in FLAGS],
        (["--max_tokens", "3"], {"max_new_tokens": 3}),
        (["--max_tokens", "3", "--max_new_tokens", "4"], {"max_new_tokens": 4}),
        (["--stop", "a", "--stop", "b"], {"stop": ("a", "b")}),
    ],
)
def test_flags_are_the_fields_of_sampling(arguments: list[str], expected: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_sampling_arguments(parser)
    assert given_sampling(parser.parse_args(arguments)) == expected
