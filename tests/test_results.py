"""logs/results.py: what a log says, which files are logs, which runs are of one configuration."""

import os

import pytest

from logs.results import read_configurations, read_run
from logs.run_log import train_line, val_line

RULE = "=" * 100


def result_lines(losses, total=None, every=10, ms=100):
    """The lines of a run that validates every 10 steps of 100 ms, with a training line before each validation."""
    total = every * (len(losses) - 1) if total is None else total
    steps = [min(i * every, total) for i in range(len(losses))]
    return "".join(f"{train_line(step, total, step * ms)}\n{val_line(step, total, loss, step * ms)}\n"
                   for step, loss in zip(steps, losses))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_runs(folder, runs, **how):
    """A folder of logs, one for each list of losses."""
    for i, losses in enumerate(runs):
        write(folder / f"{i:03d}.txt", result_lines(losses, **how))
    return folder


TWO = result_lines([5.0, 4.0])
LOOK_ALIKES = result_lines([8.0, 7.0, 6.0], total=99)
ENVIRONMENT = "Running Python 3.12.7 (main)\nRunning PyTorch 2.9.0 compiled for CUDA 12.6\n|=========+=========|\n"
PROGRAM = f'"""As a log says:\n{LOOK_ALIKES}"""\nprint("=" * 100)\n{RULE}\n{LOOK_ALIKES}'
SPEEDRUN = f"{PROGRAM}{RULE}\n{ENVIRONMENT}{RULE}\n"


def our_log(results, program="# train.py\n" + PROGRAM, **settings):
    """A log of this repository: program text, configuration, environment, results."""
    config = "".join(f"{key} = {value}\n" for key, value in settings.items())
    return f"{program}{RULE}\n{config}{RULE}\n{ENVIRONMENT}started: now on HOST\n{RULE}\nlog: here\n{results}"


@pytest.mark.parametrize("text", [
    TWO,
    f"{SPEEDRUN}{TWO}peak memory allocated: 1 MiB reserved: 2 MiB\n",
    f"{SPEEDRUN}{TWO}{RULE}\nend\n",
    our_log(f"{TWO}ended: now on HOST: finished\n", seed="0"),
    our_log(TWO, program=SPEEDRUN + LOOK_ALIKES, seed="0"),
], ids=["bare lines", "the speedrun's", "a rule at the end", "ours", "a log as program text"])
def test_the_program_in_a_log_is_no_result(tmp_path, text):
    run = read_run(write(tmp_path / "a.txt", text))
    assert [list(column) for column in run.curve] == [[0, 10], [5, 4], [0, 1]]
    assert run.finished and run.step_avg_ms == 100


@pytest.mark.parametrize("data", [
    TWO.replace("\n", "\r\n"), "\0\0\0" + TWO + "\0" * 4096, b"\xff\xfe odd\n" + TWO.encode(), TWO.rstrip(),
], ids=["CRLF", "NUL", "bad UTF-8", "no newline at the end"])
def test_accidents(tmp_path, data):
    assert list(read_run(write(tmp_path / "a.txt", data)).curve.losses) == [5, 4]


@pytest.mark.parametrize("line", [
    "step:20/20 val_loss:3.000000 train_time:2000ms step_avg:100.00",
    " step:20/20 val_loss:3.000000 train_time:2000ms step_avg:100.00ms",
    "step:20/20 val_loss:3.000000 train_time:2000ms step_avg:100.00ms x",
    "step:20/20 val_loss:3.0\00000 train_time:2000ms step_avg:100.00ms",
    "step:२०/20 val_loss:3.000000 train_time:2000ms step_avg:100.00ms",
])
def test_only_full_lines_count(tmp_path, line):
    run = read_run(write(tmp_path / "a.txt", result_lines([5.0, 4.0], total=20) + line))
    assert list(run.curve.losses) == [5, 4] and not run.finished


def test_a_resumed_run_counts_what_it_wrote_last(tmp_path):
    first, second = result_lines([5.0, 4.0, 3.5, 3.4], total=40), result_lines([5.0, 4.0, 3.0, 2.5, 2.0])
    text = f"{first}resumed at step 10 after 1000ms of training\n{second[second.index('step:20/'):]}"
    assert list(read_run(write(tmp_path / "a.txt", text)).curve.losses) == [5, 4, 3, 2.5, 2]


