"""logs/compare.py and plot.py: the published comparison, the table, the lines, JSON, CSV, figures and mistakes."""

import csv
import json
import re
import subprocess
import sys
import time

import pytest
from matplotlib.figure import Figure
from test_results import BETTER, SHAPE, TWO, our_log, result_lines, write, write_runs

from logs import compare
from logs.log_format import ROOT, format_step_line
from logs.plot import question
from logs.results import known_keys, read_result, tomllib

NUMBER = re.compile(r"\d+\.\d+(?:e-\d+)?|\d+")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def two(tmp_path):
    """Two configurations of three runs: baseline needs 37 of 40 steps of 100 ms to 2.92, better 33 of 110 ms."""
    write_runs(tmp_path / "baseline", [SHAPE, SHAPE + 0.002, SHAPE - 0.001])
    write_runs(tmp_path / "better", BETTER, ms=110)
    return tmp_path


def run(capsys, *arguments):
    """Return the exit status, standard output and the lines of standard error."""
    try:
        status = compare.main([*map(str, arguments)])
    except SystemExit as end:  # argparse's
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err.splitlines()


def as_json(capsys, *arguments):
    """Return the entry of each configuration by its name, and the whole under None."""
    whole = json.loads(run(capsys, *arguments, "--json")[1], parse_constant=pytest.fail)  # NaN is not JSON
    return {None: whole} | {entry["name"]: entry for entry in whole["configurations"]}


def sections(capsys, *arguments):
    """Return answer, table, perhaps remarks, sentences and changes, and notes: lists of lines."""
    return [part.splitlines() for part in run(capsys, *arguments)[1].split("\n\n")]


def test_the_published_comparison_is_as_approved(capsys):
    """Between SciPy versions, figures may differ by one in the last digit."""
    approved = (ROOT / "tests/published_comparison.txt").read_text()
    _, out, errors = run(capsys, ROOT / "logs/published", "--baseline", "baseline_ttest", "--verbose")
    assert NUMBER.sub("#", out).split() == NUMBER.sub("#", approved).split()
    for now, then in zip(NUMBER.findall(out), NUMBER.findall(approved)):
        assert now == then or "." in then and abs(float(now) - float(then)) < 1.01 * 10.0 ** -len(then.split(".")[1])
    assert len(errors) == 1 and "logs in deeper folders" in errors[0]  # tiny and multi


def test_the_published_comparison_begins_with_the_answer_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run(capsys, ROOT / "logs/published", "--baseline", "baseline_ttest")[1]
    assert out.startswith("better: add_5, record_add_2, add_2, record_add_1. worse: remove_0_1_2,")
    assert max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) < 65
    assert "baseline_ttest has the same keys as the baseline and 28 runs, not 2" in run(
        capsys, ROOT / "logs/published")[1].replace("\n  ", " ")


def test_the_json_fields_and_figures(two, capsys):
    found = as_json(capsys, two)
    better, versus = found["better"], found["better"]["versus_baseline"]
    assert [*found[None], *better, *better["t_test"], *versus] == (
        "target baseline configurations name runs num_iterations final_loss_mean final_loss_std steps_to_target "
        "time_to_target total_time_mean total_time_std step_avg_ms break_even_step_ms missed t_test versus_baseline "
        "single_runs "
        "n mean std t p upper_bound record delta_loss delta_loss_low delta_loss_high p_loss delta_time delta_time_low "
        "delta_time_high p_time").split()
    assert [run["final_loss"] for run in better["single_runs"]] == pytest.approx([run[-1] for run in BETTER])
    assert (better["final_loss_mean"], found["baseline"]["versus_baseline"]) == (pytest.approx(2.89 + 0.0005 / 3), None)
    assert [better[key] for key in ("runs", "missed", "total_time_std", "step_avg_ms")] == [3, 0, 0, 110]
    assert versus["delta_time_low"] + versus["delta_time_high"] == pytest.approx(2 * versus["delta_time"])
    assert versus["p_loss"] < 0.001 and versus["delta_loss_low"] < versus["delta_loss"] < versus["delta_loss_high"] < 0
    write_runs(two / "tie", BETTER, ms=better["break_even_step_ms"])
    assert as_json(capsys, two)["tie"]["time_to_target"] == pytest.approx(found["baseline"]["time_to_target"], abs=1e-3)


