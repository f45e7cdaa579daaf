"""Compare configurations by the logs of their runs: is one better, is it real, does it pay?

    python logs/compare.py logs/baseline logs/add_2                     tables and a verdict
    python logs/compare.py logs --plot figure.png --from 5000           a figure of the last steps
    python logs/compare.py logs --json                                  the same for programs; also --csv, --markdown

A PATH is a log, or a folder of logs (*.txt, *.log: the runs of one configuration), or a folder of such folders.
The log may be of this repository or a published one of the speedrun. Results are lines of exactly the forms

    step:125/5960 val_loss:4.325680 train_time:27923ms step_avg:223.38ms
    step:126/5960 train_time:28146ms step_avg:223.38ms

behind the header (program text and environment). Needs numpy; tests and intervals need scipy and figures matplotlib:
pip install -r logs/requirements.txt. What is wrong with a log is said in a line on standard error; exit status 2 where
nothing can be shown.
"""

import argparse
import codecs
import csv
import importlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np

TARGET = 2.92
LEVEL = 0.05  # of every test; intervals cover 1 - LEVEL
POWER = 0.8
MOST_RUNS = 100_000  # where the search for --power gives up
INSTALL = "pip install -r logs/requirements.txt"

# -----------------------------------------------------------------------------
# Reading

RESULT = re.compile(
    r"^step:(\d{1,12})/(\d{1,12})(?: val_loss:(\d{1,12}\.\d{1,12}|-?nan|-?inf))? train_time:(\d{1,15})ms step_avg:(\d+\.\d+|nan|inf)ms$",
    re.MULTILINE | re.ASCII,
)
RULE = re.compile(r"^={100}$", re.MULTILINE)
ENVIRONMENT = re.compile(r"\s*Running (Python|PyTorch|pytorch) ")


class Curve(NamedTuple):
    """Validations in the order of their steps: three arrays of one length."""

    steps: np.ndarray
    losses: np.ndarray
    seconds: np.ndarray  # training time


class Line(NamedTuple):
    """A result line of a log; `val_loss` is None in the line of a training step."""

    step: int
    num_iterations: int
    val_loss: float | None
    train_time_ms: int
    step_avg_ms: float

    @property
    def order(self) -> tuple[int, bool]:
        """A step's validation comes after its training."""
        return self.step, self.val_loss is not None


@dataclass(frozen=True)
class Run:
    """What a log says, its last line included whether or not that is the run's end."""

    path: Path
    last: Line
    validations: list[Line]
    went_back_to: int | None  # the first step that stands in the log a second time

    @cached_property
    def curve(self) -> Curve:
        steps, losses, ms = (np.array([getattr(line, name) for line in self.validations]) for name in ("step", "val_loss", "train_time_ms"))
        return Curve(steps.astype(int), losses.astype(float), ms / 1000)

    @property
    def num_iterations(self) -> int:
        return self.last.num_iterations

    @property
    def diverged_at(self) -> int | None:
        """The first step with a loss that is no finite number."""
        return next((line.step for line in self.validations if not math.isfinite(line.val_loss)), None)

    @property
    def finished(self) -> bool:
        return bool(self.validations) and self.validations[-1].step == self.num_iterations


def decode(data: bytes) -> str:
    """A log's text. Bytes that are no UTF-8 are replaced; NULs and carriage returns end a line: they can break one, never join two."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in data[:200]
    return data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace").replace("\r", "\n").replace("\0", "\n")


def without_header(text: str) -> str:
    """What follows the header: behind the rule that ends the last part with the environment, else behind the last rule.

    The program text comes first and can hold rules and result lines of its own.
    """
    parts = RULE.split(text)
    environments = [i for i, part in enumerate(parts) if ENVIRONMENT.match(part)]
    return "\n".join(parts[environments[-1] + 1 :] if environments else parts[-1:])


def read_lines(text: str) -> tuple[list[Line], int | None]:
    """A log's result lines, and the first step that stands there twice (None: no step does).

    A run that continues from an earlier step writes some steps again; what it wrote of them before gives way.
    """
    lines: list[Line] = []
    went_back_to = None
    for step, total, loss, ms, avg in RESULT.findall(without_header(text)):
        line = Line(int(step), int(total), float(loss) if loss else None, int(ms), float(avg))
        while lines and lines[-1].order >= line.order:
            lines.pop()
            went_back_to = line.step if went_back_to is None else min(went_back_to, line.step)
        lines.append(line)
    return lines, went_back_to


def read_run(path: Path) -> Run:
    """The run of a log. ValueError: it holds no results, or some that contradict each other."""
    lines, went_back_to = read_lines(decode(path.read_bytes()))
    if not lines:
        raise ValueError(f"{path}: no results in it (lines like step:125/5960 val_loss:4.325680 train_time:27923ms step_avg:223.38ms)")
    totals = sorted({line.num_iterations for line in lines})
    if len(totals) > 1:
        raise ValueError(f"{path}: its lines are of runs of {' and '.join(map(str, totals))} steps; give every run a log of its own")
    if lines[-1].step > totals[0]:
        raise ValueError(f"{path}: step {lines[-1].step} of {totals[0]}; the log is damaged")
    validations = [line for line in lines if line.val_loss is not None]
    for before, after in zip(validations, validations[1:]):
        if after.train_time_ms < before.train_time_ms:
            raise ValueError(f"{path}: train_time falls between steps {before.step} and {after.step}, so no time in it can be compared")
    return Run(path, lines[-1], validations, went_back_to)


def natural(path: Path) -> list:
    """A key that sorts add_2 before add_15."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", path.name))]


def is_log(path: Path) -> bool:
    """Whether a file in a folder is taken for a log: by its name, as checkpoints (.ckpt) and figures stand there too."""
    return path.suffix in {".txt", ".log"} and path.name != "requirements.txt" and path.name[0] != "." and path.is_file()


