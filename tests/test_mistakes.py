"""Test every user mistake against the program itself: `--check` prints one line with place, fault and fix; status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import golden_weights
from helpers import ROOT

import train_gpt_medium as train
from configs import checks

BASELINE = [[0, 13], [1, 14], [2, 15]]
# A mistake in the config's keys or in the words after the config; {data} and {folder} hold the test's shards and files.
MISTAKES = [
    (dict(num_iteration=5), "small.toml: num_iteration: unknown key; did you mean num_iterations?"),
    (dict(num_iterations="many"), 'small.toml: num_iterations: expected an integer, found "many"'),
    (dict(num_iterations=True), "num_iterations: expected an integer, found true"),
    (dict(cooldown_frac=True), "cooldown_frac: expected a number, found true"),
    (dict(save_checkpoint=1), "save_checkpoint: expected true or false, found 1"),
    (dict(train_files=3), "train_files: expected a string, found 3"),
    (dict(log_dir=""), "log_dir: is empty"),
    (dict(num_iterations=0), "num_iterations: 0 is too small; use at least 1"),
    (dict(vocab_size=70000), "vocab_size: 70000 is too large; use at most 65536"),
    (dict(train_seq_len=1000), "train_seq_len: 1000 is not a multiple of 128; use 1024"),
    (dict(value_embeddings="0"), "value_embeddings: expected a list"),
    (dict(value_embeddings=[0, 13]), "a list of layers, not of tables; for one table write [[0, 13]]"),
    (dict(value_embeddings=[[1], 0]), "value_embeddings: entry 1: 0 is not a list of layers; list the layers that use"),
    (dict(value_embeddings=[[0], []]), "entry 1: [] is not a list of layers"),
    (dict(value_embeddings=[{"source": "bigram"}]), "entry 0: layers is missing; list the layers"),
    (dict(value_embeddings=[{"layers": [1], "row": 9}]), "entry 0: unknown key row; use layers, source, rows, heads"),
    (dict(value_embeddings=[{"layers": [1], "source": "pair"}]), 'entry 0: source "pair" does not exist; use token or'),
    (dict(value_embeddings=[{"layers": [1], "rows": 9}]), "entry 0: rows: a token source has no choice of rows"),
    (dict(value_embeddings=[{"layers": [1], "source": "bigram", "rows": 1}]), "rows is 1; use an integer from 2 to"),
    (dict(value_embeddings=[{"layers": [1], "heads": 0}]), "entry 0: heads is 0; use an integer from 1 to 256"),
    (dict(value_embeddings=[{"layers": [1], "heads": 2}]), "entry 0: heads is 2; use at most 1"),
    (dict(value_embeddings_only=[3]), "value_embeddings_only: layer 3 would have no values; add it to"),
    (dict(value_embeddings_only=[7]), "value_embeddings_only: layer 7 has no attention"),
    (dict(value_embedding_betas=[0.8]), "value_embedding_betas: [0.8] is not two numbers from 0 to below 1"),
    (dict(value_embedding_betas=[0.8, 1]), "value_embedding_betas: [0.8, 1] is not two numbers from 0 to below 1"),
    (dict(value_embeddings=[[True]]), "entry 0: layer true does not exist; use integers from 0 to 15"),
    (dict(value_embeddings=[[16]]), "entry 0: layer 16 does not exist"),
    (dict(value_embeddings=[[0], [7]]), "entry 1: layer 7 has no attention; remove it"),
    (dict(value_embeddings=[{"layers": [3, 3]}]), "entry 0: layer 3 is listed twice; remove one"),
    (dict(model_dim=256), "model_dim: 256 is not 128 * num_heads; use 128 with num_heads 1"),
    (dict(val_tokens=1000), "val_tokens: 1000 is not divisible by val_seq_len 256; use 1024"),
    (dict(train_seq_len=2**16), "small.toml: on a CPU, attention masks of 65,536 tokens would take 32 GiB; add"),
    (dict(scale="no/x.toml"), "small.toml: scale: no/x.toml: not a file; use one of configs/scales/*.toml"),
    (dict(scale="{folder}/syntax.toml"), "syntax.toml: not a TOML file in UTF-8: Invalid value (at line 2"),
    (dict(scale="{folder}/utf16.toml"), "utf16.toml: not a TOML file in UTF-8"),
    (dict(scale="{folder}/other_key.toml"), "small.toml: scale: {folder}/other_key.toml: cooldown_frac: a scale sets "
     "only size and data; move this key to the config"),
    (dict(init_from="nowhere.pt"), "small.toml: init_from: nowhere.pt: no such file"),
    (dict(train_files="nowhere/*.bin"), "small.toml: train_files: no file matches nowhere/*.bin"),
    (dict(val_files="nowhere/*.bin"), "small.toml: val_files: no file matches nowhere/*.bin"),
    (dict(num_iterations=118), "train_files: too few tokens: num_iterations = 118 needs 60,416"),
    (dict(val_tokens=10240), "val_files: too few tokens: val_tokens = 10240"),
    (dict(vocab_size=200), "s_train_000001.bin: token 49 has id 255, but vocab_size is 200; use data with this"),
    (dict(vocab_size=300), "s_train_000001.bin: no document starts: none of 20,000 tokens is 299; set end_of_text to"),
    (dict(end_of_text=256), "small.toml: end_of_text: 256 is not a token id; use at most 255"),
    (dict(val_files="{data}/s_train_*1.bin"), "val_files: s_train_000001.bin is training data too; validate on other"),
    (dict(val_files="{folder}"), "val_files: {folder}: cannot be read: Is a directory; check its path"),
    (dict(val_files="{folder}/damaged.bin"), "val_files: {folder}/damaged.bin: wrong length"),
    (dict(log_dir="{folder}/small.toml"), "small.toml: log_dir: cannot write logs below {folder}/small.toml"),
    (dict(log_dir="{folder}/link"), "log_dir: cannot write logs below {folder}/link"),
    (["--num_iterations", "x"], '--num_iterations: expected an integer, found "x"'),
    (["--num_iterations", "1\nseed = 3"], "--num_iterations: expected an integer"),
    (["--cooldown_frac", "nan"], "--cooldown_frac: nan is too small"),
    (["--value_embedding_std", "inf"], "--value_embedding_std: inf is too large"),
    (["--save_checkpoint", "True"], '--save_checkpoint: expected true or false, found "True"'),
    (["--value_embeddings", "[[0,"], '--value_embeddings: expected a list, found "[[0,"; close its brackets and quote'),
    (["--value_embeddings", "[[0,", "13]]"], "unexpected argument 13]]"),
    (["--num_iteration", "5"], "--num_iteration: unknown key; did you mean --num_iterations?"),
    (["--learning_rate", "1"], "--learning_rate: unknown key; use one of description, scale, value_embeddings, "),
    (["--num_iterations"], "expected one argument"), (["--value_embedding_lr", 400 * "9"], "is too large; use at most"),
    (["--value_embeddings", 3000 * "["], "--value_embeddings: expected a list"),
    (["--scale", "tinny"], "configs/scales/tinny.toml: not a file; did you mean configs/scales/tiny.toml?"),
    (["--value_embeddings", '[{layers = [1], source = "x"}]'], '--value_embeddings: entry 0: source "x" does not'),
    (["other.toml"], "unexpected argument other.toml"),
    (["--train_files", "\udce9*.bin"], "train_files: no file matches \\udce9*.bin"),
]


def draw(entries, only=()):
    return checks.draw_map(entries, only, num_heads=8, scale="")


@pytest.fixture
def check(run_main, capsys):
    """Run `--check`; return the exit status, the lines on standard error, and standard output."""

    def run(*arguments):
        status = run_main(*arguments, "--check")
        captured = capsys.readouterr()
        return status, captured.err.splitlines(), captured.out

    return run


def assert_one_line(result, fragment):
    status, errors, _ = result
    assert (status, len(errors)) == (2, 1), errors
    assert errors[0].startswith("train_gpt_medium.py: ") and fragment in errors[0]


@pytest.mark.parametrize("mistake, line", MISTAKES)
def test_a_mistake_is_one_line(check, small_config, small_data, tmp_path, mistake, line):
    (tmp_path / "damaged.bin").write_bytes((small_data / "s_val_000000.bin").read_bytes()[:-2])
    (tmp_path / "link").symlink_to("/nowhere")  # as where a volume is not mounted
    scales = {"syntax": b"seed = 5\nseed = = 3", "utf16": b"\xff\xfe\0", "other_key": b"cooldown_frac = 0.5"}
    for name, text in scales.items():
        (tmp_path / f"{name}.toml").write_bytes(text)
    keys, words = (mistake, []) if isinstance(mistake, dict) else ({}, mistake)
    keys = {key: value.format(folder=tmp_path, data=small_data) if isinstance(value, str) else value
            for key, value in keys.items()}
    assert_one_line(check(small_config(**keys), *words), line.format(folder=tmp_path))


def test_a_missing_config_has_a_suggestion(check):
    line = "configs/basline.toml: not a file; did you mean configs/baseline.toml?"
    assert_one_line(check("configs/basline.toml"), line)
    assert_one_line(check(), "the following arguments are required: CONFIG.toml; usage")


def test_a_good_config_passes_with_map_and_counts_and_leaves_no_trace(check, small_config, tmp_path):
    """3 shards of 20,000 hold 39 batches of 512 each, as 38 * 512 + 512 + 1 < 20,000."""
    status, errors, output = check(small_config(num_iterations=3 * 39, val_tokens=39 * 256))
    assert (status, errors) == (0, [])
    assert draw(BASELINE) in output
    assert "98,304  value_embeds.*.weight" in output and "device: 1 rank, CPU" in output
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


def test_the_map_is_drawn_also_while_data_is_missing(check, small_config):
    status, _, output = check(small_config(train_files="nowhere/*.bin", value_embeddings=[[3], [4, 15]]))
    assert status == 2 and draw([[3], [4, 15]]) in output


def test_a_parameter_without_an_optimizer_is_named(check, small_config, monkeypatch):
    class WithParameter(train.MLP):
        def __init__(self, *args):
            super().__init__(*args)
            self.extra_w = torch.nn.Parameter(torch.zeros(2, 2))

    monkeypatch.setattr(train, "MLP", WithParameter)
    assert_one_line(check(small_config()), "blocks.0.mlp.extra_w is in 0 groups of parameter_groups; name it in one")


def test_weights_of_another_map_are_refused_with_what_differs(check, small_config, tmp_path):
    """test_checkpoint.py has the other differences."""
    path = tmp_path / "init.pt"
    torch.save({"model": golden_weights(BASELINE, 128, 256)}, path)
    assert check(small_config(init_from=str(path)))[0] == 0
    result = check(small_config(init_from=str(path), value_embedding_gate=True))
    assert_one_line(result, f"small.toml: init_from: {path}: parameter blocks.0.attn.ve_gate_w is missing (6 in all)")


def test_missing_shards_of_fineweb_name_the_command_that_fetches_them_also_in_json_for_the_queue(
        check, small_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ANY_SIZE_ON_CPU", "1")
    for module in ("cached_fineweb10B", "loader"):
        monkeypatch.setattr(f"data.{module}.FINEWEB_FOLDER", tmp_path)
    record, small = ROOT / "configs/record.toml", small_config()
    elsewhere = [f"--{kind}_files={tmp_path}/fineweb_{kind}_*.bin" for kind in ("train", "val")]
    assert_one_line(check(record, *elsewhere), "python data/cached_fineweb10B.py 31")
    described = json.loads(check(record, small, "--json", *elsewhere)[2])
    assert [one["fetch"] for one in described] == [["data/cached_fineweb10B.py", number] for number in ("31", "1")]
    status, errors, output = check(small, "--json")
    found, = json.loads(output)
    expected = dict(config=str(small), files=[str(small)], log_folder=str(tmp_path / "logs/small"), fetch=[],
                    device_kind="CPU cores")
    assert (status, errors, found) == (0, [], found | expected)
    assert found["configuration"]["model_dim"] == 128 and draw(BASELINE) in found["drawing"]


def test_ranks_that_do_not_divide_the_validation():
    """test_faults.py has ranks that do not divide a step."""
    hp = train.Hyperparameters(sequences_per_step=4, val_tokens=1024, val_seq_len=512)
    complaint = "val_tokens: 2 sequences cannot be divided among 4 ranks; start 1 or 2 ranks"
    with pytest.raises(ValueError, match=complaint):
        train.check_run(hp, Path("c.toml"), world_size=4)


def test_torchrun_restarts_only_a_numbered_run(monkeypatch):
    """Without a number, the restarted ranks would take the next free one and start over."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    train.check_run(train.Hyperparameters(run_id=0), Path("c.toml"), 1)
    with pytest.raises(ValueError, match="run_id: torchrun can restart only a numbered run; give --run_id"):
        train.check_run(train.Hyperparameters(run_id=None), Path("c.toml"), 1)


