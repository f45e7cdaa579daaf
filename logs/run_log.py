"""The log file of a run: its place, its state, and the running script's writer of it.

It imports only the standard library, so `./run.sh status` answers at once; only a progress bar imports tqdm.
"""

import ctypes
import fcntl
import itertools
import os
import re
import shlex
import shutil
import socket
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from logs.log_format import RUN_KEYS, differences, format_step_line, read_header

TAIL_BYTES = 4000  # `last_line` searches this much of a log
LOCK_WAIT_S = 10  # a rank whose launcher was killed exits within this time
PRINT_EVERY = 25  # training steps between training losses, and between lines on standard output without a terminal


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def here_and_now() -> str:
    return f"{datetime.now():%Y-%m-%d %H:%M:%S} on {socket.gethostname()}"


def end_with_parent(signal_number: int) -> None:
    """Have Linux send this process a signal when the thread that started it ends; do nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal_number)  # PR_SET_PDEATHSIG


def say(text: str, stream: str = "stdout") -> None:
    """Print a line on standard output or "stderr". The program continues if that is closed."""
    file = getattr(sys, stream)
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:  # a file name can hold any bytes
        print(text.encode(encoding, errors="backslashreplace").decode(encoding), file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def is_locked(descriptor: int, operation: int) -> bool:
    """Tell whether another process holds the lock that `operation` asks for; if none does, take it."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)  # else the file system has no locks
    return False


def log_path(log_dir: str, scale: str, config: Path, run_id: int) -> Path:
    """Return LOG_DIR/SCALE/CONFIG/RUN_ID.txt, or LOG_DIR/CONFIG/RUN_ID.txt without a scale."""
    return Path(log_dir) / (Path(scale).stem if scale else "") / config.stem / f"{run_id:03d}.txt"


def checkpoint_path(log: Path) -> Path:
    """Return the path of the checkpoint that an interrupted run resumes from. (RUN_ID.ckpt has the final weights.)"""
    return log.with_suffix(".resume.ckpt")


def last_line(log: Path, beginning: str) -> str:
    """Return the last complete line with this beginning; "" if the log is missing or has no such line."""
    with suppress(FileNotFoundError), open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        lines = re.findall(rb"^(%s.*)\n" % re.escape(beginning.encode()), file.read(), re.MULTILINE)
        return lines[-1].decode(errors="replace") if lines else ""
    return ""


def is_finished(log: Path) -> bool:
    """Tell whether a run has made its last step or has diverged."""
    return bool(last_line(log, "peak memory ") or last_line(log, "diverged at step "))


def failure_reason(log: Path) -> str:
    """Return why a run diverged or stopped early, as its log says; "" if it did neither."""
    last = last_line(log, "")
    stopped = last.startswith("ended: ") and not is_finished(log)
    return last_line(log, "diverged at step ") or (last.split(": ", 2)[-1] if stopped else "")


def remove_checkpoint(log: Path) -> None:
    """Remove a finished run's checkpoint, and the unfinished one that a crash can leave. A diverged run keeps them."""
    if last_line(log, "peak memory "):
        checkpoint_path(log).unlink(missing_ok=True)
        checkpoint_path(log).with_suffix(".ckpt.unfinished").unlink(missing_ok=True)


def check_finished_runs(folder: Path, identity: dict[str, Any]) -> None:
    """Raise ValueError if a finished run in `folder` had other keys, data or code than `identity`."""
    for log in filter(is_finished, sorted(folder.glob("[0-9][0-9][0-9].txt"))):
        header = read_header(log)
        if changes := differences(header.configuration | {"code": header.code}, identity, RUN_KEYS):
            names = (folder.with_name(f"{folder.name}.{n}") for n in itertools.count(1))
            free = next(path for path in names if not path.exists())
            raise ValueError(f"{log}: finished as another experiment: {changes[0]}; give the config another name, "
                             f"or move the folder: mv {shlex.quote(str(folder))} {shlex.quote(str(free))}")


