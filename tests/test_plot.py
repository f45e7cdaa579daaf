"""logs/plot.py: the forest and the curves."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_results import result_lines, write, write_runs

from logs import compare, plot

SHAPE = np.array([10.0, 4.0, 3.2, 2.95, 2.91])


@pytest.fixture
def three(tmp_path):
    write_runs(tmp_path / "baseline", [SHAPE, SHAPE + 0.002, SHAPE - 0.001])
    write_runs(tmp_path / "better", [SHAPE - 0.02, SHAPE - 0.021, SHAPE - 0.0185], ms=90)
    write_runs(tmp_path / "worse", [SHAPE + 0.02, SHAPE + 0.021])
    write_runs(tmp_path / "same", [SHAPE + 0.001])
    return tmp_path


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a figure, which is not saved; returns its axes."""
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.extend(figure.axes))

    def draw(path, kind, *options):
        assert compare.main([str(word) for word in (path, kind, tmp_path / "a.png", *options)]) == 0
        return seen.pop()

    return draw


@pytest.mark.parametrize("options, suffix, beginning", [
    (["--forest"], "png", b"\x89PNG"), (["--x", "time", "--forest"], "pdf", b"%PDF"), (["--plot"], "svg", b"<?xml"),
    (["--x", "time", "--plot"], "png", b"\x89PNG")])
def test_every_kind_makes_a_file(three, options, suffix, beginning):
    file = three / f"figure.{suffix}"
    assert compare.main([str(three), *options, str(file)]) == 0
    assert file.read_bytes().startswith(beginning) and file.stat().st_size > 5000


@pytest.mark.parametrize("options", [[], ["--x", "time"]])
def test_the_forest_has_a_row_for_each_sorted_and_coloured_by_verdict(three, draw, options):
    axes = draw(three, "--forest", *options)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "better (3 runs)", "baseline (3 runs)", "same (1 run)", "worse (2 runs)"]
    ticks = [line for line in axes.get_lines() if line.get_marker() == "|"]
    assert [len(line.get_xdata()) for line in ticks] == [3, 3, 1, 2]
    names = {colour: name for name, (colour, _) in plot.VERDICTS.items()} | {"#000000": "baseline"}
    assert [names[to_hex(line.get_color()).upper()] for line in ticks] == ["better", "baseline", "not shown", "worse"]


def test_the_forest_s_target_is_dashed_where_it_lies(three, draw):
    (line,) = (line for line in draw(three, "--forest").get_lines() if line.get_linestyle() == "--")
    assert line.get_xdata()[0] == pytest.approx(2.92 - (2.91 + 0.001 / 3))


def test_names_stand_apart_in_the_order_of_the_curves_ends(three, draw):
    write(three / "abandoned" / "0.txt", result_lines([9.0, 4.0], total=40))
    axes = draw(three, "--plot", "--from", 25)
    heights = {text.get_text(): text.xyann[1] for text in axes.texts if hasattr(text, "xyann")}
    assert sorted(heights, key=heights.get) == ["better", "baseline", "same", "worse"]
    assert min(np.diff(sorted(heights.values()))) > 0.04 * np.ptp(axes.get_ylim())


def test_curves_begin_where_the_baseline_is_near_the_target_and_each_crossing_has_its_value(three, draw):
    axes = draw(three, "--plot")
    values = {text.get_text() for text in axes.texts}
    assert {"32.5", "37.6", "target 2.92"} <= values  # better's; baseline's, 10 * 0.0303 / 0.04 behind 30
    assert axes.get_xlim() == (30, 40)


@pytest.mark.parametrize("low, high, target, bottom, top", [
    (25, 40, 2.92, 2.85, 3.12), (32, 38, 2.92, 2.85, 2.98), (25, 40, 2.5, 2.85, 3.12)])
def test_the_axes_fit_what_the_window_shows(three, draw, low, high, target, bottom, top):
    """Also where it lies between two validations; a target far below does not flatten the curves."""
    axes = draw(three, "--plot", "--from", low, "--to", high, "--target", target)
    assert axes.get_xlim() == (low, high)
    assert bottom < axes.get_ylim()[0] and axes.get_ylim()[1] < top


def test_the_band_is_the_interval_of_the_mean(three, draw):
    (band,) = draw(three / "worse", "--plot").collections
    ends = band.get_paths()[0].vertices
    assert np.ptp(ends[ends[:, 0] == 40][:, 1]) == pytest.approx(2 * 12.7062 * 0.0005, rel=1e-4)


@pytest.mark.parametrize("losses", [[9.0], [9.0, 2.9]], ids=["at step 0", "at the end"])
def test_a_single_validation_is_drawn(tmp_path, draw, losses):
    log = write(tmp_path / "a.txt", result_lines(losses, total=10))
    lines = draw(log, "--plot", "--from", 10 * (len(losses) - 1)).get_lines()
    assert any(len(line.get_xdata()) == 1 and line.get_marker() == "." for line in lines)


def test_more_than_eight_curves_are_refused_and_a_forest_takes_them_with_odd_names(tmp_path, capsys):
    for i in range(9):
        write_runs(tmp_path / f"_${i}^$", [[9.0, 3.0, 2.9 + i / 1000], [9.0, 3.0, 2.901 + i / 1000]])
    assert compare.main([str(tmp_path), "--plot", "a.png"]) == 2 and "--forest" in capsys.readouterr().err
    assert compare.main([str(tmp_path), "--forest", str(tmp_path / "a.png")]) == 0


def test_a_forest_without_a_finished_baseline_is_refused(tmp_path, capsys):
    write(tmp_path / "baseline" / "0.txt", result_lines([9.0, 4.0], total=40))
    assert compare.main([str(tmp_path), "--forest", "a.png"]) == 2
    assert "baseline has no final loss" in capsys.readouterr().err
