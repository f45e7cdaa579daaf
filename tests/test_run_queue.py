"""configs/run_queue.py, in a checkout whose training program takes milliseconds (fake_training.py)."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "tests" / "fake_training.py"
SAVED = "with a checkpoint"
RERUN = "; rerun the command to resume or start the remaining runs"
STATUS = " (./run.sh status says why)"
GPUS = "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"
MAKE_SHARD = ["-c", "open('shard', 'x')"]


def alike(*values):
    """One of many alike, for the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout with a space in its name. Its `torch` holds only a launcher, so the queue cannot import PyTorch."""
    for variable in GPUS:
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "a folder"
    sources = [*ROOT.glob("*/*.py"), *ROOT.glob("*/__pycache__/*.pyc")]
    files = {path.relative_to(ROOT): path for path in sources if path.parts[-2] != "tests"}
    files |= {"torch/__init__.py": os.devnull, "torch/distributed/__init__.py": os.devnull}
    for name, source in (files | {"torch/distributed/run.py": FAKE, "train_gpt_medium.py": FAKE}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, folder / name)  # its time too, so that the compiled module is used
    return folder


def write_configs(folder, **configs):
    for name, keys in configs.items():
        (folder / f"{name}.toml").write_text(json.dumps(keys))
    return [folder / f"{name}.toml" for name in configs]


def start(folder, *arguments, ignored=(), options=(), **configs):
    """Start a queue of new configs with signals as in a terminal; a shell's background or nohup would ignore some."""
    def set_signals():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    options = dict(cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) | dict(options)
    words = [*write_configs(folder, **configs), *map(str, arguments)]
    return subprocess.Popen([sys.executable, folder / "configs" / "run_queue.py", *words], text=True,
                            preexec_fn=set_signals, **options)


def start_waiting(folder, **options):
    """Start a queue whose first run waits for a signal, and has begun to; with a second config."""
    process = start(folder, one=dict(how="wait"), two={}, **options)
    wait_for(folder / "waiting", process)
    return process


def finish(process):
    output, errors = process.communicate(timeout=60)
    return SimpleNamespace(status=process.returncode, out=output, err=errors)


def run(folder, *arguments, **configs):
    return finish(start(folder, *arguments, **configs))


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def started(folder, key="log"):
    """Return what each run that was started noted, in order."""
    path = folder / "started"
    return [json.loads(line).get(key) for line in path.read_text().splitlines()] if path.exists() else []


def test_run_0_of_all_configs_comes_before_run_1_of_any_and_the_end_is_projected(folder):
    """The projection uses this queue's runs, or finished logs."""
    result, line = run(folder, "-n", 2, one={}, two={}), r"run (\d) of \d: .*(\w{3}/\d+.txt); projected end (un|20)"
    assert result.status == 0 and result.err == "" and "run.sh: 4 finished, 0 diverged, 0 failed\n" in result.out
    assert started(folder) == ["one/000.txt", "two/000.txt", "one/001.txt", "two/001.txt"]
    assert re.findall(line, result.out) == list(zip("1234", started(folder), ["un", "20", "20", "20"]))
    assert [found[2] for found in re.findall(line, run(folder, "-n", 3, one={}, two={}).out)] == ["20", "20"]


@pytest.mark.parametrize("how, why", [
    ("diverge", "diverged at step 2: the validation loss is nan"),
    ("fail", "failed: No space left on device"),
    alike("refuse", "failed: its checkpoint is damaged"),
    alike("kill", "failed: killed by SIGKILL"),
    alike("orphan", "failed: killed by SIGKILL"),  # a rank whose own process lives on
    alike("remove", "failed: its log was removed"),
])
def test_a_failed_run_does_not_stop_the_others_and_only_it_is_rerun(folder, how, why):
    """One line has its reason, without torchrun's report. The runs' output passes through."""
    failed, began = why.startswith("failed"), time.time()
    first, second = (run(folder, one=dict(how=how), two={}) for _ in range(2))
    assert started(folder) == ["one/000.txt", "two/000.txt", *(["one/000.txt"] if failed else [])]
    for result, runs in ((first, 2), (second, failed)):
        counts = f"1 finished, {how == 'diverge':d} diverged, {failed:d} failed"
        assert f"run.sh: {counts}{STATUS}{RERUN * failed}\n" in result.out and result.status == failed
        assert result.err.splitlines() == ["a warning"] * (how == "refuse") + [
            f"run.sh: run 1 of {runs:d}: logs/one/000.txt: {why}"] * bool(runs)
    assert "the last line of a run" in first.out
    assert failed == ("2 runs already finished; for more raise -n" not in second.out)
    assert time.time() - began < 45  # the process that lives on would take 60


