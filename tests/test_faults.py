"""Faults: whatever ends a run before its time, the same config and run_id give the results of an undisturbed run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from faults import Ranks, RunsCode, free_port
from helpers import ROOT, TRAIN_LINE, VAL_LINE

from logs import run_log
from logs.log_file import is_finished, last_line

KEYS = dict(num_iterations=6, val_loss_every=3, val_seq_len=128, val_tokens=256, sequences_per_step=2)
RUN = ["--run_id", 0, "--checkpoint_every", 2]


@pytest.fixture
def config(small_config):
    return small_config(**KEYS)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "logs" / "small" / "000.txt"


@pytest.fixture
def resume(log):
    """The checkpoint from which the run goes on."""
    return log.with_name("000.resume.ckpt")


@pytest.fixture
def run(tmp_path):
    """Runs a run's ranks to their end, or only starts them; ends what is left of them after the test."""
    runs = []

    def run(*arguments, wait=True, **options):
        runs.append(Ranks(tmp_path / f"output{len(runs)}", *arguments, **options))
        if wait:
            runs[-1].statuses()
        return runs[-1]

    yield run
    for of_run in runs:
        of_run.kill()


@pytest.fixture(scope="session")
def logs_of(tmp_path_factory):
    """The folder of the logs of a run, which is run once for each config and options."""
    folders = {}

    def logs_of(config, *arguments, **options):
        key = re.sub("log_dir.*", "", config.read_text()), *arguments, *options.items()
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("logs")
            Ranks(folders[key] / "output", config, *arguments, "--log_dir", folders[key] / "logs", **options).statuses()
        return folders[key] / "logs"

    return logs_of


@pytest.fixture
def undisturbed(logs_of):
    """The results of a run that nothing disturbed."""
    return lambda config, ranks=1, **options: results(
        logs_of(config, "--run_id", 0, ranks=ranks, **options) / "small" / "000.txt")


def results(log):
    """The validation losses, which every run of a seed must have to the last digit; each line is there once."""
    text = log.read_text()
    assert is_finished(log) and last_line(log, "ended: ").endswith(": finished")
    assert [int(match[1]) for match in TRAIN_LINE.finditer(text)] == [1, 2, 3, 4, 5, 6]
    losses = [(int(match[1]), match[3]) for match in VAL_LINE.finditer(text)]
    assert [step for step, _ in losses] == [0, 3, 6]
    return losses


def checkpointed_step(path):
    return torch.load(path, weights_only=True)["step"]


def resumed_at(log):
    return [int(step) for step in re.findall(r"^resumed at step (\d+) after", log.read_text(), re.MULTILINE)]


def wait_until(condition):
    end = time.monotonic() + 300  # for a test that fails
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def torchrun(*arguments, fault=""):
    """A launcher, with a fault in its ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    environment = os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


# -----------------------------------------------------------------------------
# kill -9


@pytest.mark.slow
def test_a_rank_is_killed_then_all(run, small_config, undisturbed, log):
    """The rank that is left ends by itself. With every kind of state: gates, several tables, mantissas of bf16."""
    config = small_config(**KEYS, value_embeddings=[[0, 13], [0, 13, 15], [3]], value_embedding_gate=True)
    options = dict(ranks=2, fault="use_bf16()")
    killed = run(config, *RUN, ranks=2, fault="use_bf16(); at_step(3, on_last(send(signal.SIGKILL)))")
    assert killed.statuses() == [1, -signal.SIGKILL]
    of_run = run(config, *RUN, wait=False, ranks=2, fault="use_bf16(); at_step(5, hang)")
    wait_until(lambda: log.exists() and "step:5/6 train_time" in log.read_text())
    of_run.kill()
    assert run(config, *RUN, **options).statuses() == [0, 0]
    assert results(log) == undisturbed(config, **options) and resumed_at(log) == [2, 4]


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(run, config, undisturbed, log, resume):
    of_run = run(config, *RUN, fault="""
