"""Configuration: defaults, config files, overrides, the drawing of the map and the parameter counts."""

from pathlib import Path

import pytest
from helpers import ROOT, write_config

import train_gpt_medium as train

CONFIGS = {path.stem: path for path in (ROOT / "configs").glob("*.toml")}

ADD_1 = [[0, 12], [1, 13], [2, 14], [3, 15]]
ADD_2 = [[0, 11], [1, 12], [2, 13], [3, 14], [4, 15]]
BASELINE = [[0, 13], [1, 14], [2, 15]]
MAPS = {
    "baseline": BASELINE,
    "add_1": ADD_1,
    "add_2": ADD_2,
    "add_3": [[0, 10], [1, 11], [2, 12], [3, 13], [4, 14], [5, 15]],
    "add_4": [[0, 9], [1, 10], [2, 11], [3, 12], [4, 13], [5, 14], [6, 15]],
    "add_5": [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [15]],
    "add_15": [[0, 12], [1, 13], [2, 14], [15]],
    "remove_0": [[13], [1, 14], [2, 15]],
    "remove_1": [[0, 13], [14], [2, 15]],
    "remove_2": [[0, 13], [1, 14], [15]],
    "remove_13": [[0], [1, 14], [2, 15]],
    "remove_14": [[0, 13], [1], [2, 15]],
    "remove_15": [[0, 13], [1, 14], [2]],
    "remove_0_1": [[13], [14], [2, 15]],
    "remove_0_1_2": [[13], [14], [15]],
    "remove_0_13": [[1, 14], [2, 15]],
    "remove_1_14": [[0, 13], [2, 15]],
    "remove_2_15": [[0, 13], [1, 14]],
    "remove_0_14": [[13], [1], [2, 15]],
    "remove_1_13": [[0], [14], [2, 15]],
    "remove_0_15": [[13], [1, 14], [2]],
    "remove_2_13": [[0], [1, 14], [15]],
    "remove_1_15": [[0, 13], [14], [2]],
    "remove_2_14": [[0, 13], [1], [15]],
    "shift_1": [[1, 13], [2, 14], [3, 15]],
    "shift_2": [[2, 13], [3, 14], [4, 15]],
    "share_01_1415": [[0, 1], [14, 15]],
    "share_012_131415": [[0, 1, 2], [13, 14, 15]],
    "mirror_3": [[0, 15], [1, 14], [2, 13]],
    "mirror_5": [[0, 15], [1, 14], [2, 13], [3, 12], [4, 11]],
    "none": [],
    "record_baseline": BASELINE,
    "record_add_1": ADD_1,
    "record_add_2": ADD_2,
    "record": ADD_2,
    "tiny": BASELINE,
}


def load(path, **overrides):
    return train.load_hyperparameters(Path(path), overrides)


def test_defaults_are_the_published_baseline():
    assert load(CONFIGS["baseline"], description="") == train.Hyperparameters()
    hp = train.Hyperparameters()
    published = dict(
        value_embeddings=BASELINE, train_files="data/fineweb10B/fineweb_train_*.bin", val_files="data/fineweb10B/fineweb_val_*.bin",
        val_tokens=10485760, train_seq_len=65536, val_seq_len=262144, sequences_per_step=8, num_iterations=5960, cooldown_frac=0.7,
        vocab_size=50257, num_heads=8, model_dim=1024, val_loss_every=125, warmup_steps=10, save_checkpoint=False,
    )
    assert {name: getattr(hp, name) for name in published} == published


def test_there_is_a_map_for_every_config():
    assert set(MAPS) == set(CONFIGS)


@pytest.mark.parametrize("name", MAPS)
def test_config_has_the_map_its_name_says(name):
    hp = load(CONFIGS[name])
    assert hp.value_embeddings == MAPS[name]
    assert hp.description