@pytest.mark.parametrize("file, text, is_refused", [
    ("one.toml", '{"num_iterations": 3}', True), alike("one.toml", None, True),
    alike("data/shards.py", "X = 1", True),
    ("train_gpt_medium.py", f"# a comment\n{FAKE.read_text()}", False),
])
def test_a_run_whose_config_or_code_was_edited_after_the_queue_started_is_not_started(folder, file, text, is_refused):
    """The command that --notify runs after the first run edits or removes a file. A comment changes nothing."""
    script, new = folder / "edit.sh", folder / "new"
    new.write_text(text or "")
    script.write_text(f"cp '{new}' '{folder / file}'" if text else f"rm '{folder / file}'")
    result = run(folder, "-n", 2, "--notify", f"sh '{script}'", one={})
    assert result.status == is_refused and started(folder) == ["one/000.txt", "one/001.txt"][:2 - is_refused]
    why = "failed: its config or the program was edited after the queue started; start the queue again"
    assert result.err == f"run.sh: run 2 of 2: logs/one/001.txt: {why}\n" * is_refused


def test_the_reason_is_not_that_of_an_earlier_attempt(folder):
    (folder / "logs/one").mkdir()
    (folder / "logs/one/000.txt").write_text("ended: then and there: No space left on device\n")
    assert "failed: its checkpoint is damaged" in run(folder, one=dict(how="refuse")).err


@pytest.mark.parametrize("kind, given, threads", [
    ("CPU cores", "", "4"), alike("CPU cores", "3", "3"), alike("GPUs", "", "")])
def test_ranks_share_the_cores_and_have_time_for_a_checkpoint(folder, monkeypatch, kind, given, threads):
    """The queue sets torchrun's options, but not the threads that the user gives."""
    monkeypatch.setenv("KIND", kind)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert f"2 of 8 {kind}" in run(folder, one={}).out and started(folder, "OMP_NUM_THREADS") == [threads or None]
    assert started(folder, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT") == ["300"]
    assert started(folder, "launcher") == [["--standalone", "--nnodes=1", "--max-restarts=0", "--local-addr=127.0.0.1",
                                            "--signals-to-handle=SIGINT,SIGHUP", "--nproc_per_node=2"]]


def test_options_are_taken_anywhere_and_configs_from_where_the_user_is(folder):
    (folder / "elsewhere").mkdir()
    write_configs(folder / "elsewhere", one={})
    words = "--num_iterations=7", "--run_id=7", "one.toml", "--val_tokens", "1"
    result = run(folder, *words, options=dict(cwd=folder / "elsewhere"))
    assert result.status == 0 and started(folder) == ["one/007.txt"], result.err
    assert started(folder, "options") == [["--num_iterations=7", "--val_tokens=1", "--run_id=7"]]


@pytest.mark.parametrize("kind, words, options", [
    ("GPUs", [], []),
    alike("CPU cores", ["--scale", "small"], ["--scale=small"]),
    ("CPU cores", ["--val_tokens", "1"], ["--val_tokens=1", "--scale=tiny"]),  # too few for the published size
])
def test_without_a_config_it_is_the_baseline_and_on_a_cpu_at_scale_tiny(folder, monkeypatch, kind, words, options):
    monkeypatch.setenv("KIND", kind) if kind == "GPUs" else None
    write_configs(folder / "configs", baseline=dict(is_large="--scale" not in words))
    result = run(folder, *words)
    assert started(folder, "options")[0] == [*options, "--run_id=0"] and started(folder) == ["baseline/000.txt"]
    assert "run.sh: using configs/baseline.toml" in result.out.splitlines()[0]
    assert ("--scale=tiny on CPU cores" in result.out) == ("--scale=tiny" in options)


def test_check_starts_and_fetches_nothing(folder, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = sorted(folder.rglob("*"))
    result = run(folder, "--check", one=dict(description="why"), two={})
    assert result.status == 0 and "one.toml: why\nmap of one\nlogs: logs/one\nranks: 2 of 8 CPU cores" in result.out
    assert "map of two" in result.out and "2 configs checked, with the data" in result.out
    result = run(folder, "--check", one=dict(is_large=True))
    assert result.status == 0 and re.search("logs: logs/one\n.*one.toml: too large for a CPU\n", result.out)
    result = run(folder, "--check", one={}, two=dict(fetch=MAKE_SHARD))
    assert result.status == 2 and "map of two" in result.out
    assert "two.toml: no shards" in result.err
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "one.toml", folder / "two.toml"])