class RunLog:
    """Write a run's log and standard output; without a path, as on ranks above 0, write nothing.

    Each line reaches the file at once. Raises OSError if the file cannot be written, FileExistsError if a new log's
    file exists.
    """

    def __init__(self, path: Path | None, new: bool = True):
        self.path, self.bar = path, None
        if path is not None:
            self.file = open(path, "x" if new else "a", buffering=1, encoding="utf-8", errors="backslashreplace")

    def lock(self) -> None:
        """Exclude other processes from this run until this one exits. Raises ValueError if it is taken or finished."""
        give_up = time.monotonic() + LOCK_WAIT_S
        while is_locked(self.file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                raise ValueError(f"{self.path}: another process is running it; wait for its end or use another run_id")
            time.sleep(0.1)
        if is_finished(self.path):
            remove_checkpoint(self.path)
            raise ValueError(f"{self.path} is finished, and a log is never overwritten; use another run_id")

    def size(self) -> int:
        """Sync the file and return its bytes: a checkpoint must not count lines that a crash can lose."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def truncate(self, size: int) -> None:
        """Keep the first `size` bytes, as many as at the checkpoint. Raises ValueError if the log is shorter.

        Without a checkpoint (size 0), copy a log with results to RUN_ID.txt.interrupted.
        """
        if self.size() < size:
            raise ValueError(f"{self.path}: missing or shorter than at its checkpoint; put the log back, move the "
                             "checkpoint away to start over, or use another run_id")
        if size == 0 and last_line(self.path, "step:"):
            names = (self.path.with_name(f"{self.path.name}.interrupted{number or ''}") for number in itertools.count())
            shutil.copyfile(self.path, next(path for path in names if not path.exists()))
        os.ftruncate(self.file.fileno(), size)

    def write(self, text: str, and_say: bool = False) -> None:
        """Write a line to the file and, if asked, to standard output."""
        if self.path is not None:
            self.file.write(f"{text}\n")
            if and_say:
                say(text)

    def line(self, text: str) -> None:
        """Write a line to the file and to standard output."""
        if self.bar:
            self.bar.clear()  # its next update draws it again, below the line
        self.write(text, and_say=True)

    def show_progress(self, num_iterations: int, step: int) -> None:
        """Show a bar instead of training lines if standard output is a terminal."""
        if self.path is not None and sys.stdout and sys.stdout.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=num_iterations, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)

    def train_line(self, step: int, num_iterations: int, train_time_ms: float) -> None:
        """Write a training step's line to the file; on standard output, advance the bar or print every 25th line."""
        self.write(format_step_line(step, num_iterations, train_time_ms), not self.bar and step % PRINT_EVERY == 0)
        if self.bar:
            self.bar.update()

    def train_loss_line(self, step: int, loss: float) -> None:
        """Write rank 0's training loss to the file and, without a bar, to standard output.

        It has no "step:", so no parser of the speedrun's logs takes it for a step line.
        """
        self.write(f"training loss in step {step} (last sequence of rank 0): {loss:.4f}", not self.bar)

    def validation_line(self, step: int, num_iterations: int, train_time_ms: float, val_loss: float) -> None:
        self.line(format_step_line(step, num_iterations, train_time_ms, val_loss))
        if self.bar:
            self.bar.set_postfix_str(f"val_loss {val_loss:.4f}")

    def end(self, why: str) -> None:
        """Write the last line, with date and host, after the line of a divergence. Ignore a failure to write them."""
        with suppress(OSError):
            if why.startswith("diverged at step "):
                self.write(why)
            self.write(f"ended: {here_and_now()}: {why}")
            if self.bar:
                self.bar.close()


def open_log(path: Path, is_new: bool) -> RunLog:
    """Open a run's log. A new one takes the first number, from the path's on, that no log or checkpoint has.

    Raises OSError if the log cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for run_id in range(int(path.stem), 1000):
        numbered = path.with_name(f"{run_id:03d}.txt")
        if not is_new or not any(path.parent.glob(f"{numbered.stem}.*")):
            with suppress(FileExistsError):  # another run has taken the number since
                return RunLog(numbered, is_new)
    raise OSError("all run_ids up to 999 are taken")
