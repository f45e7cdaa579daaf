"""logs/summary.py: the estimate before a run and the lines at its end, to the letter.

No parser of speedrun logs reads these lines as results.
"""

import pytest

from logs import summary
from logs.log_format import format_step_line
from logs.run_log import is_finished


@pytest.mark.parametrize("steps, every, validations", [
    (range(600), 300, 3), (range(600), 0, 1), (range(601, 1201), 1200, 2), (range(601, 1201), 300, 3)])
def test_an_estimate_counts_steps_and_validations(steps, every, validations):
    assert summary.estimate(steps, every, 0.2, 20) == (f"estimate: at least {2 + validations / 3:.0f} min, for 600 "
                                                       f"steps of 200 ms and {validations} validations of 20.0 s")


@pytest.mark.parametrize("scale, total, losses, known, curve", [
    ("", 20, (9, 5, 4, 3.0), "\nknown: mine ended at 3.5000 in 2 published runs", "█▅▁ from 5.0000 to 3.0000"),
    ("", 30, (9, 5, 5), "", "▁▁ from 5.0000 to 5.0000"),
    ("/my/tiny.toml", 20, (9, 5), "", "▁ from 5.0000 to 5.0000"),
    ("", 30, (9, *(2000 * [5]), 4), "", f"{'█' * 76}▁ from 5.0000 to 4.0000")])
def test_the_end_shows_the_curve_the_known_loss_and_the_next_command(
        tmp_path, monkeypatch, scale, total, losses, known, curve):
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    log, others = tmp_path / "logs/mine/000.txt", tmp_path / "logs" if scale else "logs/published"
    published = [tmp_path / f"logs/published/mine/{i:03d}.txt" for i in (3, 4)]
    for path, values in [(log, losses), (published[0], (9, 5, 3)), (published[1], (9, 5, 4))]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(format_step_line(10 * i, 20, 9, loss) + "\n" for i, loss in enumerate(values)))
    end = summary.describe_end(log, scale, total)
    assert end == f"validations after step 0: {curve}{known}\ncompare: ./run.sh compare {log.parent} {others}"
    log.write_text(f"peak memory resident: 1 MiB\n{end}\nended: here and now: finished\n")
    assert is_finished(log)


def test_a_removed_log_and_an_unreadable_published_one_do_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    (tmp_path / "logs/published/mine/000.txt").mkdir(parents=True)
    text = summary.describe_end(tmp_path / "logs/mine/000.txt", "", 20)
    assert text == f"compare: ./run.sh compare {tmp_path}/logs/mine logs/published"
