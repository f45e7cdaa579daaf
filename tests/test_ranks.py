"""logs/ranks.py: agreeing, signals and the end of a run, as one rank sees them; of several, test_faults.py."""

import os
import signal

import pytest
import torch.distributed as dist

from logs import ranks
from logs.run_log import RunLog

pytestmark = pytest.mark.usefixtures("process_group")


class Ended(BaseException):
    """os._exit was called."""


@pytest.fixture(autouse=True)
def no_exit(monkeypatch):
    def exit_(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", exit_)


def fail(error):
    raise error


@pytest.mark.parametrize("error, line", [
    (ValueError("two\nlines  and spaces"), "two lines and spaces"),
    (OSError(13, "Permission denied", "/a/\udce9.bin"), "[Errno 13] Permission denied: '/a/\\udce9.bin'"),
])
def test_a_mistake_is_one_line_and_exit_status_2(capsys, error, line):
    with pytest.raises(SystemExit) as ended:
        ranks.together(fail, error)
    assert (ended.value.code, capsys.readouterr().err) == (2, f"train_gpt_medium.py: {line}\n")


# -----------------------------------------------------------------------------
# Signals


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path / "000.txt")


@pytest.fixture
def stop(log):
    """A flag whose signals are handled in this process only while a test runs."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield ranks.StopFlag(log)
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_known_to_all_a_step_after_it_was_sent_and_a_second_ends_the_run(stop, log, number):
    assert stop.agreed() == 0
    signal.raise_signal(number)
    assert [stop.agreed(), stop.agreed()] == [0, number]
    with pytest.raises(Ended, match=str(128 + number)):
        signal.raise_signal(number)
    assert log.path.read_text().endswith(f": ended at once by signal {number:d}\n")


def test_a_second_signal_ends_a_run_also_when_the_first_came_amid_a_line_of_the_log(stop, log, monkeypatch):
    """Python refuses to write to a file that it is writing to."""
    monkeypatch.setattr(log, "end", lambda why: fail(RuntimeError("reentrant call")))
    stop.agreed()
    with pytest.raises(Ended, match="130"):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored(stop, log):
    """As nohup has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ranks.StopFlag(log)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# -----------------------------------------------------------------------------
# The end of a run


@pytest.mark.parametrize("error, status, why", [
    (ranks.Diverged("diverged at step 4: it is nan"), 1, "diverged at step 4: it is nan"),
    (ranks.Stopped(15, "with a checkpoint"), 143, "stopped by signal 15, with a checkpoint"),
    (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
    (ValueError("s.bin: ends before token 5"), 1, "s.bin: ends before token 5"),
])
def test_what_ends_a_run_early_is_one_line_and_the_logs_last(log, capsys, error, status, why):
    with pytest.raises(Ended, match=str(status)):
        ranks.run_and_report(log, fail, error)
    lines = log.path.read_text().splitlines()
    assert lines[-1].endswith(f": {why}") and lines[-1].startswith("ended: ")
    assert lines[:-1] == [why] * isinstance(error, ranks.Diverged)
    assert capsys.readouterr().err == f"train_gpt_medium.py: {log.path}: {why}\n"


def test_a_mistake_of_ours_has_its_traceback(log, capsys):
    with pytest.raises(Ended, match="1"):
        ranks.run_and_report(log, fail, RuntimeError("CUDA out of memory"))
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.endswith(f"train_gpt_medium.py: {log.path}: RuntimeError: CUDA out of memory\n")


@pytest.mark.parametrize("error, line", [(ranks.Diverged("at step 4"), ""), (ValueError("why"), "rank 1: why\n")])
def test_what_all_ranks_know_is_said_by_the_first_only(capsys, monkeypatch, error, line):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(Ended, match="1"):
        ranks.run_and_report(RunLog(None), fail, error)
    assert capsys.readouterr().err == (f"train_gpt_medium.py: {line}" if line else "")
