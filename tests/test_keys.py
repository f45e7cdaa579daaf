"""configs/keys.py: types, limits, options and precedence; a mistake is one line that names file, key and fix."""

from pathlib import Path

import pytest
from helpers import write_config

from configs.checks import expand_path
from configs.keys import load, parse_command_line
from train_gpt_medium import Hyperparameters


def read(path, **options):
    return load(Hyperparameters, path, options)


def assert_mistake(run, *fragments):
    with pytest.raises(ValueError) as raised:
        run()
    message = str(raised.value)
    assert "\n" not in message and [text for text in fragments if text not in message] == [], message


LAYERS = "layers are the integers 0 to 15"
BAD_KEYS = [
    ("num_iteration", 5, "unknown key", "num_iterations"),
    ("Train_Seq_Len", 5, "unknown key", "train_seq_len"),
    ("num_iterations", "many", "expected an integer", '"many"'),
    ("num_iterations", 1.5, "expected an integer", "1.5"),
    ("num_iterations", True, "expected an integer", "true"),
    ("cooldown_frac", "0.5", "expected a number", '"0.5"'),
    ("save_checkpoint", 1, "expected true or false", "1"),
    ("value_embedding_gate", 1, "expected true or false", "1"),
    ("train_files", 3, "expected a string", "3"),
    ("train_files", "", "is empty"),
    ("log_dir", "", "is empty"),
    ("seed", "x", "expected an integer", '"x"'),
    ("num_iterations", 0, "at least 1"),
    ("cooldown_frac", 1.5, "at most 1"),
    ("cooldown_frac", -0.1, "at least 0"),
    ("sequences_per_step", 0, "at least 1"),
    ("val_loss_every", -1, "at least 0"),
    ("warmup_steps", -1, "at least 0"),
    ("checkpoint_every", -1, "at least 0"),
    ("step_timeout", 0, "at least 1"),
    ("vocab_size", 70000, "at most 65536"),
    ("run_id", 1000, "at most 999"),
    ("seed", -1, "at least 0"),
    ("value_embedding_std", -0.1, "at least 0"),
    ("value_embedding_lr", -0.1, "at least 0"),
    ("train_seq_len", 1000, "not a multiple of 128", "use 1024"),
    ("val_seq_len", 100, "not a multiple of 128", "use 128"),
    ("value_embeddings", "0", "a list of lists of integers", '"0"'),
    ("value_embeddings", [0, 13], "a list of layers", "write [[0, 13]]"),
    ("value_embeddings", [[1], 0], "table 1 is 0", "as [0, 13]"),
    ("value_embeddings", [[0], []], "table 1 is []"),
    ("value_embeddings", [["a"]], 'table 0: there is no layer "a"', LAYERS),
    ("value_embeddings", [[1.0]], "no layer 1.0", LAYERS),
    ("value_embeddings", [[True]], "no layer true"),
    ("value_embeddings", [[16]], "no layer 16", LAYERS),
    ("value_embeddings", [[-1]], "no layer -1"),
    ("value_embeddings", [[0], [7]], "table 1: layer 7 has no attention", "remove it"),
    ("value_embeddings", [[3, 3]], "table 0: layer 3 is named twice", "remove one"),
]


@pytest.mark.parametrize("key, value, fragments", [(key, value, fragments) for key, value, *fragments in BAD_KEYS])
def test_a_bad_key_of_a_config_is_named_with_the_file(tmp_path, key, value, fragments):
    path = write_config(tmp_path / "c.toml", **{key: value})
    assert_mistake(lambda: read(path), f"{path}: {key}: ", *fragments)


@pytest.mark.parametrize("key, text, fragments", [
    ("num_iterations", "x", ["expected an integer", '"x"']),
    ("num_iterations", "-3", ["-3 is too small"]),
    ("num_iterations", "1\nseed = 3", ["expected an integer"]),
    ("cooldown_frac", "nan", ["nan is too small"]),
    ("value_embedding_std", "inf", ["inf is too large"]),
    ("save_checkpoint", "True", ["expected true or false", '"True"']),
    ("value_embeddings", "[[7]]", ["table 0: layer 7 has no attention"]),
    ("value_embeddings", "[[0,", ["expected a list", "quote the list: --value_embeddings '[[0, 13], [1,"]),
    ("log_dir", "", ["is empty"]),
])
def test_a_bad_option_is_named(tmp_path, key, text, fragments):
    assert_mistake(lambda: read(write_config(tmp_path / "c.toml"), **{key: text}), f"--{key}: ", *fragments)


