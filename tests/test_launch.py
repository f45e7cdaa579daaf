"""Test the real program as a user starts it: run.sh in a fresh clone, the queue killed and rerun, a terminal."""

import os
import re
import select
import subprocess
import sys
import time

import pytest
from faults import Ranks
from helpers import ROOT, TRAIN_LINE, VAL_LINE, val_losses

from logs.run_log import is_finished

ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1",
                            "PYTHONIOENCODING": "ascii", "PET_NNODES": "2", "PET_MAX_RESTARTS": "1"}
QUEUE = "env", "SLURM_JOB_GPUS=2", "./run.sh"  # may run beside the smoke test's, which has another number
pytestmark = pytest.mark.slow


def start(*command, cwd=ROOT):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, text=True, **pipes)


def test_without_arguments_run_sh_trains_the_baseline_at_scale_tiny_on_a_cpu(tmp_path):
    """In a fresh clone as on Windows, where it makes the data; stopped early."""
    clone, log = tmp_path / "clone", tmp_path / "clone/logs/tiny/baseline/000.txt"
    subprocess.run(["git", "clone", "--quiet", "--config", "core.autocrlf=true", ROOT, clone], check=True)
    process = start(clone / "run.sh", cwd=tmp_path)
    while process.poll() is None and not (log.exists() and "step:2/160 train" in log.read_text()):
        time.sleep(0.1)
    process.terminate()
    output, errors = process.communicate()
    assert process.returncode == 143 and "only byte frequencies has validation loss" in output
    assert errors == "run.sh: SIGTERM: stopping after this step or validation; Ctrl-C stops it now\n"
    assert "stopped by SIGTERM in logs/tiny/baseline/000.txt, with a checkpoint; rerun" in output
    assert log.with_name("000.resume.ckpt").exists() and val_losses(log.read_text()) == val_losses(output) != {}


def test_a_smoke_test_reports_what_a_full_run_will_take_and_leaves_no_files(tmp_path):
    """But torchrun leaves an empty folder."""
    process = start("env", "SLURM_JOB_GPUS=1", f"TMPDIR={tmp_path}", "./run.sh", "--smoke", "configs/none.toml")
    output, errors = process.communicate()
    assert (process.returncode, errors, [*tmp_path.glob("tmp*")]) == (0, "", [])
    assert re.search(r"""^configs/none.toml:
warm-up: \d+ s
speed: \d+\.\d ms a step
peak memory resident: \d+ MiB
loss: 5.9506 at step 0 and 4\.\d+ at step 10
full run: estimate: at least \d+ min, for 160 steps of \d+ ms and 5 validations of \d+\.\d s
run.sh: 1 finished, 0 diverged, 0 failed$""", output, re.MULTILINE)


@pytest.mark.parametrize("command", [
    ["./run.sh", "--check"],  # takes no lock
    *([sys.executable, program] for program in ("train_gpt_medium.py", "logs/compare.py", "logs/status.py",
                                                "data/local_text.py", "data/cached_fineweb10B.py"))], ids=" ".join)
def test_a_mistake_is_one_line_and_status_2(command):
    process = start(*command, "configs/nowhere.toml")
    output, errors = process.communicate()
    assert (process.returncode, output, errors.count("\n")) == (2, "", 1)
    assert "configs/nowhere.toml" in errors


def test_on_a_terminal_a_bar_replaces_the_training_lines(small_config, tmp_path):
    leader, terminal = os.openpty()
    config = small_config(num_iterations=2, val_loss_every=1, sequences_per_step=1, val_tokens=256)
    fault = f"terminal = os.open({os.ttyname(terminal)!r}, os.O_RDWR); [os.dup2(terminal, n) for n in (1, 2)]"
    of_run, output = Ranks(tmp_path / "output", config, fault=fault), b""
    while (ready := select.select([leader], [], [], 0.1)[0]) or of_run.processes[0].is_alive():
        output += os.read(leader, 2**16) if ready else b""
    assert of_run.statuses() == [0]
    text = output.decode().replace("\r", "\n")
    assert [int(match[1]) for match in VAL_LINE.finditer(text)] == [0, 1, 2]
    assert "2/2" in text and not TRAIN_LINE.search(text)
    assert len(TRAIN_LINE.findall((tmp_path / "logs/small/000.txt").read_text())) == 2


def test_a_killed_queue_ends_with_the_log_of_an_undisturbed_run(small_config, tmp_path):
    """Rerun with the same command."""
    config = small_config(num_iterations=12, val_loss_every=6, val_seq_len=128, val_tokens=128,
                          sequences_per_step=1, checkpoint_every=2)
    log, process = tmp_path / "logs" / "small" / "000.txt", start(*QUEUE, config)
    while not log.exists() or "step:4/12 train_time" not in log.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    last = start(*QUEUE, config)
    assert last.wait() == 0, last.communicate()
    undisturbed = Ranks(tmp_path / "output", config, "--run_id", 0, "--log_dir", tmp_path / "undisturbed")
    assert undisturbed.statuses() == [0] and is_finished(log)
    losses, expected = ([match.group(1, 3) for match in VAL_LINE.finditer(path.read_text())]
                        for path in (log, tmp_path / "undisturbed" / "small" / "000.txt"))
    assert losses == expected and "resumed at step" in log.read_text()
