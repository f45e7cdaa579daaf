"""logs/run_statistics.py: crossings, Dunnett's test of losses and times, outliers, the order of losses, power.

The approved comparisons in test_compare.py show the figures of all of them, and of the record rule.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from logs import run_statistics
from logs.log_format import ROOT, Header
from logs.results import Curve, Result, read_configurations
from logs.run_statistics import Comparison, Family, final_slopes, find_crossing, mean_curve, rank_alike, runs_needed


@pytest.fixture(scope="module")
def runs():
    return read_configurations([ROOT / "logs/published"])[0]


def make_run(losses, every=10, ms=100, **keys):
    steps = np.arange(len(losses)) * float(every)
    curve = Curve(steps, np.array(losses, float), steps * ms / 1000)
    return Result(Path("run"), Header("", keys), int(steps[-1]), curve, 100.0, None, int(steps[-1]), frozenset())


@pytest.mark.parametrize("losses, step", [
    ([9, 2.92, 2.9], 10), ([2.9, 2.8], 0), ([9, 2, 9, 2], 10 * 6.08 / 7), ([9, 3, 2.9], 18)])
def test_the_first_crossing(losses, step):
    assert find_crossing(make_run(losses).curve, 2.92, None) == (pytest.approx(step), pytest.approx(step / 10), " ")


@pytest.mark.parametrize("baseline, loss, crossing", [
    ([9, 3, 2.9], 2.9499, (22.99, 6.299, "*")), ([9, 3, 2.9], 2.96, (20, 6, ">")), ([9, 2.9, 2.9], 2.95, (20, 6, ">"))])
def test_a_curve_that_ends_above_the_target_is_extrapolated_by_at_most_15_percent(baseline, loss, crossing):
    """A baseline falls by 0.1 in 10 steps, 1 s: 0.03 above the target is 3 steps and 0.3 s more. The last is flat."""
    comparison = Comparison({"base": [make_run(baseline)], "slow": [make_run([9, 3, loss], ms=300)]}, "base", 2.92)
    assert comparison.crossings["slow"] == (*map(pytest.approx, crossing[:2]), crossing[2])
    assert ("slow" in comparison.time.samples) == (crossing[2] == "*")


def test_a_last_interval_of_less_than_a_hundredth_of_the_steps_is_joined_with_the_one_before():
    """The loss falls by 0.1 from step 100 to step 200 and not at all in step 201."""
    curve = Curve(np.array([0, 100, 200, 201]), np.array([9, 3, 2.9, 2.9]), np.array([0, 10, 20, 20.1]))
    assert final_slopes(curve) == pytest.approx((-0.1 / 101, -0.1 / 10.1))
    assert final_slopes(curve._replace(losses=np.array([9, 3, 3.1, 3.1]))) is None
    assert final_slopes(Curve(*(column[2:] for column in curve))) is None  # nothing lies before


def test_the_mean_curve_covers_the_validations_that_all_runs_share():
    curve = mean_curve([make_run([9, 3.1, 2.9]), make_run([9, 4, 3.3, 3, 2.8], every=5, ms=120)])
    assert np.array(curve) == pytest.approx(np.array([[0, 10, 20], [9, 3.2, 2.85], [0, 1.1, 2.2]]))


@pytest.mark.parametrize("a, b, found", [
    ([1, 1.1, 0.9, 1.7], [2, 2.1, 1.9, 2], [("a", 3)]), ([1, 1.1, 0.9, 1.6], [2, 2.1, 1.9, 2], []),  # p 0.009, 0.017
    ([1, 1.1], [2, 5], []), ([1, 1, 1], [1], [])])
def test_a_lone_outlier_is_found_among_three_or_more_runs(a, b, found):
    assert [outlier[:2] for outlier in Family({"a": np.array(a), "b": np.array(b)}, "a").outliers()] == found


@pytest.mark.slow
@pytest.mark.parametrize("measure, compared", [("loss", 26), ("time", 32)])
def test_scipy_s_dunnett_is_matched_on_the_published_runs(runs, measure, compared):
    family = getattr(Comparison(runs, "baseline_ttest", 2.92), measure)
    others = {name: sample for name, sample in family.samples.items() if name != "baseline_ttest"}
    test = stats.dunnett(*others.values(), control=family.samples["baseline_ttest"], rng=np.random.default_rng(1))
    interval, half_widths = test.confidence_interval(), [effect.half_width for effect in family.effects.values()]
    assert len(others) == compared and list(family.effects) == list(others)
    assert [effect.p for effect in family.effects.values()] == pytest.approx(test.pvalue, abs=2e-4)
    assert half_widths == pytest.approx((interval.high - interval.low) / 2, rel=0.005)


@pytest.mark.slow
def test_equals_are_called_different_in_five_percent_of_families(runs, monkeypatch):
    """The 28 repeats, dealt out as a baseline of ten and nine configurations of two, 200 times."""
    monkeypatch.setattr(run_statistics, "critical_value", lambda *_: np.nan)  # verdicts use p alone
    rng, wrong = np.random.default_rng(0), {"loss": 0, "time": 0}
    for _ in range(200):
        repeats = [runs["baseline_ttest"][i] for i in rng.permutation(28)]
        deal = {"baseline": repeats[:10]} | {f"c{i}": repeats[i : i + 2] for i in range(10, 28, 2)}
        comparison = Comparison(deal, "baseline", 2.92)
        for measure in wrong:
            verdicts = {effect.verdict for effect in getattr(comparison, measure).effects.values()}
            wrong[measure] += verdicts != {"undecided"}
    assert max(wrong.values()) <= stats.binom.ppf(0.99, 200, 0.05) == 18


def test_a_comparison_after_each_run_calls_equal_configurations_different_in_13_percent_of_cases():
    """Two configurations and the first p < 0.05 after run 2, 3, 4 or 5, simulated 20,000 times."""
    runs, different = np.random.default_rng(0).normal(size=(20_000, 2, 5)), []
    for n in (2, 3, 4, 5):
        deviation = np.sqrt(runs[..., :n].var(axis=2, ddof=1).mean(axis=1))
        t = np.abs(np.diff(runs[..., :n].mean(axis=2))[:, 0]) / (deviation * math.sqrt(2 / n))
        different.append(t > run_statistics.critical_value(np.array([n]), n, 2 * n - 2))
    assert np.mean(different[-1]) == pytest.approx(0.05, abs=0.005)
    assert np.mean(np.any(different, axis=0)) == pytest.approx(0.13, abs=0.01)


@pytest.mark.parametrize("sample", [[1.0], [1.0, 1.0, 1.0], [0.3, 0.1 + 0.2]])
def test_without_two_runs_that_differ_nothing_is_tested(sample):
    family = Family({"base": np.array(sample), "b": np.array(sample) + 0.1}, "base")
    assert family.deviation is None and family.effects["b"] == (pytest.approx(0.1), None, None)
    assert family.effects["b"].verdict == "not tested"


def test_unequal_variances_are_seen_but_not_in_configurations_of_two_runs():
    rng = np.random.default_rng(0)
    for first, sizes, warns in [(1, [10] * 4, False), (20, [10] * 4, True), (1, [28, 5, 5] + 20 * [2], False)]:
        samples = {i: rng.normal(0, 1 if i else first, size) for i, size in enumerate(sizes)}
        assert (Family(samples, None).variance_p < 0.01) == warns


@pytest.mark.parametrize("noise, limit", [(1e-3, (0.99, 1)), (5.0, (0.5, 0.95)), (90.0, (0, 0.6))])
def test_the_rank_correlation_is_scipy_s_and_its_limit_falls_with_the_runs_noise(noise, limit):
    rng = np.random.default_rng(0)
    small, large = (Family({f"c{i}": i + noise * rng.normal(size=2) for i in range(20)}, "c0") for _ in range(2))
    ranking = rank_alike(small, large)
    means = [[sample.mean() for sample in family.samples.values()] for family in (small, large)]
    rho, p = stats.spearmanr(*means)
    assert ranking.rho == pytest.approx(rho) and ranking.p == pytest.approx(p, rel=0.05, abs=0.0015)
    assert ranking.low < ranking.rho < ranking.high + 1e-9 and limit[0] <= ranking.limit <= limit[1]


def test_an_equal_order_of_four_shows_little():
    """One of 24 orders is equal and one is reversed. The interval of a correlation of 1 is not a point."""
    family = Family({f"c{i}": np.array([i, i + 0.1]) for i in range(4)}, "c0")
    ranking = rank_alike(family, family)
    assert ranking.rho == pytest.approx(1) and ranking.p == pytest.approx(2 / 24) and ranking.low < 0 < ranking.high


@pytest.mark.parametrize("effect, runs", [(0.5, 64), (0.8, 26), (1.0, 17), (100.0, 2)])
def test_runs_needed_are_as_in_cohen_s_tables(effect, runs):
    assert runs_needed(effect, 0.05) == runs
