"""Figures: the differences of all configurations from the baseline (forest), and the curves of a few."""

from pathlib import Path
from typing import Any

import numpy as np

from logs.run_statistics import LEVEL, Comparison, Effect, stats

# Of Okabe and Ito's palette, safe for colour-blind readers: https://jfly.uni-koeln.de/color/
VERDICTS = {"better": ("#0072B2", "o"), "worse": ("#D55E00", "s"), "not shown": ("#7F7F7F", "D")}
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255"]
NEAR = 0.05  # nats above the target, where curves begin to be shown


def new_axes(height: float) -> Any:
    """The axes of a new figure. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # which needs no display
    except ImportError:
        raise ValueError("a figure needs matplotlib: pip install -r logs/requirements.txt") from None
    axes = Figure(figsize=(7.5, height), dpi=160).subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.92")
    return axes


def forest(comparison: Comparison, of_time: bool, file: Path) -> None:
    """One row a configuration, sorted: its difference from the baseline, the interval, a tick for each run."""
    family, what = (comparison.time, "time to the target (s)") if of_time else (comparison.loss, "final loss (nats)")
    if comparison.baseline not in family.samples:
        raise ValueError(f"--forest: the baseline {comparison.baseline} has no {what}")
    names = sorted(family.samples, key=lambda name: family.samples[name].mean())
    zero = family.samples[comparison.baseline].mean()
    axes = new_axes(1.2 + 0.2 * len(names))
    for row, name in enumerate(names):
        effect, sample = family.effects.get(name, Effect()), family.samples[name] - zero
        colour, marker = VERDICTS.get(effect.verdict, ("#000000", "D"))
        axes.plot(sample, np.full(len(sample), row), "|", color=colour, markersize=8, markeredgewidth=0.8, alpha=0.6)
        axes.errorbar(sample.mean(), row, xerr=effect.half_width, fmt=marker, color=colour, markersize=5, linewidth=1.6)
    axes.axvline(0, color="black", linewidth=0.8)
    if not of_time:
        axes.axvline(comparison.target - zero, color="black", linewidth=0.8, linestyle="--")
        axes.text(comparison.target - zero, -1, f" target {comparison.target:g}", va="center")
    for verdict, (colour, marker) in VERDICTS.items():
        axes.plot([], [], marker, color=colour, label=verdict)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="95% intervals, all at once")
    runs = [len(family.samples[name]) for name in names]
    axes.set_yticks(range(len(names)), [f"{n} ({k} run{'s'[:k - 1]})" for n, k in zip(names, runs)], parse_math=False)
    axes.set_xlabel(f"{what} less that of {comparison.baseline}", parse_math=False)
    axes.set_ylim(len(names) - 0.4, -1.6)
    axes.figure.savefig(file, bbox_inches="tight")


def spread(places: list[float], gap: float) -> np.ndarray:
    """The places in the same order, moved apart to `gap` at least."""
    moved, order = np.array(places, float), np.argsort(places, kind="stable")
    for before, i in zip(order, order[1:]):
        moved[i] = max(moved[i], moved[before] + gap)
    return moved - np.mean(moved - places) if len(places) else moved


def curves(comparison: Comparison, of_time: bool, low: float | None, high: float | None, file: Path) -> None:
    """The runs, the mean curves with their 95% intervals, and where the mean curves reach the target."""
    if len(comparison.runs) > len(COLOURS):
        raise ValueError(f"--plot draws up to {len(COLOURS)} configurations, not {len(comparison.runs)}; use --forest")
    axes = new_axes(4.5)
    axis, target, near = 2 if of_time else 0, comparison.target, comparison.curves[comparison.baseline]
    drawn = {name: comparison.finished[name] or runs for name, runs in comparison.runs.items()}
    last = [run.curve[axis][-1] for runs in drawn.values() for run in runs if len(run.curve.steps)]
    low = min([*near[axis][near.losses <= target + NEAR], *last], default=0) if low is None else low
    high = max(last, default=0) if high is None else high
    ends, marks = [], []
    for colour, (name, runs) in zip(COLOURS, drawn.items()):
        x = np.empty(0)
        for curve, width in [*((run.curve, 0.5) for run in runs), (comparison.curves[name], 1.8)]:
            if len(curve.steps):
                points = np.union1d(curve[axis], np.clip((low, high), curve[axis][0], curve[axis][-1]))
                x = points[(low <= points) & (points <= high)]
                y = np.interp(x, curve[axis], curve.losses)
                axes.plot(x, y, ".-", color=colour, linewidth=width, markersize=2 * width, alpha=min(1, width))
        if len(comparison.finished[name]) > 1 and stats:
            half = stats.sem([np.interp(x, run.curve[axis], run.curve.losses) for run in runs])
            half *= stats.t.isf(LEVEL / 2, len(runs) - 1)
            axes.fill_between(x, y - half, y + half, color=colour, alpha=0.2, linewidth=0)
        ends += [(x[-1], y[-1], name, colour)] if len(x) else []
        crossing = comparison.crossings[name]
        if crossing and not crossing.continued and low <= crossing[of_time] <= high:
            marks.append((crossing[of_time], colour))
    if not ends:
        raise ValueError("--plot: no curve comes between --from and --to")
    bottom, top = axes.get_ylim()
    if bottom - 0.25 * (top - bottom) <= target <= top + 0.25 * (top - bottom):
        bottom, top = min(bottom, target - 0.22 * (top - bottom)), max(top, target)
        axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
        axes.text(low, target, f"target {target:g}", va="bottom")
    for (x, colour), place in zip(marks, spread([x for x, _ in marks], 0.03 * (high - low))):
        axes.plot(x, target, "o", color=colour, markersize=5)
        axes.text(place, target - 0.03 * (top - bottom), f"{x:.1f}", color=colour, rotation=90, ha="center", va="top",
                  fontsize=8, bbox={"color": "white", "alpha": 0.8, "pad": 0.5})
    for (x, y, name, colour), place in zip(ends, spread([y for _, y, *_ in ends], 0.05 * (top - bottom))):
        axes.annotate(name, (x, y), (1.02, place), textcoords=axes.get_yaxis_transform(), color=colour, va="center",
                      arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.5, relpos=(0, 0.5)), parse_math=False)
    axes.set(xlabel="training time (s)" if of_time else "step", ylabel="validation loss (nats a token)")
    axes.set(xlim=(low, max(high, low + 1)), ylim=(bottom, top))
    axes.figure.savefig(file, bbox_inches="tight")