def test_changes_from_the_baseline_are_listed_where_a_log_has_a_header(tmp_path, capsys):
    logs = dict(baseline=our_log(TWO), wide=our_log(TWO, code="", model_dim=9), bare=TWO, same=our_log(TWO, seed=5))
    folders = [write(tmp_path / name / "0.txt", text).parent for name, text in logs.items()]
    baselines = [as_json(capsys, *given)[None]["baseline"] for given in (folders[::-1], folders[1:])]
    assert baselines == ["baseline", "wide"]  # by its name, else the first
    assert sections(capsys, tmp_path)[3] == [
        "bare against baseline: only one log records the code; only one log records the configuration",
        "same against baseline: no change",
        "wide against baseline: only one log records the code; model_dim was null and is 9"]


def test_missed_targets_are_extrapolated_and_marked_and_most_of_them_sort_by_loss(two, capsys):
    write_runs(two / "late", [SHAPE + 0.011, SHAPE + 0.013], ms=50)
    _, table, lines, _ = sections(capsys, two)
    assert [line.split()[0] for line in table if "*" in line] == ["late"] == [table[2].split()[0]]
    assert any(line.startswith("late") and "2 of 2 do not reach the target" in line for line in lines)
    assert as_json(capsys, two)["late"]["time_to_target"] is None
    title, table, *_ = sections(capsys, two, "--target", "2.5")
    assert [line.split()[0] for line in table[2:]] == ["better", "baseline", "late"] and "0 of 8 runs" in title[-1]
    assert all("> " in line for line in table[2:])  # too far to extrapolate


@pytest.mark.parametrize("loss, ms, verdict", [
    (0.04, 100, "worse"), (-0.04, 100, "better"), (-0.02, 200, "mixed"), (0, 100, "undecided"),
    (0, 150, "worse time")])
def test_the_verdict(two, capsys, loss, ms, verdict):
    write_runs(two / "new", [SHAPE + loss, SHAPE + loss + 0.001, SHAPE + loss - 0.001], ms=ms)
    table = sections(capsys, two / "baseline", two / "new")[1]
    assert [line.startswith(f"new      {verdict} ") for line in table[2:]].count(True) == 1


def test_one_run_each_is_not_tested_and_power_says_how_many_it_takes(two, capsys):
    out = run(capsys, two / "baseline/000.txt", two / "better/000.txt")[1]
    assert out.count("No test of") == out.count("it needs two runs of a configuration") == 2
    write_runs(two / "more", [SHAPE - 0.01, SHAPE - 0.011])
    note = sections(capsys, two, "--power", "0.002")[-1][-1]
    alone, among = map(int, re.search(r"takes (\d+) runs of both, (\d+) where 2 are compared", note).groups())
    assert 2 < alone < among


def test_unfinished_and_diverged_runs_are_named_and_in_no_number(two, capsys):
    torn = f"{format_step_line(27, 40, 2700)}\nstep:28/40 tr"
    write(two / "new" / "0.txt", result_lines([10.0, 4.5, 3.3], total=40) + torn)
    write(two / "new" / "1.txt", result_lines([10.0, float("nan")], total=40))
    write(two / "new" / "2.txt", format_step_line(1, 40, 100))
    (line,) = (line for line in sections(capsys, two)[2] if line.startswith("new: "))  # a remark
    assert "1.txt diverged at step 10" in line and "2.txt is not finished" in line
    assert f"0.txt is at step 20 of 40 with loss 3.300000, {3.3 - 3.2 - 0.001 / 3:+.6f} relative to" in line
    assert as_json(capsys, two)["new"]["runs"] == 0
    status, out, errors = run(capsys, two / "new")  # none has finished
    assert (status, len(out.split("\n\n")[1].splitlines()), errors) == (0, 3, [])
    rows = list(csv.DictReader(run(capsys, two, "--csv")[1].splitlines()))
    assert len(rows) == 6 * 5 + 3 + 2 and rows[-1]["val_loss"] == "nan"
    assert list(rows[1].values()) == ["baseline", "000.txt", "10", "40", "4.0", "1000"]


def test_what_a_reader_of_the_curves_would_notice_is_a_line_each(two, capsys):
    write_runs(two / "rising", [SHAPE, [10, 4, 3.2, 2.9, 2.91]])
    write_runs(two / "odd", [SHAPE + 0.01, SHAPE + 0.011, SHAPE + 0.012, SHAPE + 0.2])
    write_runs(two / "short", [[9.0, 2.9]])
    remarks = sections(capsys, two)[2]
    assert [line.split(" (p")[0] for line in remarks] == [
        "rising: the loss rises at the end of 001.txt; do not trust it.",
        "odd: 003.txt is far from its other runs", "Of another length, so compared in time only: short."]


