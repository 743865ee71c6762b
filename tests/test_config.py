"""The shape of a model, as a stranger's config.json may ask for it."""

from typing import Any

import pytest

from mm_rec.config import ModelConfig

SOUND = ModelConfig.preset("tiny").to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 10**9}, "at most 2,000 blocks"),
        ({"n_layers": 3.0}, "n_layers must be a whole number"),
        ({"n_layers": "3"}, "n_layers must be a whole number"),
        ({"n_layers": True}, "n_layers must be a whole number"),
        ({"d_model": 10**30}, "d_model must be a whole number"),
        ({"window": 2**20}, "window must be a whole number"),
        ({"window": 2}, "window must be at least 3"),
        ({"rotary_base": float("nan")}, "rotary_base must be a number above 0"),
        ({"rotary_base": 2**63}, "rotary_base must be a number above 0 and at most 1e"),
        ({"rotary_base": "1000"}, "rotary_base must be a number above 0"),
        ({"experts": "text"}, "experts must be names"),
        ({"experts": ["a.b"]}, "experts must be names"),
        ({"experts": [""]}, "experts must be names"),
        ({"experts": [5]}, "experts must be names"),
        ({"experts": []}, "at least one"),
        ({"experts": ["a"] * 2}, "distinct"),
        ({"experts": [f"e{i}" for i in range(10**5)]}, "at most 2,000 blocks"),
        ({"experts": None}, "experts must be names"),
    ],
)
def test_what_is_no_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict({**SOUND, **changes})
    assert len(str(error.value)) < 200


def test_a_config_survives_its_file() -> None:
    assert ModelConfig.from_dict(SOUND) == ModelConfig.preset("tiny")