def find_logs(path: Path) -> dict[Path, list[Path]]:
    """{log or folder: logs of that configuration}. ValueError: there is no such path."""
    if path.is_file():
        return {path: [path]}
    if not path.is_dir():
        raise ValueError(f"{path}: no such log or folder")
    folders = [path, *sorted((p for p in path.iterdir() if p.is_dir() and p.name[0] != "."), key=natural)]
    return {folder: logs for folder in folders if (logs := sorted(filter(is_log, folder.iterdir()), key=natural))}


def shortest_names(paths: list[Path]) -> list[str]:
    """For each path as much of its end as tells it from the others.

    A log's name goes without its suffix, and with its folder where it is a number: baseline/0.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]
    bare = [path.with_suffix("") if path.is_file() else path for path in absolute]
    times = Counter(bare)
    parts = [(short if times[short] == 1 else full).parts for short, full in zip(bare, absolute)]
    depths = [2 if path.is_file() and path.stem.isdecimal() else 1 for path in paths]
    while True:
        names = ["/".join(part[-depth:]) for part, depth in zip(parts, depths)]
        times = Counter(names)
        longer = [i for i, name in enumerate(names) if times[name] > 1 and depths[i] < len(parts[i])]
        if not longer:
            return ["".join(c if c.isprintable() else "?" for c in name) for name in names]
        for i in longer:
            depths[i] += 1


# -----------------------------------------------------------------------------
# Configurations


@dataclass(frozen=True)
class Stack:
    """Runs at the validations that all of them have: `steps` (S), `losses` and `seconds` (runs, S)."""

    steps: np.ndarray
    losses: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Stack":
        if not runs:
            return cls(np.empty(0, int), np.empty((0, 0)), np.empty((0, 0)))
        steps = reduce(np.intersect1d, (run.curve.steps for run in runs))
        shared = [np.isin(run.curve.steps, steps) for run in runs]
        return cls(steps, *(np.stack([getattr(run.curve, name)[at] for run, at in zip(runs, shared)]) for name in ("losses", "seconds")))

    def mean(self) -> Curve:
        """The mean curve: losses averaged step by step, times averaged step by step."""
        if not len(self.steps):
            return Curve(self.steps, np.empty(0), np.empty(0))
        return Curve(self.steps, self.losses.mean(axis=0), self.seconds.mean(axis=0))

    def without(self, run: int) -> "Stack":
        return Stack(self.steps, np.delete(self.losses, run, axis=0), np.delete(self.seconds, run, axis=0))


class Crossing(NamedTuple):
    """Where a curve first comes down to the target."""

    step: float
    seconds: float


def crossing(curve: Curve, target: float) -> Crossing | None:
    """Linear interpolation between the first validation at or below the target and the one before; None: there is none."""
    below = np.flatnonzero(curve.losses <= target)
    if not len(below):
        return None
    i = below[0]
    if i == 0:
        return Crossing(float(curve.steps[0]), float(curve.seconds[0]))
    part = (curve.losses[i - 1] - target) / (curve.losses[i - 1] - curve.losses[i])
    return Crossing(*(float(x[i - 1] + part * (x[i] - x[i - 1])) for x in (curve.steps, curve.seconds)))


@dataclass(frozen=True)
class Configuration:
    """The runs of one configuration, and what follows from them for one target. Losses in nats, times in seconds."""

    name: str
    runs: list[Run]
    target: float

    @cached_property
    def finished(self) -> list[Run]:
        """The runs that all numbers are of: those that ended, with finite losses only."""
        return [run for run in self.runs if run.finished and run.diverged_at is None]

    @cached_property
    def running(self) -> list[Run]:
        """The runs that have not ended: still going, or stopped."""
        return [run for run in self.runs if not run.finished and run.diverged_at is None]

    @cached_property
    def stack(self) -> Stack:
        return Stack.of(self.finished)

    @cached_property
    def curve(self) -> Curve:
        """The mean curve of the finished runs; where none has finished, of those still going."""
        return self.stack.mean() if self.finished else Stack.of([run for run in self.running if run.validations]).mean()

    def mean_loss(self, step: int) -> float | None:
        """The mean curve's loss at a step, interpolated between validations; None where it does not reach or runs have validations nearer by."""
        steps = self.curve.steps
        if not len(steps) or not steps[0] <= step <= steps[-1]:
            return None
        low, high = steps[steps <= step][-1], steps[steps >= step][0]
        return None if self.validates_between(low, high) else float(np.interp(step, steps, self.curve.losses))

    @cached_property
    def final_losses(self) -> np.ndarray:
        return np.array([run.validations[-1].val_loss for run in self.finished])

    @cached_property
    def totals(self) -> list[int]:
        """The lengths of the finished runs, each once."""
        return sorted({run.num_iterations for run in self.finished})

    @property
    def tested_losses(self) -> np.ndarray:
        """The final losses as a sample for tests; empty where runs differ in length, as theirs are no sample of one quantity."""
        return self.final_losses if len(self.totals) == 1 else np.empty(0)

    @property
    def most_validations(self) -> int:
        return max((len(run.validations) for run in self.finished), default=0)

    @property
    def shares_all(self) -> bool:
        """Whether the mean curve has every validation of every finished run."""
        return len(self.stack.steps) == self.most_validations

    def validates_between(self, low: float, high: float) -> bool:
        """Whether a finished run has a validation between these steps."""
        return any(((run.curve.steps > low) & (run.curve.steps < high)).any() for run in self.finished)

    def mean_crossing(self, curve: Curve) -> Crossing | None:
        """Where a mean curve of the shared validations crosses; None also where a run validates between the two that enclose the crossing."""
        found = crossing(curve, self.target)
        if found is None:
            return None
        i = np.searchsorted(curve.steps, found.step)
        return None if self.validates_between(curve.steps[i - 1] if i else -math.inf, curve.steps[i]) else found

    @cached_property
    def crossing(self) -> Crossing | None:
        return self.mean_crossing(self.stack.mean())

    @cached_property
    def run_crossings(self) -> list[Crossing]:
        """Of the runs that cross."""
        return [found for run in self.finished if (found := crossing(run.curve, self.target))]

    @cached_property
    def times_to_target(self) -> np.ndarray:
        """For each run its jackknife pseudo-value of the time at which the mean curve crosses.

        The times at which runs cross alone would leave out the runs that do not, which are the worst ones. The pseudo-value
        (https://en.wikipedia.org/wiki/Jackknife_resampling) of a run is what its presence makes of the mean curve's time;
        it is the run's own time where the curves are straight and parallel. Empty: without some run there is no crossing.
        """
        n = len(self.finished)
        others = [self.mean_crossing(self.stack.without(run).mean()) for run in range(n)] if n > 1 else []
        if self.crossing is None or not all(others):
            return np.empty(0)
        return np.array([n * self.crossing.seconds - (n - 1) * other.seconds for other in others])

    @property
    def step_avg_ms(self) -> float | None:
        """Step time over the whole run as the last validations state it, averaged over runs."""
        stated = [run.validations[-1].step_avg_ms for run in self.finished]
        return float(np.mean(stated)) if stated and all(map(math.isfinite, stated)) else None

    @property
    def ms_to_target(self) -> float | None:
        """Step time up to the target."""
        return 1000 * self.crossing.seconds / self.crossing.step if self.crossing and self.crossing.step else None

    def break_even_ms(self, baseline: "Configuration") -> float | None:
        """The step time at which this configuration would reach the target just when the baseline does."""
        if not (baseline.crossing and self.crossing and self.crossing.step):
            return None
        return 1000 * baseline.crossing.seconds / self.crossing.step


