"""Plot all differences from the baseline (forest), the curves of a few configurations, and a grid of tables."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from logs.log_format import RUN_KEYS, differences
from logs.run_log import plural
from logs.run_statistics import LEVEL, Comparison, Effect, Family, Ranking

# From Okabe and Ito's palette, safe for color-blind readers: https://jfly.uni-koeln.de/color/
VERDICTS = {"better": ("#0072B2", "o"), "worse": ("#D55E00", "s"), "undecided": ("#7F7F7F", "D")}
COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255"]
QUESTIONS = ("baseline", "more tables", "fewer tables", "shared by neighbors", "shifted", "other sources", "other keys",
             "")
NUM_LAYERS, NO_ATTENTION_LAYER = 16, 7  # as in configs/checks.py, which this package must not import
DEFAULTS = {"value_embeddings_only": [], "value_embedding_gate": False, "value_embedding_std": 1.0,  # the script's
            "value_embedding_lr": 0.3, "value_embedding_weight_decay": 0.0, "value_embedding_betas": [0.8, 0.95]}
SUFFIXES = (".png", ".svg", ".pdf")
NEAR = 0.05  # nats above the target, where --plot starts
MAX_BANDS = 3
DPI, WIDTH, MAX_HEIGHT = 100, 12, 9  # inches


def new_axes(height: float, columns: int = 1) -> list[Any]:
    """Return the axes of a new figure."""
    from matplotlib.figure import Figure  # needs no display; importing it takes a second

    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    for axes in figure.subplots(1, columns, squeeze=False)[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.92")
    return figure.axes


def layers_of(keys: dict[str, Any]) -> list[list[int]]:
    """Return the layers of each source of values."""
    return [entry["layers"] if isinstance(entry, dict) else entry for entry in keys.get("value_embeddings", [])]


def question(keys: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Return one of QUESTIONS: what a configuration changes."""
    if "value_embeddings" not in keys or "value_embeddings" not in baseline:
        return ""
    keys, baseline = DEFAULTS | keys, DEFAULTS | baseline
    is_one_sided = ("run_id" in keys) != ("run_id" in baseline)  # a header has every key, a config only some
    unknown = keys.keys() ^ baseline.keys() if is_one_sided else set()
    if differences(baseline, keys, RUN_KEYS | {"value_embeddings"} | unknown):
        return "other keys"
    if any(isinstance(entry, dict) for entry in keys["value_embeddings"]):
        return "other sources"
    tables, own = layers_of(keys), layers_of(baseline)
    if tables == own:
        return "baseline"
    if any(len(layers) > 1 and (max(layers) < NUM_LAYERS // 2 or min(layers) >= NUM_LAYERS // 2) for layers in tables):
        return "shared by neighbors"
    more = sum(map(len, tables)) - sum(map(len, own)) or len(tables) - len(own)
    return "more tables" if more > 0 else "fewer tables" if more < 0 else "shifted"


def draw_map(axes: Any, row: int, keys: dict[str, Any]) -> None:
    """Draw a cell per layer in the colors of its tables; a layer without any is gray, one without attention empty."""
    for layer in {*range(NUM_LAYERS)} - {NO_ATTENTION_LAYER}:
        colors = [COLORS[k % len(COLORS)] for k, layers in enumerate(layers_of(keys)) if layer in layers] or ["0.9"]
        bottoms = np.linspace(row - 0.4, row + 0.4, len(colors), endpoint=False)
        axes.barh(bottoms, 0.85, 0.8 / len(colors), layer, align="edge", color=colors)


def forest(comparison: Comparison, of_time: bool, file: Path) -> None:
    """Plot a row per configuration, grouped by question: its map, its difference, the interval, a tick for each run."""
    family, what, unit = (comparison.time, "time to the target", "s") if of_time else (
        comparison.loss, "final loss", "1e-3 nats")
    if comparison.baseline not in family.samples:
        raise ValueError(f"--forest: the baseline {comparison.baseline} has no {what}")
    scale, zero = 1 if of_time else 1000, family.samples[comparison.baseline].mean()
    keys = {name: comparison.keys[name] for name in family.samples}
    groups = defaultdict(list)
    groups["baseline"].append(comparison.baseline)
    for name in sorted(family.effects, key=lambda name: family.samples[name].mean()):
        groups[question(keys[name], keys[comparison.baseline])].append(name)
    rows = [row for group in QUESTIONS if group in groups for row in [group, *groups[group]]][1:]
    height = min(MAX_HEIGHT, 1.8 + 0.24 * len(rows))
    inner = height - 1.44  # inches, without the title, the axis and the note
    cells, axes = new_axes(height, columns=2)
    axes.set_position([0.39, 0.9 / height, 0.5, inner / height])
    cells.set_position([0.21, 0.9 / height, 0.17, inner / height])
    size = min(10, 0.75 * 72 * inner / len(rows))
    text = dict(va="center", fontsize=size, parse_math=False)
    for i, name in enumerate(rows):
        cells.text(-0.5, i, name, ha="right", weight="normal" if name in keys else "bold", **text)
        if name not in keys:
            continue
        effect, sample = family.effects.get(name, Effect()), scale * (family.samples[name] - zero)
        color, marker = VERDICTS.get(effect.verdict, ("#000000", "D"))
        half = None if effect.half_width is None else scale * effect.half_width
        axes.plot(sample, np.full(len(sample), i), "|", color=color, markersize=size, markeredgewidth=0.9, alpha=0.6)
        axes.errorbar(sample.mean(), i, xerr=half, fmt=marker, color=color, markersize=size * 0.7, linewidth=1.6)
        figures = f"{round(sample.mean(), 1) + 0.0:+.1f}   n={len(sample)}"
        axes.text(1.01, i, figures, transform=axes.get_yaxis_transform(), **text)
        if "value_embeddings" in keys[name]:
            draw_map(cells, i, keys[name])
    axes.axvline(0, color="black", linewidth=0.8)
    for verdict, (color, marker) in VERDICTS.items():
        axes.plot([], [], marker, color=color, label=verdict)
    axes.figure.legend(loc="upper right", ncols=3, fontsize=10, frameon=False)
    title = f"against {comparison.baseline}; 95% simultaneous intervals (Dunnett), a tick per run"
    axes.figure.text(0.01, 0.985, title, va="top", fontsize=10, parse_math=False)
    left_out = [name for name in comparison.runs if comparison.finished[name] and name not in family.samples]
    why = f"{'too far from the target' if of_time else 'of another length'} or validated otherwise"
    note = f"not compared, {why}: {', '.join(left_out)}" if left_out else ""
    axes.figure.text(0.01, 0.01, note, fontsize=8, wrap=True, parse_math=False)
    axes.set_xlabel(f"change in {what} ({unit}, lower is better)")
    cells.set_xlabel("layers 0 to 15, a color per table")
    for part in (axes, cells):
        part.set(yticks=[], ylim=(len(rows) - 0.4, -0.6))
    cells.set(xlim=(0, NUM_LAYERS), xticks=[])
    cells.spines[:].set_visible(False)
    axes.figure.savefig(file)


def curves(comparison: Comparison, of_time: bool, low: float | None, high: float | None, file: Path) -> None:
    """Plot the mean curves, up to MAX_BANDS with their 95% intervals, else with the runs. Name their crossings."""
    if len(comparison.runs) > len(COLORS):
        raise ValueError(f"--plot takes at most {len(COLORS)} configurations, not {len(comparison.runs)}; use --forest")
    (axes,) = new_axes(6)
    axis, target, near = 2 if of_time else 0, comparison.target, comparison.curves[comparison.baseline]
    drawn = {name: comparison.finished[name] or runs for name, runs in comparison.runs.items()}
    last = [run.curve[axis][-1] for runs in drawn.values() for run in runs if len(run.curve.steps)]
    low = min([*near[axis][near.losses <= target + NEAR], *last], default=0) if low is None else low
    high = max(last, default=0) if high is None else high
    repeated = [runs for runs in comparison.finished.values() if len(runs) > 1]
    has_bands, ends = repeated and len(drawn) <= MAX_BANDS, []
    for color, (name, runs) in zip(COLORS, drawn.items()):
        is_banded, reached, line = has_bands and comparison.finished[name], comparison.crossings[name].reached, None
        thin = [] if is_banded else [(run.curve, 0.5) for run in runs]
        for curve, width in [*thin, (comparison.curves[name], 1.8)]:
            if len(curve.steps) and max(low, curve[axis][0]) <= min(high, curve[axis][-1]):
                x = np.unique(np.clip(curve[axis], low, high))
                y = np.interp(x, curve[axis], curve.losses)
                (line,) = axes.plot(x, y, ".-", color=color, linewidth=width, markersize=2 * width, alpha=min(1, width))
        if line and is_banded:
            values = [[np.interp(x, run.curve[axis], run.curve.losses) for run in group] for group in repeated]
            squares, dof = sum(np.var(group, axis=0) * len(group) for group in values), sum(map(len, repeated))
            half = stats.t.isf(LEVEL / 2, dof - len(repeated)) * np.sqrt(squares / (dof - len(repeated)) / len(runs))
            axes.fill_between(x, y - half, y + half, color=color, alpha=0.2, linewidth=0)
        if line:
            label = name if name in comparison.alike else f"{name} (other validation)"
            label += "" if reached.step is None else f"\n{target:g} at {reached[of_time]:.1f}"
            ends.append((y[-1], line, label))
    if not ends:
        raise ValueError("--plot: no curve is between --from and --to")
    axes.set_ylim(axes.get_ylim())  # a target far below must not flatten the curves
    axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
    axes.text(low, target, f"target {target:g}", va="bottom", clip_on=True)
    _, lines, labels = zip(*sorted(ends, key=lambda end: -end[0]))  # in the order in which the curves end
    shown = "shaded: 95% interval of\nthe mean, pooled deviation" if has_bands else "thick: mean of the runs"
    axes.legend(lines, [label.replace("$", r"\$") for label in labels], loc="upper left", bbox_to_anchor=(1, 1),
                title=shown)
    axes.set(xlabel="training time (s)" if of_time else "step", ylabel="validation loss (nats per token)",
             xlim=(low, max(high, low + 1)))
    axes.figure.savefig(file, bbox_inches="tight")


def scatter(small: Family, large: Family, ranking: Ranking, file: Path) -> None:
    """Plot each configuration's mean loss in two families, with standard errors."""
    (axes,) = new_axes(7)
    for name in ranking.names:
        (x, dx), (y, dy) = ((family.samples[name].mean(), family.deviation / len(family.samples[name]) ** 0.5)
                            for family in (large, small))
        axes.errorbar(x, y, dy, dx, fmt="o", color=COLORS[1], markersize=4, linewidth=0.8)
        axes.annotate(name, (x, y), (4, 3), textcoords="offset points", fontsize=8, parse_math=False)
    axes.set(xlabel="final loss, --against (nats; bars: standard errors)", ylabel="final loss, PATH (nats)",
             title=f"Spearman's correlation {ranking.rho:.2f}, 95% {ranking.low:.2f} to {ranking.high:.2f}, "
                   f"{len(ranking.names)} configurations")
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
    row[0].figure.tight_layout()
    row[0].figure.savefig(file, bbox_inches="tight")
