"""logs/compare.py: the table, the sentences, JSON, CSV, Markdown and mistakes."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_results import result_lines, train_line, write, write_runs

from logs import compare

LOGS = Path(__file__).resolve().parent.parent / "logs"
SHAPE = np.array([10.0, 4.0, 3.2, 2.95, 2.91])


@pytest.fixture
def two(tmp_path):
    """Two configurations of three runs: baseline needs 37 of 40 steps of 100 ms to 2.92, better 33 of 110 ms."""
    write_runs(tmp_path / "baseline", [SHAPE, SHAPE + 0.002, SHAPE - 0.001])
    write_runs(tmp_path / "better", [SHAPE - 0.02, SHAPE - 0.021, SHAPE - 0.0185], ms=110)
    return tmp_path


def run(capsys, *arguments):
    """Exit status, standard output and the lines of standard error."""
    status = compare.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err.splitlines()


def as_json(capsys, *arguments):
    """--json's configurations by name, with the whole object under None."""
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    whole = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return {None: whole} | {c["name"]: c for c in whole["configurations"]}


def sections(text):
    """Title, table, sentences and notes: lists of lines."""
    return [part.splitlines() for part in text.split("\n\n")]


@pytest.fixture(scope="module")
def published():
    """What the one command of the README prints."""
    command = [sys.executable, LOGS / "compare.py", LOGS / "published", "--baseline", "baseline_ttest"]
    return subprocess.run(command, capture_output=True, text=True, check=True)


# -----------------------------------------------------------------------------
# The published runs


def test_the_published_runs_take_80_lines_and_the_table_110_columns(published):
    title, table, sentences, notes = sections(published.stdout)
    assert len(published.stdout.splitlines()) <= 80 and max(map(len, table)) <= 110 and published.stderr == ""
    assert len(table) == 2 + 33 and len(sentences) == 33 and sentences[0].startswith("baseline_ttest: the baseline")


def test_what_is_real_of_the_published_runs(published):
    rows = {line.split()[0]: re.split(r" {1,}(?=better|worse|not shown|baseline$)", line)[-1] for line in
            sections(published.stdout)[1][2:]}
    assert {name for name, verdict in rows.items() if verdict == "better loss"} == {
        "add_2", "add_5", "record_add_1", "record_add_2"}
    assert {name for name, verdict in rows.items() if verdict == "better time"} == {"record", "record_5800"}
    assert {name for name, verdict in rows.items() if verdict == "worse"} == {
        "remove_0_1", "remove_2", "remove_0_13", "remove_1_14", "remove_2_15", "remove_0_1_2", "share_01_1415",
        "share_012_131415"}
    assert sum(verdict == "not shown" for verdict in rows.values()) == 33 - 4 - 2 - 8 - 1


def test_the_published_table_is_sorted_by_time(published):
    times = [float(re.search(r" (\d{4}\.\d)[* ]", line)[1]) for line in sections(published.stdout)[1][2:]]
    assert times == sorted(times) and "1452.7" in published.stdout and "1464.8" in published.stdout


def test_the_published_tests_stand_in_the_sentences(published):
    assert "record: no (t -1.78, p 0.0434, 95% bound 2.919989)" in published.stdout
    assert "record: yes (t -5.88, p 5.07e-07, 95% bound 2.919370)" in published.stdout


# -----------------------------------------------------------------------------
# Is it better, is it real, does it pay?


def test_the_json_fields(two, capsys):
    found = as_json(capsys, two)
    assert list(found[None]) == ["target", "baseline", "configurations"]
    keys = "name runs num_iterations final_loss_mean final_loss_std steps_to_target time_to_target total_time_mean "
    keys += "total_time_std step_avg_ms break_even_step_ms missed t_test versus_baseline"
    assert all(list(entry) == keys.split() for entry in found[None]["configurations"])
    assert list(found["better"]["t_test"]) == ["n", "mean", "std", "t", "p", "upper_bound", "record"]
    keys = [f"{key}_{measure}{bound}" for measure in ("loss", "time") for key, bound in
            (("delta", ""), ("delta", "_low"), ("delta", "_high"), ("p", ""))]
    assert list(found["better"]["versus_baseline"]) == keys and found["baseline"]["versus_baseline"] is None


