"""logs/summary.py: the estimate before a run and the lines at its end, to the letter.

No parser of speedrun logs reads these lines as results.
"""

import pytest

from logs import summary
from logs.log_format import format_header, format_step_line
from logs.run_log import is_finished


@pytest.mark.parametrize("steps, every, validations", [
    (range(600), 300, 3), (range(600), 0, 1), (range(601, 1201), 1200, 2), (range(601, 1201), 300, 3)])
def test_an_estimate_counts_steps_and_validations(steps, every, validations):
    assert summary.estimate(steps, every, 0.2, 20) == (f"estimate: at least {2 + validations / 3:.0f} min, for 600 "
                                                       f"steps of 200 ms and {validations} validations of 20.0 s")


TWO_KNOWN = "\nknown: mine ended at 3.5000 in 2 published runs"


@pytest.mark.parametrize("scale, total, losses, data, known, curve", [
    ("", 20, (9, 5, 4, 3.0), None, TWO_KNOWN, "█▅▁ from 5.0000 to 3.0000"),
    ("", 20, (9, 5), "ours", TWO_KNOWN, "▁ from 5.0000 to 5.0000"),
    ("", 20, (9, 5), "others", "", "▁ from 5.0000 to 5.0000"),  # the published runs validated on other data
    ("", 30, (9, 5, 5), None, "", "▁▁ from 5.0000 to 5.0000"),
    ("/my/tiny.toml", 20, (9, 5), None, TWO_KNOWN, "▁ from 5.0000 to 5.0000"),  # any of a scale's studies
    ("/my/small.toml", 20, (9, 5), None, "", "▁ from 5.0000 to 5.0000"),
    ("", 30, (9, *(2000 * [5]), 4), None, "", f"{'█' * 76}▁ from 5.0000 to 4.0000")])
def test_the_end_shows_the_curve_the_known_loss_and_the_next_command(
        tmp_path, monkeypatch, scale, total, losses, data, known, curve):
    """The known loss is that of published runs on the same validation data, as far as their logs say."""
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    log, others = tmp_path / "logs/mine/000.txt", tmp_path / "logs" if scale else "logs/published"
    published = [tmp_path / f"logs/published/{'tiny_maps' * (scale != '')}/mine/{i:03d}.txt" for i in (3, 4)]
    for path, values in [(log, losses), (published[0], (9, 5, 3)), (published[1], (9, 5, 4))]:
        path.parent.mkdir(parents=True, exist_ok=True)
        header = format_header("", {"val_data": data if path == log else "ours"}, "Running Python") if data else ""
        lines = [format_step_line(10 * i, 20, 9, loss) for i, loss in enumerate(values)]
        path.write_text("\n".join([header, *lines, ""]))
    end = summary.describe_end(log, scale, total)
    assert end == f"validations after step 0: {curve}{known}\ncompare: ./run.sh compare {log.parent} {others}"
    log.write_text(f"peak memory resident: 1 MiB\n{end}\nended: here and now: finished\n")
    assert is_finished(log)


def test_a_removed_log_and_an_unreadable_published_one_do_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    (tmp_path / "logs/published/mine/000.txt").mkdir(parents=True)
    text = summary.describe_end(tmp_path / "logs/mine/000.txt", "", 20)
    assert text == f"compare: ./run.sh compare {tmp_path}/logs/mine logs/published"
