"""logs/checkpoint.py: weights to start from, the state of an interrupted run, and what is refused."""

import os

import faults
import pytest
import torch
from golden import golden_weights
from helpers import start_trainer, val_losses, weights_and_states

import train_gpt_medium as train
from data.batches import train_batches
from logs import checkpoint, log_file, weights
from logs.log_file import BOOKKEEPING_KEYS
from logs.resume import Run, must_equal
from logs.run_log import RunLog

BASELINE = [[0, 13], [1, 14], [2, 15]]
HP = train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=256, train_seq_len=128, val_seq_len=128)

# -----------------------------------------------------------------------------
# Files


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(sorted(path.name for path in tmp_path.iterdir())))
    checkpoint.write(tmp_path / "000.ckpt", {"step": 1})
    assert names == [["000.ckpt.unfinished"], ["000.ckpt"]]


# -----------------------------------------------------------------------------
# Weights to start from


def read(path, content, **save_options):
    torch.save(content, path, **save_options)
    return weights.read_weights(str(path), train.model_on_meta(HP))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("save_options", [{}, dict(_use_new_zipfile_serialization=False)])
def test_published_checkpoints_are_read_with_or_without_the_prefix(tmp_path, prefix, save_options):
    weights = golden_weights(BASELINE, 128, 256)
    model = {prefix + name: w for name, w in weights.items()}
    published = dict(step=5960, code="text", model=model, optimizers=[{"state": {}}])
    found = read(tmp_path / "a.pt", published, **save_options)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], w) for name, w in weights.items())


def test_bf16_weights_of_a_published_checkpoint_are_loaded_exactly(tmp_path):
    weights = golden_weights(BASELINE, 128, 256)
    weights |= {name: w.bfloat16() for name, w in weights.items() if name not in ("lm_head_w", "scalars")}
    model = train.GPT(HP)
    model.load_state_dict(read(tmp_path / "a.pt", dict(model=weights)))
    assert all(torch.equal(model.state_dict()[name], w.float()) for name, w in weights.items())


NOT_PLAIN = "scalars is not a plain tensor of finite numbers"


@pytest.mark.parametrize("change, complaint", [
    (lambda w: w.pop("value_embeds.2.weight"), "value_embeds.2.weight is missing"),
    (lambda w: w.update({"value_embeds.3.weight": w["embed.weight"]}), "value_embeds.3.weight is not in this model"),
    (lambda w: w.update({"scalars": torch.zeros(79)}), r"scalars is \[79\] instead of \[80\]"),
    (lambda w: w.update({"scalars": 3}), r"scalars is int instead of \[80\]"),
    (lambda w: w.update({"scalars": torch.zeros(80, dtype=torch.int64)}), NOT_PLAIN),
    (lambda w: w.update({"scalars": torch.zeros(80, dtype=torch.complex64)}), NOT_PLAIN),
    (lambda w: w.update({"scalars": torch.zeros(80, device="meta")}), NOT_PLAIN),
    (lambda w: w.update({"scalars": torch.zeros(80).to_sparse()}), NOT_PLAIN),
    (lambda w: w["scalars"][7].fill_(torch.nan), NOT_PLAIN),
    (lambda w: w["scalars"][7].fill_(torch.inf), NOT_PLAIN),
])
def test_weights_that_do_not_fit_are_refused(tmp_path, change, complaint):
    weights = golden_weights(BASELINE, 128, 256)
    change(weights)
    with pytest.raises(ValueError, match=f"{tmp_path}/a.pt: parameter {complaint}"):
        read(tmp_path / "a.pt", {"model": weights})


@pytest.mark.parametrize("make", [
    lambda path: path.touch(), lambda path: path.write_text("no checkpoint"), lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"weights": {}}, path), lambda path: torch.save({"model": 3}, path),
    lambda path: torch.save(faults.RunsCode(), path), lambda path: torch.save({"model": faults.RunsCode()}, path)])