def test_the_figures_in_json(two, capsys):
    found = as_json(capsys, two)["better"]
    assert found["final_loss_mean"] == pytest.approx(2.89 + 0.0005 / 3) and (found["runs"], found["missed"]) == (3, 0)
    assert (found["total_time_mean"], found["total_time_std"], found["step_avg_ms"]) == (pytest.approx(4.4), 0, 110)
    versus = found["versus_baseline"]
    for measure in ("loss", "time"):
        middle = (versus[f"delta_{measure}_low"] + versus[f"delta_{measure}_high"]) / 2
        assert middle == pytest.approx(versus[f"delta_{measure}"])
    assert versus["p_loss"] < 0.001 and versus["delta_loss_high"] < 0


def test_break_even_is_the_step_time_that_ties(two, capsys):
    ms = as_json(capsys, two)["better"]["break_even_step_ms"]
    write_runs(two / "tie", [SHAPE - 0.02, SHAPE - 0.021, SHAPE - 0.0185], ms=ms)
    found = as_json(capsys, two)
    assert found["tie"]["time_to_target"] == pytest.approx(found["baseline"]["time_to_target"], abs=0.001)


@pytest.mark.parametrize("names,asked,baseline", [
    (["a", "baseline"], [], "baseline"), (["b", "a"], [], "b"), (["b", "a"], ["--baseline", "a"], "a"),
])
def test_the_baseline(tmp_path, capsys, names, asked, baseline):
    folders = [write_runs(tmp_path / name, [[5.0, 4.0]]) for name in names]
    assert as_json(capsys, *folders, *asked)[None]["baseline"] == baseline


def test_a_mean_curve_that_ends_above_the_target_would_reach_it(two, capsys):
    write_runs(two / "late", [SHAPE + 0.011, SHAPE + 0.013])
    _, table, sentences, _ = sections(run(capsys, two)[1])
    assert [line.split()[0] for line in table if "*" in line] == ["late"]
    assert any(line.startswith("late") and "2 of 2 would reach the target later" in line for line in sentences)
    assert as_json(capsys, two)["late"]["time_to_target"] is None


def test_where_most_runs_miss_the_target_the_table_is_sorted_by_loss(two, capsys):
    title, table, *_ = sections(run(capsys, two, "--target", "2.5")[1])
    assert [line.split()[0] for line in table[2:]] == ["better", "baseline"] and "0 of 6 runs" in title[0]


@pytest.mark.parametrize("loss,time,verdict", [(0.04, 100, "worse"), (-0.04, 100, "better"), (-0.02, 200, "mixed"),
                                               (0, 100, "not shown"), (0, 150, "worse time")])
def test_the_verdict(two, capsys, loss, time, verdict):
    write_runs(two / "new", [SHAPE + loss, SHAPE + loss + 0.001, SHAPE + loss - 0.001], ms=time)
    table = sections(run(capsys, two / "baseline", two / "new")[1])[1]
    assert [line for line in table if line.startswith("new")][0].endswith(f" {verdict}")


def test_one_run_each_is_no_test_and_a_line_says_what_it_takes(tmp_path, capsys):
    for name, loss in (("baseline", 2.9), ("b", 2.8)):
        write_runs(tmp_path / name, [[9.0, 3.0, loss]])
    assert run(capsys, tmp_path)[1].count("that takes two runs of a configuration") == 2
    assert as_json(capsys, tmp_path)["b"]["versus_baseline"]["p_loss"] is None


def test_power_says_how_many_runs_alone_and_among_several(two, capsys):
    write_runs(two / "more", [SHAPE - 0.01, SHAPE - 0.011])
    note = sections(run(capsys, two, "--power", "0.002")[1])[-1][-1]
    alone, among = map(int, re.search(r"takes (\d+) runs of both, (\d+) where 2 are compared", note).groups())
    assert 2 < alone < among


# -----------------------------------------------------------------------------
# Runs that have not ended, or went wrong


