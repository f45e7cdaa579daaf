"""configs/*.toml: each config is what its name says, and every one works at every scale."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT

import train_gpt_medium as train
from configs.checks import fitting_ranks
from configs.keys import load

BASELINE = [[0, 13], [1, 14], [2, 15]]
ADD_1 = [[0, 12], [1, 13], [2, 14], [3, 15]]
ADD_2 = [[0, 11], [1, 12], [2, 13], [3, 14], [4, 15]]
AS_TIMED = dict(coordinate_descent_tuning=False)
# The map of each config, and its other keys. What a user adds to the folder is his own affair.
CONFIGS = {
    "baseline": (BASELINE, {}),
    "none": ([], {}),
    "add_1": (ADD_1, {}),
    "add_2": (ADD_2, {}),
    "add_3": ([[0, 10], [1, 11], [2, 12], [3, 13], [4, 14], [5, 15]], {}),
    "add_4": ([[0, 9], [1, 10], [2, 11], [3, 12], [4, 13], [5, 14], [6, 15]], {}),
    "add_5": ([[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [15]], {}),
    "add_15": ([[0, 12], [1, 13], [2, 14], [15]], {}),
    "shift_1": ([[1, 13], [2, 14], [3, 15]], {}),
    "shift_2": ([[2, 13], [3, 14], [4, 15]], {}),
    "share_01_1415": ([[0, 1], [14, 15]], {}),
    "share_012_131415": ([[0, 1, 2], [13, 14, 15]], {}),
    "mirror_3": ([[0, 15], [1, 14], [2, 13]], {}),
    "mirror_5": ([[0, 15], [1, 14], [2, 13], [3, 12], [4, 11]], {}),
    "record_baseline": (BASELINE, AS_TIMED),
    "record_add_1": (ADD_1, AS_TIMED),
    "record_add_2": (ADD_2, AS_TIMED),
    "record": (ADD_2, AS_TIMED | dict(num_iterations=5820)),
    "pool_5": (5 * [[0, 1, 2, 3, 12, 13, 14, 15]], {}),
    "pairs_4x2": ([pair for pair in ADD_1 for _ in range(2)], {}),
    "untied_6": ([[0], [1], [2], [13], [14], [15]], {}),
    "alternate": ([[1], [3], [5], [9], [11], [13], [15]], {}),
    "gate": (BASELINE, dict(value_embedding_gate=True)),
    "gate_add_2": (ADD_2, dict(value_embedding_gate=True)),
    "zero_init": (BASELINE, dict(value_embedding_std=0.0)),
    "small_init": (BASELINE, dict(value_embedding_std=0.01)),
    "lr_0.1": (BASELINE, dict(value_embedding_lr=0.1)),
}
for removed in ("0", "1", "2", "13", "14", "15", "0_1", "0_1_2", "0_13", "1_14", "2_15", "0_14", "1_13", "0_15", "2_13",
                "1_15", "2_14"):
    rest = ([layer for layer in table if str(layer) not in removed.split("_")] for table in BASELINE)
    CONFIGS[f"remove_{removed}"] = ([table for table in rest if table], {})

SCALES = ["", *(path.stem for path in (ROOT / "configs/scales").glob("*.toml"))]


def read(name, **options):
    return load(train.Hyperparameters, ROOT / f"configs/{name}.toml", options)


def test_the_defaults_are_the_published_baseline():
    hp = train.Hyperparameters()
    published = dict(
        value_embeddings=BASELINE, train_files="data/fineweb10B/fineweb_train_*.bin",
        val_files="data/fineweb10B/fineweb_val_*.bin", val_tokens=10485760, train_seq_len=65536, val_seq_len=262144,
        sequences_per_step=8, num_iterations=5960, cooldown_frac=0.7, vocab_size=50257, num_heads=8, model_dim=1024,
        val_loss_every=125, warmup_steps=10, value_embedding_gate=False, value_embedding_std=1.0,
        value_embedding_lr=0.3, save_checkpoint=False)
    assert {name: getattr(hp, name) for name in published} == published


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_the_baseline_but_for_the_map_and_keys_that_its_name_says(name):
    hp, (tables, keys) = read(name), CONFIGS[name]
    expected = replace(train.Hyperparameters(), description=hp.description, value_embeddings=tables, **keys)
    assert hp == expected and hp.description


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CONFIGS)
def test_without_data_every_config_at_every_scale_stops_at_the_data(name, scale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hp = read(name, scale=scale)
    with pytest.raises(ValueError, match=f"^{name}.toml: train_files: no file matches {re.escape(hp.train_files)}"):
        train.check_run(hp, Path(f"{name}.toml"), 1, train.model_on_meta)
    assert hp.value_embeddings == CONFIGS[name][0]


def test_the_scales_are_what_the_readme_says():
    small, tiny = read("baseline", scale="small"), read("baseline", scale="tiny")
    assert (small.model_dim, small.num_heads, small.train_seq_len, small.num_iterations) == (512, 4, 16_384, 2_000)
    assert small.sequences_per_step * small.train_seq_len == 262_144
    assert small.train_files == train.Hyperparameters().train_files
    assert (tiny.vocab_size, tiny.train_files) == (257, "data/local_text/local_train_*.bin")
    assert all(8 in fitting_ranks(hp) for hp in (small, tiny, train.Hyperparameters()))


def test_an_empty_config_is_the_baseline(tmp_path):
    (tmp_path / "empty.toml").touch()
    hp = load(train.Hyperparameters, tmp_path / "empty.toml", {})
    assert hp == replace(read("baseline"), description="") == train.Hyperparameters()


BLOCKS = 15 * 4 * 1024**2 + 16 * 8 * 1024**2


@pytest.mark.parametrize("name, tables, scalars, gates", [
    ("baseline", 3, 80, 0),
    ("none", 0, 80, 0),
    ("add_5", 8, 80, 0),
    ("share_01_1415", 2, 80, 0),
    ("pool_5", 5, 80 + 8 * 4, 0),
    ("pairs_4x2", 8, 80 + 8, 0),
    ("gate", 3, 80, 6 * 8 * 16),
    ("gate_add_2", 5, 80, 10 * 8 * 16),
])
def test_each_table_gate_and_lambda_is_counted_once(name, tables, scalars, gates):
    lines = train.describe_run(read(name)).partition("parameters:\n")[2].splitlines()
    counts = {part: int(count.replace(",", "")) for count, part in (line.split() for line in lines)}
    expected = dict(embed=50257 * 1024, value_embeds=tables * 50257 * 1024, blocks=BLOCKS, ve_gate_w=gates,
                    lm_head_w=50304 * 1024, scalars=scalars)
    assert counts == {part: count for part, count in expected.items() if count}
