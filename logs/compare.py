"""Compare configurations by the logs of their runs: is one better, is it real, does it pay?

    python logs/compare.py logs/published --baseline baseline_ttest --forest figure.png
    python logs/compare.py logs/baseline logs/add_2 --plot figure.png --from 5000

A PATH is a log, a folder of logs (the runs of a configuration), or a folder of such folders.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from logs import plot
from logs.results import Run, read_configurations
from logs.run_statistics import LEVEL, POWER, Comparison, deviation, record_test, runs_needed, stats

WIDTH = 110  # of the table
HEADER = (
    ["", "", "", "step to", "time to", "ms a", "loss less", "", "time less", "", ""],
    ["configuration", "runs", "final loss", "target", "it, s", "step", "baseline's", "p", "baseline's, s", "p", "verdict"],
)
Entry = dict[str, Any]


def summarise(comparison: Comparison, name: str) -> Entry:
    """A configuration's entry in --json; null where a figure is not defined. Losses in nats, times in seconds."""
    finished, own, baseline = comparison.finished[name], *map(comparison.reached, (name, comparison.baseline))
    totals = np.array([run.curve.seconds[-1] for run in finished])
    test, versus = record_test(comparison.final_losses[name], comparison.target), {}
    for measure, family in (("loss", comparison.loss), ("time", comparison.time)):
        difference, half, p = family.effects[name]
        bounds = (None, None) if half is None else (difference - half, difference + half)
        keys = f"delta_{measure}", f"delta_{measure}_low", f"delta_{measure}_high", f"p_{measure}"
        versus |= zip(keys, (difference, *bounds, p))
    return dict(
        name=name, runs=len(finished), num_iterations=comparison.runs[name][0].num_iterations,
        final_loss_mean=test["mean"], final_loss_std=test["std"],
        steps_to_target=own and own.step, time_to_target=own and own.seconds,
        total_time_mean=float(totals.mean()) if finished else None, total_time_std=deviation(totals),
        step_avg_ms=float(np.mean([run.step_avg_ms for run in finished])) if finished else None,
        break_even_step_ms=1000 * baseline.seconds / own.step if own and baseline and own.step else None,
        missed=sum(crossing is None or crossing.continued for crossing in comparison.run_crossings[name]),
        t_test=test, versus_baseline=None if name == comparison.baseline else versus,
    )


def number(value: float | None, form: str, spread: float | None = None) -> str:
    """A number, with ± its deviation or half-width if it has one."""
    return "n/a" if value is None else format(value, form) + ("" if spread is None else f" ±{spread:{form.strip('+')}}")


def table_row(comparison: Comparison, entry: Entry) -> list[str]:
    name, crossing = entry["name"], comparison.crossings[entry["name"]]
    loss, time = comparison.loss.effects[name], comparison.time.effects[name]
    cells = [name, str(entry["runs"]), number(entry["final_loss_mean"], ".4f", entry["final_loss_std"])]
    cells += [number(crossing and crossing.step, ".0f"), number(crossing and crossing.seconds, ".1f")]
    cells += [number(entry["step_avg_ms"], ".1f")]
    cells[-2] += "*" if crossing and crossing.continued else " "
    if name == comparison.baseline:
        return [*cells, "", "", "", "", "baseline"]
    for effect, form in ((loss, "+.4f"), (time, "+.1f")):
        cells.append(number(effect.difference, form, effect.half_width))
        cells.append("<.001" if effect.p is not None and effect.p < 0.001 else number(effect.p, ".3f"))
    shown = [f"{e.verdict} {what}" for e, what in ((loss, "loss"), (time, "time")) if e.verdict in ("better", "worse")]
    if len(shown) == 1:
        return [*cells, shown[0]]
    return [*cells, "mixed" if shown and loss.verdict != time.verdict else time.verdict]