@pytest.mark.parametrize("step, loss", [(20, 3.18), (30, 2.93), (35, None)])
def test_at_compares_an_earlier_validation_also_of_unfinished_runs(two, capsys, step, loss):
    write(two / "new" / "0.txt", result_lines([10.0, 4.0, 3.18, 2.93], total=40))
    if loss is None:
        status, _, errors = run(capsys, two, "--at", step)
        assert status == 2 and "--at 35: no run has a validation there" in errors[0]
    else:
        assert as_json(capsys, two, "--at", step)["new"]["final_loss_mean"] == pytest.approx(loss)
        assert f"to step {step}." in run(capsys, two, "--at", step)[1]


def test_a_scale_s_target_comes_from_the_header(tmp_path, capsys):
    write(tmp_path / "baseline" / "0.txt", our_log(TWO, target_loss=4.5))
    assert as_json(capsys, tmp_path)[None]["target"] == 4.5
    assert as_json(capsys, tmp_path, "--target", 4)[None]["target"] == 4


def test_the_order_of_losses_is_compared_with_that_of_other_runs(tmp_path, capsys):
    for i, name in enumerate(["baseline", "a", "b", "c", "d"]):
        write_runs(tmp_path / "small" / name, [SHAPE + 0.1 * i, SHAPE + 0.1 * i + 0.01])
        write_runs(tmp_path / "large" / name, [SHAPE - 0.1 * i, SHAPE - 0.1 * i + 0.01], ms=30)
    options = tmp_path / "small", "--against", tmp_path / "large", "--scatter", tmp_path / "a.png"
    assert "large: -1.00, 95% " in run(capsys, *options)[1] and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert as_json(capsys, *options)[None]["ranking"]["rho"] == pytest.approx(-1)


def test_a_hundred_configurations_take_less_than_ten_seconds(tmp_path, capsys):
    for i in range(100):
        write_runs(tmp_path / f"c{i}", [SHAPE + i * 1e-4 + noise for noise in (0, 0.001, 0.003)[: 1 + i % 3]])
    start = time.process_time()
    assert run(capsys, tmp_path, "--baseline", "c2")[0] == 0
    assert time.process_time() - start < 10


@pytest.mark.parametrize("entries, keys, group", [
    ([[0, 13], [1, 14], [2, 15]], {}, "baseline"), ([[0, 12], [1, 13], [2, 14], [3, 15]], {}, "more tables"),
    ([[1, 14], [2, 15]], {}, "fewer tables"), ([], {}, "fewer tables"), ([[0, 1], [14, 15]], {}, "shared by neighbors"),
    ([[1, 13], [2, 14], [4, 11]], {}, "shifted"), ([{"layers": [1], "source": "bigram"}], {}, "other sources"),
    ([[0, 13], [1, 14], [2, 15]], {"value_embedding_gate": True}, "other keys")])
def test_the_forest_groups_by_what_a_configuration_changes(entries, keys, group):
    baseline = {"value_embeddings": [[0, 13], [1, 14], [2, 15]], "value_embedding_gate": False}
    assert question(baseline | {"value_embeddings": entries, "seed": 3} | keys, baseline) == group


@pytest.mark.parametrize("name, map_of", [("share_01_1415", "share_01_1415"), ("mirror_3_5820", "mirror_3"),
                                          ("x/baseline_ttest", "baseline"), ("mine", None)])
def test_bare_lines_have_the_keys_of_the_config_of_their_name(tmp_path, name, map_of):
    keys = known_keys(name, read_result(write(tmp_path / "0.txt", TWO)))
    expected = map_of and tomllib.loads((ROOT / f"configs/{map_of}.toml").read_text())["value_embeddings"]
    assert keys.get("value_embeddings") == expected


