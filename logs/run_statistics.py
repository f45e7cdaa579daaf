"""Compute from the finished runs: time to the target (seconds), differences from the baseline, tests."""

import math
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special, stats

from logs.results import Curve, Result, known_keys, validate_alike

LEVEL = 0.05  # of a family of comparisons; intervals cover 1 - LEVEL
OUTLIER_LEVEL = 0.01
RECORD_LEVEL = 0.01  # the speedrun's, for the claim that the mean is below the target
POWER = 0.8
PUBLISHED_TARGET = 2.92  # nats per token
MAX_EXTRAPOLATION = 0.15  # of a run's steps; a time that lies further away is neither shown nor tested
MIN_SLOPE = 0.01  # of a run's steps: learning rates fall to 0, so the loss hardly changes over fewer


def mean(sample: np.ndarray) -> float | None:
    return float(np.mean(sample)) if len(sample) else None


def deviation(sample: np.ndarray) -> float | None:
    """Return the sample standard deviation, or None for fewer than two numbers."""
    return float(np.std(sample, ddof=1) if np.ptp(sample) else 0) if len(sample) > 1 else None


class Crossing(NamedTuple):
    """Where a curve first reaches the target; without a validation, None."""
    step: float | None
    seconds: float | None
    mark: str = " "  # "*": extrapolated, as the curve ends above the target; ">": further away than its end

    @property
    def reached(self) -> "Crossing":
        """This crossing if the curve itself reaches the target, else an empty one."""
        return self if self.mark == " " else Crossing(None, None)


def final_slopes(curve: Curve) -> tuple[float, float] | None:
    """Return a curve's nats per step and nats per second over its last interval of at least MIN_SLOPE of its steps.

    Return None if the loss does not fall there.
    """
    before = np.flatnonzero(curve.steps <= (1 - MIN_SLOPE) * curve.steps.max(initial=0))
    steps, losses, seconds = (x[-1] - x[before[-1]] if len(before) else 0 for x in curve)
    return (losses / steps, losses / seconds) if losses < 0 < seconds else None


def find_crossing(curve: Curve, target: float, slopes: tuple[float, float] | None) -> Crossing:
    """Interpolate between validations. Extrapolate a curve that ends above the target with `slopes` (nats per step,
    nats per second) by at most MAX_EXTRAPOLATION."""
    if not len(curve.steps):
        return Crossing(None, None)
    below = np.flatnonzero(curve.losses <= target)
    if len(below):
        ends = [below[0], max(below[0] - 1, 0)]  # np.interp needs ascending losses
        step, seconds = (float(np.interp(target, curve.losses[ends], x[ends])) for x in (curve.steps, curve.seconds))
        return Crossing(step, seconds)
    step, seconds, missing = float(curve.steps[-1]), float(curve.seconds[-1]), float(target - curve.losses[-1])
    if slopes is None or missing / slopes[0] > MAX_EXTRAPOLATION * step:
        return Crossing(step, seconds, ">")
    return Crossing(step + missing / slopes[0], seconds + missing / slopes[1], "*")


class Effect(NamedTuple):
    """A mean minus the baseline's, the half-width of its simultaneous 95% interval, and its adjusted p."""
    difference: float | None = None
    half_width: float | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        if self.p is None:
            return "not compared" if self.difference is None else "not tested"
        return "undecided" if self.p >= LEVEL else "better" if self.difference < 0 else "worse"


