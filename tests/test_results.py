"""logs/results.py: what a log says, which files are logs, and which runs belong to one configuration."""

import numpy as np
import pytest

from logs.log_format import format_header, format_step_line
from logs.results import read_configurations, read_result


def result_lines(losses, total=None, every=10, ms=100):
    """Return the lines of a run that validates every 10 steps of 100 ms, with a training line before each."""
    total = every * (len(losses) - 1) if total is None else total
    steps = [min(i * every, total) for i in range(len(losses))]
    return "".join(f"{format_step_line(step, total, step * ms)}\n{format_step_line(step, total, step * ms, loss)}\n"
                   for step, loss in zip(steps, losses))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_runs(folder, runs, **how):
    """Write a log for each list of losses."""
    for i, losses in enumerate(runs):
        write(folder / f"{i:03d}.txt", result_lines(losses, **how))
    return folder


TWO = result_lines([5.0, 4.0])
SHAPE = np.array([10.0, 4.0, 3.2, 2.95, 2.91])  # five validations
BETTER = [SHAPE - 0.02, SHAPE - 0.021, SHAPE - 0.0185]
SETTINGS = dict(description="a", value_embedding_lr=0.3, seed=0, run_id=0, train_data=[["s_1.bin", 9, "ab"]])
CODE = "def f(x):\n    if x < 0:\n        raise ValueError('too small')\n    return x + 1\n"


def our_log(results, code=CODE, **settings):
    return f"{format_header(code, SETTINGS | settings, 'Running Python 3.12.7 (main)')}\nlog: here\n{results}"


@pytest.mark.parametrize("text", [
    TWO, our_log(f"{TWO}ended: now on HOST: finished\n"), our_log(TWO, code=f'"""{our_log(TWO + TWO)}"""'),
    TWO.replace("\n", "\r\n"), "\0\0\0" + TWO + "\0" * 4096, b"\xff\xfe odd\n" + TWO.encode(), TWO.rstrip(),
    TWO.replace("ms\n", "ms lx:0.773 ls:-0.246\n"), f"{TWO} step:20/10 train_time:9ms step_avg:1.00ms\nstep:11/10 tr",
    f"{result_lines([6.0, 9.0])}resumed at step 0 after 0ms of training\n{TWO}",
], ids="bare ours log-as-code CRLF NUL bad-UTF-8 no-last-newline further-fields torn resumed".split())
def test_results_are_read_and_code_and_accidents_are_not(tmp_path, text):
    run = read_result(write(tmp_path / "a.txt", text))
    assert [list(column) for column in run.curve] == [[0, 10], [5, 4], [0, 1]]
    assert run.finished and run.step_avg_ms == 100


def test_a_run_cut_at_a_step_has_the_pace_up_to_there(tmp_path):
    lines = (format_step_line(step, 20, ms, 3.0) for step, ms in ((0, 0), (10, 1000), (20, 4000)))
    run = read_result(write(tmp_path / "a.txt", "\n".join(lines)))
    assert [run.cut(step).step_avg_ms for step in (10, 20)] == [100, 200]
    assert run.cut(10).finished and len(run.cut(10).curve.steps) == 2


@pytest.mark.parametrize("text, words", [
    ("", "no results"), (our_log(""), "no results"), (b"\x89PNG\0\xff" * 999, "no results"),
    (f"{format_step_line(5, 9, 9, 4)}\n{format_step_line(9, 9, 8, 3)}\n", "train_time falls"),
    (TWO + TWO, "contains 2 runs"), (3 * our_log(TWO), "contains 3 runs"), (TWO + our_log(TWO), "contains 2 runs")])
def test_an_unusable_log_is_a_line_and_the_others_are_read(tmp_path, text, words):
    write(tmp_path / "c" / "1.txt", text)
    configurations, notes = read_configurations([write_runs(tmp_path / "c", [[5.0, 4.0]])])
    assert len(configurations["c"]) == 1 and len(notes) == 1 and "1.txt" in notes[0] and words in notes[0]


