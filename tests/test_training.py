"""Test the step, the loop and the log of a run. The golden trajectories are in test_golden.py."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from faults import Ranks
from golden import golden_weights
from helpers import TRAIN_LINE, VAL_LINE, relative_error, start_trainer, val_losses, weights_and_states

import train_gpt_medium as train
from configs import checks
from data.loader import train_batches
from logs import checkpoint, distributed, log_format, run_log


def train_to_end(trainer, path):
    """Run the loop from step 0, without signals; return the log's text."""
    train.train(trainer, run_log.RunLog(path), {}, SimpleNamespace(poll=lambda: 0), first_step=0, time_ms=0.0)
    return path.read_text()


def batches_of(trainer):
    hp = trainer.hp
    return train_batches(trainer.train_shards, hp.sequences_per_step, hp.train_seq_len, 0, hp.num_iterations, 0, 1,
                         trainer.device)


@pytest.fixture
def fast_muon(monkeypatch):
    """Replace Newton-Schulz, most of a small model's step, where its result does not matter."""
    monkeypatch.setattr(train, "newton_schulz", lambda u: u / (u.norm() + 1e-7))


@pytest.fixture
def no_training(monkeypatch):
    """Log the last validation instead of training."""
    monkeypatch.setattr(train, "train", lambda trainer, log, *_: log.validation_line(4, 4, 1.0, 5.0))


# -----------------------------------------------------------------------------
# The step


def test_accumulated_gradients_are_the_mean_over_the_sequences(small_config, process_group, fast_muon):
    """Two sequences of one rank give the gradient of their mean loss."""
    trainer = start_trainer(small_config(sequences_per_step=2))
    table = trainer.model.value_embeds[0].weight
    trainer.model.load_state_dict(golden_weights([[0, 13], [1, 14], [2, 15]], 128, 256))
    inputs, targets = next(batches_of(trainer))
    losses = [trainer.loss(0, *sequence) for sequence in zip(inputs, targets)]
    expected = torch.autograd.grad(torch.stack(losses).mean(), table)[0]
    found = []
    trainer.optimizers[0].register_step_pre_hook(lambda *_: found.append(table.grad.clone()))
    trainer.train_step(0, inputs, targets)
    assert relative_error(found[0], expected) < 1e-6


def test_a_parameter_without_a_gradient_is_named(small_config, process_group):
    trainer = start_trainer(small_config(sequences_per_step=1))
    trainer.model.sources_by_layer = [[k for k in tables if k != 1] for tables in trainer.model.sources_by_layer]
    batch = next(batches_of(trainer))
    with pytest.raises(ValueError, match="parameter value_embeds.1.weight got no gradient: .* use it in GPT.forward"):
        trainer.train_step(0, *batch)


def test_warm_up_runs_training_and_validation_and_leaves_no_trace(small_config, process_group, fast_muon):
    """As if it had not run: right after it, and after two steps and a validation more, to the last bit."""
    results, seen = [], []
    for warmup_steps in (0, 2):
        trainer = start_trainer(small_config(sequences_per_step=1, val_tokens=256), warmup_steps=warmup_steps)
        hook = trainer.model.register_forward_hook(
            lambda module, args, loss: seen.append((len(args[0]), loss.requires_grad)))
        seconds = trainer.warm_up()  # of a step and of a validation
        hook.remove()
        before = weights_and_states(trainer)
        batches = batches_of(trainer)
        for step in range(2):
            trainer.train_step(step, *next(batches))
        results.append((before, weights_and_states(trainer), trainer.validate(2)))
    assert min(seconds) > 0 and seen == [(128, True)] * 2 + [(256, False)] * 2
    (before_a, after_a, loss_a), (before_b, after_b, loss_b) = results
    assert len(before_a) == len(before_b) < len(after_a) == len(after_b)
    assert all(map(torch.equal, before_a + after_a, before_b + after_b)) and loss_a == loss_b
    assert not torch.equal(after_a[0], before_a[0])


def test_a_training_loss_is_logged_a_step_late(small_config, process_group, fast_muon, monkeypatch, tmp_path):
    """It is the loss of one sequence before the update, and no parser of step lines sees its line."""
    monkeypatch.setattr(distributed, "PRINT_EVERY", 2)
    trainer, losses = start_trainer(small_config(sequences_per_step=2, num_iterations=4, val_loss_every=0)), []
    trainer.model.register_forward_hook(lambda module, args, loss: loss.requires_grad and losses.append(loss.item()))
    lines = train_to_end(trainer, tmp_path / "000.txt").splitlines()
    line = f"training loss in step 2 (last sequence of rank 0): {losses[3]:.4f}"
    assert lines[2].startswith("step:3/4 ") and lines[3] == line and len(lines) == 7
    assert lines[5].startswith("training loss in step 4 (") and lines[6].startswith("step:4/4 val_loss:")
    assert len([*log_format.parse_step_lines("\n".join(lines))]) == 5


