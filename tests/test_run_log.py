"""logs/run_log.py: a log's place and state, its lines and number, and the runs that share its folder.

test_faults.py has locks, truncation to a checkpoint, and what becomes of the checkpoint.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from logs import run_log
from logs.log_format import ROOT, format_header, format_step_line, parse_step_lines
from logs.run_log import RunLog, check_finished_runs, open_log

PEAK = "peak memory allocated: 1 MiB reserved: 2 MiB\n"
DIVERGED = "diverged at step 250: the validation loss is nan\n"
ENDED = "ended: 2026-11-24 18:30:01 on host: "


@pytest.fixture
def path(tmp_path):
    return tmp_path / "000.txt"


@pytest.mark.parametrize("scale, expected", [
    ("", "logs/add_2/007.txt"), ("tiny", "logs/tiny/add_2/007.txt"), ("my/own.toml", "logs/own/add_2/007.txt")])
def test_place_of_a_log(scale, expected):
    assert run_log.log_path("logs", scale, Path("somewhere/add_2.toml"), 7) == Path(expected)


@pytest.mark.parametrize("end, finished, reason", [
    (PEAK, True, ""), ("peak memory resident: 1 MiB\n", True, ""), (f"{PEAK}{ENDED}finished\n", True, ""),
    (f"{PEAK}ended: 2026-11", True, ""),  # killed while it wrote the last line
    (DIVERGED, True, DIVERGED[:-1]), (f"{DIVERGED}{ENDED}diverged\n", True, DIVERGED[:-1]),
    (PEAK[:-1], False, ""), (DIVERGED[:-20], False, ""),  # torn: being written
    (f"  {PEAK}", False, ""), (f"{ENDED}stopped by \xff: at 3\n", False, "stopped by \ufffd: at 3"),
    (f"{ENDED}stopped by SIGTERM\nresumed at step 1\n", False, "")])
def test_the_last_complete_lines_tell_whether_a_run_is_finished_and_why_it_failed(path, end, finished, reason):
    """The same lines in the code, far above, do not count."""
    path.write_text(PEAK + DIVERGED + 400 * "the text of the program\n" + end, encoding="latin-1")  # \xff is not UTF-8
    assert run_log.is_finished(path) == finished and run_log.failure_reason(path) == reason


@pytest.mark.parametrize("output, printed", [(">&-", ""), ("| true", ""), ("", "x\\xe9\\udce9\ny\n")])
def test_printing_survives_an_output_that_is_closed_or_ascii_and_a_pipe_that_nobody_reads(output, printed):
    wait_s = 0.2 * (output == "| true")  # until `true` has ended
    program = (f"import sys, time; from logs.run_log import say; time.sleep({wait_s})\n"
               r"say('x\xe9\udce9'); say('y'); sys.stderr.write('z')")
    command, env = ["sh", "-c", f'"$0" -c "$1" {output}', sys.executable, program], {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (printed, "z")


def test_the_output_has_every_25th_training_step_and_the_log_all_at_once(path, capsys):
    """test_launch.py shows the bar that replaces them on a terminal."""
    log = RunLog(path)
    log.show_progress(50, 0)
    for step in range(1, 51):
        log.train_line(step, 50, step * 10.0)
    log.line("a file's name with \udce9")
    text = path.read_text()  # before the log is closed
    assert [line.step for line in parse_step_lines(text)] == list(range(1, 51))
    assert text.endswith("\na file's name with \\udce9\n") and capsys.readouterr().out.splitlines() == [
        format_step_line(25, 50, 250.0), format_step_line(50, 50, 500.0), "a file's name with \\udce9"]


@pytest.mark.parametrize("taken, expected", [
    ([], 0), (["000.txt", "001.txt", "003.txt"], 2), (["000.resume.ckpt", "001.ckpt", "002.txt.interrupted"], 3)])
def test_a_new_run_takes_the_first_number_that_no_file_has(path, taken, expected):
    for name in taken:
        path.with_name(name).touch()
    assert open_log(path, is_new=True).path == path.with_name(f"{expected:03d}.txt")


def test_numbers_that_are_taken_at_the_same_moment_or_all(path, monkeypatch):
    path.with_name("999.txt").touch()
    with pytest.raises(OSError, match="all run_ids up to 999 are taken"):
        open_log(path.with_name("999.txt"), is_new=True)
    path.touch()
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert open_log(path, is_new=True).path.name == "001.txt"


def test_a_run_that_starts_over_keeps_a_copy_of_its_results_but_not_of_a_header_alone(path):
    for text in ("step:1/4\n", "step:2/4\n", "header\n"):
        path.write_text(text)
        open_log(path, is_new=False).truncate(0)
        assert path.read_text() == ""
    aside = {file.name: file.read_text() for file in path.parent.iterdir() if file != path}
    assert aside == {"000.txt.interrupted": "step:1/4\n", "000.txt.interrupted1": "step:2/4\n"}


@pytest.mark.parametrize("changed, end, change", [
    ({"seed": 1, "run_id": 1, "description": "b", "code": "x = 1  # one"}, PEAK, ""), ({"lr": 0.1}, ENDED, ""),
    ({"lr": 0.1}, PEAK, "lr was 0.3 and is 0.1"), ({"lr": 0.1}, DIVERGED, "lr was 0.3 and is 0.1"),
    ({"code": "x = 2"}, PEAK, "the code has changed"),
    ({"train_data": [["a", 9]]}, PEAK, 'train_data was [["a", 8]] and is [["a", 9]]')])
def test_a_finished_run_of_another_experiment_is_named_with_a_command_that_moves_it(tmp_path, changed, end, change):
    """The command gives the folder the first free number."""
    folder, log = tmp_path / "it's add_2", tmp_path / "it's add_2" / "000.txt"
    for made in (folder, tmp_path / "it's add_2.1"):
        made.mkdir()
    then = dict(seed=0, run_id=0, description="a", lr=0.3, train_data=[["a", 8]])
    log.write_text(f"{format_header('x = 1', then, 'Running Python')}\n{end}")
    identity = then | {"code": "x = 1"} | changed
    if change:
        beginning = re.escape(f"{log}: finished as another experiment: {change}; give the config another name")
        with pytest.raises(ValueError, match=f"^{beginning}") as error:
            check_finished_runs(folder, identity)
        subprocess.run(str(error.value).rpartition("folder: ")[2], shell=True, check=True)
        assert not folder.exists() and (tmp_path / "it's add_2.2/000.txt").exists()
    check_finished_runs(folder, identity)
