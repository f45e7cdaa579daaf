"""Train run 0 of every config, then run 1 of every config, and so on. `./run.sh` starts this program.

The queue is a loop over commands and never imports PyTorch. `train_gpt_medium.py --check --json` describes the configs,
the commands it names fetch missing data, and torchrun trains one run after the other.
"""

import fcntl
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.config import OneLineParser, error_context
from logs import log_format, run_log, status, summary
from logs.log_format import ROOT
from logs.run_log import say

PROGRAM = "train_gpt_medium.py"
SMOKE_TEST_STEPS = {"GPUs": 50, "CPU cores": 10}
EDITED = "its config or the program was edited after the queue started; start the queue again"


def read_program(e: SimpleNamespace) -> tuple[list[bytes], str] | None:
    """Return what decides the numbers: config and scale, and the code without comments. None if a file is gone."""
    with suppress(OSError, ValueError):
        return [Path(file).read_bytes() for file in e.files], log_format.syntax(log_format.program_text())


def parse_options(arguments: list[str]) -> tuple[Any, list[str], list[str]]:
    """Return the queue's own options, the configs as seen from the repository, and the others as --KEY=VALUE."""
    usage = "./run.sh [-n RUNS] [CONFIG.toml ...] [--KEY VALUE ...] [--check | --smoke] [--notify COMMAND]"
    parser = OneLineParser(usage=usage, add_help=False, allow_abbrev=False)
    numbers = parser.add_mutually_exclusive_group()
    numbers.add_argument("-n", type=int, default=1)
    numbers.add_argument("--run_id", type=int, default=0)
    numbers.add_argument("--smoke", action="store_true")  # it trains each config once
    parser.add_argument("--notify", default="")
    parser.add_argument("--check", action="store_true")
    options, words = parser.parse_known_args(arguments)
    if not (1 <= options.n <= 999 and 0 <= options.run_id <= 999):
        raise ValueError("-n or --run_id is out of range; use -n 1 to 999 (runs), or --run_id 0 to 999 (one run)")
    if options.check and options.smoke:
        raise ValueError("--check trains nothing; omit it, or omit --smoke")
    with error_context("--notify"):
        options.notify = shlex.split(options.notify)
    wrong = [word for word in words if re.match(r"-[^-.\d]|--json", word)]
    wrong += [word for word in options.notify[:1] if not shutil.which(word)]
    if wrong:
        raise ValueError(f"{wrong[0]}: no such option or command; see --help, or quote COMMAND: --notify 'mail me'")
    configs, overrides, rest = [], [], iter(words)
    for word in rest:
        if word.startswith("--"):
            overrides.append(word if "=" in word else "=".join([word, *itertools.islice(rest, 1)]))
        else:
            configs.append(os.path.abspath(word) if Path.cwd() != ROOT and os.path.exists(word) else word)
    return options, configs, overrides


def describe(configs: list[str], overrides: list[str]) -> list[SimpleNamespace]:
    """Have the training script check and describe the configs. Exits if it has printed an error or got a Ctrl-C."""
    command = [sys.executable, PROGRAM, "--check", "--json", *configs, *overrides]
    check = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if check.returncode in (2, -signal.SIGINT):
        raise SystemExit(2 if check.returncode == 2 else 128 + signal.SIGINT)
    if check.returncode:
        raise ValueError(f"{PROGRAM} --check failed ({check.returncode}); see the lines above")
    return [SimpleNamespace(**values) for values in json.loads(check.stdout)]


def check_runs(experiments: list[SimpleNamespace], num_runs: int) -> None:
    """Raise ValueError if runs would share a log or repeat each other."""
    folders = [e.log_folder for e in experiments]
    for e in experiments:
        if folders.count(e.log_folder) > 1:
            raise ValueError(f"{e.config}: another config logs to {e.log_folder} too; rename one, or list "
                             "the config only once")
        if e.configuration["run_id"] is not None:
            raise ValueError(f"{e.config}: run_id: the queue numbers the runs; remove the key, or use --run_id N")
        if e.configuration["seed"] is not None and num_runs > 1:
            raise ValueError(f"{e.config}: seed: all {num_runs} runs would be equal; omit the key, or omit -n")


