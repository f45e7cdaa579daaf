"""logs/compare.py: logs become tables, tests, verdicts and figures."""

import csv
import importlib.util
import io
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

import train_gpt_medium as train

spec = importlib.util.spec_from_file_location("compare", ROOT / "logs" / "compare.py")
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)

PUBLISHED = ROOT.parent / "shared" / "published-logs"
RULE = "=" * 100
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published logs are not here")


def results(losses, total=None, every=10, ms=100):
    """Result lines of a run that validates every 10 steps, with a training line before each validation."""
    total = every * (len(losses) - 1) if total is None else total
    lines = []
    for i, loss in enumerate(losses):
        step = min(i * every, total)
        if step:
            lines.append(train.train_line(step, total, step * ms))
        lines.append(train.val_line(step, total, loss, step * ms))
    return "\n".join(lines) + "\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_runs(folder, runs, **how):
    """A folder of logs, one for each list of losses."""
    for i, losses in enumerate(runs):
        write(folder / f"{i}.txt", results(losses, **how))
    return folder


@pytest.fixture
def two(tmp_path):
    """Two configurations of three runs: baseline needs about 37 of 40 steps of 100 ms to 2.92, better about 33 of 110 ms."""
    shape = np.array([10.0, 4.0, 3.2, 2.95, 2.91])
    write_runs(tmp_path / "baseline", [shape, shape + 0.002, shape - 0.001])
    write_runs(tmp_path / "better", [shape - 0.02, shape - 0.021, shape - 0.0185], ms=110)
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


def losses_of(path):
    return list(compare.read_run(path).curve.losses)


# -----------------------------------------------------------------------------
# Reading

LOOK_ALIKES = results([8.0, 7.0, 6.0], total=99)
ENVIRONMENT = "Running Python 3.12.7 (main) [GCC 13.2.0]\nRunning PyTorch 2.9.0 compiled for CUDA 12.6\n|=========+=========|\n"
PROGRAM = f'"""As a log says:\n{LOOK_ALIKES}"""\nprint("=" * 100)\n{RULE}\n{LOOK_ALIKES}'
WHOLE_LOG = f"{PROGRAM}{RULE}\n{ENVIRONMENT}{RULE}\n{LOOK_ALIKES}"


@pytest.mark.parametrize("code", [PROGRAM, WHOLE_LOG], ids=["look-alikes", "a whole log"])
def test_the_program_in_our_log_is_no_result(tmp_path, code):
    log = train.RunLog(tmp_path / "0.txt")
    train.write_log_header(log, code, train.Hyperparameters(), train.Ranks.from_environment())
    log.to_file("warm-up: 10 steps, not timed, then undone\n" + results([5.0, 4.0]) + "peak memory resident: 400 MiB")
    log.close()
    assert losses_of(log.path) == [5.0, 4.0]
    assert compare.read_run(log.path).went_back_to is None  # nor did look-alikes give way to results


@pytest.mark.parametrize("tail", ["", "peak memory allocated: 1 MiB reserved: 2 MiB\n", f"{RULE}\nend\n"])
def test_a_published_log(tmp_path, tail):
    log = write(tmp_path / "a.txt", f"{PROGRAM}{RULE}\n{ENVIRONMENT}{RULE}\n{results([5.0, 4.0])}{tail}")
    assert losses_of(log) == [5.0, 4.0]


@pytest.mark.parametrize("text", [f"{PROGRAM}{RULE}\n", f"{PROGRAM}{RULE}\n{ENVIRONMENT}", f"{PROGRAM}{RULE}\n{ENVIRONMENT}{RULE}\nwarm-up\n"])
def test_a_log_cut_off_in_its_header_has_no_results(tmp_path, text):
    with pytest.raises(ValueError, match="no results"):
        compare.read_run(write(tmp_path / "a.txt", text))


@pytest.mark.parametrize("data", [
    results([5.0, 4.0]).replace("\n", "\r\n").encode(),
    b"\xef\xbb\xbf" + results([5.0, 4.0]).encode(),
    results([5.0, 4.0]).encode("utf-16"),
    b"\0\0\0" + results([5.0, 4.0]).encode() + b"\0" * 4096,
    b"\xff\xfe\x80 odd\n".join([b"", b"\x80\n" + results([5.0, 4.0]).encode()])[3:],
    b"\xff\xfe odd\n" + results([5.0, 4.0]).encode(),
    results([5.0, 4.0]).encode().rstrip(b"\n"),
    "\u2028\ufeff\n".encode() + results([5.0, 4.0]).encode(),
], ids=["CRLF", "BOM", "UTF-16", "NUL", "bad UTF-8", "half a BOM", "no newline at the end", "odd characters"])
def test_accidents_of_encoding(tmp_path, data):
    assert losses_of(write(tmp_path / "a.txt", data)) == [5.0, 4.0]


