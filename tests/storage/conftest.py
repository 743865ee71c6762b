"""What tests of run folders share."""

from __future__ import annotations

import pytest

from mm_rec.text.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a small text, a small tokenizer"] * 4, 300)
