"""Faults: whatever ends a run before its time, the same config and run_id give the results of an undisturbed run."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from faults import Ranks
from helpers import ROOT, TRAIN_LINE, VAL_LINE, write_config

from logs import machine, run_log
from logs.log_file import is_finished, last_line

STEPS = 10
RUN = ["--run_id", 0, "--checkpoint_every", 3]
LAST = "rank() == int(os.environ.get('WORLD_SIZE', 1)) - 1 and "  # before an action: only on the last rank
FINISHED = r"ended: \S+ \S+ on \S+: finished"


@pytest.fixture
def config(small_config):
    return small_config(num_iterations=STEPS, val_loss_every=5, val_seq_len=128, val_tokens=256, sequences_per_step=2)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "logs" / "small" / "000.txt"


@pytest.fixture
def resume(log):
    """The checkpoint from which the run goes on."""
    return log.with_name("000.resume.ckpt")


@pytest.fixture
def start(tmp_path):
    """Starts the ranks of a run; ends what is left of them after the test."""
    started = []

    def start(*arguments, **options):
        started.append(Ranks(tmp_path / f"output{len(started)}", *arguments, **options))
        return started[-1]

    yield start
    for of_run in started:
        of_run.kill()


@pytest.fixture
def finish(start):
    """Runs a run's ranks to their end."""

    def finish(*arguments, **options):
        of_run = start(*arguments, **options)
        of_run.statuses()
        return of_run

    return finish


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The results of a run that nothing disturbed; one run for each config and number of ranks."""
    of_runs = {}

    def undisturbed(config, ranks, **options):
        keys = re.sub("log_dir.*", "", config.read_text()), ranks, *options.items()
        if keys not in of_runs:
            folder = tmp_path_factory.mktemp("undisturbed")
            of_run = Ranks(folder / "output", config, "--run_id", 0, "--log_dir", folder, ranks=ranks, **options)
            assert of_run.statuses() == [0] * ranks, of_run.output("stderr")
            of_runs[keys] = results(folder / "small" / "000.txt")
            assert of_runs[keys][1:] == ([0, 5, 10], list(range(1, STEPS + 1)))
        return of_runs[keys]

    return undisturbed


def results(log):
    """What every run of a seed must have: validation losses to the last digit, and the steps of all lines, in order."""
    assert is_finished(log) and re.fullmatch(FINISHED, last_line(log, "ended: "))
    text = log.read_text()
    losses = [match[3] for match in VAL_LINE.finditer(text)]
    return losses, *([int(match[1]) for match in line.finditer(text)] for line in (VAL_LINE, TRAIN_LINE))


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


def torchrun(config, *options, fault="", launcher_options=()):
    """Two ranks under torchrun, with a fault: the launcher's process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *launcher_options,
               "tests/faults.py", str(config), *map(str, options)]
    environment = os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def complaints(errors):
    return [line for line in errors.splitlines() if line.startswith("train_gpt_medium.py: ")]


# -----------------------------------------------------------------------------
# kill -9


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.campaign)])
def test_a_rank_is_killed_at_random_moments(start, finish, config, undisturbed, log, kills):
    """In the start, in training, in validation, while a checkpoint is written (every step one)."""
    rng, resumed = Random(0), set()
    for _ in range(kills):
        of_run = start(config, "--run_id", 0, "--checkpoint_every", 1)
        # A random moment, in units of this machine's pace: after so many changes of the log's size.
        changes, size = rng.randrange(8), -1
        while changes >= 0 and of_run.processes[0].is_alive():
            now = log.stat().st_size if log.exists() else 0
            changes, size = changes - (now != size), now
            time.sleep(rng.uniform(0, 0.05))
        of_run.kill()
        resumed |= set(resumed_at(log)) if log.exists() else set()
    assert finish(config, "--run_id", 0, "--checkpoint_every", 1).statuses()[0] in (0, 2)  # 2: it was finished
    assert results(log) == undisturbed(config, 1) and resumed


@pytest.mark.slow
def test_a_rank_is_killed_then_all(start, finish, config, undisturbed, log):
    """The rank that is left ends by itself, and nothing up to the last checkpoint is computed again."""
    of_run = start(config, *RUN, ranks=2, fault=f"at_step(4, lambda: {LAST} send(signal.SIGKILL)())")
    assert of_run.statuses() == [1, -signal.SIGKILL]
    of_run = start(config, *RUN, ranks=2, fault="at_step(7, hang)")
    wait_until(lambda: log.exists() and "step:7/10 train_time" in log.read_text())
    of_run.kill()
    assert finish(config, *RUN, ranks=2).statuses() == [0, 0]
    assert results(log) == undisturbed(config, 2) and resumed_at(log) == [3, 6]


