"""Golden trajectories: the whole program gives the validation losses of the published script's functions."""

import pytest
from faults import Ranks
from golden import CASES, write_golden_case
from helpers import val_losses

ON_TWO_RANKS = ("baseline_short", "gate_short", "pool_2_short", "bigram_short", "sources_wide")  # the others on one
# The cases that share their code with others and differ in the map or in one number:
CAMPAIGN = ("add_2_long", "remove_0_13_short", "add_15_short", "add_2_short", "add_5_short", "remove_0_short",
            "gate_short", "lr_short")
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.campaign] * (name in CAMPAIGN)) for name in CASES])
def test_golden_trajectory(name, tmp_path):
    """Every validation is there and within the case's tolerance; both figures have 6 decimals."""
    ranks = 2 if name in ON_TWO_RANKS else 1
    run = Ranks(tmp_path / "output", write_golden_case(name, tmp_path), ranks=ranks, environment=ON_THE_CPU)
    assert run.statuses() == [0] * ranks, run.output("stderr")
    expected = {int(step): loss for step, loss in CASES[name]["val_loss"].items()}
    losses = val_losses(run.output())
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, abs=CASES[name]["tolerance"], rel=0)


@pytest.mark.slow
def test_the_validation_loss_does_not_depend_on_the_world_size(small_config, tmp_path):
    config, losses = small_config(num_iterations=2, val_loss_every=1), {}
    for ranks in (1, 2, 4):
        run = Ranks(tmp_path / f"output{ranks}", config, "--seed", 1, ranks=ranks, environment=ON_THE_CPU)
        assert run.statuses() == [0] * ranks, run.output("stderr")
        losses[ranks] = val_losses(run.output())
    assert list(losses[1]) == [0, 1, 2]
    assert losses[2] == pytest.approx(losses[1], abs=2e-6) and losses[4] == pytest.approx(losses[1], abs=2e-6)
