"""What the queue does: `./run.sh status [FOLDER]` prints it in 60 columns. Needs no package.

A queue keeps logs/.queue.<host>.json locked while it runs; in it stands its state, one line of JSON.
"""

import fcntl
import itertools
import json
import os
import re
import socket
import sys
import textwrap
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from logs.log_file import is_finished, last_line

FOLDER = Path(__file__).resolve().parent
COLUMNS = 60


class QueueFile:
    """The lock that makes a queue the only one of its machine and checkout, and the queue's state for others to read.

    A queue that is killed leaves the lock to the launcher of its run, which has the descriptor too and is stopping:
    the next queue waits for it. Raises ValueError if another queue runs.
    """

    def __init__(self, path: Path):
        self.state: dict[str, Any] = {}
        try:
            path.parent.mkdir(exist_ok=True)
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; the queue's state goes there, so make it writable") from None
        for attempt in itertools.count():
            if not is_locked(self.descriptor, fcntl.LOCK_EX):
                break
            state = read_state(path)
            if "pid" in state and is_alive(state["pid"]):
                raise ValueError(f"a queue runs on this machine already, process {state['pid']}: wait for its end "
                                 f"(./run.sh status shows it), or stop it with: kill {state['pid']}")
            if attempt == 10:
                print(f"run.sh: waiting until {state.get('log')} has stopped: its queue was killed", flush=True)
            time.sleep(0.1)
        self.write(pid=os.getpid())

    def write(self, **changes: Any) -> None:
        """Change the state. A full disk is no reason for the queue to end."""
        self.state |= changes
        text = json.dumps(self.state).encode() + b"\n"
        with suppress(OSError):
            os.pwrite(self.descriptor, text, 0)
            os.ftruncate(self.descriptor, len(text))

    def close(self) -> None:
        os.close(self.descriptor)


def queue_path() -> Path:
    return FOLDER / f".queue.{socket.gethostname()}.json"


def read_state(path: Path) -> dict[str, Any]:
    """The state in a queue's file; {} until the queue has written it."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text().partition("\n")[0])
    return {}


def is_locked(descriptor: int, operation: int) -> bool:
    """Whether another process has the lock that `operation` asks for; if not, this process takes it."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        pass
    return False


def is_running(path: Path) -> bool:
    with open(path) as file:
        return is_locked(file.fileno(), fcntl.LOCK_SH)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def problem(log: Path) -> str:
    """Why a run diverged or ended too early, as its log says; "" if it did neither."""
    if diverged := last_line(log, "diverged at step "):
        return diverged
    last = last_line(log, "")
    return last.split(": ", 2)[-1] if last.startswith("ended: ") and not is_finished(log) else ""


def describe_run(log: Path, runs_after: int, mean_s: float | None) -> list[str]:
    """How far a run is, and when it and the `runs_after` runs that follow will end; a run takes `mean_s` seconds."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    steps = re.findall(r"^step:(\d+)/(\d+) .*step_avg:([\d.]+)ms$", text, re.MULTILINE)
    losses = re.findall(r"^step:(\d+)/\d+ val_loss:(\S+)", text, re.MULTILINE)
    if not steps:
        return ["no step yet"]
    step, total, step_s = int(steps[-1][0]), int(steps[-1][1]), float(steps[-1][2]) / 1000
    run_end = datetime.now() + timedelta(seconds=(total - step) * step_s)
    queue_end = run_end + timedelta(seconds=runs_after * (mean_s or total * step_s))
    return [f"step {step}/{total}, {1000 * step_s:.1f} ms a step",
            *(f"val_loss {loss} at step {at}" for at, loss in losses[-1:]),
            f"last line {time.time() - log.stat().st_mtime:.0f} s ago",
            f"run ends about {run_end:%a %H:%M}, queue {queue_end:%a %d %b %H:%M}"]


def describe_queue(path: Path, folder: Path) -> list[str]:
    """What the queue with this file does, or how it ended."""
    state, host = read_state(path), path.name[len(".queue."):-len(".json")]
    if not is_running(path):
        end = state.get("ended", "was killed" if "run" in state else "started no run")
        return [f"no queue runs on {host}; the last one {end}"]
    if "log" not in state:
        return [f"the queue on {host} checks its configs and data"]
    run, runs, log = state["run"], state["runs"], Path(state["log"])
    return [f"{host}, run {run} of {runs}: {name(log, folder)}", *describe_run(log, runs - run, state["mean_s"])]


def name(log: Path, folder: Path) -> str:
    return os.path.relpath(log, folder).removesuffix(".txt")


def main(arguments: list[str]) -> int:
    folder = Path(*arguments[:1] or [FOLDER])
    if len(arguments) > 1 or not folder.is_dir():
        print(f"run.sh: {' '.join(arguments)}: no such folder; use: ./run.sh status [FOLDER of logs]", file=sys.stderr)
        return 2
    queues = sorted(FOLDER.glob(".queue.*.json"))
    lines = [line for path in queues for line in describe_queue(path, folder)] or ["no queue has run here"]
    logs = folder.resolve().rglob("[0-9][0-9][0-9].txt")
    problems = {str(log): why for log in logs if (why := problem(log))}
    for path in queues:  # the log of a run that was killed does not say why it ended
        of_queue = read_state(path).get("problems", {}).items()
        problems = {log: why for log, why in of_queue if not is_finished(Path(log))} | problems
    lines += [f"{name(Path(log), folder)}: {why}" for log, why in sorted(problems.items())]
    try:
        print("\n".join(textwrap.fill(line, COLUMNS, subsequent_indent="  ") for line in lines), flush=True)
    except BrokenPipeError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