is_checkpoint = lambda fd: os.readlink(f"/proc/self/fd/{fd}").endswith(".unfinished")
at_step(3, lambda: before(os, "fsync", send(signal.SIGKILL), is_checkpoint))
""")
    assert of_run.statuses() == [-signal.SIGKILL] and checkpointed_step(resume) == 2
    assert sorted(path.suffix for path in log.parent.iterdir()) == [".ckpt", ".txt", ".unfinished"]
    run(config, *RUN)
    assert results(log) == undisturbed(config) and resumed_at(log) == [2]
    assert [path.name for path in log.parent.iterdir()] == ["000.txt"]


@pytest.mark.campaign
def test_a_rank_is_killed_at_random_moments(run, config, undisturbed, log):
    """In the start, in training, in validation, while a checkpoint is written (every step one)."""
    rng, resumed = Random(0), set()
    for _ in range(20):
        of_run = run(config, "--run_id", 0, "--checkpoint_every", 1, wait=False)
        # A random moment, in units of this machine's pace: after so many changes of the log's size.
        changes, size = rng.randrange(8), -1
        while changes >= 0 and of_run.processes[0].is_alive():
            now = log.stat().st_size if log.exists() else 0
            changes, size = changes - (now != size), now
            time.sleep(rng.uniform(0, 0.05))
        of_run.kill()
        resumed |= set(resumed_at(log)) if log.exists() else set()
    assert run(config, "--run_id", 0, "--checkpoint_every", 1).statuses()[0] in (0, 2)  # 2: it was finished
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
    assert launcher.returncode == -signal.SIGKILL, errors
    pids = [int(path.name) for path in (tmp_path / "ranks").iterdir()]
    assert len(pids) == 4
    wait_until(lambda: all(map(is_gone, pids)))
    assert resumed_at(log) == [2] and "step:4/6 train_time" in log.read_text()
    run(config, *RUN, ranks=2)
    assert results(log) == undisturbed(config, 2)


def test_a_rank_whose_launcher_died_before_it_began_does_not_wait(run, config):
    """The launcher's store does not answer; the process group would wait for it."""
    of_run = run(config, environment=dict(TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True",
                                          MASTER_ADDR="localhost", MASTER_PORT="1"))
    assert of_run.statuses() == [1] and "ConnectionRefusedError" in of_run.output("stderr")


@pytest.mark.slow
def test_without_checkpoints_a_run_starts_over_and_the_old_log_is_kept(run, config, undisturbed, log):
    options = ["--run_id", 0, "--checkpoint_every", 0]
    of_run = run(config, *options, fault="at_step(1, send(signal.SIGTERM))")
    assert of_run.statuses() == [143] and "without a checkpoint" in of_run.complaints()[0]
    old = log.read_text()
    run(config, *options)
    assert "step:3/6 train_time" in old and log.with_name("000.txt.interrupted").read_text() == old
    assert results(log) == undisturbed(config) and resumed_at(log) == []


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.slow
def test_a_signal_stops_all_ranks_at_one_step_with_a_checkpoint(run, config, undisturbed, log, resume):
    """One rank gets it; all stop after the next step, the second time the last. Then the run goes on to its end."""
    for step, number in ((1, signal.SIGINT), (4, signal.SIGTERM)):
        of_run = run(config, "--run_id", 0, ranks=2, fault=f"at_step({step}, on_last(send({number:d})))")
        assert of_run.statuses() == [128 + number] * 2
        said = f"{log}: stopped by signal {number:d}, with a checkpoint; the same config and run_id go on from it"
        assert of_run.output("stderr").splitlines() == [f"train_gpt_medium.py: {said}"]
        assert checkpointed_step(resume) == step + 2 == int(TRAIN_LINE.findall(log.read_text())[-1][0])
        assert last_line(log, "ended: ").endswith(said.partition(": ")[2])
    run(config, "--run_id", 0, ranks=2)
    assert results(log) == undisturbed(config, 2) and resumed_at(log) == [3, 6]
    assert [path.name for path in log.parent.iterdir()] == ["000.txt"]