def fetch_data(experiments: list[SimpleNamespace], overrides: list[str]) -> list[SimpleNamespace]:
    """Run the commands that fetch missing data, each once; describe the configs anew.

    Raises ValueError if one fails, or if data or finished runs forbid an experiment.
    """
    tried = []
    while faulty := [e for e in experiments if e.data_fault]:
        if hopeless := [e.data_fault for e in faulty if not e.fetch or e.fetch in tried]:
            raise ValueError(hopeless[0])
        tried.append(faulty[0].fetch)
        command = [sys.executable, *faulty[0].fetch]
        say(f"run.sh: {shlex.join(command)}")
        if subprocess.call(command, preexec_fn=lambda: run_log.end_with_parent(signal.SIGTERM)):
            raise ValueError(f"{shlex.join(command)} failed; see the lines above")
        experiments = describe([e.config for e in experiments], overrides)
    return experiments


def prepare_smoke_test(e: SimpleNamespace, folder: str) -> list[str]:
    """Write synthetic shards for a few steps at an experiment's size; return the options that train on them."""
    from data.shards import write_synthetic_shard  # imports NumPy, which takes longer than all the others

    full, steps = e.configuration, SMOKE_TEST_STEPS[e.device_kind]
    step_tokens = full["sequences_per_step"] * full["train_seq_len"]
    val_tokens = e.num_ranks * math.ceil(8 / e.num_ranks) * full["val_seq_len"]  # the same ranks as in a full run
    with error_context(f"cannot write synthetic shards to {folder}; set TMPDIR to a folder with space"):
        for name, num_tokens in (("train", steps * step_tokens), ("val", val_tokens)):
            write_synthetic_shard(Path(folder, f"{name}.bin"), num_tokens + 2, full["vocab_size"], e.eot_id)
    keys = dict(scale=full["scale"], train_files=f"{folder}/train.bin", val_files=f"{folder}/val.bin",
                val_tokens=val_tokens, log_dir=folder, num_iterations=steps, val_loss_every=steps,
                warmup_steps=max(1, full["warmup_steps"]), checkpoint_every=0, save_checkpoint="false",
                coordinate_descent_tuning="false")
    return [f"--{name}={value}" for name, value in keys.items()]


def lock(path: Path, operation: int) -> int:
    """Lock a queue's file and return its descriptor; wait for a killed queue's run to stop.

    Raises ValueError if another queue holds it.
    """
    with error_context("cannot keep the queue's state; make its file writable"):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for attempt in itertools.count():
        if not status.is_locked(file, operation):
            return file
        state = status.read_state(path)
        pid, then, now = state.get("pid"), state.get("identity", []), status.identify(state.get("pid", 0))
        is_here = len(then) == 3 and then[:2] == now[:2]  # else, `pid` is another process in this container
        if pid and (then == now or not is_here):
            where, fix = ("", f": kill {pid}") if is_here else (" of another container or boot", " there")
            raise ValueError(f"process {pid}{where} is already running a queue on {path.stem[len('.queue.'):]}, since "
                             f"{state.get('started')}; wait until it ends (./run.sh status), or stop it{fix}")
        if attempt >= 10 and not pid:
            raise ValueError(f"another queue holds {path} and could not write to it; wait until that queue ends")
        if attempt == 10:  # a killed queue leaves the lock to its run's torchrun, which is stopping
            say(f"run.sh: waiting for {state.get('log')} to stop; its queue was killed")
        time.sleep(0.1)