@pytest.mark.parametrize("text, step", [
    (result_lines([9.0, float("nan"), float("nan")]), 10), (result_lines([9.0, float("inf")]), 10),
    (result_lines([9.0, 3.0], total=40) + "diverged at step 17: a weight is nan\nended: now on HOST: diverged\n", 17),
    (result_lines([9.0, 3.0], total=20) + f"diverged at step 17: nan\n{format_step_line(20, 20, 2000, 2.9)}", None),
], ids=["NaN", "infinite", "named", "resumed since"])
def test_a_diverged_run(tmp_path, text, step):
    run = read_result(write(tmp_path / "a.txt", text))
    assert run.diverged_at == step and run.finished == (step is None)


@pytest.mark.parametrize("files, paths, names", [
    ("a.txt", "a.txt", ["a"]), ("base/0.txt base/1.log", "base", ["base"]), ("v1.2/0.txt", "v1.2", ["v1.2"]),
    ("base/0.txt base/1.txt", "base/1.txt base/0.txt", ["base/1", "base/0"]), ("b/0.txt b/1.txt", "b b/0.txt", ["b"]),
    ("l/add_2/0.txt l/add_1/0.txt l/requirements.txt l/add_2/0.ckpt l/.old/0.txt", "l", ["add_1", "add_2"]),
    ("x/base/0.txt y/base/0.txt x/add/0.txt", "x/base x/base/ y x/add", ["x/base", "y/base", "add"]),
    ("l/tiny/base/0.txt l/tiny/add/0.txt", "l", ["add", "base"]),
    ("l/tiny/base/0.txt l/small/base/0.txt", "l", ["small/base", "tiny/base"])])
def test_a_configuration_has_the_shortest_unique_name(tmp_path, files, paths, names):
    for file in files.split():
        write(tmp_path / file, TWO)
    configurations, notes = read_configurations([f"{tmp_path}/{path}" for path in paths.split()])
    assert list(configurations) == names and notes == []


def test_logs_in_deeper_folders_and_other_files_are_skipped_with_a_line(tmp_path):
    """Links to what is there anyway do not matter."""
    for file in ("l/base/0.txt", "l/tiny/base/0.txt", "l/tiny/base/1.txt", "a.py", "requirements.txt", "x/a.pyc"):
        write(tmp_path / file, TWO)
    paths = sorted([*tmp_path.iterdir(), tmp_path / "nowhere"])
    for link, target in (("l/again", "l"), ("l/and again", "l"), ("l/a", "l/base"), ("l/base/1.txt", "l/base/0.txt")):
        (tmp_path / link).symlink_to(tmp_path / target)
    configurations, notes = read_configurations(paths)
    no_logs = "skipped, no logs (*.txt, *.log)"
    assert [*configurations] == ["base"] and len(configurations["base"]) == 1
    assert [note.split(": ")[1] for note in notes] == [
        no_logs, "skipped 2 logs in deeper folders; name their folder", "no such file", no_logs, no_logs]


@pytest.mark.parametrize("text, change", [
    (our_log(TWO, code="x = 1\n"), "the code has changed"),
    (our_log(TWO, value_embedding_lr=0.1), "value_embedding_lr was 0.3 and is 0.1"),
    (our_log(TWO, train_data=[]), 'train_data was [["s_1.bin", 9, "ab"]] and is []'),
    (our_log(result_lines([5.0, 4.0, 3.0])), "num_iterations was 10 and is 20"),
    (our_log(TWO, code=""), "only one log records the code"),
    (TWO, "only one log records the code; only one log records the configuration"),
    (our_log(TWO, seed=1, run_id=1, description="b\u2028c", checkpoint_every=9), None),
    (our_log(TWO, code='def f(x):  # why\n    """Why."""\n    if (x<0): raise TypeError()\n    return (x+1)\n'), None)])
def test_runs_of_one_folder_are_split_where_they_differ(tmp_path, text, change):
    write(tmp_path / "c" / "0.txt", our_log(TWO))
    write(tmp_path / "c" / "1.txt", text)
    write(tmp_path / "c:2" / "0.txt", TWO)
    write(tmp_path / "c" / "2.txt", our_log(TWO, value_embedding_lr=7.0))
    configurations, notes = read_configurations([tmp_path])
    assert list(configurations) == (["c", "c:3", "c:4", "c:2"] if change else ["c", "c:3", "c:2"])
    assert notes[:-1] == [f"c:3 (1.txt) is split from c: {change}"] * bool(change) and "(2.txt) is split" in notes[-1]
