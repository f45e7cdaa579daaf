"""The queue, with a training program that takes milliseconds (fake_training.py) and, marked slow, with the real one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import fake_training
import pytest
from faults import Ranks
from helpers import ROOT, TRAIN_LINE, VAL_LINE

from configs import launch
from logs import status
from logs.log_file import is_finished

FAKE = [sys.executable, str(ROOT / "tests" / "fake_training.py")]


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Programs inherit what is ignored: SIGINT in a shell's background, SIGHUP under nohup. Queues change signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number in numbers:
        signal.signal(number, before[number])


@pytest.fixture
def folder(tmp_path):
    """With a space in its name, and so in those of configs and logs."""
    (tmp_path / "a folder").mkdir()
    return tmp_path / "a folder"


def write_configs(folder, **configs):
    """Config files with these keys; returns their paths."""
    for name, keys in configs.items():
        (folder / f"{name}.toml").write_text(json.dumps(keys))
    return [folder / f"{name}.toml" for name in configs]


def start(folder, *arguments, **options):
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) | options
    return subprocess.Popen([*FAKE, str(folder), *map(str, arguments)], text=True, **options)


def start_waiting(folder, **options):
    """A queue whose first run waits for a signal, and has begun to; with a second config."""
    process = start(folder, *write_configs(folder, one=dict(how="wait"), two={}), **options)
    wait_for(folder / "waiting", process)
    return process


def finish(process):
    output, errors = process.communicate()
    return SimpleNamespace(status=process.returncode, out=output, err=errors)


@pytest.fixture
def queue(folder, monkeypatch, capfd):
    """Runs a queue in this process, and returns its exit status and what it and its runs printed."""

    def run(*arguments, folder=folder, cwd=ROOT):
        for module, name in ((status, "FOLDER"), (launch, "TORCHRUN")):
            monkeypatch.setattr(module, name, None)  # to be put back after the test
        monkeypatch.chdir(cwd)
        result = fake_training.queue(folder, *map(str, arguments))
        return SimpleNamespace(status=result, **capfd.readouterr()._asdict())

    return run


def wait_for(path, process):
    """Wait until a run has made a file."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def started(folder):
    """What each run that was started noted, in order."""
    path = folder / "started"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def started_logs(folder):
    return ["/".join(run["log"].split("/")[-2:]) for run in started(folder)]


