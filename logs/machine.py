"""The machine that a rank runs on: its device, and what the log says about it."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from logs.log_file import plural

# All that decides numbers; a log begins with it, and an interrupted run does not go on with another.
PROGRAM = ("train_gpt_medium.py", "configs/checks.py", "configs/keys.py", "data/batches.py", "data/shards.py",
           "logs/checkpoint.py", "logs/log_file.py", "logs/machine.py", "logs/ranks.py", "logs/resume.py",
           "logs/run_log.py", "logs/weights.py")


def program_text() -> str:
    """The text of the program, file by file, each under its name."""
    root = Path(__file__).resolve().parent.parent
    return "\n".join(f"# {name}\n{(root / name).read_text(encoding='utf-8')}" for name in PROGRAM)


def find_device() -> torch.device:
    """This rank's device, made the current one.

    Raises ValueError if the machine has GPUs that PyTorch cannot use, or fewer than ranks.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        check_no_gpu()
        return torch.device("cpu")
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > gpus:
        raise ValueError(f"torchrun started {ranks} ranks on a node with {plural(gpus, 'GPU')}; "
                         f"use --nproc_per_node={gpus} or fewer")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def count_devices() -> tuple[int, str]:
    """How many of what this machine trains on, without taking memory on a GPU. Raises ValueError as `check_no_gpu`."""
    if torch.cuda.is_available():
        return torch.cuda.device_count(), "GPUs"
    check_no_gpu()
    return os.cpu_count() or 1, "CPU cores"


def check_no_gpu() -> None:
    """Raises ValueError if nvidia-smi lists a GPU that PyTorch cannot use, unless CUDA_VISIBLE_DEVICES hides it."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True)
    if gpus.returncode == 0 and gpus.stdout.strip():
        name, _, driver = gpus.stdout.splitlines()[0].partition(", ")
        build = f"PyTorch {torch.__version__} of {sys.executable}, built for CUDA {torch.version.cuda or 'no version'},"
        raise ValueError(f"nvidia-smi shows {name} with driver {driver}, but {build} cannot use it; install a newer "
                         "driver or a PyTorch built for this one (https://pytorch.org/get-started/locally), "
                         "or set CUDA_VISIBLE_DEVICES= to train on the CPU")


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        kind = f"{torch.cuda.get_device_name(device)}, bf16, compiled FlexAttention, NCCL"
    else:
        kind = f"CPU with {plural(torch.get_num_threads(), 'thread')} a rank, fp32, dense masked attention, gloo"
    return f"device: {plural(dist.get_world_size(), 'rank')}, {kind}"


def describe_environment() -> str:
    """Versions and, with CUDA, what nvidia-smi says."""
    lines = [
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {platform.platform()}",
    ]
    if torch.cuda.is_available():
        try:
            report = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            lines.append(report.stdout)
        except OSError as error:
            lines.append(f"nvidia-smi: {error}")
    return "\n".join(lines)


def peak_memory(device: torch.device) -> str:
    """The log's line of peak memory, in MiB: of the GPU as the published logs have it, else of this process."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20
        return f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return f"peak memory resident: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20} MiB"
