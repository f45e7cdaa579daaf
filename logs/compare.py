"""Compare configurations by the logs of their runs: is one better, is it real, does it pay?

    python logs/compare.py logs/published --baseline baseline_ttest --forest figure.png

A PATH is a log, a folder of logs (the runs of a configuration), or a folder of such folders.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from logs import plot
from logs.results import Result, list_changes, read_configurations
from logs.run_log import say
from logs.run_statistics import LEVEL, POWER, Comparison, Effect, deviation, record_test, runs_needed, stats

WIDTH = 110
HEADER = (["", "", "", "", "", "ms /", "loss change", "", "time change", "", ""],
          ["name", "runs", "final loss", "step", "time, s", "step", "1e-3 nats", "p", "s", "p", "verdict"])


def summarize(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return a configuration's entry in --json: losses in nats, times in seconds, null for undefined figures."""
    finished, crossings = comparison.finished[name], comparison.crossings
    own, baseline = (c if c and not c.extrapolated else None for c in (crossings[name], crossings[comparison.baseline]))
    totals = np.array([run.curve.seconds[-1] for run in finished])
    test, versus = record_test(comparison.losses[name], comparison.target), {}
    for measure, (difference, half, p) in zip(("loss", "time"), comparison.effects(name)):
        versus |= {f"delta_{measure}": difference, f"delta_{measure}_low": None if half is None else difference - half,
                   f"delta_{measure}_high": None if half is None else difference + half, f"p_{measure}": p}
    return dict(
        name=name, runs=len(finished), num_iterations=comparison.runs[name][0].num_iterations,
        final_loss_mean=test["mean"], final_loss_std=test["std"],
        steps_to_target=own and own.step, time_to_target=own and own.seconds,
        total_time_mean=float(totals.mean()) if finished else None, total_time_std=deviation(totals),
        step_avg_ms=float(np.mean([run.step_avg_ms for run in finished])) if finished else None,
        break_even_step_ms=1000 * baseline.seconds / own.step if own and baseline and own.step else None,
        missed=sum(crossing is None or crossing.extrapolated for crossing in comparison.own_crossings[name]),
        t_test=test, versus_baseline=None if name == comparison.baseline else versus)


def number(value: float | None, form: str, spread: float | None = None) -> str:
    """Format a number, with ± its deviation or half-width if it has one."""
    return "n/a" if value is None else f"{value:{form}}" + ("" if spread is None else f"±{spread:{form.strip('+')}}")


def table_row(comparison: Comparison, entry: dict[str, Any]) -> list[str]:
    name, crossing = entry["name"], comparison.crossings[entry["name"]]
    mark = "*" if crossing and crossing.extrapolated else " "
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