@pytest.mark.parametrize("arguments, fragment", [
    (["-n", "0"], "-n or --run_id is out of range; use -n 1 to 999 (runs), or"),
    alike(["-n", "1000"], "-n or --run_id is out of range; use -n 1 to 999 (runs), or"),
    alike(["-n", "x"], "argument -n: invalid int value: 'x'"), alike(["-n"], "argument -n: expected one argument"),
    (["-n", "2", "--run_id", "3"], "argument --run_id: not allowed with argument -n"),
    (["--run_id", "-1"], "--run_id 0 to 999 (one run)"),
    (["one.toml"], "one.toml: another config logs to logs/one too; rename one, or list the config only once"),
    alike(["-n", "2", "--seed", "5"], "one.toml: seed: all 2 runs would be equal"),
    (["-n", "2", "seeded.toml"], "seeded.toml: seed: all 2 runs would be equal"),
    (["numbered.toml"], "numbered.toml: run_id: the queue numbers the runs"),
    (["--notify", "no-such-command x"], "no-such-command: no such option or command; see --help, or quote COMMAND"),
    alike(["--notify", "sh", "-s", "done"], "-s: no such option or command; see --help, or quote COMMAND"),
    alike(["--notify", "'"], "--notify: No closing quotation"), alike(["--json"], "--json: no such option or command"),
    (["wrong.toml"], "train_gpt_medium.py: wrong.toml: a mistake"), (["large.toml"], "large.toml: too large for a CPU"),
    (["--smoke", "--check"], "--check trains nothing; omit it, or omit --smoke"),
    (["--smoke", "-n", "2"], "argument -n: not allowed with argument --smoke"),
])
def test_a_mistake_is_one_line_before_the_first_run(folder, arguments, fragment):
    write_configs(folder, seeded=dict(seed=5), numbered=dict(run_id=3), wrong=dict(how="mistake"),
                  large=dict(is_large=True))
    result = run(folder, *arguments, one={})
    assert result.status == 2 and result.out == "" and started(folder) == []
    assert len(result.err.splitlines()) == 1 and fragment in result.err


def test_a_ctrl_c_that_ends_the_check_ends_the_queue(folder):
    """A smoke test checks amid its runs, when the queue collects signals."""
    result = run(folder, one=dict(how="ctrl-c"))
    assert (result.status, result.err) == (130, "")


@pytest.mark.parametrize("command, other, last_line, made", [
    (MAKE_SHARD[1], {}, "", "shard"),
    alike("open('tried', 'a').write('x')", {}, ".*one.toml: no shards", "tried x"),
    ("raise SystemExit(1)", {}, ".*failed; see the lines above", ""),
    alike("open('crash', 'x')", {}, "run.sh: train_gpt_medium.py --check failed \\(1\\); see the lines above", "crash"),
    (MAKE_SHARD[1], dict(two=dict(fetch=[])), ".*two.toml: no shards", ""),  # another lacks what no command gets
])
def test_missing_data_is_fetched_once_unless_other_data_cannot_be(folder, command, other, last_line, made):
    result = run(folder, one=dict(fetch=["-c", command]), **other)
    assert result.status == (2 if last_line else 0) and len(started(folder)) == (not last_line)
    assert re.fullmatch(last_line, (result.err.splitlines() or [""])[-1])
    paths = [folder / name for name in ("shard", "tried", "crash") if (folder / name).exists()]
    assert " ".join(f"{path.name} {path.read_text()}".strip() for path in paths) == made


@pytest.mark.parametrize("ignored, sent, end", [
    alike([], [signal.SIGINT], SAVED), ([], [signal.SIGTERM], SAVED), alike([], [signal.SIGHUP], SAVED),
    ([], [signal.SIGINT, signal.SIGINT], "at once"),
    alike([], [signal.SIGHUP, signal.SIGHUP], SAVED),  # a terminal that is closed may send it twice
    alike([signal.SIGHUP], [signal.SIGHUP, signal.SIGTERM], SAVED),  # under nohup a closed terminal changes nothing
])
def test_a_signal_for_all_processes_reaches_the_run_once_and_a_second_ctrl_c_ends_at_once(folder, ignored, sent, end):
    (folder / "keep").touch()  # so that the run does not end by the first signal
    process = start_waiting(folder, ignored=ignored)
    os.killpg(started(folder, "pid")[0], signal.SIGTERM)  # Slurm sends it to torchrun too
    for number in sent:
        os.killpg(process.pid, number)
        if number not in ignored:
            wait_for(folder / "signals", process)
    if end == SAVED:
        (folder / "keep").unlink()
    result, name = finish(process), sent[-1].name
    assert result.status == 128 + sent[-1] and f"stopped by {name} in logs/one/000.txt, {end}{RERUN}\n" in result.out
    assert result.err == f"run.sh: {name}: stopping after this step or validation; Ctrl-C stops it now\n"
    assert (folder / "signals").read_text() == ("SIGINT\n" if name == "SIGINT" else "SIGHUP\n")
    assert started(folder) == ["one/000.txt"] and not os.path.exists(f"/proc/{started(folder, 'pid')[0]}")