@pytest.mark.slow
def test_torchrun_brings_a_run_back_until_it_is_killed_itself(finish, config, undisturbed, log, tmp_path):
    """A rank dies, later the launcher. The ranks then end because their parent has: one hangs and could not notice."""
    launcher = torchrun(config, *RUN, launcher_options=["--max-restarts=1"], fault=f"""
os.makedirs({str(tmp_path / "ranks")!r}, exist_ok=True)
open({str(tmp_path / "ranks")!r} + f"/{{os.getpid()}}", "w")
is_restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
at_step(4, lambda: rank() == 1 and not is_restarted and send(signal.SIGKILL)())
at_step(5, lambda: rank() == 1 and is_restarted and [os.kill(os.getppid(), signal.SIGKILL), hang()])
""")
    _, errors = launcher.communicate()
    assert launcher.returncode == -signal.SIGKILL, errors
    pids = [int(path.name) for path in (tmp_path / "ranks").iterdir()]
    assert len(pids) == 4
    wait_until(lambda: all(map(is_gone, pids)))
    assert resumed_at(log) == [3] and "step:5/10 train_time" in log.read_text()
    finish(config, *RUN, ranks=2)
    assert results(log) == undisturbed(config, 2)


@pytest.mark.slow
def test_a_rank_whose_launcher_died_before_it_began_does_not_wait(start, config):
    """The launcher's store does not answer; the process group would wait for it."""
    of_run = start(config, environment=dict(TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True",
                                            MASTER_ADDR="localhost", MASTER_PORT="1"))
    assert of_run.statuses() == [1] and "ConnectionRefusedError" in of_run.output("stderr")


@pytest.mark.slow
def test_only_a_run_with_a_number_is_brought_back(finish, config):
    of_run = finish(config, ranks=2, environment={"TORCHELASTIC_MAX_RESTARTS": "2"})
    assert of_run.statuses() == [2, 2]
    assert len(of_run.complaints()) == 1 and "run_id: torchrun restarts only a run with" in of_run.complaints()[0]


@pytest.mark.slow
def test_without_checkpoints_a_run_starts_over_and_the_old_log_is_kept(start, finish, config, undisturbed, log):
    options = ["--run_id", 0, "--checkpoint_every", 0]
    assert start(config, *options, fault="at_step(2, send(signal.SIGKILL))").statuses() == [-signal.SIGKILL]
    old = log.read_text()
    finish(config, *options)
    assert "step:2/10 train_time" in old and log.with_name("000.txt.interrupted").read_text() == old
    assert results(log) == undisturbed(config, 1)


@pytest.mark.slow
def test_gates_and_layers_with_several_tables_go_on_too(start, finish, small_config, undisturbed, log):
    config = small_config(num_iterations=STEPS, val_loss_every=5, val_seq_len=128, val_tokens=256, sequences_per_step=2,
                          value_embeddings=[[0, 13], [0, 13, 15], [3]], value_embedding_gate=True)
    start(config, *RUN, ranks=2, fault=f"at_step(4, lambda: {LAST} send(signal.SIGKILL)())").statuses()
    finish(config, *RUN, ranks=2)
    assert results(log) == undisturbed(config, 2) and resumed_at(log) == [3]


@pytest.mark.slow
def test_bf16_weights_go_on_too_to_the_last_bit_of_their_masters(start, finish, config, undisturbed, log):
    kill = f"at_step(4, lambda: {LAST} send(signal.SIGKILL)())"
    start(config, *RUN, ranks=2, fault=f"use_bf16(); {kill}").statuses()
    finish(config, *RUN, ranks=2, fault="use_bf16()")
    assert results(log) == undisturbed(config, 2, fault="use_bf16()") and resumed_at(log) == [3]


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_stops_all_ranks_at_one_step_with_a_checkpoint(start, finish, config, undisturbed, log, resume, ranks):
    """One rank gets it; all stop after the next step. Three times, then the run goes on to its end."""
    for step, number in ((1, signal.SIGINT), (4, signal.SIGTERM), (7, signal.SIGHUP)):
        of_run = start(config, "--run_id", 0, ranks=ranks, fault=f"at_step({step}, lambda: {LAST} send({number})())")
        assert of_run.statuses() == [128 + number] * ranks
        said = f"{log}: stopped by signal {number:d}, with a checkpoint; the same config and run_id go on from it"
        assert of_run.output("stderr").splitlines() == [f"train_gpt_medium.py: {said}"]
        assert checkpointed_step(resume) == step + 2 == int(TRAIN_LINE.findall(log.read_text())[-1][0])
        assert last_line(log, "ended: ").endswith(said.partition(": ")[2])
    finish(config, "--run_id", 0, ranks=ranks)
    assert results(log) == undisturbed(config, ranks) and resumed_at(log) == [3, 6, 9]
    assert sorted(path.name for path in log.parent.iterdir()) == ["000.txt"]


