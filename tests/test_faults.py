"""Faults: whatever ends a run before its time, the same config and run_id begun again give the results of an undisturbed run."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import PROGRAM, ROOT, TRAIN_LINE, VAL_LINE, start_trainer, weights_and_states

import train_gpt_medium as train

STEPS = 16
RUN = ["--run_id", "0", "--checkpoint_every", "3"]
# For hurting a run from within: this stands before `train.main`, in each rank.
HURT = """
import os, sys, time
sys.path.insert(0, {root!r})
import train_gpt_medium as train
rank = int(os.environ.get("RANK", "0"))
{how}
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""

SLOW_STEPS = """
original = train.Trainer.train_step
train.Trainer.train_step = lambda *arguments: original(*arguments) or time.sleep(0.5)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_rank():
    """As torchrun has it with several ranks: threads that wait for each other are slow on a machine that does other things too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module", autouse=True)
def sigint_as_from_a_terminal():
    """Programs inherit that SIGINT is ignored, as it is where the tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def config(small_config):
    return small_config(num_iterations=STEPS, val_loss_every=4, train_seq_len=128, val_seq_len=128, val_tokens=512, sequences_per_step=2)


def start(config, *options, ranks=None, program=PROGRAM, launcher_options=(), **popen_options):
    torchrun = [] if ranks is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher_options]
    return subprocess.Popen([sys.executable, *torchrun, str(program), str(config), *map(str, options)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen_options)


def finish(*arguments, **options):
    """The process, run to its end: (exit status, standard output, standard error)."""
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def our_lines(errors):
    return [line for line in errors.splitlines() if line.startswith("train_gpt_medium.py: ")]


def hurt(tmp_path, how):
    path = tmp_path / "hurt.py"
    path.write_text(HURT.format(root=str(ROOT), how=how))
    return path


def results(log):
    """What is the same for every undisturbed run of a seed: validation losses, as printed, and the steps of all lines, in order."""
    text = log.read_text()
    return [m[3] for m in VAL_LINE.finditer(text)], [int(m[1]) for m in VAL_LINE.finditer(text)], [int(m[1]) for m in TRAIN_LINE.finditer(text)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_thread_a_rank):
    """The log of a run with so many ranks that nothing disturbed; made when first asked for."""
    logs = {}

    def of(config, ranks):
        if ranks not in logs:
            folder = tmp_path_factory.mktemp("undisturbed")
            status, _, errors = finish(config, "--run_id", 0, "--log_dir", folder, ranks=ranks)
            assert status == 0, errors
            logs[ranks] = folder / "small" / "000.txt"
            assert results(logs[ranks])[1:] == ([0, 4, 8, 12, 16], list(range(1, STEPS + 1)))
        return logs[ranks]

    return of


def assert_as_undisturbed(log, expected):
    assert train.is_finished(log) and results(log) == results(expected)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "logs" / "small" / "000.txt"


def wait_for_step(log, step, seconds=90):
    wait_until(lambda: log.exists() and re.search(rf"^step:{step}/\d+ train_time", log.read_text(errors="replace"), re.MULTILINE), seconds)


def wait_until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ranks_of(launcher):
    """The process ids of a launcher's ranks."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def is_gone(pid):
    return not train.is_alive(pid) or open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"


# -----------------------------------------------------------------------------
# kill -9


@pytest.mark.slow
def test_one_rank_killed_at_random_moments(in_child, config, undisturbed, log):
    """In the start, in training, in validation, while a checkpoint is written (every step one)."""
    rng, resumed_at, start_s = random.Random(0), set(), None
    for _ in range(20):
        process, began = in_child(config, "--run_id", 0, "--checkpoint_every", 1), time.monotonic()
        if start_s is None:
            wait_for_step(log, 2)
            start_s = time.monotonic() - began
        process.join(rng.uniform(0, 1.5 * start_s))
        process.kill()
        process.join()
        resumed_at |= {int(step) for step in re.findall(r"^resumed at step (\d+)", log.read_text(errors="replace") if log.exists() else "", re.MULTILINE)}
        if log.exists() and train.is_finished(log):
            break
    process = in_child(config, "--run_id", 0, "--checkpoint_every", 1)
    process.join(120)
    assert process.exitcode in (0, 2)  # 2: it was finished
    assert_as_undisturbed(log, undisturbed(config, None))
    assert resumed_at


