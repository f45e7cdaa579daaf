"""Test faults: however a run is interrupted, rerunning it gives the losses of an undisturbed run."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from random import Random
from unittest import mock

import pytest
import torch
from faults import Ranks, RunsCode, get_free_port
from helpers import ROOT, TRAIN_LINE, VAL_LINE

import train_gpt_medium as train
from logs import run_log, status
from logs.run_log import checkpoint_path, is_finished, last_line

RUN = ["--run_id", 0, "--checkpoint_every", 2]
STOPPED = "stopped by {.name}, with a checkpoint; rerun with its run_id to resume"
FULL = "[Errno 27] File too large"  # a limit on files' sizes stands for a full disk
KILL, TERM, INT, HUP = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.fixture
def config(small_config):
    return small_config(num_iterations=6, val_loss_every=3, val_seq_len=128, val_tokens=256, sequences_per_step=2)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "logs" / "small" / "000.txt"


@pytest.fixture
def run(tmp_path):
    """Start a run's ranks, wait for them, and end the remaining ones after the test."""
    runs = []

    def run(*arguments, **options):
        runs.append(Ranks(tmp_path / f"output{len(runs)}", *arguments, **options))
        runs[-1].statuses()
        return runs[-1]

    yield run
    for of_run in runs:
        of_run.kill()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Return the results of a run that nothing disturbed, which is run once for each config, ranks and fault."""
    found = {}

    def undisturbed(config, ranks=1, fault=""):
        key = re.sub("log_dir.*", "", config.read_text()), ranks, fault
        if key not in found:
            folder = tmp_path_factory.mktemp("logs")
            arguments = config, "--run_id", 0, "--log_dir", folder / "logs"
            Ranks(folder / "output", *arguments, ranks=ranks, fault=fault).statuses()
            found[key] = results(folder / "logs/small/000.txt")
        return found[key]

    return undisturbed


def results(log):
    """Return the validation losses, which every run of a seed must have to the last digit. Each line is there once."""
    text = log.read_text()
    assert is_finished(log) and last_line(log, "ended: ").endswith(": finished")
    assert [int(match[1]) for match in TRAIN_LINE.finditer(text)] == [1, 2, 3, 4, 5, 6]
    losses = [(int(match[1]), match[3]) for match in VAL_LINE.finditer(text)]
    assert [step for step, _ in losses] == [0, 3, 6]
    return losses


def checkpointed_step(path):
    return torch.load(path, weights_only=True)["step"] if path.exists() else None


def resumed_at(log):
    return [int(step) for step in re.findall(r"^resumed at step (\d+) after", log.read_text(), re.MULTILINE)]


def wait_until(condition):
    end = time.monotonic() + 300  # for a test that fails
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def torchrun(*arguments, fault=""):
    """Start a launcher, with a fault in its ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1"}, **options)


# ---------------------------------------- Interrupted runs resume ----------------------------------------


@pytest.fixture
def attempt(run, log):
    """Run with a fault. Check the ranks' exit statuses, the line that says why, and the step of the checkpoint."""

    def attempt(config, fault, statuses, why, step, options=()):
        of_run = run(config, *RUN, *options, ranks=len(statuses), fault=fault)
        assert of_run.statuses() == statuses and checkpointed_step(checkpoint_path(log)) == step
        errors = of_run.output("stderr").splitlines()
        if set(statuses) == {0}:
            assert errors == [] and why in log.read_text()
        elif why:
            line = f"train_gpt_medium.py: {log}: {why}"
            is_said_once = why.startswith(("stopped", "diverged")) or len(statuses) == 1  # else other ranks fail later
            assert errors == [line] if is_said_once else line in errors
            assert last_line(log, "ended: ").endswith(f": {why}") or why == FULL
        assert "with a checkpoint" not in why or int(TRAIN_LINE.findall(log.read_text())[-1][0]) == step
        return of_run

    return attempt


