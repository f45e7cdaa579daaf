"""Ranks with a fault: the program's `main`, after a piece of Python has prepared the fault.

    FAULT=PYTHON torchrun ... tests/faults.py CONFIG.toml [--KEY VALUE ...]
"""

import ctypes
import math  # noqa: F401 (for faults)
import multiprocessing
import os
import resource
import signal
import sys
import time  # noqa: F401 (for faults)
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 (imported by the first optimizer, for seconds)
from torch.distributed.elastic.utils.distributed import get_free_port  # noqa: E402

import train_gpt_medium as train  # noqa: E402
from logs import checkpoint, run_log  # noqa: E402, F401 (for faults)


def rank():
    return int(os.environ.get("RANK", "0"))


def on_last(action):
    """Return the action, on the last rank only."""
    return lambda: rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1 and action()


def before(owner, name, action, condition=lambda *arguments: True):
    """Make a function do something first, in calls whose arguments fulfil a condition."""
    original = getattr(owner, name)

    def replacement(*arguments, **options):
        if condition(*arguments):
            action()
        return original(*arguments, **options)

    setattr(owner, name, replacement)


def at_step(step, action):
    before(train.Trainer, "train_step", action, lambda trainer, this_step, *_: this_step == step)


def send(number, times=1):
    """Return an action that sends this process a signal."""
    return lambda: [os.kill(os.getpid(), number) for _ in range(times)]


def hang():
    """Sleep for an hour with the interpreter's lock, so that no other thread of Python can act."""
    ctypes.PyDLL(None).sleep(3600)


def skip_newton_schulz():
    """Let Muon normalize its updates instead: on a CPU its products in bf16 take most of a step's time."""
    train.newton_schulz = lambda u: 16 * u / (u.norm() + 1e-7)


def use_bf16():
    """Store matrices in bf16, as on a GPU, so that the optimizer keeps their lower bits."""
    original = train.GPT.__init__
    train.GPT.__init__ = lambda model, hp: (original(model, hp), model.use_bf16())[0]


def spoil(after, tensor_of, value):
    """Make a number of one of the trainer's tensors NaN or infinite at the end of a step."""
    original = train.Trainer.train_step

    def train_step(trainer, step, *batch):
        original(trainer, step, *batch)
        if step == after:
            tensor_of(trainer).view(-1)[-1] = value

    train.Trainer.train_step = train_step


def limit_files(size):
    """Limit the size of this process's files, to stand for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class RunsCode:
    """Unpickling this would run a program."""

    def __reduce__(self):
        return exec, ("raise SystemExit('this was run')",)


def run_rank(arguments, folder, fault, environment):
    """Run the program in this process, with its outputs in stdout.RANK and stderr.RANK; end the process."""
    os.environ.update(environment)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}.{rank()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell or nohup can have them ignored
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    exec(fault, globals())
    sys.exit(train.main(arguments))


class Ranks:
    """The program's ranks, forked from a process that has imported it: seconds sooner than under torchrun.

    One rank runs as without torchrun. Outputs are appended to files in `folder`.
    """

    def __init__(self, folder, *arguments, ranks=1, fault="", environment=(), options_of_last=()):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["faults"])
        self.folder, self.processes, environment = Path(folder), [], dict(environment)
        self.folder.mkdir(exist_ok=True)
        if ranks > 1:
            environment |= dict(WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(get_free_port()),
                                TORCHELASTIC_RUN_ID="test")
        for number in range(ranks):
            own = [*map(str, arguments), *(options_of_last if number == ranks - 1 else [])]
            args = own, self.folder, fault, environment | dict(RANK=str(number))
            self.processes.append(context.Process(target=run_rank, args=args))
            with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # for the process that forks
                self.processes[-1].start()

    def statuses(self):
        """Wait for all ranks and return their exit statuses: minus the signal's number if one killed it."""
        for process in self.processes:
            process.join(900)
        return [process.exitcode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def output(self, name="stdout"):
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"{name}.*")))


if __name__ == "__main__":
    exec(os.environ["FAULT"])
    sys.exit(train.main(sys.argv[1:]))