@pytest.mark.slow
def test_two_ranks_of_which_one_their_launcher_or_all_are_killed(config, undisturbed, log, tmp_path):
    """Nobody is left behind, and what was computed up to the last checkpoint is not computed again."""
    slow = hurt(tmp_path, SLOW_STEPS)
    for step, victims in ((4, lambda launcher, ranks: ranks[1:]), (8, lambda launcher, ranks: [launcher]), (11, lambda launcher, ranks: [launcher, *ranks])):
        launcher = start(config, *RUN, ranks=2, program=slow)
        wait_for_step(log, step)
        ranks = ranks_of(launcher)
        assert len(ranks) == 2
        for pid in victims(launcher.pid, ranks):
            os.kill(pid, signal.SIGKILL)
        launcher.communicate(timeout=60)
        wait_until(lambda: all(map(is_gone, ranks)), seconds=20)
    status, output, errors = finish(config, *RUN, ranks=2)
    assert status == 0, errors
    assert_as_undisturbed(log, undisturbed(config, 2))
    resumed = [int(step) for step in re.findall(r"^resumed at step (\d+)", log.read_text(), re.MULTILINE)]
    assert resumed[-1] >= 9 and f"resumed at step {resumed[-1]} after" in output


@pytest.mark.slow
def test_torchrun_brings_a_run_back_after_a_rank_dies(config, undisturbed, log):
    """Without a run_id: the restarted ranks go on with the run that they had begun."""
    launcher = start(config, "--checkpoint_every", 3, "--seed", 0, ranks=2, launcher_options=["--max-restarts=2"])
    wait_for_step(log, 5)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert_as_undisturbed(log, undisturbed(config, 2))
    assert "resumed at step 3" in log.read_text() and [path.name for path in log.parent.iterdir()] == ["000.txt"]