def test_a_training_loss_waits_for_its_copy(process_group, tmp_path):
    """On a GPU, the copy can take longer than a step. No step waits for it."""
    log, done = run_log.RunLog(tmp_path / "000.txt"), [False, False, True, True]
    copy = distributed.LossCopy(log, torch.device("cpu"))
    copy.event = SimpleNamespace(query=lambda: done.pop(0), record=lambda: None)
    for step in (24, 25, 26, 27, 28, 29):
        copy.update(step, torch.tensor(step / 10))
    assert log.path.read_text() == "training loss in step 25 (last sequence of rank 0): 2.5000\n" and done == [True]


@pytest.mark.slow
def test_all_ranks_reduce_each_gradient_once_and_in_one_order_during_the_last_backward(small_config, tmp_path):
    fault = """
before(train.Trainer, "loss", lambda: print("sequence", flush=True))
before(train.Trainer, "start_reduction", None, lambda trainer, p: trainer.is_last_sequence and print(
    next(name for name, q in trainer.parameters.items() if q is p), flush=True))"""
    run = Ranks(tmp_path / "output", small_config(num_iterations=2, val_loss_every=0), ranks=2, fault=fault)
    assert run.statuses() == [0, 0], run.output("stderr")
    names, lines = {*golden_weights([[0, 13], [1, 14], [2, 15]], 128, 256)}, []
    for rank in (0, 1):
        words = (tmp_path / f"output/stdout.{rank}").read_text().splitlines()
        lines.append([word for word in words if word in names | {"sequence"}])
    of_step = lines[0][: 2 + len(names)]
    assert lines[0] == lines[1] == 2 * of_step + 2 * ["sequence"]  # the validation has two for each rank, too
    assert of_step[:3] == ["sequence", "sequence", "lm_head_w"] and {*of_step[2:]} == names


def test_the_backward_compiles_nothing(small_config, process_group, monkeypatch):
    """On CUDA it runs in a thread of its own, which does not know the compiler's options."""
    maps = [[0], {"layers": [1, 3], "source": "embedding"}]
    torch._dynamo.reset()
    trainer = start_trainer(small_config(value_embeddings=maps, sequences_per_step=1))
    batch, compiled, compile_with = next(batches_of(trainer)), [], torch.compile
    monkeypatch.setattr(train.Share, "sum_gradients", None)
    monkeypatch.setattr(torch._dynamo.callback_handler, "end_callbacks", [compiled.append])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **options: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: (
        compile_with(function, **options | {"backend": "eager"}) if function is train.sum_tensors else function))
    trainer.model.compile_parts(128)
    assert len(compiled) == 1
    trainer.loss(0, batch[0][0], batch[1][0]).backward()
    assert len(compiled) == 1


@pytest.mark.parametrize("is_tuned, limit_s", [("false", 1200), ("true", 3600)])
def test_each_compiled_part_resets_the_watchdog_and_a_tuned_start_logs_it(run_main, small_config, tmp_path, monkeypatch,
                                                                          no_training, is_tuned, limit_s):
    limits = []
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.callback_handler, "end_callbacks", [])
    monkeypatch.setattr(train.Trainer, "warm_up", lambda _: torch.compile(lambda x: -x, backend="eager")(torch.ones(2)))
    monkeypatch.setattr(distributed, "reset_watchdog", limits.append)
    assert run_main(small_config(), "--coordinate_descent_tuning", is_tuned) == 0 and limits == [limit_s]
    text = (tmp_path / "logs/small/000.txt").read_text()
    assert len(re.findall(r"^warm-up: tuning part 0/0 after \d+ s$", text, re.MULTILINE)) == (is_tuned == "true")


# -----------------------------------------------------------------------------
# The loop, with steps and validations that take no time


@pytest.fixture
def trainer(small_config, process_group, monkeypatch):
    """A trainer that notes its steps and validations in `events`, as do the barriers and checkpoints."""
    trainer = start_trainer(small_config(num_iterations=6, val_loss_every=0, checkpoint_every=0))
    events = trainer.events = []
    monkeypatch.setattr(trainer, "validate", lambda step: events.append("validate") or 1.0)
    monkeypatch.setattr(trainer, "train_step", lambda *_: events.append("step"))
    monkeypatch.setattr(distributed, "synchronize", lambda device: events.append("barrier") or time.perf_counter())
    monkeypatch.setattr(checkpoint, "write", lambda path, state: events.append(f"checkpoint {state['step']}"))
    return trainer


