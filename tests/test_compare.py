"""logs/compare.py: the table, the sentences, JSON, CSV, Markdown and mistakes."""

import csv
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from test_results import result_lines, write, write_runs

from logs import compare
from logs.run_log import train_line

SHAPE = np.array([10.0, 4.0, 3.2, 2.95, 2.91])
BETTER = [SHAPE - 0.02, SHAPE - 0.021, SHAPE - 0.0185]


@pytest.fixture
def two(tmp_path):
    """Two configurations of three runs: baseline needs 37 of 40 steps of 100 ms to 2.92, better 33 of 110 ms."""
    write_runs(tmp_path / "baseline", [SHAPE, SHAPE + 0.002, SHAPE - 0.001])
    write_runs(tmp_path / "better", BETTER, ms=110)
    return tmp_path


def run(capsys, *arguments):
    """Exit status, standard output and the lines of standard error."""
    status = compare.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err.splitlines()


def as_json(capsys, *arguments):
    """--json's configurations by name, with the whole object under None."""
    out = run(capsys, *arguments, "--json")[1]
    whole = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return {None: whole} | {c["name"]: c for c in whole["configurations"]}


def sections(text):
    """Title, table, sentences and notes: lists of lines."""
    return [part.splitlines() for part in text.split("\n\n")]


