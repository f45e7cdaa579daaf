"""Checkpoint: `save_checkpoint` and `init_from`, and files as the published script writes them."""

import pytest
import torch
from golden import golden_weights
from helpers import run_program, start_trainer, val_losses

import train_gpt_medium as train

HP = train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=256, train_seq_len=128, val_seq_len=128)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_published_names_are_read_with_or_without_the_prefix(tmp_path, prefix):
    weights = golden_weights(3, 128, 256)
    published = dict(step=5960, code="text", model={prefix + name: w for name, w in weights.items()}, optimizers=[{"state": {}}])
    torch.save(published, tmp_path / "init.pt")
    read = train.read_checkpoint(str(tmp_path / "init.pt"), train.model_on_meta(HP))
    assert {name: w.tolist() for name, w in read.items()} == {name: w.tolist() for name, w in weights.items()}


def test_bf16_weights_of_a_published_checkpoint_are_loaded_exactly(tmp_path):
    weights = {name: w if name in ("lm_head_w", "scalars") else w.bfloat16() for name, w in golden_weights(3, 128, 256).items()}
    torch.save(dict(model=weights), tmp_path / "init.pt")
    model = train.GPT(HP)
    model.load_state_dict(train.read_checkpoint(str(tmp_path / "init.pt"), model))
    assert all(torch.equal(model.state_dict()[name], w.float()) for name, w in weights.items())


def test_the_final_weights_have_the_published_form(small_config, process_group, tmp_path):
    trainer, log = start_trainer(small_config(save_checkpoint=True)), train.RunLog(tmp_path / "000.txt")
    checkpoints = train.Checkpoints(trainer, log, "the program")
    checkpoints.save(4, 0.0, with_optimizers=False)
    checkpoints.wait()
    checkpoint = torch.load(tmp_path / "000.ckpt", weights_only=True)
    assert (checkpoint["step"], checkpoint["code"], checkpoint["optimizer_states"]) == (4, "the program", {})
    assert set(checkpoint["model"]) == {"_orig_mod." + name for name in golden_weights(3, 128, 256)}
    assert {path.name for path in tmp_path.iterdir()} == {"000.ckpt", "000.txt", "small.toml"}
    # The published script would load it into its compiled model.
    torch.compile(train.GPT(trainer.hp)).load_state_dict(checkpoint["model"])


@pytest.mark.slow
def test_init_from_goes_on_with_the_saved_weights(small_config, tmp_path):
    """The first validation of a run from a checkpoint is the last one of the run that saved it (both at the widest window)."""
    first = run_program(small_config(save_checkpoint=True, train_seq_len=128, val_seq_len=128), ranks=1)
    saved = tmp_path / "logs" / "small" / "000.ckpt"
    assert first.returncode == 0 and saved.exists(), first.stderr
    second = run_program(small_config(init_from=str(saved), train_seq_len=128, val_seq_len=128), ranks=2)
    assert second.returncode == 0, second.stderr
    assert val_losses(second.stdout)[0] == pytest.approx(val_losses(first.stdout)[4], abs=2e-6)
    assert abs(val_losses(second.stdout)[0] - val_losses(first.stdout)[0]) > 1e-3
