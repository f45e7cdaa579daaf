"""Compare configurations by the logs of their runs: is one better, is it real, does it pay?

    ./run.sh compare logs/published --baseline baseline_ttest --forest figure.png

A PATH is a log, a folder of logs (the runs of a configuration), or a folder of such folders.
"""

import argparse
import csv
import io
import json
import shutil
import signal
import sys
import textwrap
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
for package in ("numpy", "scipy", "matplotlib"):
    if not find_spec(package):
        sys.exit(f"compare.py: {package} is missing; start it with ./run.sh compare, or pip install -r "
                 "logs/requirements.txt")
import numpy as np

from logs import plot, run_statistics
from logs.log_format import RUN_KEYS, differences, syntax
from logs.results import Result, list_changes, read_configurations
from logs.run_log import plural, say
from logs.run_statistics import LEVEL, Comparison, Effect, Ranking, deviation, mean, record_test

MAX_SENTENCES = 4  # configurations that are described without --verbose
MAX_NAMES = 8  # of one verdict, in the first line
PROGRESS_S = 5
HEADER = (["", "", "", "loss change", "", "", "", "time change", "", "", "ms /"],  # what does not fit falls off the end
          ["name", "verdict", "runs", "1e-3 nats", "p", "final loss", "time, s", "s", "p", "step", "step"])


