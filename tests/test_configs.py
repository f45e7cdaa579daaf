"""configs/*.toml: each config is what its name says, and every one works at every scale."""

from pathlib import Path

import pytest
from helpers import ROOT

import train_gpt_medium as train
from configs.checks import valid_world_sizes
from configs.config import load


def pairs(count):
    """So many tables, each of one of the first layers and one of the last, in the same order."""
    return [[k, 16 - count + k] for k in range(count)]


BASELINE = [[0, 13], [1, 14], [2, 15]]
# Configs that a user adds are not checked here.
MAPS = {
    "baseline": BASELINE, "none": [], "add_1": pairs(4), "add_2": pairs(5), "add_3": pairs(6), "add_4": pairs(7),
    "add_5": [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [15]],
    "add_15": [[0, 12], [1, 13], [2, 14], [15]],
    "shift_1": [[1, 13], [2, 14], [3, 15]], "shift_2": [[2, 13], [3, 14], [4, 15]],
    "share_01_1415": [[0, 1], [14, 15]], "share_012_131415": [[0, 1, 2], [13, 14, 15]],
    "mirror_3": [[0, 15], [1, 14], [2, 13]], "mirror_5": [[0, 15], [1, 14], [2, 13], [3, 12], [4, 11]],
    "record_baseline": BASELINE, "record_add_1": pairs(4), "record_add_2": pairs(5), "record": pairs(5),
    "pool_5": 5 * [[0, 1, 2, 3, 12, 13, 14, 15]], "pairs_4x2": [pair for pair in pairs(4) for _ in range(2)],
    "untied_6": [[0], [1], [2], [13], [14], [15]], "alternate": [[1], [3], [5], [9], [11], [13], [15]],
    "gate": BASELINE, "gate_add_2": pairs(5), "zero_init": BASELINE, "small_init": BASELINE, "lr_0.1": BASELINE,
}
LAYERS = [0, 1, 2, 13, 14, 15]
MAPS |= {
    "bigram": [*BASELINE, {"layers": LAYERS, "source": "bigram"}],
    "bigram_alone": [{"layers": LAYERS, "source": "bigram"}],
    "bigram_narrow": [*BASELINE, {"layers": LAYERS, "source": "bigram", "heads": 1}],
    "linear_3": [{"layers": pair, "source": "embedding"} for pair in BASELINE],
    "linear_and_tables": [*BASELINE, *({"layers": pair, "source": "embedding"} for pair in BASELINE)],
    "only_13_14_15": BASELINE, "only_last_six": [[layer] for layer in range(10, 16)],
    "narrow_3": [{"layers": pair, "heads": 4} for pair in BASELINE], "decay": BASELINE, "slow_betas": BASELINE,
}
for removed in ("0", "1", "2", "13", "14", "15", "0_1", "0_1_2", "0_13", "1_14", "2_15", "0_14", "1_13", "0_15", "2_13",
                "1_15", "2_14"):
    rest = ([layer for layer in table if str(layer) not in removed.split("_")] for table in BASELINE)
    MAPS[f"remove_{removed}"] = [table for table in rest if table]
AS_TIMED = dict(coordinate_descent_tuning=False)
KEYS = {
    "record_baseline": AS_TIMED, "record_add_1": AS_TIMED, "record_add_2": AS_TIMED,
    "record": AS_TIMED | dict(num_iterations=5820),
    "gate": dict(value_embedding_gate=True), "gate_add_2": dict(value_embedding_gate=True),
    "zero_init": dict(value_embedding_std=0.0), "small_init": dict(value_embedding_std=0.01),
    "lr_0.1": dict(value_embedding_lr=0.1), "only_13_14_15": dict(value_embeddings_only=[13, 14, 15]),
    "only_last_six": dict(value_embeddings_only=[10, 11, 12, 13, 14, 15], value_embedding_lr=0.15),
    "decay": dict(value_embedding_weight_decay=0.0075), "slow_betas": dict(value_embedding_betas=[0.8, 0.995]),
}
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


@pytest.mark.parametrize("name", MAPS)
def test_a_config_is_the_baseline_but_for_the_map_and_keys_that_its_name_says(name):
    hp = read(name)
    expected = train.Hyperparameters(description=hp.description, value_embeddings=MAPS[name], **KEYS.get(name, {}))
    assert hp == expected and hp.description


@pytest.mark.parametrize("name", MAPS)
def test_a_config_passes_all_checks_but_those_of_data_at_every_scale(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for scale in SCALES:
        hp = read(name, scale=scale)
        train.check_run(hp, Path(f"{name}.toml"), 1)
        assert hp.value_embeddings == MAPS[name]


def test_the_scales_are_what_the_readme_says():
    small, tiny = read("baseline", scale="small"), read("baseline", scale="tiny")
    assert (small.model_dim, small.num_heads, small.train_seq_len, small.num_iterations) == (512, 4, 16_384, 2_000)
    assert small.sequences_per_step * small.train_seq_len == 262_144
    assert small.train_files == train.Hyperparameters().train_files
    assert (tiny.model_dim, tiny.num_iterations, tiny.vocab_size) == (128, 160, 257)
    assert tiny.train_files == "data/local_text/local_train_*.bin"
    for hp in (small, tiny, train.Hyperparameters()):
        assert 8 in valid_world_sizes(hp.sequences_per_step, hp.num_val_sequences)


@pytest.mark.parametrize("keys, warns", [
    ({}, False), ({"scale": "small"}, False), ({"scale": "tiny"}, False), ({"scale": "tiny", "val_seq_len": 512}, True),
    ({"train_seq_len": 3456, "val_seq_len": 3456 * 8, "val_tokens": 3456 * 8}, False), ({"train_seq_len": 1024}, True)])
def test_a_validation_over_longer_distances_than_training_is_a_warning(keys, warns):
    drawing = train.check_run(read("baseline", **keys), Path("baseline.toml"), 1)
    assert ("warning: validation attends over" in drawing) == warns


@pytest.mark.parametrize("name, tables, scalars, gates", [
    ("baseline", 3, 80, 0), ("none", 0, 80, 0), ("share_01_1415", 2, 80, 0), ("pool_5", 5, 80 + 8 * 4, 0),
    ("pairs_4x2", 8, 80 + 8, 0), ("gate_add_2", 5, 80, 10 * 8 * 16)])
def test_each_table_gate_and_lambda_is_counted_once(name, tables, scalars, gates):
    drawing = train.check_run(read(name), Path(f"{name}.toml"), 1).replace("tables: ", "tables:")
    total, *lines = drawing.partition("parameters: ")[2].replace(",", "").splitlines()
    expected = {"lm_head_w": 50304 * 1024, "embed.weight": 50257 * 1024, "value_embeds.*.weight": tables * 50257 * 1024,
                "blocks.*.attn.ve_gate_w": gates, "scalars": scalars, "blocks.*.attn.qkvo_w": 15 * 4 * 1024**2,
                "blocks.*.mlp.fc_w": 16 * 4 * 1024**2, "blocks.*.mlp.proj_w": 16 * 4 * 1024**2}
    assert [line.split() for line in lines[:-1]] == [[str(count), group] for group, count in expected.items() if count]
    assert int(total) == sum(expected.values())