@pytest.fixture(scope="module")
def published():
    """What the one command of the README prints."""
    command = [sys.executable, "logs/compare.py", "logs/published", "--baseline", "baseline_ttest"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_published_runs_take_80_lines_of_110_columns_sorted_by_time(published):
    _, table, sentences, _ = sections(published)
    assert len(published.splitlines()) <= 80 and max(map(len, table)) <= 110
    assert len(table) == 2 + 33 and len(sentences) == 33 and sentences[0].startswith("baseline_ttest: the baseline")
    times = [float(re.search(r" (\d{4}\.\d)[* ]", line)[1]) for line in table[2:]]
    assert times == sorted(times) and {1438.8, 1452.7, 1464.8} < {*times}


@pytest.mark.slow
def test_what_is_real_of_the_published_runs(published):
    found = {}
    for line in sections(published)[1][2:]:
        found.setdefault(re.search(r"[a-z]+( [a-z]+)?$", line)[0], set()).add(line.split()[0])
    assert len(found.pop("not shown")) == 33 - 4 - 2 - 8 - 1 and found == {
        "better loss": {"add_2", "add_5", "record_add_1", "record_add_2"}, "better time": {"record", "record_5800"},
        "worse": {"remove_0_1", "remove_2", "remove_0_13", "remove_1_14", "remove_2_15", "remove_0_1_2",
                  "share_01_1415", "share_012_131415"},
        "baseline": {"baseline_ttest"}}


@pytest.mark.slow
def test_the_published_tests_of_the_record_stand_in_the_sentences(published):
    assert "record: no (t -1.78, p 0.0434, 95% bound 2.919989)" in published
    assert "record: yes (t -5.88, p 5.07e-07, 95% bound 2.919370)" in published


def test_the_json_fields(two, capsys):
    found = as_json(capsys, two)
    assert list(found[None]) == ["target", "baseline", "configurations"]
    assert list(found["better"]) == (
        "name runs num_iterations final_loss_mean final_loss_std steps_to_target time_to_target total_time_mean "
        "total_time_std step_avg_ms break_even_step_ms missed t_test versus_baseline").split()
    assert list(found["better"]["t_test"]) == "n mean std t p upper_bound record".split()
    assert list(found["better"]["versus_baseline"]) == (
        "delta_loss delta_loss_low delta_loss_high p_loss delta_time delta_time_low delta_time_high p_time").split()
    assert found["baseline"]["versus_baseline"] is None


def test_the_figures_in_json(two, capsys):
    found = as_json(capsys, two)["better"]
    versus = found["versus_baseline"]
    assert found["final_loss_mean"] == pytest.approx(2.89 + 0.0005 / 3) and (found["runs"], found["missed"]) == (3, 0)
    assert (found["total_time_mean"], found["total_time_std"], found["step_avg_ms"]) == (pytest.approx(4.4), 0, 110)
    assert versus["delta_time_low"] + versus["delta_time_high"] == pytest.approx(2 * versus["delta_time"])
    assert versus["p_loss"] < 0.001 and versus["delta_loss_low"] < versus["delta_loss"] < versus["delta_loss_high"] < 0


def test_break_even_is_the_step_time_that_ties(two, capsys):
    write_runs(two / "tie", BETTER, ms=as_json(capsys, two)["better"]["break_even_step_ms"])
    found = as_json(capsys, two)
    assert found["tie"]["time_to_target"] == pytest.approx(found["baseline"]["time_to_target"], abs=0.001)


@pytest.mark.parametrize("names, baseline", [(["a", "baseline"], "baseline"), (["b", "a"], "b")])
def test_the_baseline_is_the_one_of_that_name_or_the_first(tmp_path, capsys, names, baseline):
    folders = [write_runs(tmp_path / name, [[5.0, 4.0]]) for name in names]
    assert as_json(capsys, *folders)[None]["baseline"] == baseline


def test_a_mean_curve_that_ends_above_the_target_would_reach_it(two, capsys):
    write_runs(two / "late", [SHAPE + 0.011, SHAPE + 0.013])
    _, table, sentences, _ = sections(run(capsys, two)[1])
    assert [line.split()[0] for line in table if "*" in line] == ["late"]
    assert any(line.startswith("late") and "2 of 2 would reach the target later" in line for line in sentences)
    assert as_json(capsys, two)["late"]["time_to_target"] is None


def test_where_most_runs_miss_the_target_the_table_is_sorted_by_loss(two, capsys):
    write_runs(two / "slow", [SHAPE - 0.03], ms=200)
    title, table, *_ = sections(run(capsys, two, "--target", "2.5")[1])
    assert [line.split()[0] for line in table[2:]] == ["slow", "better", "baseline"] and "0 of 7 runs" in title[0]


@pytest.mark.parametrize("loss, ms, verdict", [
    (0.04, 100, "worse"), (-0.04, 100, "better"), (-0.02, 200, "mixed"), (0, 100, "not shown"), (0, 150, "worse time")])
def test_the_verdict(two, capsys, loss, ms, verdict):
    write_runs(two / "new", [SHAPE + loss, SHAPE + loss + 0.001, SHAPE + loss - 0.001], ms=ms)
    table = sections(run(capsys, two / "baseline", two / "new")[1])[1]
    assert [line.startswith("new") for line in table if line.endswith(f" {verdict}")] == [True]


def test_one_run_each_is_no_test_and_a_line_says_what_it_takes(tmp_path, capsys):
    for name, loss in (("baseline", 2.9), ("b", 2.8)):
        write_runs(tmp_path / name, [[9.0, 3.0, loss]])
    assert run(capsys, tmp_path)[1].count("that takes two runs of a configuration") == 2
    assert as_json(capsys, tmp_path)["b"]["versus_baseline"]["p_loss"] is None


def test_power_says_how_many_runs_alone_and_among_several(two, capsys):
    write_runs(two / "more", [SHAPE - 0.01, SHAPE - 0.011])
    note = run(capsys, two, "--power", "0.002")[1].splitlines()[-1]
    alone, among = map(int, re.search(r"takes (\d+) runs of both, (\d+) where 2 are compared", note).groups())
    assert 2 < alone < among


def test_runs_that_go_on_or_diverged_are_named_and_in_no_number(two, capsys):
    torn = f"{train_line(27, 40, 2700)}\nstep:28/40 tr"
    write(two / "new" / "0.txt", result_lines([10.0, 4.5, 3.3], total=40) + torn)
    write(two / "new" / "1.txt", result_lines([10.0, float("nan")], total=40))
    write(two / "new" / "2.txt", train_line(1, 40, 100))
    (line,) = (line for line in run(capsys, two)[1].splitlines() if line.startswith("new: "))
    assert "1.txt diverged at step 10" in line and "2.txt is not finished" in line
    assert f"0.txt is at step 20 of 40 with loss 3.300000, {3.3 - 3.2 - 0.001 / 3:+.6f} on the baseline" in line
    assert as_json(capsys, two)["new"]["runs"] == 0


def test_runs_of_which_none_has_finished_are_a_table(tmp_path, capsys):
    for name in ("baseline", "b"):
        write(tmp_path / name / "0.txt", result_lines([10.0, 4.5], total=40))
    status, out, errors = run(capsys, tmp_path)
    assert (status, len(sections(out)[1]), errors) == (0, 4, [])


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


@pytest.mark.parametrize("arguments, words", [
    ("", "PATH"), ("nowhere", "nowhere (no such file)"), ("empty", "no logs (*.txt, *.log): empty"),
    (". --baseline c", "there are baseline, better"), (". --target low", "--target"), (". --power 0", "--power"),
    (". --plot figure.jpgg", "jpgg"), (". --forest nowhere/figure.png", "nowhere/figure.png"), (". --x loss", "--x"),
    (". --plot a.png --from 30 --to 20", "--to"), (". --unknown", "--unknown")])
def test_mistakes_are_a_line(two, monkeypatch, capsys, arguments, words):
    (two / "empty").mkdir()
    monkeypatch.chdir(two)
    status, out, errors = run(capsys, *arguments.split())
    assert (status, out) == (2, "") and words in errors[0]
    assert errors[1:] in ([], ["compare.py: no results to compare"])


@pytest.mark.parametrize("missing, status", [("scipy", 0), ("matplotlib", 2)])
def test_without_scipy_or_matplotlib_the_table_comes(two, missing, status):
    """The exit status is that of drawing."""
    code = f"import sys; sys.modules[{missing!r}] = None; from logs import compare; path, file = sys.argv[1:]\n"
    code += "sys.exit(compare.main([path, '--power', '0.001']) or compare.main([path, '--forest', file]))"
    done = subprocess.run([sys.executable, "-c", code, two, two / "a.png"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and "2.9103 ±0.0015" in done.stdout
    assert "pip install -r logs/requirements.txt" in (done.stderr if status else done.stdout)


def test_a_reader_that_stops_early_is_no_error(two):
    process = subprocess.Popen([sys.executable, compare.__file__, two], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
