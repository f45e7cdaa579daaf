"""Starts one run of the queue after the other under torchrun, and passes signals on to it.

A launcher has a session of its own: a signal for the queue's process group reaches it once, as the SIGTERM sent here.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from configs.queue_plan import ROOT, Experiment
from logs.run_log import end_with_parent, is_finished, last_line
from logs.status import problem

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
        self.is_told = False  # the process, of the signal
        self.complaint = ""  # the present run's last one on standard error
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has one ignored
                signal.signal(number, self.stop)

    def stop(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self.signal and self.process:
            self.process.kill()
        self.signal = self.signal or number
        self.tell_process()

    def tell_process(self) -> None:
        """Send SIGTERM, once, if a signal has come."""
        if self.signal and self.process and not self.is_told:
            self.is_told = True
            self.process.terminate()

    def forward(self, stderr: IO[str]) -> None:
        """Print a run's standard error, and keep the program's last complaint in it."""
        for line in stderr:
            complain(line.rstrip("\n"))
            if line.startswith(f"{PROGRAM}: "):
                self.complaint = line.removeprefix(f"{PROGRAM}: ").strip()

    def train(self, experiment: Experiment, run_id: int) -> str:
        """Train a run until it ends. Returns why it failed or diverged, "" if it did neither."""
        log, self.complaint = experiment.log(run_id), ""
        old_end = last_line(log, "ended: ")
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"} | os.environ  # seconds for a checkpoint
        if experiment.kind == "CPU cores":
            environment = {"OMP_NUM_THREADS": str(experiment.devices // experiment.ranks)} | environment
        command = [*TORCHRUN, f"--nproc_per_node={experiment.ranks}", PROGRAM, str(experiment.config),
                   *experiment.options, f"--run_id={run_id}"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, errors="backslashreplace",
                                   stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                                   preexec_fn=end_with_parent, pass_fds=[self.descriptor])
        self.process = process
        self.tell_process()  # of a signal that came before there was a process
        reader = threading.Thread(target=self.forward, args=[process.stderr], daemon=True)
        reader.start()
        status = process.wait()
        self.process = None
        reader.join(5)  # a rank that outlives its launcher keeps the pipe open
        if is_finished(log) or last_line(log, "ended: ") != old_end:
            return problem(log)
        code = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return self.complaint.removeprefix(f"{log}: ") or f"{code}; its output is above"