@pytest.mark.parametrize("words, fragments", [
    ([], ["CONFIG.toml", "usage"]),
    (["c.toml", "--num_iteration", "5"], ["--num_iteration: unknown key", "--num_iterations"]),
    (["c.toml", "--num_iteration=5"], ["--num_iteration: unknown key", "--num_iterations"]),
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
    ("num_iterations", "1_000", 1000),
    ("cooldown_frac", "1", 1.0),
    ("cooldown_frac", "0.25", 0.25),
    ("value_embedding_std", "0", 0.0),
    ("save_checkpoint", "true", True),
    ("value_embeddings", "[[0, 1], [15]]", [[0, 1], [15]]),
    ("value_embeddings", "[[0, 13], [1, 13]]", [[0, 13], [1, 13]]),
    ("value_embeddings", "[]", []),
    ("description", "5", "5"),
    ("train_files", "some/where_*.bin", "some/where_*.bin"),
    ("seed", "7", 7),
])
@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_any_key_can_be_an_option(key, text, value, form, tmp_path):
    path = write_config(tmp_path / "c.toml")
    words = [f"--{key}={text}"] if "=" in form else [f"--{key}", text]
    configs, options, only_check = parse_command_line(Hyperparameters, [str(path), *words], "about")
    assert (configs, only_check) == ([path], False)
    found = getattr(read(path, **options), key)
    assert (found, type(found)) == (value, type(value))


def test_check_and_several_configs_in_any_order():
    words = ["a.toml", "b.toml", "--check", "--seed", "3"]
    assert parse_command_line(Hyperparameters, words, "") == ([Path("a.toml"), Path("b.toml")], {"seed": "3"}, True)


@pytest.mark.parametrize("options, expected", [({}, (300, 30, 3, 5960)), ({"val_loss_every": "4"}, (300, 30, 4, 5960))])
def test_an_option_wins_over_the_scale_over_the_config_over_the_default(tmp_path, options, expected):
    scale = write_config(tmp_path / "scale.toml", warmup_steps=30, val_loss_every=3)
    path = write_config(tmp_path / "c.toml", scale=str(scale), val_tokens=300, warmup_steps=200, val_loss_every=200)
    hp = read(path, **options)
    assert (hp.val_tokens, hp.warmup_steps, hp.val_loss_every, hp.num_iterations) == expected


def test_a_scale_is_a_name_in_the_repository_or_a_path_and_can_be_an_option(tmp_path):
    path = write_config(tmp_path / "c.toml", scale="small")
    other = write_config(tmp_path / "other.toml", model_dim=256)
    assert [read(path).model_dim, read(path, scale="tiny").model_dim, read(path, scale=str(other)).model_dim,
            read(path, scale="").model_dim] == [512, 128, 256, 1024]


@pytest.mark.parametrize("key, value", [
    ("value_embeddings", []), ("value_embedding_gate", True), ("value_embedding_std", 0.5), ("value_embedding_lr", 0.1),
    ("scale", "tiny"), ("seed", 1), ("log_dir", "elsewhere"), ("cooldown_frac", 0.5)])
def test_a_scale_sets_size_and_data_only(tmp_path, key, value):
    scale = write_config(tmp_path / "scale.toml", **{key: value})
    assert_mistake(lambda: read(write_config(tmp_path / "c.toml"), scale=str(scale)),
                   f"{scale}: {key}: a scale sets size and data only", "move this key to the config")


@pytest.mark.parametrize("options, fragments", [
    (dict(scale="tinny"), ["configs/scales/tinny.toml: no such file", "configs/scales/tiny.toml"]),
    (dict(scale="none/x.toml"), ["none/x.toml: no such file"]),
])
def test_a_scale_that_does_not_exist(tmp_path, options, fragments):
    assert_mistake(lambda: read(write_config(tmp_path / "c.toml"), **options), *fragments)


def test_a_config_that_does_not_exist_has_a_suggestion():
    assert_mistake(lambda: read(Path("configs/basline.toml")), "configs/basline.toml: no such file",
                   "did you mean configs/baseline.toml?")


@pytest.mark.parametrize("content, fragments", [
    (b"num_iterations = 5\nseed = = 3\n", ["not a TOML file in UTF-8", "line 2"]),
    (b"seed = 1\nseed = 2\n", ["not a TOML file in UTF-8"]),
    (b"\xff\xfe\x00", ["not a TOML file in UTF-8"]),
])
def test_a_file_that_is_no_toml(tmp_path, content, fragments):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert_mistake(lambda: read(path), str(path), *fragments)


def test_windows_line_ends_and_a_byte_order_mark_are_no_mistake(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\r\nnum_iterations = 5\r\n")
    assert (read(path).seed, read(path).num_iterations) == (3, 5)


def test_the_home_folder_can_be_written_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("~/data_*.bin") == "/home/me/data_*.bin"