@pytest.mark.parametrize("every, validations, checkpoints", [
    (0, [6], []), (1, [0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]), (4, [0, 4, 6], [4]), (7, [0, 6], [])])
def test_validations_are_at_step_0_every_so_often_and_at_the_last_and_checkpoints_every_so_often(
        trainer, tmp_path, every, validations, checkpoints):
    trainer.hp = train.replace(trainer.hp, val_loss_every=every, checkpoint_every=every)
    assert list(val_losses(train_to_end(trainer, tmp_path / "log.txt"))) == validations
    assert [event for event in trainer.events if "checkpoint" in event] == [f"checkpoint {n}" for n in checkpoints]


def test_only_training_is_timed_between_synchronizations_of_all_ranks(trainer, tmp_path, monkeypatch):
    """Each step takes a second, each validation and checkpoint an hour."""
    trainer.hp = train.replace(trainer.hp, val_loss_every=3, checkpoint_every=4)
    seconds = dict(step=1, barrier=0)
    monkeypatch.setattr(time, "perf_counter", lambda: sum(seconds.get(event, 3600) for event in trainer.events))
    text = train_to_end(trainer, tmp_path / "log.txt")
    assert [(int(m[1]), int(m[4]), m[5]) for m in VAL_LINE.finditer(text)] == [
        (0, 0, "0.00"), (3, 3000, "1000.00"), (6, 6000, "1000.00")]
    assert [(int(m[1]), int(m[3])) for m in TRAIN_LINE.finditer(text)] == [(n, 1000 * n) for n in range(1, 7)]
    validation = ["barrier", "validate", "barrier"]
    assert trainer.events == ["barrier", *validation, "step", "step", "step", *validation, "step", "barrier",
                              "checkpoint 4", "barrier", "step", "step", *validation]


# -----------------------------------------------------------------------------
# The log of a whole run


def test_the_log_of_a_run_from_its_first_line_to_its_last(run_main, small_config, tmp_path, fast_muon):
    """Program text, resolved configuration, environment, a line for each step and validation, and how it ended."""
    config = small_config(val_tokens=256, val_loss_every=3, warmup_steps=1, description='quotes " and ünicode')
    assert run_main(config, "--seed", 5, "--sequences_per_step", 1) == 0
    path = tmp_path / "logs" / "small" / "000.txt"
    code, header = log_format.read_header(path)
    configuration = {name: header[name] for name in vars(train.Hyperparameters())}
    words = (line.partition(" = ") for line in config.read_text().splitlines())
    keys = {name: json.loads(value) for name, _, value in words}
    assert code == log_format.program_text()
    assert configuration == vars(train.Hyperparameters()) | keys | dict(seed=5, run_id=0, sequences_per_step=1)
    _, _, environment, lines = path.read_text().split(f"{log_format.RULE}\n")
    assert f"Running PyTorch {torch.__version__}" in environment and "device: 1 rank, CPU" in environment
    assert train.check_run(train.Hyperparameters(**configuration), config, 1) in environment
    assert [name for name, *_ in header["train_data"]] == ["s_train_000001.bin"] and header["device"] == "cpu"
    assert checks.warn_of_documents(header["val_documents"]) in environment
    assert [(int(match[1]), int(match[2])) for match in VAL_LINE.finditer(lines)] == [(0, 4), (3, 4), (4, 4)]
    assert [(int(match[1]), int(match[2])) for match in TRAIN_LINE.finditer(lines)] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    *_, peak, curve, command, ended = lines.splitlines()
    assert 100 < int(re.fullmatch(r"peak memory resident: (\d+) MiB", peak)[1]) < 100_000
    assert ended.endswith(": finished")
    assert "estimate: at least 0 min, for 4 steps of " in lines and " ms and 3 validations of " in lines
    assert curve.startswith("validations after step 0: ") and command.startswith("compare: ./run.sh compare ")


def test_run_ids_count_up_and_are_the_seed(run_main, small_config, tmp_path, no_training):
    config = small_config()
    assert [run_main(config, "--seed", 9), run_main(config)] == [0, 0]
    found = [log_format.read_header(tmp_path / f"logs/small/{number:03d}.txt")[1] for number in (0, 1)]
    assert [(configuration["run_id"], configuration["seed"]) for configuration in found] == [(0, 9), (1, 1)]