def read_configurations(paths: Sequence[Path], target: float) -> tuple[list[Configuration], list[str]]:
    """The configurations that have results, and a line on everything that a reader of the figures has to know.

    ValueError: a path does not exist.
    """
    groups: dict[Path, list[Path]] = {}
    problems = []
    for path in paths:
        found = find_logs(path)
        groups |= {Path(os.path.abspath(folder)): logs for folder, logs in found.items()}
        if not found:
            problems.append(f"{path}: no logs (*.txt, *.log) in this folder or in a folder in it")
    configurations = []
    for name, logs in zip(shortest_names(list(groups)), groups.values()):
        runs = []
        for log in logs:
            try:
                runs.append(read_run(log))
            except (ValueError, OSError) as error:
                problems.append(str(error))
        if runs:
            configurations.append(Configuration(name, runs, target))
    return configurations, problems + [note for c in configurations for note in describe_runs(c)]


def describe_runs(configuration: Configuration) -> list[str]:
    """What is unusual about the runs of a configuration, a line each."""
    name, finished = configuration.name, configuration.finished
    notes = []
    for run in configuration.runs:
        if run.went_back_to is not None:
            notes.append(f"{run.path}: goes back to step {run.went_back_to}; what it says of a step last counts")
        if run.diverged_at is not None:
            notes.append(f"{run.path}: validation loss is not finite at step {run.diverged_at}; left out of all figures")
    if len(configuration.totals) > 1:
        notes.append(f"{name}: {lengths(configuration)} under one name; final losses are of each run's own last step and get no test")
    if not configuration.shares_all:
        notes.append(f"{name}: runs validate at different steps; {shared_validations(configuration)}")
    for i, run in enumerate(finished):
        if any(run.validations == other.validations for other in finished[:i]):
            notes.append(f"{run.path}: the same results as another run of {name}; a copy counted as a run makes tests too sure")
    return notes


def lengths(configuration: Configuration) -> str:
    return f"runs of {' and '.join(map(str, configuration.totals))} steps"


def shared_validations(configuration: Configuration) -> str:
    """What the mean curve rests on where runs validate at different steps."""
    steps, most = configuration.stack.steps, configuration.most_validations
    extent = f", the last at step {steps[-1]}" if len(steps) else ""
    return f"its mean curve rests on the {len(steps)} validations that all share{extent}, of up to {most} a run"


def choose_baseline(configurations: Sequence[Configuration], name: str | None) -> Configuration:
    """The one of this name; with none given the one named baseline, else the first. ValueError: there is no such name."""
    by_name = {configuration.name: configuration for configuration in configurations}
    if name is None:
        return by_name.get("baseline", configurations[0])
    if name not in by_name:
        raise ValueError(f"--baseline {name}: no such configuration; there are {', '.join(by_name)}")
    return by_name[name]


# -----------------------------------------------------------------------------
# Statistics


class Welch(NamedTuple):
    """Two-sided p of a difference of means, and its 95% interval."""

    p: float
    low: float
    high: float


class TTest(NamedTuple):
    """The record rule: one-sided t-test that the mean is below the target. None where it is not defined."""

    n: int
    mean: float | None
    std: float | None
    t: float | None
    p: float | None
    upper_bound: float | None  # 95% upper confidence bound of the mean


def scipy_stats() -> ModuleType | None:
    try:
        return importlib.import_module("scipy.stats")
    except ImportError:
        return None


def deviation(sample: Sequence[float] | np.ndarray) -> float | None:
    """Sample standard deviation; None of fewer than two numbers."""
    if len(sample) < 2:
        return None
    return float(np.std(sample, ddof=1)) if np.ptp(sample) else 0.0


def varies(sample: np.ndarray) -> bool:
    """Whether numbers differ by more than the rounding of arithmetic."""
    return len(sample) > 1 and bool(np.ptp(sample) > 1e-12 * np.abs(sample).max())