def test_odd_and_long_names_fit_both_tables(two, capsys):
    write_runs(two / f"a|{'x' * 200}", [SHAPE, SHAPE + 0.001])
    table = [line for line in run(capsys, two, "--markdown")[1].splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {12}
    assert max(map(len, sections(capsys, two)[1])) <= 200


@pytest.mark.parametrize("arguments, words", [
    ("", "PATH"), ("nowhere", "nowhere (no such file)"), ("empty", "no logs (*.txt, *.log): empty"),
    (". --baseline c", "use one of baseline, better"), (". --target low", "--target"), (". --power 0", "--power"),
    (". --plot figure.jpgg", "jpgg"), (". --forest nowhere/figure.png", "nowhere/figure.png"), (". --x loss", "--x"),
    (". --json --csv", "--csv: not allowed with"), (". --from 3", "--from: without effect"),
    (". --x time", "--x: without effect"), (". --json --power 1", "power"), (". --csv --verbose", "verbose"),
    (". --scatter a.png", "--scatter: without effect"), (". --against .", "needs scipy, repeated runs and 4 common"),
    (". --plot a.png --from 30 --to 20", "--to"), (". --grid a.png", "pairs_4x2"), (". --unknown", "--unknown")])
def test_mistakes_are_a_line(two, monkeypatch, capsys, arguments, words):
    (two / "empty").mkdir()
    monkeypatch.chdir(two)
    status, out, errors = run(capsys, *arguments.split())
    assert (status, out, len(errors)) == (2, "", 1) and words in errors[0]


@pytest.mark.parametrize("missing, status", [("scipy", 0), ("matplotlib", 2)])
def test_the_table_needs_neither_scipy_nor_matplotlib(two, missing, status):
    code = f"""import sys; sys.modules["{missing}"] = None; from logs import compare
sys.exit(compare.main([sys.argv[1], "--power", "0.001"]) or compare.main([sys.argv[1], "--forest", sys.argv[2]]))"""
    done = subprocess.run([sys.executable, "-c", code, two, two / "a.png"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and "2.9103±0.0015" in done.stdout  # the status is that of drawing
    assert "pip install -r logs/requirements.txt" in (done.stderr if status else done.stdout)


@pytest.fixture
def three(two):
    write_runs(two / "worse_$^$", [SHAPE + 0.02, SHAPE + 0.021])
    write(two / "abandoned" / "0.txt", result_lines([9.0, 4.0], total=40))
    return two


@pytest.fixture
def draw(monkeypatch):
    """Draw a figure without saving it; return its axes."""
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure.axes))
    return lambda *options: compare.main([*map(str, options), "a.png"]) or seen.pop()


@pytest.mark.parametrize("options, suffix, beginning", [
    ("--forest", "png", b"\x89PNG"), ("--x time --forest", "pdf", b"%PDF"), ("--plot", "svg", b"<?xml"),
    ("--x time --plot", "png", b"\x89PNG")])
def test_every_kind_of_figure_is_a_file(three, options, suffix, beginning):
    file = three / f"figure.{suffix}"
    assert compare.main([str(three), *options.split(), str(file)]) == 0
    assert file.read_bytes().startswith(beginning) and file.stat().st_size > 5000


def test_curves_begin_near_the_target_and_the_legend_follows_their_ends_with_each_crossing(three, draw):
    (axes,) = draw(three, "--plot")
    labels = [text.get_text() for text in axes.get_legend().texts]
    assert labels == ["abandoned", r"worse_\$^\$", "baseline\n2.92 at 37.6", "better\n2.92 at 32.5"]
    assert axes.get_xlim() == (10, 40) and axes.get_ylim()[1] < 4.5
    assert not axes.collections  # of four configurations, the runs are drawn, and no intervals
    (band,) = draw(three / "worse_$^$", "--target", 1, "--plot")[0].collections  # the mean's interval
    low, *_, high = sorted(y for x, y in band.get_paths()[0].vertices if x == 40)
    assert high - low == pytest.approx(2 * 12.7062 * 0.0005, rel=1e-4)
    assert len(draw(three / "worse_$^$", three / "better", "--plot")[0].collections) == 2


def test_the_grid_counts_the_tables_of_pairs_at_each_place_and_those_of_a_pool_once(tmp_path, draw):
    for name, loss in (("pairs_2x1", 2.93), ("pairs_2x3", 2.92), ("pool_2x3", 2.925)):
        write(tmp_path / name / "0.txt", result_lines([9.0, loss]))
    left, right = draw(tmp_path, "--grid")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.lines[:-1]}
    assert drawn == {"pairs, 2 places": [[2, 2.93], [6, 2.92]], "pool, 2 places": [[3, 2.925]]}
    assert right.lines[0].get_ydata().tolist() == [100, 100]


def test_the_forest_has_sorted_rows_and_refusals_are_a_line(three, draw, capsys):
    cells, axes = draw(three, "--forest")
    assert [text.get_text() for text in cells.texts] == ["baseline", "", "better", "worse_$^$"]  # a group without keys
    assert [text.get_text() for text in axes.texts] == ["+0.0   n=3", "-20.2   n=3", "+20.2   n=2"]
    for i in range(9):
        write_runs(three / f"{i}", [[9.0, 3.0, 2.9 + i / 1000]])
    for options, words in ((["--plot"], "--forest"), (["--baseline", "abandoned", "--forest"], "has no final loss")):
        status, _, (line,) = run(capsys, three, *options, "a.png")
        assert status == 2 and words in line


def test_a_reader_that_stops_early_is_not_an_error(two):
    process = subprocess.Popen([sys.executable, compare.__file__, two], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