@pytest.mark.parametrize("line", [
    "step:20/20 val_loss:3.000000 train_time:2000ms step_avg:100.00",
    "step:20/20 val_loss:3.0000",
    " step:20/20 val_loss:3.000000 train_time:2000ms step_avg:100.00ms",
    "step:20/20 val_loss:3.000000 train_time:2000ms step_avg:100.00ms x",
    "step:20/20 val_loss:{val_loss:.6f} train_time:2000ms step_avg:100.00ms",
    "step:20/20 val_loss:3.0\00000 train_time:2000ms step_avg:100.00ms",
    "step:20/20 val_loss:3.0\r0000 train_time:2000ms step_avg:100.00ms",
    "step:२०/20 val_loss:3.000000 train_time:2000ms step_avg:100.00ms",
    f"step:{'2' * 5000}/20 val_loss:3.000000 train_time:2000ms step_avg:100.00ms",
])
def test_only_full_lines_count(tmp_path, line):
    assert losses_of(write(tmp_path / "a.txt", results([5.0, 4.0], total=20) + line)) == [5.0, 4.0]


def test_older_published_lines(tmp_path):
    lines = "step:0/10 val_loss:10.8258 train_time:0ms step_avg:nanms", "step:10/10 val_loss:3.1000 train_time:5ms step_avg:0.50ms"
    log = write(tmp_path / "a.txt", "\n".join(lines))
    assert losses_of(log) == [10.8258, 3.1]


def test_a_resumed_run_counts_what_it_wrote_last(tmp_path, capsys):
    first, second = results([5.0, 4.0, 3.5, 3.4], total=40), results([5.0, 4.0, 3.0, 2.5, 2.0])
    resumed = second[second.index("step:20/") :]
    log = write(tmp_path / "a.txt", f"{first}resumed from step 10\n{resumed}")
    assert losses_of(log) == [5.0, 4.0, 3.0, 2.5, 2.0]
    _, _, notes = run(capsys, log)
    assert len(notes) == 1 and "goes back to step 20" in notes[0]


def test_a_validation_that_stands_twice_counts_once(tmp_path):
    log = write(tmp_path / "a.txt", results([5.0, 4.0], total=20) + "resumed\n" + train.val_line(10, 20, 4.0, 1003))
    assert losses_of(log) == [5.0, 4.0]


@pytest.mark.parametrize("text,complaint", [
    ("", "no results"),
    ("nothing\n", "no results"),
    (results([5.0, 4.0]) + train.val_line(20, 30, 3.0, 2000), "runs of 10 and 30 steps"),
    (train.val_line(40, 30, 3.0, 2000), "step 40 of 30"),
    (results([5.0, 4.0], total=20) + train.val_line(20, 20, 3.0, 900), "train_time falls between steps 10 and 20"),
])
def test_a_log_without_usable_results_is_one_line(tmp_path, capsys, text, complaint):
    log = write(tmp_path / "a.txt", text)
    status, out, errors = run(capsys, log)
    assert (status, out, len(errors)) == (2, "", 1) and complaint in errors[0] and str(log) in errors[0]


def test_megabytes_are_read_in_well_under_a_second(tmp_path):
    code = "x = 1  # ╳ step:1/2 val_loss\n" * 150_000
    steps = "".join(train.train_line(i, 5960, i * 240) + "\n" for i in range(1, 5960))
    log = write(tmp_path / "a.txt", f"{code}{RULE}\n{ENVIRONMENT}{RULE}\n{steps}".encode() + b"\xff\n")
    start = time.perf_counter()
    assert compare.read_run(log).last.step == 5959
    assert log.stat().st_size > 4e6 and time.perf_counter() - start < 0.5


# -----------------------------------------------------------------------------
# Paths and names


@pytest.mark.parametrize("files,paths,names", [
    (["a.txt"], ["a.txt"], ["a"]),
    (["base/0.txt", "base/1.txt"], ["base"], ["base"]),
    (["base/0.txt", "base/1.txt"], ["base/1.txt", "base/0.txt"], ["base/1", "base/0"]),
    (["logs/add_2/0.txt", "logs/add_15/0.txt", "logs/requirements.txt", "logs/add_2/0.ckpt"], ["logs"], ["add_2", "add_15"]),
    (["x/base/0.txt", "y/base/0.txt"], ["x", "y"], ["x/base", "y/base"]),
    (["x/base/0.txt", "y/base/0.txt", "x/add/0.txt"], ["x/base", "x/base/", "y/base", "x/add"], ["x/base", "y/base", "add"]),
    (["run.txt", "run.log", "run/0.txt"], ["run.txt", "run.log", "run"], ["run.txt", "run.log", "run"]),
    (["v1.2/0.txt"], ["v1.2"], ["v1.2"]),
    (["logs/.hidden/0.txt", "logs/base/.0.txt", "logs/base/1.txt"], ["logs"], ["base"]),
    (["logs/a\nb/0.txt"], ["logs"], ["a?b"]),
])
def test_names(tmp_path, capsys, files, paths, names):
    for i, file in enumerate(files):
        write(tmp_path / file, results([5.0, 4.0 + i / 10]))
    found = as_json(capsys, *(f"{tmp_path}/{path}" for path in paths))
    assert [c["name"] for c in found[None]["configurations"]] == names


@pytest.mark.parametrize("names,asked,baseline", [(["a", "baseline"], [], "baseline"), (["b", "a"], [], "b"), (["b", "a"], ["--baseline", "a"], "a")])
def test_the_baseline(tmp_path, capsys, names, asked, baseline):
    folders = [write_runs(tmp_path / name, [[5.0, 4.0]]) for name in names]
    assert as_json(capsys, *folders, *asked)[None]["baseline"] == baseline


