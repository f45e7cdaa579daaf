"""Where a run's log stands, what its last lines and its header say, and small things that many modules need.

Needs nothing but the standard library, so that `./run.sh status` answers at once.
"""

import ctypes
import json
import os
import re
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

RULE = "=" * 100
BOOKKEEPING_KEYS = {"description", "log_dir", "save_checkpoint", "checkpoint_every", "step_timeout"}  # change no number
TAIL_BYTES = 4000  # the last lines of a log are looked for in this much of it


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def here_and_now() -> str:
    return f"{datetime.now():%Y-%m-%d %H:%M:%S} on {socket.gethostname()}"


def end_with_parent(signal_number: int) -> None:
    """Have Linux send this process a signal when the thread that started it ends; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal_number)  # PR_SET_PDEATHSIG


def log_path(log_dir: str, scale: str, config: Path, run_id: int) -> Path:
    """LOG_DIR/SCALE/CONFIG/RUN_ID.txt; without a scale, LOG_DIR/CONFIG/RUN_ID.txt."""
    return Path(log_dir) / (Path(scale).stem if scale else "") / config.stem / f"{run_id:03d}.txt"


def last_line(log: Path, beginning: str) -> str:
    """The last complete line of a log that begins so; "" if it has none, or if there is no log."""
    with suppress(FileNotFoundError), open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        lines = re.findall(rb"^(%s.*)\n" % re.escape(beginning.encode()), file.read(), re.MULTILINE)
        return lines[-1].decode(errors="replace") if lines else ""
    return ""


def is_finished(log: Path) -> bool:
    """Whether a run came to its end: to that of its steps, or to a loss that is no number."""
    return bool(last_line(log, "peak memory ") or last_line(log, "diverged at step "))


def read_header(log: Path) -> tuple[str, dict[str, Any]]:
    """The program text and the resolved configuration that a log begins with. Raises ValueError if it has no header."""
    code, _, rest = log.read_text(encoding="utf-8", errors="replace").partition(f"\n{RULE}\n")
    keys = re.findall(r"^(\w+) = (.+)$", rest.partition(f"\n{RULE}\n")[0], re.MULTILINE)
    if not keys:
        raise ValueError(f"{log}: its header has no configuration; move the log away")
    try:
        return code, {name: json.loads(value) for name, value in keys}
    except json.JSONDecodeError:
        raise ValueError(f"{log}: its header is damaged; move the log away") from None


def checkpoint_path(log: Path) -> Path:
    """The checkpoint from which an interrupted run goes on. (The final weights are RUN_ID.ckpt.)"""
    return log.with_suffix(".resume.ckpt")


def remove_leftover(log: Path) -> None:
    """Remove the checkpoint of a run that was killed between its last line and the removal."""
    if last_line(log, "peak memory "):  # that of a run that diverged stays
        checkpoint_path(log).unlink(missing_ok=True)
