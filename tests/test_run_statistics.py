"""logs/run_statistics.py: crossings, Dunnett's test of losses and times, the record rule, power."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

from logs import run_statistics
from logs.results import Curve, Run, read_configurations
from logs.run_statistics import Comparison, Family, critical_value, find_crossing, mean_curve, record_test, runs_needed


@pytest.fixture(scope="module")
def runs():
    """The published runs."""
    return read_configurations([ROOT / "logs/published"])[0]


@pytest.fixture(scope="module")
def published(runs):
    return Comparison(runs, "baseline_ttest", 2.92)


def make_run(losses, total=None, diverged_at=None, every=10, ms=100):
    steps = np.arange(len(losses)) * float(every)
    curve = Curve(steps, np.array(losses, float), steps * ms / 1000)
    return Run(Path("run"), {}, int(steps[-1]) if total is None else total, curve, 100.0, diverged_at)


@pytest.mark.parametrize("losses, step", [
    ([9, 2.92, 2.9], 10), ([2.9, 2.8], 0), ([9, 2, 9, 2], 10 * 6.08 / 7), ([9, 3, 2.9], 18), ([9, 3], None)])
def test_the_first_crossing(losses, step):
    crossing = find_crossing(make_run(losses).curve, 2.92, None)
    assert crossing == (None if step is None else (pytest.approx(step), pytest.approx(step / 10), False))


def test_a_curve_that_ends_above_the_target_goes_on_as_the_baseline_ends():
    """The baseline falls by 0.1 in 10 steps, 1 s: 0.03 above the target are 3 steps and 0.3 s more."""
    runs = {"baseline": [make_run([9, 3, 2.9])], "slow": [make_run([9, 3, 2.95], ms=300)]}
    comparison = Comparison(runs, "baseline", 2.92)
    assert comparison.crossings["slow"] == (pytest.approx(23), pytest.approx(6.3), True)
    assert comparison.time.samples["slow"] == pytest.approx([6.3])


def test_without_a_baseline_that_falls_at_its_end_there_is_no_going_on():
    comparison = Comparison({"baseline": [make_run([9, 2.9, 2.9])], "b": [make_run([9, 3, 2.95])]}, "baseline", 2.92)
    assert comparison.crossings["b"] is None and list(comparison.time.samples) == ["baseline"]


def test_the_mean_curve_is_of_the_validations_that_all_runs_share():
    curve = mean_curve([make_run([9, 3.1, 2.9]), make_run([9, 4, 3.3, 3, 2.8], every=5, ms=120)])
    assert np.array(curve) == pytest.approx(np.array([[0, 10, 20], [9, 3.2, 2.85], [0, 1.1, 2.2]]))


@pytest.mark.parametrize("name, count, seconds, step", [
    ("record_baseline", 5, "1464.8", "5929.6"), ("record_add_1", 5, "1452.7", "5852.7"),
    ("record_add_2", 5, "1438.8", "5776.2"), ("baseline", 1, "1435.6", "5920.0"), ("add_1", 1, "1422.4", "5837.6"),
    ("add_2", 1, "1410.6", "5784.7"), ("add_3", 1, "1428.2", "5826.8"), ("add_4", 1, "1444.0", "5856.9"),
    ("add_5", 1, "1424.7", "5757.3"),
])
def test_where_the_mean_curve_of_the_first_published_runs_crosses(runs, name, count, seconds, step):
    crossing = find_crossing(mean_curve(runs[name][:count]), 2.92, None)
    assert (f"{crossing.seconds:.1f}", f"{crossing.step:.1f}") == (seconds, step)


@pytest.mark.slow
@pytest.mark.parametrize("measure, compared", [("loss", 26), ("time", 32)])
def test_scipy_s_dunnett_is_matched_on_the_published_runs(published, measure, compared):
    family = getattr(published, measure)
    others = {name: sample for name, sample in family.samples.items() if name != "baseline_ttest"}
    test = stats.dunnett(*others.values(), control=family.samples["baseline_ttest"], rng=np.random.default_rng(1))
    interval, half_widths = test.confidence_interval(), [effect.half_width for effect in family.effects.values()]
    assert len(others) == compared and list(family.effects) == list(others)
    assert [effect.p for effect in family.effects.values()] == pytest.approx(test.pvalue, abs=2e-4)
    assert half_widths == pytest.approx((interval.high - interval.low) / 2, rel=0.005)


def test_one_comparison_is_the_t_test_with_pooled_variance():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([5.0, 7.0, 6.0, 10.0])
    test = stats.ttest_ind(a, b)
    low, high = test.confidence_interval()
    effect = Family({"a": a, "b": b}, "b").effects["a"]
    assert effect[:2] == pytest.approx((a.mean() - b.mean(), (high - low) / 2), rel=1e-3)
    assert effect.p == pytest.approx(test.pvalue, abs=5e-4)


def test_intervals_hold_where_scipy_s_own_search_for_them_fails():
    """Three configurations against a baseline of two runs; of equals, 5% are called different."""
    sizes = np.array([1, 3, 2])
    rng = np.random.default_rng(0)
    means = rng.standard_normal((200_000, 4)) / np.sqrt([2, *sizes])
    pooled = np.sqrt(rng.chisquare(4, 200_000) / 4)
    statistics = np.abs(means[:, 1:] - means[:, :1]) / np.sqrt(1 / sizes + 1 / 2) / pooled[:, None]
    assert (statistics.max(axis=1) > critical_value(sizes, 2, 4)).mean() == pytest.approx(0.05, abs=0.002)


def test_a_configuration_of_one_run_takes_part_if_any_has_more():
    samples = {"base": np.array([1.0]), "one": np.array([1.01]), "two": np.array([2.0, 2.001])}
    effects = Family(samples, "base").effects
    assert effects["two"].verdict == "worse" and effects["one"].p is not None


@pytest.mark.parametrize("sample", [[1.0], [1.0, 1.0, 1.0]], ids=["one run each", "runs that do not differ"])
def test_without_runs_that_differ_there_is_no_test(sample):
    family = Family({"base": np.array(sample), "b": np.array(sample) + 0.1}, "base")
    assert family.deviation is None and family.effects["b"] == (pytest.approx(0.1), None, None)
    assert family.effects["b"].verdict == "not tested"


def test_runs_of_another_length_are_compared_by_time_only():
    groups = {"c": [make_run([9, 3, 2.9]), make_run([9, 3, 2.8])], "short": [make_run([9, 2.9])]}
    loss, time = Comparison(groups, "c", 2.92).effects("short")
    assert (loss.verdict, loss.difference) == ("not compared", None) and time.p is not None


def test_runs_that_diverged_or_go_on_are_in_no_figure():
    group = [make_run([9, 3, 2.9]), make_run([9, 3, 2.8], diverged_at=20), make_run([9, 3], total=20)]
    comparison = Comparison({"c": group, "d": [make_run([9, np.nan], diverged_at=10)]}, "c", 2.92)
    assert list(comparison.losses["c"]) == [2.9] and len(comparison.time.samples["c"]) == 1
    assert list(comparison.curves["c"].losses) == [9, 3, 2.9] and list(comparison.loss.samples) == ["c"]


@pytest.mark.slow
def test_equals_are_called_different_in_five_percent_of_families(runs, monkeypatch):
    """The 28 repeats, dealt out as a baseline of ten and nine configurations of two, 200 times."""
    monkeypatch.setattr(run_statistics, "critical_value", lambda *_: np.nan)  # verdicts go by p
    rng, wrong = np.random.default_rng(0), {"loss": 0, "time": 0}
    for _ in range(200):
        repeats = [runs["baseline_ttest"][i] for i in rng.permutation(28)]
        deal = {"baseline": repeats[:10]} | {f"c{i}": repeats[i : i + 2] for i in range(10, 28, 2)}
        comparison = Comparison(deal, "baseline", 2.92)
        for measure in wrong:
            verdicts = {effect.verdict for effect in getattr(comparison, measure).effects.values()}
            wrong[measure] += verdicts != {"not shown"}
    assert max(wrong.values()) <= stats.binom.ppf(0.99, 200, 0.05) == 18


@pytest.mark.parametrize("first, sizes, warns", [
    (1, [10, 10, 10, 10], False), (20, [10, 10, 10, 10], True), (1, [28, 5, 5] + 20 * [2], False)])
def test_unequal_variances_are_seen(first, sizes, warns):
    """Two runs, always as far from their median, are no sign of them."""
    rng = np.random.default_rng(0)
    samples = {i: rng.normal(0, 1 if i else first, size) for i, size in enumerate(sizes)}
    assert (Family(samples, None).variance_p < 0.01) == warns


def test_the_record_rule_by_hand():
    losses = np.array([2.91, 2.912, 2.909])
    mean, std = losses.mean(), losses.std(ddof=1)
    t = (mean - 2.92) / (std / 3**0.5)
    expected = {"n": 3, "mean": mean, "std": std, "t": t, "p": stats.t.cdf(t, 2), "record": True}
    expected["upper_bound"] = mean + stats.t.ppf(0.95, 2) * std / 3**0.5
    assert record_test(losses, 2.92) == pytest.approx(expected)


@pytest.mark.parametrize("losses", [[], [2.8], [2.8, 2.8]])
def test_without_two_runs_that_differ_no_record_is_shown(losses):
    test = record_test(np.array(losses), 2.92)
    assert (test["t"], test["p"], test["upper_bound"], test["record"]) == (None, None, None, False)


@pytest.mark.parametrize("effect, count", [(0.5, 64), (0.8, 26), (1.0, 17), (100.0, 2)])
def test_runs_needed_are_those_of_cohen_s_tables(effect, count):
    assert runs_needed(effect, 0.05) == count
