"""configs/*.toml and configs/config.py: each config is what the README says; options, scales and defaults.

test_mistakes.py has the mistakes.
"""

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

import train_gpt_medium as train
from configs.checks import valid_world_sizes
from configs.config import load, parse_command_line
from data.local_text import BYTE_PAIRS_FOLDER, LOCAL_TEXT_FOLDER
from data.shards import write_shard

BASELINE = [[0, 13], [1, 14], [2, 15]]
BIGRAM = {"layers": [0, 1, 2, 13, 14, 15], "source": "bigram"}
LINEAR = [{"layers": pair, "source": "embedding"} for pair in BASELINE]
PAIRS_5 = [[0, 11], [1, 12], [2, 13], [3, 14], [4, 15]]
# The keys of the configs whose map is not in configs/README.md. Configs that a user adds are not checked here.
KEYS = {
    "none": dict(value_embeddings=[]),
    "pool_5": dict(value_embeddings=5 * [[0, 1, 2, 3, 12, 13, 14, 15]]),
    "pairs_4x2": dict(value_embeddings=[[0, 12], [0, 12], [1, 13], [1, 13], [2, 14], [2, 14], [3, 15], [3, 15]]),
    "untied_6": dict(value_embeddings=[[0], [1], [2], [13], [14], [15]]),
    "alternate": dict(value_embeddings=[[1], [3], [5], [9], [11], [13], [15]]),
    "gate": dict(value_embedding_gate=True),
    "gate_add_2": dict(value_embeddings=PAIRS_5, value_embedding_gate=True),
    "zero_init": dict(value_embedding_std=0.0),
    "small_init": dict(value_embedding_std=0.01),
    "lr_0.1": dict(value_embedding_lr=0.1),
    "bigram": dict(value_embeddings=[*BASELINE, BIGRAM]),
    "bigram_alone": dict(value_embeddings=[BIGRAM]),
    "bigram_narrow": dict(value_embeddings=[*BASELINE, BIGRAM | {"heads": 1}]),
    "linear_3": dict(value_embeddings=LINEAR),
    "linear_and_tables": dict(value_embeddings=[*BASELINE, *LINEAR]),
    "only_13_14_15": dict(value_embeddings_only=[13, 14, 15]),
    "only_last_six": dict(value_embeddings=[[10], [11], [12], [13], [14], [15]],
                          value_embeddings_only=[10, 11, 12, 13, 14, 15], value_embedding_lr=0.15),
    "narrow_3": dict(value_embeddings=[{"layers": pair, "heads": 4} for pair in BASELINE]),
    "decay": dict(value_embedding_weight_decay=0.0075),
    "slow_betas": dict(value_embedding_betas=[0.8, 0.995]),
    "record": dict(value_embeddings=PAIRS_5, num_iterations=5820),
}
ROW = re.compile(r"^\| `(\w+)`[^|]*\| ([\d&, ]+) \|", re.MULTILINE)  # | `add_1` | 0&12, 1&13, 2&14, 3&15 | ... |
for name, tables in ROW.findall((ROOT / "configs/README.md").read_text()):
    KEYS.setdefault(name, dict(value_embeddings=[[*map(int, table.split("&"))] for table in tables.split(", ")]))


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


def test_the_readme_s_table_is_read_whole():
    assert len(KEYS) == 54


@pytest.mark.parametrize("name", KEYS)
def test_a_config_is_the_baseline_but_for_what_the_readme_says_and_passes_the_checks_at_every_scale(name):
    hp = read(name)
    assert hp == train.Hyperparameters(description=hp.description, **KEYS[name]) and hp.description
    for scale in ("", "small", "laptop", "tiny"):
        scaled = read(name, scale=scale)
        train.check_run(scaled, Path(f"{name}.toml"), world_size=1)
        assert scaled.value_embeddings == hp.value_embeddings


def test_the_scales_are_what_the_readme_says():
    small, laptop, tiny = (read("baseline", scale=scale) for scale in ("small", "laptop", "tiny"))
    assert (small.model_dim, small.num_heads, small.train_seq_len, small.num_iterations) == (512, 4, 16_384, 2_000)
    assert small.sequences_per_step * small.train_seq_len == 262_144
    assert small.train_files == train.Hyperparameters().train_files
    assert (tiny.model_dim, tiny.num_iterations, tiny.vocab_size) == (128, 160, 257)
    assert (laptop.model_dim, laptop.num_heads, laptop.num_iterations, laptop.vocab_size) == (256, 2, 200, 2048)
    assert (laptop.sequences_per_step, laptop.train_seq_len, laptop.val_seq_len) == (4, 512, 512)
    for hp, folder in ((tiny, LOCAL_TEXT_FOLDER), (laptop, BYTE_PAIRS_FOLDER)):
        assert (ROOT / hp.train_files).parent == (ROOT / hp.val_files).parent == folder
    for hp, most in ((small, 8), (laptop, 4), (tiny, 8), (train.Hyperparameters(), 8)):
        train.check_run(hp, Path("baseline.toml"), most)
        assert most in valid_world_sizes(hp.sequences_per_step, hp.num_val_sequences)


