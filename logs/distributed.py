"""The distributed runtime: the ranks of a run, how they start, agree, stop and exit, and the device of each."""

import atexit
import faulthandler
import math
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from subprocess import getoutput, getstatusoutput
from typing import Any

import torch
import torch.distributed as dist

from logs.run_log import PRINT_EVERY, RunLog, end_with_parent, plural, say

CONTROL_GROUP = Path("/sys/fs/cgroup")
START_TIMEOUT_S = 1200  # watchdog limit for each part of the start, because kernels compile


def start_process_group() -> None:
    """Join the ranks that torchrun started, or be the only rank without torchrun, and start the watchdog."""
    reset_watchdog(START_TIMEOUT_S)
    os.environ.setdefault("USER", str(os.getuid()))  # in a container without it, PyTorch 2.11 cannot name its cache
    timeout = timedelta(hours=1)  # ranks with different compile caches meet minutes apart; the watchdog acts sooner
    store, rank, world_size = dist.HashStore(), 0, 1
    if dist.is_torchelastic_launched():
        end_with_parent(signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the queue's torchrun ignores it
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
    try:
        result, error_line = function(*arguments), ""
    except (ValueError, OSError) as error:
        result, error_line = None, " ".join(str(error).split())
    if error_lines := [line for line in dict.fromkeys(gather(error_line)) if line]:
        for line in error_lines if dist.get_rank() == 0 else []:
            say(f"train_gpt_medium.py: {line}", "stderr")
        gather(None)  # until rank 0 has printed: torchrun ends the other ranks as soon as one has exited
        sys.exit(2)
    return result


def check_equal_on_ranks(values: dict[str, Any]) -> None:
    """Raise ValueError if this rank's values differ from rank 0's, as when two nodes have two versions of a file."""
    first = gather(values)[0]
    if differing := [name for name in first | values if first.get(name) != values.get(name)]:
        raise ValueError(f"rank {dist.get_rank()}: differs from rank 0 in {', '.join(differing)}; "
                         "give every node the same code, data, config and options")


class Diverged(Exception):
    """A loss, weight or optimizer state is NaN or infinite. Every rank raises it; the user sees its message."""
    status = 1

    def __init__(self, step: int, why: str):
        super().__init__(f"diverged at step {step}: {why}")


class Stopped(Exception):
    """A signal has ended the run. Every rank raises it; the user sees its message."""
    def __init__(self, signal_number: int, has_checkpoint: bool):
        end = "with a checkpoint; rerun with its run_id to resume" if has_checkpoint else "without a checkpoint"
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, {end}")
        self.status = 128 + signal_number


class StopFlag:
    """Tell every rank, at the same step, that some rank has received a signal; a second Ctrl-C exits at once."""

    def __init__(self, log: RunLog):
        self.log, self.signal, self.received_at = log, 0, 0.0
        self.flag, self.sent = torch.zeros((), dtype=torch.int32), None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        # Within 3 s it is the same Ctrl-C, forwarded. Slurm repeats SIGTERM at the time limit, amid a checkpoint.
        if self.sent is None or number == self.signal == signal.SIGINT and time.monotonic() > self.received_at + 3:
            with suppress(Exception):  # RuntimeError if the signal interrupted a write to the log
                self.log.end(f"ended at once by {signal.Signals(number).name}")
            os._exit(128 + number)
        if number != self.signal:
            self.signal, self.received_at = number, time.monotonic()

    def poll(self) -> int:
        """Return the signal that any rank had received by the previous call, else 0. Every rank calls it each step."""
        if self.sent is not None:
            self.sent.wait()
        received = int(self.flag)
        self.flag.fill_(self.signal)  # the next call reads the maximum, so no rank waits for another
        self.sent = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return received


class LossCopy:
    """Log a training loss every PRINT_EVERY steps. No step waits for the GPU: a later one logs it, once it is there."""

    def __init__(self, log: RunLog, device: torch.device):
        is_cuda = device.type == "cuda"
        self.log, self.step, self.on_cpu = log, 0, torch.zeros((), pin_memory=is_cuda)
        self.event = torch.cuda.Event() if is_cuda else None

    def log_if_done(self) -> None:
        """Log an earlier step's loss if its copy is done, as it is after `synchronize`."""
        if self.step and (self.event is None or self.event.query()):
            self.log.train_loss_line(self.step, self.on_cpu.item())
            self.step = 0

    def update(self, step: int, loss: torch.Tensor) -> None:
        """Log an earlier step's loss if its copy is done; start to copy this step's if it is due."""
        self.log_if_done()
        if step % PRINT_EVERY == 0:
            self.step = step
            self.on_cpu.copy_(loss, non_blocking=True)
            if self.event is not None:
                self.event.record()


def run_and_report(log: RunLog, function: Callable[..., None], *arguments: Any) -> int:
    """Call `function` and return 0; if it raises, end the log and standard error with one line, and exit."""
    status, is_on_all_ranks = 1, False
    try:
        function(*arguments)
        dist.destroy_process_group()
        return 0
    except (Diverged, Stopped) as error:
        why, status, is_on_all_ranks = str(error), error.status, True
    except (ValueError, OSError) as error:
        why = str(error)
    except BaseException as error:  # a bug, or a GPU's error
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
    log.end(why := " ".join(why.split()))
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
    """Count this node's "GPUs" or "CPU cores". Raises ValueError if there may be a GPU that PyTorch cannot use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count(), "GPUs"  # makes none current: that would take memory on it
    command = "timeout 10 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null"
    status, output = (0, "") if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else getstatusoutput(command)
    if status == 127 or not (status or output):  # there is no nvidia-smi, or it lists no GPU
        return count_cores(), "CPU cores"
    said, build = output.partition("\n")[0].replace(", ", " with driver "), torch.version.cuda or "none"
    mismatch = (f"lists {said}, but PyTorch {torch.__version__} of {sys.executable}, built for CUDA {build}, cannot use"
                " it; install a newer driver or a PyTorch built for this one (https://pytorch.org/get-started/locally)")
    failure = f"fails with status {status}: {said}; repair the driver (after its update: reboot)"
    fault = {0: mismatch, 124: "does not answer within 10 s; reboot"}.get(status, failure)
    raise ValueError(f"nvidia-smi {fault}, or set CUDA_VISIBLE_DEVICES= to train on the CPU")


def count_cores() -> int:
    """Count the CPU cores that this process may use, also under a container's quota (docker run --cpus)."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # control groups v2, v1
        with suppress(OSError, ValueError):  # no such file, or no number because there is no quota
            quota, period = map(int, " ".join((CONTROL_GROUP / name).read_text() for name in names).split())
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores


def check_machine(config: Path, device_type: str, seq_len: int) -> None:
    """Raise ValueError if a GPU's machine lacks a C compiler, or a CPU's dense masks would take more than 16 GiB."""
    if device_type == "cuda":
        check_compiler()
    gib = 2 * 4 * seq_len**2 / 2**30  # two, in fp32
    if device_type == "cpu" and gib > 16 and os.environ.get("ANY_SIZE_ON_CPU", "0") in ("", "0"):
        raise ValueError(f"{config}: on a CPU, attention masks of {seq_len:,} tokens would take {gib:,.0f} GiB; "
                         "add --scale tiny, train on a GPU, or set ANY_SIZE_ON_CPU=1 to try it")


def check_compiler() -> None:
    """Raise ValueError unless Triton can compile the C code that starts kernels (triton/runtime/build.py)."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    paths = [path for name in ("CPATH", "C_INCLUDE_PATH") for path in os.environ.get(name, "").split(":")]
    paths.append(sysconfig.get_paths(scheme)["include"])
    lacking = "" if any(os.path.exists(f"{path}/Python.h") for path in paths) else f"{paths[-1]}/Python.h"
    cc = os.environ.get("CC")  # one word
    if not (shutil.which("gcc") or shutil.which("clang") if cc is None else shutil.which(cc)):
        lacking = "a C compiler" if cc is None else f"a C compiler, and CC={cc} is not a program"
    if lacking:
        raise ValueError(f"PyTorch's compiler needs {lacking}; install it, on Ubuntu: sudo apt install gcc "
                         f"python3.{sys.version_info[1]}-dev")


def describe_device(device: torch.device) -> str:
    """Return the log's line about ranks, device, number format, attention and communication."""
    kind = (f"{torch.cuda.get_device_name(device)}, bf16, compiled FlexAttention, NCCL" if device.type == "cuda" else
            f"CPU with {plural(torch.get_num_threads(), 'thread')} per rank, fp32, dense masked attention, gloo")
    return f"device: {plural(dist.get_world_size(), 'rank')}, {kind}"


def describe_environment() -> str:
    """Return the versions of Python, PyTorch and CUDA and, with CUDA, the output of nvidia-smi."""
    build = f"PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {platform.platform()}"
    gpus = f"\n{getoutput('timeout 10 nvidia-smi')}" if torch.cuda.is_available() else ""
    return f"Running Python {sys.version}\nRunning {build}{gpus}"


def peak_memory(device: torch.device) -> str:
    """Return the log's line of peak memory in MiB: of the GPU, as in published logs, else of this process."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20
        return f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB"
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return f"peak memory resident: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // units_per_mib} MiB"
