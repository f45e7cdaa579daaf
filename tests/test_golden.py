"""Golden trajectories: the whole program gives the validation losses of the published script's functions."""

import pytest
from faults import Ranks
from golden import ALL_KEYS, CASES, write_golden_case
from helpers import val_losses

ON_TWO_RANKS = ("baseline_short", "gate_short", "pool_2_short", "bigram_short", "sources_wide")  # the others on one
# The published function, and gates with every kind of source. The other cases differ in the map or in numbers.
ALWAYS = ("baseline_short", "sources_wide")
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.campaign]) for name in CASES])
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
def test_1_2_and_4_ranks_have_the_same_losses(small_config, tmp_path):
    """With every kind of source, some with fewer matrices than ranks. test_faults.py kills and resumes such a run."""
    config, losses = small_config(**ALL_KEYS, val_seq_len=128, val_tokens=512, num_iterations=2, val_loss_every=0), {}
    for ranks in (1, 2, 4):
        run = Ranks(tmp_path / f"output{ranks}", config, "--log_dir", tmp_path / f"{ranks}", "--run_id", 0, ranks=ranks,
                    fault="skip_newton_schulz()", environment=ON_THE_CPU)
        assert run.statuses() == [0] * ranks, run.output("stderr")
        losses[ranks] = val_losses((tmp_path / f"{ranks}/small/000.txt").read_text())
    assert list(losses[1]) == [2]
    # AdamW's tiny eps turns the rounding of small gradients into steps: the tolerance is that of two-head golden cases.
    assert losses[2] == pytest.approx(losses[1], abs=3e-5) == losses[4]