@pytest.mark.slow
def test_a_signal_in_the_last_validation_or_while_a_checkpoint_is_written_waits(run, config, undisturbed, log):
    """After its last step a run finishes."""
    for fault, status in (("before(checkpoint, 'write', send(15), lambda path, state: state['step'] == 2)", 143),
                          ("before(train.Trainer, 'validate', send(15), lambda trainer, step: step == 6)", 0)):
        assert run(config, *RUN, fault=fault).statuses() == [status]
    assert results(log) == undisturbed(config) and resumed_at(log) == [4]


@pytest.mark.parametrize("fault, number", [
    ("at_step(1, send(signal.SIGINT, times=2))", signal.SIGINT),
    ("before(train.Trainer, 'warm_up', send(signal.SIGTERM))", signal.SIGTERM),
], ids=["second", "before the first step"])
def test_a_second_signal_or_one_before_the_first_step_ends_a_run_at_once(run, config, log, fault, number):
    assert run(config, *RUN, fault=fault).statuses() == [128 + number]
    assert last_line(log, "ended: ").endswith(f": ended at once by signal {number:d}")


@pytest.mark.slow
@pytest.mark.parametrize("lose", [
    "other, ours = os.pipe(); [os.dup2(ours, n) for n in (1, 2)]; os.close(other); closed = lambda: None",
    "other, ours = os.openpty(); [os.dup2(ours, n) for n in (1, 2)]; closed = lambda: os.close(other)",
], ids=["a pipe that nobody reads", "a terminal that is closed"])
def test_a_stop_needs_nobody_who_reads_what_is_said(run, config, log, resume, lose):
    """As when `| tee` ends before the run on Ctrl-C, or when the progress bar cannot be drawn any more."""
    of_run = run(config, *RUN, fault=f"{lose}; at_step(1, lambda: [closed(), send(signal.SIGHUP)()])")
    assert of_run.statuses() == [129] and checkpointed_step(resume) == 3
    assert "stopped by signal 1, with a checkpoint" in last_line(log, "ended: ")


# -----------------------------------------------------------------------------
# Ranks that hang or fail


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_with_its_stack(run, config, log, resume):
    """It holds the interpreter, and the other rank waits for it."""
    of_run = run(config, *RUN, "--step_timeout", 10, ranks=2, fault="at_step(3, on_last(hang_with_the_interpreter))")
    assert of_run.statuses() == [1, 1] and checkpointed_step(resume) == 2 and not is_finished(log)
    stacks = of_run.output("stderr")
    assert "Timeout (0:00:10)!" in stacks and re.search(r'faults.py", line \d+ in hang_with_the_interpreter\n', stacks)


@pytest.mark.slow
def test_what_fails_on_one_rank_only_ends_all(run, config, log):
    """The others do not wait for it until the timeout."""
    fault = "before(checkpoint, 'write', lambda: rank() or fail(MemoryError('of rank 0')))"
    of_run = run(config, *RUN, ranks=2, fault=fault)
    assert of_run.statuses() == [1, 1] and f"train_gpt_medium.py: {log}: " in of_run.output("stderr")
    assert last_line(log, "ended: ").endswith("of rank 0")


@pytest.mark.slow
@pytest.mark.parametrize("ranks, spoilt, step, what", [
    (1, "3, lambda trainer: trainer.model.lm_head_w.data, math.nan", 4, "a weight or an optimizer state is not finite"),
    (2, "3, lambda trainer: next(iter(trainer.optimizers[1].state.values()))['momentum_buffer'], rank() and math.inf",
     4, "a weight or an optimizer state is not finite"),
    (1, "2, lambda trainer: trainer.model.lm_head_w.data, math.nan", 3, "the validation loss is nan"),
], ids=["weight", "a state of one rank", "loss"])
def test_a_run_that_diverges_ends_and_is_finished(run, run_main, capfd, config, log, resume, ranks, spoilt, step, what):
    """The checkpoint before stays."""
    of_run = run(config, *RUN, ranks=ranks, fault=f"spoil({spoilt})")
    assert of_run.statuses() == [1] * ranks
    why = f"diverged at step {step}: {what}"
    assert of_run.output("stderr") == f"train_gpt_medium.py: {log}: {why}\n"
    assert log.read_text().splitlines()[-2] == why and last_line(log, "ended: ").endswith(f": {why}")
    assert checkpointed_step(resume) == 2 and is_finished(log)
    assert refused((run_main(config, *RUN), capfd.readouterr().err), f"{log} is finished") and resume.exists()