def is_alive(pid):
    """Whether a process runs; one that ended and waits to be looked at does not."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -----------------------------------------------------------------------------
# Order and outcomes


def test_run_0_of_all_configs_comes_before_run_1_of_any(queue, folder):
    result = queue(*write_configs(folder, one={}, two={}), "-n", 2)
    assert result.status == 0 and result.err == ""
    assert started_logs(folder) == ["one/000.txt", "two/000.txt", "one/001.txt", "two/001.txt"]
    assert re.findall(r"run (\d) of 4: .*/(\w+/\d+).txt; projected end", result.out) == [
        ("1", "one/000"), ("2", "two/000"), ("3", "one/001"), ("4", "two/001")]


def test_the_end_is_projected_from_this_queues_runs_or_from_finished_logs(queue, folder):
    configs = write_configs(folder, one={})
    ends = re.compile(r"projected end (unknown|20\d\d-\d\d-\d\d \d\d:\d\d)")
    first, second = ends.findall(queue("-n", 2, *configs).out)
    assert first == "unknown" and second != "unknown"
    assert "unknown" not in ends.findall(queue("-n", 3, *configs).out)


@pytest.mark.parametrize("how, why", [
    ("finish", ""),
    ("diverge", "diverged at step 2: the validation loss is nan"),
    ("fail", "failed: No space left on device"),
    ("refuse", "failed: its checkpoint is damaged"),
    ("kill", "failed: signal SIGKILL"),
])
def test_a_run_that_fails_does_not_stop_the_others_and_the_same_command_starts_only_it_again(queue, folder, how, why):
    """The last line has its reason. What the runs print passes through."""
    configs, failed = write_configs(folder, one=dict(how=how), two={}), why.startswith("failed")
    summary = f"{1 + (not why)} finished, {how == 'diverge':d} diverged, {failed:d} failed"
    first, second = queue(*configs), queue(*configs)
    assert started_logs(folder) == ["one/000.txt", "two/000.txt", *(["one/000.txt"] if failed else [])]
    for result in (first, second):
        assert result.status == failed and summary in result.out
        assert result.err.splitlines()[-1:] == ([f"run.sh: {folder}/logs/one/000.txt: {why}"] if why else [])
    assert "the last line of a run" in first.out and ("a warning\n" in first.err) == (how == "refuse")
    assert failed == ("2 runs finished already; for more raise -n" not in second.out)
    assert failed == ("; the same command does what is left" in first.out)


@pytest.mark.parametrize("edited, why", [
    ('{"value_embeddings": [[3]]}', "its config or the program was edited after the queue began"),
    ("{", "Expecting property name enclosed in double quotes"),
])
def test_a_run_whose_config_was_edited_after_the_queue_began_is_not_started(queue, folder, edited, why):
    """The command that --notify runs after the first run edits it."""
    script = folder / "edit.sh"
    script.write_text(f"echo '{edited}' > '{folder}/one.toml'")
    result = queue(*write_configs(folder, one={}), "-n", 2, "--notify", f"sh '{script}'")
    assert result.status == 1 and started_logs(folder) == ["one/000.txt"]
    assert f"run.sh: {folder}/logs/one/001.txt: failed: {why}" in result.err


def test_the_reason_is_not_that_of_an_earlier_attempt(queue, folder):
    configs = write_configs(folder, one=dict(how="fail"))
    assert "failed: No space left on device" in queue(*configs).err
    write_configs(folder, one=dict(how="refuse"))
    assert "failed: its checkpoint is damaged" in queue(*configs).err


@pytest.mark.parametrize("given, expected", [([None, None], ["4", "300"]), (["3", "60"], ["3", "60"])])
def test_ranks_share_the_cores_and_have_time_for_a_checkpoint(queue, folder, monkeypatch, given, expected):
    names = "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    for name, value in zip(names, given):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    queue(*write_configs(folder, one={}))
    assert [started(folder)[0][name] for name in names] == expected


@pytest.mark.parametrize("arguments, logs", [
    (["-n", "2", "one.toml", "--num_iterations", "7"], ["one/000.txt", "one/001.txt"]),
    (["--num_iterations=7", "--run_id=7", "one.toml"], ["one/007.txt"]),
])
def test_options_are_taken_anywhere_and_configs_from_where_the_user_is(queue, folder, arguments, logs):
    write_configs(folder, one={})
    result = queue(*arguments, cwd=folder)
    assert result.status == 0 and started_logs(folder) == logs, result.err
    assert all("num_iterations = 7\n" in (folder / "logs" / log).read_text() for log in logs)


def test_check_starts_and_fetches_nothing(queue, folder):
    configs = write_configs(folder, one={}, two={})
    result = queue(*configs, "--check")
    assert result.status == 0 and "description of one" in result.out and "description of two" in result.out
    assert "ranks: 2 of 8 CPU cores" in result.out
    write_configs(folder, two=dict(fetch=["-c", f"open('{folder}/shard', 'x')"]))
    result = queue(*configs, "--check")
    assert result.status == 2 and "no shards" in result.err and "description of two" in result.out
    assert sorted(path.name for path in folder.iterdir()) == ["one.toml", "two.toml"]


def test_help_is_the_programs(folder):
    assert finish(start(folder, "-n", 2, "--help")).out == "the keys\n"


# -----------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("arguments, fragment", [
    (["-n", "0"], "-n takes the number of runs, 1 to 999, not '0'"),
    (["-n", "x"], "-n takes the number of runs, 1 to 999, not 'x'"),
    (["-n"], "argument -n: expected one argument"),
    (["-n", "2", "--run_id", "3"], "-n and --run_id exclude each other"),
    (["--run_id", "-1"], "--run_id takes a number from 0 to 999"),
    (["one.toml"], "name it once"),
    (["-n", "2", "--seed", "5"], "one.toml: seed: with one seed all 2 runs would be equal"),
    (["-n", "2", "seeded.toml"], "seeded.toml: seed: with one seed all 2 runs would be equal"),
    (["numbered.toml"], "numbered.toml: run_id: the queue numbers the runs"),
    (["--notify", "no-such-command x"], "--notify: no-such-command: no such command"),
    (["--notify", "'"], "--notify: No closing quotation"),
])
def test_a_mistake_is_one_line_before_the_first_run(queue, folder, arguments, fragment):
    write_configs(folder, one={}, seeded=dict(seed=5), numbered=dict(run_id=3))
    result = queue("one.toml", *arguments, cwd=folder)
    assert result.status == 2 and result.out == ""
    assert len(result.err.splitlines()) == 1 and fragment in result.err
    assert not (folder / "logs").exists()


@pytest.mark.parametrize("changes, fragment", [
    (dict(value_embeddings=[[3]]), "value_embeddings is [[3]], but was [[0, 13]]"),
    (dict(new_key=1), "new_key is 1, but was null"),
    (dict(description="other words", seed=3), None),
])
def test_a_run_is_not_put_beside_finished_runs_of_another_configuration(queue, folder, changes, fragment):
    configs = write_configs(folder, one={})
    queue(*configs)
    write_configs(folder, one=changes)
    for arguments in (["--check"], []):
        result = queue(*configs, "--run_id", "1", *arguments)
        assert result.status == (2 if fragment else 0)
        assert fragment is None or fragment in result.err and f"finished run {folder}/logs/one/000.txt" in result.err
    assert len(started(folder)) == (1 if fragment else 2)


def test_finished_runs_of_another_program_text_are_moved_by_the_command_in_the_error(queue, folder):
    configs = write_configs(folder, one={})
    queue(*configs)
    log = folder / "logs" / "one" / "000.txt"
    log.write_text(log.read_text().replace("training", "something else"))
    errors = queue(*configs).err
    assert len(errors.splitlines()) == 1 and "the program text is not the one in the finished run" in errors
    subprocess.run(errors.rpartition("folder: ")[2], shell=True, check=True)
    assert queue(*configs).status == 0 and len(started(folder)) == 2
    assert [path.name for path in sorted((folder / "logs").iterdir())] == ["one", "one.1"]


@pytest.mark.parametrize("command, expected, fragment", [
    ("open('{folder}/shard', 'x')", 0, ""),
    ("open('{folder}/tried', 'a').write('x')", 2, "no shards; to get them: python -c"),
    ("raise SystemExit(1)", 2, "failed, as the lines above say"),
])
def test_missing_data_is_fetched_once(queue, folder, command, expected, fragment):
    result = queue(*write_configs(folder, one=dict(fetch=["-c", command.replace("{folder}", str(folder))])))
    assert result.status == expected and fragment in result.err and len(result.err.splitlines()) == (expected == 2)
    assert not (folder / "tried").exists() or (folder / "tried").read_text() == "x"


def test_nothing_is_fetched_where_another_config_lacks_what_no_command_gets(queue, folder):
    result = queue(*write_configs(folder, one=dict(fetch=["-c", f"open('{folder}/shard', 'x')"]), two=dict(fetch=[])))
    assert result.status == 2 and "no shards" in result.err and not (folder / "shard").exists()


# -----------------------------------------------------------------------------
# Signals, and what a queue leaves behind


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_for_the_process_group_reaches_the_run_as_one_sigterm(folder, number):
    process = start_waiting(folder)
    os.killpg(process.pid, number)
    result = finish(process)
    assert result.status == 128 + number and (folder / "signals").read_text() == "SIGTERM\n"
    assert started_logs(folder) == ["one/000.txt"]
    assert f"{folder}/logs/one/000.txt: stopped, with a checkpoint" in result.err
    assert f"stopped by {number.name}; the same command does what is left" in result.out


@pytest.mark.parametrize("number, end", [
    (signal.SIGINT, "signal SIGKILL"), (signal.SIGHUP, "stopped, with a checkpoint")])
def test_a_second_ctrl_c_ends_at_once_and_a_second_sighup_does_not(folder, number, end):
    """A terminal that is closed may send it twice."""
    (folder / "keep").touch()  # so that the run does not end by SIGTERM
    process = start_waiting(folder)
    process.send_signal(number)
    wait_for(folder / "signals", process)
    process.send_signal(number)
    if number == signal.SIGHUP:
        (folder / "keep").unlink()
    result = finish(process)
    assert result.status == 128 + number and f"one/000.txt: {end}" in result.err
    assert (folder / "signals").read_text() == "SIGTERM\n" and not is_alive(started(folder)[0]["pid"])


def test_under_nohup_a_closed_terminal_changes_nothing(folder):
    process = start_waiting(folder, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert finish(process).status == 128 + signal.SIGTERM


def test_a_second_queue_is_refused_with_the_process_of_the_first(queue, folder):
    process = start_waiting(folder)
    second = queue(folder / "one.toml")
    assert second.status == 2 and len(second.err.splitlines()) == 1 and second.out == ""
    assert f"a queue runs on this machine already, process {process.pid}" in second.err
    process.terminate()
    finish(process)
    assert len(started(folder)) == 1


def test_the_next_queue_waits_until_the_run_of_a_killed_one_has_stopped(folder):
    (folder / "keep").touch()
    process = start_waiting(folder)
    process.kill()
    process.wait()
    following = start(folder, *write_configs(folder, one={}))
    assert "waiting until" in following.stdout.readline()
    assert len(started(folder)) == 1 and (folder / "signals").read_text() == "SIGTERM\n"
    (folder / "keep").unlink()
    assert finish(following).status == 0 and len(started(folder)) == 2


def test_a_queue_goes_on_when_nobody_reads_its_output_or_the_disk_is_full(folder):
    """Then its state cannot be written either."""
    reader, writer = os.pipe()
    os.close(reader)
    configs = write_configs(folder, one=dict(how="refuse"), two={})
    with open(writer, "w") as nobody, open("/dev/full", "w") as full:
        assert start(folder, *configs, stdout=nobody, stderr=nobody).wait() == 1 and len(started(folder)) == 2
        assert start(folder, *configs, "-n", 2, stdout=full, stderr=full).wait() == 1 and len(started(folder)) == 5


def test_where_the_state_cannot_be_written_the_error_is_one_line(queue, folder):
    (folder / "a file").touch()
    result = queue(*write_configs(folder, one={}), folder=folder / "a file")
    assert result.status == 2 and len(result.err.splitlines()) == 1 and "make it writable" in result.err


def test_notify_gets_the_line_of_each_run_and_of_the_end(queue, folder):
    script, lines = folder / "notify.sh", folder / "lines"
    script.write_text(f'echo "$1|$2" >> "{lines}"; echo noise; echo noise >&2; exit 1')
    result = queue(*write_configs(folder, one={}, two=dict(how="fail")), "--notify", f"sh '{script}' 'a word'")
    assert lines.read_text().splitlines() == [
        f"a word|run 1 of 2: {folder}/logs/one/000.txt: finished, "
        "step:4/4 val_loss:2.919300 train_time:8000ms step_avg:2000.00ms",
        f"a word|run 2 of 2: {folder}/logs/two/000.txt: failed: No space left on device",
        "a word|1 finished, 0 diverged, 1 failed; the same command does what is left",
    ]
    assert "noise" not in result.out + result.err


# -----------------------------------------------------------------------------
# The real program


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.campaign)])
def test_a_killed_queue_ends_with_the_log_of_an_undisturbed_run(small_config, tmp_path, kills):
    """At a random step, every second time politely; and the same command again."""
    config = small_config(num_iterations=24 * kills, val_loss_every=12, val_seq_len=128, val_tokens=128,
                          sequences_per_step=1, checkpoint_every=2)
    log, rng = tmp_path / "logs" / "small" / "000.txt", random.Random(0)

    def start_real():
        environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
        return subprocess.Popen([ROOT / "run.sh", config], cwd=ROOT, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    for kill in range(kills):
        process, line = start_real(), f"step:{24 * kill + rng.randrange(2, 12)}/{24 * kills} train_time"
        while not log.exists() or line not in log.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal((signal.SIGKILL, signal.SIGTERM)[kill % 2])
        finish(process)
    last = finish(start_real())
    assert last.status == 0, last.err
    undisturbed = Ranks(tmp_path / "output", config, "--run_id", 0, "--log_dir", tmp_path / "undisturbed")
    assert undisturbed.statuses() == [0] and is_finished(log)
    losses, expected = ([match.group(1, 3) for match in VAL_LINE.finditer(path.read_text())]
                        for path in (log, tmp_path / "undisturbed" / "small" / "000.txt"))
    assert losses == expected and "resumed at step" in log.read_text()
    assert [int(match[1]) for match in TRAIN_LINE.finditer(log.read_text())] == list(range(1, 24 * kills + 1))
    assert [path.name for path in log.parent.iterdir()] == ["000.txt"]