def welch(sample: np.ndarray, reference: np.ndarray) -> Welch | None:
    """Welch's t-test of mean(sample) - mean(reference); None where a sample has fewer than two numbers or does not vary, or scipy is missing."""
    stats = scipy_stats()
    if stats is None or not (varies(sample) and varies(reference)):
        return None
    test = stats.ttest_ind(sample, reference, equal_var=False)
    interval = test.confidence_interval(1 - LEVEL)
    return Welch(float(test.pvalue), float(interval.low), float(interval.high))


def t_test(configuration: Configuration) -> TTest:
    """One-sided t-test of final losses against the target."""
    losses, stats = configuration.final_losses, scipy_stats()
    mean = float(losses.mean()) if len(losses) else None
    if stats is None or not varies(configuration.tested_losses):
        return TTest(len(losses), mean, deviation(losses), None, None, None)
    test = stats.ttest_1samp(losses, configuration.target, alternative="less")
    return TTest(len(losses), mean, deviation(losses), float(test.statistic), float(test.pvalue), float(test.confidence_interval(1 - LEVEL).high))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (https://en.wikipedia.org/wiki/Holm-Bonferroni_method)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def pooled_deviation(samples: Iterable[np.ndarray]) -> tuple[float, int]:
    """Standard deviation within samples, and its degrees of freedom (0: none has two numbers)."""
    samples = [sample for sample in samples if len(sample) > 1]
    freedom = sum(len(sample) - 1 for sample in samples)
    return (math.sqrt(sum(np.var(sample) * len(sample) for sample in samples) / freedom) if freedom else math.nan), freedom


def power(runs: int, effect: float) -> float:
    """Probability that a two-sided t-test at 5% of two samples of `runs` detects a difference of `effect` deviations; needs scipy."""
    stats = scipy_stats()
    freedom, shift = 2 * runs - 2, effect * math.sqrt(runs / 2)
    edge = stats.t.ppf(1 - LEVEL / 2, freedom)
    return float(stats.nct.sf(edge, freedom, shift) + stats.nct.cdf(-edge, freedom, shift))


def runs_needed(effect: float) -> int | None:
    """The fewest runs of each of two configurations that give power 0.8; None: more than MOST_RUNS. Needs scipy."""
    low, high = 1, 2
    while power(high, effect) < POWER:
        low, high = high, 2 * high
        if low > MOST_RUNS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, effect) >= POWER else (middle, high)
    return high


# -----------------------------------------------------------------------------
# Against the baseline


@dataclass(frozen=True)
class Comparison:
    """A configuration against the baseline; a difference is this configuration's figure less the baseline's."""

    configuration: Configuration
    baseline: Configuration
    loss: Welch | None
    time: Welch | None
    loss_p_holm: float | None
    time_p_holm: float | None

    @property
    def delta_loss(self) -> float | None:
        """Of the means of final losses."""
        both = self.configuration.final_losses, self.baseline.final_losses
        return float(both[0].mean() - both[1].mean()) if all(map(len, both)) else None

    @property
    def delta_time(self) -> float | None:
        """Of the times (s) at which the mean curves reach the target."""
        both = self.configuration.crossing, self.baseline.crossing
        return both[0].seconds - both[1].seconds if all(both) else None


def corrected(tests: Sequence[Welch | None]) -> list[float | None]:
    """Holm's correction over the tests that there are."""
    p_values = iter(holm([test.p for test in tests if test]))
    return [next(p_values) if test else None for test in tests]


def compare(configurations: Sequence[Configuration], baseline: Configuration) -> list[Comparison]:
    """Every configuration but the baseline against it."""
    others = [configuration for configuration in configurations if configuration is not baseline]
    loss = [welch(other.tested_losses, baseline.tested_losses) for other in others]
    time = [welch(other.times_to_target, baseline.times_to_target) for other in others]
    return [Comparison(other, baseline, *tests) for other, *tests in zip(others, loss, time, corrected(loss), corrected(time))]


# -----------------------------------------------------------------------------
# Tables and words

Row = dict[str, str]  # column -> cell


def number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def with_deviation(sample: Sequence[float] | np.ndarray, form: str) -> str:
    """Mean ± sample standard deviation; of one number the number."""
    if not len(sample):
        return "n/a"
    spread = deviation(sample)
    return format(float(np.mean(sample)), form) + ("" if spread is None else f" ± {spread:{form}}")


def with_interval(difference: float | None, test: Welch | None, form: str) -> str:
    """A difference and its 95% interval."""
    if difference is None:
        return "n/a"
    return f"{difference:+z{form}} " + (f"[{test.low:+z{form}}, {test.high:+z{form}}]" if test else "[n/a]")


def probability(p: float | None) -> str:
    if p is None:
        return "n/a"
    return f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}"


def legend(target: float) -> str:
    """What the columns of `result_row` are."""
    return f"step and time: where the mean curve reaches {target:g}, then mean and deviation over the runs that do; missed: runs that do not"


def result_row(configuration: Configuration) -> Row:
    """Is it better? The columns are explained by `legend`."""
    mean, runs, finished = configuration.crossing, configuration.run_crossings, configuration.finished
    return {
        "configuration": configuration.name,
        "runs": str(len(finished)),
        "final loss": with_deviation(configuration.final_losses, ".6f"),
        "step": number(mean and mean.step, ".1f"),
        "time, s": number(mean and mean.seconds, ".1f"),
        "step, runs": with_deviation([run.step for run in runs], ".1f"),
        "time, runs, s": with_deviation([run.seconds for run in runs], ".1f"),
        "missed": str(len(finished) - len(runs)),
        "ms a step": number(configuration.step_avg_ms, ".2f"),
    }