@pytest.mark.parametrize("keys, warns", [
    ({}, False), ({"scale": "small"}, False), ({"scale": "laptop"}, False), ({"scale": "tiny"}, False),
    ({"scale": "tiny", "val_seq_len": 512}, True),
    ({"train_seq_len": 3456, "val_seq_len": 3456 * 8, "val_tokens": 3456 * 8}, False), ({"train_seq_len": 1024}, True)])
def test_a_validation_over_longer_distances_than_training_is_a_warning(keys, warns):
    drawing = train.check_run(read("baseline", **keys), Path("baseline.toml"), 1)
    assert ("warning: validation attends over" in drawing) == warns


@pytest.mark.parametrize("keys, documents, warns", [({}, 40, False), ({"val_tokens": 1280}, 5, True)])
def test_a_validation_of_few_documents_is_a_warning(small_config, tmp_path, keys, documents, warns):
    """For the queue and in the header, too."""
    write_shard(tmp_path / "val.bin", np.arange(20_000) % 256)
    config = small_config(**{"val_files": f"{tmp_path}/val.bin", "val_tokens": 40 * 256} | keys)
    assert train.check_data(load(train.Hyperparameters, config, {}), config, "cpu")["val_documents"] == documents
    drawing = train.check_for_queue(config, {})["drawing"]
    assert (f"warning: validation reads only {documents} documents: the loss would say little" in drawing) == warns


@pytest.mark.parametrize("name, tables, scalars, gates", [
    ("none", 0, 80, 0), ("pairs_4x2", 8, 80 + 8, 0), ("gate_add_2", 5, 80, 10 * 8 * 16)])
def test_each_table_gate_and_lambda_is_counted_once(name, tables, scalars, gates):
    drawing = train.check_run(read(name), Path(f"{name}.toml"), 1).replace("tables: ", "tables:")
    total, *lines = drawing.partition("parameters: ")[2].replace(",", "").splitlines()
    expected = {"lm_head_w": 50304 * 1024, "embed.weight": 50257 * 1024, "value_embeds.*.weight": tables * 50257 * 1024,
                "blocks.*.attn.ve_gate_w": gates, "scalars": scalars, "blocks.*.attn.qkvo_w": 15 * 4 * 1024**2,
                "blocks.*.mlp.fc_w": 16 * 4 * 1024**2, "blocks.*.mlp.proj_w": 16 * 4 * 1024**2}
    assert [line.split() for line in lines[:-1]] == [[str(count), group] for group, count in expected.items() if count]
    assert int(total) == sum(expected.values())


@pytest.mark.parametrize("name, text, value", [
    ("num_iterations", "9_9", 99), ("cooldown_frac", "1", 1.0), ("seed", "7", 7), ("save_checkpoint", "true", True),
    ("value_embeddings", "[[13, 0]]", [[13, 0]]), ("train_files", "5", "5"), ("log_dir", "~/a", f"{Path.home()}/a"),
])
def test_any_key_can_be_an_option_beside_several_configs_and_flags_in_any_order(name, text, value):
    for words in ([f"--{name}={text}"], [f"--{name}", text]):
        words = ["a.toml", "b.toml", "--check", "--json", *words]
        configs, overrides, options = parse_command_line(train.Hyperparameters, words, "about")
        found = getattr(read("baseline", **overrides), name)
        assert (configs, found, type(found)) == ([Path("a.toml"), Path("b.toml")], value, type(value))
        assert options.json and options.check


def test_an_option_wins_over_the_scale_over_the_config_over_the_default(tmp_path):
    """The file is as from Windows."""
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfscale = 'small'\r\nseed = 3\r\nnum_iterations = 1\r\n")
    for options, num_iterations, num_heads in (({}, 2000, 4), (dict(scale="tiny", num_heads="2"), 160, 2),
                                               (dict(scale=""), 1, 8)):
        hp = load(train.Hyperparameters, tmp_path / "c.toml", options)
        assert (hp.num_iterations, hp.num_heads, hp.seed) == (num_iterations, num_heads, 3)


def test_help_explains_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_command_line(train.Hyperparameters, ["--help"], "about")
    words = "".join(capsys.readouterr().out.split())  # a line can end in the middle of any meaning
    assert "--num_iterationsVALUEtrainingsteps(default:5960)" in words
    for f in fields(train.Hyperparameters):
        assert "".join(f"--{f.name} VALUE {f.metadata['meaning']}".split()) in words