# -----------------------------------------------------------------------------
# Full disks; a limit on files' size stands for them


@pytest.mark.slow
def test_no_space_for_checkpoints_does_not_end_a_run(run, config, undisturbed, log):
    of_run = run(config, *RUN, fault="limit_files(10**6)")  # the checkpoint has 27 MB, the log 0.1
    assert of_run.statuses() == [0] and of_run.output("stderr") == ""
    assert len(re.findall(r"no checkpoint of step \d: .*File too large; an earlier one stays", of_run.output())) == 3
    assert results(log) == undisturbed(config)
    assert [path.name for path in log.parent.iterdir()] == ["000.txt"]


@pytest.mark.slow
def test_no_space_for_the_log_ends_a_run_with_one_line(run, config, undisturbed, log):
    """Of two ranks one has a log; the other does not wait."""
    fault = f"at_step(2, lambda: limit_files(os.path.getsize({str(log)!r})))"
    of_run = run(config, *RUN, ranks=2, fault=fault)
    assert of_run.statuses() == [1, 1] and not is_finished(log)
    assert of_run.complaints()[0] == f"train_gpt_medium.py: {log}: [Errno 27] File too large"
    run(config, *RUN, ranks=2)
    assert results(log) == undisturbed(config, 2) and resumed_at(log) == [2]


@pytest.mark.slow
def test_no_space_for_the_final_weights_leaves_the_run_unfinished(run, config, undisturbed, log, resume):
    options = [*RUN, "--save_checkpoint", "true"]
    fault = "before(checkpoint, 'write', lambda: limit_files(10**6), lambda path, content: 'resume' not in path.name)"
    of_run, weights = run(config, *options, fault=fault), log.with_name("000.ckpt")
    assert of_run.statuses() == [1] and not is_finished(log) and checkpointed_step(resume) == 6
    assert len(of_run.complaints()) == 1 and f"{weights}: [Errno 27] File too large" in of_run.complaints()[0]
    assert run(config, *options).statuses() == [0]
    assert results(log) == undisturbed(config) and checkpointed_step(weights) == 6
    assert sorted(path.name for path in log.parent.iterdir()) == ["000.ckpt", "000.txt"]


# -----------------------------------------------------------------------------
# What is not gone on with: one line, and nothing is changed


@pytest.fixture
def go_on(config, logs_of, tmp_path, run_main, capfd):
    """Starts a copy of a run that was killed in its last step again, here; returns exit status and standard error."""
    shutil.copytree(logs_of(config, *RUN, fault="at_step(5, send(signal.SIGKILL))"), tmp_path / "logs")
    return lambda *options: (run_main(config, *RUN, *options), capfd.readouterr().err)


def refused(result, *fragments):
    status, errors = result
    return status == 2 and errors.count("\n") == 1 and all(fragment in errors for fragment in fragments)


def test_what_does_not_change_results_may_change_and_a_finished_run_is_refused(go_on, log):
    options = ["--description", "other words", "--save_checkpoint", "true", "--checkpoint_every", 7]
    assert go_on(*options, "--step_timeout", 100) == (0, "") and is_finished(log) and resumed_at(log) == [4]
    assert refused(go_on(), f"{log} is finished, and a log is never overwritten; use another run_id")


def test_a_kill_in_the_last_moment_leaves_no_checkpoint_for_ever(go_on, log, resume):
    """Between the last line and the removal; the next start or queue removes it."""
    log.write_text(log.read_text() + "peak memory resident: 1 MiB\n")
    assert refused(go_on(), f"{log} is finished") and not resume.exists()