def summarize(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return a configuration's entry in --json: losses in nats, times in seconds, null for undefined figures."""
    finished, test = comparison.finished[name], record_test(comparison.losses[name], comparison.target)
    own, baseline = (comparison.crossings[each].reached for each in (name, comparison.baseline))
    single = [dict(log=str(run.path), final_loss=float(run.curve.losses[-1]), total_time=float(run.curve.seconds[-1]),
                   steps_to_target=crossing.reached.step, time_to_target=crossing.reached.seconds)
              for run, crossing in zip(finished, comparison.own_crossings[name])]
    totals = [run["total_time"] for run in single]
    versus = {}
    for measure, (difference, half, p) in zip(("loss", "time"), comparison.effects(name)):
        versus |= {f"delta_{measure}": difference, f"delta_{measure}_low": None if half is None else difference - half,
                   f"delta_{measure}_high": None if half is None else difference + half, f"p_{measure}": p}
    return dict(
        name=name, runs=len(finished), num_iterations=comparison.runs[name][0].num_iterations,
        final_loss_mean=test["mean"], final_loss_std=test["std"], steps_to_target=own.step, time_to_target=own.seconds,
        total_time_mean=mean(totals), total_time_std=deviation(totals),
        step_avg_ms=mean([run.step_avg_ms for run in finished if np.isfinite(run.step_avg_ms)]),
        break_even_step_ms=1000 * baseline.seconds / own.step if own.step and baseline.step is not None and (
            name in comparison.alike) else None, validated_alike=name in comparison.alike,
        missed=[run["time_to_target"] for run in single].count(None), t_test=test,
        versus_baseline=None if name == comparison.baseline else versus, single_runs=single)


def list_names(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def count_diverged(runs: list[Result]) -> int:
    return sum(run.diverged_at is not None and not run.finished for run in runs)


def list_verdicts(effects: dict[str, Effect], runs: dict[str, list[Result]]) -> str:
    """List the configurations by verdict, the largest changes first, with a note of runs that diverged."""
    parts, largest_first = [], sorted(effects, key=lambda name: -abs(effects[name].difference))
    for verdict in ("better", "worse", "undecided", "not tested"):
        names = [name for name in largest_first if effects[name].verdict == verdict]
        names = [f"{name} ({n} of {len(runs[name])} runs diverged)" if (n := count_diverged(runs[name])) else name
                 for name in names]
        if names:
            parts.append(f"{verdict}: {list_names(names)}.")
    return " ".join(parts)


def answer(comparison: Comparison, num_runs: int, missed: int) -> list[str]:
    """State the verdicts in loss, then those in time."""
    baseline, target = comparison.baseline, f"{comparison.target:g}"
    verdicts = list_verdicts(comparison.loss.effects, comparison.runs)
    lines = [verdicts or f"no configuration to compare with {baseline} in loss."]
    if diverged := [f"{name} ({n} of {len(runs)} runs)" for name, runs in comparison.runs.items()
                    if name not in comparison.loss.effects and (n := count_diverged(runs))]:
        lines.append(f"Diverged: {list_names(diverged)}.")
    own = syntax(comparison.runs[baseline][0].header.code)
    if others := [name for name in comparison.loss.effects | comparison.time.effects
                  if syntax(comparison.runs[name][0].header.code) != own]:
        lines.append(f"Code other than the baseline's, or unknown: {list_names(others)}.")
    if any(effect.p is not None for effect in comparison.time.effects.values()):
        caution = ", on different machines" if machines_of_times(comparison) else ""
        verdicts = list_verdicts(comparison.time.effects, comparison.runs)
        lines.append(f"in time to {target}{caution}: {verdicts}")
    runs, end = plural(len(comparison.finished[baseline]), "run"), comparison.runs[baseline][0].end
    return [*lines, f"Baseline: {baseline}, {runs} to step {end}. Target: {target}; {num_runs - missed} of {num_runs} "
                    "runs reach it."]


def number(value: float | None, form: str, spread: float | None = None, scale: float = 1) -> str:
    """Format a number times `scale`, with ± its deviation or half-width if it has one."""
    if value is None:
        return "n/a"
    return f"{scale * value:{form}}" + ("" if spread is None else f"±{scale * spread:{form.strip('+')}}")


def table_row(comparison: Comparison, entry: dict[str, Any]) -> list[str]:
    name, crossing, changes = entry["name"], comparison.crossings[entry["name"]], []
    loss, time = comparison.effects(name)
    for (difference, half, p), form, scale in ((loss, "+.2f", 1000), (time, "+.1f", 1)):
        cells = number(difference, form, half, scale), "<.001" if p is not None and p < 0.001 else number(p, ".3f")
        changes.append(["", ""] if name == comparison.baseline else cells)
    shown = [f"{e.verdict} {what}" for e, what in ((loss, "loss"), (time, "time")) if e.verdict in ("better", "worse")]
    verdict = shown[0] if len(shown) == 1 else "mixed" if shown and loss.verdict != time.verdict else loss.verdict
    verdict = time.verdict if verdict == "not compared" else verdict
    beyond = "> " if crossing.mark == ">" else ""
    seconds = f"{beyond}{number(crossing.seconds, '.1f')}{crossing.mark.replace('>', ' ')}"
    return [name, "baseline" if name == comparison.baseline else verdict, str(entry["runs"]), *changes[0],
            number(entry["final_loss_mean"], ".4f", entry["final_loss_std"]), seconds, *changes[1],
            f"{beyond}{number(crossing.step, '.0f')}", number(entry["step_avg_ms"], ".1f")]


def format_table(rows: list[list[str]], width: int) -> str:
    """Make columns as wide as their widest cell; drop the last ones, and cut names, so that the table fits `width`."""
    rows = [*HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    while len(widths) > 4 and sum(widths) + len(widths) - 1 > width:
        widths.pop()
    first = max(min(widths[0], width - sum(widths[1:]) - len(widths) + 1), 8)
    lines = [[f"{name:{first}.{first}}", f"{verdict:{widths[1]}}", *map(str.rjust, cells, widths[2:])]
             for name, verdict, *cells in rows]
    return "\n".join(" ".join(line).rstrip() for line in lines)


def format_markdown(rows: list[list[str]]) -> str:
    rows = [[" ".join(words).strip() for words in zip(*HEADER)], ["---"] * 2 + ["---:"] * 9, *rows]
    return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows)


def describe_unfinished(comparison: Comparison, name: str, run: Result) -> str:
    """Describe where a run diverged, or how far an unfinished run is."""
    curve, baseline = run.curve, comparison.curves[comparison.baseline]
    if run.diverged_at is not None:
        return f"{run.path.name} diverged at step {run.diverged_at}"
    if not len(curve.steps):
        return f"{run.path.name} is not finished"
    text = f"{run.path.name} is at step {curve.steps[-1]:.0f} of {run.num_iterations} with loss {curve.losses[-1]:.6f}"
    if name not in comparison.alike or not baseline.steps.min(initial=np.inf) <= curve.steps[-1] <= baseline.steps[-1]:
        return text
    there = np.interp(curve.steps[-1], baseline.steps, baseline.losses)
    return f"{text}, {curve.losses[-1] - there:+.6f} relative to the baseline"


def machines_of_times(comparison: Comparison) -> dict[str, list[str]]:
    """Return the machines of the runs whose times are compared, with the configurations on each.

    Return {} if every configuration ran on every machine in the same proportion.
    """
    found: dict[str, list[str]] = {}
    shares = set()
    for name in comparison.time.samples:
        counts = Counter(machine for run in comparison.finished[name] for machine in run.machines)
        shares.add(frozenset((machine, n / len(comparison.finished[name])) for machine, n in counts.items()))
        for machine in sorted(counts):
            found.setdefault(machine, []).append(name)
    return found if len(shares) > 1 else {}


def count_tokens(run: Result) -> int | None:
    """Return the tokens that a run trains on; None if its log does not say."""
    sizes = [run.header.configuration.get(key) for key in ("sequences_per_step", "train_seq_len")]
    return run.num_iterations * sizes[0] * sizes[1] if all(type(n) is int and n > 0 for n in sizes) else None


def remarks(comparison: Comparison) -> list[str]:
    """Report, a line each, what a reader of the curves would notice and what the tests leave out."""
    lines, baseline, keys = [], comparison.baseline, comparison.keys
    for name, runs in comparison.runs.items():
        unfinished = [describe_unfinished(comparison, name, run) for run in runs if not run.finished]
        rising = [run.path.name for run in comparison.finished[name] if (np.diff(run.curve.losses[-2:]) > 0).any()]
        if unfinished:
            lines.append(f"{name}: {'; '.join(unfinished)}.")
        if rising:
            lines.append(f"{name}: the loss rises at the end of {', '.join(rising)}; do not trust it.")
    lines += [f"{name}: {comparison.finished[name][i].path.name} is far from its other runs (p {p:.1g}); look at its "
              "curve." for name, i, p in comparison.loss.outliers()]
    for what, family in (("loss", comparison.loss), ("time", comparison.time)):
        if family.variance_p < 0.01:
            p = f"{family.variance_p:.1g}"
            lines.append(f"Variances of {what} differ (Brown-Forsythe p {p}); Dunnett's p is rough.")
    finished = [name for name, own in comparison.finished.items() if own]
    if others := [name for name in finished if name in comparison.alike and name not in comparison.loss.samples]:
        lines.append(f"Of another length, so compared in time only: {', '.join(others)}.")
    if others := [name for name in finished if name not in comparison.alike]:
        lines.append(f"Validated on other data or at another length, so not compared: {', '.join(others)}"
                     f"{'; use one as --baseline' * (comparison.alike == [baseline])}.")
    if machines := machines_of_times(comparison):
        shown = [f"{machine} ({', '.join(names) if len(names) <= MAX_SENTENCES else len(names)})"
                 for machine, names in machines.items()]
        lines.append(f"Do not compare times of different machines: {'; '.join(shown)}.")
    tokens = {name: count_tokens(comparison.runs[name][0]) for name in comparison.loss.samples}
    for name, own in comparison.finished.items():
        if tokens.get(name) and tokens.get(baseline) not in (None, tokens[name]):
            lines.append(f"{name} trains on {tokens[name] / tokens[baseline]:.3g} times the baseline's tokens.")
        settings = [run.header.configuration for run in own]
        starts = [str(each.get("init_sha256", each["seed"])) for each in settings if "seed" in each]
        if len(set(starts)) < len(starts):
            lines.append(f"{name}: runs from one seed or checkpoint are not repeats; they understate the deviation.")
    for name, (run, *_) in comparison.runs.items():
        more, fewer = len(comparison.finished[name]), len(comparison.finished[baseline])
        changed = differences(keys[baseline], keys[name], RUN_KEYS) or list_changes(comparison.runs[baseline][0], run)
        if more > fewer and keys[name] and not changed:
            lines.append(f"{name} has the baseline's keys and {more} runs, not {fewer}; use --baseline {name}.")
    return lines


def sentence(comparison: Comparison, entry: dict[str, Any]) -> str:
    """Describe a configuration in one line: what the table has no room for."""
    name, test, even = entry["name"], entry["t_test"], entry["break_even_step_ms"]
    loss, time = comparison.effects(name)
    parts = ["the baseline" if name == comparison.baseline else f"loss {loss.verdict}, time {time.verdict}"]
    if even is not None and name != comparison.baseline:
        spent = 1000 * entry["time_to_target"] / entry["steps_to_target"]
        parts.append(f"{spent:.2f} ms per step to the target, break-even at {even:.2f}")
    if entry["missed"]:
        parts.append(f"{entry['missed']} of {entry['runs']} missed the target")
    if entry["runs"]:
        total = number(entry["total_time_mean"], ".1f", entry["total_time_std"])
        parts.append(f"{total} s for {comparison.runs[name][0].end} steps")
    if test["p"] is not None:
        figures = f"t {test['t']:.2f}, p {test['p']:.3g}, 95% bound {test['upper_bound']:.6f}"
        parts.append(f"record: {'yes' if test['record'] else 'no'} ({figures})")
    return f"{name}: {'; '.join(parts)}"


def changes(comparison: Comparison) -> list[str]:
    """List in a line per configuration what differs from the baseline. Without any header there is nothing to list."""
    baseline = comparison.runs[comparison.baseline][0]
    return [f"{name} against {comparison.baseline}: {'; '.join(list_changes(baseline, run)) or 'no change'}"
            for name, (run, *_) in comparison.runs.items()
            if run is not baseline and (any(run.header) or any(baseline.header))]


def notes(comparison: Comparison, delta: float | None) -> list[str]:
    """Explain the table and the tests."""
    lines = ["step, time: where the mean curve reaches the target; *: extrapolated with the baseline's final slope, >: "
             "too far to extrapolate. better, worse: p < 0.05; record: p < 0.01."]
    for what, unit, family in (("loss", "nats", comparison.loss), ("time", "s", comparison.time)):
        if not family.deviation:
            near = "reach the target and " if family is comparison.time else ""
            lines.append(f"No test of {what}: it needs a configuration with two runs that {near}differ.")
        elif family.effects:
            lines.append(f"{what}: ± and p by Dunnett's test, {len(family.effects)} at once; deviation "
                         f"{family.deviation:.3g} {unit}, {family.dof} degrees of freedom.")
    if delta and comparison.loss.deviation:
        effect, tests = delta / comparison.loss.deviation, max(len(comparison.loss.effects), 1)
        alone, among = (run_statistics.runs_needed(effect, LEVEL / count) for count in (1, tests))
        lines.append(f"To show {delta:g} in loss with power {run_statistics.POWER} takes {alone} runs of each "
                     f"configuration, or {among} among {plural(tests, 'comparison')}.")
    return lines


def rank_against(comparison: Comparison, path: Path, picture: Path | None) -> Ranking:
    """Compare the order of losses with that of the runs below `path`. Raises ValueError without the baseline there."""
    runs, skipped = read_configurations([path])
    if comparison.baseline not in runs:
        raise ValueError(f"--against {path}: no configuration is named {comparison.baseline} there, among "
                         f"{', '.join(runs) or '; '.join(skipped)}; use --baseline")
    other = Comparison(runs, comparison.baseline, None)
    ranking = run_statistics.rank_alike(comparison.loss, other.loss)
    if picture:
        plot.scatter(comparison.loss, other.loss, ranking, picture)
    return ranking


def report(comparison: Comparison, entries: list[dict[str, Any]], ranking: Ranking | None,
           options: argparse.Namespace) -> str:
    """Write the answer and the table, sorted by time if most runs reach the target, else by loss; then the lines."""
    width = shutil.get_terminal_size().columns  # 80 without a terminal
    runs, missed = (sum(entry[key] for entry in entries) for key in ("runs", "missed"))
    place = {name: (c.step is None, c.mark == ">", c.seconds) for name, c in comparison.crossings.items()}
    if 2 * missed >= runs:
        place = {entry["name"]: entry["final_loss_mean"] or np.inf for entry in entries}
    rows = [table_row(comparison, entry) for entry in sorted(entries, key=lambda entry: place[entry["name"]])]
    table = format_markdown(rows) if options.form == "markdown" else format_table(rows, width)
    described = sorted(entries, key=lambda entry: entry["name"] != comparison.baseline)  # the baseline first
    sentences = [sentence(comparison, entry) for entry in described if options.verbose or len(entries) <= MAX_SENTENCES]
    order = [f"Spearman's correlation with {options.against}: {ranking.rho:.2f}, 95% {ranking.low:.2f} to "
             f"{ranking.high:.2f}, p {ranking.p:.2g}, over {len(ranking.names)} configurations; with the runs' noise, "
             f"even equal orders would correlate at about {ranking.limit:.2f}."] if ranking else []
    parts = [answer(comparison, runs, missed), table, order, remarks(comparison), sentences, changes(comparison),
             notes(comparison, options.power)]
    wrap = (lambda line: textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False))
    return "\n\n".join(part if part is table else "\n".join(map(wrap, part)) for part in parts if part)


def format_csv(configurations: dict[str, list[Result]]) -> str:
    """Write all validations of all runs, including unfinished and diverged ones."""
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerow(["configuration", "run", "step", "num_iterations", "val_loss", "train_time_ms"])
    for name, r in ((name, run) for name, runs in configurations.items() for run in runs):
        writer.writerows([name, r.path.name, int(x), r.num_iterations, y, round(1000 * t)] for x, y, t in zip(*r.curve))
    return text.getvalue().rstrip("\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="./run.sh compare")
    parser.error = lambda message: parser.exit(2, f"compare.py: {message}; see --help\n")
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", type=Path)
    add("--target", type=float, metavar="LOSS", help="validation loss to reach (default: the baseline's target_loss)")
    add("--baseline", metavar="NAME", help="the configuration to compare with (default: baseline, else the first)")
    add("--at", type=int, metavar="STEP", help="compare at an earlier validation than the last one")
    add("--verbose", action="store_true", help="describe more than four configurations in a line each, too")
    add("--power", type=float, metavar="LOSS", help="say how many runs show this difference in final loss")
    forms = parser.add_mutually_exclusive_group()
    for form in ("json", "csv", "markdown"):
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"write {form}")
    add("--forest", type=Path, metavar="FILE", help="plot all differences in loss (.png, .svg or .pdf)")
    add("--plot", type=Path, metavar="FILE", help="plot the curves of up to eight configurations")
    add("--against", type=Path, metavar="PATH", help="compare the order of losses with other runs' order")
    add("--scatter", type=Path, metavar="FILE", help="plot the losses of both")
    add("--grid", type=Path, metavar="FILE", help="plot loss and ms per step of pairs_AxB and pool_AxB")
    add("--x", choices=["step", "time"], help="time: --forest of times, --plot over time")
    add("--from", type=float, dest="low", metavar="X", help="--plot: start at this step or second")
    add("--to", type=float, dest="high", metavar="X", help="--plot: end there")
    options = parser.parse_args(arguments)
    for name, value in (("--target", options.target), ("--power", options.power)):
        if value is not None and not 0 < value < np.inf:
            parser.error(f"{name}: give a number above 0")
    is_table = options.form not in ("json", "csv")
    for option, value, needs, has in (
            ("--x", options.x, "--forest or --plot", options.forest or options.plot),
            ("--from", options.low, "--plot", options.plot), ("--to", options.high, "--plot", options.plot),
            ("--scatter", options.scatter, "--against", options.against),
            ("--against", options.against, "the table or --json", options.form != "csv"),
            ("--power", options.power, "the table", is_table), ("--verbose", options.verbose, "the table", is_table)):
        if value not in (None, False) and not has:
            parser.error(f"{option}: without effect; use it with {needs}")
    for file in filter(None, (options.forest, options.plot, options.grid, options.scatter)):
        if file.suffix not in plot.SUFFIXES:
            parser.error(f"{file}: not a picture; end its name in {', '.join(plot.SUFFIXES)}")
    return options


def report_progress(task: str) -> None:
    """Name the current task on standard error every PROGRESS_S seconds, until the next call; without a task, stop."""
    period = PROGRESS_S if task else 0
    signal.signal(signal.SIGALRM, lambda *_: say(f"compare.py: {task} ...", "stderr"))
    signal.setitimer(signal.ITIMER_REAL, period, period)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    try:
        report_progress("reading logs")
        runs, lines = read_configurations(options.paths)
        if not runs:
            raise ValueError(f"no results to compare: {'; '.join(lines)}")
        for line in lines:
            say(f"compare.py: {' '.join(line.split())}", "stderr")
        baseline = options.baseline or next((n for n in runs if n.split("/")[-1] == "baseline"), next(iter(runs)))
        if options.at is not None:
            runs = {name: [run.cut(options.at) for run in group] for name, group in runs.items()}
            if not any(run.finished for group in runs.values() for run in group):
                raise ValueError(f"--at {options.at}: no run has a validation there; name a step of the logs")
        report_progress(f"comparing {plural(len(runs), 'configuration')}")
        comparison, of_time = Comparison(runs, baseline, options.target), options.x == "time"
        if options.forest:
            plot.forest(comparison, of_time, options.forest)
        if options.plot:
            plot.curves(comparison, of_time, options.low, options.high, options.plot)
        if options.grid:
            plot.grid(comparison, options.grid)
        if options.form == "csv":
            say(format_csv(runs))
            return 0
        ranking = rank_against(comparison, options.against, options.scatter) if options.against else None
        entries = [summarize(comparison, name) for name in runs]
        whole = dict(target=comparison.target, baseline=baseline, configurations=entries) | (
            dict(ranking=ranking._asdict()) if ranking else {})
        say(json.dumps(whole, indent=2, allow_nan=False) if options.form == "json" else
            report(comparison, entries, ranking, options))
    except (ValueError, OSError) as error:
        print(f"compare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        report_progress("")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