# Options; attempts with a fault: the fault, the ranks' exit statuses, why they end, the checkpoint's step; the steps at
# which the run resumed; the files that are left. Some faults leave a run that finishes.
INTERRUPTIONS = {
    "a rank is killed, then all": ([], [  # the rank that is left ends by itself
        ("at_step(3, on_last(send(signal.SIGKILL)))", [1, -KILL], "", 2),
        ("at_step(5, lambda: [train.distributed.gather(None), time.sleep(0.5), send(signal.SIGKILL)()])",
         [-KILL, -KILL], "", 4)], [2, 4], ["000.txt"]),
    "killed while a checkpoint is written, the one before stays": ([], [(
        'is_new = lambda fd: os.readlink(f"/proc/self/fd/{fd}").endswith(".unfinished"); '
        'at_step(3, lambda: before(os, "fsync", send(signal.SIGKILL), is_new))', [-KILL], "", 2)], [2], ["000.txt"]),
    "without checkpoints a run starts over and keeps its log": (["--checkpoint_every", 0], [
        ("at_step(1, send(signal.SIGTERM))", [128 + TERM], "stopped by SIGTERM, without a checkpoint", None)],
        [], ["000.txt", "000.txt.interrupted"]),
    "a signal for one rank stops all at one step, the second time the last": (["--checkpoint_every", 1000], [
        ("at_step(1, on_last(send(signal.SIGINT, times=2)))", [128 + INT] * 2, STOPPED.format(INT), 3),
        ("at_step(4, on_last(lambda: [send(signal.SIGTERM)(), time.sleep(3.1), send(signal.SIGTERM)()]))",  # by Slurm
         [128 + TERM] * 2, STOPPED.format(TERM), 6)], [3, 6], ["000.txt"]),
    "a signal waits for a checkpoint, and in the last validation the run finishes": ([], [
        ("before(checkpoint, 'write', send(15), lambda path, state: state['step'] == 2)", [128 + TERM],
         STOPPED.format(TERM), 4),
        ("before(train.Trainer, 'validate', send(15), lambda trainer, step: step == 6)", [0], "", None)],
        [4], ["000.txt"]),
    "no space for a checkpoint does not end a run": ([], [  # it has 27 MB, the log 0.1
        ("limit_files(10**6)", [0], f"no checkpoint at step 6: LOG.resume.ckpt: {FULL}; any earlier checkpoint stays",
         None)], [], ["000.txt"]),
    "no space for the log ends all ranks": ([], [
        ("at_step(2, lambda: limit_files(os.path.getsize('LOG.txt')))", [1, 1], FULL, 2)], [2], ["000.txt"]),
    "no space for the final weights": (["--save_checkpoint", "true"], [
        ("before(checkpoint, 'write', lambda: limit_files(10**6), lambda path, content: 'resume' not in path.name)",
         [1], f"LOG.ckpt: {FULL}", 6)], [6], ["000.ckpt", "000.txt"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_a_rerun_ends_as_if_nothing_had_happened(attempt, run, small_config, config, undisturbed, log, name):
    """After a kill with every kind of state: gates, every kind of source, fewer matrices than ranks, mantissas."""
    (options, attempts, resumed, files), prefix = INTERRUPTIONS[name], ""
    if name == "a rank is killed, then all":
        prefix = "use_bf16(); skip_newton_schulz()"
        sources = '[0, 13], [0, 13, 15], {layers = [3], source = "bigram"}, {layers = [2], source = "embedding"}'
        config.write_text(f"{config.read_text()}\nvalue_embeddings = [{sources}]\nvalue_embedding_gate = true")
    for fault, statuses, why, step in attempts:
        fault, why = (text.replace("LOG", str(log.with_suffix(""))) for text in (fault, why))
        attempt(config, f"{prefix}; {fault}".lstrip("; "), statuses, why, step, options)
        assert is_finished(log) == (statuses == [0])
    if not is_finished(log):
        attempt(config, prefix, [0] * len(statuses), "", None, options)
    assert results(log) == undisturbed(config, len(statuses), prefix) and resumed_at(log) == resumed
    assert sorted(path.name for path in log.parent.iterdir()) == files
    assert checkpointed_step(log.with_name("000.ckpt")) in (6, None)


@pytest.mark.campaign
def test_a_rank_is_killed_at_random_moments(run, config, undisturbed, log):
    """In the start, in training, in validation, while a checkpoint is written (every step one)."""
    rng, resumed, options = Random(0), set(), ["--run_id", 0, "--checkpoint_every", 1]
    for _ in range(20):  # SIGPROF ends a process like SIGKILL, here after so many seconds of its CPU
        run(config, *options, fault=f"signal.setitimer(signal.ITIMER_PROF, {rng.uniform(0, 1.5)})")
        resumed |= set(resumed_at(log)) if log.exists() else set()
    assert run(config, *options).statuses()[0] in (0, 2)  # 2: it was finished
    assert results(log) == undisturbed(config) and resumed


@pytest.mark.slow
def test_torchrun_brings_a_run_back_until_it_is_killed_itself(run, config, undisturbed, log, tmp_path):
    """A rank dies, later the launcher. The ranks then end because their parent has: one hangs and could not notice."""
    (tmp_path / "ranks").mkdir()
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", "tests/faults.py", config, *RUN]
    launcher = torchrun(*options, fault=f"""
open({str(tmp_path / "ranks")!r} + f"/{{os.getpid()}}", "w")
is_restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
at_step(3, lambda: rank() == 1 and not is_restarted and send(signal.SIGKILL)())
at_step(4, lambda: rank() == 1 and is_restarted and [os.kill(os.getppid(), signal.SIGKILL), hang()])
""")
    _, errors = launcher.communicate()
    assert launcher.returncode == -KILL, errors
    pids = [int(path.name) for path in (tmp_path / "ranks").iterdir()]
    assert len(pids) == 4
    wait_until(lambda: all(len(status.identify(pid)) == 2 for pid in pids))  # no start time: each has ended
    assert resumed_at(log) == [2] and "step:4/6 train_time" in log.read_text()
    run(config, *RUN, ranks=2)
    assert results(log) == undisturbed(config, 2)


@pytest.mark.slow
def test_two_nodes(config, undisturbed, log):
    """Two torchruns that meet: nothing assumes that all ranks are on one node."""
    address = f"localhost:{get_free_port()}"
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={address}"]
    nodes = [torchrun(*meeting, "train_gpt_medium.py", config, "--seed", 0) for _ in range(2)]
    outputs = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert results(log) == undisturbed(config, 2) and sum("val_loss" in output for output, _ in outputs) == 1


# ---------------------------------------- Early ends ----------------------------------------


@pytest.mark.slow
def test_a_rank_whose_launcher_died_before_it_began_does_not_wait(run, config):
    """The launcher's store does not answer; the process group would wait for it."""
    of_run = run(config, environment=dict(TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True",
                                          MASTER_ADDR="localhost", MASTER_PORT="1"))
    assert of_run.statuses() == [1] and "ConnectionRefusedError" in of_run.output("stderr")


CLOSED = "[os.dup2(ours, n) for n in (1, 2)]; at_step(1, lambda: [close(), send(signal.SIGHUP)()])"
# A fault; the ranks' exit statuses, the end of the log, the checkpoint's step, and what standard error contains.
EARLY_ENDS = {
    "a second signal": ("at_step(1, lambda: [send(signal.SIGINT)(), time.sleep(3.1), send(signal.SIGINT)()])",
                        [128 + INT], "ended at once by SIGINT", None, ""),
    "a signal before the first step": (
        "before(train.Trainer, 'warm_up', send(signal.SIGTERM))", [128 + TERM], "ended at once by SIGTERM", None, ""),
    "a signal when nobody reads the output": (  # as when `| tee` ends before the run on Ctrl-C
        f"other, ours = os.pipe(); os.close(other); close = lambda: None; {CLOSED}", [129], STOPPED.format(HUP), 3, ""),
    "a signal when the terminal is closed": (  # the progress bar cannot be drawn any more
        f"other, ours = os.openpty(); close = lambda: os.close(other); {CLOSED}", [129], STOPPED.format(HUP), 3, ""),
    "one rank hangs": (  # it holds the interpreter, and the other rank waits for it
        "at_step(3, on_last(hang))", [1, 1], "", 2, r'Timeout \(0:00:10\)!.*faults.py", line \d+ in hang\n'),
    "one rank fails": (  # the other does not wait for it until the timeout
        "before(checkpoint, 'write', lambda: rank() or exec('raise MemoryError(0)'))", [1, 1], "MemoryError: 0", None,
        r"Traceback .*\ntrain_gpt_medium.py: \S+/000.txt: MemoryError: 0\n.*train_gpt_medium.py: rank 1: \w+: "),
    "a state of one rank is infinite": (
        "spoil(3, lambda trainer: next(iter(trainer.optimizers[1].state.values()))['momentum_buffer'], "
        "rank() and math.inf)", [1, 1], "diverged at step 4: a weight or an optimizer state is not finite", 2, ""),
    "the loss is nan": ("spoil(2, lambda trainer: trainer.model.lm_head_w.data, math.nan)", [1],
                        "diverged at step 3: the validation loss is nan", 2, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EARLY_ENDS)
def test_an_early_end_takes_all_ranks_along_and_leaves_its_reason(attempt, config, log, name):
    """A run that diverges is finished, and the checkpoint before stays."""
    fault, statuses, end, step, errors = EARLY_ENDS[name]
    diverged = end if end.startswith("diverged") else ""
    of_run = attempt(config, fault, statuses, diverged, step, ["--step_timeout", 10 if "hang" in fault else 600])
    assert re.search(errors, of_run.output("stderr"), re.DOTALL) and is_finished(log) == (diverged != "")
    assert end == "" or last_line(log, "ended: ").endswith(f": {end}")


# ---------------------------------------- Runs that cannot start or resume: one line, nothing changes ----------------


@pytest.fixture
def start(config, run_main, capfd):
    """Return the exit status and the standard error of the run, started again under options."""
    return lambda *options: (run_main(config, *RUN, *options), capfd.readouterr().err)


@pytest.fixture
def killed(config, run_main, tmp_path_factory, tmp_path):
    """Put the log and checkpoint that a run has in its last step, and that a kill would leave, into their place."""
    folder, train_step = tmp_path_factory.getbasetemp() / "killed", train.Trainer.train_step  # one run for all tests

    def copy_logs(trainer, step, *batch):
        if step == 5:
            shutil.copytree(folder / "logs", folder / "copy")
        return train_step(trainer, step, *batch)

    if not folder.exists():
        with mock.patch.object(train.Trainer, "train_step", copy_logs), \
                mock.patch.object(train, "newton_schulz", lambda u: u / (u.norm() + 1e-7)):
            assert run_main(config, *RUN, "--log_dir", folder / "logs") == 0
    shutil.copytree(folder / "copy", tmp_path / "logs")


def refused(result, *fragments):
    return result[0] == 2 and result[1].count("\n") == 1 and all(fragment in result[1] for fragment in fragments)


@pytest.mark.slow
def test_what_does_not_change_results_may_change_and_a_finished_run_is_refused(killed, start, log):
    options = ["--description", "other words", "--save_checkpoint", "true", "--checkpoint_every", 7]
    assert start(*options, "--step_timeout", 100) == (0, "") and is_finished(log) and resumed_at(log) == [4]
    assert refused(start(), f"{log} is finished, and a log is never overwritten; use another run_id")


def test_a_kill_in_the_last_moment_leaves_no_checkpoint_for_ever(killed, start, log):
    """Between the last line and the removal; the next start or queue removes it."""
    log.write_text(log.read_text() + "peak memory resident: 1 MiB\n")
    assert refused(start(), f"{log} is finished") and not checkpoint_path(log).exists()


def test_a_log_that_has_lost_lines_since_its_checkpoint_is_refused(killed, start, log):
    log.write_text("short\n")
    assert refused(start(), f"{log}: missing or shorter than at its checkpoint; put the log back, move the")


def test_a_run_that_another_process_runs_is_refused(killed, start, log, monkeypatch):
    monkeypatch.setattr(run_log, "LOCK_WAIT_S", 0)
    with open(log) as file:  # a lock excludes other open files, also of this process
        fcntl.flock(file, fcntl.LOCK_SH)
        assert refused(start(), f"{log}: another process is running it; wait for its end or use another run_id")


def test_a_checkpoint_of_another_run_is_refused_and_each_difference_is_named(killed, start, log):
    then = {"num_iterations": 7, "train_data": [["x.bin", 5, "0"]], "device": "mps", "code": "edited = 1",
            "another version's key": 1}
    before, resume = log.read_bytes(), checkpoint_path(log)
    state = torch.load(resume, weights_only=True)
    torch.save(state | {"identity": json.dumps(json.loads(state["identity"]) | then)}, resume)
    assert refused(start(), f"{resume}: the interrupted run is not this one: ", "; set that back, or move it",
                   "num_iterations was 7 and is 6", 'train_data was [["x.bin", 5, "0"]] and is [["s_train_000001.bin"',
                   'device was "mps" and is "cpu"', "the code has changed", "another version's key was 1 and is null")
    assert log.read_bytes() == before


def flip_a_bit(path):
    data, middle = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:])


@pytest.mark.parametrize("damage", [
    flip_a_bit, lambda path: os.truncate(path, 0), lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: (path.unlink(), path.symlink_to("/nowhere")),
    lambda path: torch.save({"step": 1, "identity": "no JSON"}, path),
    lambda path: torch.save(torch.load(path, weights_only=True) | {"more": RunsCode()}, path)])
def test_a_checkpoint_that_is_damaged_or_holds_code_is_refused(killed, start, log, damage):
    before, resume = log.read_bytes(), checkpoint_path(log)
    damage(resume)
    assert refused(start(), f"{resume}: not a checkpoint to resume from", "; move it and its log away to start the run")
    assert log.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("ranks, options, fault, fragment", [
    (3, [], "", "sequences_per_step: 2 sequences cannot be divided among 3 ranks"),
    (2, ["--train_files", "nowhere/*.bin"], "rank() == 0 and time.sleep(1)", "no file matches nowhere/*.bin"),
    (2, ["--value_embeddings", "[[3]]", "--seed", "7"], "rank() == 1 and time.sleep(1)",
     "rank 1: differs from rank 0 in value_embeddings, seed;"),
    (2, [], "text = train.program_text(); train.program_text = lambda: text + str(rank())",
     "rank 1: differs from rank 0 in code;"),
], ids=["on all", "data", "config", "program"])
def test_a_mistake_on_any_rank_is_said_once(run, config, tmp_path, ranks, options, fault, fragment):
    """As on a node that lacks the data or has another version of the config, whichever comes first."""
    of_run = run(config, ranks=ranks, options_of_last=options, fault=fault)
    assert of_run.statuses() == [2] * ranks
    error, = of_run.output("stderr").splitlines()
    assert error.startswith("train_gpt_medium.py: ") and fragment in error
    assert not (tmp_path / "logs").exists()
