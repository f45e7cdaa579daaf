"""Launch: the program as it is started without run.sh, and what it shows."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, TRAIN_LINE, VAL_LINE, run_program, val_losses

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("arguments, fragment", [
    (["configs/nowhere.toml"], "no such file"),
    (["configs/baseline.toml", "--num_iteration=5"], "num_iterations"),
    (["configs/baseline.toml", "--train_files", "nowhere/*.bin", "--check"], "no file matches nowhere/*.bin"),
])
def test_a_mistake_is_one_line_and_status_2(arguments, fragment):
    result = run_program(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and fragment in result.stderr


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_said_once_without_our_traceback(small_config):
    result = run_program(small_config(), ranks=3, env=ONE_THREAD)
    ours = [line for line in result.stderr.splitlines() if line.startswith("train_gpt_medium.py: ")]
    assert result.returncode != 0 and len(ours) == 1
    assert "sequences_per_step: 4 sequences cannot be divided among 3 ranks" in ours[0]
    assert 'train_gpt_medium.py", line' not in result.stderr and result.stdout == ""


@pytest.mark.slow
def test_on_a_terminal_a_bar_takes_the_place_of_the_training_lines(small_config, tmp_path):
    leader, terminal = os.openpty()
    command = [sys.executable, "train_gpt_medium.py", str(small_config())]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ONE_THREAD, stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b""
    while chunk := read_terminal(leader):
        output += chunk
    assert process.wait() == 0
    text = output.decode().replace("\r", "\n")
    assert [int(match[1]) for match in VAL_LINE.finditer(text)] == [0, 2, 4]
    assert "4/4" in text and not TRAIN_LINE.search(text)
    assert len(TRAIN_LINE.findall((tmp_path / "logs/small/000.txt").read_text())) == 4


def read_terminal(leader):
    try:
        return os.read(leader, 65536)
    except OSError:  # how a terminal says that the other side has closed it
        return b""


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_its_output(small_config, tmp_path):
    command = [sys.executable, "train_gpt_medium.py", str(small_config())]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0, process.stderr.read()
    assert list(val_losses((tmp_path / "logs/small/000.txt").read_text())) == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [25, pytest.param(160, marks=pytest.mark.campaign)])
def test_tiny_learns_more_than_byte_frequencies(tmp_path, steps):
    """The embedded scale, in a copy of the repository without data, on two ranks; of its 160 steps the first ones."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", "tests", "*.bin", "[0-9]*", "local_text"))
    made = subprocess.run([sys.executable, "data/local_text.py"], cwd=clone, capture_output=True, text=True)
    byte_frequency_loss = float(re.search(r"only byte frequencies has validation loss (\d+\.\d+)", made.stdout)[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train_gpt_medium.py", "configs/baseline.toml", "--scale", "tiny"]
    command += ["--num_iterations", "25", "--val_tokens", "16384"] if steps == 25 else []
    result = subprocess.run(command, cwd=clone, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = val_losses((clone / "logs/tiny/baseline/000.txt").read_text())
    assert losses == val_losses(result.stdout) and list(losses) == ([0, 25] if steps == 25 else [0, 40, 80, 120, 160])
    assert all(later < earlier for earlier, later in zip(losses.values(), list(losses.values())[1:]))
    assert losses[steps] < byte_frequency_loss - (1 if steps == 160 else 0)
    assert [int(line[0]) for line in TRAIN_LINE.findall(result.stdout)] == list(range(25, steps + 1, 25))
