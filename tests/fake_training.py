"""A stand-in for train_gpt_medium.py and for torchrun, whose runs take milliseconds. Tests copy it into a checkout.

A config is JSON: keys of the configuration, `how` its runs end, and the command to `fetch` data, which is missing until
./shard exists; no command fetches the data of `fetch` []. Each run adds a line of JSON to ./started.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

RULE = "=" * 100
ENDED = f"ended: 2026-11-24 18:00:02 on host-{os.getpid()}: "  # of another time or place in each run
ENDS = {
    "fail": f"{ENDED}No space left on device",
    "diverge": f"diverged at step 2: the validation loss is nan\n{ENDED}diverged",
    "finish": "step:4/4 val_loss:2.919300 train_time:8000ms step_avg:2000.00ms\npeak memory resident: 9 MiB\n"
              f"{ENDED}finished",
    "wait": f"{ENDED}stopped, with a checkpoint; resume it",
}
LINE = "{}1129 16:16:09.346000 7 /lib/torch/distributed/elastic/multiprocessing/api.py:1002] "
REPORT = f"""{LINE.format("W")}Sending process 7 closing signal SIGTERM
{LINE.format("E")}failed (exitcode: {{}}) local_rank: 0 (pid: 7) of binary: python
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  traceback : Signal 15 (SIGTERM) received by PID 7"""


def resolve(config, options):
    """Return the configuration, how a run ends, and the command that fetches missing data."""
    values = {"description": "", "scale": "", "seed": None, "run_id": None} | json.loads(Path(config).read_text())
    values |= dict(option[2:].split("=", 1) for option in options)
    fetch = values.pop("fetch", None)
    return values, values.pop("how", "finish"), None if os.path.exists("shard") else fetch


def check(words):
    """Answer `--check --json`."""
    assert not os.path.exists("crash")
    options, experiments = [word for word in words if word.startswith("--")], []
    if "--cpu_scale=tiny" in options and "KIND" not in os.environ and "--scale=small" not in options:
        options.append("--scale=tiny")
    for config in (word for word in words if not word.startswith("--")):
        configuration, how, fetch = resolve(config, options)
        if how == "ctrl-c":  # while it is checked
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        is_large = configuration.get("is_large") and "--scale=tiny" not in options and "KIND" not in os.environ
        if how == "mistake" or is_large and "--val_tokens=1" in options:
            print(f"train_gpt_medium.py: {config}: a mistake", file=sys.stderr)
            sys.exit(2)
        experiments.append(dict(
            config=config, files=[config], log_folder=f"logs/{Path(config).stem}", num_ranks=2, devices=8,
            device_kind=os.environ.get("KIND", "CPU cores"), configuration=configuration,
            drawing=f"map of {Path(config).stem}", fetch=fetch or [],
            refusal=f"{config}: too large for a CPU" * bool(is_large),
            data_fault="" if fetch is None else f"{config}: no shards"))
    print(json.dumps(experiments))


def train(launcher, config, *options):
    """Do what a run's launcher and ranks do, up to their end."""
    values, how, _ = resolve(config, options)
    log = Path("logs", Path(config).stem, f"{int(values['run_id']):03d}.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    note = dict(os.environ, log=f"{log.parent.name}/{log.name}", pid=os.getpid(), options=options, launcher=launcher)
    write("started", json.dumps(note))
    if how == "refuse":
        complaint = f"train_gpt_medium.py: {log}: its checkpoint is damaged\n"
        print(f"a warning\n{2 * complaint}{REPORT.format(1)}", file=sys.stderr)
        sys.exit(1)
    write(log, f"code\n{RULE}\nseed = 0\n{RULE}\nRunning Python \n{RULE}\n"
               "step:1/4 train_time:2000ms step_avg:2000.00ms")
    if how == "wait":
        wait_for_a_signal()
    elif how == "orphan" and os.fork() == 0:  # a process that keeps standard error open
        os.closerange(3, 99)  # the queue's lock
        os.close(1)
        time.sleep(60)
    elif how == "orphan":
        print(REPORT.format(-9), file=sys.stderr)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        print("the last line of a run")
    if how in ENDS:
        write(log, ENDS[how])
    if how == "remove":
        log.unlink()
        sys.exit()
    sys.exit(how != "finish")


def wait_for_a_signal():
    """Return a moment after the first signal, once ./keep is gone; each signal is a line of ./signals."""
    stopped = []
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: (stopped.append(number), write("signals", signal.Signals(number).name)))
    write("waiting", "")
    while not stopped or os.path.exists("keep"):
        time.sleep(0.01)
    time.sleep(0.2)


def write(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


if __name__ == "__main__":
    if sys.argv[1] == "--help":
        print("the keys")
    elif sys.argv[1] == "--standalone":  # torchrun's options PROGRAM CONFIG ...
        program = sys.argv.index("train_gpt_medium.py")
        train(sys.argv[1:program], *sys.argv[program + 1:])
    else:
        assert sys.argv[1:3] == ["--check", "--json"]
        check(sys.argv[3:])