# -----------------------------------------------------------------------------
# Is it better?


def test_the_mean_curve_crosses_where_arithmetic_says(tmp_path, capsys):
    write(tmp_path / "c" / "0.txt", results([9.0, 3.1, 2.9], ms=100))
    write(tmp_path / "c" / "1.txt", results([9.0, 3.0, 2.8], ms=120))
    found = as_json(capsys, tmp_path / "c")["c"]
    assert found["runs"] == 2
    assert found["final_loss_mean"] == pytest.approx(2.85) and found["final_loss_std"] == pytest.approx(0.1 / 2**0.5)
    # From 3.05 at step 10 (1.1 s) to 2.85 at step 20 (2.2 s): 0.65 of the way.
    assert found["steps_to_target"] == pytest.approx(16.5) and found["time_to_target"] == pytest.approx(1.1 + 0.65 * 1.1)
    assert found["step_avg_ms"] == pytest.approx(110)


@pytest.mark.parametrize("losses,step", [
    ([9.0, 2.92, 2.9], 10), ([9.0, 3.0, 2.92], 20), ([2.9, 2.8], 0), ([9.0, 2.0, 9.0, 2.0], 10 * 6.08 / 7),
    ([9.0, 3.0], None), ([9.0, 2.93, 2.920001], None),
])
def test_the_first_crossing(tmp_path, capsys, losses, step):
    assert as_json(capsys, write(tmp_path / "a.txt", results(losses)))["a"]["steps_to_target"] == (step and pytest.approx(step))


def test_runs_that_do_not_cross_are_counted(tmp_path, capsys):
    folder = write_runs(tmp_path / "c", [[9.0, 3.0, 2.9], [9.0, 3.0, 2.88], [9.0, 3.0, 2.93]])
    row = compare.result_row(compare.read_configurations([folder], 2.92)[0][0])
    assert row["missed"] == "1"
    each = [10 + 10 * 0.08 / 0.10, 10 + 10 * 0.08 / 0.12]
    assert row["step, runs"] == f"{np.mean(each):.1f} ± {np.std(each, ddof=1):.1f}"


@pytest.mark.parametrize("target,step", [("2.95", 15.0), ("2.8", None)])
def test_another_target(tmp_path, capsys, target, step):
    found = as_json(capsys, write(tmp_path / "a.txt", results([9.0, 3.0, 2.9])), "--target", target)
    assert found["a"]["steps_to_target"] == (step and pytest.approx(step)) and found[None]["target"] == float(target)


@needs_published
@pytest.mark.parametrize("path,seconds,step", [
    ("record_baseline", "1464.8", "5929.6"),
    ("record_add_1", "1452.7", "5852.7"),
    ("record_add_2", "1438.8", "5776.2"),
    ("baseline/000.txt", "1435.6", "5920.0"),
    ("add_1", "1422.4", "5837.6"),
    ("add_2", "1410.6", "5784.7"),
    ("add_3", "1428.2", "5826.8"),
    ("add_4", "1444.0", "5856.9"),
    ("add_5", "1424.7", "5757.3"),
])
def test_published_figures(capsys, path, seconds, step):
    (entry,) = as_json(capsys, PUBLISHED / path)[None]["configurations"]
    assert (f"{entry['time_to_target']:.1f}", f"{entry['steps_to_target']:.1f}") == (seconds, step)


@pytest.mark.parametrize("second,how,shared,said", [
    ([9.0, 3.5, 3.1, 2.9], {"every": 5, "total": 15}, 2, "runs of 15 and 20 steps"),
    ([9.0, 3.5, 3.0, 2.95, 2.9], {"every": 5}, 3, "different steps"),
])
def test_runs_of_one_name_that_differ_are_compared_on_what_they_share(tmp_path, capsys, second, how, shared, said):
    write(tmp_path / "c" / "0.txt", results([9.0, 3.0, 2.9]))
    write(tmp_path / "c" / "1.txt", results(second, **how))
    (configuration,), notes = compare.read_configurations([tmp_path / "c"], 2.92)
    assert len(configuration.curve.steps) == shared
    assert any(said in note for note in notes) and all("c: " in note for note in notes)


def test_final_losses_of_runs_of_different_length_get_no_test(two, capsys):
    write(two / "better" / "3.txt", results([10.0, 4.0, 3.0, 2.885]))
    found = as_json(capsys, two)["better"]
    assert (found["welch_p"], found["t_test"]["p"], found["t_test"]["n"]) == (None, None, 4)
    assert re.search(r"final loss .*cannot say, better has runs of 30 and 40 steps", run(capsys, two)[1])


FINE, COARSE = results([9.0, 4.0, 3.0, 2.95, 2.9], every=5), results([9.0, 3.1, 2.91])  # share 0, 10 and 20; FINE crosses behind 15


def test_a_crossing_that_a_run_sees_more_of_than_the_mean_curve_is_not_given(tmp_path, capsys):
    write(tmp_path / "c" / "0.txt", FINE)
    write(tmp_path / "c" / "1.txt", COARSE)
    found = as_json(capsys, tmp_path)["c"]
    assert found["steps_to_target"] is None and found["time_to_target"] is None


