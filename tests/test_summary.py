"""logs/summary.py: the estimate before a run and the lines at its end."""

import pytest

from logs import summary
from logs.log_format import format_step_line


@pytest.mark.parametrize("steps, every, validations", [
    (range(600), 300, 3), (range(600), 0, 1), (range(601, 1201), 1200, 2), (range(601, 1201), 300, 3)])
def test_an_estimate_counts_steps_and_validations(steps, every, validations):
    assert summary.estimate(steps, every, 0.2, 20) == (f"estimate: at least {2 + validations / 3:.0f} min, for 600 "
                                                       f"steps of 200 ms and {validations} validations of 20.0 s")


@pytest.mark.parametrize("losses, bars", [([2, 1], "█▁"), ([3], "▁"), ([2, 2], "▁▁"), ([8, 4, 1], "█▄▁")])
def test_a_sparkline_has_a_bar_per_loss(losses, bars):
    assert summary.sparkline(losses) == bars


def write_log(path, *losses, total=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(format_step_line(10 * i, total, 9, loss) + "\n" for i, loss in enumerate(losses)))
    return path


@pytest.mark.parametrize("scale, total, known", [
    ("", 20, ["known: mine ended at 3.5000 in 2 published runs"]), ("", 30, []), ("tiny", 20, []),
    ("/my/tiny.toml", 20, [])])
def test_the_end_shows_the_curve_the_known_loss_and_the_next_command(tmp_path, monkeypatch, scale, total, known):
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    for i, loss in enumerate((3, 4)):
        write_log(tmp_path / f"logs/published/mine/{i:03d}.txt", 9, 5, loss)
    log = write_log(tmp_path / "logs/mine/000.txt", 9, 5, 4, 3.0)
    others = tmp_path / "logs" if scale else "logs/published"
    assert summary.describe_end(log, scale, total).splitlines() == [
        "validations after step 0: █▅▁ from 5.0000 to 3.0000", *known,
        f"compare: ./run.sh compare {log.parent} {others}"]


def test_a_removed_log_and_an_unreadable_published_one_do_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    (tmp_path / "logs/published/mine/000.txt").mkdir(parents=True)
    text = summary.describe_end(tmp_path / "logs/mine/000.txt", "", 20)
    assert text == f"compare: ./run.sh compare {tmp_path}/logs/mine logs/published"


def test_no_parser_of_speedrun_logs_reads_these_lines(tmp_path):
    log = write_log(tmp_path / "a/0.txt", 9, 5)
    text = f"{summary.estimate(range(1), 1, 1, 1)}\n{summary.describe_end(log, '', 10)}"
    assert "val_loss:" not in text and "step:" not in text and "step_avg" not in text