def difference_row(comparison: Comparison) -> Row:
    """Is it real?"""
    return {
        "configuration": comparison.configuration.name,
        "loss difference [95%]": with_interval(comparison.delta_loss, comparison.loss, ".6f"),
        "p": probability(comparison.loss and comparison.loss.p),
        "Holm": probability(comparison.loss_p_holm),
        "time difference, s [95%]": with_interval(comparison.delta_time, comparison.time, ".1f"),
        "p of time": probability(comparison.time and comparison.time.p),
        "Holm of time": probability(comparison.time_p_holm),
    }


def record_row(configuration: Configuration) -> Row:
    """Is the target met? The record rule."""
    test = t_test(configuration)
    return {
        "configuration": configuration.name,
        "n": str(test.n),
        "mean": number(test.mean, ".6f"),
        "std": number(test.std, ".6f"),
        "t": number(test.t, ".3f"),
        f"p(< {configuration.target:g})": probability(test.p),
        "95% upper bound": number(test.upper_bound, ".6f"),
    }


def pay_row(configuration: Configuration, baseline: Configuration) -> Row:
    """Does it pay?"""
    steps = configuration.crossing and baseline.crossing and baseline.crossing.step - configuration.crossing.step
    return {
        "configuration": configuration.name,
        "steps saved": number(steps, "z.1f"),
        "ms a step to target": number(configuration.ms_to_target, ".2f"),
        "break-even ms a step": number(configuration.break_even_ms(baseline), ".2f"),
    }


def unfinished_row(configuration: Configuration, run: Run, baseline: Configuration) -> Row:
    """How a run that no figure includes stands against the baseline's mean curve at its last validation."""
    row = {"run": f"{configuration.name}: {run.path.name}", "last step": f"{run.last.step} of {run.num_iterations}"}
    if not run.validations:
        return row | dict.fromkeys(("validated at", "loss", "less the baseline's there", "whose runs deviate by"), "n/a")
    step, loss, stack = run.validations[-1].step, run.validations[-1].val_loss, baseline.stack
    itself = configuration is baseline and not baseline.finished
    theirs = None if itself or not math.isfinite(loss) else baseline.mean_loss(step)
    return row | {
        "validated at": str(step),
        "loss": f"{loss:.6f}",
        "less the baseline's there": number(None if theirs is None else loss - theirs, "+.6f"),
        "whose runs deviate by": number(deviation(stack.losses[:, stack.steps == step].ravel()), ".6f"),
    }


def text_table(rows: Sequence[Row]) -> str:
    """Columns as wide as their widest cell, the first one to the left, the others to the right."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))) for line in cells)


def markdown_table(rows: Sequence[Row]) -> str:
    cells = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *([cell.replace("|", "\\|") for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def why_untested(configuration: Configuration, of_time: bool) -> str | None:
    """Why a configuration's runs allow no test; None: they do."""
    name, sample = configuration.name, configuration.times_to_target if of_time else configuration.tested_losses
    if len(configuration.finished) < 2:
        return f"{name} has one run"
    if not len(sample):
        return f"without one of its runs the mean curve of {name} gives no crossing" if of_time else f"{name} has {lengths(configuration)}"
    return None if varies(sample) else f"the runs of {name} do not differ"


def why_no_test(configuration: Configuration, baseline: Configuration, of_time: bool) -> str:
    """Why there is no test of a difference that is known."""
    return why_untested(configuration, of_time) or why_untested(baseline, of_time) or "scipy is not installed"


def is_real(p: float | None, comparison: Comparison, of_time: bool) -> str:
    """The answer, with p after Holm's correction."""
    if p is None:
        return f"real: cannot say, {why_no_test(comparison.configuration, comparison.baseline, of_time)}"
    return f"real at {LEVEL:.0%}: {'yes' if p < LEVEL else 'not shown'} (p {probability(p)} after Holm)"


def no_crossing(configuration: Configuration) -> str:
    if configuration.shares_all:
        return f"the mean curve of {configuration.name} does not reach {configuration.target:g}"
    return f"where the mean curve of {configuration.name} reaches {configuration.target:g}, its runs' shared validations do not tell"


def time_verdict(comparison: Comparison) -> str:
    """Which of the two reaches the target sooner."""
    mine, theirs = comparison.configuration, comparison.baseline
    missing = [c for c in (mine, theirs) if not c.crossing]
    if missing:
        reached = "" if mine in missing else f"reaches {mine.target:g} after {mine.crossing.seconds:.1f} s; "
        return reached + "; ".join(map(no_crossing, missing))
    delta, test = comparison.delta_time, comparison.time
    interval = f" [95%: {test.low:+.1f} to {test.high:+.1f} s]" if test else ""
    difference = f"{abs(delta):.1f} s {'sooner' if delta < 0 else 'later'} than" if round(delta, 1) else "at the same time (to 0.1 s) as"
    return f"reaches {mine.target:g} {difference} {theirs.name}{interval}; {is_real(comparison.time_p_holm, comparison, of_time=True)}"


def loss_verdict(comparison: Comparison) -> str:
    delta, test = comparison.delta_loss, comparison.loss
    if not round(delta, 6):
        return "final loss the same"
    interval = f" [95%: {test.low:+.6f} to {test.high:+.6f}]" if test else ""
    return f"final loss {abs(delta):.6f} {'lower' if delta < 0 else 'higher'}{interval}; {is_real(comparison.loss_p_holm, comparison, of_time=False)}"


def hedge(p: float | None) -> str:
    return "" if p is not None and p < LEVEL else "if real, "