@pytest.mark.slow
def test_a_signal_in_a_validation_or_while_a_checkpoint_is_written_waits(start, finish, config, undisturbed, log):
    """The last one comes in the last validation: the run is as good as finished, and finishes."""
    send = "send(signal.SIGTERM)"
    for fault in (f"before(checkpoint, 'write', {send}, lambda path, state: state['step'] == 2)",
                  f"before(train.Trainer, 'validate', {send}, lambda trainer, step: step == 5)",
                  f"before(train.Trainer, 'validate', {send}, lambda trainer, step: step == 10)"):
        of_run = start(config, "--run_id", 0, "--checkpoint_every", 2, ranks=2, fault=fault)
        assert of_run.statuses() in ([143, 143], [0, 0]), of_run.output("stderr")
    assert results(log) == undisturbed(config, 2) and resumed_at(log) == [4, 7]


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(start, config, log, resume):
    of_run = start(config, *RUN, fault="at_step(4, send(signal.SIGINT, times=2))")
    assert of_run.statuses() == [130] and checkpointed_step(resume) == 3
    assert last_line(log, "ended: ").endswith(": ended at once by signal 2")


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_a_run_at_once(start, config, log):
    of_run = start(config, *RUN, fault="before(train.Trainer, 'warm_up', send(signal.SIGTERM))")
    assert of_run.statuses() == [143] and last_line(log, "ended: ").endswith(": ended at once by signal 15")


@pytest.mark.slow
def test_a_second_signal_ends_a_run_also_when_the_first_came_amid_a_line_of_the_log(start, config):
    """Python refuses to write to a file that it is writing to."""
    of_run = start(config, *RUN, fault="at_step(2, send(signal.SIGINT, times=2)); "
                                       "before(run_log.RunLog, 'end', lambda: fail(RuntimeError('reentrant call')))")
    assert of_run.statuses() == [130]


@pytest.mark.slow
def test_a_signal_without_checkpoints_stops_a_run_too(start, config, log, resume):
    of_run = start(config, "--run_id", 0, "--checkpoint_every", 0, fault="at_step(1, send(signal.SIGTERM))")
    assert of_run.statuses() == [143] and "without a checkpoint" in of_run.complaints()[0] and not resume.exists()
    assert int(TRAIN_LINE.findall(log.read_text())[-1][0]) == 3


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_its_ranks_with_a_checkpoint(finish, config, undisturbed, log):
    launcher = torchrun(config, *RUN, fault="at_step(1, lambda: rank() == 1 and os.kill(os.getppid(), 15)); "
                                            "slow_steps()")
    _, errors = launcher.communicate()
    assert len(complaints(errors)) == 1 and "stopped by signal 15, with a checkpoint" in errors
    assert 'train_gpt_medium.py", line' not in errors
    finish(config, *RUN, ranks=2)
    assert results(log) == undisturbed(config, 2) and len(resumed_at(log)) == 1


@pytest.mark.slow
def test_a_second_ctrl_c_ends_torchrun_and_its_ranks_at_once(config, log, tmp_path):
    """Also where a rank hangs and so cannot stop at a step."""
    launcher = torchrun(config, *RUN, fault=f"""
open({str(tmp_path)!r} + f"/pid{{rank()}}", "w").write(str(os.getpid()))
at_step(4, lambda: rank() == 1 and [os.kill(os.getppid(), signal.SIGINT), hang_with_the_interpreter()])
""")
    while "closing signal SIGINT" not in (line := launcher.stderr.readline()):
        assert line, "the launcher ended before"
    launcher.send_signal(signal.SIGINT)
    launcher.communicate()
    wait_until(lambda: all(is_gone(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1)))
    assert "step:4/10 train_time" in log.read_text() and not is_finished(log)