def test_a_crossing_between_validations_that_no_run_divides_is_given(tmp_path, capsys):
    write(tmp_path / "c" / "0.txt", COARSE)
    start, rest = COARSE.split("\n", 1)
    write(tmp_path / "c" / "1.txt", f"{start}\n{train.val_line(5, 20, 4.0, 500)}\n{rest}")
    assert as_json(capsys, tmp_path)["c"]["steps_to_target"] == pytest.approx(10 + 10 * 0.18 / 0.19)


def test_single_runs_cross_where_their_own_validations_say(tmp_path):
    write(tmp_path / "c" / "0.txt", FINE)
    write(tmp_path / "c" / "1.txt", COARSE)
    (configuration,), _ = compare.read_configurations([tmp_path], 2.92)
    assert [crossing.step for crossing in configuration.run_crossings] == pytest.approx([15 + 5 * 0.03 / 0.05, 10 + 10 * 0.18 / 0.19])


@pytest.mark.parametrize("logs,shared", [
    ([FINE, COARSE], "3 validations that all share, the last at step 20, of up to 5 a run"),
    ([COARSE, results([9.0, 2.91])], "2 validations that all share, the last at step 10, of up to 3 a run"),
])
def test_the_verdict_and_a_note_say_what_a_mean_curve_rests_on(two, capsys, logs, shared):
    for i, log in enumerate(logs):
        write(two / "c" / f"{i}.txt", log)
    _, out, errors = run(capsys, two)
    assert f"  c: its mean curve rests on the {shared}" in out and any(shared in error for error in errors)


def test_a_mean_curve_that_misses_a_crossing_is_not_said_to_stay_above_the_target(two, capsys):
    write(two / "c" / "0.txt", FINE)
    write(two / "c" / "1.txt", COARSE)
    assert "where the mean curve of c reaches 2.92, its runs' shared validations do not tell" in run(capsys, two)[1]


def test_configurations_of_different_length_are_compared_with_a_note(tmp_path, capsys):
    write_runs(tmp_path / "a", [[9.0, 3.0, 2.9]])
    write_runs(tmp_path / "b", [[9.0, 2.9]])
    status, out, errors = run(capsys, tmp_path)
    assert (status, errors) == (0, []) and "num_iterations differ (20 of the baseline; b: 10)" in out


# -----------------------------------------------------------------------------
# Is it real?


def test_welch_equals_scipy_s(two, capsys):
    configurations, _ = compare.read_configurations([two], 2.92)
    baseline, better = configurations
    (comparison,) = compare.compare(configurations, baseline)
    expected = stats.ttest_ind(better.final_losses, baseline.final_losses, equal_var=False)
    assert comparison.loss == pytest.approx((expected.pvalue, *expected.confidence_interval()))
    assert as_json(capsys, two)["better"]["welch_p"] == pytest.approx(expected.pvalue)


def test_welch_by_hand():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([5.0, 7.0, 6.0, 10.0])
    parts = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 4
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)
    difference, error = a.mean() - b.mean(), sum(parts) ** 0.5
    half = stats.t.ppf(0.975, freedom) * error
    p = 2 * stats.t.sf(abs(difference) / error, freedom)
    assert compare.welch(a, b) == pytest.approx((p, difference - half, difference + half))


def test_the_record_rule_by_hand(two, capsys):
    losses = np.array([2.91, 2.912, 2.909])
    found = as_json(capsys, two)["baseline"]["t_test"]
    error = losses.std(ddof=1) / 3**0.5
    t = (losses.mean() - 2.92) / error
    bound = losses.mean() + stats.t.ppf(0.95, 2) * error
    assert found == pytest.approx({"n": 3, "mean": losses.mean(), "std": losses.std(ddof=1), "t": t, "p": stats.t.cdf(t, 2), "upper_bound": bound})
    assert found["p"] == pytest.approx(stats.ttest_1samp(losses, 2.92, alternative="less").pvalue)


@needs_published
def test_published_tests_equal_scipy_s(capsys):
    found = as_json(capsys, PUBLISHED, "--baseline", "record_baseline")
    samples = {name: [losses_of(log)[-1] for log in sorted((PUBLISHED / name).glob("*.txt"))] for name in ("record_baseline", "record_add_2")}
    assert found["record_add_2"]["welch_p"] == pytest.approx(stats.ttest_ind(*samples.values(), equal_var=False).pvalue)
    one_sided = stats.ttest_1samp(samples["record_add_2"], 2.92, alternative="less")
    assert (found["record_add_2"]["t_test"]["t"], found["record_add_2"]["t_test"]["p"]) == pytest.approx((one_sided.statistic, one_sided.pvalue))


def test_one_run_has_no_deviation_and_no_p(tmp_path, capsys):
    write_runs(tmp_path / "baseline", [[9.0, 3.0, 2.9], [9.0, 3.0, 2.91]])
    write_runs(tmp_path / "one", [[9.0, 3.0, 2.8]])
    found = as_json(capsys, tmp_path)["one"]
    assert found["final_loss_std"] is None and found["welch_p"] is None and found["delta_loss"] == pytest.approx(-0.105)
    assert found["t_test"] == {"n": 1, "mean": 2.8, "std": None, "t": None, "p": None, "upper_bound": None}
    _, out, _ = run(capsys, tmp_path)
    assert "One run has no deviation, so there is no test and no interval for one." in out
    assert "cannot say, one has one run" in out and "(p " not in out


