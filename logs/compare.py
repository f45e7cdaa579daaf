"""Compare configurations by the logs of their runs: is one better, is it real, does it pay?

    python logs/compare.py logs/published --baseline baseline_ttest --forest figure.png

A PATH is a log, a folder of logs (the runs of a configuration), or a folder of such folders.
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.keys import OneLineParser
from logs import plot
from logs.results import Run, read_configurations
from logs.run_statistics import LEVEL, POWER, Comparison, Effect, deviation, record_test, runs_needed, stats

WIDTH = 110
HEADER = (["", "", "", "", "", "ms a", "loss change", "", "time change", "", ""],
          ["name", "runs", "final loss", "step", "time, s", "step", "1e-3 nats", "p", "s", "p", "verdict"])


def summarise(comparison: Comparison, name: str) -> dict[str, Any]:
    """A configuration's entry in --json; null where a figure is not defined. Losses in nats, times in seconds."""
    finished, crossings = comparison.finished[name], comparison.crossings
    own, baseline = (c if c and not c.continued else None for c in (crossings[name], crossings[comparison.baseline]))
    totals = np.array([run.curve.seconds[-1] for run in finished])
    test, versus = record_test(comparison.losses[name], comparison.target), {}
    for measure, effect in zip(("loss", "time"), comparison.effects(name)):
        difference, half, p = effect
        versus |= {f"delta_{measure}": difference, f"delta_{measure}_low": None if half is None else difference - half,
                   f"delta_{measure}_high": None if half is None else difference + half, f"p_{measure}": p}
    return dict(
        name=name, runs=len(finished), num_iterations=comparison.runs[name][0].num_iterations,
        final_loss_mean=test["mean"], final_loss_std=test["std"],
        steps_to_target=own and own.step, time_to_target=own and own.seconds,
        total_time_mean=float(totals.mean()) if finished else None, total_time_std=deviation(totals),
        step_avg_ms=float(np.mean([run.step_avg_ms for run in finished])) if finished else None,
        break_even_step_ms=1000 * baseline.seconds / own.step if own and baseline and own.step else None,
        missed=sum(crossing is None or crossing.continued for crossing in comparison.own_crossings[name]),
        t_test=test, versus_baseline=None if name == comparison.baseline else versus,
    )


def number(value: float | None, form: str, spread: float | None = None) -> str:
    """A number, with ± its deviation or half-width if it has one."""
    return "n/a" if value is None else f"{value:{form}}" + ("" if spread is None else f" ±{spread:{form.strip('+')}}")


def table_row(comparison: Comparison, entry: dict[str, Any]) -> list[str]:
    name, crossing = entry["name"], comparison.crossings[entry["name"]]
    mark = "*" if crossing and crossing.continued else " "
    cells = [name, str(entry["runs"]), number(entry["final_loss_mean"], ".4f", entry["final_loss_std"]),
             number(crossing and crossing.step, ".0f"), number(crossing and crossing.seconds, ".1f") + mark,
             number(entry["step_avg_ms"], ".1f")]
    if name == comparison.baseline:
        return [*cells, "", "", "", "", "baseline"]
    loss, time = comparison.effects(name)
    thousandths = Effect(*(None if x is None else 1000 * x for x in loss[:2]))
    for (difference, half, _), p, form in ((thousandths, loss.p, "+.2f"), (time, time.p, "+.1f")):
        cells += [number(difference, form, half), "<.001" if p is not None and p < 0.001 else number(p, ".3f")]
    shown = [f"{e.verdict} {what}" for e, what in ((loss, "loss"), (time, "time")) if e.verdict in ("better", "worse")]
    mixed = "mixed" if shown and loss.verdict != time.verdict else time.verdict
    return [*cells, shown[0] if len(shown) == 1 else mixed]


