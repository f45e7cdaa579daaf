"""Writing the log of a run: its number, its lock, its header and lines. Needs no PyTorch."""

import fcntl
import itertools
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from logs.log_file import RULE, here_and_now, is_finished, last_line, remove_leftover

LOCK_WAIT_S = 10  # a rank whose launcher was killed ends sooner than that
SHOWN_EVERY = 25  # training steps between the lines on standard output, if it is no terminal


def say(text: str) -> None:
    """Print a line, above a progress bar if there is one. A run goes on when nobody reads its output any more."""
    if sys.stdout is None:  # closed by the caller
        return
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train_line(step: int, num_iterations: int, train_time_ms: float) -> str:
    """The line of a training step, to the letter as published logs have it; `step` counts the updates made."""
    step_avg_ms = train_time_ms / max(step, 1)
    return f"step:{step}/{num_iterations} train_time:{train_time_ms:.0f}ms step_avg:{step_avg_ms:.2f}ms"


def val_line(step: int, num_iterations: int, val_loss: float, train_time_ms: float) -> str:
    """The line of a validation, to the letter too."""
    return train_line(step, num_iterations, train_time_ms).replace(" ", f" val_loss:{val_loss:.6f} ", 1)


class RunLog:
    """A run's log file, and standard output. Without a path, as on all ranks but the first, it writes nothing.

    A line is in the file as soon as it is written. Raises OSError if it cannot be written; FileExistsError if the
    file exists but should be new.
    """

    def __init__(self, path: Path | None, new: bool = True):
        self.path, self.bar = path, tqdm(disable=True)
        if path is not None:
            self.file = open(path, "x" if new else "a", buffering=1, encoding="utf-8", errors="backslashreplace")

    def lock(self) -> None:
        """Keep other processes from this run until this process ends. Raises ValueError if it is taken or finished."""
        for _ in range(10 * LOCK_WAIT_S):
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        else:
            raise ValueError(f"{self.path}: another process runs this; wait for its end or use another run_id")
        if is_finished(self.path):
            remove_leftover(self.path)
            raise ValueError(f"{self.path} is finished, and a log is never overwritten; use another run_id")

    def size(self) -> int:
        """Bytes, all of them on the disk: a checkpoint that is there must not count lines that a crash can lose."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes, what the log held at the checkpoint. Raises ValueError if there are fewer.

        A log with results that starts over is kept as <run_id>.txt.interrupted.
        """
        if self.size() < size:
            raise ValueError(f"{self.path}: shorter than at its checkpoint; put the log back, or use another run_id")
        if size == 0 and last_line(self.path, "step:"):
            names = (self.path.with_name(f"{self.path.name}.interrupted{number or ''}") for number in itertools.count())
            shutil.copyfile(self.path, next(path for path in names if not path.exists()))
        os.ftruncate(self.file.fileno(), size)

    def write_header(self, code: str, configuration: dict[str, Any], *descriptions: str) -> None:
        """Program text, resolved configuration (TOML) and environment: what it takes to repeat the run."""
        keys = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in configuration.items()]
        self.to_file("\n".join([code, RULE, *keys, RULE, *descriptions, f"started: {here_and_now()}", RULE]))

    def to_file(self, text: str) -> None:
        if self.path is not None:
            self.file.write(f"{text}\n")

    def line(self, text: str) -> None:
        """A line for the file and for standard output."""
        if self.path is not None:
            self.to_file(text)
            say(text)

    def show_progress(self, num_iterations: int, step: int) -> None:
        """Show a bar instead of the training lines if standard output is a terminal."""
        if self.path is not None and sys.stdout and sys.stdout.isatty():
            self.bar = tqdm(total=num_iterations, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)

    def train_line(self, step: int, num_iterations: int, train_time_ms: float) -> None:
        """The line of a training step: all in the file; on standard output a bar, or every 25th."""
        text = train_line(step, num_iterations, train_time_ms)
        self.to_file(text)
        self.bar.update()
        if self.path is not None and self.bar.disable and step % SHOWN_EVERY == 0:
            say(text)

    def end(self, why: str) -> None:
        """Write the last line, with date and host; a failure to write it is ignored."""
        with suppress(OSError):
            self.to_file(f"ended: {here_and_now()}: {why}")
            self.bar.close()


def open_log(path: Path, is_new: bool) -> RunLog:
    """The log of a run; if it must be new, with the first number from the path's that no log or checkpoint has.

    Raises OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for run_id in range(int(path.stem), 1000):
        numbered = path.with_name(f"{run_id:03d}.txt")
        if not is_new or not any(path.parent.glob(f"{numbered.stem}.*")):
            with suppress(FileExistsError):  # another run has taken the number since
                return RunLog(numbered, is_new)
    raise OSError("all run_ids up to 999 are taken; move logs away")