def test_runs_that_do_not_differ_have_no_p(tmp_path, capsys):
    for name, loss in (("baseline", 2.9), ("b", 2.8)):
        write_runs(tmp_path / name, [[9.0, 3.0, loss]] * 3)
    found = as_json(capsys, tmp_path)["b"]
    assert found["welch_p"] is None and found["t_test"]["p"] is None and found["final_loss_std"] == 0


def test_a_baseline_whose_runs_do_not_differ_gives_no_p(two, capsys):
    for log in (two / "baseline").iterdir():
        write(log, results([10.0, 4.0, 3.2, 2.95, 2.91]))
    assert as_json(capsys, two)["better"]["welch_p"] is None
    assert run(capsys, two)[1].count("cannot say, the runs of baseline do not differ") == 2


def test_a_library_s_warnings_are_not_printed(two):
    write_runs(two / "名", [[9.0, 3.0, 2.9]])  # which matplotlib's font lacks
    process = subprocess.run([sys.executable, compare.__file__, two, "--plot", two / "a.png"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert (process.stderr, process.returncode) == (b"", 0)


def test_a_copied_log_is_noticed(tmp_path, capsys):
    _, _, errors = run(capsys, write_runs(tmp_path / "c", [[9.0, 2.9], [9.0, 2.8], [9.0, 2.9]]))
    assert len(errors) == 1 and "2.txt" in errors[0] and "copy" in errors[0]


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9]) == [1.0, 1.0]


def test_many_comparisons_are_corrected_and_the_verdict_follows(tmp_path, capsys):
    """A difference that is real alone (p 0.03) is not among four."""
    base = np.array([2.910, 2.912, 2.911, 2.913])
    for name, shift in (("baseline", 0), ("a", -0.0027), ("b", 0.0001), ("c", 0.0002), ("d", -0.0003)):
        write_runs(tmp_path / name, [[9.0, 3.0, loss] for loss in base + shift])
    _, alone, _ = run(capsys, tmp_path / "baseline", tmp_path / "a")
    assert "(1 of loss" in alone and "final loss 0.002700 lower" in alone
    assert re.search(r"final loss .*real at 5%: yes", alone)
    _, together, _ = run(capsys, tmp_path)
    assert "(4 of loss" in together and not re.search(r"final loss .*real at 5%: yes", together)


def test_times_of_parallel_straight_curves_are_the_runs_own(tmp_path):
    losses = [[3.0 + shift, 2.8 + shift] for shift in (0.01, 0.0, -0.03)]
    (configuration,), _ = compare.read_configurations([write_runs(tmp_path / "c", losses)], 2.92)
    assert configuration.times_to_target == pytest.approx([crossing.seconds for crossing in configuration.run_crossings])


def test_the_interval_of_time_counts_runs_that_do_not_cross(tmp_path):
    """Left to the runs that cross, the baseline's time would look better than its mean curve's."""
    late = write_runs(tmp_path / "baseline", [[9.0, 3.0, 2.915], [9.0, 3.0, 2.91], [9.0, 3.0, 2.922]])
    soon = write_runs(tmp_path / "soon", [[9.0, 3.0, 2.88], [9.0, 3.0, 2.87], [9.0, 3.0, 2.875]])
    configurations, _ = compare.read_configurations([late, soon], 2.92)
    (comparison,) = compare.compare(configurations, configurations[0])
    assert len(configurations[0].run_crossings) == 2
    assert (comparison.time.low + comparison.time.high) / 2 == pytest.approx(comparison.delta_time, abs=0.005)


@pytest.mark.parametrize("effect,runs", [(0.5, 64), (0.8, 26), (1.0, 17), (100.0, 2), (1e-6, None)])
def test_runs_needed_are_those_of_the_tables(effect, runs):
    """Cohen's tables for the two-sample t-test (two-sided 5%, power 0.8)."""
    assert compare.runs_needed(effect) == runs


def test_power_is_how_often_a_simulated_test_detects():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (2, 20_000, 6))
    detected = stats.ttest_ind(a, b + 1.5, axis=1).pvalue < 0.05
    assert compare.power(6, 1.5) == pytest.approx(detected.mean(), abs=0.01)
    assert compare.power(6, 0.0) == pytest.approx(0.05)


def test_power_uses_the_pooled_deviation(two, capsys):
    samples = [[2.91, 2.912, 2.909], [2.89, 2.889, 2.8915]]
    pooled = np.mean([np.var(sample, ddof=1) for sample in samples]) ** 0.5
    _, out, _ = run(capsys, two, "--power", "0.002")
    assert f"pooled deviation {pooled:.6f} (4 degrees of freedom): {compare.runs_needed(0.002 / pooled)} runs" in out


# -----------------------------------------------------------------------------
# Does it pay?


