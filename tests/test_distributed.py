"""logs/distributed.py as one rank sees it: errors, signals and devices. test_faults.py runs several ranks."""

import getpass
import os
import pwd
import signal
import sys
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from logs import distributed
from logs.run_log import RunLog

pytestmark = pytest.mark.usefixtures("process_group")
H100 = "NVIDIA H100 80GB HBM3, 535.104"


def test_a_users_error_is_one_line_and_exit_status_2(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        distributed.on_all_ranks(Mock(side_effect=OSError(13, "two\nlines  and spaces", "/a/\udce9.bin")))
    assert capsys.readouterr().err == "train_gpt_medium.py: [Errno 13] two lines and spaces: '/a/\\udce9.bin'\n"


def test_a_signal_amid_a_write_to_the_log_exits_and_an_ignored_one_stays_ignored(monkeypatch):
    """Python refuses to write to a file that it is writing to. nohup ignores SIGHUP."""
    numbers, handlers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), (signal.SIG_DFL, signal.SIG_DFL, signal.SIG_IGN)
    before = list(map(signal.signal, numbers, handlers))
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(RunLog, "end", Mock(side_effect=RuntimeError("reentrant call")))
    distributed.StopFlag(RunLog(None))
    with pytest.raises(SystemExit, match="^130$"):
        signal.raise_signal(signal.SIGINT)
    after = list(map(signal.signal, numbers, before))
    assert after[0] == after[1] != after[2] == signal.SIG_IGN


@pytest.mark.parametrize("output, status, variables, error", [
    (f"{H100}\n{H100}", 0, {}, "lists NVIDIA H100 80GB HBM3 with driver 535.104, but PyTorch .* of .*, built for CUDA "
     ".*, cannot use it; install a newer driver or a PyTorch built for this one .*"),
    ("Driver/library version mismatch\nx", 18, {}, "fails with status 18: Driver/library version mismatch; repair .*"),
    ("", 124, {}, "does not answer within 10 s; reboot"), ("", 0, {}, ""), (H100, 9, {"CUDA_VISIBLE_DEVICES": ""}, ""),
    (H100, 0, {"CUDA_VISIBLE_DEVICES": "-1"}, ""), (H100, 0, {"PATH": ""}, "")])
def test_a_gpu_that_pytorch_cannot_use_is_an_error(tmp_path, monkeypatch, output, status, variables, error):
    """Without any, the ranks share the cores that this process may use. `timeout` has status 124."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho a warning >&2\necho '{output}'\nexit {status}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in ({"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    end = "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
    with pytest.raises(ValueError, match=f"^nvidia-smi {error}, {end}$") if error else nullcontext():
        assert (distributed.find_device(), distributed.count_devices()) == (torch.device("cpu"), (1, "CPU cores"))


def test_gpus_limit_the_ranks_and_are_counted_without_taking_memory_on_one(monkeypatch):
    for name, value in dict(is_available=lambda: True, device_count=lambda: 1, set_device=pytest.fail).items():
        monkeypatch.setattr(torch.cuda, name, value)  # a current device has a CUDA context, of hundreds of MiB
    assert distributed.count_devices() == (1, "GPUs")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="started 8 ranks on 1 GPU; use --nproc_per_node=1"):
        distributed.find_device()


@pytest.mark.parametrize("variables, has_header, lacking", [
    ({}, True, "a C compiler"), ({"CC": "FOLDER/cc -x"}, True, "a C compiler, and CC=.*/cc -x is not a program"),
    ({"CC": "FOLDER/cc"}, True, ""), ({"CC": "FOLDER/cc"}, False, ".*/Python.h"),
    ({"CC": "cc", "C_INCLUDE_PATH": "/:FOLDER"}, False, "")])
def test_on_a_gpu_a_missing_compiler_is_said_at_first(tmp_path, monkeypatch, variables, has_header, lacking):
    """Without the check, each run of a queue would fail after its start (triton/runtime/build.py)."""
    for name in ("Python.h", "cc"):
        (tmp_path / name).touch(0o755)
    for name, value in ({"PATH": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value.replace("FOLDER", str(tmp_path)))
    include = tmp_path if has_header else tmp_path / "nowhere"
    monkeypatch.setattr(distributed.sysconfig, "get_paths", lambda scheme: {"include": str(include)})
    with pytest.raises(ValueError, match=f"needs {lacking}; install it, on Ubuntu: ") if lacking else nullcontext():
        distributed.check_machine("a.toml", "cuda", 128)


@pytest.mark.parametrize("files, cores", [
    ({}, 8), ({"cpu.max": "max 100000"}, 8), ({"cpu.max": "150000 100000"}, 2), ({"cpu.max": "9900000 100000"}, 8),
    ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8), ({"cpu.cfs_quota_us": "-1"}, 8),
    ({"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}, 3)])
def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch, files, cores):
    """docker run --cpus, in control groups v2 and v1 (https://github.com/ollama/ollama/issues/17916)."""
    monkeypatch.setattr(distributed, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / ("cpu" if "cfs" in name else "") / name).write_text(f"{text}\n")
    assert distributed.count_cores() == cores


def test_a_user_without_a_name_can_compile(monkeypatch):
    """PyTorch 2.11 asks for the name, which docker run --user 1234 does not have."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError))
    monkeypatch.setattr(distributed, "reset_watchdog", Mock())
    monkeypatch.setattr(distributed.dist, "init_process_group", Mock())
    distributed.start_process_group()
    assert getpass.getuser() == str(os.getuid())
