"""Print what the queues of this checkout do: `./run.sh status [FOLDER]`, in 60 columns. Needs no package.

A queue holds a lock on logs/.queue.<host>[.gpu<numbers>].json while it runs. The file has one line of JSON, its state.
"""

import fcntl
import json
import os
import sys
import textwrap
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from logs.log_format import parse_step_lines, split_log
from logs.run_log import failure_reason, is_finished, is_locked, say

FOLDER = Path(__file__).resolve().parent


def read_state(path: Path) -> dict:
    """Return the state in a queue's file; {} before the queue has written it."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text().partition("\n")[0]) or {}
    return {}


def identify(pid: int) -> list[str]:
    """Return a process's boot, pid namespace and start in clock ticks, no start if it has ended; [] without /proc."""
    identity = []
    with suppress(OSError):
        identity = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        identity += [numbers[18]] * (state != "Z")  # a zombie has ended
    return identity


def describe_progress(log: Path, runs_after: int, mean_s: float | None) -> list[str]:
    """Tell how far a run is, and when it and the `runs_after` later runs of about `mean_s` seconds each will end."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = list(parse_step_lines(split_log(text)[1]))
    if not lines:
        return ["no step yet"]
    step, total, _, _, step_avg_ms = lines[-1]
    run_end = datetime.now() + timedelta(milliseconds=(total - step) * step_avg_ms)
    queue_end = run_end + timedelta(seconds=runs_after * (mean_s or total * step_avg_ms / 1000))
    validations = [f"val_loss {line.val_loss:.6f} at step {line.step}" for line in lines if line.val_loss is not None]
    return [f"step {step}/{total}, {step_avg_ms:.1f} ms a step", *validations[-1:],
            f"last line {max(0, time.time() - log.stat().st_mtime):.0f} s ago",
            f"run ends about {run_end:%a %H:%M}, queue {queue_end:%a %d %b %H:%M}"]


def describe_queue(path: Path, folder: Path) -> list[str]:
    """Tell what the queue with this file does, or how it ended."""
    state, host = read_state(path), path.name[len(".queue."):-len(".json")]
    with open(path) as file:
        if not is_locked(file.fileno(), fcntl.LOCK_SH):
            end = state.get("ended", "was killed" if "run" in state else "started no run")
            return [f"no queue runs on {host}; the last one {end}"]
    if "log" not in state:
        return [f"the queue on {host} checks its configs and data"]
    run, runs, log = state["run"], state["runs"], Path(state["log"])
    name = os.path.relpath(log.with_suffix(""), folder)
    return [f"{host}, run {run} of {runs}: {name}", *describe_progress(log, runs - run, state["mean_s"])]


def main(arguments: list[str]) -> int:
    """Print what each queue does and why runs failed or diverged. Return the exit status."""
    folder, name = Path(*arguments[:1] or [FOLDER]), "[0-9][0-9][0-9].txt"
    if len(arguments) > 1 or not folder.is_dir():
        print(f"run.sh: {' '.join(arguments)}: no such folder; use: ./run.sh status [FOLDER of logs]", file=sys.stderr)
        return 2
    queues = sorted(FOLDER.glob(".queue.*.json"))
    lines = [line for path in queues for line in describe_queue(path, folder)] or ["no queue has run here"]
    problems = [problem for path in queues for problem in read_state(path).get("problems", {}).items()]
    # Of killed runs: their logs do not say why they ended. The keys join the paths of one log through several links.
    reasons = {os.path.realpath(log): (log, why) for log, why in problems if not is_finished(Path(log))}
    logs = [*folder.rglob(name), *(log for depth in (3, 2, 1) for log in folder.glob("*/" * depth + name))]  # via links
    reasons |= {os.path.realpath(log): (str(log), why) for log in logs if (why := failure_reason(log))}
    lines += [f"{os.path.relpath(log.removesuffix('.txt'), folder)}: {why}" for log, why in sorted(reasons.values())]
    say("\n".join(textwrap.fill(line, 60, subsequent_indent="  ") for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