def test_break_even_is_the_step_time_that_ties(two, capsys):
    found = as_json(capsys, two)
    baseline, better = found["baseline"], found["better"]
    assert better["break_even_step_ms"] == pytest.approx(1000 * baseline["time_to_target"] / better["steps_to_target"])
    assert better["delta_time"] == pytest.approx(better["time_to_target"] - baseline["time_to_target"])
    assert baseline["break_even_step_ms"] == pytest.approx(100) and better["step_avg_ms"] == pytest.approx(110)
    # A run that takes exactly the break-even step time ties.
    shape = np.array([10.0, 4.0, 3.2, 2.95, 2.91])
    ms = better["break_even_step_ms"]
    write_runs(two / "tie", [shape - 0.02, shape - 0.021, shape - 0.0185], ms=ms)
    assert as_json(capsys, two)["tie"]["delta_time"] == pytest.approx(0, abs=0.001)


@pytest.mark.parametrize("ms,words", [(101, "it pays, up to"), (150, "it learns more a step and would pay below"), (90, "it pays, up to")])
def test_the_verdict_says_whether_it_pays(two, capsys, ms, words):
    for log in (two / "better").iterdir():
        log.unlink()
    shape = np.array([10.0, 4.0, 3.2, 2.95, 2.91])
    write_runs(two / "better", [shape - 0.02, shape - 0.021, shape - 0.0185], ms=ms)
    assert words in run(capsys, two)[1]


@pytest.mark.parametrize("new,ms,words", [
    ([[3.2, 2.93, 2.888], [3.2, 2.93, 2.889], [3.2, 2.93, 2.8885]], 150, "; it does not pay; it learns more a step"),
    ([[3.2, 2.9499, 2.909], [3.2, 2.949, 2.911], [3.2, 2.9499, 2.9102]], 150, "; it does not pay; if real, it learns more a step"),
    ([[3.2, 2.91, 2.916], [3.2, 2.911, 2.917], [3.2, 2.91, 2.9165]], 150, "; it does not pay; if real, it learns more a step"),
    ([[3.2, 2.951, 2.911], [3.2, 2.951, 2.913], [3.2, 2.951, 2.9105]], 150, "; it does not pay; it takes no fewer steps"),
    ([[3.2, 2.951, 2.911]], 150, "; if real, it does not pay; it takes no fewer steps"),
    ([[3.2, 2.93, 2.888]], 150, "; if real, it does not pay; if real, it learns more a step"),
    ([[3.2, 2.93, 2.888]], 100, "; if real, it pays, up to"),
], ids=["both shown", "loss not shown", "loss is higher", "more steps", "more steps of one run", "one run", "one run that pays"])
def test_the_verdict_says_if_real_of_what_is_not_shown(two, capsys, new, ms, words):
    write_runs(two / "new", [[10.0, 4.0, *losses] for losses in new], ms=ms)
    assert words in run(capsys, two / "baseline", two / "new")[1]


def test_the_same_runs_reach_the_target_at_the_same_time(two, capsys):
    (two / "same").symlink_to(two / "baseline")
    assert "reaches 2.92 at the same time (to 0.1 s) as baseline" in run(capsys, two)[1]


def test_the_two_parts_of_the_difference_in_time_add_up(two, capsys):
    _, out, _ = run(capsys, two)
    from_steps, from_step_time = map(float, re.search(r"steps make (\S+) s, \S+ ms a step make (\S+) s", out).groups())
    assert from_steps + from_step_time == pytest.approx(as_json(capsys, two)["better"]["delta_time"], abs=0.11)


# -----------------------------------------------------------------------------
# Runs that have not ended, or went wrong


def test_a_running_run_is_held_against_the_baseline_at_its_step(two, capsys):
    write(two / "new" / "0.txt", results([10.0, 4.5, 3.3], total=40) + train.train_line(27, 40, 2700) + "\nstep:28/40 train_ti")
    status, out, errors = run(capsys, two)
    mean = 3.2 + (0.002 - 0.001) / 3
    line = next(line for line in out.splitlines() if line.startswith("new: 0.txt")).split()
    assert (status, errors) == (0, []) and line[2:5] == ["27", "of", "40"]
    assert line[5:] == ["20", "3.300000", f"{3.3 - mean:+.6f}", f"{np.std([0, 0.002, -0.001], ddof=1):.6f}"]
    assert as_json(capsys, two)["new"]["runs"] == 0


def test_between_validations_of_the_baseline_its_curve_is_interpolated(tmp_path, capsys):
    write_runs(tmp_path / "baseline", [[5.0, 4.0, 3.0]])
    write(tmp_path / "new" / "0.txt", results([5.0, 4.6], every=5, total=20))
    assert "+0.100000" in run(capsys, tmp_path)[1]


def test_a_running_run_is_in_no_number_of_the_tables(two, capsys):
    write(two / "new" / "0.txt", results([10.0, 4.5, 3.3], total=40))
    assert as_json(capsys, two)["new"]["step_avg_ms"] is None


def test_a_running_baseline_is_not_held_against_itself(tmp_path, capsys):
    write(tmp_path / "baseline" / "0.txt", results([10.0, 4.5, 3.3], total=40))
    write(tmp_path / "new" / "0.txt", results([10.0, 4.6], total=40))
    _, out, _ = run(capsys, tmp_path)
    assert "+0.000000" not in out and "+0.100000" in out


def test_a_running_run_is_not_held_against_a_line_past_the_baseline_s_validations(tmp_path, capsys):
    write(tmp_path / "baseline" / "0.txt", FINE)
    write(tmp_path / "baseline" / "1.txt", COARSE)
    write(tmp_path / "new" / "0.txt", results([9.0, 4.5], every=7, total=20))
    assert re.search(r"new: 0.txt .* 4\.500000 +n/a", run(capsys, tmp_path)[1])


