"""Starts one run of the queue after the other under torchrun, and passes signals on to it.

A run has a session of its own: a signal for the queue's process group reaches it once, as the SIGTERM sent here.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from configs.queue_plan import ROOT, Experiment
from logs.log_file import end_with_parent, is_finished, last_line
from logs.status import problem

GUARD = [sys.executable, str(ROOT / "configs" / "guard.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PROGRAM = "train_gpt_medium.py"


def complain(text: str) -> None:
    """Print a line on standard error, if anybody reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Launcher:
    """Trains one run at a time. From its making on, SIGINT, SIGTERM and SIGHUP end the present run.

    The first signal is sent on as SIGTERM, upon which a run writes a checkpoint; a later SIGINT kills the launcher,
    and its ranks end with it. `descriptor` is of a file that stays locked while a launcher lives.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.signal = 0  # the first that came
        self.process: subprocess.Popen | None = None
        self.complaint = ""  # the present run's last one on standard error
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has one ignored
                signal.signal(number, self.stop)

    def stop(self, number: int, _: Any) -> None:
        if self.process and self.signal and number == signal.SIGINT:
            self.process.kill()
        elif self.process:
            self.process.terminate()
        self.signal = self.signal or number

    def forward(self, stderr: IO[str]) -> None:
        """Print a run's standard error, and keep the program's last complaint in it, or else what killed a rank."""
        for line in stderr:
            if not self.signal or line.startswith(f"{PROGRAM}: "):  # after a signal torchrun prints its own traceback
                complain(line.rstrip("\n"))
            if line.startswith(f"{PROGRAM}: "):
                self.complaint = line.removeprefix(f"{PROGRAM}: ").strip()
            elif not self.complaint and (killed := re.search(r"Signal \d+ \(SIG\w+\)", line)):  # torchrun's words
                self.complaint = f"a rank ended by {killed[0]}"

    def train(self, experiment: Experiment, run_id: int) -> str:
        """Train a run until it ends. Returns why it failed or diverged, "" if it did neither."""
        log, self.complaint = experiment.log(run_id), ""
        old_end = last_line(log, "ended: ")
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"} | os.environ  # seconds for a checkpoint
        if experiment.kind == "CPU cores":
            environment = {"OMP_NUM_THREADS": str(experiment.devices // experiment.ranks)} | environment
        command = [*GUARD, *TORCHRUN, f"--nproc_per_node={experiment.ranks}", PROGRAM, str(experiment.config),
                   *experiment.options, f"--run_id={run_id}"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, errors="backslashreplace",
                                   stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                                   preexec_fn=lambda: end_with_parent(signal.SIGTERM), pass_fds=[self.descriptor])
        self.process = process
        if self.signal:  # it came before there was a process
            process.terminate()
        reader = threading.Thread(target=self.forward, args=[process.stderr], daemon=True)
        reader.start()
        status = process.wait()
        self.process = None
        reader.join(5)  # a rank that outlives its launcher keeps the pipe open
        if is_finished(log) or last_line(log, "ended: ") != old_end:
            return problem(log)
        signals = {status: f"signal {number.name}" for number in signal.Signals for status in (128 + number, -number)}
        return self.complaint.removeprefix(f"{log}: ") or signals.get(status, f"exit status {status}")