def table(rows: list[list[str]], markdown: bool) -> str:
    """Columns as wide as their widest cell; names are cut where the table would be wider than WIDTH."""
    if markdown:
        rows = [[" ".join(words).strip() for words in zip(*HEADER)], ["---"] + ["---:"] * 10, *rows]
        return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows)
    rows = [*HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    first = max(min(widths[0], WIDTH - sum(widths[1:]) - len(widths) + 1), 8)
    lines = [[f"{name:{first}.{first}}", *map(str.rjust, cells, widths[1:])] for name, *cells in rows]
    return "\n".join(" ".join(line).rstrip() for line in lines)


def describe_open(comparison: Comparison, run: Run) -> str:
    """How a run stands that diverged or has not finished."""
    curve, baseline = run.curve, comparison.curves[comparison.baseline]
    if run.diverged_at is not None:
        return f"{run.path.name} diverged at step {run.diverged_at}"
    if not len(curve.steps) or not len(baseline.steps):
        return f"{run.path.name} is not finished"
    there = np.interp(curve.steps[-1], baseline.steps, baseline.losses, right=np.nan)
    return (f"{run.path.name} is at step {curve.steps[-1]:.0f} of {run.num_iterations} with loss "
            f"{curve.losses[-1]:.6f}, {curve.losses[-1] - there:+.6f} on the baseline")


def sentence(comparison: Comparison, entry: dict[str, Any]) -> str:
    """What the table does not say of a configuration."""
    name, test, even = entry["name"], entry["t_test"], entry["break_even_step_ms"]
    loss, time = comparison.effects(name)
    parts = ["the baseline" if name == comparison.baseline else f"loss {loss.verdict}, time {time.verdict}"]
    if even is not None and name != comparison.baseline:
        spent = 1000 * entry["time_to_target"] / entry["steps_to_target"]
        parts.append(f"{spent:.2f} ms a step to the target, ties with the baseline at {even:.2f}")
    parts += [f"{entry['missed']} of {entry['runs']} would reach the target later"] if entry["missed"] else []
    total = number(entry["total_time_mean"], ".1f", entry["total_time_std"])
    parts += [f"{total} s for {entry['num_iterations']} steps"] if entry["runs"] else []
    if test["p"] is not None:
        figures = f"t {test['t']:.2f}, p {test['p']:.3g}, 95% bound {test['upper_bound']:.6f}"
        parts.append(f"record: {'yes' if test['record'] else 'no'} ({figures})")
    parts += [describe_open(comparison, run) for run in comparison.runs[name] if not run.finished]
    return f"{name}: {'; '.join(parts)}"


def notes(comparison: Comparison, delta: float | None) -> list[str]:
    """What a reader of the table has to know, once."""
    lines = ["step, time: where the mean curve reaches the target; * would reach it, going on as the baseline's ends.",
             "time change: of the runs' own times, going on likewise. better, worse: p < 0.05; record: p < 0.01."]
    for what, unit, family in (("loss", "nats", comparison.loss), ("time", "s", comparison.time)):
        if not stats or not family.deviation:
            missing = "two runs of a configuration" if stats else "scipy: pip install -r logs/requirements.txt"
            lines.append(f"No test of {what}: that takes {missing}.")
        elif family.effects:
            lines.append(f"{what}: ± and p by Dunnett's test, {len(family.effects)} at once; deviation "
                         f"{family.deviation:.3g} {unit}, {family.freedom} degrees of freedom.")
        if family.variance_p < 0.01:
            lines.append(f"Warning: {what} varies unequally (Brown-Forsythe p {family.variance_p:.1g}), p is rough.")
    if delta and stats and comparison.loss.deviation:
        effect, tests = delta / comparison.loss.deviation, max(len(comparison.loss.effects), 1)
        lines.append(f"To show {delta:g} in loss with power {POWER} takes {runs_needed(effect, LEVEL)} runs of both, "
                     f"{runs_needed(effect, LEVEL / tests)} where {tests} are compared.")
    return lines


def report(comparison: Comparison, entries: list[dict[str, Any]], markdown: bool, delta: float | None) -> str:
    """The table, sorted by time where most runs reach the target, else by loss; a sentence a configuration; notes."""
    runs, missed = (sum(entry[key] for entry in entries) for key in ("runs", "missed"))
    place = {name: crossing.seconds if crossing else np.inf for name, crossing in comparison.crossings.items()}
    if 2 * missed >= runs:
        place = {entry["name"]: entry["final_loss_mean"] or np.inf for entry in entries}
    ordered = sorted(entries, key=lambda entry: place[entry["name"]])
    title = f"Baseline: {comparison.baseline}. Target: {comparison.target:g}; {runs - missed} of {runs} runs reach it."
    sentences = [sentence(comparison, e) for e in sorted(ordered, key=lambda e: e["name"] != comparison.baseline)]
    rows = table([table_row(comparison, entry) for entry in ordered], markdown)
    return "\n\n".join([title, rows, "\n".join(sentences), "\n".join(notes(comparison, delta))])


def write_csv(configurations: dict[str, list[Run]]) -> None:
    """All validations of all runs, also of those that have not ended or diverged."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["configuration", "run", "step", "num_iterations", "val_loss", "train_time_ms"])
    for name, r in ((name, run) for name, runs in configurations.items() for run in runs):
        writer.writerows([name, r.path.name, int(x), r.num_iterations, y, round(1000 * t)] for x, y, t in zip(*r.curve))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises ValueError if options mean nothing or do not fit together."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", type=Path)
    add("--target", type=float, default=2.92, metavar="LOSS", help="validation loss to reach (default 2.92)")
    add("--baseline", metavar="NAME", help="what the others are compared with (default: baseline, else the first)")
    add("--power", type=float, metavar="LOSS", help="say how many runs it takes to show this difference in final loss")
    for form in ("json", "csv", "markdown"):
        add(f"--{form}", dest="form", action="store_const", const=form, help=f"write {form}")
    add("--forest", type=Path, metavar="FILE", help="draw all differences in loss (.png, .svg or .pdf)")
    add("--plot", type=Path, metavar="FILE", help="draw the curves of up to eight configurations")
    add("--x", choices=["step", "time"], default="step", help="time: --forest of times, --plot over time")
    add("--from", type=float, dest="low", metavar="X", help="--plot: begin at this step or second")
    add("--to", type=float, dest="high", metavar="X", help="--plot: end there")
    options = parser.parse_args(arguments)
    for name, value in (("--target", options.target), ("--power", options.power)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"{name}: give a number above 0")
    return options


def main(arguments: list[str]) -> int:
    try:
        sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the caller
        options = parse(arguments)
        runs, lines = read_configurations(options.paths)
        if not runs:
            raise ValueError(f"no results to compare: {'; '.join(lines)}")
        print(*(f"compare.py: {' '.join(line.split())}\n" for line in lines), sep="", end="", file=sys.stderr)
        baseline = options.baseline or next((n for n in runs if n.split("/")[-1] == "baseline"), next(iter(runs)))
        if options.form == "csv":
            write_csv(runs)
            return 0
        comparison = Comparison(runs, baseline, options.target)
        if options.forest:
            plot.forest(comparison, options.x == "time", options.forest)
        if options.plot:
            plot.curves(comparison, options.x == "time", options.low, options.high, options.plot)
        entries = [summarise(comparison, name) for name in runs]
        whole = dict(target=options.target, baseline=baseline, configurations=entries)
        table_and_text = report(comparison, entries, options.form == "markdown", options.power)
        print(json.dumps(whole, indent=2, allow_nan=False) if options.form == "json" else table_and_text, flush=True)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"compare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