@pytest.mark.parametrize("name, theirs, fragment", [
    ("num_iterations", 7, "num_iterations was 7 and is 6"),
    ("value_embeddings", [[0, 15]], "value_embeddings was [[0, 15]] and is [[0, 13], [1, 14], [2, 15]]"),
    ("program text", "edited", "program text has changed; set that back"),
    ("a key of another version", 1, "a key of another version was 1 and is null"),
    ("device", "mps", 'device was "mps" and is "cpu"'),
    ("next batch", ["elsewhere.bin", 5], 'next batch was ["elsewhere.bin", 5] and is ["s_train_000001.bin", 1024]'),
])
def test_a_run_with_another_config_program_device_or_data_is_refused(go_on, log, resume, name, theirs, fragment):
    state, before = torch.load(resume, weights_only=True), log.read_bytes()
    torch.save(state | {"must_equal": json.dumps(json.loads(state["must_equal"]) | {name: theirs})}, resume)
    assert refused(go_on(), "small.toml: run_id: ", f"{resume}: ", fragment) and log.read_bytes() == before


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: os.truncate(path, path.stat().st_size - 1),
    flip_a_bit,
    lambda path: os.truncate(path, 0),
    lambda path: (path.unlink(), path.symlink_to("/nowhere")),
    lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"step": 1, "must_equal": "no JSON"}, path),
    lambda path: torch.save(torch.load(path, weights_only=True) | {"more": RunsCode()}, path),
], ids=["half", "one byte short", "one bit", "empty", "a link to nowhere", "a list", "no JSON", "runs code"])
def test_a_checkpoint_that_is_damaged_or_would_run_code_is_refused(go_on, resume, damage):
    damage(resume)
    assert refused(go_on(), f"{resume}: not a checkpoint that a run can go on from", "; move it")


def test_a_run_that_another_process_runs_is_refused(run, config, log, run_main, capfd, monkeypatch):
    monkeypatch.setattr(run_log, "LOCK_WAIT_S", 1)
    run(config, *RUN, wait=False, fault="at_step(0, hang)")
    wait_until(lambda: log.exists() and "step:0/6 val_loss" in log.read_text())
    assert refused((run_main(config, *RUN), capfd.readouterr().err), f"{log}: another process runs this")


# -----------------------------------------------------------------------------
# Several ranks and nodes


@pytest.mark.parametrize("ranks, options, fault, fragment", [
    (3, [], "", "sequences_per_step: 2 sequences cannot be divided among 3 ranks"),
    (2, ["--train_files", "nowhere/*.bin"], "rank() == 0 and time.sleep(1)", "no file matches nowhere/*.bin"),
    (2, ["--value_embeddings", "[[3]]", "--seed", "7"], "rank() == 1 and time.sleep(1)",
     "value_embeddings, seed of rank 1 differ from rank 0's"),
    (2, [], "text = machine.program_text(); machine.program_text = lambda: text + str(rank())",
     "program text of rank 1 differ from rank 0's"),
], ids=["on all", "data", "config", "program"])
def test_a_mistake_on_any_rank_is_said_once(run, config, tmp_path, ranks, options, fault, fragment):
    """As on a node that lacks the data or has another version of the config, whichever comes first."""
    of_run = run(config, ranks=ranks, options_of_last=options, fault=fault)
    assert of_run.statuses() == [2] * ranks
    assert len(of_run.output("stderr").splitlines()) == 1 and fragment in of_run.complaints()[0]
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_two_nodes(config, undisturbed, log):
    """Two torchruns that meet: nothing assumes that all ranks are on one node."""
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]
    nodes = [torchrun(*meeting, "train_gpt_medium.py", config, "--seed", 0) for _ in range(2)]
    outputs = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert results(log) == undisturbed(config, 2) and sum("val_loss" in output for output, _ in outputs) == 1
