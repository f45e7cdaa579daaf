"""Runs a command, passes on one SIGTERM to it, and has it killed when this process is: `python guard.py COMMAND ...`.

Linux tells a process that its parent is gone once for each thread of the parent, and a run takes its second SIGTERM as
an order to end at once. This process has one thread.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from logs.log_file import end_with_parent


def main(command: list[str]) -> int:
    """Returns the command's exit status, 128 + the signal if one ended it."""
    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        process.terminate()

    process = subprocess.Popen(command, preexec_fn=lambda: end_with_parent(signal.SIGKILL))
    signal.signal(signal.SIGTERM, stop)  # before that, one ends both
    status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