def pay_verdict(comparison: Comparison) -> str:
    """How much of the difference in time comes from the number of steps (at the baseline's step time), how much from the step time."""
    mine, theirs = comparison.configuration, comparison.baseline
    steps, ms = mine.crossing.step - theirs.crossing.step, mine.ms_to_target - theirs.ms_to_target
    even = f"{mine.break_even_ms(theirs):.2f} ms a step"
    from_steps, from_step_time = steps * theirs.ms_to_target / 1000, ms * mine.crossing.step / 1000
    parts = f"{steps:+z.1f} steps make {from_steps:+z.1f} s, {ms:+z.2f} ms a step make {from_step_time:+z.1f} s"
    if comparison.delta_time < 0:
        return f"{parts}; {hedge(comparison.time_p_holm)}it pays, up to {even}"
    pays_not = f"{parts}; {hedge(comparison.time_p_holm)}it does not pay"
    if steps < 0:
        more = hedge(comparison.loss_p_holm if comparison.delta_loss < 0 else None)
        return f"{pays_not}; {more}it learns more a step and would pay below {even}"
    return f"{pays_not}; it takes no fewer steps"


def verdict(comparison: Comparison) -> str:
    """The three answers for a configuration, in words, a line each."""
    mine, theirs = comparison.configuration, comparison.baseline
    reservations = [f"{c.name}: {shared_validations(c)}" for c in (mine, theirs) if not c.shares_all]
    answers = [time_verdict(comparison)] if mine.finished and theirs.finished else []
    if comparison.delta_loss is not None:
        answers.append(loss_verdict(comparison))
    if mine.ms_to_target and theirs.ms_to_target:
        answers.append(pay_verdict(comparison))
    return "\n".join([mine.name, *(f"  {line}" for line in reservations + (answers or ["no finished runs to compare"]))])