def test_a_second_queue_is_refused_with_the_process_of_the_first_unless_it_cannot_be_known(folder):
    """Process 1 of another container is not ours. Meanwhile, --check and --help work."""
    process, (path,) = start_waiting(folder), folder.glob("logs/.queue.*.json")
    state = json.loads(path.read_text())
    (boot, namespace, ticks), since = state["identity"], state["started"]
    assert state == dict(pid=process.pid, run=1, runs=2, log=f"{folder}/logs/one/000.txt", mean_s=0,
                         identity=[boot, namespace, ticks], started=since, gpus=[[""], [""]])
    for identity, who, fix in (([boot, namespace, ticks], "", f": kill {process.pid}"),
                               ([boot, "pid:[1]", ticks], " of another container or boot", " there")):
        path.write_text(json.dumps(state | dict(identity=identity)))
        second = run(folder, "one.toml")
        assert (second.status, second.out, second.err) == (
            2, "", f"run.sh: process {process.pid}{who} is already running a queue on {os.uname().nodename}, since "
            f"{since}; wait until it ends (./run.sh status), or stop it{fix}\n")
    assert run(folder, "one.toml", "--check").status == 0 and run(folder, "--help").out == "the keys\n"
    process.terminate()
    finish(process)
    assert len(started(folder)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("first, second, name", [
    ([None, "0,1"], [None, "2"], None), ([None, "0,1"], [None, "1,2"], ".gpu0,1"), ([None, "1"], [None, None], ".gpu1"),
    (["3", "0"], ["4", "0"], None), (["3,4", "3"], ["3,4", "4"], None), (["3", None], ["3", "3"], ".gpu3"),
])
def test_queues_run_side_by_side_on_different_gpus(folder, first, second, name):
    """The queues' GPUS, and the first's name if they overlap."""
    first, second = ({n: v for n, v in zip(GPUS, numbers) if v} for numbers in (first, second))
    process = start_waiting(folder, options=dict(env=os.environ | first))
    result = finish(start(folder, "two.toml", options=dict(env=os.environ | second)))
    process.terminate()
    finish(process)
    assert result.status == (0 if name is None else 2) and len(started(folder)) == 1 + (name is None)
    assert result.err == "" if name is None else f"a queue on {os.uname().nodename}{name}, since" in result.err


@pytest.mark.slow
def test_the_next_queue_waits_until_the_run_of_a_killed_one_has_stopped(folder):
    (folder / "keep").touch()
    process = start_waiting(folder)
    process.kill()
    process.wait()
    following = start(folder, one={})
    assert "waiting for" in following.stdout.readline()
    assert len(started(folder)) == 1 and (folder / "signals").read_text() == "SIGHUP\n"
    (folder / "keep").unlink()
    assert finish(following).status == 0 and len(started(folder)) == 2


def test_a_queue_continues_when_nobody_reads_its_output_or_the_disk_is_full(folder):
    """Then its state cannot be written either."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody, open("/dev/full", "w") as full:
        for n, output, expected in ((1, nobody, 2), (2, full, 5)):
            options = dict(stdout=output, stderr=output)
            assert start(folder, "-n", n, options=options, one=dict(how="refuse"), two={}).wait() == 1
            assert len(started(folder)) == expected


def test_where_the_state_cannot_be_written_the_error_is_one_line(folder):
    (folder / f"logs/.queue.{os.uname().nodename}.json").mkdir()
    result = run(folder, one={})
    assert result.status == 2 and len(result.err.splitlines()) == 1 and "make its file writable" in result.err


def test_a_queue_that_could_not_write_its_state_is_named(folder):
    path = folder / f"logs/.queue.{os.uname().nodename}.json"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run(folder, one={})
    assert (result.status, result.err) == (
        2, f"run.sh: another queue holds {path} and could not write to it; wait until that queue ends\n")


def test_notify_gets_the_line_of_each_run_and_of_the_end(folder):
    """It runs in the folder where the user is."""
    (folder / "elsewhere").mkdir()
    script, lines = folder / "elsewhere/notify.sh", folder / "lines"
    script.write_text(f'echo "$1|$2" >> "{lines}"; echo noise; echo noise >&2; exit 1')
    result = run(folder, "--notify", "sh notify.sh 'a word'", options=dict(cwd=script.parent), one={},
                 two=dict(how="fail"))
    assert lines.read_text().splitlines() == [
        "a word|run 1 of 2: logs/one/000.txt: finished, "
        "step:4/4 val_loss:2.919300 train_time:8000ms step_avg:2000.00ms",
        "a word|run 2 of 2: logs/two/000.txt: failed: No space left on device",
        f"a word|1 finished, 0 diverged, 1 failed{STATUS}{RERUN}"]
    assert "noise" not in result.out + result.err
