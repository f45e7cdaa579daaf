"""logs/checkpoint.py: initial weights, the state of a run, and files that are refused. test_faults.py resumes runs."""

import os
import re

import pytest
import torch
from faults import RunsCode
from golden import golden_weights
from helpers import model_on_meta, start_trainer, val_losses, weights_and_states

import train_gpt_medium as train
from logs import checkpoint, log_format, run_log

BASELINE = [[0, 13], [1, 14], [2, 15]]
HP = train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=256, train_seq_len=128, val_seq_len=128)
WEIGHTS = golden_weights(BASELINE, HP.model_dim, HP.vocab_size)


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(os.listdir(tmp_path)))
    checkpoint.write(tmp_path / "000.ckpt", {"step": 1})
    assert names == [["000.ckpt.unfinished"], ["000.ckpt"]]


@pytest.mark.parametrize("prefix, is_zip", [("", True), ("_orig_mod.", False)])
def test_published_checkpoints_are_read_exactly_in_bf16_too(tmp_path, prefix, is_zip):
    stored = {name: w if name in ("lm_head_w", "scalars") else w.bfloat16() for name, w in WEIGHTS.items()}
    published = dict(step=5960, code="text", model={prefix + name: w for name, w in stored.items()}, optimizers=[{}])
    torch.save(published, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    model = train.GPT(HP)
    model.load_state_dict(checkpoint.read_weights(f"{tmp_path}/a.pt", model))
    assert all(torch.equal(w, stored[name].float()) for name, w in model.state_dict().items())


NO_NUMBERS = [torch.zeros(80, dtype=torch.int64), torch.zeros(80, dtype=torch.complex64), torch.zeros(80).to_sparse(),
              torch.zeros(80, device="meta"), torch.full((80,), torch.nan), torch.full((80,), torch.inf)]
NO_CHECKPOINTS = [b"", b"no checkpoint", [1, 2], {"weights": {}}, {"model": 3}, RunsCode(), {"model": RunsCode()}]


@pytest.mark.parametrize("content, complaint", [
    ({"model": WEIGHTS | {"scalars": 3}}, r"parameter scalars is int instead of \[80\]"),
    ({"model": WEIGHTS | {"scalars": torch.zeros(79)}}, r"parameter scalars is \[79\] instead of \[80\]"),
    ({"model": WEIGHTS | {"value_embeds.3.weight": WEIGHTS["embed.weight"]}}, "parameter value_embeds.3.* not in this"),
    *(({"model": WEIGHTS | {"scalars": w}}, "parameter scalars is not a plain tensor of finite n") for w in NO_NUMBERS),
    *((content, "not a checkpoint that can be read safely .*; name a file from torch") for content in NO_CHECKPOINTS)])
def test_weights_that_do_not_fit_or_would_execute_code_are_refused(tmp_path, content, complaint):
    """test_mistakes.py has a missing weight."""
    path = tmp_path / "a.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"{path}: {complaint}"):
        checkpoint.read_weights(str(path), model_on_meta(HP))


@pytest.mark.slow
def test_the_final_weights_have_the_published_form_and_can_start_a_run(run_main, small_config, tmp_path):
    """The log says when and where the run began and ended."""
    keys = dict(val_seq_len=128, val_tokens=256, sequences_per_step=1, num_iterations=2)
    log, other = tmp_path / "logs/small/000.txt", tmp_path / "other/small/000.txt"
    assert run_main(small_config(save_checkpoint=True, checkpoint_every=1, **keys)) == 0
    final = torch.load(log.with_suffix(".ckpt"), weights_only=True)
    assert (final["step"], final["code"]) == (2, log_format.read_header(log).code)
    assert set(final["model"]) == {"_orig_mod." + name for name in WEIGHTS}
    assert run_main(small_config(init_from=f"{log.with_suffix('.ckpt')}", log_dir=f"{tmp_path}/other", **keys)) == 0
    first, second = val_losses(log.read_text()), val_losses(other.read_text())
    assert second[0] == pytest.approx(first[2], abs=2e-6)  # with one block, the window is the same
    assert {*log.parent.iterdir()} == {log, log.with_suffix(".ckpt")} and [*other.parent.iterdir()] == [other]
    where = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d on \S+"
    assert re.search(rf"\nstarted: {where}\n=.*\nended: {where}: finished\n$", log.read_text(), re.DOTALL)


@pytest.fixture
def trainer(small_config, process_group, request):
    """A trainer with gates and several tables in a layer, after a step; in bf16 Muon has mantissas, as on a GPU."""
    keys = dict(value_embeddings=[*BASELINE, [0, 15]], value_embedding_gate=True, sequences_per_step=1)
    trainer = start_trainer(small_config(**keys))
    if getattr(request, "param", "") == "bf16":
        trainer.model.use_bf16()
    trainer.train_step(0, *torch.randint(256, (2, 1, 128)))  # inputs, targets
    return trainer


def addresses(*dicts):
    return {tensor.data_ptr() for tensors in dicts for tensor in tensors.values()}


@pytest.mark.parametrize("trainer", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)], indirect=True)
def test_a_resumed_trainer_is_the_saved_one_to_the_bit(trainer, tmp_path):
    """On one rank's CPU, saving copies nothing."""
    held = checkpoint.collect_state(trainer.model, *trainer.optimizers)
    live = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    assert addresses(held["model"], *held["optimizer_states"].values()) == addresses(trainer.parameters, *live)
    checkpoint.save(run_log.RunLog(tmp_path / "000.txt"), {"code": "x = 1"}, trainer.model, trainer.optimizers, 1, 2.5)
    state = checkpoint.read_resumable(tmp_path / "000.resume.ckpt", {"code": "x = 1  # A comment"})
    assert (state["step"], state["train_time_ms"], state["log_bytes"]) == (1, 2.5, 0)
    other = start_trainer(tmp_path / "small.toml", seed=1)
    for p, saved in zip(other.model.parameters(), trainer.model.parameters()):
        p.data = p.data.to(saved.dtype)
    checkpoint.restore(state, other.model, *other.optimizers)
    pairs = zip(weights_and_states(trainer), weights_and_states(other), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_a_weight_or_state_that_is_not_finite_is_found(trainer):
    adamw, muon = trainer.optimizers
    state, buffer = adamw.state[trainer.model.scalars], muon.state[trainer.model.blocks[3].mlp.fc_w]["momentum_buffer"]
    for tensor in (trainer.model.scalars.data, state["exp_avg"], state["exp_avg_sq"], buffer.view(-1)):
        for bad in (torch.nan, -torch.inf):
            assert checkpoint.is_finite_everywhere(trainer.model, trainer.optimizers)
            good, tensor[5] = tensor[5].clone(), bad
            assert not checkpoint.is_finite_everywhere(trainer.model, trainer.optimizers)
            tensor[5] = good
