"""What follows from the runs: time to the target, differences from the baseline, tests.

Losses are in nats a token, times in seconds of training. Only finished runs count; those that diverged never do.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple

import numpy as np

from logs.results import Curve, Run

try:
    from scipy import optimize, stats
except ImportError:  # then there are no tests, and the rest goes without
    stats = None

LEVEL = 0.05  # of a family of comparisons; intervals cover 1 - LEVEL
RECORD_LEVEL = 0.01  # the speedrun's, of its claim that the mean is below the target
POWER = 0.8


def deviation(sample: np.ndarray) -> float | None:
    """The sample standard deviation; None of fewer than two numbers."""
    return float(np.std(sample, ddof=1) if np.ptp(sample) else 0) if len(sample) > 1 else None


class Crossing(NamedTuple):
    """Where a curve first comes down to the target."""

    step: float
    seconds: float
    continued: bool  # the curve ends above the target and was continued


def find_crossing(curve: Curve, target: float, slopes: tuple[float, float] | None) -> Crossing | None:
    """Interpolate linearly between the first validation at or below the target and the one before it.

    A curve that ends above the target is continued at the slopes (nats a step, nats a second); None without any.
    """
    below = np.flatnonzero(curve.losses <= target)
    if len(below):
        i, before = below[0], max(below[0] - 1, 0)
        part = (curve.losses[before] - target) / (curve.losses[before] - curve.losses[i]) if i else 0
        return Crossing(*(float(x[before] + part * (x[i] - x[before])) for x in (curve.steps, curve.seconds)), False)
    if slopes is None or not len(curve.steps):
        return None
    missing = target - curve.losses[-1]
    return Crossing(float(curve.steps[-1] + missing / slopes[0]), float(curve.seconds[-1] + missing / slopes[1]), True)


class Effect(NamedTuple):
    """A mean less the baseline's, the half-width of its simultaneous 95% interval, adjusted p; None: there is none."""

    difference: float | None = None
    half_width: float | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        if self.p is None:
            return "not compared" if self.difference is None else "not tested"
        return "not shown" if self.p >= LEVEL else "better" if self.difference < 0 else "worse"


@dataclass(frozen=True)
class Family:
    """All configurations against one baseline in one measure, by Dunnett's test."""

    samples: dict[str, np.ndarray]  # the baseline's as well
    baseline: str

    @property
    def freedom(self) -> int:
        return sum(len(sample) - 1 for sample in self.samples.values())

    @cached_property
    def deviation(self) -> float | None:
        """The pooled standard deviation within configurations; None if no runs differ by more than rounding does."""
        squares = sum(np.var(sample) * len(sample) for sample in self.samples.values())
        largest = max((abs(sample).max() for sample in self.samples.values()), default=0)
        return math.sqrt(squares / self.freedom) if squares > (1e-12 * largest) ** 2 else None

    @cached_property
    def effects(self) -> dict[str, Effect]:
        """{name: effect}, of all but the baseline; without tests if no runs differ or scipy is not installed."""
        others = {name: sample for name, sample in self.samples.items() if name != self.baseline}
        if not others or self.baseline not in self.samples:
            return defaultdict(Effect)
        control, sizes = self.samples[self.baseline], np.array([len(sample) for sample in others.values()])
        columns = [np.array([sample.mean() for sample in others.values()]) - control.mean()]
        if stats and self.deviation:
            errors = self.deviation * np.sqrt(1 / sizes + 1 / len(control))
            columns.append(critical_value(sizes, len(control), self.freedom) * errors)
            columns.append(stats.dunnett(*others.values(), control=control, rng=np.random.default_rng(0)).pvalue.clip(0, 1))
        return defaultdict(Effect, zip(others, (Effect(*row) for row in np.transpose(columns).tolist())))

    @property
    def variance_p(self) -> float | None:
        """p of Brown and Forsythe's test that the variances are equal; None if it cannot be made.

        Configurations of two runs are left out: both runs are as far from their median, so the test sees no chance in
        how far, and would warn six times as often as it should.
        """
        samples = [sample for sample in self.samples.values() if len(sample) > 2]
        return float(stats.levene(*samples, center="median").pvalue) if stats and len(samples) > 1 else None


