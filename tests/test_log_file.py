"""logs/log_file.py: the place of a run's log, its header, and whether the run is finished."""

from pathlib import Path

import pytest

from logs.log_file import RULE, is_finished, last_line, log_path, read_header

PEAK = "peak memory allocated: 1 MiB reserved: 2 MiB\n"
DIVERGED = "diverged at step 250: the validation loss is nan\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "000.txt"


@pytest.mark.parametrize("scale, expected", [
    ("", "logs/add_2/007.txt"), ("tiny", "logs/tiny/add_2/007.txt"), ("my/own.toml", "logs/own/add_2/007.txt")])
def test_the_place_of_a_log(scale, expected):
    assert log_path("logs", scale, Path("somewhere/add_2.toml"), 7) == Path(expected)


@pytest.mark.parametrize("text, complaint", [
    ("", "has no configuration"),
    ("step:0/4 val_loss:1.0\n", "has no configuration"),
    (f"code\n{RULE}\nRunning Python 3.11\n{RULE}\n", "has no configuration"),
    (f"code\n{RULE}\nseed = \x00\n{RULE}\n", "is damaged"),
])
def test_a_log_without_a_configuration_is_named(path, text, complaint):
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: its header {complaint}; move the log away"):
        read_header(path)


@pytest.mark.parametrize("end, finished", [
    (PEAK, True),
    ("peak memory resident: 1 MiB\n", True),
    (PEAK + "ended: 2026-11-24 18:30:01 on host: finished\n", True),
    (DIVERGED, True),
    (PEAK + "ended: 2026-11", True),  # killed while it wrote the last line
    (PEAK[:-1], False),  # torn: it was still being written
    (DIVERGED[:-20], False),
    ("  " + PEAK, False),
    ("ended: 2026-11-24 18:30:01 on host: stopped by signal 15\n", False),
])
def test_a_run_is_finished_when_a_complete_last_line_says_so(path, end, finished):
    """What the program text says about such lines, far above, does not count."""
    path.write_text(PEAK + DIVERGED + 400 * "the text of the program\n" + end)
    assert is_finished(path) == finished


def test_a_log_that_does_not_exist_is_not_finished(path):
    assert not is_finished(path) and last_line(path, "step:") == ""


def test_the_last_complete_line_of_a_kind(path):
    path.write_bytes(b"step:1/4\nstep:2/4 \xff\nended: why\nstep:3/4")
    assert [last_line(path, kind) for kind in ("step:", "ended: ", "peak")] == ["step:2/4 \ufffd", "ended: why", ""]
