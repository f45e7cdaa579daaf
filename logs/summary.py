"""Estimate a run's length before it and, after it, show its curve, the known loss and how to compare."""

import re
import shlex
import statistics
from pathlib import Path
from typing import Any

from logs.log_format import ROOT, parse_step_lines, split_log

BARS, MAX_BARS = "▁▂▃▄▅▆▇█", 80


def estimate(steps: range, val_loss_every: int, step_s: float, validation_s: float) -> str:
    """Return how long training and validations will take, from the seconds of each in the warm-up.

    A later step takes longer on a GPU, because the window grows.
    """
    num_validations = 1 + sum(step % val_loss_every == 0 for step in steps if val_loss_every)
    minutes = (len(steps) * step_s + num_validations * validation_s) / 60
    return (f"estimate: at least {minutes:.0f} min, for {len(steps)} steps of {1000 * step_s:.0f} ms and "
            f"{num_validations} validations of {validation_s:.1f} s")


def describe_smoke_test(log: Path, full: dict[str, Any]) -> str:
    """Return the times, memory and losses of a finished smoke test, and the estimate for the `full` configuration."""
    header, results = split_log(log.read_text(encoding="utf-8"))
    lines = [*parse_step_lines(results)]
    losses = [f"{line.val_loss:.4f} at step {line.step}" for line in lines if line.val_loss is not None]
    short_validation_s, warm_up_s = re.search(r"of (\S+) s; the warm-up took (\S+) s$", results, re.MULTILINE).groups()
    memory = re.search("^peak memory .*$", results, re.MULTILINE)[0]
    step_ms = lines[-1].step_avg_ms
    validation_s = float(short_validation_s) * full["val_tokens"] / header.configuration["val_tokens"]
    full_run = estimate(range(full["num_iterations"]), full["val_loss_every"], step_ms / 1000, validation_s)
    return (f"warm-up: {warm_up_s} s\nspeed: {step_ms:.1f} ms a step\n{memory}\n"
            f"loss: {' and '.join(losses)}\nfull run: {full_run}")


def validations(log: Path) -> tuple[dict[int, float], Any]:
    """Return the losses of a log's validations by step, and their data: None if the log does not say.

    A resumed run's last losses count. A log that cannot be read has none.
    """
    try:
        header, results = split_log(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:  # as when a user has removed the log; the run ends all the same
        return {}, None
    losses = {line.step: line.val_loss for line in parse_step_lines(results) if line.val_loss is not None}
    return losses, header.configuration.get("val_data")


def sparkline(losses: list[float]) -> str:
    """Draw a bar for each loss, or for every n-th up to the last: `last_line` must find the lines before this one."""
    losses = losses[:: -(len(losses) // MAX_BARS + 1)][::-1]
    low, high = min(losses), max(losses)
    return "".join(BARS[round((len(BARS) - 1) * (loss - low) / ((high - low) or 1))] for loss in losses)


def describe_end(log: Path, scale: str, num_iterations: int) -> str:
    """Return the log's last lines: the curve, the published runs' loss of this config and scale, the next command."""
    (losses, data), published = validations(log), ROOT / "logs/published" / Path(scale).stem
    studies = f"{published.name}*/" if scale else ""
    known = [found[num_iterations]
             for found, other in map(validations, sorted(ROOT.glob(f"logs/published/{studies}{log.parent.name}/*.txt")))
             if found and max(found) == num_iterations and other in (None, data)]
    curve, lines = [loss for step, loss in losses.items() if step], []  # the loss at step 0 would flatten the others
    if curve:
        lines.append(f"validations after step 0: {sparkline(curve)} from {curve[0]:.4f} to {curve[-1]:.4f}")
    if known:
        lines.append(f"known: {log.parent.name} ended at {statistics.mean(known):.4f} in {len(known)} published runs")
    others = published.relative_to(ROOT) if published.is_dir() else log.parent.parent
    return "\n".join([*lines, f"compare: ./run.sh compare {shlex.quote(str(log.parent))} {shlex.quote(str(others))}"])