def footnotes(configurations: Sequence[Configuration], comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader of the figures has to know that is no fault of a log."""
    notes = []
    totals = {c.name: " and ".join(map(str, sorted({run.num_iterations for run in c.runs}))) for c in configurations}
    other = [c.configuration.name for c in comparisons if totals[c.configuration.name] != totals[c.baseline.name]]
    if other:
        steps = f"{totals[comparisons[0].baseline.name]} of the baseline; {', '.join(f'{name}: {totals[name]}' for name in other)}"
        notes.append(f"num_iterations differ ({steps}): what it takes to reach the target compares, losses at the same step do not.")
    single = [c.name for c in configurations if len(c.finished) == 1]
    if single:
        notes.append(f"One run has no deviation, so there is no test and no interval for {', '.join(single)}.")
    if scipy_stats() is None:
        notes.append(f"Tests and intervals need scipy: {INSTALL}")
    tests = [sum(test is not None for test in column) for column in ([c.loss for c in comparisons], [c.time for c in comparisons])]
    if any(tests):
        notes.append(
            f"p: Welch's t-test, two-sided. Holm: corrected for the number of comparisons with one baseline ({tests[0]} of loss, {tests[1]} of time); "
            "an interval is for its comparison alone. Time: of the mean curve (jackknife over runs), so a run that misses the target counts."
        )
    return notes


def power_note(configurations: Sequence[Configuration], delta: float) -> str:
    """The answer to --power."""
    question = f"To detect a difference of {delta:g} in final loss (two-sided {LEVEL:.0%}, power {POWER})"
    spread, freedom = pooled_deviation(c.tested_losses for c in configurations)
    if not freedom or not spread:
        return f"{question}: cannot say, no configuration has runs that differ."
    if scipy_stats() is None:
        return f"{question}: needs scipy, {INSTALL}"
    runs = runs_needed(delta / spread)
    answer = f"{runs or f'more than {MOST_RUNS}'} runs of each configuration"
    return f"{question} at the pooled deviation {spread:.6f} ({freedom} degrees of freedom): {answer}."


def unfinished_rows(configurations: Sequence[Configuration], baseline: Configuration) -> list[Row]:
    return [unfinished_row(c, run, baseline) for c in configurations for run in c.runs if run not in c.finished]


def report(configurations: Sequence[Configuration], baseline: Configuration, delta: float | None) -> str:
    """Everything, for a terminal."""
    comparisons = compare(configurations, baseline)
    unfinished = unfinished_rows(configurations, baseline)
    parts = [
        f"Baseline: {baseline.name}. Target: validation loss {baseline.target:g}.",
        f"Is it better? ({legend(baseline.target)})\n" + text_table([result_row(c) for c in configurations]),
        "Is it real? (against the baseline)\n" + text_table([difference_row(c) for c in comparisons]) if comparisons else "",
        "Is the target met? (one-sided t-test of final losses)\n" + text_table([record_row(c) for c in configurations]),
        "Does it pay? (break-even: the step time at which it ties with the baseline)\n" + text_table([pay_row(c, baseline) for c in configurations]),
        "In no number above: still going, stopped or diverged\n" + text_table(unfinished) if unfinished else "",
        "\n".join(map(verdict, comparisons)),
        "\n".join([*footnotes(configurations, comparisons), *([power_note(configurations, delta)] if delta else [])]),
    ]
    return "\n\n".join(filter(None, parts))


def markdown(configurations: Sequence[Configuration], baseline: Configuration, delta: float | None) -> str:
    """One table with a row a configuration, another of what it leaves out, and notes, for a record submission."""
    comparisons = compare(configurations, baseline)
    differences = {comparison.configuration.name: difference_row(comparison) for comparison in comparisons}
    blank = dict.fromkeys(next(iter(differences.values()), {}), "")
    rows = []
    for c in configurations:
        record = {column: cell for column, cell in record_row(c).items() if column not in ("n", "mean", "std")}  # as in result_row
        rows.append(result_row(c) | differences.get(c.name, blank) | record | pay_row(c, baseline))
    unfinished = unfinished_rows(configurations, baseline)
    notes = [f"Baseline: {baseline.name}; {legend(baseline.target)}.", *footnotes(configurations, comparisons)]
    if delta:
        notes.append(power_note(configurations, delta))
    return "\n\n".join([markdown_table(rows), *([markdown_table(unfinished)] if unfinished else []), *notes])


# -----------------------------------------------------------------------------
# For programs


def as_dict(configuration: Configuration, comparison: Comparison | None, baseline: Configuration) -> dict[str, Any]:
    """One entry of --json's list; null where a figure is not defined. Losses in nats, times in seconds unless the key says ms."""
    found, losses = configuration.crossing, configuration.final_losses
    return {
        "name": configuration.name,
        "runs": len(configuration.finished),
        "final_loss_mean": float(losses.mean()) if len(losses) else None,
        "final_loss_std": deviation(losses),
        "steps_to_target": found and found.step,
        "time_to_target": found and found.seconds,
        "step_avg_ms": configuration.step_avg_ms,
        "break_even_step_ms": configuration.break_even_ms(baseline),
        "t_test": t_test(configuration)._asdict(),
        "delta_loss": comparison and comparison.delta_loss,
        "delta_time": comparison and comparison.delta_time,
        "welch_p": comparison and comparison.loss and comparison.loss.p,
    }


def as_json(configurations: Sequence[Configuration], baseline: Configuration) -> str:
    comparisons = {comparison.configuration.name: comparison for comparison in compare(configurations, baseline)}
    entries = [as_dict(c, comparisons.get(c.name), baseline) for c in configurations]
    return json.dumps({"target": baseline.target, "baseline": baseline.name, "configurations": entries}, indent=2, allow_nan=False)


def as_csv(configurations: Sequence[Configuration]) -> str:
    """All validations of all runs, also of those that have not ended or diverged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["step", "num_iterations", "val_loss", "train_time_ms", "step_avg_ms"]
    writer.writerow(["configuration", "run", *columns])
    for configuration in configurations:
        for run in configuration.runs:
            writer.writerows([configuration.name, run.path.name, *(getattr(line, name) for name in columns)] for line in run.validations)
    return text.getvalue().rstrip("\n")


# -----------------------------------------------------------------------------
# Figure

FORMATS = {".png", ".svg", ".pdf"}
AXES = {"step": "step", "time": "training time (s)"}
# Okabe and Ito's palette for all kinds of colour vision (https://jfly.uni-koeln.de/color/), less its yellow, which print loses,
# and Paul Tol's wine (https://personal.sron.nl/~pault/); black is the baseline's, and so is grey, its band. Five dashes times six
# marks tell 30 curves apart in grey, and seven colours share no factor with 30.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255"]
DASHES = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5))]
MARKERS = ["", "o", "^", "s", "D", "v"]
NEAR = 0.05  # nats above the target, where a figure begins by itself
LEGEND_ROWS = 32


class Window(NamedTuple):
    """The part of the x axis to show, in its unit."""

    low: float
    high: float

    def holds(self, x: np.ndarray) -> np.ndarray:
        return (x >= self.low) & (x <= self.high)

    def meets(self, x: np.ndarray) -> bool:
        """Whether a curve over rising `x` comes through the window."""
        return len(x) > 0 and x[0] <= self.high and x[-1] >= self.low


def x_of(curve: Curve, axis: str) -> np.ndarray:
    return curve.steps if axis == "step" else curve.seconds


def style(i: int) -> dict[str, Any]:
    """How the i-th curve that is not the baseline's is drawn."""
    mark = {"marker": MARKERS[i // len(DASHES) % len(MARKERS)], "markersize": 4, "markevery": 0.1}  # of the diagonal of the axes
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.4} | mark


def label(configuration: Configuration) -> str:
    runs = len(configuration.finished)
    if not runs:
        return f"{configuration.name}: to step {configuration.curve.steps[-1]}"
    return f"{configuration.name}: {configuration.final_losses.mean():.4f}" + (f" (mean of {runs})" if runs > 1 else "")


def y_limits(curves: Sequence[tuple[np.ndarray, np.ndarray]], window: Window, target: float) -> tuple[float, float]:
    """Bounds that fit what curves (x, y) have in the window, its edges included, and a target that is near."""
    seen: list[float] = []
    for x, y in curves:
        edges = [edge for edge in window if x[0] <= edge <= x[-1]]
        seen += [*y[window.holds(x)], *np.interp(edges, x, y)]
    low, high = min(seen), max(seen)
    if low - 0.25 * (high - low) <= target <= high + 0.25 * (high - low):
        low, high = min(low, target), max(high, target)
    margin = 0.04 * (high - low) or 0.01
    return low - margin, high + margin


def figure_class() -> type:
    """matplotlib's Figure, which needs no display. ValueError: matplotlib is missing."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ValueError(f"--plot needs matplotlib: {INSTALL}") from None


def opening(configurations: Sequence[Configuration], baseline: Configuration, axis: str) -> float:
    """Where a figure begins: the baseline comes near the target there, or a curve ends before it does.

    Losses at the first steps would press all others flat. Without a baseline that comes near: the first validation after step 0.
    """
    curves = [c.curve for c in configurations if len(c.curve.steps)]
    near = x_of(baseline.curve, axis)[baseline.curve.losses <= baseline.target + NEAR]
    if len(near):
        return min(float(near[0]), *(float(x_of(curve, axis)[-1]) for curve in curves if curve.steps[-1] > 0))
    return min((float(x_of(curve, axis)[curve.steps > 0][0]) for curve in curves if curve.steps.any()), default=0.0)


def choose_window(configurations: Sequence[Configuration], baseline: Configuration, axis: str, low: float | None, high: float | None) -> Window:
    """The window with the bounds that the user gave; without, from the opening to the last validation of all."""
    if low is None:
        low = opening(configurations, baseline, axis)
    if high is None:
        high = max((float(x_of(c.curve, axis)[-1]) for c in configurations if len(c.curve.steps)), default=low)
        high = low + 1 if high == low else high
    return Window(low, high)


def add_legend(axes: Any, handles: list, labels: list[str]) -> None:
    """A legend beside the axes, for which the saved figure grows."""
    title = "final loss; band: lowest to highest run" if axes.collections else "final loss"
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0, "ncols": math.ceil(len(labels) / LEGEND_ROWS)}
    legend = axes.legend(handles, [""] * len(labels), title=title, title_fontsize=8, fontsize=8, handlelength=4, **place)
    for text, words in zip(legend.get_texts(), labels):  # only so are names with $ or a leading _ taken as they are
        text.set_parse_math(False)
        text.set_text(words)


def draw_curve(axes: Any, configuration: Configuration, x: np.ndarray, style: dict[str, Any]) -> tuple[Any, list[tuple[np.ndarray, np.ndarray]]]:
    """Draw the mean curve over `x` and, of several runs, the band of their extremes; returns its handle and all curves (x, y) drawn."""
    (handle,) = axes.plot(x, configuration.curve.losses, **style)
    curves = [(x, configuration.curve.losses)]
    if len(configuration.finished) > 1:
        low, high = configuration.stack.losses.min(axis=0), configuration.stack.losses.max(axis=0)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        curves += [(x, low), (x, high)]
    return handle, curves


def plot(configurations: Sequence[Configuration], baseline: Configuration, file: Path, axis: str, window: Window) -> None:
    """Write a figure of the mean curves that come through the window, in the order of their final losses.

    ValueError: matplotlib is missing, or there is nothing to show. OSError: the file cannot be written.
    """
    shown = [c for c in configurations if window.meets(x_of(c.curve, axis))]
    if not shown:
        raise ValueError("--plot: no mean curve is between --from and --to")
    shown.sort(key=lambda c: c.final_losses.mean() if c.finished else math.inf)
    styles = {c.name: style(i) for i, c in enumerate(c for c in configurations if c is not baseline)}
    styles[baseline.name] = {"color": "black", "linestyle": "-", "linewidth": 1.8}
    figure = figure_class()(figsize=(6.5, 4.8), dpi=200)
    axes = figure.subplots()
    handles, curves = [], []
    for c in shown:
        x = x_of(c.curve, axis)
        lone = {"marker": "o"} if window.holds(x).sum() == 1 else {}  # a line from one point to itself would not be seen
        handle, drawn = draw_curve(axes, c, x, styles[c.name] | lone)
        handles.append(handle)
        curves += drawn
    handles.append(axes.axhline(baseline.target, color="0.35", linewidth=0.7))
    axes.set(xlabel=AXES[axis], ylabel="validation loss", xlim=window, ylim=y_limits(curves, window, baseline.target))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    add_legend(axes, handles, [*map(label, shown), f"target {baseline.target:g}"])
    figure.savefig(file, bbox_inches="tight")


# -----------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no number")
    return value


def make_parser() -> Parser:
    about, _, details = __doc__.partition("\n\n")
    parser = Parser("compare.py", description=about, epilog=details, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path)
    parser.add_argument("--target", type=finite, default=TARGET, metavar="LOSS", help=f"validation loss to reach (default {TARGET})")
    parser.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default: the one named baseline, else the first)")
    parser.add_argument("--power", type=finite, metavar="LOSS", help="say how many runs detect this difference in final loss")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="the figures as JSON")
    output.add_argument("--csv", action="store_true", help="all validations as CSV")
    output.add_argument("--markdown", action="store_true", help="one table for a record submission")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"write a figure of the mean curves: {', '.join(sorted(FORMATS))}")
    parser.add_argument("--x", choices=list(AXES), help="its x axis: step (default), or training time in seconds")
    parser.add_argument("--from", type=finite, dest="low", metavar="X", help="show it from this step or second on (default: where the baseline nears the target)")
    parser.add_argument("--to", type=finite, dest="high", metavar="X", help="and up to this one")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """ValueError: options that do not fit together or mean nothing."""
    if options.power is not None and options.power <= 0:
        raise ValueError("--power: give a difference in loss above 0")
    if options.power is not None and (options.json or options.csv):
        raise ValueError("--power is answered below the tables; leave out --json or --csv")
    if options.plot is None and (options.x, options.low, options.high) != (None, None, None):
        raise ValueError("--x, --from and --to are for a figure; name its file with --plot FILE")
    if options.plot is not None and options.plot.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {options.plot}: the file's name must end in {', '.join(sorted(FORMATS))}")
    if None not in (options.low, options.high) and options.low >= options.high:
        raise ValueError(f"--from {options.low:g} --to {options.high:g}: --from must be below --to")


def run(arguments: Sequence[str]) -> str | None:
    """What to print on standard output; None: no log has results, as has been said. ValueError, OSError: nothing can be shown, and why."""
    options = make_parser().parse_args(arguments)
    check_options(options)
    configurations, notes = read_configurations(options.paths, options.target)
    for note in notes:
        complain(note)
    if not configurations:
        return None
    baseline = choose_baseline(configurations, options.baseline)
    if options.plot is not None:
        axis = options.x or "step"
        plot(configurations, baseline, options.plot, axis, choose_window(configurations, baseline, axis, options.low, options.high))
    if options.json:
        return as_json(configurations, baseline)
    if options.csv:
        return as_csv(configurations)
    return (markdown if options.markdown else report)(configurations, baseline, options.power)


def complain(text: str) -> None:
    """A line on standard error."""
    print(f"compare.py: {' '.join(text.split())}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names can be of any bytes, terminals of any encoding
    try:
        with warnings.catch_warnings(action="ignore"):  # of numpy and others, as of a letter that the figure's font lacks
            text = run(arguments)
        if text is None:
            return 2
        print(text, flush=True)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