def test_a_file_that_has_no_weights_or_would_run_code_is_refused(tmp_path, make):
    make(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt: not a checkpoint that can be read safely .*; name a torch.save of"):
        weights.read_weights(str(tmp_path / "a.pt"), train.model_on_meta(HP))


def test_the_final_weights_have_the_published_form_and_can_be_started_from(run_main, small_config, tmp_path):
    keys = dict(val_seq_len=128, val_tokens=256, sequences_per_step=1, num_iterations=2, value_embedding_gate=True)
    folder = tmp_path / "logs" / "small"
    assert run_main(small_config(save_checkpoint=True, **keys)) == 0
    final = torch.load(folder / "000.ckpt", weights_only=True)
    assert (final["step"], final["code"]) == (2, log_file.read_header(folder / "000.txt")[0])
    assert set(final["model"]) == {"_orig_mod." + name for name in golden_weights(BASELINE, 128, 256, gate=True)}
    assert run_main(small_config(init_from=f"{folder}/000.ckpt", **keys)) == 0
    first, second = (val_losses((folder / name).read_text()) for name in ("000.txt", "001.txt"))
    assert second[0] == pytest.approx(first[2], abs=2e-6)  # with one block, the window is the same
    assert sorted(path.name for path in folder.iterdir()) == ["000.ckpt", "000.txt", "001.txt"]


# -----------------------------------------------------------------------------
# The state of an interrupted run


def trainer_after_a_step(small_config):
    keys = dict(value_embeddings=[*BASELINE, [0, 15]], value_embedding_gate=True, sequences_per_step=1)
    trainer = start_trainer(small_config(**keys))
    trainer.train_step(0, *next(train_batches(trainer.train_shards, trainer.hp, 0, 1, trainer.device)))
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restore_is_the_inverse_of_copy_state_to_the_bit(small_config, process_group, tmp_path, monkeypatch, dtype):
    """With gates, several tables and, as on a GPU, mantissas."""
    if dtype == torch.bfloat16:
        monkeypatch.setattr(train.GPT, "__init__", train.GPT.__init__)  # to be put back after the test
        faults.use_bf16()
    trainer = trainer_after_a_step(small_config)
    checkpoint.write(tmp_path / "a.ckpt", checkpoint.copy_state(trainer.model, *trainer.optimizers))
    other = start_trainer(tmp_path / "small.toml", seed=1)
    checkpoint.restore(checkpoint.load(tmp_path / "a.ckpt"), other.model, *other.optimizers)
    expected, restored = weights_and_states(trainer), weights_and_states(other)
    assert {x.dtype for x in expected} >= {dtype} and len(expected) > 100
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, restored, strict=True))


def test_a_weight_or_state_that_is_not_finite_is_found(small_config, process_group):
    trainer = trainer_after_a_step(small_config)
    adamw, muon = trainer.optimizers
    state, buffer = adamw.state[trainer.model.scalars], muon.state[trainer.model.blocks[3].mlp.fc_w]["momentum_buffer"]
    for tensor in (trainer.model.scalars.data, state["exp_avg"], state["exp_avg_sq"], buffer.view(-1)):
        for bad in (torch.nan, -torch.inf):
            assert checkpoint.is_finite_everywhere(trainer.model, trainer.optimizers)
            good, tensor[5] = tensor[5].clone(), bad
            assert not checkpoint.is_finite_everywhere(trainer.model, trainer.optimizers)
            tensor[5] = good


# -----------------------------------------------------------------------------
# What a run goes on from; what is refused is in test_faults.py


def test_all_but_what_may_change_must_be_equal(small_config, process_group):
    trainer = start_trainer(small_config(sequences_per_step=1))
    run = Run(None, trainer.hp, trainer.device, "the program", RunLog(None))
    found = must_equal(run, trainer.train_shards, 1)
    assert set(found) == {"program text", "device", "next batch", *(set(vars(HP)) - BOOKKEEPING_KEYS)}
    assert (found["program text"], found["device"], found["seed"]) == ("the program", "cpu", 0)
    assert found["next batch"] == ["s_train_000001.bin", 128]
