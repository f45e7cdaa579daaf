"""Launch: the program as a user starts it, and what it shows."""

import os
import re
import select
import subprocess
import sys
import time

import pytest
from faults import Ranks
from helpers import ROOT, TRAIN_LINE, VAL_LINE, val_losses

from data import local_text

ENVIRONMENT = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}


def byte_frequency_loss(output):
    return float(re.search(r"only byte frequencies has validation loss (\d+\.\d+)", output)[1])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, pytest.param(160, marks=pytest.mark.campaign)])
def test_without_arguments_run_sh_trains_the_baseline_at_scale_tiny_on_a_cpu(tmp_path, steps):
    """In a fresh clone, where it makes the data first: stopped by SIGTERM after a few steps, or to its end.

    After all of its steps it is far below a model that knows only byte frequencies.
    """
    clone, log = tmp_path / "clone", tmp_path / "clone/logs/tiny/baseline/000.txt"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    process = subprocess.Popen([clone / "run.sh"], env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (log.exists() and f"step:{steps}/160 train" in log.read_text()):
        time.sleep(0.1)
    if steps < 160:
        process.terminate()
    output, errors = process.communicate()
    assert "configs/baseline.toml --scale tiny" in output.splitlines()[0]
    losses = list(val_losses(log.read_text()).values())
    assert losses == list(val_losses(output).values()) == sorted(losses, reverse=True)
    if steps < 160:
        assert process.returncode == 143 and losses[0] > byte_frequency_loss(output)
        said = [line for line in errors.splitlines() if line.startswith("train_gpt_medium.py: ")]
        assert len(said) == 1 and "stopped by signal 15, with a checkpoint" in said[0]
        assert log.with_name("000.resume.ckpt").exists()
    else:
        assert process.returncode == 0 and len(losses) == 5 and losses[-1] < byte_frequency_loss(output) - 1


@pytest.mark.slow
def test_a_few_steps_of_tiny_learn_more_than_byte_frequencies(run_main, tmp_path):
    expected = byte_frequency_loss(local_text.make_shards([], tmp_path))
    data = [f"--{kind}_files={tmp_path}/local_{kind}_*.bin" for kind in ("train", "val")]
    assert run_main(ROOT / "configs/baseline.toml", "--scale=tiny", *data, f"--log_dir={tmp_path}",
                    "--num_iterations=12", "--val_tokens=4096", "--warmup_steps=0") == 0
    assert val_losses((tmp_path / "tiny/baseline/000.txt").read_text())[12] < expected


@pytest.mark.slow
@pytest.mark.parametrize("command, arguments, fragment", [
    (["./run.sh", "--check"], ["configs/nowhere.toml"], "configs/nowhere.toml: no such"),  # a check takes no lock
    ([sys.executable, "train_gpt_medium.py"], ["configs/baseline.toml", "--value_embeddings", "[[0,", "15]]"], "quote"),
], ids=["run.sh", "the program"])
def test_a_mistake_is_one_line_and_status_2(command, arguments, fragment):
    result = subprocess.run([*command, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and fragment in result.stderr


@pytest.mark.slow
def test_on_a_terminal_a_bar_takes_the_place_of_the_training_lines(small_config, tmp_path):
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