def test_a_run_without_its_last_validation_is_no_result(tmp_path, capsys):
    folder = write_runs(tmp_path / "c", [[9.0, 3.0, 2.9]])
    write(folder / "1.txt", results([9.0, 3.0], total=20) + train.train_line(20, 20, 2000))
    assert as_json(capsys, folder)["c"]["runs"] == 1


@pytest.mark.parametrize("losses,total", [([9.0, float("nan"), float("nan")], 20), ([9.0, float("inf")], 20), ([9.0, 3.0, float("nan")], 20)])
def test_a_run_that_diverged_is_said_and_left_out(tmp_path, capsys, losses, total):
    folder = write_runs(tmp_path / "c", [[9.0, 3.0, 2.9]])
    write(folder / "1.txt", results(losses, total=total))
    found = as_json(capsys, folder)["c"]
    status, out, errors = run(capsys, folder)
    assert (found["runs"], found["final_loss_mean"], status) == (1, 2.9, 0)
    assert len(errors) == 1 and "1.txt" in errors[0] and "not finite" in errors[0]
    assert "c: 1.txt" in out


def test_only_runs_that_diverged_make_null_figures(tmp_path, capsys):
    folder = write_runs(tmp_path / "c", [[9.0, float("nan")]] * 2)
    found = as_json(capsys, folder)["c"]
    assert found["runs"] == 0 and found["final_loss_mean"] is None and found["time_to_target"] is None
    assert run(capsys, folder)[0] == 0


# -----------------------------------------------------------------------------
# Other outputs


def test_json_keys(two, capsys):
    found = as_json(capsys, two)
    assert list(found[None]) == ["target", "baseline", "configurations"]
    keys = "name runs final_loss_mean final_loss_std steps_to_target time_to_target step_avg_ms break_even_step_ms t_test"
    assert all(list(c) == [*keys.split(), "delta_loss", "delta_time", "welch_p"] for c in found[None]["configurations"])
    assert [found["baseline"][key] for key in ("delta_loss", "delta_time", "welch_p")] == [None] * 3


