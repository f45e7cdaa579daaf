"""Figures: the differences of all configurations from the baseline (forest), and the curves of a few."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from logs.run_statistics import LEVEL, Comparison, Effect, stats

# Of Okabe and Ito's palette, safe for colour-blind readers: https://jfly.uni-koeln.de/color/
VERDICTS = {"better": ("#0072B2", "o"), "worse": ("#D55E00", "s"), "not shown": ("#7F7F7F", "D")}
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255"]
NEAR = 0.05  # nats above the target, where curves begin to be shown


def new_figure(height: float, file: Path) -> tuple[Any, Any]:
    """A figure and its axes. Raises ValueError without matplotlib, or if the file's name is not a figure's."""
    if file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{file}: a figure's name must end in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure  # which needs no display
    except ImportError:
        raise ValueError("a figure needs matplotlib: pip install -r logs/requirements.txt") from None
    figure = Figure(figsize=(7.5, height), dpi=200)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    return figure, axes


def forest(comparison: Comparison, of_time: bool, file: Path) -> None:
    """One row a configuration, sorted: its difference from the baseline, the interval, a tick for each run.

    Raises ValueError if the baseline has no finished run.
    """
    family, what = (comparison.time, "time to the target") if of_time else (comparison.loss, "final loss")
    if comparison.baseline not in family.samples:
        raise ValueError(f"--forest: no run of the baseline {comparison.baseline} has a {what}")
    names = sorted(family.samples, key=lambda name: family.samples[name].mean())
    zero = family.samples[comparison.baseline].mean()
    figure, axes = new_figure(1.2 + 0.2 * len(names), file)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for row, name in enumerate(names):
        effect, sample = family.effects.get(name, Effect()), family.samples[name] - zero
        colour, marker = VERDICTS.get(effect.verdict, ("#000000", "D"))
        axes.plot(sample, np.full(len(sample), row), "|", color=colour, markersize=8, markeredgewidth=0.8, alpha=0.6)
        axes.errorbar(sample.mean(), row, xerr=effect.half_width, fmt=marker, color=colour, markersize=5, linewidth=1.6)
        axes.text(1.01, row, f"{len(sample)}", **beside)
    axes.text(1.01, -1, "runs", **beside)
    axes.axvline(0, color="black", linewidth=0.8)
    if not of_time:
        axes.axvline(comparison.target - zero, color="black", linewidth=0.8, linestyle="--")
        axes.text(comparison.target - zero, -1, f" target {comparison.target:g}", va="center")
    for verdict, (colour, marker) in VERDICTS.items():
        axes.plot([], [], marker, color=colour, label=verdict)
    axes.legend(loc="lower right", title="with 95% intervals, all at once")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel=f"{what} less that of {comparison.baseline}, {'s' if of_time else 'nats a token'}")
    axes.set_ylim(len(names) - 0.4, -1.6)
    figure.savefig(file, bbox_inches="tight")


def spread(places: Sequence[float], gap: float) -> np.ndarray:
    """The places in the same order, moved apart to `gap` at least."""
    moved, order = np.array(places, float), np.argsort(places, kind="stable")
    for before, i in zip(order, order[1:]):
        moved[i] = max(moved[i], moved[before] + gap)
    return moved - (moved - places).mean() if len(places) else moved


def curves(comparison: Comparison, of_time: bool, low: float | None, high: float | None, file: Path) -> None:
    """The runs, the mean curves with their 95% intervals, and where the mean curves reach the target.

    Raises ValueError if there are too many, or if no curve comes between `low` and `high`.
    """
    if len(comparison.runs) > len(COLOURS):
        raise ValueError(f"--plot draws up to {len(COLOURS)} of {len(comparison.runs)} configurations; --forest shows all")
    figure, axes = new_figure(4.5, file)
    axis, target = 2 if of_time else 0, comparison.target
    lines, ends, marks = [], [], []  # lines: (x, y) of all that is drawn
    for colour, (name, runs) in zip(COLOURS, comparison.runs.items()):
        single = [run.curve for run in comparison.finished[name] or runs if len(run.curve.steps)]
        mean, losses = comparison.curves[name], comparison.stacks[name].losses
        for curve in single:
            lines.append((curve[axis], curve.losses))
            axes.plot(*lines[-1], ".-", color=colour, linewidth=0.5, markersize=2, alpha=0.6)
        if len(losses) > 1 and stats:
            half = stats.t.isf(LEVEL / 2, len(losses) - 1) * stats.sem(losses)
            axes.fill_between(mean[axis], mean.losses - half, mean.losses + half, color=colour, alpha=0.2, linewidth=0)
        axes.plot(mean[axis], mean.losses, color=colour, linewidth=1.8)
        ends += [(name, colour, *([mean] if len(mean.steps) else single)[0])] if single else []
        crossing = comparison.crossings[name]
        marks += [(crossing[int(of_time)], colour)] if crossing and not crossing.continued else []
    near = comparison.curves[comparison.baseline]
    starts = near[axis][near.losses <= target + NEAR] if len(near.steps) else []
    low = low if low is not None else starts[0] if len(starts) else min((x[-1] for x, _ in lines), default=0) / 10
    high = high if high is not None else max((x[-1] for x, _ in lines), default=low)
    seen = [y for x, ys in lines for y in (*ys[(low <= x) & (x <= high)], *np.interp([e for e in (low, high) if x[0] <= e <= x[-1]], x, ys))]
    if not seen:
        raise ValueError("--plot: no curve comes between --from and --to")
    bottom, top = min(seen), max(seen)
    if bottom - 0.25 * (top - bottom) <= target <= top + 0.25 * (top - bottom):
        bottom, top = min(bottom, target), max(top, target)
    bottom, top = bottom - 0.1 * (top - bottom) - 0.001, top + 0.05 * (top - bottom) + 0.001
    ends = [(name, colour, min(high, x[axis][-1]), ...)]