def table(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Columns as wide as their widest cell; names are cut where the table would be wider than WIDTH."""
    if markdown:
        rows = [[" ".join(words).strip() for words in zip(*HEADER)], ["---"] + ["---:"] * 10, *rows]
        return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows)
    rows = [*HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    widths[0] = max(min(widths[0], WIDTH - sum(widths[1:]) - len(widths) + 1), 8)
    names = [(row[0] if len(row[0]) <= widths[0] else f"{row[0][:widths[0] - 1]}…").ljust(widths[0]) for row in rows]
    return "\n".join(" ".join([name, *map(str.rjust, row[1:], widths[1:])]).rstrip() for name, row in zip(names, rows))


def describe_open(comparison: Comparison, run: Run) -> str:
    """How a run stands that diverged or has not finished."""
    if run.diverged_at is not None or not len(run.curve.steps):
        return f"; {run.path.name} " + ("has begun" if run.diverged_at is None else f"diverged at step {run.diverged_at}")
    step, loss, baseline = run.curve.steps[-1], run.curve.losses[-1], comparison.stacks[comparison.baseline]
    theirs = baseline.losses[:, baseline.steps == step].ravel()
    there = f" (the baseline's there: {theirs.mean():.6f})" if len(theirs) else ""
    return f"; {run.path.name} is at step {step:.0f} of {run.num_iterations} with loss {loss:.6f}{there}"


def sentence(comparison: Comparison, entry: Entry) -> str:
    """What the table does not say of a configuration."""
    name, test = entry["name"], entry["t_test"]
    verdicts = f"loss {comparison.loss.effects[name].verdict}, time {comparison.time.effects[name].verdict}"
    text = f"{name}: {'the baseline' if name == comparison.baseline else verdicts}"
    if entry["break_even_step_ms"] is not None:
        spent = 1000 * entry["time_to_target"] / entry["steps_to_target"]
        text += f"; takes {spent:.2f} ms a step to the target, ties at {entry['break_even_step_ms']:.2f}"
    text += f"; {entry['missed']} of {entry['runs']} would reach it later" if entry["missed"] else ""
    text += f"; total {number(entry['total_time_mean'], '.1f', entry['total_time_std'])} s" if entry["runs"] else ""
    if test["p"] is not None:
        text += f"; record: {'yes' if test['record'] else 'no'}"
        text += f" (t {test['t']:.3f}, p {test['p']:.3g}, bound {test['upper_bound']:.6f})"
    return text + "".join(describe_open(comparison, run) for run in comparison.runs[name] if not run.finished)


def notes(comparison: Comparison, delta: float | None) -> list[str]:
    """What a reader of the table has to know, once."""
    lines = []
    for what, unit, family in (("loss", "nats", comparison.loss), ("time", "s", comparison.time)):
        tests, spread = len(family.effects), family.deviation
        if not stats or not spread:
            why = "two runs that differ, of any configuration" if stats else f"scipy: {plot.INSTALL}"
            lines.append(f"No test of {what}; it takes {why}.")
        elif tests:
            lines.append(f"{what}: Dunnett's test of {tests}, deviation {spread:.3g} {unit}, {family.freedom} degrees of freedom.")
        if (family.variance_p or 1) < 0.01:
            lines.append(f"Warning: deviations in {what} differ (Brown-Forsythe, p {family.variance_p:.2g}): its p are rough.")
    if delta and stats and comparison.loss.deviation:
        effect = delta / comparison.loss.deviation
        several = max(len(comparison.loss.effects), 1)
        lines.append(f"A difference of {delta:g} in loss takes {runs_needed(effect, LEVEL)} runs of each to be shown with "
                     f"power {POWER}, {runs_needed(effect, LEVEL / several)} if it is one of {several} that are compared.")
    return lines


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises ValueError if options mean nothing or do not fit together."""
    about, _, details = __doc__.partition("\n\n")
    parser = Parser("compare.py", description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", type=Path)
    add("--target", type=float, default=2.92, metavar="LOSS", help="validation loss to reach (default 2.92)")
    add("--baseline", metavar="NAME", help="what the others are compared with (default: baseline, else the first)")
    add("--power", type=float, metavar="LOSS", help="say how many runs it takes to show this difference in final loss")
    for kind in ("json", "csv", "markdown"):
        add(f"--{kind}", dest="form", action="store_const", const=kind, help=f"write {kind}")
    add("--forest", type=Path, metavar="FILE", help="draw all differences (.png, .svg or .pdf)")
    add("--plot", type=Path, metavar="FILE", help="draw the curves of a few configurations")
    add("--x", choices=["step", "time"], default="step", help="time: --forest of times, --plot over time")
    add("--from", type=float, dest="low", metavar="X", help="--plot: begin at this step or second")
    add("--to", type=float, dest="high", metavar="X", help="--plot: end there")
    options = parser.parse_args(arguments)
    for name in ("target", "power", "low", "high"):
        if getattr(options, name) is not None and not np.isfinite(getattr(options, name)):
            raise ValueError(f"--{name}: give a finite number")
    if options.power is not None and options.power <= 0:
        raise ValueError("--power: give a difference in loss above 0")
    if None not in (options.low, options.high) and options.low >= options.high:
        raise ValueError("--from must be below --to")
    return options


def report(comparison: Comparison, options: argparse.Namespace, entries: Sequence[Entry]) -> str:
    """The table, a sentence a configuration, and notes."""
    ends = [crossing for found in comparison.run_crossings.values() for crossing in found]
    reached = sum(crossing is not None and not crossing.continued for crossing in ends)
    by_time = 2 * reached > len(ends)
    if by_time:
        key = {name: crossing.seconds if crossing else math.inf for name, crossing in comparison.crossings.items()}
    else:
        key = {entry["name"]: entry["final_loss_mean"] or math.inf for entry in entries}
    ordered = sorted(entries, key=lambda entry: key[entry["name"]])
    title = f"Baseline: {comparison.baseline}. Target: {comparison.target:g}, reached by {reached} of {len(ends)} runs."
    sentences = [sentence(comparison, e) for e in sorted(ordered, key=lambda e: e["name"] != comparison.baseline)]
    rows = table([table_row(comparison, entry) for entry in ordered], options.form == "markdown")
    return "\n\n".join([title, rows, *("\n".join(lines) for lines in (sentences, notes(comparison, options.power)))])


def as_csv(comparison: Comparison) -> str:
    """All validations of all runs, also of those that have not ended or diverged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["configuration", "run", "step", "num_iterations", "val_loss", "train_time_ms"])
    for name, run in ((name, run) for name, runs in comparison.runs.items() for run in runs):
        for step, loss, seconds in zip(*run.curve):
            writer.writerow([name, run.path.name, int(step), run.num_iterations, loss, round(1000 * seconds)])
    return text.getvalue().rstrip()


def run(options: argparse.Namespace) -> str:
    """What to print on standard output. Raises ValueError or OSError if nothing can be shown."""
    runs, lines = read_configurations(options.paths)
    for line in lines:
        complain(line)
    if not runs:
        raise ValueError("no results to compare")
    baseline = options.baseline or next((name for name in runs if name.split("/")[-1] == "baseline"), next(iter(runs)))
    comparison = Comparison(runs, baseline, options.target)
    if options.form == "csv":
        return as_csv(comparison)
    if options.forest:
        plot.forest(comparison, options.x == "time", options.forest)
    if options.plot:
        plot.curves(comparison, options.x == "time", options.low, options.high, options.plot)
    entries = [summarise(comparison, name) for name in runs]
    if options.form == "json":
        whole = {"target": options.target, "baseline": baseline, "configurations": entries}
        return json.dumps(whole, indent=2, allow_nan=False)
    return report(comparison, options, entries)


def complain(text: str) -> None:
    """A line on standard error."""
    print(f"compare.py: {' '.join(text.split())}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names can be of any bytes, terminals of any encoding
    try:
        print(run(parse(arguments)), flush=True)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
