"""logs/plot.py: the forest and the curves."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_results import result_lines, write, write_runs

from logs import compare, plot
from logs.run_log import train_line

BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
SHAPE = np.array([10.0, 4.0, 3.2, 2.95, 2.91])


@pytest.fixture
def three(tmp_path):
    write_runs(tmp_path / "baseline", [SHAPE, SHAPE + 0.002, SHAPE - 0.001])
    write_runs(tmp_path / "better", [SHAPE - 0.02, SHAPE - 0.021, SHAPE - 0.0185], ms=90)
    write_runs(tmp_path / "worse", [SHAPE + 0.02, SHAPE + 0.021])
    write_runs(tmp_path / "same", [SHAPE + 0.001])
    return tmp_path


def draw(*arguments):
    assert compare.main([str(argument) for argument in arguments]) == 0


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that are saved."""
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.extend(figure.axes))
    return seen


@pytest.mark.parametrize("suffix", BEGINNINGS)
@pytest.mark.parametrize("options", [["--forest"], ["--x", "time", "--forest"], ["--plot"], ["--x", "time", "--plot"]])
def test_every_kind_makes_a_file(three, suffix, options):
    file = three / f"figure.{suffix}"
    draw(three, *options, file)
    assert file.read_bytes().startswith(BEGINNINGS[suffix]) and file.stat().st_size > 5000


@pytest.mark.parametrize("options", [[], ["--x", "time"]])
def test_the_forest_has_a_row_for_each_sorted_and_coloured_by_verdict(three, drawn, options):
    draw(three, "--forest", three / "a.png", *options)
    (axes,) = drawn
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "better (3 runs)", "baseline (3 runs)", "same (1 run)", "worse (2 runs)"]
    ticks = [line for line in axes.get_lines() if line.get_marker() == "|"]
    assert [len(line.get_xdata()) for line in ticks] == [3, 3, 1, 2]
    names = {colour: name for name, (colour, _) in plot.VERDICTS.items()} | {"#000000": "baseline"}
    assert [names[to_hex(line.get_color()).upper()] for line in ticks] == ["better", "baseline", "not shown", "worse"]


def test_the_forest_s_target_is_dashed_where_it_lies(three, drawn):
    draw(three, "--forest", three / "a.png")
    (line,) = (line for line in drawn[0].get_lines() if line.get_linestyle() == "--")
    assert line.get_xdata()[0] == pytest.approx(2.92 - (2.91 + 0.001 / 3))


def test_names_stand_in_the_order_of_the_curves_ends(three, drawn):
    write(three / "abandoned" / "0.txt", result_lines([9.0, 4.0], total=40) + train_line(11, 40, 1100))
    draw(three, "--plot", three / "a.png", "--from", 25)
    labels = [text for text in drawn[0].texts if text.get_text() in ("better", "baseline", "same", "worse")]
    order = sorted(labels, key=lambda text: text.xyann[1])
    assert [text.get_text() for text in order] == ["better", "baseline", "same", "worse"]
    heights = [text.xyann[1] for text in order]
    assert min(np.diff(heights)) > 0.04 * np.ptp(drawn[0].get_ylim())


def test_each_crossing_has_a_mark_and_its_value(three, drawn):
    draw(three, "--plot", three / "a.png")
    values = {text.get_text() for text in drawn[0].texts}
    assert {"32.5", "37.6"} <= values and "target 2.92" in values  # better's; baseline's, 10 * 0.0303 / 0.04 behind 30


@pytest.mark.parametrize("low,high,bottom,top", [(25, 40, 2.85, 3.12), (32, 38, 2.85, 2.98)])
def test_the_axes_fit_what_the_window_shows(three, drawn, low, high, bottom, top):
    """Also where it lies between two validations."""
    draw(three, "--plot", three / "a.png", "--from", low, "--to", high)
    assert drawn[0].get_xlim() == (low, high)
    assert bottom < drawn[0].get_ylim()[0] and drawn[0].get_ylim()[1] < top


def test_a_target_far_below_does_not_flatten_the_curves(three, drawn):
    draw(three, "--plot", three / "a.png", "--from", 25, "--target", 2.5)
    assert drawn[0].get_ylim()[0] > 2.85


def test_without_a_window_curves_begin_where_the_baseline_is_near_the_target(three, drawn):
    draw(three, "--plot", three / "a.png")
    assert drawn[0].get_xlim() == (30, 40)


def test_the_band_is_the_interval_of_the_mean(three, drawn):
    draw(three / "worse", "--plot", three / "a.png")
    (band,) = drawn[0].collections
    ends = band.get_paths()[0].vertices
    assert np.ptp(ends[ends[:, 0] == 40][:, 1]) == pytest.approx(2 * 12.7062 * 0.0005, rel=1e-4)


@pytest.mark.parametrize("losses", [[9.0], [9.0, 2.9]], ids=["at step 0", "at the end"])
def test_a_single_validation_is_drawn(tmp_path, drawn, losses):
    log = write(tmp_path / "a.txt", result_lines(losses, total=10))
    draw(log, "--plot", tmp_path / "a.png", "--from", 10 * (len(losses) - 1))
    assert any(len(line.get_xdata()) == 1 and line.get_marker() == "." for line in drawn[0].get_lines())


def test_more_than_eight_curves_are_refused_and_a_forest_shows_them(tmp_path, capsys):
    for i in range(9):
        write_runs(tmp_path / f"_${i}^$", [[9.0, 3.0, 2.9 + i / 1000], [9.0, 3.0, 2.901 + i / 1000]])
    assert compare.main([str(tmp_path), "--plot", str(tmp_path / "a.png")]) == 2
    assert "--forest" in capsys.readouterr().err
    draw(tmp_path, "--forest", tmp_path / "a.png")  # and takes odd names as they are


def test_a_forest_without_a_finished_baseline_is_refused(tmp_path, capsys):
    write(tmp_path / "baseline" / "0.txt", result_lines([9.0, 4.0], total=40))
    assert compare.main([str(tmp_path), "--forest", str(tmp_path / "a.png")]) == 2
    assert "baseline has no final loss" in capsys.readouterr().err
