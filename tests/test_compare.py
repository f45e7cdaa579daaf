"""logs/compare.py and plot.py: the published comparison, the table, the lines, JSON, CSV, figures and mistakes."""

import csv
import json
import os
import re
import sys
import time

import pytest
from matplotlib.figure import Figure
from test_results import BETTER, SHAPE, TWO, our_log, result_lines, write, write_runs

import train_gpt_medium as train
from logs import compare, plot
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


def assert_approved(out, name):
    """Between SciPy versions, figures may differ by one in the last digit. To approve a change, write `out` there."""
    approved = (ROOT / "tests" / name).read_text()
    assert NUMBER.sub("#", out).split() == NUMBER.sub("#", approved).split()
    for now, then in zip(NUMBER.findall(out), NUMBER.findall(approved)):
        assert now == then or "." in then and abs(float(now) - float(then)) < 1.01 * 10.0 ** -len(then.split(".")[1])


def test_the_published_comparison_is_as_approved_and_begins_with_the_answer_in_80_columns(capsys, monkeypatch):
    options = ROOT / "logs/published", "--baseline", "baseline_ttest"
    _, out, errors = run(capsys, *options, "--verbose")
    assert_approved(out, "published_comparison.txt")
    assert len(errors) == 1 and "logs in deeper folders" in errors[0]  # tiny and multi
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(capsys, *options)[1].splitlines()
    assert lines[0].startswith("better: add_5, record_add_2, add_2, record_add_1. worse: remove_0_1_2,")
    assert max(map(len, lines)) <= 80 and len(lines) < 65


def test_other_validation_data_and_times_of_other_machines_are_named(tmp_path, capsys):
    """A machine is that of any session of a run."""
    tuned = dict(coordinate_descent_tuning=True)
    for name, resumed, data, keys in (("baseline", "a", 1, {}), ("resumed", "b", 1, tuned), ("other", "c", 2, {})):
        for i in range(2):
            session = "device: 8 ranks, A\nstarted: 2026-11-30 05:00:00 on a\nresumed at step 0 after 0ms of training; "
            session += f"2026-11-30 06:00:00 on {resumed}; device: 8 ranks, A\n"
            log = our_log(session + result_lines(SHAPE - 0.1 * data + i / 1000), val_data=[data], seed=i, **keys)
            write(tmp_path / name / f"{i}.txt", log)
    out = run(capsys, tmp_path)[1]
    assert out.startswith("undecided: resumed.\n") and re.search("^other +not compared", out, re.MULTILINE)
    assert "\nValidated on other data or at another length, so not compared: other.\n" in out
    assert "machines: 8 ranks, A on a (baseline); 8 ranks, A on a, tuned kernels (resumed); 8 ranks, A on b, tun" in out
    assert "\nin time to 2.92, on different machines: " in out
    published = write_runs(tmp_path / "published", [SHAPE, SHAPE + 0.001])
    out = run(capsys, tmp_path / "baseline", published)[1]
    assert "different machines: 8 ranks, A on a (baseline); not stated (published)." in out
    for name, hosts in (("baseline", "ab"), ("other", "ba")):
        for i, host in enumerate(hosts):
            session = f"device: 8 ranks, A\nstarted: 2026-11-30 05:00:00 on {host}\n"
            write(tmp_path / "balanced" / name / f"{i}.txt", our_log(session + result_lines(SHAPE - i / 1000), seed=i))
    assert "different machines" not in run(capsys, tmp_path / "balanced")[1]
    write(tmp_path / "balanced" / "other" / "2.txt", our_log(session + result_lines(SHAPE), seed=2))
    assert "on a (baseline, other); 8 ranks, A on b (baseline, other).\n" in run(capsys, tmp_path / "balanced")[1]
    write(tmp_path / "tiny" / "0.txt", our_log(result_lines(SHAPE), val_tokens=65_536))
    out = run(capsys, published, tmp_path / "tiny")[1]
    assert "not compared: tiny; use one as --baseline." in out and "break-even" not in out


def test_a_comparison_of_peculiar_runs_is_as_approved(two, capsys):
    write_runs(two / "mixed", BETTER, ms=200)
    write_runs(two / "late", [SHAPE + 0.011, SHAPE + 0.013], ms=50)  # extrapolated
    write_runs(two / "far", [SHAPE + 0.1, SHAPE + 0.101])  # too far to extrapolate
    write_runs(two / "short", [[9.0, 2.9]])
    write_runs(two / "rising", [SHAPE, [10, 4, 3.2, 2.9, 2.91]])
    write_runs(two / "odd", [SHAPE + 0.01, SHAPE + 0.011, SHAPE + 0.012, SHAPE + 0.03])
    write_runs(two / "baseline_ttest", [SHAPE] * 4)  # more runs of the baseline's map
    write(two / "unfinished" / "0.txt", result_lines([10.0, 4.5, 3.3], total=40))
    write(two / "unfinished" / "1.txt", result_lines([10.0, float("nan")], total=40))
    write(two / "unfinished" / "2.txt", format_step_line(1, 40, 100))
    write(two / "longer" / "0.txt", result_lines([10.0, 4.5, 3.3, 3, 2.9, 2.89], total=60))  # at step 50
    write(two / "ours" / "0.txt", our_log(result_lines(SHAPE), seed=5))
    assert_approved(run(capsys, two, "--verbose", "--power", "0.01")[1], "peculiar_comparison.txt")


