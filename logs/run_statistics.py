"""Compute from the finished runs: time to the target (seconds), differences from the baseline, tests."""

import math
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from logs.results import Curve, Result

try:
    from scipy import optimize, stats
except ImportError:  # without scipy there are no tests
    stats = None

LEVEL = 0.05  # of a family of comparisons; intervals cover 1 - LEVEL
RECORD_LEVEL = 0.01  # the speedrun's, for the claim that the mean is below the target
POWER = 0.8


def deviation(sample: np.ndarray) -> float | None:
    """Return the sample standard deviation, or None for fewer than two numbers."""
    return float(np.std(sample, ddof=1) if np.ptp(sample) else 0) if len(sample) > 1 else None


class Crossing(NamedTuple):
    """Where a curve first reaches the target."""
    step: float
    seconds: float
    extrapolated: bool  # the curve ends above the target


def find_crossing(curve: Curve, target: float, slopes: tuple[float, float] | None) -> Crossing | None:
    """Interpolate between validations. Extrapolate a curve that ends above the target with `slopes` (nats per step,
    nats per second), or return None without slopes."""
    below = np.flatnonzero(curve.losses <= target)
    if len(below):
        ends = [below[0], max(below[0] - 1, 0)]  # np.interp needs ascending losses
        step, seconds = (float(np.interp(target, curve.losses[ends], x[ends])) for x in (curve.steps, curve.seconds))
        return Crossing(step, seconds, False)
    if slopes is None or not len(curve.steps):
        return None
    missing = target - curve.losses[-1]
    return Crossing(float(curve.steps[-1] + missing / slopes[0]), float(curve.seconds[-1] + missing / slopes[1]), True)


class Effect(NamedTuple):
    """A mean minus the baseline's, the half-width of its simultaneous 95% interval, and its adjusted p."""
    difference: float | None = None
    half_width: float | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        if self.p is None:
            return "not compared" if self.difference is None else "not tested"
        return "not significant" if self.p >= LEVEL else "better" if self.difference < 0 else "worse"


class Family:
    """Compare all configurations with the baseline in one measure by Dunnett's test. `deviation`, pooled within
    configurations, is None if no two runs of one configuration differ; then there are no tests."""

    def __init__(self, samples: dict[str, np.ndarray], baseline: str):
        self.samples = samples
        self.dof = sum(len(sample) - 1 for sample in samples.values())
        squares = sum(np.var(sample) * len(sample) for sample in samples.values())
        largest = max((abs(sample).max() for sample in samples.values()), default=0)
        self.deviation = math.sqrt(squares / self.dof) if squares > (1e-12 * largest) ** 2 else None
        others = {name: sample for name, sample in samples.items() if name != baseline and baseline in samples}
        columns = [[sample.mean() - samples[baseline].mean() for sample in others.values()]]
        if others and stats and self.deviation:
            sizes, control = np.array([len(sample) for sample in others.values()]), samples[baseline]
            errors = self.deviation * np.sqrt(1 / sizes + 1 / len(control))
            p_values = stats.dunnett(*others.values(), control=control, rng=np.random.default_rng(0)).pvalue
            columns += [critical_value(sizes, len(control), self.dof) * errors, p_values.clip(0, 1)]
        self.effects = {name: Effect(*row) for name, row in zip(others, np.transpose(columns).tolist())}
        # Brown-Forsythe test. Two runs are always equally far from their median, so the test would warn too often.
        many = [sample for sample in samples.values() if len(sample) > 2]
        tested = stats and len(many) > 1 and self.deviation
        self.variance_p = float(stats.levene(*many, center="median").pvalue) if tested else 1.0


def critical_value(sizes: np.ndarray, baseline_size: int, dof: int) -> float:
    """Return the statistic at which Dunnett's p equals LEVEL. SciPy's own search fails for some small samples."""
    roots, ones = 1 / np.sqrt(baseline_size / sizes + 1), np.ones(len(sizes))
    law = stats.multivariate_t(shape=np.outer(roots, roots) + np.diag(1 - roots**2), df=dof, seed=0)
    excess = (lambda edge: law.cdf(edge * ones, lower_limit=-edge * ones, maxpts=5000) - 1 + LEVEL)
    return optimize.brentq(excess, 1, 1.01 * stats.t.isf(LEVEL / 2 / len(sizes), dof), rtol=1e-5)  # to Bonferroni's


def record_test(losses: np.ndarray, target: float) -> dict[str, Any]:
    """Apply the record rule: is the mean final loss below the target (one-sided t-test)? None where undefined."""
    t = p = bound = None
    if stats and deviation(losses):
        test = stats.ttest_1samp(losses, target, alternative="less")
        t, p, bound = float(test.statistic), float(test.pvalue), float(test.confidence_interval(1 - LEVEL).high)
    mean, record = float(losses.mean()) if len(losses) else None, p is not None and p < RECORD_LEVEL
    return dict(n=len(losses), mean=mean, std=deviation(losses), t=t, p=p, upper_bound=bound, record=record)


def runs_needed(effect: float, level: float) -> int:
    """Return the fewest runs per configuration that show a difference of `effect` deviations with power POWER."""
    runs = max(2, int(2 * ((stats.norm.isf(level / 2) + stats.norm.isf(1 - POWER)) / effect) ** 2))
    while stats.nct.cdf(stats.t.isf(level / 2, 2 * runs - 2), 2 * runs - 2, effect * math.sqrt(runs / 2)) > 1 - POWER:
        runs += 1
    return runs


def mean_curve(runs: list[Result]) -> Curve:
    """Average losses and times over the validations that all runs share; return an empty curve without runs."""
    if not runs:
        return Curve(*np.empty((3, 0)))
    steps = reduce(np.intersect1d, (run.curve.steps for run in runs))
    shared = [[column[np.isin(run.curve.steps, steps)] for column in run.curve] for run in runs]
    return Curve(*np.mean(shared, axis=0))


class Comparison:
    """Compare all configurations with the baseline. Raises ValueError if there is no such baseline."""

    def __init__(self, runs: dict[str, list[Result]], baseline: str, target: float):
        if baseline not in runs:
            raise ValueError(f"--baseline {baseline}: no such configuration; use one of {', '.join(runs)}")
        self.runs, self.baseline, self.target = runs, baseline, target
        self.finished = {name: [run for run in group if run.finished] for name, group in runs.items()}
        self.losses = {n: np.array([run.curve.losses[-1] for run in group]) for n, group in self.finished.items()}
        self.curves = {name: mean_curve(group) for name, group in self.finished.items()}
        steps, losses, seconds = (x[-1] - x[-2] if len(x) > 1 else 0 for x in self.curves[baseline])
        slopes = (losses / steps, losses / seconds) if losses < 0 < seconds else None
        self.crossings = {name: find_crossing(curve, target, slopes) for name, curve in self.curves.items()}
        self.own_crossings = {n: [find_crossing(r.curve, target, slopes) for r in g] for n, g in self.finished.items()}
        # Final losses are comparable between runs of one length; times to the target between all runs.
        length = runs[baseline][0].num_iterations
        alike = {name: x for name, x in self.losses.items() if len(x) and runs[name][0].num_iterations == length}
        timed = {name: found for name, found in self.own_crossings.items() if found and all(found)}
        self.loss = Family(alike, baseline)
        self.time = Family({name: np.array([c.seconds for c in found]) for name, found in timed.items()}, baseline)

    def effects(self, name: str) -> tuple[Effect, Effect]:
        """Return the effects of a configuration on final loss and on time to the target."""
        return self.loss.effects.get(name, Effect()), self.time.effects.get(name, Effect())
