"""Plot all differences from the baseline (forest), the curves of a few configurations, and a grid of tables."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from logs.run_log import plural
from logs.run_statistics import LEVEL, Comparison, Effect, stats

# From Okabe and Ito's palette, safe for colour-blind readers: https://jfly.uni-koeln.de/color/
VERDICTS = {"better": ("#0072B2", "o"), "worse": ("#D55E00", "s"), "not significant": ("#7F7F7F", "D")}
COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255"]
NEAR = 0.05  # nats above the target, where --plot starts


def new_axes(height: float, columns: int = 1) -> list[Any]:
    """Return the axes of a new figure. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # needs no display
    except ImportError:
        raise ValueError("a figure needs matplotlib: pip install -r logs/requirements.txt") from None
    figure = Figure(figsize=(7.5, height), dpi=160, layout="tight" if columns > 1 else None)
    for axes in figure.subplots(1, columns, squeeze=False)[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.92")
    return figure.axes


def forest(comparison: Comparison, of_time: bool, file: Path) -> None:
    """Plot a sorted row per configuration: its difference from the baseline, the interval, a tick for each run."""
    family, what = (comparison.time, "time to the target (s)") if of_time else (comparison.loss, "final loss (nats)")
    if comparison.baseline not in family.samples:
        raise ValueError(f"--forest: the baseline {comparison.baseline} has no {what}")
    names = sorted(family.samples, key=lambda name: family.samples[name].mean())
    zero = family.samples[comparison.baseline].mean()
    (axes,) = new_axes(1.2 + 0.2 * len(names))
    for row, name in enumerate(names):
        effect, sample = family.effects.get(name, Effect()), family.samples[name] - zero
        color, marker = VERDICTS.get(effect.verdict, ("#000000", "D"))
        axes.plot(sample, np.full(len(sample), row), "|", color=color, markersize=8, markeredgewidth=0.8, alpha=0.6)
        axes.errorbar(sample.mean(), row, xerr=effect.half_width, fmt=marker, color=color, markersize=5, linewidth=1.6)
    axes.axvline(0, color="black", linewidth=0.8)
    if not of_time:
        axes.axvline(comparison.target - zero, color="black", linewidth=0.8, linestyle="--")
        axes.text(comparison.target - zero, -1, f" target {comparison.target:g}", va="center")
    for verdict, (color, marker) in VERDICTS.items():
        axes.plot([], [], marker, color=color, label=verdict)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="simultaneous 95% intervals")
    labels = [f"{name} ({plural(len(family.samples[name]), 'run')})" for name in names]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.set_xlabel(f"{what} minus that of {comparison.baseline}", parse_math=False)
    axes.set_ylim(len(names) - 0.4, -1.6)
    axes.figure.savefig(file, bbox_inches="tight")


def curves(comparison: Comparison, of_time: bool, low: float | None, high: float | None, file: Path) -> None:
    """Plot the runs, the mean curves with their 95% intervals, and where the mean curves reach the target."""
    if len(comparison.runs) > len(COLORS):
        raise ValueError(f"--plot takes at most {len(COLORS)} configurations, not {len(comparison.runs)}; use --forest")
    (axes,) = new_axes(4.5)
    axis, target, near = 2 if of_time else 0, comparison.target, comparison.curves[comparison.baseline]
    drawn = {name: comparison.finished[name] or runs for name, runs in comparison.runs.items()}
    last = [run.curve[axis][-1] for runs in drawn.values() for run in runs if len(run.curve.steps)]
    low = min([*near[axis][near.losses <= target + NEAR], *last], default=0) if low is None else low
    high = max(last, default=0) if high is None else high
    ends = []
    for color, (name, runs) in zip(COLORS, drawn.items()):
        x, crossing = np.empty(0), comparison.crossings[name]
        for curve, width in [*((run.curve, 0.5) for run in runs), (comparison.curves[name], 1.8)]:
            if len(curve.steps):
                points = np.union1d(curve[axis], np.clip((low, high), curve[axis][0], curve[axis][-1]))
                x = points[(low <= points) & (points <= high)]
                y = np.interp(x, curve[axis], curve.losses)
                (line,) = axes.plot(x, y, ".-", color=color, linewidth=width, markersize=2 * width, alpha=min(1, width))
        if len(comparison.finished[name]) > 1 and stats:
            half = stats.sem([np.interp(x, run.curve[axis], run.curve.losses) for run in runs])
            half *= stats.t.isf(LEVEL / 2, len(runs) - 1)
            axes.fill_between(x, y - half, y + half, color=color, alpha=0.2, linewidth=0)
        reached = crossing and not crossing.extrapolated
        if reached and low <= crossing[of_time] <= high:
            axes.plot(crossing[of_time], target, "o", color=color, markersize=5)
        if len(x):
            ends.append((y[-1], line, f"{name}\n{target:g} at {crossing[of_time]:.1f}" if reached else name))
    if not ends:
        raise ValueError("--plot: no curve is between --from and --to")
    axes.set_ylim(axes.get_ylim())  # a target far below must not flatten the curves
    axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
    axes.text(low, target, f"target {target:g}", va="bottom", clip_on=True)
    _, lines, labels = zip(*sorted(ends, key=lambda end: -end[0]))  # in the order in which the curves end
    axes.legend(lines, [label.replace("$", r"\$") for label in labels], loc="upper left", bbox_to_anchor=(1, 1))
    axes.set(xlabel="training time (s)" if of_time else "step", ylabel="validation loss (nats per token)",
             xlim=(low, max(high, low + 1)))
    axes.figure.savefig(file, bbox_inches="tight")


def grid(comparison: Comparison, file: Path) -> None:
    """Plot final loss and ms per step against the number of tables, for names like pairs_4x2 and pool_4x2: 4 places,
    where a layer uses 2 tables. Each of the pairs' places has tables of its own; a pool's places share theirs."""
    lines = defaultdict(list)
    for name, runs in comparison.finished.items():
        if runs and (match := re.fullmatch(r"(?:.*/)?(pairs|pool)_(\d+)x(\d+)", name)):
            kind, places, tables = match[1], int(match[2]), int(match[3])
            count, step_ms = tables * (places if kind == "pairs" else 1), np.mean([run.step_avg_ms for run in runs])
            lines[places, kind].append((count, comparison.losses[name].mean(), step_ms))
    if not lines:
        raise ValueError("--grid: no configuration with finished runs is named like pairs_4x2 or pool_4x2")
    row = new_axes(3.8, columns=2)
    for axes, column, what in zip(row, (1, 2), ("final loss (nats per token)", "ms per step")):
        for (places, kind), points in sorted(lines.items()):
            x, y = np.transpose(sorted(points))[[0, column]]
            axes.plot(x, y, "o-" if kind == "pairs" else "s--", color=COLORS[places % len(COLORS)], markersize=4,
                      label=f"{kind}, {plural(places, 'place')}")
        axes.set(xlabel="number of tables", ylabel=what, xticks=[1, 5, 10, 15, 20])
    row[0].axhline(comparison.target, color="black", linewidth=0.8, linestyle="--")
    row[1].legend(fontsize=8)
    row[0].figure.savefig(file, bbox_inches="tight")