class Queue:
    """Train runs one after the other. The first signal stops the queue and its run; a later Ctrl-C kills the run."""

    def __init__(self, notify: list[str], notify_folder: str):
        """Become the only queue of this checkout on these GPUs. Raises ValueError if another one uses any of them."""
        self.notify_words, self.notify_folder = notify, notify_folder
        self.state, self.signals, self.stopped = {}, [], ""
        self.outcomes: dict[Path, str] = {}  # log -> why its run failed or diverged, "" if it finished
        # Slurm can number the GPUs of each job from 0. No numbers: all GPUs.
        gpus = [os.environ.get(name, "").split(",") for name in ("SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES")]
        host, names = os.uname().nodename, "".join(f".gpu{','.join(numbers)}" for numbers in gpus if numbers != [""])
        path = status.FOLDER / f".queue.{host}{names.replace('/', '-')[:150]}.json"
        self.file = lock(path, fcntl.LOCK_EX)
        self.write_state(pid=os.getpid(), identity=status.identify(os.getpid()), started=run_log.here_and_now(),
                         gpus=gpus)
        for other in {path.with_name(f".queue.{host}.json"), *path.parent.glob(f".queue.{host}.gpu*.json")} - {path}:
            theirs = status.read_state(other).get("gpus")  # if not written yet, that queue will find this one
            if theirs and all("" in a + b or set(a) & set(b) for a, b in zip(gpus, theirs)):
                os.close(lock(other, fcntl.LOCK_SH))

    def write_state(self, **changes: Any) -> None:
        """Change the state that `./run.sh status` reads. A full disk does not stop the queue."""
        self.state |= changes
        text = json.dumps(self.state).encode() + b"\n"
        with suppress(OSError):
            os.pwrite(self.file, text, 0)
            os.ftruncate(self.file, len(text))

    def collect_signals(self) -> None:
        """From now on, let a signal stop the queue and its run in order, instead of ending this process at once."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, lambda number, frame: self.signals.append(number))

    def train(self, experiments: list[SimpleNamespace], run_ids: range, overrides: list[str]) -> None:
        """Train all runs, until a signal stops the queue. Skip the finished ones; their times project the end."""
        runs, seconds = [], []
        for run_id, e in itertools.product(run_ids, experiments):
            log, e.program = Path(e.log_folder, f"{run_id:03d}.txt"), read_program(e)
            if run_log.is_finished(log):
                self.outcomes[log] = run_log.failure_reason(log)
                run_log.remove_checkpoint(log)
                last = run_log.last_line(log, "step:")
                seconds += [line.train_time_ms / 1000 for line in log_format.parse_step_lines(last)]
            else:
                runs.append((e, log))
        if not runs:
            say(f"run.sh: {run_log.plural(len(self.outcomes), 'run')} already finished; for more raise -n")
        for number, (e, log) in enumerate(runs, 1):
            if self.signals:
                break
            began, mean_s, name = time.time(), sum(seconds) / max(len(seconds), 1), f"run {number} of {len(runs)}"
            end = time.strftime("%Y-%m-%d %H:%M", time.localtime(began + mean_s * (len(runs) - number + 1)))
            say(f"run.sh: {name}: {log}; projected end {end if mean_s else 'unknown until a run has finished'}; "
                f"{e.num_ranks} of {e.devices} {e.device_kind}")
            self.write_state(run=number, runs=len(runs), log=os.path.abspath(log), mean_s=mean_s)
            why = self.train_run(e, log, overrides) if read_program(e) == e.program else EDITED
            if not why:
                seconds.append(time.time() - began)
            elif not run_log.is_finished(log) and not self.signals:
                why = f"failed: {why}"
            self.outcomes[log] = why
            self.write_state(problems={os.path.abspath(log): why for log, why in self.outcomes.items() if why})
            if self.signals and why:
                self.stopped = f" in {log}, {why.partition(', ')[2].partition(';')[0] or 'at once'}"
            else:
                self.notify(f"{name}: {log}: {why or 'finished, ' + run_log.last_line(log, 'step:')}", bool(why))

    def train_run(self, e: SimpleNamespace, log: Path, overrides: list[str]) -> str:
        """Train one run. Returns why it failed or diverged, "" if it did neither."""
        old_end, ranks = run_log.last_line(log, "ended: "), e.num_ranks
        threads = {"OMP_NUM_THREADS": str(e.devices // ranks)} if e.device_kind == "CPU cores" else {}
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"} | threads | os.environ  # seconds for a checkpoint
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--max-restarts=0",
                   "--local-addr=127.0.0.1", "--signals-to-handle=SIGINT,SIGHUP", f"--nproc_per_node={ranks}", PROGRAM,
                   e.config, *overrides, f"--run_id={int(log.stem)}"]

        def set_signals() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it to all, and a third signal ends torchrun
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
            run_log.end_with_parent(signal.SIGHUP)

        with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0,
                              start_new_session=True, preexec_fn=set_signals, pass_fds=[self.file]) as run:
            complaint, status = self.watch(run)
        if run_log.is_finished(log) or run_log.last_line(log, "ended: ") not in ("", old_end):
            return run_log.failure_reason(log)
        ends = {0: "its log was removed"} | {-number: f"killed by {number.name}" for number in signal.Signals}
        return complaint.removeprefix(f"{log}: ") or ends.get(status, f"exit status {status}")

    def watch(self, run: subprocess.Popen) -> tuple[str, int]:
        """Pass on signals and standard error, but not torchrun's report, until a run ends; return faults and status."""
        os.set_blocking(run.stderr.fileno(), False)  # a descendant can keep it open
        complaints, status, text, is_stopping, has_ended = [], 0, b"", False, False
        while not has_ended:
            time.sleep(0.05)
            has_ended = run.poll() is not None
            if self.signals and not is_stopping:
                is_stopping, number = True, signal.Signals(self.signals[0])
                say(f"run.sh: {number.name}: stopping after this step or validation; Ctrl-C stops it now", "stderr")
                run.send_signal(signal.SIGHUP if number == signal.SIGTERM else number)
            if signal.SIGINT in self.signals[1:]:
                run.kill()
            *lines, text = (text + (run.stderr.read(2**16) or b"")).split(b"\n")  # as much as a pipe holds
            if has_ended and text:
                lines.append(text)
            for line in (line.decode(errors="backslashreplace") for line in lines):
                if line.startswith(f"{PROGRAM}: "):
                    complaints.append(line.removeprefix(f"{PROGRAM}: "))
                elif found := re.match(r"E\d{4} .*/torch/distributed/.* failed \(exitcode: (-?\d+)\)", line):
                    status = int(found[1])  # the lines that follow are torchrun's traceback
                elif not (self.signals or status or re.match(r"[IW]\d{4} .*/torch/distributed/", line)):
                    say(line, "stderr")
        return "; ".join(dict.fromkeys(complaints)), status or run.returncode

    def smoke_test(self, experiments: list[SimpleNamespace], overrides: list[str]) -> int:
        """Train a few steps of each on synthetic tokens and report times, memory and losses; leave no files."""
        for full in experiments:
            with tempfile.TemporaryDirectory() as folder:
                options = overrides + prepare_smoke_test(full, folder)
                if self.signals:
                    break
                (short,) = describe([full.config], options)
                self.train([short], range(1), options)
                log = Path(short.log_folder, "000.txt")
                if self.outcomes.get(log) == "":
                    say(f"{full.config}:\n{summary.describe_smoke_test(log, full.configuration)}")
        return self.summarize()

    def notify(self, line: str, is_fault: bool = False) -> None:
        """Print a line, and run the user's command with it. That command's output and exit status are ignored."""
        say(f"run.sh: {line}", "stderr" if is_fault else "stdout")
        if self.notify_words:
            with suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run([*self.notify_words, line], cwd=self.notify_folder, timeout=30,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def summarize(self) -> int:
        """Report how many runs ended how. Returns the exit status."""
        reasons = [why for why in self.outcomes.values() if why]
        diverged, failed = (sum(why.startswith(how) for why in reasons) for how in ("diverged", "failed"))
        summary = f"{len(self.outcomes) - len(reasons)} finished, {diverged} diverged, {failed} failed"
        if diverged or failed:
            summary += " (./run.sh status says why)"
        if self.signals:
            summary += f", stopped by {signal.Signals(self.signals[0]).name}{self.stopped}"
        if self.signals or failed:
            summary += "; rerun the command to resume or start the remaining runs"
        self.write_state(ended=f"ended {time.strftime('%a %d %b %H:%M')}: {summary}")
        self.notify(summary)
        return 128 + self.signals[0] if self.signals else int(failed > 0)


def main(arguments: list[str]) -> int:
    """Return the exit status: 2 after a mistake, 1 if a run failed, 128 + the signal that stopped the queue."""
    try:
        if {"-h", "--help"} & set(arguments):
            return subprocess.call([sys.executable, ROOT / PROGRAM, "--help"])
        (options, configs, overrides), folder = parse_options(arguments), os.getcwd()
        os.chdir(ROOT)
        queue = None if options.check else Queue(options.notify, folder)
        may_choose_scale, configs = options.smoke or not configs, configs or ["configs/baseline.toml"]
        experiments = describe(configs, overrides + ["--cpu_scale=tiny"] * may_choose_scale)
        for e in experiments if may_choose_scale else []:
            scale = f"--scale={e.configuration['scale']}"
            say(f"run.sh: using {e.config}{f' {scale}' * (scale != '--scale=')} on {e.device_kind}")
            if not options.smoke and scale not in ("--scale=", *overrides):
                overrides.append(scale)
        if not options.smoke:
            check_runs(experiments, options.n)
        if options.check:
            for e in experiments:
                ranks = e.refusal or f"ranks: {e.num_ranks} of {e.devices} {e.device_kind}"
                say(f"{e.config}: {e.configuration['description']}\n{e.drawing}\nlogs: {e.log_folder}\n{ranks}")
            if faults := [e.data_fault for e in experiments if e.data_fault]:
                raise ValueError(faults[0])
            say(f"run.sh: {run_log.plural(len(experiments), 'config')} checked, with the data")
            return 0
        if refusals := [e.refusal for e in experiments if e.refusal]:
            raise ValueError(refusals[0])
        if options.smoke:
            queue.collect_signals()
            return queue.smoke_test(experiments, overrides)
        experiments = fetch_data(experiments, overrides)
        queue.collect_signals()
        queue.train(experiments, range(options.run_id, options.run_id + options.n), overrides)
        return queue.summarize()
    except (ValueError, OSError) as error:
        say(f"run.sh: {error}", "stderr")
        return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the first run needs no traceback
    sys.exit(main(sys.argv[1:]))
