"""Schedules: exact values, worked out by hand from the reference's formulas."""

import math
from fractions import Fraction

import pytest

import train_gpt_medium as train


@pytest.mark.parametrize("step, n, cooldown, scale", [
    (29, 100, 0.7, 1.0), (65, 100, 0.7, 0.5), (99, 100, 0.7, 0.01 / 0.7), (99, 100, 0.0, 1.0), (25, 100, 1.0, 0.75)])
def test_lr_scale(step, n, cooldown, scale):
    assert train.lr_scale(step, n, cooldown) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("step, momentum", [(0, 0.85), (150, 0.90), (300, 0.95), (5959, 0.95)])
def test_muon_momentum(step, momentum):
    assert train.muon_momentum(step) == pytest.approx(momentum, rel=1e-12)


@pytest.mark.parametrize("step, n, blocks", [
    (0, 5960, 1), (5960, 5960, 27),
    (100, 150, 14),  # x = 2/3 meets 14 * 128 exactly
    (2980, 5960, 14),  # x = 1/2: 1728 tokens, which is 13.5 blocks
])
def test_window_blocks(step, n, blocks):
    assert train.window_blocks(step, n) == blocks


@pytest.mark.parametrize("n", [150, 5820, 5960])
def test_window_is_the_smallest_that_is_large_enough(n):
    """Against exact arithmetic, at every step."""
    for step in range(n + 1):
        x = Fraction(step, n)
        assert train.window_blocks(step, n) == max(1, math.ceil(3456 * (4 * x**3 - 6 * x**2 + 3 * x) / 128)), step


def test_learning_rates_and_momentum_reach_the_optimizers():
    hp = train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=256, num_iterations=200,
                               value_embedding_gate=True, value_embedding_lr=0.1)
    adamw, muon = train.make_optimizers(train.GPT(hp), hp, rank=0, world_size=1)
    train.set_schedules(adamw, muon, 130, hp)  # x = 0.65, so half of each rate
    assert [group["lr"] for group in adamw.param_groups] == pytest.approx([0.5 / 320, 0.15, 0.05, 0.004, 0.0075])
    assert [group["lr"] for group in muon.param_groups] == pytest.approx([0.0125] * 3)
    assert [group["momentum"] for group in muon.param_groups] == pytest.approx([0.85 + 0.1 * 130 / 300] * 3)
    assert [group["weight_decay"] for group in muon.param_groups] == [0.01, 0.02, 0.02]