class Family:
    """Compare all configurations with the baseline in one measure by Dunnett's test. `deviation`, pooled within
    configurations, is None if no two runs of one configuration differ; then there are no tests.
    """

    def __init__(self, samples: dict[str, np.ndarray], baseline: str):
        self.samples, self.dof = samples, sum(len(sample) - 1 for sample in samples.values())
        squares = sum(np.var(sample) * len(sample) for sample in samples.values())
        largest = max((abs(sample).max() for sample in samples.values()), default=0)
        self.deviation = math.sqrt(squares / self.dof) if squares > (1e-12 * largest) ** 2 else None
        others = {name: sample for name, sample in samples.items() if name != baseline and baseline in samples}
        columns = [[sample.mean() - samples[baseline].mean() for sample in others.values()]]
        if others and self.deviation:
            sizes, control = np.array([len(sample) for sample in others.values()]), samples[baseline]
            errors = self.deviation * np.sqrt(1 / sizes + 1 / len(control))
            p_values = dunnett_p(np.abs(columns[0]) / errors, sizes, len(control), self.dof)
            columns += [critical_value(sizes, len(control), self.dof) * errors, p_values]
        self.effects = {name: Effect(*row) for name, row in zip(others, np.transpose(columns).tolist())}
        # Brown-Forsythe test. Two runs are always equally far from their median, so the test would warn too often.
        many = [sample for sample in samples.values() if len(sample) > 2]
        is_tested = len(many) > 1 and self.deviation
        self.variance_p = float(stats.levene(*many, center="median").pvalue) if is_tested else 1.0

    def outliers(self) -> list[tuple[str, int, float]]:
        """Return the configuration, index and p (Bonferroni's, over all runs) of runs far from two or more others.

        A run's residual is tested against the deviation of all other runs (externally studentized, Student's t).
        """
        found, total = [], sum(map(len, self.samples.values()))
        for name, sample in self.samples.items():
            if len(sample) > 2 and self.deviation and self.dof > 1:
                shares = (sample - sample.mean()) ** 2 / (1 - 1 / len(sample)) / self.deviation**2 / self.dof
                t = np.sqrt(shares * (self.dof - 1) / np.maximum(1 - shares, 1e-12))
                p = total * 2 * stats.t.sf(t, self.dof - 1)
                found += [(name, int(i), float(p[i])) for i in np.flatnonzero(p < OUTLIER_LEVEL)]
        return found


def dunnett_p(statistics: np.ndarray, sizes: np.ndarray, baseline_size: int, dof: int) -> np.ndarray:
    """Return for each |t| the probability that the largest of all comparisons exceeds it if nothing differs.

    Given the baseline's mean z and the pooled deviation s, the comparisons are independent (Dunnett 1955,
    https://doi.org/10.1080/01621459.1955.10501294): this integrates over z and s.
    """
    z = np.linspace(0, 8, 161)[:, None]  # the integrand is symmetric
    z_weights = np.exp(-z[:, 0] ** 2 / 2) * np.where(z[:, 0] == 0, 0.5, 1)
    nodes, s_weights = np.polynomial.legendre.leggauss(100)
    s = np.sqrt(special.chdtri(dof, (1 - nodes) / 2) / dof)
    t, inside = np.reshape(statistics, (-1, 1, 1)), 1.0  # (comparisons, z, s)
    for size, count in zip(*np.unique(sizes, return_counts=True)):
        shared, own = np.sqrt(size / (size + baseline_size)), np.sqrt(baseline_size / (size + baseline_size))
        inside *= (special.ndtr((t * s - shared * z) / own) - special.ndtr((-t * s - shared * z) / own)) ** count
    return np.clip(1 - z_weights @ inside @ s_weights / (2 * z_weights.sum()), 0, 1)


def critical_value(sizes: np.ndarray, baseline_size: int, dof: int) -> float:
    """Return the statistic at which Dunnett's p equals LEVEL; it lies between Student's and Bonferroni's."""
    excess = (lambda t: dunnett_p([t], sizes, baseline_size, dof)[0] - LEVEL)
    return optimize.brentq(excess, 1, 1.01 * stats.t.isf(LEVEL / 2 / len(sizes), dof), rtol=1e-5)


def record_test(losses: np.ndarray, target: float) -> dict[str, Any]:
    """Apply the record rule: is the mean final loss below the target (one-sided t-test)? None where undefined."""
    t = p = bound = None
    if deviation(losses):
        test = stats.ttest_1samp(losses, target, alternative="less")
        t, p, bound = float(test.statistic), float(test.pvalue), float(test.confidence_interval(1 - LEVEL).high)
    record = p is not None and p < RECORD_LEVEL
    return dict(n=len(losses), mean=mean(losses), std=deviation(losses), t=t, p=p, upper_bound=bound, record=record)


def runs_needed(effect: float, level: float) -> int:
    """Return the fewest runs per configuration that show a difference of `effect` deviations with power POWER."""
    runs = max(2, int(2 * ((stats.norm.isf(level / 2) + stats.norm.isf(1 - POWER)) / effect) ** 2))
    while stats.nct.cdf(stats.t.isf(level / 2, 2 * runs - 2), 2 * runs - 2, effect * math.sqrt(runs / 2)) > 1 - POWER:
        runs += 1
    return runs


class Ranking(NamedTuple):
    """How alike two families order the configurations that both have."""
    names: list[str]
    rho: float  # Spearman's, of the mean losses
    low: float  # 95% interval
    high: float
    p: float
    limit: float  # the correlation that noise allows: the root of both reliabilities' product


