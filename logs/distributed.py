"""The distributed runtime: the ranks of a run, how they start, agree, stop and exit, and the device of each."""

import atexit
import faulthandler
import os
import platform
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from subprocess import getoutput, getstatusoutput
from typing import Any

import torch
import torch.distributed as dist

from logs.run_log import RunLog, end_with_parent, plural, say

START_TIMEOUT_S = 1200  # watchdog limit until the first step is done, because kernels compile


def start_process_group() -> None:
    """Join the ranks that torchrun started, or be the only rank without torchrun, and start the watchdog."""
    reset_watchdog(START_TIMEOUT_S)
    timeout = timedelta(hours=1)  # ranks with different compile caches meet minutes apart; the watchdog acts sooner
    store, rank, world_size = dist.HashStore(), 0, 1
    if dist.is_torchelastic_launched():
        end_with_parent(signal.SIGKILL)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # If torchrun died before the line above, its store is gone, and init_process_group would wait for it.
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=60).close()
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # Restarted ranks get the same store, with dead addresses (https://github.com/pytorch/pytorch/issues/135712).
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())  # else gloo's threads can abort


def reset_watchdog(seconds: float) -> None:
    """Print all stacks of this process and end it in `seconds`, unless it is called again first."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def synchronize(device: torch.device) -> float:
    """Wait until every rank is here and its GPU has finished its work; return this rank's clock, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.all_reduce(torch.zeros(()))
    return time.perf_counter()


def gather(value: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` on every rank; if any raises ValueError or OSError, print each error once and exit (status 2)."""
    result, error_line = None, ""
    try:
        result = function(*arguments)
    except (ValueError, OSError) as error:
        error_line = one_line(error)
    error_lines = [line for line in dict.fromkeys(gather(error_line)) if line]
    for line in error_lines if dist.get_rank() == 0 else []:
        say(f"train_gpt_medium.py: {line}", "stderr")
    gather(None)  # until rank 0 has printed: torchrun ends the other ranks as soon as one has exited
    if error_lines:
        sys.exit(2)
    return result


def check_equal_on_ranks(values: dict[str, Any]) -> None:
    """Raise ValueError if this rank's values differ from rank 0's, as when two nodes have two versions of a file."""
    first = gather(values)[0]
    if differing := [name for name in first | values if first.get(name) != values.get(name)]:
        raise ValueError(f"rank {dist.get_rank()}: {', '.join(differing)} differ from rank 0's; "
                         "give every node the same code, data, config and options")


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of valid UTF-8: file names can contain any bytes."""
    return " ".join(str(error).split()).encode(errors="backslashreplace").decode()


class Diverged(Exception):
    """A loss, weight or optimizer state is NaN or infinite. Every rank raises it; the user sees its message."""
    def __init__(self, step: int, why: str):
        super().__init__(f"diverged at step {step}: {why}")


class Stopped(Exception):
    """A signal has ended the run. Every rank raises it; the user sees its message."""
    def __init__(self, signal_number: int, has_checkpoint: bool):
        end = "with a checkpoint; rerun with its run_id to resume" if has_checkpoint else "without a checkpoint"
        super().__init__(f"stopped by signal {signal_number}, {end}")
        self.signal = signal_number


class StopFlag:
    """Tell every rank, at the same step, that some rank has received a signal; a second signal exits at once."""

    def __init__(self, log: RunLog):
        self.log, self.signal = log, 0
        self.flag, self.sent = torch.zeros((), dtype=torch.int32), None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        if self.sent is None or number == self.signal:  # before the first step, or the second of its kind
            with suppress(Exception):  # RuntimeError if the signal interrupted a write to the log
                self.log.end(f"ended at once by signal {number}")
            os._exit(128 + number)
        self.signal = number

    def poll(self) -> int:
        """Return the signal that any rank had received by the previous call, else 0. Every rank calls it each step."""
        if self.sent is not None:
            self.sent.wait()
        received = int(self.flag)
        self.flag.fill_(self.signal)  # the next call reads the maximum, so no rank waits for another
        self.sent = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return received


def run_and_report(log: RunLog, function: Callable[..., None], *arguments: Any) -> int:
    """Call `function` and return 0; if it raises, end the log and standard error with one line, and exit."""
    status, is_on_all_ranks = 1, False
    try:
        function(*arguments)
        dist.destroy_process_group()
        return 0
    except Diverged as error:
        why, is_on_all_ranks = str(error), True
        with suppress(OSError):
            log.to_file(why)
    except Stopped as error:
        why, status, is_on_all_ranks = str(error), 128 + error.signal, True
    except (ValueError, OSError) as error:
        why = one_line(error)
    except BaseException as error:  # a bug, or a GPU's error
        traceback.print_exc()
        why = f"{type(error).__name__}: {one_line(error)}"
    log.end(why)
    if dist.get_rank() == 0 or not is_on_all_ranks:
        say(f"train_gpt_medium.py: {log.path or f'rank {dist.get_rank()}'}: {why}", "stderr")
    if is_on_all_ranks:
        gather(None)  # torchrun ends the other ranks as soon as one has exited
    os._exit(status)  # destroy_process_group would wait for ranks that are gone


def find_device() -> torch.device:
    """Return this rank's device and make it current. Raises ValueError for too few GPUs, or as `count_devices`."""
    count, kind = count_devices()
    if kind == "CPU cores":
        return torch.device("cpu")
    if (num_ranks := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > count:
        raise ValueError(f"torchrun started {num_ranks} ranks on {plural(count, 'GPU')}; use --nproc_per_node={count}")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def count_devices() -> tuple[int, str]:
    """Count this node's "GPUs" or "CPU cores". Raises ValueError if nvidia-smi lists a GPU that PyTorch cannot use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count(), "GPUs"  # makes none current: that would take memory on it
    status, gpus = getstatusoutput("nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null")
    if status == 0 and gpus and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # "" and "-1" hide all
        gpu, build = gpus.splitlines()[0].replace(", ", " with driver "), torch.version.cuda or "no version"
        raise ValueError(f"nvidia-smi lists {gpu}, but PyTorch {torch.__version__} of {sys.executable}, built for CUDA "
                         f"{build}, cannot use it; install a newer driver or a PyTorch built for this one "
                         "(https://pytorch.org/get-started/locally), or set CUDA_VISIBLE_DEVICES= to train on the CPU")
    return os.cpu_count() or 1, "CPU cores"


def describe_device(device: torch.device) -> str:
    """Return the log's line about ranks, device, number format, attention and communication."""
    kind = (f"{torch.cuda.get_device_name(device)}, bf16, compiled FlexAttention, NCCL" if device.type == "cuda" else
            f"CPU with {plural(torch.get_num_threads(), 'thread')} per rank, fp32, dense masked attention, gloo")
    return f"device: {plural(dist.get_world_size(), 'rank')}, {kind}"


def describe_environment() -> str:
    """Return the versions of Python, PyTorch and CUDA and, with CUDA, the output of nvidia-smi."""
    build = f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {platform.platform()}"
    gpus = [getoutput("nvidia-smi")] if torch.cuda.is_available() else []
    return "\n".join([f"Running Python {sys.version}", build, *gpus])


def peak_memory(device: torch.device) -> str:
    """Return the log's line of peak memory in MiB: of the GPU, as in published logs, else of this process."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20
        return f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return f"peak memory resident: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20} MiB"