@pytest.mark.slow
def test_without_checkpoints_a_run_starts_over_in_its_log(in_child, config, undisturbed, log):
    process = in_child(config, "--run_id", 0)
    wait_for_step(log, 5)
    process.kill()
    process.join()
    process = in_child(config, "--run_id", 0)
    process.join(120)
    assert process.exitcode == 0 and log.read_text().startswith(PROGRAM.read_text())
    assert "step:5/16 train_time" in log.with_name("000.txt.interrupted").read_text()
    assert_as_undisturbed(log, undisturbed(config, None))


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.slow
@pytest.mark.parametrize("ranks, number", [(None, signal.SIGINT), (None, signal.SIGTERM), (2, signal.SIGTERM)])
def test_a_signal_ends_a_run_with_a_checkpoint(config, undisturbed, log, tmp_path, ranks, number):
    """The steps are made so slow that the run does not end before it stops."""
    options = ["--run_id", 0, "--checkpoint_every", 1000]
    process = start(config, *options, ranks=ranks, program=hurt(tmp_path, SLOW_STEPS))
    wait_for_step(log, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert len(our_lines(errors)) == 1 and "stopped, with a checkpoint" in our_lines(errors)[0]
    assert process.returncode == (128 + number if ranks is None else 1) and 'train_gpt_medium.py", line' not in errors
    step = torch.load(log.with_suffix(".ckpt"), weights_only=True)["step"]
    assert results(log)[2][-1] == step > 3
    status, output, errors = finish(config, *options, ranks=ranks)
    assert status == 0 and f"resumed at step {step} " in output, errors
    assert_as_undisturbed(log, undisturbed(config, ranks))


@pytest.mark.slow
def test_a_signal_ends_a_run_without_checkpoints_at_once(config, log):
    process = start(config, "--run_id", 0)
    wait_for_step(log, 3)
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 143 and len(errors.splitlines()) == 1 and "signal 15" in errors and not log.with_suffix(".ckpt").exists()


# -----------------------------------------------------------------------------
# What goes wrong in a run


@pytest.mark.slow
@pytest.mark.parametrize("hang, frame", [("time.sleep(600)", "in train_step"), ("ctypes.PyDLL(None).sleep(600)", "in train_step")], ids=["waits", "holds the interpreter"])
def test_a_rank_that_hangs_is_ended_with_its_stack(config, log, tmp_path, hang, frame):
    program = hurt(tmp_path, f"""
import ctypes
train.GRACE_S = 1
original = train.Trainer.train_step
def train_step(self, step, *batch):
    if step == 5 and rank == 1:
        {hang}
    return original(self, step, *batch)
train.Trainer.train_step = train_step
""")
    began = time.monotonic()
    status, _, errors = finish(config, *RUN, "--step_timeout", 3, ranks=2, program=program)
    assert status != 0 and time.monotonic() - began < 60
    assert re.search(r'hurt.py", line \d+ ' + frame, errors)
    assert torch.load(log.with_suffix(".ckpt"), weights_only=True)["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_weights_that_are_no_numbers_end_a_run_and_leave_the_checkpoint(config, log, tmp_path, ranks):
    program = hurt(tmp_path, """
original = train.Trainer.train_step
def train_step(self, step, *batch):
    original(self, step, *batch)
    if step == 4:
        self.raw_model.scalars.data[train.NUM_LAYERS] = float("nan")
train.Trainer.train_step = train_step
""")
    status, _, errors = finish(config, *RUN, ranks=ranks, program=program)
    assert status == 1 and len(our_lines(errors)) == 1 and "the weights are not finite at step 6" in our_lines(errors)[0]
    assert torch.load(log.with_suffix(".ckpt"), weights_only=True)["step"] == 3
    assert log.read_text().endswith("ended: the weights are not finite at step 6\n")
    status, _, errors = finish(config, "--run_id", 1, ranks=ranks, program=program)
    assert status == 1 and "the validation loss is nan at step 8" in our_lines(errors)[0]


@pytest.mark.slow
def test_a_rank_ends_also_when_nobody_reads_what_it_says(config, log, tmp_path):
    """As where `| tee` ends before it on Ctrl-C."""
    process = start(config, "--run_id", 0, program=hurt(tmp_path, SLOW_STEPS))
    wait_for_step(log, 2)
    process.stdout.close()
    process.stderr.close()
    process.terminate()
    assert process.wait(timeout=15) == 143


@pytest.mark.slow
def test_final_weights_that_cannot_be_written_leave_the_run_unfinished(config, undisturbed, log):
    status, _, errors = finish(config, "--run_id", 0, "--save_checkpoint", "true", preexec_fn=limit_file_size(1))
    assert status == 1 and "the final weights could not be written" in errors and not train.is_finished(log)
    assert finish(config, "--run_id", 0, "--save_checkpoint", "true")[0] == 0
    assert_as_undisturbed(log, undisturbed(config, None))
    assert torch.load(log.with_suffix(".ckpt"), weights_only=True)["step"] == STEPS


def limit_file_size(megabytes):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6), resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_disk_too_full_for_checkpoints_does_not_end_a_run(config, undisturbed, log):
    """A limit on files' size stands for the full disk: the checkpoint has 27 MB, the log 0.1."""
    status, output, errors = finish(config, *RUN, preexec_fn=limit_file_size(1))
    assert status == 0, errors
    assert output.count("no checkpoint of step") == 5 and "File too large" in output
    assert_as_undisturbed(log, undisturbed(config, None))
    assert [path.name for path in log.parent.iterdir()] == ["000.txt"]


@pytest.mark.slow
def test_a_disk_too_full_for_the_log_ends_a_run_with_one_line(config, undisturbed, log):
    size = undisturbed(config, None).stat().st_size - 500  # all but a few lines
    status, _, errors = finish(config, "--run_id", 0, preexec_fn=limit_file_size(size / 1e6))
    assert status == 1 and len(errors.splitlines()) == 1 and f"{log}: " in errors and "File too large" in errors
    assert not train.is_finished(log)
    assert finish(config, "--run_id", 0)[0] == 0
    assert_as_undisturbed(log, undisturbed(config, None))


# -----------------------------------------------------------------------------
# What is not gone on with


@pytest.fixture
def trainer_at(config, process_group, log):
    """A run of this process that has a checkpoint of step 3: (its trainer, its hyperparameters)."""
    trainer = start_trainer(config, checkpoint_every=3, num_iterations=STEPS)
    log.parent.mkdir(parents=True)
    run_log = train.RunLog(log)
    checkpoints = train.Checkpoints(trainer, run_log, "the program")
    batches = train.train_batches(trainer.hp, 0, 1, trainer.device)
    run_log.to_file("the header")
    for step in range(3):
        trainer.train_step(step, *next(batches))
        run_log.to_file(train.train_line(step + 1, STEPS, 10.0))
    checkpoints.save(3, 30.0)
    checkpoints.wait()
    run_log.to_file(train.train_line(4, STEPS, 40.0))
    run_log.close()
    return SimpleNamespace(trainer=trainer, hp=trainer.hp, config=config, checkpoint=log.with_suffix(".ckpt"), log=log)


def claim(run, code="the program", **changes):
    return train.claim_run(train.replace(run.hp, **changes), run.config, code)


def test_an_interrupted_run_is_gone_on_with(trainer_at):
    claimed = claim(trainer_at)
    assert train.Resume(*claimed.checkpoint["resume"])[:2] == (3, 30.0)
    assert trainer_at.log.read_text().splitlines()[-1] == train.train_line(3, STEPS, 10.0)
    claimed.log.close()


@pytest.mark.parametrize("changes, fragments", [
    (dict(num_iterations=17), ["another configuration", "num_iterations = 16"]),
    (dict(value_embeddings=[[0, 15]]), ["another configuration", "value_embeddings = [[0, 13], [1, 14], [2, 15]]"]),
    (dict(seed=7), ["another configuration", "seed = 0"]),
    (dict(code="a program that was edited"), ["another text of the program"]),
])
def test_a_changed_run_is_refused(trainer_at, changes, fragments):
    before = trainer_at.log.read_bytes()
    with pytest.raises(ValueError) as error:
        claim(trainer_at, **changes)
    assert all(fragment in str(error.value) for fragment in [f"{trainer_at.config}: run_id: {trainer_at.checkpoint}: ", *fragments])
    assert "\n" not in str(error.value) and trainer_at.log.read_bytes() == before


@pytest.mark.parametrize("key, value", [("description", "other words"), ("save_checkpoint", True), ("checkpoint_every", 7), ("step_timeout", 5)])
def test_keys_that_do_not_change_the_result_may_change(trainer_at, key, value):
    assert claim(trainer_at, **{key: value}).checkpoint is not None


def test_a_run_of_a_gpu_is_not_gone_on_with_on_a_cpu(trainer_at):
    torch.save(torch.load(trainer_at.checkpoint, weights_only=True) | {"device": "mps"}, trainer_at.checkpoint)
    with pytest.raises(ValueError, match="the run began on mps and this is"):
        claim(trainer_at)


def test_changed_data_are_refused(trainer_at):
    """As where a shard was made anew: the batch that comes next is not where it was."""
    torch.save(torch.load(trainer_at.checkpoint, weights_only=True) | {"next_batch": ["elsewhere.bin", 5]}, trainer_at.checkpoint)
    with pytest.raises(ValueError, match=r"train_files: the run was to go on at \['elsewhere.bin', 5\], now that is \['s_train_000001.bin', 768\]"):
        claim(trainer_at)


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    lambda data: b"",
    lambda data: b"no checkpoint",
], ids=["half", "one byte short", "one bit", "empty", "text"])
def test_a_damaged_checkpoint_is_refused(trainer_at, damage):
    trainer_at.checkpoint.write_bytes(damage(trainer_at.checkpoint.read_bytes()))
    with pytest.raises(ValueError, match="000.ckpt: not a checkpoint that a run can go on from"):
        claim(trainer_at)


