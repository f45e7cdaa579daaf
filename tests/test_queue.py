"""Queue: run.sh with several configs and runs, as a whole and killed again and again."""

import os
import random
import re
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, TRAIN_LINE, VAL_LINE

import train_gpt_medium as train

pytestmark = pytest.mark.slow


@pytest.fixture
def configs(small_config, tmp_path):
    """Three configs of a few steps: one rank, so that the queue is quick."""
    text = small_config(num_iterations=12, val_loss_every=4, val_seq_len=128, val_tokens=128, sequences_per_step=1, checkpoint_every=2).read_text()
    paths = [tmp_path / f"{name}.toml" for name in ("one", "two", "three")]
    for path, tables in zip(paths, ("[]", "[[0, 13]]", "[[0], [15]]")):
        path.write_text(f"{text}\nvalue_embeddings = {tables}")
    return paths


def start(*arguments, **options):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.Popen([str(ROOT / "run.sh"), *map(str, arguments)], cwd=ROOT, env=os.environ | {"PATH": path}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options)


def finish(*arguments):
    process = start(*arguments)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def run_lines(output):
    """The logs that the queue began, in order."""
    return re.findall(r"^run.sh: run \d+ of \d+: \S+/(\S+/\d+)\.txt; projected end", output, re.MULTILINE)


def results(folder):
    """{log: (validation losses by step, steps of the training lines)} of the logs below a folder, all of which are finished."""
    logs = sorted(folder.glob("*/*.txt"))
    assert all(map(train.is_finished, logs))
    return {str(log.relative_to(folder)): ([m.group(1, 3) for m in VAL_LINE.finditer(log.read_text())],
                                           [m[1] for m in TRAIN_LINE.finditer(log.read_text())]) for log in logs}


def test_a_queue_runs_all_configs_interleaved_and_skips_what_is_finished(configs, tmp_path):
    status, output, errors = finish("-n", 2, *configs[:2])
    assert status == 0, errors
    assert run_lines(output) == ["one/000", "two/000", "one/001", "two/001"]
    assert "projected end unknown" in output and re.search(r"projected end 20\d\d-", output)
    status, output, _ = finish("-n", 2, *configs[:2])
    assert status == 0 and "finished already" in output and "raise -n" in output and run_lines(output) == []
    assert set(results(tmp_path / "logs")) == {"one/000.txt", "one/001.txt", "two/000.txt", "two/001.txt"}


def test_a_failed_run_does_not_stop_the_others_and_is_named_with_its_reason(configs, tmp_path):
    (tmp_path / "logs" / "one").mkdir(parents=True)
    (tmp_path / "logs" / "one" / "000.txt").write_text("a log\n")
    (tmp_path / "logs" / "one" / "000.ckpt").write_text("no checkpoint")
    status, output, errors = finish(*configs[:2])
    assert status == 1 and run_lines(output) == ["one/000", "two/000"]
    assert "1 of 2 runs failed" in errors
    assert re.search(r"^run.sh: failed: .*one/000.ckpt: not a checkpoint that a run can go on from", errors, re.MULTILINE)
    assert train.is_finished(tmp_path / "logs" / "two" / "000.txt")


@pytest.mark.parametrize("arguments, fragment", [
    (["-n", "0"], "-n takes the number of runs"),
    (["-n", "x"], "-n takes the number of runs"),
    (["-n", "2", "CONFIGS", "--run_id", "3"], "-n and --run_id exclude each other"),
    (["CONFIGS", "FIRST"], "name it once"),
    (["CONFIGS", "configs/nowhere.toml"], "no such config"),
])
def test_a_mistake_is_said_before_the_first_run(configs, tmp_path, arguments, fragment):
    words = [word for argument in arguments for word in {"CONFIGS": configs, "FIRST": configs[:1]}.get(argument, [argument])]
    status, output, errors = finish(*words)
    assert status == 2 and len(errors.splitlines()) == 1 and fragment in errors and run_lines(output) == []
    assert not (tmp_path / "logs").exists()


def test_a_queue_killed_ten_times_ends_with_the_logs_of_an_undisturbed_one(configs, tmp_path):
    """Its script alone, its process group, its launchers and ranks, or politely; and the same command again."""
    status, _, errors = finish(*configs, "--log_dir", tmp_path / "undisturbed")
    assert status == 0, errors
    rng, interrupted = random.Random(0), 0
    for kill in range(10):
        queue = start(*configs)
        try:
            queue.wait(rng.uniform(2, 6))
        except subprocess.TimeoutExpired:
            interrupted += 1
        if queue.poll() is None and kill % 3 == 0:
            queue.kill()
        elif queue.poll() is None and kill % 3 == 1:
            queue.terminate()
        elif queue.poll() is None:
            subprocess.run(["pkill", "-9", "-f", f"train_gpt_medium.py {tmp_path}"])
            os.killpg(queue.pid, signal.SIGKILL)
        queue.communicate(timeout=60)
    status, _, errors = finish(*configs)
    assert status == 0 and interrupted >= 5, errors
    assert results(tmp_path / "logs") == results(tmp_path / "undisturbed")
    assert sorted(path.name for path in (tmp_path / "logs").rglob("*") if path.is_file() and ".interrupted" not in path.name) == 3 * ["000.txt"]
