"""`./run.sh status`: what it says of queues that run, have ended or were killed, in 60 columns."""

import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from logs import status

STEPS = ("step:0/5960 val_loss:10.825840 train_time:0ms step_avg:0.01ms\n"
         "step:1/5960 train_time:240ms step_avg:240.00ms\n")
ENDED = "ended: 2026-11-24 18:30:01 on node-1: "


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the logs, with no queue."""
    monkeypatch.setattr(status, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def queue_file(folder):
    """The file of a queue that runs."""
    file = status.QueueFile(folder / ".queue.node-1.json")
    yield file
    file.close()


def write_log(folder, name, text=STEPS):
    path = folder / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def lines(capsys, *arguments):
    assert status.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_running_queue(folder, queue_file, capsys):
    queue_file.write(run=2, runs=12, log=write_log(folder, "add_2/001"), mean_s=1500)
    *first, age, ends = lines(capsys)
    assert first == ["node-1, run 2 of 12: add_2/001", "step 1/5960, 240.0 ms a step", "val_loss 10.825840 at step 0"]
    assert re.fullmatch(r"last line \d+ s ago", age)
    assert re.fullmatch(r"run ends about \w{3} \d\d:\d\d, queue \w{3} \d\d \w{3} \d\d:\d\d", ends)


def test_a_queue_before_its_first_step(folder, queue_file, capsys):
    assert lines(capsys) == ["the queue on node-1 checks its configs and data"]
    queue_file.write(run=1, runs=1, mean_s=0, log=write_log(folder, "one/000", "# train_gpt_medium.py\n"))
    assert lines(capsys) == ["node-1, run 1 of 1: one/000", "no step yet"]


@pytest.mark.parametrize("state, said", [
    ('{"pid": 1, "run": 1, "ended": "ended Tue 24 Nov 18:06: 2 done"}\n', "ended Tue 24 Nov 18:06: 2 done"),
    ('{"pid": 1, "run": 1}\n', "was killed"), ('{"pid": 1}\n', "started no run")])
def test_a_queue_that_ended_was_killed_or_refused(folder, capsys, state, said):
    (folder / ".queue.node-1.json").write_text(state)
    assert " ".join(map(str.strip, lines(capsys))) == f"no queue runs on node-1; the last one {said}"


def test_runs_that_failed_or_diverged_have_their_reason(folder, queue_file, capsys):
    write_log(folder, "a/000", f"{STEPS}{ENDED}No space left on device\n")
    write_log(folder, "b/000", f"{STEPS}diverged at step 125: the validation loss is nan\n{ENDED}diverged\n")
    write_log(folder, "c/000", f"{STEPS}peak memory allocated: 53367 MiB reserved: 60000 MiB\n{ENDED}finished\n")
    write_log(folder, "d/000", f"{STEPS}{ENDED}stopped, with a checkpoint\nresumed at step 1 after 240ms of training\n")
    queue_file.write(problems={write_log(folder, "e/000"): "failed: signal SIGKILL",
                               f"{folder}/c/000.txt": "failed: before it was started again"})
    assert lines(capsys)[1:] == ["a/000: No space left on device",
                                 "b/000: diverged at step 125: the validation loss is nan",
                                 "e/000: failed: signal SIGKILL"]
    assert lines(capsys, folder / "c")[1:] == ["../e/000: failed: signal SIGKILL"]


def test_no_line_is_wider_than_a_telephone(folder, queue_file, capsys):
    name = "an_ablation_with_a_name_that_does_not_fit_into_sixty_columns_at_all/000"
    log = write_log(folder, name, f"{STEPS}{ENDED}{'a long reason ' * 9}\n")
    queue_file.write(run=2, runs=12, log=log, mean_s=1500)
    assert max(map(len, lines(capsys))) <= 60


def test_no_package_is_needed(tmp_path):
    """Python without its installed packages, started from another folder; no queue has run."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for module in ("__init__.py", "log_file.py", "status.py"):
        shutil.copy(ROOT / "logs" / module, logs)
    write_log(logs, "one/000", f"{STEPS}{ENDED}out of memory\n")
    command = [sys.executable, "-S", "-E", str(logs / "status.py")]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("no queue has run here\none/000: out of memory\n", "")


def test_a_folder_that_is_not_there(folder, capsys):
    assert status.main([str(folder / "nowhere")]) == 2
    assert f"{folder}/nowhere: no such folder" in capsys.readouterr().err