def test_runs_that_go_on_or_diverged_are_named_and_in_no_number(two, capsys):
    write(two / "new" / "0.txt", result_lines([10.0, 4.5, 3.3], total=40) + train_line(27, 40, 2700) + "step:28/40 tr")
    write(two / "new" / "1.txt", result_lines([10.0, float("nan")], total=40))
    write(two / "new" / "2.txt", train_line(1, 40, 100))
    status, out, errors = run(capsys, two)
    (line,) = (line for line in out.splitlines() if line.startswith("new: "))
    assert (status, errors) == (0, []) and "1.txt diverged at step 10" in line and "2.txt is not finished" in line
    assert f"0.txt is at step 20 of 40 with loss 3.300000, {3.3 - 3.2 - 0.001 / 3:+.6f} on the baseline" in line
    assert as_json(capsys, two)["new"]["runs"] == 0


def test_runs_of_which_none_has_finished_are_a_table(tmp_path, capsys):
    for name in ("baseline", "b"):
        write(tmp_path / name / "0.txt", result_lines([10.0, 4.5], total=40))
    status, out, _ = run(capsys, tmp_path)
    assert status == 0 and len(sections(out)[1]) == 4
    assert as_json(capsys, tmp_path)["b"]["versus_baseline"]["delta_loss"] is None


# -----------------------------------------------------------------------------
# Other outputs


def test_csv_holds_every_validation(two, capsys):
    write(two / "new" / "0.txt", result_lines([10.0, float("nan")], total=40))
    rows = list(csv.DictReader(io.StringIO(run(capsys, two, "--csv")[1])))
    assert len(rows) == 6 * 5 + 2 and rows[-1]["val_loss"] == "nan"
    assert rows[1] == dict(configuration="baseline", run="000.txt", step="10", num_iterations="40", val_loss="4.0",
                           train_time_ms="1000")


def test_markdown_is_a_table(two, capsys):
    write_runs(two / "a|b", [[9.0, 3.0, 2.9]])
    table = [line for line in run(capsys, two, "--markdown")[1].splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {12}


def test_long_names_do_not_widen_the_table(two, capsys):
    write_runs(two / ("x" * 200), [SHAPE, SHAPE + 0.001])
    assert max(map(len, sections(run(capsys, two)[1])[1])) <= 110


@pytest.mark.parametrize("arguments,words", [
    ([], "PATH"), (["nowhere"], "nowhere"), (["empty"], "empty"), (["two", "--target", "low"], "--target"),
    (["two", "--baseline", "c"], "there are baseline, better"), (["two", "--power", "0"], "--power"),
    (["two", "--plot", "figure.jpgg"], "jpgg"), (["two", "--forest", "nowhere/figure.png"], "nowhere/figure.png"),
    (["two", "--plot", "figure.png", "--from", "1000"], "--from"), (["two", "--x", "loss"], "--x"),
    (["two", "--plot", "figure.png", "--from", "30", "--to", "20"], "--to"),
    (["two", "--unknown"], "--unknown"),
])
def test_mistakes_are_a_line(two, tmp_path_factory, monkeypatch, capsys, arguments, words):
    folder = tmp_path_factory.mktemp("here")
    (folder / "empty").mkdir()
    (folder / "two").symlink_to(two)
    monkeypatch.chdir(folder)
    status, out, errors = run(capsys, *arguments)
    assert (status, out) == (2, "") and any(words in error for error in errors) and len(errors) <= 2


@pytest.mark.parametrize("missing", ["scipy", "matplotlib"])
def test_without_scipy_or_matplotlib_the_table_comes(two, missing):
    code = f"import sys; sys.modules[{missing!r}] = None\n"
    code += "from logs import compare; sys.exit(compare.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, two, "--power", "0.001"]
    done = subprocess.run(command, cwd=LOGS.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "2.9103 ±0.0015" in done.stdout
    assert ("pip install -r logs/requirements.txt" in done.stdout) == (missing == "scipy")
    drawn = subprocess.run([*command, "--forest", two / "a.png"], cwd=LOGS.parent, capture_output=True, text=True)
    assert (drawn.returncode, "pip install" in drawn.stderr) == ((2, True) if missing == "matplotlib" else (0, False))


def test_what_lies_in_logs_is_passed_over(two, capsys):
    shutil.copy(LOGS / "requirements.txt", two)
    shutil.copy(LOGS / "compare.py", two)
    status, out, errors = run(capsys, *sorted(two.iterdir()))
    assert status == 0 and len(errors) == 1 and "compare.py" in errors[0] and "requirements.txt" in errors[0]


def test_a_reader_that_stops_early_is_no_error(two):
    process = subprocess.Popen([sys.executable, compare.__file__, two], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