@pytest.mark.parametrize("missing, program", [
    ("torch", "train_gpt_medium.py"), ("numpy", "logs/compare.py"), ("scipy", "logs/compare.py")])
def test_a_missing_package_is_a_line(missing, program):
    code = f"import runpy, sys; sys.modules['{missing}'] = None; runpy.run_path('{program}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "is missing; start" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("entries, only, lines", [
    (BASELINE, [14], ["value embeddings: 3 tables", "  layer  0  o      table 0", "  layer  1  | o    table 1",
                      "  layer  2  | | o  table 2", *(f"  layer {layer:2d}  | | |{'  no attention' * (layer == 7)}"
                                                      for layer in range(3, 13)), "  layer 13  o | |  table 0",
                      "  layer 14    o |  table 1, no values of its own", "  layer 15      o  table 2"]),
    ([], [], ["value embeddings: 0 tables", "  layer  0", "  layer  1"]),
    ([[0], {"layers": [0, 2], "source": "bigram", "heads": 1}, {"layers": [1], "source": "embedding"}], [],
     ["value embeddings: 3 sources (o token, b bigram, e embedding)", "  source 1 adds to 1 of 8 heads",
      "  layer  0  o b    sources 0, 1", "  layer  1    | e  source 2", "  layer  2    b    source 1"]),
])
def test_the_drawing_of_a_map(entries, only, lines):
    drawn = draw(entries, only).splitlines()
    assert drawn[: len(lines)] == lines and sum(line.startswith("  layer ") for line in drawn) == 16
