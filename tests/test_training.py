"""Training: the golden trajectories through the whole program, the log, the timing and the warm-up."""

import re
import time

import pytest
import tomllib
import torch
from golden import CASES, golden_weights, write_golden_case
from helpers import (
    PROGRAM,
    TRAIN_LINE,
    VAL_LINE,
    run_program,
    start_trainer,
    val_losses,
    weights_and_states,
    write_config,
)

import train_gpt_medium as train


def assert_golden(losses, name):
    """Every validation loss is that of the published script's own functions; they are printed, and the figures given, with 6 decimals."""
    expected = {int(step): loss for step, loss in CASES[name]["val_loss"].items()}
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, abs=CASES[name]["tolerance"], rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_golden_trajectory(name, in_child, tmp_path):
    process = in_child(write_golden_case(name, tmp_path))
    process.join(600)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0, output
    assert_golden(val_losses(output), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline_long", "add_5_short", "baseline_wide"])
def test_golden_trajectory_on_two_ranks(name, tmp_path):
    result = run_program(write_golden_case(name, tmp_path), ranks=2)
    assert result.returncode == 0, result.stderr
    assert_golden(val_losses(result.stdout), name)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, small_data):
    """A run of 4 steps on 2 ranks: (its hyperparameters, the finished process, the log's text)."""
    folder = tmp_path_factory.mktemp("finished_run")
    config = write_config(
        folder / "short.toml", train_files=f"{small_data}/s_train_*.bin", val_files=f"{small_data}/s_val_*.bin", log_dir=f"{folder}/logs",
        vocab_size=256, num_heads=1, model_dim=128, train_seq_len=128, val_seq_len=256, val_tokens=1024, num_iterations=4, val_loss_every=3,
        warmup_steps=1, description='quotes " and ünicode', cooldown_frac=0.5,
    )
    process = run_program(config, "--seed", 5, "--sequences_per_step", 4, ranks=2)
    assert process.returncode == 0, process.stderr
    return config, process, (folder / "logs" / "short" / "000.txt").read_text()


def test_the_log_opens_with_the_program_text(finished_run):
    _, _, log = finished_run
    assert log.startswith(PROGRAM.read_text())


def test_the_log_holds_the_resolved_configuration_as_toml(finished_run):
    config, _, log = finished_run
    text = log[len(PROGRAM.read_text()) :].split("=" * 100)[1]
    assert tomllib.loads(text) == {
        **{name: f.default for name, f in train.KEYS.items() if isinstance(f.default, (int, float, str))},
        **tomllib.loads(config.read_text()), "value_embeddings": [[0, 13], [1, 14], [2, 15]], "fast_paths": [], "seed": 5, "run_id": 0, "sequences_per_step": 4,
    }


def test_the_log_names_the_environment(finished_run):
    _, _, log = finished_run
    assert f"Running PyTorch {torch.__version__}" in log and "device: 2 ranks, CPU" in log
    assert train.draw_map([[0, 13], [1, 14], [2, 15]]) in log


def test_validations_are_at_step_0_every_so_often_and_at_the_last(finished_run):
    _, process, log = finished_run
    lines = [(int(match[1]), int(match[2])) for match in VAL_LINE.finditer(log)]
    assert lines == [(0, 4), (3, 4), (4, 4)]
    assert val_losses(process.stdout) == val_losses(log)


def test_every_step_has_its_line_in_log_and_output(finished_run):
    _, process, log = finished_run
    for text in (log, process.stdout):
        assert [(int(match[1]), int(match[2])) for match in TRAIN_LINE.finditer(text)] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_train_time_grows_with_training_only(finished_run):
    """A validation's time is that of the step before it: what came between is not timed. step_avg divides by max(step, 1)."""
    _, _, log = finished_run
    train_ms = {int(match[1]): int(match[3]) for match in TRAIN_LINE.finditer(log)}
    for match in VAL_LINE.finditer(log):
        step, time_ms, step_avg = int(match[1]), int(match[4]), float(match[5])
        assert time_ms == pytest.approx(train_ms.get(step, 0), abs=50)
        assert step_avg == pytest.approx(time_ms / max(step, 1), abs=0.6)
    assert 0 < train_ms[1] < train_ms[2] < train_ms[3] < train_ms[4]


def test_validation_is_not_timed_and_the_clock_waits_for_all_ranks(small_config, process_group, tmp_path, monkeypatch):
    """Validations that sleep add nothing to any line's time; each is between two barriers that stop and start the clock."""
    trainer, events = start_trainer(small_config()), []
    monkeypatch.setattr(trainer, "validate", lambda step: events.append("validate") or time.sleep(5) or 1.0)
    monkeypatch.setattr(trainer, "train_step", lambda *_: events.append("step"))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("barrier"))
    log = train.RunLog(tmp_path / "log.txt")
    train.train(trainer, log, train.Checkpoints(trainer, log, "the program"))
    log.close()
    text = (tmp_path / "log.txt").read_text()
    assert all(int(match[3]) < 2000 for match in TRAIN_LINE.finditer(text)) and all(int(match[4]) < 2000 for match in VAL_LINE.finditer(text))
    validation = ["barrier", "validate", "barrier"]
    assert events == ["barrier", *validation, "step", "step", *validation, "step", "step", *validation]