def format_table(rows: list[list[str]], markdown: bool) -> str:
    """Make columns as wide as their widest cell; cut names so that the table fits WIDTH."""
    if markdown:
        rows = [[" ".join(words).strip() for words in zip(*HEADER)], ["---"] + ["---:"] * 10, *rows]
        return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows)
    rows = [*HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    first = max(min(widths[0], WIDTH - sum(widths[1:]) - len(widths) + 1), 8)
    lines = [[f"{name:{first}.{first}}", *map(str.rjust, cells, widths[1:])] for name, *cells in rows]
    return "\n".join(" ".join(line).rstrip() for line in lines)


def describe_unfinished(comparison: Comparison, run: Result) -> str:
    """Describe where a run diverged, or how far an unfinished run is."""
    curve, baseline = run.curve, comparison.curves[comparison.baseline]
    if run.diverged_at is not None:
        return f"{run.path.name} diverged at step {run.diverged_at}"
    if not len(curve.steps) or not len(baseline.steps):
        return f"{run.path.name} is not finished"
    there = np.interp(curve.steps[-1], baseline.steps, baseline.losses, right=np.nan)
    return (f"{run.path.name} is at step {curve.steps[-1]:.0f} of {run.num_iterations} with loss "
            f"{curve.losses[-1]:.6f}, {curve.losses[-1] - there:+.6f} relative to the baseline")


def sentence(comparison: Comparison, entry: dict[str, Any]) -> str:
    """Describe a configuration in one line: what the table has no room for."""
    name, test, even = entry["name"], entry["t_test"], entry["break_even_step_ms"]
    loss, time = comparison.effects(name)
    parts = ["the baseline" if name == comparison.baseline else f"loss {loss.verdict}, time {time.verdict}"]
    if even is not None and name != comparison.baseline:
        spent = 1000 * entry["time_to_target"] / entry["steps_to_target"]
        parts.append(f"{spent:.2f} ms per step to the target, break-even at {even:.2f}")
    if entry["missed"]:
        parts.append(f"{entry['missed']} of {entry['runs']} do not reach the target")
    if entry["runs"]:
        total = number(entry["total_time_mean"], ".1f", entry["total_time_std"])
        parts.append(f"{total} s for {entry['num_iterations']} steps")
    if test["p"] is not None:
        figures = f"t {test['t']:.2f}, p {test['p']:.3g}, 95% bound {test['upper_bound']:.6f}"
        parts.append(f"record: {'yes' if test['record'] else 'no'} ({figures})")
    parts += [describe_unfinished(comparison, run) for run in comparison.runs[name] if not run.finished]
    return f"{name}: {'; '.join(parts)}"


def changes(comparison: Comparison) -> str:
    """List in a line per configuration what differs from the baseline. Without any header there is nothing to list."""
    baseline = comparison.runs[comparison.baseline][0]
    return "\n".join(f"{name} against {comparison.baseline}: {'; '.join(list_changes(baseline, run)) or 'no change'}"
                     for name, (run, *_) in comparison.runs.items()
                     if run is not baseline and (any(run.header) or any(baseline.header)))


def notes(comparison: Comparison, delta: float | None) -> str:
    """Explain the table and the tests."""
    lines = ["step, time: where the mean curve reaches the target; *: extrapolated with the baseline's final slope.",
             "time change: of the mean of the runs' own times. better, worse: p < 0.05; record: p < 0.01."]
    for what, unit, family in (("loss", "nats", comparison.loss), ("time", "s", comparison.time)):
        if not stats or not family.deviation:
            missing = "two runs of a configuration" if stats else "scipy: pip install -r logs/requirements.txt"
            lines.append(f"No test of {what}: it needs {missing}.")
        elif family.effects:
            lines.append(f"{what}: ± and p by Dunnett's test, {len(family.effects)} at once; deviation "
                         f"{family.deviation:.3g} {unit}, {family.dof} degrees of freedom.")
        if family.variance_p < 0.01:
            lines.append(f"Warning: variances of {what} differ (Brown-Forsythe p {family.variance_p:.1g}); p is rough.")
    if delta and stats and comparison.loss.deviation:
        effect, tests = delta / comparison.loss.deviation, max(len(comparison.loss.effects), 1)
        lines.append(f"To show {delta:g} in loss with power {POWER} takes {runs_needed(effect, LEVEL)} runs of both, "
                     f"{runs_needed(effect, LEVEL / tests)} where {tests} are compared.")
    return "\n".join(lines)


def report(comparison: Comparison, entries: list[dict[str, Any]], markdown: bool, delta: float | None) -> str:
    """Write the table, sorted by time if most runs reach the target, else by loss; then the lines and notes."""
    runs, missed = (sum(entry[key] for entry in entries) for key in ("runs", "missed"))
    place = {name: crossing.seconds if crossing else np.inf for name, crossing in comparison.crossings.items()}
    if 2 * missed >= runs:
        place = {entry["name"]: entry["final_loss_mean"] or np.inf for entry in entries}
    ordered = sorted(entries, key=lambda entry: place[entry["name"]])
    title = f"Baseline: {comparison.baseline}. Target: {comparison.target:g}; {runs - missed} of {runs} runs reach it."
    table = format_table([table_row(comparison, entry) for entry in ordered], markdown)
    ordered.sort(key=lambda entry: entry["name"] != comparison.baseline)  # the baseline first
    sentences = "\n".join(sentence(comparison, entry) for entry in ordered)
    return "\n\n".join(filter(None, [title, table, sentences, changes(comparison), notes(comparison, delta)]))


def format_csv(configurations: dict[str, list[Result]]) -> str:
    """Write all validations of all runs, including unfinished and diverged ones."""
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerow(["configuration", "run", "step", "num_iterations", "val_loss", "train_time_ms"])
    for name, r in ((name, run) for name, runs in configurations.items() for run in runs):
        writer.writerows([name, r.path.name, int(x), r.num_iterations, y, round(1000 * t)] for x, y, t in zip(*r.curve))
    return text.getvalue().rstrip("\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"compare.py: {message}; see --help\n")
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", type=Path)
    add("--target", type=float, default=2.92, metavar="LOSS", help="validation loss to reach (default 2.92)")
    add("--baseline", metavar="NAME", help="the configuration to compare with (default: baseline, else the first)")
    add("--power", type=float, metavar="LOSS", help="say how many runs show this difference in final loss")
    for form in ("json", "csv", "markdown"):
        add(f"--{form}", dest="form", action="store_const", const=form, help=f"write {form}")
    add("--forest", type=Path, metavar="FILE", help="plot all differences in loss (.png, .svg or .pdf)")
    add("--plot", type=Path, metavar="FILE", help="plot the curves of up to eight configurations")
    add("--grid", type=Path, metavar="FILE", help="plot loss and ms per step of pairs_AxB and pool_AxB")
    add("--x", choices=["step", "time"], default="step", help="time: --forest of times, --plot over time")
    add("--from", type=float, dest="low", metavar="X", help="--plot: start at this step or second")
    add("--to", type=float, dest="high", metavar="X", help="--plot: end there")
    options = parser.parse_args(arguments)
    for name, value in (("--target", options.target), ("--power", options.power)):
        if value is not None and not 0 < value < np.inf:
            parser.error(f"{name}: give a number above 0")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        runs, lines = read_configurations(options.paths)
        if not runs:
            raise ValueError(f"no results to compare: {'; '.join(lines)}")
        print(*(f"compare.py: {' '.join(line.split())}\n" for line in lines), sep="", end="", file=sys.stderr)
        baseline = options.baseline or next((n for n in runs if n.split("/")[-1] == "baseline"), next(iter(runs)))
        if options.form == "csv":
            say(format_csv(runs))
            return 0
        comparison, of_time = Comparison(runs, baseline, options.target), options.x == "time"
        if options.forest:
            plot.forest(comparison, of_time, options.forest)
        if options.plot:
            plot.curves(comparison, of_time, options.low, options.high, options.plot)
        if options.grid:
            plot.grid(comparison, options.grid)
        entries = [summarize(comparison, name) for name in runs]
        whole = dict(target=options.target, baseline=baseline, configurations=entries)
        say(json.dumps(whole, indent=2, allow_nan=False) if options.form == "json" else
            report(comparison, entries, options.form == "markdown", options.power))
    except (ValueError, OSError) as error:
        print(f"compare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