def reliability(family: Family, names: list[str]) -> float:
    """Return the part of the variance of the configurations' means that their runs' deviation does not explain."""
    noise = np.mean([family.deviation**2 / len(family.samples[name]) for name in names])
    return max(0.0, 1 - noise / np.var([family.samples[name].mean() for name in names], ddof=1))


def rank_alike(small: Family, large: Family) -> Ranking:
    """Compare the order of the configurations in two families. Raises ValueError without repeats, names or an order.

    A pair of noisy means is one observation, so the interval (Bonett and Wright 2000,
    https://doi.org/10.1007/BF02294183) includes the noise of both.
    """
    names = [name for name in small.samples if name in large.samples]
    if len(names) < 4 or not small.deviation or not large.deviation:
        raise ValueError("--against: a correlation needs repeated runs and 4 common configurations of one length and "
                         f"validation, not {len(names)}")
    x, y = (stats.rankdata([family.samples[name].mean() for name in names]) for family in (small, large))
    if not (np.ptp(x) and np.ptp(y)):
        raise ValueError("--against: all mean losses are equal; name configurations that differ")
    n, rho = len(names), np.corrcoef(x, y)[0, 1]
    p = stats.permutation_test((x,), lambda x: x @ y, permutation_type="pairings", random_state=0).pvalue
    half = stats.norm.isf(LEVEL / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    largest = 1 - 6 / (n**3 - n)  # half a step below 1, whose transform is infinite
    middle = math.atanh(np.clip(rho, -largest, largest))
    limit = math.sqrt(reliability(small, names) * reliability(large, names))
    low, high = min(rho, math.tanh(middle - half)), max(rho, math.tanh(middle + half))
    return Ranking(names, float(rho), float(low), float(high), float(p), limit)


def mean_curve(runs: list[Result]) -> Curve:
    """Average losses and times over the validations that all runs share; return an empty curve without runs."""
    if not runs:
        return Curve(*np.empty((3, 0)))
    steps = reduce(np.intersect1d, (run.curve.steps for run in runs))
    shared = [[column[np.isin(run.curve.steps, steps)] for column in run.curve] for run in runs]
    return Curve(*np.mean(shared, axis=0))


class Comparison:
    """Compare all configurations with the baseline. Raises ValueError if it is not among them.

    By name: `runs` are all, `finished` those with an end; `alike` names those validated like the baseline, and
    `loss.samples` and `time.samples` those tested. `keys` come from the header or the config.
    """

    def __init__(self, runs: dict[str, list[Result]], baseline: str, target: float | None):
        if baseline not in runs:
            raise ValueError(f"--baseline {baseline}: no such configuration; use one of {', '.join(runs)}")
        known = runs[baseline][0].header.configuration.get("target_loss")
        target = target or (known if isinstance(known, (int, float)) and known > 0 else PUBLISHED_TARGET)
        self.runs, self.baseline, self.target = runs, baseline, target
        self.keys = {name: known_keys(name, group[0]) for name, group in runs.items()}
        self.finished = {name: [run for run in group if run.finished] for name, group in runs.items()}
        self.losses = {n: np.array([run.curve.losses[-1] for run in group]) for n, group in self.finished.items()}
        self.curves = {name: mean_curve(group) for name, group in self.finished.items()}
        first = runs[baseline][0]
        is_cut = any(run.end < run.num_iterations for group in runs.values() for run in group)  # by --at
        slopes = None if is_cut else final_slopes(self.curves[baseline])
        self.crossings = {name: find_crossing(curve, target, slopes) for name, curve in self.curves.items()}
        self.own_crossings = {n: [find_crossing(r.curve, target, slopes) for r in g] for n, g in self.finished.items()}
        # Losses are comparable between runs of one length; times to the target between all that validate alike.
        self.alike = [name for name, group in runs.items() if validate_alike(group[0], first)]
        finished = [name for name in self.alike if self.finished[name]]
        self.loss = Family({name: self.losses[name] for name in finished
                            if runs[name][0].num_iterations == first.num_iterations}, baseline)
        times = {name: np.array([crossing.seconds for crossing in self.own_crossings[name]]) for name in finished
                 if all(crossing.mark != ">" for crossing in self.own_crossings[name])}
        self.time = Family(times, baseline)

    def effects(self, name: str) -> tuple[Effect, Effect]:
        """Return the effects of a configuration on final loss and on time to the target."""
        return self.loss.effects.get(name, Effect()), self.time.effects.get(name, Effect())