@pytest.mark.slow
def test_a_stop_needs_nobody_who_reads_what_is_said(start, config, log, resume):
    """As when the terminal is closed, or `| tee` ends before the run on Ctrl-C."""
    of_run = start(config, *RUN, fault="reading, writing = os.pipe(); os.dup2(writing, 1); os.dup2(writing, 2); "
                                       "os.close(reading); at_step(1, send(signal.SIGHUP))")
    assert of_run.statuses() == [129] and checkpointed_step(resume) == 3


@pytest.mark.slow
def test_a_closed_terminal_stops_a_run_with_a_checkpoint(start, config, log, resume):
    """Its progress bar cannot be drawn any more."""
    of_run = start(config, *RUN, fault="leader, terminal = os.openpty(); os.dup2(terminal, 1); os.dup2(terminal, 2); "
                                       "at_step(1, lambda: [os.close(leader), send(signal.SIGHUP)()])")
    assert of_run.statuses() == [129] and checkpointed_step(resume) == 3
    assert "stopped by signal 1, with a checkpoint" in last_line(log, "ended: ")


# -----------------------------------------------------------------------------
# Ranks that hang or fail


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_with_its_stack(start, config, log, resume):
    """Waiting in Python, holding the interpreter, and at the end of a finished run. The three wait side by side."""
    in_last = [f"at_step(5, lambda: {LAST} {hang}())" for hang in ("hang", "hang_with_the_interpreter")]
    at_end = "before(train.dist, 'destroy_process_group', hang)"
    runs = [start(config, "--run_id", number, "--checkpoint_every", 3, "--step_timeout", 5, ranks=2, fault=fault)
            for number, fault in enumerate([*in_last, at_end])]
    for of_run, hang in zip(runs, ("hang", "hang_with_the_interpreter", "hang")):
        assert of_run.statuses() == [1, 1]
        stacks = of_run.output("stderr")
        assert "Timeout (0:00:05)!" in stacks and re.search(rf'faults.py", line \d+ in {hang}\n', stacks)
    assert checkpointed_step(resume) == checkpointed_step(log.with_name("001.resume.ckpt")) == 3
    assert not is_finished(log) and is_finished(log.with_name("002.txt"))


@pytest.mark.slow
@pytest.mark.parametrize("failing, error", [
    ("checkpoint, 'write'", "MemoryError('of rank 0')"),
    ("run_log.RunLog, 'size'", "OSError('of rank 0')"),
    ("run_log.RunLog, 'train_line'", "OSError('of rank 0')"),
], ids=["the checkpoint's file", "the log's size", "the log"])
def test_what_fails_on_one_rank_only_ends_all(start, config, log, failing, error):
    """The others do not wait for it until the timeout."""
    fault = f"at_step(2, lambda: before({failing}, lambda: rank() or fail({error})))"
    of_run = start(config, *RUN, ranks=2, fault=fault)
    assert of_run.statuses() == [1, 1] and f"train_gpt_medium.py: {log}: " in of_run.output("stderr")
    assert last_line(log, "ended: ").endswith("of rank 0")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("spoilt, step, what", [
    ("5, lambda trainer: trainer.model.lm_head_w.data, math.nan", 6, "a weight or an optimizer state is not finite"),
    ("5, lambda trainer: next(iter(trainer.optimizers[1].state.values()))['momentum_buffer'], math.inf", 6,
     "a weight or an optimizer state is not finite"),
    ("4, lambda trainer: trainer.model.lm_head_w.data, math.nan", 5, "the validation loss is nan"),
], ids=["weight", "state", "loss"])
def test_a_run_that_diverges_ends_and_is_finished(start, finish, config, log, resume, ranks, spoilt, step, what):
    """The checkpoint before stays."""
    of_run = start(config, *RUN, ranks=ranks, fault=f"spoil({spoilt})")
    assert of_run.statuses() == [1] * ranks
    why = f"diverged at step {step}: {what}"
    assert of_run.output("stderr") == f"train_gpt_medium.py: {log}: {why}\n"
    assert log.read_text().splitlines()[-2] == why and last_line(log, "ended: ").endswith(f": {why}")
    assert checkpointed_step(resume) == 3 and is_finished(log)
    of_run = finish(config, *RUN, ranks=ranks)
    assert of_run.statuses() == [2] * ranks and "is finished" in of_run.complaints()[0]


# -----------------------------------------------------------------------------
# Full disks; a limit on files' size stands for them