def critical_value(sizes: np.ndarray, baseline_size: int, freedom: int) -> float:
    """The statistic at which Dunnett's test of samples of these sizes has p = LEVEL.

    scipy's own intervals minimise a noisy function instead, and were seen to miss the level by 6% of it.
    """
    roots, ones = 1 / np.sqrt(baseline_size / sizes + 1), np.ones(len(sizes))
    law = stats.multivariate_t(shape=np.outer(roots, roots) + np.diag(1 - roots**2), df=freedom, seed=0)
    alone, bonferroni = (stats.t.isf(LEVEL / 2 / n, freedom) for n in (1, len(sizes)))

    def excess(edge: float) -> float:
        return 1 - LEVEL - law.cdf(edge * ones, lower_limit=-edge * ones)

    return optimize.brentq(excess, 0.99 * alone, 1.01 * bonferroni, rtol=1e-5)


def record_test(losses: np.ndarray, target: float) -> dict[str, Any]:
    """The record rule: is the mean final loss below the target, by a one-sided t-test? None where not defined."""
    t = p = bound = None
    if stats and deviation(losses):
        test = stats.ttest_1samp(losses, target, alternative="less")
        t, p, bound = float(test.statistic), float(test.pvalue), float(test.confidence_interval(1 - LEVEL).high)
    mean = float(losses.mean()) if len(losses) else None
    record = p is not None and p < RECORD_LEVEL
    return dict(n=len(losses), mean=mean, std=deviation(losses), t=t, p=p, upper_bound=bound, record=record)


def runs_needed(effect: float, level: float) -> int:
    """The fewest runs of each of two configurations whose two-sided t-test at `level` has power POWER.

    `effect` is the difference in standard deviations.
    """
    runs = max(2, int(2 * ((stats.norm.isf(level / 2) + stats.norm.isf(1 - POWER)) / effect) ** 2))  # at infinite freedom
    while stats.nct.cdf(stats.t.isf(level / 2, 2 * runs - 2), 2 * runs - 2, effect * math.sqrt(runs / 2)) > 1 - POWER:
        runs += 1
    return runs


def stack(runs: Sequence[Run]) -> Curve:
    """The validations that all runs share: steps (S), losses and seconds (runs, S)."""
    steps = reduce(np.intersect1d, (run.curve.steps for run in runs)) if runs else np.empty(0)
    shared = [[column[np.isin(run.curve.steps, steps)] for column in run.curve] for run in runs]
    return Curve(steps, *(np.array([columns[i] for columns in shared]).reshape(len(runs), len(steps)) for i in (1, 2)))


class Comparison:
    """All configurations against the baseline, for one target. Raises ValueError if there is no such baseline."""

    def __init__(self, runs: dict[str, list[Run]], baseline: str, target: float):
        if baseline not in runs:
            raise ValueError(f"--baseline {baseline}: no such configuration; there are {', '.join(runs)}")
        self.runs, self.baseline, self.target = runs, baseline, target
        self.finished = {name: [run for run in group if run.finished] for name, group in runs.items()}
        self.stacks = {name: stack(group) for name, group in self.finished.items()}
        # The mean curves: losses averaged step by step, times averaged step by step.
        self.curves = {n: Curve(s.steps, *(x.sum(axis=0) / max(len(x), 1) for x in s[1:])) for n, s in self.stacks.items()}
        steps, losses, seconds = (x[-1] - x[-2] if len(x) > 1 else 0 for x in self.curves[baseline])
        slopes = (losses / steps, losses / seconds) if losses < 0 < seconds else None  # of continued curves
        self.crossings = {name: find_crossing(curve, target, slopes) for name, curve in self.curves.items()}
        self.run_crossings = {n: [find_crossing(r.curve, target, slopes) for r in g] for n, g in self.finished.items()}
        final = {name: np.array([run.curve.losses[-1] for run in group]) for name, group in self.finished.items()}
        self.final_losses = final
        # Final losses compare between runs of one length, each run's own time to the target between all.
        alike = {n: x for n, x in final.items() if len(x) and runs[n][0].num_iterations == runs[baseline][0].num_iterations}
        times = {n: np.array([c.seconds for c in found]) for n, found in self.run_crossings.items() if found and all(found)}
        self.loss, self.time = Family(alike, baseline), Family(times, baseline)

    def reached(self, name: str) -> Crossing | None:
        """The mean curve's crossing, if it was not continued."""
        crossing = self.crossings[name]
        return None if crossing is None or crossing.continued else crossing
