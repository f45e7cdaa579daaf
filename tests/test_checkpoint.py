"""logs/checkpoint.py: weights to start from, the state of an interrupted run, and what is refused."""

import json
import os

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


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    checkpoint.write(tmp_path / "000.ckpt", {"step": 1})
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "000.ckpt", {"step": 2})
    assert torch.load(tmp_path / "000.ckpt", weights_only=True) == {"step": 1}
    checkpoint.remove(tmp_path / "000.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(sorted(path.name for path in tmp_path.iterdir())))
    checkpoint.write(tmp_path / "000.ckpt", {"step": 1})
    assert names == [["000.ckpt.unfinished"], ["000.ckpt"]]


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    checkpoint.write(tmp_path / "000.ckpt", {"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="000.ckpt: .*No space left on device"):
        checkpoint.write(tmp_path / "000.ckpt", {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["000.ckpt"]
    assert torch.load(tmp_path / "000.ckpt", weights_only=True) == {"step": 1}


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


@pytest.mark.parametrize("content", [b"", b"no checkpoint", 1000 * b"\0"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/a.pt: not a checkpoint that can be read safely"):
        weights.read_weights(str(tmp_path / "a.pt"), train.model_on_meta(HP))


class RunsCode:
    """Unpickling this would run a program."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('this was run')",))


@pytest.mark.parametrize("content", [RunsCode(), {"model": RunsCode()}, [1, 2], {"weights": {}}, {"model": 3}])
def test_a_checkpoint_that_would_run_code_or_has_no_weights(tmp_path, content):
    with pytest.raises(ValueError, match="not a checkpoint that can be read safely .*; name a torch.save of a dict"):
        read(tmp_path / "a.pt", content)


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


@pytest.fixture
def trainer(small_config, process_group):
    """A trainer with gates and several tables, after its first step."""
    keys = dict(value_embeddings=[*BASELINE, [0, 15]], value_embedding_gate=True, sequences_per_step=1)
    trainer = start_trainer(small_config(**keys))
    take_steps(trainer, 0, 1)
    return trainer


def take_steps(trainer, first, last):
    batches = train_batches(trainer.train_shards, trainer.hp, 0, 1, trainer.device, first)
    for step in range(first, last):
        trainer.train_step(step, *next(batches))


def as_on_a_gpu(model, adamw, muon):
    """Weights in bf16, with states and mantissas in which every bit counts."""
    model.use_bf16()
    generator = torch.Generator().manual_seed(0)
    for optimizer in (adamw, muon):
        optimizer.state.clear()
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    for p in (p for group in adamw.param_groups for p in group["params"]):
        moments = {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[p] = dict(step=torch.tensor(3.0), **moments)
    for p in muon.owned:
        mantissa = torch.randint(2**16, p.shape, generator=generator).to(torch.uint16)
        muon.state[p] = dict(momentum_buffer=torch.randn(p.shape, generator=generator), mantissa=mantissa)


@pytest.mark.parametrize("is_bf16", [False, True])
def test_restore_is_the_inverse_of_copy_state_to_the_bit(trainer, tmp_path, is_bf16):
    parts = trainer.model, *trainer.optimizers
    if is_bf16:
        as_on_a_gpu(*parts)
    checkpoint.write(tmp_path / "a.ckpt", checkpoint.copy_state(*parts))
    other = start_trainer(tmp_path / "small.toml", seed=1)
    if is_bf16:
        other.model.use_bf16()
    checkpoint.restore(checkpoint.load(tmp_path / "a.ckpt"), other.model, *other.optimizers)
    expected, restored = weights_and_states(trainer), weights_and_states(other)
    assert [x.dtype for x in expected] == [x.dtype for x in restored] and len(expected) > 100
    assert all(torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b)
               for a, b in zip(expected, restored))


def test_a_restored_trainer_goes_on_as_the_first_would_have(trainer, tmp_path):
    state = checkpoint.copy_state(trainer.model, *trainer.optimizers)
    take_steps(trainer, 1, 2)
    other = start_trainer(tmp_path / "small.toml", seed=1)
    checkpoint.restore(state, other.model, *other.optimizers)
    take_steps(other, 1, 2)
    assert all(map(torch.equal, weights_and_states(trainer), weights_and_states(other)))


def test_a_copied_state_does_not_change_with_the_weights(trainer):
    state = checkpoint.copy_state(trainer.model, *trainer.optimizers)
    expected = trainer.model.scalars.detach().clone()
    trainer.model.scalars.data.add_(1)
    assert torch.equal(state["model"]["_orig_mod.scalars"], expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("spoil", [
    lambda trainer: trainer.model.scalars.data,
    lambda trainer: trainer.optimizers[0].state[trainer.model.scalars]["exp_avg_sq"],
    lambda trainer: trainer.optimizers[1].state[trainer.model.blocks[3].mlp.fc_w]["momentum_buffer"],
], ids=["weight", "AdamW", "Muon"])
def test_a_state_that_is_not_finite_is_no_checkpoint(trainer, bad, spoil):
    assert checkpoint.is_finite_everywhere(trainer.model, trainer.optimizers)
    spoil(trainer).view(-1)[5] = bad
    assert not checkpoint.is_finite_everywhere(trainer.model, trainer.optimizers)


# -----------------------------------------------------------------------------
# What a run goes on from; that a damaged or another run is refused in one line, test_faults.py shows


@pytest.mark.parametrize("theirs, ours, shown", [
    ({"seed": 0}, {"seed": 7}, "seed was 0 and is 7"),
    ({"scale": "", "map": [[0]]}, {"scale": "tiny", "map": []}, 'scale was "" and is "tiny", map was [[0]] and is []'),
    ({"program text": "x\n" * 200}, {"program text": "y"}, "program text has changed"),
    ({"a key of another version": 1}, {}, "a key of another version was 1 and is null"),
    ({}, {"a new key": True}, "a new key was null and is true"),
])
def test_what_differs_from_the_interrupted_run_is_named(tmp_path, theirs, ours, shown):
    path = tmp_path / "000.resume.ckpt"
    checkpoint.write(path, dict(step=3, must_equal=json.dumps(theirs)))
    assert checkpoint.read_interrupted(path, lambda step: theirs)["step"] == 3
    with pytest.raises(ValueError) as raised:
        checkpoint.read_interrupted(path, lambda step: ours)
    assert str(raised.value).startswith(f"{path}: this is not the run that was interrupted: {shown}; set that back, or")


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("/nowhere"), lambda path: path.mkdir(), lambda path: torch.save({"step": 3}, path),
    lambda path: torch.save([1, 2], path), lambda path: torch.save({"step": 3, "must_equal": "no JSON"}, path)])
def test_what_is_no_such_checkpoint_is_refused(tmp_path, make):
    make(tmp_path / "000.resume.ckpt")
    with pytest.raises(ValueError, match="000.resume.ckpt: not a checkpoint that a run can go on from .*; move it"):
        checkpoint.read_interrupted(tmp_path / "000.resume.ckpt", lambda step: {})


def test_a_run_without_a_checkpoint_has_nothing_to_go_on_from(tmp_path):
    assert checkpoint.read_interrupted(tmp_path / "000.resume.ckpt", lambda step: {}) is None


def test_all_but_what_may_change_must_be_equal(trainer):
    run = Run(None, trainer.hp, trainer.device, "the program", RunLog(None))
    found = must_equal(run, trainer.train_shards, 1)
    assert set(found) == {"program text", "device", "next batch", *(set(vars(HP)) - BOOKKEEPING_KEYS)}
    assert (found["program text"], found["device"], found["seed"]) == ("the program", "cpu", 0)
    assert found["next batch"] == ["s_train_000001.bin", 128]
