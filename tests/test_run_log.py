"""logs/run_log.py: lines, header, number and lock of a run's log, and what becomes of an interrupted one."""

import json
import re
from pathlib import Path

import pytest
from helpers import TRAIN_LINE, VAL_LINE

from logs import run_log
from logs.log_file import RULE, read_header
from logs.run_log import RunLog, open_log, train_line, val_line


@pytest.fixture
def path(tmp_path):
    return tmp_path / "000.txt"


def write_log(path, *lines):
    log = RunLog(path, new=False)
    for line in lines:
        log.to_file(line)
    return log


@pytest.mark.parametrize("line, expected", [
    (val_line(125, 5960, 4.32568, 27923.4), "step:125/5960 val_loss:4.325680 train_time:27923ms step_avg:223.39ms"),
    (val_line(0, 5960, 10.82584, 0.17), "step:0/5960 val_loss:10.825840 train_time:0ms step_avg:0.17ms"),
    (train_line(126, 5960, 28146.0), "step:126/5960 train_time:28146ms step_avg:223.38ms"),
])
def test_lines_to_the_letter(line, expected):
    assert line == expected and (VAL_LINE.match(line) is None) != (TRAIN_LINE.match(line) is None)


def test_a_line_is_in_the_file_as_soon_as_it_is_written(path, capsys):
    log = RunLog(path)
    log.line("for both")
    log.to_file("for the file, with \udce9 of a file's name")
    assert path.read_text() == "for both\nfor the file, with \\udce9 of a file's name\n"
    assert capsys.readouterr().out == "for both\n"


def test_every_training_step_is_in_the_file_and_every_25th_on_the_output(path, capsys):
    log = RunLog(path)
    for step in range(1, 51):
        log.train_line(step, 50, step * 10.0)
    assert [int(match[1]) for match in TRAIN_LINE.finditer(path.read_text())] == list(range(1, 51))
    assert capsys.readouterr().out.splitlines() == [train_line(25, 50, 250.0), train_line(50, 50, 500.0)]


def test_a_rank_without_a_log_writes_nothing(capsys):
    log = RunLog(None)
    log.write_header("code", {})
    log.line("text")
    log.train_line(25, 50, 10.0)
    log.end("finished")
    assert capsys.readouterr().out == ""


def test_the_last_line_says_when_where_and_why(path):
    write_log(path).end("stopped by signal 15")
    assert re.fullmatch(r"ended: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d on \S+: stopped by signal 15\n", path.read_text())


def test_the_header_is_read_as_it_was_written(path):
    configuration = dict(description='quotes " and ünicode', value_embeddings=[[0, 13]], seed=None, lr=0.3, gate=False)
    write_log(path).write_header("# a.py\nx = 1\n\n# b.py\ny = 2", configuration, "Running Python", "a map")
    assert read_header(path) == ("# a.py\nx = 1\n\n# b.py\ny = 2", configuration)
    _, keys, environment, rest = path.read_text().split(f"{RULE}\n")
    assert keys.splitlines() == [f"{name} = {json.dumps(value, ensure_ascii=False)}"
                                 for name, value in configuration.items()]
    assert re.fullmatch(r"Running Python\na map\nstarted: \S+ \S+ on \S+\n", environment) and rest == ""


@pytest.mark.parametrize("taken, expected", [
    ([], 0), (["000.txt", "001.txt", "003.txt"], 2), (["000.resume.ckpt", "001.ckpt", "002.txt.interrupted"], 3)])
def test_a_new_run_takes_the_first_number_that_no_file_has(path, taken, expected):
    for name in taken:
        path.with_name(name).touch()
    assert open_log(path, is_new=True).path == path.with_name(f"{expected:03d}.txt")


def test_a_number_that_another_run_takes_at_the_same_moment(path, monkeypatch):
    path.touch()
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert open_log(path, is_new=True).path.name == "001.txt"


def test_when_all_numbers_are_taken(path):
    path.with_name("999.txt").touch()
    with pytest.raises(OSError, match="all run_ids up to 999 are taken"):
        open_log(path.with_name("999.txt"), is_new=True)


def test_a_run_has_one_process(path, monkeypatch):
    monkeypatch.setattr(run_log.time, "sleep", lambda seconds: None)
    first, second = RunLog(path), RunLog(path, new=False)
    first.lock()
    with pytest.raises(ValueError, match=f"{path}: another process runs this; wait for its end or use another run_id"):
        second.lock()
    first.file.close()
    second.lock()


@pytest.mark.parametrize("line", ["peak memory resident: 1 MiB", "diverged at step 250: the validation loss is nan"])
def test_a_finished_run_is_never_overwritten(path, line):
    with pytest.raises(ValueError, match=f"{path} is finished, and a log is never overwritten; use another run_id"):
        write_log(path, line).lock()


def test_a_log_is_cut_to_where_its_checkpoint_was_written(path):
    size = write_log(path, "header", "step:1/4").size()
    write_log(path, "step:2/4")
    log = open_log(path, is_new=False)
    log.cut(size)
    log.to_file("resumed")
    assert path.read_text() == "header\nstep:1/4\nresumed\n" and list(path.parent.iterdir()) == [path]


def test_a_log_shorter_than_at_its_checkpoint_is_refused(path):
    with pytest.raises(ValueError, match=f"{path}: shorter than at its checkpoint; put the log back, or use another"):
        write_log(path, "header").cut(1000)


def test_a_run_that_starts_over_keeps_its_results_aside_and_a_header_alone_not(path):
    for text in ("step:1/4", "step:2/4", "header"):
        write_log(path, text).cut(0)
        assert path.read_text() == ""
    aside = {file.name: file.read_text() for file in path.parent.iterdir() if file != path}
    assert aside == {"000.txt.interrupted": "step:1/4\n", "000.txt.interrupted1": "step:2/4\n"}
