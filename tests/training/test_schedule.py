"""The learning rate and the betas that all stages share."""

import pytest

from mm_rec.training.plan import make_plan
from mm_rec.training.schedule import betas, choose_optimizer, learning_rate, muon_rate_factor
from mm_rec.training.settings import TrainSettings


def test_betas_follow_the_tokens_of_a_step() -> None:
    assert make_plan(TrainSettings(), "cpu", 10**6).betas == (0.7, 0.999)  # 2 x 512
    assert betas(10**9) == betas(65_536) == (0.9, 0.95)
    assert betas(1) == betas(1024)
    first, second = betas(32_768)
    assert 0.7 < first < 0.9
    assert second**2 == pytest.approx(0.95)  # half the tokens: twice the steps for the same decay


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, 400, 2.0) for step in range(1, 401)]
    peak = rates.index(max(rates))
    assert peak == 19  # a twentieth
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rate(1, 1, 2.0) == 2.0
    assert learning_rate(500, 400, 2.0) == pytest.approx(0.2)


def test_matrices_are_orthogonalised_where_a_step_reads_enough() -> None:
    assert [choose_optimizer("auto", "cpu", tokens) for tokens in (1024, 4095, 4096)] == ["adamw", "adamw", "muon"]
    assert [choose_optimizer("auto", "cuda", tokens) for tokens in (4096, 16_383, 16_384)] == ["adamw", "adamw", "muon"]
    for name in ("adamw", "muon"):
        assert choose_optimizer(name, "cpu", 1) == choose_optimizer(name, "cuda", 10**6) == name


def test_the_rate_of_matrices_grows_with_the_root_of_the_tokens() -> None:
    assert [2e-3 * muon_rate_factor(tokens) for tokens in (1024, 4096, 16_384)] == pytest.approx([1e-3, 2e-3, 4e-3])
    assert muon_rate_factor(1) == muon_rate_factor(1024)
    assert muon_rate_factor(10**9) == muon_rate_factor(16_384)