@pytest.mark.slow
def test_no_space_for_checkpoints_does_not_end_a_run(finish, config, undisturbed, log):
    of_run = finish(config, *RUN, ranks=2, file_bytes=1_000_000)  # the checkpoint has 27 MB, the log 0.1
    assert of_run.statuses() == [0, 0] and of_run.output("stderr") == ""
    assert len(re.findall(r"no checkpoint of step \d: .*File too large; an earlier one stays", of_run.output())) == 3
    assert results(log) == undisturbed(config, 2)
    assert [path.name for path in log.parent.iterdir()] == ["000.txt"]


@pytest.mark.slow
def test_no_space_for_the_log_ends_a_run_with_one_line(finish, config, undisturbed, log):
    finish(config, "--run_id", 1)
    size = log.with_name("001.txt").stat().st_size - 300  # all but a few lines
    of_run = finish(config, *RUN[:2], "--checkpoint_every", 1000, file_bytes=size)
    assert of_run.statuses() == [1] and not is_finished(log)
    assert of_run.output("stderr") == f"train_gpt_medium.py: {log}: [Errno 27] File too large\n"
    finish(config, *RUN)
    assert results(log) == undisturbed(config, 1)


@pytest.mark.slow
def test_no_space_for_the_final_weights_leaves_the_run_unfinished(finish, config, undisturbed, log, resume):
    of_run = finish(config, *RUN, "--save_checkpoint", "true", fault="""
before(checkpoint, "write", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY)),
       lambda path, content: "resume" not in path.name)
""")
    weights = log.with_name("000.ckpt")
    assert of_run.statuses() == [1] and not is_finished(log) and checkpointed_step(resume) == 9
    assert len(of_run.complaints()) == 1 and f"{weights}: [Errno 27] File too large" in of_run.complaints()[0]
    assert finish(config, *RUN, "--save_checkpoint", "true").statuses() == [0]
    assert results(log) == undisturbed(config, 1) and checkpointed_step(weights) == STEPS
    assert sorted(path.name for path in log.parent.iterdir()) == ["000.ckpt", "000.txt"]


# -----------------------------------------------------------------------------
# What is not gone on with: one line, and nothing is changed


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory, small_data):
    """The folder of a run that was killed in its last step, after a checkpoint, and its config."""
    folder = tmp_path_factory.mktemp("interrupted")
    keys = dict(train_files=f"{small_data}/s_train_*.bin", val_files=f"{small_data}/s_val_*.bin", vocab_size=256,
                num_heads=1, model_dim=128, train_seq_len=128, val_seq_len=128, val_tokens=256, sequences_per_step=2,
                num_iterations=3, val_loss_every=3, warmup_steps=0, log_dir=str(folder / "logs"))
    config = write_config(folder / "small.toml", **keys)
    of_run = Ranks(folder / "output", config, "--run_id", 0, "--checkpoint_every", 2,
                   fault="at_step(2, send(signal.SIGKILL))")
    assert of_run.statuses() == [-signal.SIGKILL]
    return folder


@pytest.fixture
def go_on(interrupted, tmp_path, run_main, capfd, log):
    """Starts a copy of the interrupted run again, in this process; returns exit status and standard error."""
    shutil.copytree(interrupted / "logs", tmp_path / "logs")

    def go_on(*options):
        options = ["--run_id", 0, "--checkpoint_every", 2, "--log_dir", tmp_path / "logs", *options]
        return run_main(interrupted / "small.toml", *options), capfd.readouterr().err

    return go_on


def refused(result, *fragments):
    status, errors = result
    return status == 2 and errors.count("\n") == 1 and all(fragment in errors for fragment in fragments)


def test_what_does_not_change_results_may_change(go_on, log):
    status, errors = go_on("--description", "other words", "--save_checkpoint", "true", "--checkpoint_every", 7,
                           "--step_timeout", 100)
    assert (status, errors) == (0, "") and is_finished(log) and resumed_at(log) == [2]
    assert refused(go_on(), f"{log} is finished, and a log is never overwritten; use another run_id")


def test_a_kill_in_the_last_moment_leaves_no_checkpoint_for_ever(go_on, log, resume):
    """Between the last line and the removal; the next start or queue removes it."""
    log.write_text(log.read_text() + "peak memory resident: 1 MiB\n")
    assert refused(go_on(), f"{log} is finished") and not resume.exists()