class RunsCode:
    """Unpickling this would run a program."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('this was run')",))


def test_a_checkpoint_cannot_run_code(trainer_at):
    torch.save(torch.load(trainer_at.checkpoint, weights_only=True) | {"random_states": RunsCode()}, trainer_at.checkpoint)
    with pytest.raises(ValueError, match="not a checkpoint that a run can go on from"):
        claim(trainer_at)


def test_a_finished_log_is_never_cut(trainer_at):
    """Also where something was written behind its end."""
    trainer_at.log.write_text(trainer_at.log.read_text() + "peak memory resident: 1 MiB\n# a note\n")
    with pytest.raises(ValueError, match="run 0 is finished"):
        claim(trainer_at)


def test_final_weights_are_gone_on_with_to_the_end(trainer_at):
    """A run that was killed between its last checkpoint and its last line has its last validation in the log already."""
    start = train.Resume(STEPS, 30.0, 0, 1, with_optimizers=False)
    log = train.RunLog(None)
    assert train.train(trainer_at.trainer, log, train.Checkpoints(trainer_at.trainer, log, ""), start) == 30.0


def test_a_log_that_has_become_shorter_is_refused(trainer_at):
    os.truncate(trainer_at.log, 20)
    with pytest.raises(ValueError, match="shorter than when the run's checkpoint was written"):
        claim(trainer_at)


def test_a_run_that_another_process_is_at_is_refused(trainer_at, monkeypatch):
    monkeypatch.setattr(train, "LOCK_WAIT_S", 1)
    first = claim(trainer_at)
    with pytest.raises(ValueError, match="another process is at this run"):
        claim(trainer_at)
    first.log.close()


# -----------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_is_the_inverse_of_collecting(config, process_group, dtype):
    """Also of bf16 weights, whose lower 16 bits are in the optimizer's state, to the last bit."""
    trainers = []
    for seed in (0, 1):
        trainer = start_trainer(config, seed=seed)
        if dtype == torch.bfloat16:
            trainer.raw_model.use_bf16()
            trainer.optimizers = train.make_optimizers(trainer.raw_model, 0, 1)
        for number, p in enumerate(trainer.raw_model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + number)).to(p.dtype)
        for optimizer in trainer.optimizers:
            optimizer.step()
        trainers.append(trainer)
    first, second = trainers
    assert not any(torch.equal(a, b) for a, b in zip(weights_and_states(first), weights_and_states(second)) if a.numel() > 1)
    second.restore(first.collect(with_optimizers=True), with_optimizers=True)
    assert len(weights_and_states(first)) == len(weights_and_states(second)) and all(map(torch.equal, weights_and_states(first), weights_and_states(second)))


