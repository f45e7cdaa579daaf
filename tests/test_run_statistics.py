"""logs/run_statistics.py: crossings, Dunnett's test of losses and times, the record rule, power."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from logs import run_statistics
from logs.log_format import ROOT, Header
from logs.results import Curve, Result, read_configurations
from logs.run_statistics import (
    Comparison,
    Family,
    critical_value,
    find_crossing,
    mean_curve,
    rank_alike,
    record_test,
    runs_needed,
)


@pytest.fixture(scope="module")
def runs():
    return read_configurations([ROOT / "logs/published"])[0]


def make_run(losses, total=None, diverged_at=None, every=10, ms=100):
    steps = np.arange(len(losses)) * float(every)
    curve = Curve(steps, np.array(losses, float), steps * ms / 1000)
    total = int(steps[-1]) if total is None else total
    return Result(Path("run"), Header("", {}), total, curve, 100.0, diverged_at, total)


@pytest.mark.parametrize("losses, step", [
    ([9, 2.92, 2.9], 10), ([2.9, 2.8], 0), ([9, 2, 9, 2], 10 * 6.08 / 7), ([9, 3, 2.9], 18)])
def test_the_first_crossing(losses, step):
    crossing = find_crossing(make_run(losses).curve, 2.92, None)
    assert crossing == (pytest.approx(step), pytest.approx(step / 10), " ")


@pytest.mark.parametrize("baseline, loss, crossing", [
    ([9, 3, 2.9], 2.9499, (22.99, 6.299, "*")), ([9, 3, 2.9], 2.96, (20, 6, ">")), ([9, 2.9, 2.9], 2.95, (20, 6, ">"))])
def test_a_curve_that_ends_above_the_target_is_extrapolated_by_at_most_15_percent(baseline, loss, crossing):
    """A baseline falls by 0.1 in 10 steps, 1 s: 0.03 above the target is 3 steps and 0.3 s more. The last is flat."""
    comparison = Comparison({"base": [make_run(baseline)], "slow": [make_run([9, 3, loss], ms=300)]}, "base", 2.92)
    assert comparison.crossings["slow"] == (*map(pytest.approx, crossing[:2]), crossing[2])
    assert ("slow" in comparison.time.samples) == (crossing[2] == "*")


@pytest.mark.parametrize("samples, found", [
    ({"a": [1, 1.1, 0.9, 3], "b": [2, 2.1, 1.9, 2]}, [("a", 3)]), ({"a": [1, 1.1, 0.9, 1.2], "b": [2, 2.1, 1.9]}, []),
    ({"a": [1, 1.1], "b": [2, 5]}, []), ({"a": [1, 1, 1]}, []), ({"a": [1]}, [])])
def test_a_lone_outlier_is_found_among_three_or_more_runs(samples, found):
    family = Family({name: np.array(sample, float) for name, sample in samples.items()}, "a")
    assert [outlier[:2] for outlier in family.outliers()] == found


def test_an_outlier_is_called_in_one_percent_of_normal_families(monkeypatch):
    for name in ("critical_value", "dunnett_p"):
        monkeypatch.setattr(run_statistics, name, lambda *_: np.full(3, np.nan))
    rng = np.random.default_rng(0)
    called = sum(bool(Family({name: rng.normal(size=4) for name in "abcd"}, "a").outliers()) for _ in range(400))
    assert called <= stats.binom.ppf(0.99, 400, 0.01) == 9


def test_the_mean_curve_covers_the_validations_that_all_runs_share():
    curve = mean_curve([make_run([9, 3.1, 2.9]), make_run([9, 4, 3.3, 3, 2.8], every=5, ms=120)])
    assert np.array(curve) == pytest.approx(np.array([[0, 10, 20], [9, 3.2, 2.85], [0, 1.1, 2.2]]))


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


def test_one_comparison_is_the_t_test_with_pooled_variance():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([5.0, 7.0, 6.0, 10.0])
    test, effect = stats.ttest_ind(a, b), Family({"a": a, "b": b}, "b").effects["a"]
    low, high = test.confidence_interval()
    assert effect[:2] == pytest.approx((a.mean() - b.mean(), (high - low) / 2), rel=1e-3)
    assert effect.p == pytest.approx(test.pvalue, abs=5e-4)


def test_intervals_hold_where_scipy_s_own_search_for_them_fails():
    """Three configurations against a baseline of two runs; of equals, 5% are called different."""
    sizes, rng = np.array([1, 3, 2]), np.random.default_rng(0)
    means = rng.standard_normal((200_000, 4)) / np.sqrt([2, *sizes])
    pooled = np.sqrt(rng.chisquare(4, 200_000) / 4)
    statistics = np.abs(means[:, 1:] - means[:, :1]) / np.sqrt(1 / sizes + 1 / 2) / pooled[:, None]
    assert (statistics.max(axis=1) > critical_value(sizes, 2, 4)).mean() == pytest.approx(0.05, abs=0.002)


def test_runs_of_the_same_seeds_are_paired():
    rng, seed_effect = np.random.default_rng(0), np.array([3.0, 0.0, -5.0, 9.0])
    a, b = (seed_effect + rng.normal(size=4) * 0.1 + mean for mean in (1.0, 1.2))
    paired = Family({"a": a, "b": b[::-1]}, "b", {"a": [0, 1, 2, 3], "b": [3, 2, 1, 0]})
    assert paired.is_paired and paired.effects["a"].p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-3)
    interval = stats.ttest_rel(a, b).confidence_interval()
    assert paired.effects["a"].half_width == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    assert paired.samples["b"] - paired.samples["a"][::-1] == pytest.approx((b - a)[::-1])  # each in its runs' order


@pytest.mark.parametrize("seeds", [
    {}, {"a": [0, 1, 2], "b": [0, 1, 3]}, {"a": [0, 1, 1], "b": [0, 1, 1]}, {"a": [0, 1, None], "b": [0, 1, None]}])
def test_runs_of_other_or_unknown_seeds_are_not_paired(seeds):
    assert not Family({"a": np.array([1.0, 2, 4]), "b": np.array([1.0, 3, 5])}, "b", seeds).is_paired


def test_the_paired_test_calls_five_percent_of_equal_families_different(monkeypatch):
    monkeypatch.setattr(run_statistics, "critical_value", lambda *_: np.nan)  # verdicts use p alone
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(300):
        rows = rng.normal(size=4) + 0.5 * rng.normal(size=(8, 4))  # a seed's effect, and the rest
        family = Family(dict(zip("abcdefgh", rows)), "a", {name: [0, 1, 2, 3] for name in "abcdefgh"})
        wrong += min(effect.p for effect in family.effects.values()) < 0.05
    assert 4 <= wrong <= stats.binom.ppf(0.99, 300, 0.05) == 24


def test_single_runs_take_part_if_two_runs_of_any_configuration_differ():
    effects = Family({"base": np.array([1.0]), "one": np.array([1.01]), "two": np.array([2.0, 2.001])}, "base").effects
    assert effects["two"].verdict == "worse" and effects["one"].p is not None
    for sample in (np.array([1.0]), np.array([1.0, 1.0, 1.0])):
        family = Family({"base": sample, "b": sample + 0.1}, "base")
        assert family.deviation is None and family.effects["b"] == (pytest.approx(0.1), None, None)
        assert family.effects["b"].verdict == "not tested"


def test_runs_of_another_length_are_compared_by_time_only_and_open_runs_not_at_all():
    groups = {"c": [make_run([9, 3, 2.9]), make_run([9, 3, 2.8])], "short": [make_run([9, 2.9])]}
    loss, time = Comparison(groups, "c", 2.92).effects("short")
    assert (loss.verdict, loss.difference) == ("not compared", None) and time.p is not None
    group = [make_run([9, 3, 2.9]), make_run([9, 3, 2.8], diverged_at=20), make_run([9, 3], total=20)]
    comparison = Comparison({"c": group, "d": [make_run([9, np.nan], diverged_at=10)]}, "c", 2.92)
    assert list(comparison.losses["c"]) == [2.9] and len(comparison.time.samples["c"]) == 1
    assert list(comparison.curves["c"].losses) == [9, 3, 2.9] and list(comparison.loss.samples) == ["c"]


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


def test_unequal_variances_are_seen_but_not_in_configurations_of_two_runs():
    rng = np.random.default_rng(0)
    for first, sizes, warns in [(1, [10] * 4, False), (20, [10] * 4, True), (1, [28, 5, 5] + 20 * [2], False)]:
        samples = {i: rng.normal(0, 1 if i else first, size) for i, size in enumerate(sizes)}
        assert (Family(samples, None).variance_p < 0.01) == warns


def test_the_record_rule_is_a_one_sided_t_test():
    losses = np.array([2.91, 2.912, 2.909])
    mean, std, error = losses.mean(), losses.std(ddof=1), losses.std(ddof=1) / 3**0.5
    t, bound = (mean - 2.92) / error, mean + stats.t.ppf(0.95, 2) * error
    assert record_test(losses, 2.92) == pytest.approx(dict(
        n=3, mean=mean, std=std, t=t, p=stats.t.cdf(t, 2), record=True, upper_bound=bound))
    for few in ([], [2.8], [2.8, 2.8]):
        undefined = dict(t=None, p=None, upper_bound=None, record=False)
        assert undefined.items() <= record_test(np.array(few), 2.92).items()


@pytest.mark.parametrize("noise, limit", [(1e-3, (0.99, 1)), (5.0, (0.5, 0.95)), (90.0, (0, 0.6))])
def test_the_rank_correlation_is_scipy_s_and_its_limit_falls_with_the_runs_noise(noise, limit):
    rng, names = np.random.default_rng(0), [f"c{i}" for i in range(20)]
    small, large = (Family({name: i + noise * rng.normal(size=2) for i, name in enumerate(names)}, "c0")
                    for _ in range(2))
    ranking = rank_alike(small, large)
    means = [[family.samples[name].mean() for name in ranking.names] for family in (small, large)]
    assert (ranking.rho, ranking.p) == pytest.approx(tuple(stats.spearmanr(*means)))
    assert ranking.low < ranking.rho < ranking.high + 1e-9 and limit[0] <= ranking.limit <= limit[1]
    with pytest.raises(ValueError, match="4 common configurations"):
        rank_alike(small, Family({name: large.samples[name] for name in names[:3]}, "c0"))


@pytest.mark.parametrize("effect, runs", [(0.5, 64), (0.8, 26), (1.0, 17), (100.0, 2)])
def test_runs_needed_are_as_in_cohen_s_tables(effect, runs):
    assert runs_needed(effect, 0.05) == runs