@pytest.mark.parametrize("name", MAPS)
def test_drawing_shows_each_layer_with_its_table(name):
    table_of = {layer: k for k, layers in enumerate(MAPS[name]) for layer in layers}
    title, *rows = train.draw_map(MAPS[name]).splitlines()
    assert title.split()[:3] == ["value", "embeddings:", str(len(MAPS[name]))]
    for layer, row in enumerate(rows):
        assert row.split()[:2] == ["layer", str(layer)]
        marked = [k for k in range(len(MAPS[name])) if row[12 + 2 * k : 13 + 2 * k] == "o"]
        if layer in table_of:
            assert row.endswith(f"table {table_of[layer]}") and marked == [table_of[layer]]
        else:
            assert "table" not in row and marked == []
            assert row.endswith("no attention") == (layer == 7)
    assert len(rows) == 16


def test_drawing_of_the_baseline_to_the_letter():
    assert train.draw_map(BASELINE) == "\n".join([
        "value embeddings: 3 tables",
        "  layer  0  o      table 0",
        "  layer  1  | o    table 1",
        "  layer  2  | | o  table 2",
        *(f"  layer {layer:2d}  | | |{'  no attention' * (layer == 7)}" for layer in range(3, 13)),
        "  layer 13  o | |  table 0",
        "  layer 14    o |  table 1",
        "  layer 15      o  table 2",
    ])


@pytest.mark.parametrize("name", MAPS)
def test_only_the_record_runs_are_without_coordinate_descent(name):
    assert load(CONFIGS[name]).coordinate_descent_tuning == (name not in {"record_baseline", "record_add_1", "record_add_2"})


@pytest.mark.parametrize("name", MAPS)
def test_config_states_only_what_differs_from_the_baseline(name):
    stated = set(train.read_config(CONFIGS[name])) - {"description", "value_embeddings"}
    changed = {n for n in stated if getattr(load(CONFIGS[name]), n) != getattr(train.Hyperparameters(), n)}
    assert stated == changed
    if name != "tiny":
        assert changed == {"record": {"num_iterations"}}.get(name, {"coordinate_descent_tuning"} if name.startswith("record_") else set())


def test_the_record_has_5820_steps():
    assert load(CONFIGS["record"]).num_iterations == 5820


@pytest.mark.parametrize("name, text, value", [
    ("num_iterations", "1_000", 1000),
    ("cooldown_frac", "1", 1.0),
    ("cooldown_frac", "0.25", 0.25),
    ("save_checkpoint", "true", True),
    ("value_embeddings", "[[0, 1], [15]]", [[0, 1], [15]]),
    ("value_embeddings", "[]", []),
    ("fast_paths", '["mlp", "head"]', ["mlp", "head"]),
    ("description", "5", "5"),
    ("train_files", "some/where_*.bin", "some/where_*.bin"),
    ("seed", "7", 7),
])
@pytest.mark.parametrize("form", ["two words", "equals sign"])
def test_any_key_can_be_overridden_on_the_command_line(name, text, value, form, tmp_path):
    path = write_config(tmp_path / "c.toml", num_iterations=3)
    words = [f"--{name}={text}"] if form == "equals sign" else [f"--{name}", text]
    configs, overrides, only_check = train.parse_command_line([str(path), *words])
    assert (configs, only_check) == ([path], False)
    assert getattr(load(path, **overrides), name) == value


def test_parameter_counts_of_the_baseline():
    hp = load(CONFIGS["baseline"])
    assert train.parameter_counts(train.model_on_meta(hp)) == {
        "hidden matrices": 15 * 4 * 1024**2 + 16 * 8 * 1024**2,
        "embeddings": 50257 * 1024,
        "value embeddings": 3 * 50257 * 1024,
        "head": 50304 * 1024,
        "scalars": 80,
    }


@pytest.mark.parametrize("name, tables", [("none", 0), ("add_2", 5), ("share_01_1415", 2), ("add_5", 8)])
def test_each_table_is_counted_once(name, tables):
    counts = train.parameter_counts(train.model_on_meta(load(CONFIGS[name])))
    assert counts["value embeddings"] == tables * 50257 * 1024
