"""The ranks of a run: how they start, agree, stop together, and end."""

import atexit
import faulthandler
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from logs.log_file import end_with_parent
from logs.run_log import RunLog

Result = TypeVar("Result")

START_TIMEOUT_S = 1200  # without progress before the first step is done, while kernels compile


def start_process_group() -> None:
    """Join the ranks that torchrun started; without torchrun this process is the only rank.

    CPU tensors go over gloo, GPU tensors over NCCL. The timeout is an hour, not ten minutes: ranks whose compile caches
    differ reach the first collective minutes apart, and `allow_seconds` ends a hung rank.
    """
    allow_seconds(START_TIMEOUT_S)
    timeout = timedelta(hours=1)
    store, rank, world_size = dist.HashStore(), 0, 1
    if dist.is_torchelastic_launched():
        end_with_parent(signal.SIGKILL)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # A launcher that died before the line above no longer answers; the process group would wait for it.
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=60).close()
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # Ranks that torchrun restarts would find their predecessors' addresses in the store, which is the same one
        # (https://github.com/pytorch/pytorch/issues/135712).
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    # Else a mistake could end as an abort: gloo's threads must not outlive the interpreter.
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def wait_for_all(device: torch.device) -> None:
    """Wait until every rank is here and its GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.all_reduce(torch.zeros(()))


def gather(value: Any) -> list[Any]:
    """Each rank's value, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(function: Callable[..., Result], *arguments: Any) -> Result:
    """A function's result, once no rank has raised ValueError or OSError in it; else all ranks exit with status 2.

    Rank 0 prints each distinct message, in one line, before any rank ends: a rank that ended on its own would make
    torchrun end the others, perhaps before one had told the user why.
    """
    result, problem = None, ""
    try:
        result = function(*arguments)
    except (ValueError, OSError) as error:
        problem = one_line(error)
    problems = [text for text in dict.fromkeys(gather(problem)) if text]
    if dist.get_rank() == 0:
        for text in problems:
            print_error(text)
    gather(None)  # nobody goes on before rank 0 has printed
    if problems:
        sys.exit(2)
    return result


def check_same(configuration: dict[str, Any]) -> None:
    """Raises ValueError if this rank's configuration is not rank 0's, as when two nodes have two versions of a file."""
    first = gather(configuration)[0]
    if differing := [name for name, value in configuration.items() if value != first[name]]:
        raise ValueError(f"{', '.join(differing)} of rank {dist.get_rank()} differ from rank 0's; "
                         "give every node the same config and options")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).encode(errors="backslashreplace").decode()  # file names can be of any bytes


def print_error(text: str) -> None:
    """Print a line on standard error, if somebody still reads it."""
    try:
        print(f"train_gpt_medium.py: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass


def allow_seconds(seconds: float) -> None:
    """Print all stacks of this process and end it unless this is called again within so many seconds."""
    faulthandler.dump_traceback_later(seconds, exit=True)


class Diverged(Exception):
    """A loss, weight or optimizer state is NaN or infinite. Every rank raises it; its message is for the user."""


class Stopped(Exception):
    """A signal has ended the run. Every rank raises it, with a message for the user."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(f"stopped by signal {signal_number}, {message}")
        self.signal = signal_number


class StopFlag:
    """A signal that one rank or more got, known to all ranks at the same step.

    Every rank sends its flag after each step and reads the maximum a step later, over gloo, so that no rank waits for
    it. A second signal of the same kind, or any before the first step, ends the process at once.
    """

    def __init__(self, log: RunLog):
        self.log = log
        self.signal = 0
        self.flag = torch.zeros((), dtype=torch.int32)
        self.sent: dist.Work | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        if self.sent is None or number == self.signal:
            try:
                self.log.end(f"ended at once by signal {number}")
            finally:  # the signal may have come while the log was being written to
                os._exit(128 + number)
        self.signal = number

    def agreed(self) -> int:
        """The signal that any rank had received by the previous call; 0 for none. Every rank calls this once a step."""
        known = 0
        if self.sent is not None:
            self.sent.wait()
            known = int(self.flag)
        self.flag.fill_(self.signal)
        self.sent = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return known


def run_and_report(log: RunLog, run: Callable[..., None], *arguments: Any) -> int:
    """The exit status of `run(...)`; what ends it early is one line on standard error, and the log's last.

    After an error the process exits here, because destroying the process group would wait for ranks that are gone.
    """
    status, is_everyones = 1, False
    try:
        run(*arguments)
        dist.destroy_process_group()
        return 0
    except Diverged as error:
        why, is_everyones = str(error), True
        with suppress(OSError):
            log.to_file(why)
    except Stopped as error:
        why, status, is_everyones = str(error), 128 + error.signal, True
    except (ValueError, OSError) as error:
        why = one_line(error)
    except BaseException as error:  # ours, or the GPU's
        traceback.print_exc()
        why = f"{type(error).__name__}: {one_line(error)}"
    log.end(why)
    if dist.get_rank() == 0 or not is_everyones:
        print_error(f"{log.path or f'rank {dist.get_rank()}'}: {why}")
    if is_everyones:
        gather(None)  # when the first rank is gone, the launcher ends the others
    os._exit(status)