def test_the_json_fields_and_figures(two, capsys):
    found = as_json(capsys, two)
    better, versus = found["better"], found["better"]["versus_baseline"]
    assert [*found[None], *better, *better["t_test"], *versus] == (
        "target baseline configurations name runs num_iterations final_loss_mean final_loss_std steps_to_target "
        "time_to_target total_time_mean total_time_std step_avg_ms break_even_step_ms "
        "validated_alike missed t_test versus_baseline single_runs "
        "n mean std t p upper_bound record delta_loss delta_loss_low delta_loss_high p_loss delta_time delta_time_low "
        "delta_time_high p_time").split()
    assert [run["final_loss"] for run in better["single_runs"]] == pytest.approx([run[-1] for run in BETTER])
    assert [better[key] for key in ("runs", "missed", "total_time_std", "step_avg_ms")] == [3, 0, 0, 110]
    assert versus["delta_loss_low"] < versus["delta_loss"] == pytest.approx(-0.020167, abs=1e-6)
    assert versus["delta_loss"] < versus["delta_loss_high"] < 0 and found["baseline"]["versus_baseline"] is None


def test_most_missed_targets_sort_the_table_by_loss(two, capsys):
    write_runs(two / "fast", [SHAPE + 0.011, SHAPE + 0.013], ms=50)
    table = sections(capsys, two, "--target", "2.5")[1]
    assert [line.split()[0] for line in table[2:]] == ["better", "baseline", "fast"]


def test_one_run_each_is_not_tested(two, capsys):
    out = run(capsys, two / "baseline/000.txt", two / "better/000.txt")[1]
    assert out.count("No test of") == out.count("it needs a configuration with two runs that") == 2


def test_unfinished_and_diverged_runs_are_in_no_number_but_in_csv(two, capsys):
    torn = f"{format_step_line(27, 40, 2700)}\nstep:28/40 tr"
    write(two / "new" / "0.txt", result_lines([10.0, 4.5, 3.3], total=40) + torn)
    write(two / "new" / "1.txt", result_lines([10.0, float("nan")], total=40))
    assert as_json(capsys, two)["new"]["runs"] == 0
    status, out, errors = run(capsys, two / "new")  # none has finished
    assert (status, len(out.split("\n\n")[1].splitlines()), errors) == (0, 3, [])
    rows = list(csv.DictReader(run(capsys, two, "--csv")[1].splitlines()))
    assert len(rows) == 6 * 5 + 3 + 2 and rows[-1]["val_loss"] == "nan"
    assert list(rows[1].values()) == ["baseline", "000.txt", "10", "40", "4.0", "1000"]


def test_a_long_task_is_named_every_few_seconds(two, capsys, monkeypatch):
    monkeypatch.setattr(compare, "PROGRESS_S", 0.02)
    monkeypatch.setattr(compare, "Comparison", lambda *_: time.sleep(0.1) or compare.parse([]))
    _, _, errors = run(capsys, two)
    assert errors.count("compare.py: comparing 2 configurations ...") > 2
    time.sleep(0.05)
    assert capsys.readouterr() == ("", "")



def test_at_compares_an_earlier_validation_also_of_unfinished_runs(two, capsys):
    write(two / "new" / "0.txt", result_lines([10.0, 4.0, 3.18, 2.93], total=40))
    assert as_json(capsys, two, "--at", 20)["new"]["final_loss_mean"] == pytest.approx(3.18)
    for step in (30, 40):  # the baseline's length
        write(two / "new" / "1.txt", result_lines([10.0, 4.5, 3.3, 3, 2.95, 2.9], total=60))
        out = run(capsys, two, "--at", step, "--target", 2.9)[1]
        assert f"to step {step}." in out and "in time to" not in out  # slopes differ amid a run


