"""`./run.sh status`: the lines about queues that run, have ended or were killed, in 60 columns."""

import fcntl
import json
import os
import re
import subprocess

import pytest

from logs import status

STEPS = ("step:0/5960 val_loss:10.825840 train_time:0ms step_avg:0.01ms\n"
         "step:1/5960 train_time:240ms step_avg:240.00ms\n"
         "step:2/5960 val_loss:9.500000 train_time:480ms step_avg:240.00ms\n")
ENDED = "ended: 2026-11-24 18:30:01 on node-1: "


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Hold the lock of a queue whose logs are in `tmp_path`; return a function that writes the queue's state."""
    monkeypatch.setattr(status, "FOLDER", tmp_path)
    with open(tmp_path / ".queue.node-1.json", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lambda **state: (tmp_path / ".queue.node-1.json").write_text(json.dumps(state) + "\n")


def write_log(folder, name, text=STEPS):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text)
    return f"{folder}/{name}.txt"


def lines(capsys, *arguments):
    assert status.main([*map(str, arguments)]) == 0
    printed = capsys.readouterr().out.split("\n")[:-1]
    assert max(map(len, printed)) <= 60  # the width of a phone's screen
    return printed


def test_a_running_queue_before_and_after_its_first_step(tmp_path, queue, capsys):
    assert lines(capsys) == ["the queue on node-1 checks its configs and data"]
    queue(run=1, runs=1, mean_s=0, log=write_log(tmp_path, "one/000", "# train_gpt_medium.py\n"))
    assert lines(capsys) == ["node-1, run 1 of 1: one/000", "no step yet"]
    queue(run=2, runs=12, log=write_log(tmp_path, "add_2/001"), mean_s=86400)
    os.utime(tmp_path / "add_2/001.txt", (2**32, 2**32))  # a file server's clock is ahead
    *first, age, ends = lines(capsys)
    assert first == ["node-1, run 2 of 12: add_2/001", "step 2/5960, 240.0 ms a step", "val_loss 9.500000 at step 2"]
    assert age == "last line 0 s ago"
    assert re.fullmatch(r"run ends about (\w{3}) (\d\d:\d\d), queue (?!\1)\w{3} \d\d \w{3} \2", ends)  # 10 days later


@pytest.mark.parametrize("state, said", [
    ('{"pid": 1, "run": 1, "ended": "ended Tue 24 Nov 18:06: 2 done"}\n', "ended Tue 24 Nov 18:06: 2 done"),
    ('{"pid": 1, "run": 1}\n', "was killed"), ('{"pid": 1}\n', "started no run"), ("", "started no run")])
def test_a_queue_that_ended_was_killed_or_refused(tmp_path, monkeypatch, capsys, state, said):
    monkeypatch.setattr(status, "FOLDER", tmp_path)
    assert lines(capsys) == ["no queue has run here"]
    (tmp_path / ".queue.node-1.json").write_text(state)
    with open(tmp_path / ".queue.node-1.json") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as another status does
        assert " ".join(map(str.strip, lines(capsys))) == f"no queue runs on node-1; the last one {said}"


def test_runs_that_failed_or_diverged_have_their_reason(tmp_path, queue, capsys):
    for name, end in dict(
            a=f"{ENDED}No space left on device", b=f"diverged at step 125: the validation loss is nan\n{ENDED}diverged",
            c=f"peak memory allocated: 53367 MiB reserved: 60000 MiB\n{ENDED}finished",
            d=f"{ENDED}stopped, with a checkpoint\nresumed at step 1 after 240ms of training",
            f=f"{ENDED}{'a long reason ' * 9}", **{"g" * 70: f"{ENDED}why"}).items():
        write_log(tmp_path, f"{name}/000", f"{STEPS}{end}\n")
    queue(problems={write_log(tmp_path, "e/000"): "failed: signal SIGKILL",
                    f"{tmp_path}/c/000.txt": "failed: before it was started again"})
    assert lines(capsys)[1:] == [
        "a/000: No space left on device", "b/000: diverged at step 125: the validation loss is nan",
        "e/000: failed: signal SIGKILL", f"f/000: {'a long reason ' * 3}a long",
        f"  reason {'a long reason ' * 3}a long", "  reason a long reason", "g" * 60, f"  {'g' * 10}/000: why"]
    assert lines(capsys, tmp_path / "c")[1:] == ["../e/000: failed: signal SIGKILL"]


def test_folders_behind_symbolic_links_are_searched_and_a_run_is_named_once(tmp_path, queue, capsys):
    """The queue knows it by another path. Two links lead in circles."""
    write_log(tmp_path, "far/000", f"{STEPS}{ENDED}out of memory\n")
    folder, link = tmp_path / "own", tmp_path / "link"
    folder.mkdir()
    for path, to in {link: folder, folder / "one": tmp_path / "far", folder / "a": folder, folder / "b": ".."}.items():
        path.symlink_to(to)
    queue(problems={f"{folder}/one/000.txt": "failed: signal SIGKILL"})
    assert lines(capsys, folder)[1:] == lines(capsys, link)[1:] == ["one/000: out of memory"]


def test_a_process_is_known_until_it_ends(tmp_path):
    """A process that nobody has waited for is a zombie."""
    with subprocess.Popen(["sleep", "60"]) as process:
        alive = status.identify(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert [*status.identify(process.pid), alive[2]] == alive != status.identify(os.getpid())
    assert status.identify(process.pid) == alive[:2]