def test_random_states_go_on(config, process_group):
    trainer = start_trainer(config)
    collected = trainer.collect(with_optimizers=False)
    expected = torch.randn(5)
    trainer.restore(collected, with_optimizers=False)
    assert torch.equal(torch.randn(5), expected)


def test_a_checkpoint_holds_what_was_when_it_was_taken(config, process_group, tmp_path):
    """The weights go on changing while it is written."""
    trainer = start_trainer(config)
    collected = trainer.collect(with_optimizers=True)
    before = {name: w.clone() for name, w in collected["model"].items()}
    for p in trainer.raw_model.parameters():
        p.data.add_(1)
    assert all(torch.equal(w, before[name]) for name, w in collected["model"].items())


def test_the_clock_stands_still_while_a_checkpoint_is_taken(config, process_group, tmp_path, monkeypatch):
    trainer, log = start_trainer(config, num_iterations=4, checkpoint_every=2), train.RunLog(tmp_path / "log.txt")
    checkpoints = train.Checkpoints(trainer, log, "the program")
    now, saved = time.perf_counter, []
    monkeypatch.setattr(checkpoints, "save", lambda step, ms: saved.append(step))  # each takes an hour
    monkeypatch.setattr(train.time, "perf_counter", lambda: now() + 3600 * len(saved))
    assert train.train(trainer, log, checkpoints) < 3_600_000 and saved == [2, 4]
    log.close()


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    train.write_checkpoint(tmp_path / "000.ckpt", {"step": 1})
    monkeypatch.setattr(torch, "save", lambda checkpoint, file: file.write(b"half") and (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.write_checkpoint(tmp_path / "000.ckpt", {"step": 2})
    assert torch.load(tmp_path / "000.ckpt", weights_only=True) == {"step": 1}
