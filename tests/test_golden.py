"""Golden trajectories: the whole program gives the validation losses of the published script's functions."""

import pytest
from golden import CASES, write_golden_case
from helpers import run_program, val_losses


def assert_golden(losses, name):
    """Every validation is there and within the case's tolerance; both figures have 6 decimals."""
    expected = {int(step): loss for step, loss in CASES[name]["val_loss"].items()}
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, abs=CASES[name]["tolerance"], rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_golden_trajectory(name, run_main, tmp_path):
    assert run_main(write_golden_case(name, tmp_path)) == 0
    assert_golden(val_losses((tmp_path / "logs" / name / "000.txt").read_text()), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline_short", "gate_short", "pool_2_short"])
def test_golden_trajectory_on_two_ranks(name, tmp_path):
    result = run_program(write_golden_case(name, tmp_path), ranks=2, env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr
    assert_golden(val_losses(result.stdout), name)


@pytest.mark.slow
def test_the_validation_loss_does_not_depend_on_the_world_size(small_config):
    config = small_config(num_iterations=2, val_loss_every=1)
    results = [run_program(config, "--seed", 1, ranks=ranks, env={"CUDA_VISIBLE_DEVICES": ""}) for ranks in (1, 2, 4)]
    losses = [val_losses(result.stdout) for result in results]
    assert list(losses[0]) == [0, 1, 2], results[0].stderr
    assert losses[1] == pytest.approx(losses[0], abs=2e-6) and losses[2] == pytest.approx(losses[0], abs=2e-6)
