"""configs/keys.py: types, limits, options and precedence; a mistake is one line that names file, key and fix."""

from pathlib import Path

import pytest
from helpers import write_config

from configs.checks import expand_path
from configs.keys import load, parse_command_line
from train_gpt_medium import Hyperparameters


@pytest.fixture
def read(tmp_path):
    """Reads the config `c.toml` of the given keys, under options."""

    def read(keys=(), **options):
        return load(Hyperparameters, write_config(tmp_path / "c.toml", **dict(keys)), options)

    return read


def assert_mistake(run, *fragments):
    with pytest.raises(ValueError) as raised:
        run()
    message = str(raised.value)
    assert "\n" not in message and [text for text in fragments if text not in message] == [], message


@pytest.mark.parametrize("key, value, words", [
    ("num_iteration", 5, "unknown key; the nearest known one is num_iterations"),
    ("Train_Seq_Len", 5, "unknown key; the nearest known one is train_seq_len"),
    ("num_iterations", "many", 'expected an integer, found "many"'),
    ("num_iterations", 1.5, "expected an integer, found 1.5"),
    ("num_iterations", True, "expected an integer, found true"),
    ("cooldown_frac", "0.5", 'expected a number, found "0.5"'),
    ("save_checkpoint", 1, "expected true or false, found 1"),
    ("train_files", 3, "expected a string, found 3"), ("train_files", "", "is empty"), ("log_dir", "", "is empty"),
    ("num_iterations", 0, "0 is too small; use at least 1"), ("value_embedding_std", -0.1, "use at least 0"),
    ("vocab_size", 70000, "70000 is too large; use at most 65536"), ("run_id", 1000, "use at most 999"),
    ("train_seq_len", 1000, "1000 is not a multiple of 128; use 1024"),
    ("value_embeddings", "0", "expected a list of lists of integers"),
    ("value_embeddings", [0, 13], "a list of layers, not of tables; for one table write [[0, 13]]"),
    ("value_embeddings", [[1], 0], "table 1 is 0; write"), ("value_embeddings", [[0], []], "table 1 is []; write"),
    ("value_embeddings", [["a"]], 'table 0: there is no layer "a"; layers are the integers 0 to 15'),
    ("value_embeddings", [[True]], "there is no layer true"), ("value_embeddings", [[16]], "there is no layer 16"),
    ("value_embeddings", [[0], [7]], "table 1: layer 7 has no attention to add a value embedding to; remove it"),
    ("value_embeddings", [[3, 3]], "table 0: layer 3 is named twice; remove one"),
])
def test_a_bad_key_of_a_config_is_named_with_the_file(read, tmp_path, key, value, words):
    assert_mistake(lambda: read({key: value}), f"{tmp_path}/c.toml: {key}: ", words)


@pytest.mark.parametrize("key, text, words", [
    ("num_iterations", "x", 'expected an integer, found "x"'), ("num_iterations", "1\nseed = 3", "expected an integer"),
    ("cooldown_frac", "nan", "nan is too small"), ("value_embedding_std", "inf", "inf is too large"),
    ("save_checkpoint", "True", 'expected true or false, found "True"'),
    ("value_embeddings", "[[0,", "; quote the list: --value_embeddings '[[0, 13], [1,"),
])
def test_a_bad_option_is_named(read, key, text, words):
    assert_mistake(lambda: read(**{key: text}), f"--{key}: ", words)


@pytest.mark.parametrize("words, fragments", [
    ([], ["CONFIG.toml", "usage"]),
    (["c.toml", "--num_iteration", "5"], ["--num_iteration: unknown key", "--num_iterations"]),
    (["c.toml", "--num_iterations"], ["expected one argument", "usage"]),
    (["c.toml", "--value_embeddings", "[[0,", "13]]"], ["unexpected argument 13]]", "quote a VALUE with brackets"]),
    (["c.toml", "--train_files", "a_1.bin", "a_2.bin"], ["unexpected argument a_2.bin", "or *"]),
])
def test_a_bad_command_line_is_one_line(words, fragments):
    assert_mistake(lambda: parse_command_line(Hyperparameters, words, "about"), *fragments)