def test_the_log_ends_with_peak_memory(finished_run):
    _, process, log = finished_run
    assert re.fullmatch(r"peak memory resident: \d+ MiB", log.splitlines()[-1])
    assert log.splitlines()[-1] in process.stdout


def test_lines_to_the_letter():
    assert train.val_line(125, 5960, 4.32568, 27923.4) == "step:125/5960 val_loss:4.325680 train_time:27923ms step_avg:223.39ms"
    assert train.val_line(0, 5960, 10.82584, 0.17) == "step:0/5960 val_loss:10.825840 train_time:0ms step_avg:0.17ms"
    assert train.train_line(126, 5960, 28146.0) == "step:126/5960 train_time:28146ms step_avg:223.38ms"


def everything(trainer):
    return [*weights_and_states(trainer), torch.get_rng_state()]


def test_warm_up_leaves_no_trace(small_config, process_group):
    """As if it had not run: right after it, and after some steps and a validation more, to the last bit."""
    results = []
    for warmup_steps in (0, 2):
        trainer = start_trainer(small_config(), warmup_steps=warmup_steps)
        trainer.warm_up()
        after_warm_up = everything(trainer)
        batches = train.train_batches(trainer.hp, 0, 1, trainer.device)
        for step in range(3):
            trainer.train_step(step, *next(batches))
        results.append((after_warm_up, everything(trainer), trainer.validate(3)))
    (before_a, after_a, loss_a), (before_b, after_b, loss_b) = results
    assert len(before_a) == len(before_b) < len(after_a) == len(after_b)
    assert all(torch.equal(a, b) for a, b in zip(before_a + after_a, before_b + after_b))
    assert loss_a == loss_b
    assert not torch.equal(after_a[0], before_a[0])


def test_the_warm_up_runs_training_and_validation(small_config, process_group, monkeypatch):
    trainer = start_trainer(small_config(), warmup_steps=2)
    seen = []
    trainer.raw_model.register_forward_hook(lambda module, args, loss: seen.append((len(args[0]), loss.requires_grad)))
    trainer.warm_up()
    assert seen == [(128, True)] * 8 + [(256, False)]


@pytest.mark.parametrize("every, steps", [(0, [4]), (2, [0, 2, 4]), (3, [0, 3, 4]), (10, [0, 4])])
def test_val_loss_every(small_config, process_group, tmp_path, every, steps):
    trainer = start_trainer(small_config(), val_loss_every=every)
    log = train.RunLog(tmp_path / "log.txt")
    train.train(trainer, log, train.Checkpoints(trainer, log, "the program"))
    log.close()
    assert list(val_losses((tmp_path / "log.txt").read_text())) == steps


def test_accumulated_gradients_are_the_mean_over_the_sequences(small_config, process_group):
    """Four sequences of one rank give the gradient of their mean loss."""
    trainer = start_trainer(small_config())
    trainer.raw_model.load_state_dict(golden_weights(3, 128, 256))
    inputs, targets = next(train.train_batches(trainer.hp, 0, 1, trainer.device))
    losses = [trainer.model(sequence, sequence_targets, trainer.window(0)) for sequence, sequence_targets in zip(inputs, targets)]
    expected = torch.autograd.grad(torch.stack(losses).mean(), trainer.raw_model.value_embeds[0].weight)[0]
    gradients = {}
    trainer.optimizers[0].register_step_pre_hook(lambda *_: gradients.update(table=trainer.raw_model.value_embeds[0].weight.grad.clone()))
    trainer.train_step(0, inputs, targets)
    assert (gradients["table"] - expected).norm() / expected.norm() < 1e-6


def test_runs_of_one_seed_are_equal_and_of_another_differ(small_config, process_group):
    weights = [start_trainer(small_config(), seed=seed).raw_model.embed.weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_run_ids_count_up_and_are_the_seed(small_config, process_group):
    config = small_config()
    hp = train.load_hyperparameters(config, {})
    for expected in range(3):
        claim = train.claim_run(hp, config, "the program")
        claim.log.close()
        assert (claim.run_id, claim.log.path.name, claim.checkpoint) == (expected, f"{expected:03d}.txt", None)
        assert train.resolve(hp, claim.run_id).seed == expected
    (claim.log.path.parent / "003.ckpt").touch()
    assert train.choose_run_id(hp, config) == 4


@pytest.mark.slow
def test_the_validation_loss_does_not_depend_on_the_world_size(small_config):
    losses = []
    for ranks in (1, 2, 4):
        result = run_program(small_config(num_iterations=2, val_loss_every=1), "--seed", 1, ranks=ranks)
        assert result.returncode == 0, result.stderr
        losses.append(val_losses(result.stdout))
    assert losses[1] == pytest.approx(losses[0], abs=2e-6) and losses[2] == pytest.approx(losses[0], abs=2e-6)