def test_csv_holds_every_validation(two, capsys):
    write(two / "new" / "0.txt", results([10.0, float("nan")], total=40))
    _, out, _ = run(capsys, two, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 6 * 5 + 2
    assert list(rows[1]) == "configuration run step num_iterations val_loss train_time_ms step_avg_ms".split()
    assert list(rows[1].values()) == ["baseline", "0.txt", "10", "40", "4.0", "1000", "100.0"]
    assert rows[-1]["val_loss"] == "nan"


def test_markdown_is_a_table(two, capsys):
    write_runs(two / "a|b", [[9.0, 3.0, 2.9]])
    _, out, _ = run(capsys, two, "--markdown")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "2.910333 ± 0.001528" in table[2 + 1]


# -----------------------------------------------------------------------------
# Figures

BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", BEGINNINGS)
@pytest.mark.parametrize("options", [[], ["--x", "time"], ["--from", 15, "--to", 35], ["--from", 32, "--to", 38], ["--x", "time", "--from", 3]])
def test_every_option_makes_a_figure(two, capsys, suffix, options):
    file = two / f"figure.{suffix}"
    status, out, errors = run(capsys, two, "--plot", file, *options)
    assert (status, errors) == (0, []) and out
    assert file.read_bytes().startswith(BEGINNINGS[suffix]) and file.stat().st_size > 5000


@pytest.fixture
def drawn(monkeypatch):
    """What `add_legend` is given: axes, handles, labels."""
    seen = []
    add_legend = compare.add_legend
    monkeypatch.setattr(compare, "add_legend", lambda *arguments: (seen.extend(arguments), add_legend(*arguments)))
    return seen


def test_the_legend_is_ordered_by_final_loss(two, capsys, drawn):
    write_runs(two / "worse", [[9.0, 4.0, 3.5, 3.1, 3.0]])
    write(two / "abandoned" / "0.txt", results([9.0, 4.0], total=40))
    run(capsys, two, "--plot", two / "a.png")
    assert [re.match(r"\w+", text)[0] for text in drawn[2]] == ["better", "baseline", "worse", "abandoned", "target"]


def test_the_axes_fit_what_the_window_shows(two, capsys, drawn):
    run(capsys, two, "--plot", two / "a.png", "--from", 25, "--to", 40)
    axes = drawn[0]
    assert axes.get_xlim() == (25, 40)
    low, high = axes.get_ylim()
    assert 2.85 < low < 2.8885 and 3.077 < high < 3.1  # better's lowest run at step 40, baseline's highest at step 25


@pytest.mark.parametrize("target,low", [("2.92", 30), ("3.16", 20), ("2.5", 10)])
def test_without_a_window_a_figure_begins_where_the_baseline_is_near_the_target(two, capsys, drawn, target, low):
    """And behind step 0 where it never is."""
    run(capsys, two, "--plot", two / "a.png", "--target", target)
    assert drawn[0].get_xlim() == (low, 40)


@pytest.mark.parametrize("paths,band", [(["baseline"], True), (["baseline/0.txt"], False)])
def test_the_legend_explains_a_band_that_is_there(two, capsys, drawn, paths, band):
    run(capsys, *(two / path for path in paths), "--plot", two / "a.png")
    assert ("band" in drawn[0].get_legend().get_title().get_text()) == band


def test_a_target_far_below_the_window_does_not_flatten_it(two, capsys, drawn):
    run(capsys, two, "--plot", two / "a.png", "--from", 10, "--to", 20)
    assert drawn[0].get_ylim()[0] > 3.1


def test_the_curves_are_the_means_and_the_bands_the_runs_extremes(two, capsys, drawn):
    run(capsys, two, "--plot", two / "a.png")
    axes, handles, labels = drawn
    assert handles[1].get_ydata()[-1] == pytest.approx(np.mean([2.91, 2.912, 2.909]))
    ends = [polygon.get_paths()[0].vertices for polygon in axes.collections]
    assert [tuple(np.unique(np.round(v[v[:, 0] == 40][:, 1], 6))[[0, -1]]) for v in ends] == [(2.889, 2.8915), (2.909, 2.912)]


def test_no_two_curves_look_alike():
    styles = [tuple(map(str, compare.style(i).values())) for i in range(len(compare.COLOURS) * len(compare.DASHES) * len(compare.MARKERS))]
    assert len(set(styles)) == len(styles) == 210
    in_grey = {(str(compare.style(i)["linestyle"]), compare.style(i)["marker"]) for i in range(30)}
    assert len(in_grey) == 30


def test_forty_configurations_and_odd_names_make_a_figure(tmp_path, capsys):
    for i in range(40):
        write_runs(tmp_path / (f"_${i}^$" if i % 2 else f"名{i}"), [[9.0, 3.0, 2.9 + i / 1000]])
    status, _, errors = run(capsys, tmp_path, "--plot", tmp_path / "a.png", "--csv")
    assert (status, errors) == (0, [])


@pytest.mark.parametrize("losses", [[9.0], [9.0, 2.9]], ids=["at step 0", "at the end"])
def test_a_single_validation_makes_a_figure(tmp_path, capsys, losses):
    log = write(tmp_path / "a.txt", results(losses, total=10))
    assert run(capsys, log, "--plot", tmp_path / "a.png")[0] == 0


# -----------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("arguments,words", [
    ([], "PATH"),
    (["nowhere"], "nowhere: no such log or folder"),
    (["empty"], "empty: no logs"),
    (["two", "--baseline", "other"], "there are baseline, better"),
    (["two", "--target", "low"], "--target"),
    (["two", "--target", "nan"], "--target"),
    (["two", "--power", "0"], "--power"),
    (["two", "--power", "0.001", "--json"], "--json"),
    (["two", "--json", "--csv"], "not allowed with"),
    (["two", "--plot", "figure.jpg"], ".pdf, .png, .svg"),
    (["two", "--plot", "nowhere/figure.png"], "nowhere/figure.png"),
    (["two", "--plot", "figure.png", "--from", "30", "--to", "20"], "--from must be below --to"),
    (["two", "--plot", "figure.png", "--from", "1000"], "no mean curve is between"),
    (["two", "--x", "time"], "--plot FILE"),
    (["two", "--plot", "figure.png", "--x", "loss"], "--x"),
    (["two", "--unknown"], "--unknown"),
])
def test_mistakes_are_one_line(two, tmp_path_factory, monkeypatch, capsys, arguments, words):
    folder = tmp_path_factory.mktemp("here")
    (folder / "empty").mkdir()
    (folder / "two").symlink_to(two)
    monkeypatch.chdir(folder)
    status, out, errors = run(capsys, *arguments)
    assert (status, out, len(errors)) == (2, "", 1) and words in errors[0]


def test_what_is_wrong_with_one_log_does_not_keep_the_others_from_being_shown(two, capsys):
    write(two / "better" / "3.txt", "")
    (two / "empty").mkdir()
    status, out, errors = run(capsys, two, two / "empty", "--json")
    assert status == 0 and [c["runs"] for c in json.loads(out)["configurations"]] == [3, 3]
    assert len(errors) == 2 and "3.txt: no results" in errors[0] + errors[1] and "empty: no logs" in errors[0] + errors[1]


def test_without_scipy_the_table_comes_and_says_what_to_install(two, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    status, out, _ = run(capsys, two, "--power", "0.001")
    assert status == 0 and "2.910333 ± 0.001528" in out and "pip install -r logs/requirements.txt" in out and "(p " not in out
    assert as_json(capsys, two)["better"]["welch_p"] is None


def test_without_matplotlib_a_figure_says_what_to_install(two, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, errors = run(capsys, two, "--plot", two / "a.png")
    assert (status, out, len(errors)) == (2, "", 1) and "pip install -r logs/requirements.txt" in errors[0]


def test_the_csv_needs_numpy_only(two):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import compare; status = compare.main([sys.argv[2], '--csv'])\n"
    code += "sys.exit(status or bool({'scipy', 'matplotlib', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, ROOT / "logs", two], stdout=subprocess.DEVNULL).returncode == 0


def test_a_reader_that_stops_early_is_no_error(two):
    process = subprocess.Popen([sys.executable, compare.__file__, str(two), "--csv"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
