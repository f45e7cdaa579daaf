"""logs/machine.py: the device of a rank, and what the log says about the machine."""

import ast
import os
import re

import pytest
import torch
from helpers import ROOT

from logs import machine

CPU = torch.device("cpu")


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


def test_gpus_that_pytorch_cannot_use_are_a_mistake(nvidia_smi):
    nvidia_smi("NVIDIA H100 80GB HBM3, 535.104\nNVIDIA H100 80GB HBM3, 535.104")
    with pytest.raises(ValueError) as raised:
        machine.find_device()
    message = str(raised.value)
    build = f"PyTorch {torch.__version__}"
    assert message.startswith(f"nvidia-smi shows NVIDIA H100 80GB HBM3 with driver 535.104, but {build}")
    assert "install a newer driver or a PyTorch built for this one" in message and "\n" not in message


@pytest.mark.parametrize("output, status", [("", 0), ("NVIDIA-SMI has failed", 9)])
def test_without_a_gpu_the_device_is_the_cpu(nvidia_smi, output, status):
    nvidia_smi(output, status)
    assert machine.find_device() == CPU


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_user_has_hidden_are_no_mistake(nvidia_smi, monkeypatch, hidden):
    nvidia_smi("NVIDIA H100 80GB HBM3, 535.104")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert machine.find_device() == CPU


def test_without_nvidia_smi_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    assert machine.find_device() == CPU


def test_more_ranks_than_gpus_are_a_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="started 8 ranks on a node with 1 GPU; use --nproc_per_node=1 or fewer"):
        machine.find_device()


def test_the_program_text_is_that_of_every_module_that_decides_numbers():
    """Those that the script and its modules import; the queue only starts runs."""
    imported, modules = set(), ["train_gpt_medium.py"]
    for module in modules:
        tree = ast.parse((ROOT / module).read_text())
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                path = f"{name.replace('.', '/')}.py"
                if (ROOT / path).is_file() and path not in {*modules, "configs/run_queue.py"}:
                    modules.append(path)
        imported.add(module)
    assert set(machine.PROGRAM) == imported
    text = machine.program_text()
    assert [text.index(f"# {name}\n{(ROOT / name).read_text()}") for name in machine.PROGRAM][0] == 0


def test_the_description_of_the_machine():
    device, environment = machine.describe_device(CPU, 2), machine.describe_environment()
    assert re.fullmatch(r"device: 2 ranks, CPU with \d+ threads? a rank, fp32, .*, gloo", device)
    assert f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}" in environment


def test_the_peak_memory_of_this_process_is_in_mib():
    found = re.fullmatch(r"peak memory resident: (\d+) MiB", machine.peak_memory(CPU))
    assert 100 < int(found[1]) < 100_000