def test_help_explains_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(Hyperparameters, ["--help"], "about")
    output = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "about" in output
    assert "--num_iterations VALUE training steps (default: 5960)" in output


@pytest.mark.parametrize("key, text, value", [
    ("num_iterations", "1_000", 1000), ("cooldown_frac", "1", 1.0), ("cooldown_frac", "0.25", 0.25), ("seed", "7", 7),
    ("save_checkpoint", "true", True), ("value_embeddings", "[[0, 13], [1, 13]]", [[0, 13], [1, 13]]),
    ("value_embeddings", "[]", []), ("description", "5", "5"), ("train_files", "some/where_*.bin", "some/where_*.bin"),
])
@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_any_key_can_be_an_option(read, key, text, value, form):
    words = [f"--{key}={text}"] if "=" in form else [f"--{key}", text]
    configs, options, only_check = parse_command_line(Hyperparameters, ["c.toml", *words], "about")
    found = getattr(read(**options), key)
    assert (configs, only_check, found, type(found)) == ([Path("c.toml")], False, value, type(value))


def test_check_and_several_configs_in_any_order():
    words = ["a.toml", "b.toml", "--check", "--seed", "3"]
    assert parse_command_line(Hyperparameters, words, "") == ([Path("a.toml"), Path("b.toml")], {"seed": "3"}, True)


def test_an_option_wins_over_the_scale_over_the_config_over_the_default(read, tmp_path):
    scale = write_config(tmp_path / "scale.toml", warmup_steps=30, val_loss_every=3)
    hp = read(dict(scale=str(scale), val_tokens=300, warmup_steps=200, val_loss_every=200), val_loss_every="4")
    assert (hp.val_loss_every, hp.warmup_steps, hp.val_tokens, hp.num_iterations) == (4, 30, 300, 5960)


def test_a_scale_is_a_name_in_the_repository_or_a_path_and_can_be_an_option(read, tmp_path):
    other = str(write_config(tmp_path / "other.toml", model_dim=256))
    found = [read(dict(scale="small"), **options).model_dim
             for options in ({}, dict(scale="tiny"), dict(scale=other), dict(scale=""))]
    assert found == [512, 128, 256, 1024]


@pytest.mark.parametrize("key, value", [
    ("value_embeddings", []), ("value_embedding_std", 0.5), ("scale", "tiny"), ("seed", 1), ("cooldown_frac", 0.5)])
def test_a_scale_sets_size_and_data_only(read, tmp_path, key, value):
    scale = write_config(tmp_path / "scale.toml", **{key: value})
    assert_mistake(lambda: read(scale=str(scale)), f"--scale: {scale}: {key}: a scale sets size and data only",
                   "move this key to the config")


@pytest.mark.parametrize("keys, options, fragments", [
    ({}, dict(scale="tinny"), ["--scale: ", "configs/scales/tinny.toml: no such file", "configs/scales/tiny.toml?"]),
    (dict(scale="no/x.toml"), {}, ["c.toml: scale: no/x.toml: no such file"]),
])
def test_a_scale_that_does_not_exist(read, keys, options, fragments):
    assert_mistake(lambda: read(keys, **options), *fragments)


def test_a_config_that_does_not_exist_has_a_suggestion():
    assert_mistake(lambda: load(Hyperparameters, Path("configs/basline.toml"), {}),
                   "configs/basline.toml: no such file", "did you mean configs/baseline.toml?")


@pytest.mark.parametrize("content, words", [(b"num_iterations = 5\nseed = = 3\n", "line 2"), (b"\xff\xfe\0", "")])
def test_a_file_that_is_no_toml(tmp_path, content, words):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert_mistake(lambda: load(Hyperparameters, path, {}), f"{path}: not a TOML file in UTF-8", words)


def test_windows_line_ends_and_a_byte_order_mark_are_no_mistake(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfseed = 3\r\nnum_iterations = 5\r\n")
    hp = load(Hyperparameters, tmp_path / "c.toml", {})
    assert (hp.seed, hp.num_iterations) == (3, 5)


def test_the_home_folder_can_be_written_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("~/data_*.bin") == "/home/me/data_*.bin"
