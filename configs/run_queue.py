"""The queue: run 0 of all configs, run 1 of all, and so on. `./run.sh` starts it as `train_gpt_medium.py --queue`.

Before the first run everything is checked and missing data is fetched. Finished runs are skipped, interrupted ones go
on.
"""

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import datetime, timedelta
from pathlib import Path
from statistics import mean

from configs.launch import Launcher, complain
from configs.queue_plan import ROOT, Experiment, arrange, changed, check_experiments, get_data, read_options
from logs.log_file import is_finished, last_line, plural, remove_leftover
from logs.run_log import say
from logs.status import QueueFile, problem, queue_path

NOTIFY_S = 30  # a notification may take


class Queue:
    """Runs of experiments. Those that are finished are set aside, with their times for an estimate."""

    def __init__(self, experiments: list[Experiment], run_ids: range, file: QueueFile, notify: list[str]):
        self.file, self.notify_words, self.launcher = file, notify, Launcher(file.descriptor)
        self.outcomes: dict[Path, str] = {}  # of each log: why its run failed or diverged, "" if it finished
        self.runs: list[tuple[Experiment, int]] = []  # that are left
        self.earlier_s: list[float] = []
        for run_id, experiment in itertools.product(run_ids, experiments):
            log = experiment.log(run_id)
            if not is_finished(log):
                self.runs.append((experiment, run_id))
                continue
            self.outcomes[log] = problem(log)
            remove_leftover(log)
            if time_ms := re.search(r"train_time:(\d+)ms", last_line(log, "step:")):
                self.earlier_s.append(int(time_ms[1]) / 1000)

    def train(self) -> None:
        """Train the runs, until a signal ends them."""
        seconds: list[float] = []
        for number, (experiment, run_id) in enumerate(self.runs, 1):
            if self.launcher.signal:
                break
            log, began, mean_s = experiment.log(run_id), time.time(), mean(seconds or self.earlier_s or [0])
            end = datetime.now() + timedelta(seconds=mean_s * (len(self.runs) - number + 1))
            projected = f"{end:%Y-%m-%d %H:%M}" if mean_s else "unknown before a run has finished"
            say(f"run.sh: run {number} of {len(self.runs)}: {log}; projected end {projected}; "
                f"{experiment.ranks} of {experiment.devices} {experiment.kind}")
            self.file.write(run=number, runs=len(self.runs), log=os.path.abspath(log), mean_s=mean_s)
            why = changed(experiment) or self.launcher.train(experiment, run_id)
            if not why:
                seconds.append(time.time() - began)
            elif not is_finished(log) and not self.launcher.signal:
                why = f"failed: {why}"
            self.outcomes[log] = why
            self.file.write(problems={os.path.abspath(log): why for log, why in self.outcomes.items() if why})
            self.notify(f"run {number} of {len(self.runs)}: {log}: {why or 'finished, ' + last_line(log, 'step:')}")

    def notify(self, line: str) -> None:
        """Print a line, and run the user's command with it; what that prints or returns changes nothing."""
        say(f"run.sh: {line}")
        if self.notify_words:
            with suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run([*self.notify_words, line], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, timeout=NOTIFY_S)

    def summarize(self) -> int:
        """Report how the runs ended, with a line for each that did not finish. Returns the exit status."""
        reasons = [why for why in self.outcomes.values() if why]
        for log, why in self.outcomes.items():
            if why:
                complain(f"run.sh: {log}: {why}")
        num_diverged, num_failed = (sum(why.startswith(how) for why in reasons) for how in ("diverged", "failed"))
        summary = f"{len(self.outcomes) - len(reasons)} finished, {num_diverged} diverged, {num_failed} failed"
        number = self.launcher.signal
        if number:
            summary += f", stopped by {signal.Signals(number).name}"
        if number or num_failed:
            summary += "; the same command does what is left"
        self.file.write(ended=f"ended {datetime.now():%a %d %b %H:%M}: {summary}")
        self.notify(summary)
        return 128 + number if number else int(num_failed > 0)


def main(arguments: list[str], plan: Callable[[list[str]], list[Experiment]]) -> int:
    """Returns the exit status: 2 after a mistake, which is one line; 1 if a run failed; 128 + the signal that ended it.

    `plan` checks configs and options but no data; it raises ValueError, and answers --help.
    """
    try:
        options, words = read_options(arguments)
        words = arrange(words)
        os.chdir(ROOT)
        if options.check:
            experiments = plan(words)
            check_experiments(experiments, options.run_ids)
            for e in experiments:
                say(f"{e.config}: {e.configuration['description']}\n{e.drawing}")
                say(f"logs: {e.folder}\nranks: {e.ranks} of {e.devices} {e.kind}")
            for e in experiments:
                e.check_data()
            say(f"run.sh: {plural(len(experiments), 'config')} checked, with the data")
            return 0
        with closing(QueueFile(queue_path())) as file:
            experiments = plan(words)
            check_experiments(experiments, options.run_ids)
            get_data(experiments)
            queue = Queue(experiments, options.run_ids, file, options.notify)
            if not queue.runs:
                say(f"run.sh: {plural(len(queue.outcomes), 'run')} finished already; for more raise -n")
            queue.train()
            return queue.summarize()
    except (ValueError, OSError) as error:
        complain(f"run.sh: {error}")
        return 2
