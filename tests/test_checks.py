"""configs/checks.py, and each mistake as `--check` prints it: one line with file, key and fix, exit status 2."""

import pytest
import torch
from golden import golden_weights
from helpers import ROOT

import train_gpt_medium as train
from configs.checks import check_keys_together, draw_map

BASELINE = [[0, 13], [1, 14], [2, 15]]


@pytest.fixture
def check(run_main, capsys):
    """Runs `--check`; returns (exit status, lines on standard error, standard output)."""

    def run(*arguments):
        status = run_main(*arguments, "--check")
        captured = capsys.readouterr()
        return status, captured.err.splitlines(), captured.out

    return run


def assert_one_line(result, *fragments):
    status, errors, _ = result
    assert (status, len(errors)) == (2, 1), errors
    assert [fragment for fragment in ("train_gpt_medium.py: ", *fragments) if fragment not in errors[0]] == [], errors


def test_a_good_config_passes_with_map_and_counts_and_leaves_no_trace(check, small_config, tmp_path):
    """3 shards of 20,000 hold 39 batches of 512 each, as 38 * 512 + 512 + 1 < 20,000."""
    status, errors, output = check(small_config(num_iterations=3 * 39, val_tokens=39 * 256))
    assert (status, errors) == (0, [])
    assert draw_map(train.tables_of_layers(BASELINE), {7: "no attention"}) in output
    assert "98,304  value_embeds.*.weight" in output and "device: 1 rank, CPU" in output
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


@pytest.mark.parametrize("keys, fragments", [
    (dict(num_iteration=5), ["num_iteration: unknown key; the nearest known one is num_iterations"]),
    (dict(model_dim=256), ["model_dim: 256 is not 128 * num_heads", "use 128"]),
    (dict(val_tokens=1000), ["val_tokens: 1000 is not divisible by val_seq_len 256", "use 1024"]),
    (dict(train_files="nowhere/*.bin"), ["train_files: no file matches nowhere/*.bin"]),
    (dict(val_files="nowhere/*.bin"), ["val_files: no file matches nowhere/*.bin"]),
    (dict(num_iterations=118), ["train_files: too few tokens: num_iterations = 118 needs 60,416", "good for 117"]),
    (dict(val_tokens=10240), ["val_files: too few tokens: val_tokens = 10240", "10,000", "good for 39"]),
    (dict(vocab_size=200), ["train_files: ", "s_train_000001.bin: holds token id", "vocab_size is 200"]),
    (dict(init_from="nowhere.pt"), ["init_from: nowhere.pt: no such file"]),
])
def test_a_mistake_in_a_config_is_one_line(check, small_config, keys, fragments):
    assert_one_line(check(small_config(**keys)), "small.toml", *fragments)


def test_the_map_is_drawn_also_while_data_is_missing(check, small_config):
    *result, output = check(small_config(train_files="nowhere/*.bin", value_embeddings=[[3], [4, 15]]))
    assert result[0] == 2 and draw_map(train.tables_of_layers([[3], [4, 15]]), {7: "no attention"}) in output


def test_a_parameter_without_an_optimizer_is_one_line(check, small_config, monkeypatch):
    monkeypatch.setattr(train, "make_optimizers", lambda *_, **__: exec("raise ValueError('parameter gate_w is in 0')"))
    assert_one_line(check(small_config()), "parameter gate_w is in 0")


@pytest.mark.parametrize("words, complaint", [
    (["--num_iterations", "x"], "--num_iterations: expected an integer"),
    (["other.toml"], "unexpected argument other.toml: a run has one config"),
    (["--train_files", "\udce9*.bin"], "train_files: no file matches \\udce9*.bin")])
def test_a_mistake_in_the_command_line_is_one_line(check, small_config, words, complaint):
    assert_one_line(check(small_config(), *words), complaint)


def test_a_damaged_shard_is_named_with_its_key(check, small_config, small_data, tmp_path):
    (tmp_path / "b.bin").write_bytes((small_data / "s_val_000000.bin").read_bytes()[:-2])
    assert_one_line(check(small_config(val_files=f"{tmp_path}/b.bin")), f"val_files: {tmp_path}/b.bin: wrong length")


def test_a_missing_shard_of_fineweb_names_the_command_that_fetches_it(check, tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.FINEWEB_FOLDER", tmp_path)
    files = ["--train_files", f"{tmp_path}/fineweb_train_*.bin", "--val_files", f"{tmp_path}/fineweb_val_*.bin"]
    assert_one_line(check(ROOT / "configs/record.toml", *files), "to get them: python data/cached_fineweb10B.py 31")


def test_weights_of_another_map_are_refused_with_what_differs(check, small_config, tmp_path):
    path = tmp_path / "init.pt"
    torch.save({"model": golden_weights(BASELINE, 128, 256)}, path)
    assert check(small_config(init_from=str(path)))[0] == 0
    assert_one_line(check(small_config(init_from=str(path), value_embedding_gate=True)),
                    f"small.toml: init_from: {path}: parameter blocks.0.attn.ve_gate_w is missing (6 in all)")


def hyperparameters(**keys):
    return train.Hyperparameters(**dict(sequences_per_step=4, val_tokens=4096, val_seq_len=512) | keys)


@pytest.mark.parametrize("world_size, keys, complaint", [
    (3, {}, "sequences_per_step: 4 sequences cannot be divided among 3 ranks; start 1 or 2 or 4 ranks"),
    (4, dict(val_tokens=1024), "val_tokens: 2 sequences cannot be divided among 4 ranks; start 1 or 2 ranks"),
])
def test_a_world_size_that_does_not_divide_the_work(world_size, keys, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_keys_together(hyperparameters(**keys), world_size)


def test_torchrun_restarts_only_a_run_with_a_number(monkeypatch):
    """Without one, the restarted ranks would take the next free number and start over."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    check_keys_together(hyperparameters(run_id=0), 1)
    with pytest.raises(ValueError, match="run_id: torchrun restarts only a run with a number; give --run_id"):
        check_keys_together(hyperparameters(run_id=None), 1)


def test_the_drawing_of_the_baseline_to_the_letter():
    assert draw_map(train.tables_of_layers(BASELINE), {7: "no attention"}) == "\n".join([
        "value embeddings: 3 tables",
        "  layer  0  o      table 0",
        "  layer  1  | o    table 1",
        "  layer  2  | | o  table 2",
        *(f"  layer {layer:2d}  | | |{'  no attention' * (layer == 7)}" for layer in range(3, 13)),
        "  layer 13  o | |  table 0",
        "  layer 14    o |  table 1",
        "  layer 15      o  table 2",
    ])


def test_a_layer_is_drawn_with_all_of_its_tables():
    title, *drawn = draw_map(train.tables_of_layers([[0, 2], [0, 1]]), {}).splitlines()
    assert (title, len(drawn)) == ("value embeddings: 2 tables", 16)
    assert drawn[:3] == ["  layer  0  o o  tables 0, 1", "  layer  1  | o  table 1", "  layer  2  o    table 0"]


def test_without_a_table_no_column_is_drawn():
    assert draw_map(train.tables_of_layers([]), {}).startswith("value embeddings: 0 tables\n  layer  0\n  layer  1\n")