@pytest.mark.parametrize("option, value, fragment", [
    ("num_iterations", "4", "num_iterations was 3 and is 4"),
    ("value_embeddings", "[[0, 15]]", "value_embeddings was [[0, 13], [1, 14], [2, 15]] and is [[0, 15]]"),
    ("seed", "7", "seed was 0 and is 7"),
])
def test_another_configuration_is_refused(go_on, log, option, value, fragment):
    before = log.read_bytes()
    assert refused(go_on(f"--{option}", value), "small.toml: run_id: ", "000.resume.ckpt: ", fragment)
    assert log.read_bytes() == before


def test_another_program_text_is_refused(go_on, monkeypatch):
    text = machine.program_text()
    monkeypatch.setattr(machine, "program_text", lambda: text + "# edited")
    assert refused(go_on(), "program text has changed; set that back")


@pytest.mark.parametrize("name, value, fragment", [
    ("device", "mps", 'device was "mps" and is "cpu"'),
    ("next batch", ["elsewhere.bin", 5], 'next batch was ["elsewhere.bin", 5] and is ["s_train_000001.bin", 512]'),
])
def test_another_device_and_other_data_are_refused(go_on, resume, name, value, fragment):
    state = torch.load(resume, weights_only=True)
    torch.save(state | {"must_equal": json.dumps(json.loads(state["must_equal"]) | {name: value})}, resume)
    assert refused(go_on(), fragment)


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    lambda data: b"",
    lambda data: b"no checkpoint",
], ids=["half", "one byte short", "one bit", "empty", "text"])
def test_a_damaged_checkpoint_is_refused(go_on, resume, damage):
    resume.write_bytes(damage(resume.read_bytes()))
    assert refused(go_on(), f"{resume}: not a checkpoint that a run can go on from")


class RunsCode:
    """Unpickling this would run a program."""

    def __reduce__(self):
        return exec, ("raise SystemExit('this was run')",)


def test_a_checkpoint_cannot_run_code(go_on, resume):
    torch.save(torch.load(resume, weights_only=True) | {"more": RunsCode()}, resume)
    assert refused(go_on(), "not a checkpoint that a run can go on from")


def test_a_log_that_has_become_shorter_is_refused(go_on, log):
    os.truncate(log, 20)
    assert refused(go_on(), f"{log}: shorter than at its checkpoint")


@pytest.mark.slow
def test_a_run_that_another_process_runs_is_refused(start, config, log, run_main, capfd, monkeypatch):
    monkeypatch.setattr(run_log, "LOCK_WAIT_S", 1)
    start(config, *RUN, fault="at_step(1, hang)")
    wait_until(lambda: log.exists() and "step:1/10 train_time" in log.read_text())
    assert refused((run_main(config, *RUN), capfd.readouterr().err), f"{log}: another process runs this")


# -----------------------------------------------------------------------------
# Several ranks, runs and nodes


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("other, fragment", [
    (["--train_files", "nowhere/*.bin"], "no file matches nowhere/*.bin"),
    (["--value_embeddings", "[[3]]", "--seed", "7"], "value_embeddings, seed of rank 1 differ from rank 0's"),
])
def test_a_mistake_on_one_rank_only_is_said_once(finish, config, tmp_path, late, other, fragment):
    """As on a node that lacks the data or has another version of the config."""
    of_run = finish(config, ranks=2, options_of_last=other,
                    fault=f"before(train.ranks, 'start_process_group', lambda: rank() == {late} and time.sleep(1))")
    assert of_run.statuses() == [2, 2] and of_run.output() == ""
    assert len(of_run.output("stderr").splitlines()) == 1 and fragment in of_run.complaints()[0]
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_another_program_text_on_one_rank_is_refused(finish, config):
    of_run = finish(config, ranks=2, fault="text = train.machine.program_text(); train.machine.program_text = "
                                           "lambda: text + str(rank())")
    assert of_run.statuses() == [2, 2] and "program text of rank 1 differ from rank 0's" in of_run.complaints()[0]


@pytest.mark.slow
def test_runs_started_together_get_a_log_each(start, small_config, log):
    config = small_config(num_iterations=1)
    runs = [start(config) for _ in range(3)]
    assert [of_run.statuses() for of_run in runs] == [[0], [0], [0]]
    assert sorted(path.name for path in log.parent.iterdir()) == ["000.txt", "001.txt", "002.txt"]
    assert all(is_finished(path) for path in log.parent.iterdir())


@pytest.mark.slow
def test_two_nodes(config, undisturbed, log):
    """Two torchruns that meet: nothing assumes that all ranks are on one node."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "train_gpt_medium.py", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen([*command, "--seed", "0"], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert results(log) == undisturbed(config, 2) and sum("val_loss" in output for output, _ in outputs) == 1
