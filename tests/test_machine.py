"""logs/machine.py: the device of a rank, and what the log says about the machine."""

import ast
import os
import re
import sys

import pytest
import torch
from helpers import ROOT

from logs import machine

CPU = torch.device("cpu")
H100 = "NVIDIA H100 80GB HBM3, 535.104"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an `nvidia-smi` of the given output and exit status first on PATH, on a machine without usable GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(output, status=0):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return make


@pytest.mark.parametrize("find", [machine.find_device, machine.count_devices], ids=["a rank", "the queue"])
def test_gpus_that_pytorch_cannot_use_are_a_mistake(nvidia_smi, find):
    nvidia_smi(f"{H100}\n{H100}")
    with pytest.raises(ValueError) as raised:
        find()
    message = str(raised.value)
    assert message.startswith("nvidia-smi shows NVIDIA H100 80GB HBM3 with driver 535.104, but PyTorch "
                              f"{torch.__version__} of {sys.executable}, built for CUDA ")
    assert "install a newer driver or a PyTorch built for this one" in message and "\n" not in message


@pytest.mark.parametrize("output, status, variable", [
    ("", 0, {}), ("NVIDIA-SMI has failed", 9, {}), (H100, 0, {"CUDA_VISIBLE_DEVICES": ""}),
    (H100, 0, {"CUDA_VISIBLE_DEVICES": "-1"}), (H100, 0, {"PATH": ""})])
def test_without_a_gpu_or_with_hidden_ones_the_device_is_the_cpu(nvidia_smi, monkeypatch, output, status, variable):
    nvidia_smi(output, status)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    assert machine.find_device() == CPU


def test_the_queue_counts_gpus_without_taking_memory_on_one(monkeypatch):
    """A current device would have a CUDA context of hundreds of MiB for as long as the queue lives."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("made current"))
    assert machine.count_devices() == (8, "GPUs")


def test_more_ranks_than_gpus_are_a_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="started 8 ranks on a node with 1 GPU; use --nproc_per_node=1 or fewer"):
        machine.find_device()


def test_the_program_text_is_that_of_every_module_that_decides_numbers():
    """Those that the script and its modules import; the queue only starts runs."""
    modules = ["train_gpt_medium.py"]
    for module in modules:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            if isinstance(node, ast.ImportFrom):
                names = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
                paths = {f"{name.replace('.', '/')}.py" for name in names} - {*modules, "configs/run_queue.py"}
                modules += sorted(path for path in paths if (ROOT / path).is_file())
    assert sorted(machine.PROGRAM) == sorted(modules)
    assert machine.program_text() == "\n".join(f"# {name}\n{(ROOT / name).read_text()}" for name in machine.PROGRAM)


def test_the_peak_memory_of_this_process_is_in_mib():
    found = re.fullmatch(r"peak memory resident: (\d+) MiB", machine.peak_memory(CPU))
    assert 100 < int(found[1]) < 100_000