def test_runs_that_are_no_fair_comparison_are_named(tmp_path, capsys):
    for name, keys in (("baseline", {}), ("twice", dict(sequences_per_step=16)), ("code", dict(code="x = 1")),
                       ("diverged", {}), ("copies", dict(seed=0)), ("init", dict(init_sha256="ab"))):
        for i in range(2):
            log = our_log(result_lines(SHAPE - i / 1000), **dict(sequences_per_step=8, train_seq_len=64, seed=i) | keys)
            write(tmp_path / name / f"{i}.txt", log)
    write(tmp_path / "diverged" / "2.txt", our_log(result_lines([9, float("nan")], total=40), sequences_per_step=8,
                                                   train_seq_len=64, seed=2))
    write(tmp_path / "boom" / "0.txt", result_lines([9, float("nan")], total=40))
    out = run(capsys, tmp_path)[1]
    assert "diverged (1 of 3 runs diverged)" in out.split(".")[0] and "\nDiverged: boom (1 of 1 runs).\n" in out
    assert "\nCode other than the baseline's, or unknown: code.\n" in out
    assert "\ntwice trains on 2 times the baseline's tokens.\n" in out and out.count("are not repeats") == 2
    assert "\ncopies: runs from one seed or checkpoint are not repeats" in out and "\ninit: runs from one seed" in out


def test_headers_decide_the_baseline_the_target_and_the_changes(tmp_path, capsys):
    logs = dict(wide=our_log(TWO, model_dim=9), same=our_log(TWO, seed=5), baseline=our_log(TWO, target_loss=4.5))
    folders = [write(tmp_path / name / "0.txt", text).parent for name, text in logs.items()]
    for given, baseline, target in ((folders, "baseline", 4.5), (folders[:2], "wide", 2.92),
                                    ([*folders, "--target", 4], "baseline", 4)):
        whole = as_json(capsys, *given)[None]
        assert (whole["baseline"], whole["target"]) == (baseline, target)
    assert sections(capsys, tmp_path)[3] == [
        "same against baseline: no change", "wide against baseline: model_dim was null and is 9"]


def test_the_order_of_losses_is_compared_with_that_of_other_runs(tmp_path, capsys):
    for i, name in enumerate(["baseline", "a", "b", "c", "d"]):
        write_runs(tmp_path / "small" / name, [SHAPE + 0.1 * i, SHAPE + 0.1 * i + 0.01])
        write_runs(tmp_path / "large" / name, [SHAPE - 0.1 * i, SHAPE - 0.1 * i + 0.01], ms=30)
    options = tmp_path / "small", "--against", tmp_path / "large", "--scatter", tmp_path / "a.png"
    assert "large: -1.00, 95% " in run(capsys, *options)[1] and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert as_json(capsys, *options)[None]["ranking"]["rho"] == pytest.approx(-1)


@pytest.mark.slow
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
    keys = baseline | {"value_embeddings": entries, "seed": 3} | keys
    assert question(keys, baseline) == group
    bare = {"value_embeddings": baseline["value_embeddings"]}  # a header has all keys, and a config only some
    assert question(keys | {"run_id": 0, "vocab_size": 9}, bare) == group and question(keys, {}) == ""


def test_the_forest_knows_the_defaults():
    hp = vars(train.Hyperparameters())
    assert plot.DEFAULTS == {name: hp[name] for name in plot.DEFAULTS}


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
    ("", "PATH"), ("nowhere", "nowhere: no such file"), ("empty", "empty: skipped, no logs (*.txt, *.log)"),
    (". --baseline c", "use one of baseline, better"), (". --target low", "--target"), (". --power 0", "--power"),
    (". --plot figure.jpgg", "jpgg"), (". --forest nowhere/figure.png", "nowhere/figure.png"), (". --x loss", "--x"),
    (". --json --csv", "--csv: not allowed with"), (". --from 3", "--from: without effect"),
    (". --x time", "--x: without effect"), (". --json --power 1", "power"), (". --csv --verbose", "verbose"),
    (". --scatter a.png", "--scatter: without effect"), (". --against .", "needs repeated runs and 4 common"),
    (". --against empty", "--against empty: no configuration is named baseline there, among empty: skipped, no logs"),
    (". --against . --csv", "--against: without effect; use it with the table or --json"),
    (". --plot a.png --from 30 --to 20", "--to"), (". --grid a.png", "pairs_4x2"),
    (". --at 35", "--at 35: no run has a validation there"), (". --unknown", "--unknown")])
def test_mistakes_are_a_line(two, monkeypatch, capsys, arguments, words):
    (two / "empty").mkdir()
    monkeypatch.chdir(two)
    status, out, errors = run(capsys, *arguments.split())
    assert (status, out, len(errors)) == (2, "", 1) and words in errors[0]


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
    ("--forest", "png", b"\x89PNG"), ("--x time --plot", "svg", b"<?xml"),
    pytest.param("--x time --forest", "pdf", b"%PDF", marks=pytest.mark.slow)])
def test_figures_are_files(three, options, suffix, beginning):
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


def test_a_reader_that_stops_early_is_not_an_error(two, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert compare.main([str(two)]) == 0
