"""Launch: the program under torchrun and behind run.sh, its mistakes and its embedded default, as a user meets them."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, VAL_LINE, run_program, val_losses


def error_lines(text):
    return [line for line in text.splitlines() if line.startswith("train_gpt_medium.py: ")]


def test_importing_has_no_side_effects(tmp_path):
    code = "import train_gpt_medium, torch; assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, fragment", [
    (["configs/nowhere.toml"], "no such config"),
    (["configs/tiny.toml", "--num_iteration", "5"], "num_iterations"),
])
def test_check_in_a_process_of_its_own(arguments, fragment):
    result = run_program(*arguments, "--check")
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and fragment in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks, keys, fragment", [
    (2, dict(value_embeddings=[[7]]), "layer 7 has no attention"),
    (3, {}, "sequences_per_step: 4 sequences cannot be divided among 3 ranks"),
    (4, dict(train_files="nowhere/*.bin"), "no file matches nowhere/*.bin"),
])
def test_under_torchrun_a_mistake_is_said_once_without_our_traceback(small_config, ranks, keys, fragment):
    for _ in range(3):
        result = run_program(small_config(**keys), ranks=ranks)
        assert result.returncode != 0
        assert len(error_lines(result.stderr)) == 1 and fragment in error_lines(result.stderr)[0]
        assert 'train_gpt_medium.py", line' not in result.stderr and result.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("other_rank", [0, 1])
@pytest.mark.parametrize("other_option, fragment", [
    (["--train_files", "nowhere/*.bin"], "no file matches nowhere/*.bin"),
    (["--value_embeddings", "[[3]]", "--seed", "7"], "value_embeddings, seed of rank 1 differ from rank 0's"),
])
def test_a_mistake_on_one_rank_only_is_said_too(small_config, tmp_path, other_rank, other_option, fragment):
    """As on a node that lacks the data or has another version of the config; that rank is first and the others late."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_gpt_medium\n"
        f"other = os.environ['RANK'] == '{other_rank}'\n"
        "time.sleep(0 if other else 2)\n"
        f"sys.exit(train_gpt_medium.main([*sys.argv[1:], *({other_option!r} if other else [])]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(wrapper), str(small_config())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert len(error_lines(result.stderr)) == 1 and fragment in error_lines(result.stderr)[0]
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_its_output(small_config, tmp_path):
    command = [sys.executable, "train_gpt_medium.py", str(small_config(num_iterations=10))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert list(val_losses((tmp_path / "logs/small/000.txt").read_text())) == [0, 2, 4, 6, 8, 10]


@pytest.mark.slow
def test_two_nodes(small_config):
    """Two torchruns that meet: nothing assumes that all ranks are on one node."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "train_gpt_medium.py", str(small_config())]
    nodes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    one_node = run_program(small_config(), "--seed", 0, ranks=2)
    printed = [stdout for stdout, _ in outputs if val_losses(stdout)]
    assert len(printed) == 1 and val_losses(printed[0]) == pytest.approx(val_losses(one_node.stdout), abs=2e-6)


@pytest.mark.slow
def test_without_torchrun_it_is_one_rank(small_config):
    result = run_program(small_config())
    assert result.returncode == 0 and list(val_losses(result.stdout)) == [0, 2, 4]


@pytest.mark.slow
def test_two_runs_started_together_get_two_logs(small_config, tmp_path):
    config = small_config(num_iterations=1)
    command = [sys.executable, "train_gpt_medium.py", str(config)]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0, 0]
    logs = sorted((tmp_path / "logs" / "small").iterdir())
    assert [log.name for log in logs] == ["000.txt", "001.txt", "002.txt"]
    assert all(list(val_losses(log.read_text())) == [0, 1] for log in logs)


@pytest.mark.slow
def test_on_a_terminal_a_bar_takes_the_place_of_the_training_lines(small_config, tmp_path):
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "train_gpt_medium.py", str(small_config())], cwd=ROOT, stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    while chunk := read_terminal(leader):
        output += chunk
    assert process.wait(timeout=60) == 0
    text = output.decode().replace("\r", "\n")
    assert [int(match[1]) for match in VAL_LINE.finditer(text)] == [0, 2, 4]
    assert "4/4" in text and not re.search(r"^step:\d+/\d+ train_time", text, re.MULTILINE)
    assert len(re.findall(r"^step:\d+/\d+ train_time", (tmp_path / "logs/small/000.txt").read_text(), re.MULTILINE)) == 4


def read_terminal(leader):
    try:
        return os.read(leader, 65536)
    except OSError:  # how a terminal says that the other side has closed it
        return b""


def run_sh(*arguments, cwd=ROOT, timeout=900, env=()):
    """run.sh with the Python that runs the tests as the active one."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.run([str(ROOT / "run.sh"), *map(str, arguments)], cwd=cwd, env=os.environ | {"PATH": path} | dict(env),
                          capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize("arguments, fragment", [
    (["configs/nowhere.toml"], "no such config"),
    (["configs/baseline.toml", "--num_iterations", "0"], "--num_iterations: 0 is too small"),
    (["configs/baseline.toml", "--train_files", "nowhere/*.bin"], "no file matches nowhere/*.bin"),
])
def test_run_sh_says_a_mistake_in_one_line_and_starts_nothing(arguments, fragment):
    result = run_sh(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and fragment in result.stderr and result.stdout == ""


@pytest.mark.slow
def test_run_sh_takes_a_config_and_keys_from_anywhere(small_config, tmp_path):
    small_config()
    result = run_sh("small.toml", "--num_iterations", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list(val_losses(result.stdout)) == [0, 1]


@pytest.mark.slow
def test_run_sh_asks_for_a_newer_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.8.1; else exit 1; fi\n')
    old.chmod(0o755)
    result = subprocess.run([ROOT / "run.sh"], env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True)
    assert result.returncode == 2 and "Python 3.11 or later" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_tiny_trains_to_its_end(tmp_path):
    """The embedded default, all of it, in a copy of the repository without data: far below a model of byte frequencies."""
    files = ["train_gpt_medium.py", "run.sh", "requirements.txt", "configs", "data/local_text.py"]
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    for file in files:
        source = ROOT / file
        (shutil.copytree if source.is_dir() else shutil.copy)(source, clone / file)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([clone / "run.sh"], env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert "configs/tiny.toml" in result.stdout.splitlines()[0]
    byte_frequency_loss = float(re.search(r"only byte frequencies has validation loss (\d+\.\d+)", result.stdout)[1])
    losses = val_losses((clone / "logs" / "tiny" / "000.txt").read_text())
    assert list(losses) == [0, 40, 80, 120, 160]
    assert all(later < earlier for earlier, later in zip(losses.values(), list(losses.values())[1:]))
    assert losses[160] < byte_frequency_loss - 1