@pytest.mark.parametrize("text, words", [
    ("", "no results"), (our_log(""), "no results"), (b"\x89PNG\0\xff" * 999, "no results"),
    (f"{val_line(5, 9, 4, 9)}\n{val_line(9, 9, 3, 8)}\n", "train_time falls"),
])
def test_a_log_that_cannot_be_used_is_a_line_and_the_others_are_read(tmp_path, text, words):
    write(tmp_path / "c" / "1.txt", text)
    configurations, notes = read_configurations([write_runs(tmp_path / "c", [[5.0, 4.0]])])
    assert len(configurations["c"]) == 1 and len(notes) == 1 and "1.txt" in notes[0] and words in notes[0]


@pytest.mark.parametrize("text, step", [
    (result_lines([9.0, float("nan"), float("nan")]), 10),
    (result_lines([9.0, float("inf")]), 10),
    (result_lines([9.0, 3.0], total=40) + "diverged at step 17: a weight is nan\nended: now on HOST: diverged\n", 17),
    (result_lines([9.0, 3.0], total=20) + f"diverged at step 17: a weight is nan\n{val_line(20, 20, 2.9, 2000)}", None),
], ids=["NaN", "infinite", "named", "gone on since"])
def test_a_run_that_diverged(tmp_path, text, step):
    run = read_run(write(tmp_path / "a.txt", text))
    assert run.diverged_at == step and run.finished == (step is None)


@pytest.mark.parametrize("files, paths, names", [
    ("a.txt", "a.txt", ["a"]),
    ("base/0.txt base/1.log", "base", ["base"]),
    ("base/0.txt base/1.txt", "base/1.txt base/0.txt", ["base/1", "base/0"]),
    ("l/add_2/0.txt l/add_1/0.txt l/requirements.txt l/add_2/0.ckpt l/.old/0.txt", "l", ["add_1", "add_2"]),
    ("x/base/0.txt y/base/0.txt x/add/0.txt", "x/base x/base/ y x/add", ["x/base", "y/base", "add"]),
    ("v1.2/0.txt", "v1.2", ["v1.2"]),
    ("l/tiny/base/0.txt l/tiny/add/0.txt", "l", ["add", "base"]),
    ("l/tiny/base/0.txt l/small/base/0.txt", "l", ["small/base", "tiny/base"]),
])
def test_a_configuration_has_the_shortest_name_that_tells_it_from_the_others(tmp_path, files, paths, names):
    for file in files.split():
        write(tmp_path / file, TWO)
    configurations, notes = read_configurations([os.path.join(tmp_path, path) for path in paths.split()])
    assert list(configurations) == names and notes == []


def test_logs_that_are_deeper_than_others_are_left_out_with_a_line(tmp_path):
    for file in ("base/0.txt", "tiny/base/0.txt", "tiny/base/1.txt"):
        write(tmp_path / file, TWO)
    configurations, notes = read_configurations([tmp_path])
    assert list(configurations) == ["base"] and len(notes) == 1 and "2 logs in deeper folders" in notes[0]


def test_what_is_no_log_is_passed_over_in_one_line(tmp_path):
    for file in ("base/0.txt", "compare.py", "requirements.txt", "__pycache__/a.pyc"):
        write(tmp_path / file, TWO)
    configurations, notes = read_configurations([*sorted(tmp_path.iterdir()), tmp_path / "nowhere"])
    assert list(configurations) == ["base"] and len(notes) == 1
    assert all(name in notes[0] for name in ("compare.py", "requirements.txt", "__pycache__", "nowhere (no such file)"))


@pytest.mark.parametrize("results, changed, differs", [
    (TWO, {"program": "x = 1\n"}, "program text"),
    (TWO, {"value_embedding_lr": "0.1"}, "value_embedding_lr"),
    (result_lines([5.0, 4.0, 3.0]), {}, "num_iterations"),
    (TWO, {"seed": "1", "run_id": "1", "description": '"b"', "checkpoint_every": "9"}, None),
])
def test_runs_of_one_folder_that_differ_are_split_and_named(tmp_path, results, changed, differs):
    settings = {"description": '"a"', "value_embedding_lr": "0.3", "seed": "0", "run_id": "0"}
    write(tmp_path / "c" / "0.txt", our_log(TWO, **settings))
    write(tmp_path / "c" / "1.txt", our_log(results, **settings | changed))
    configurations, notes = read_configurations([tmp_path])
    assert list(configurations) == (["c", "c:2"] if differs else ["c"])
    assert notes == [f"c: split, as its runs differ in {differs}: c is 0.txt; c:2 is 1.txt"] * bool(differs)
