"""Checks: each mistake of a user gives its one line and exit status 2, before anything starts."""

import time

import numpy as np
import pytest
import torch
from golden import golden_weights
from helpers import random_tokens, write_config, write_shard

import train_gpt_medium as train


@pytest.fixture
def check(capsys):
    """Runs `--check` in this process; returns (exit status, lines on standard error, standard output)."""

    def run(*arguments):
        status = train.main([*map(str, arguments), "--check"])
        captured = capsys.readouterr()
        return status, captured.err.splitlines(), captured.out

    return run


def assert_one_line(result, *fragments):
    status, errors, output = result
    assert (status, len(errors), output) == (2, 1, ""), errors
    for fragment in fragments:
        assert str(fragment) in errors[0]


def test_a_good_config_passes_and_shows_map_and_counts(check, small_config):
    status, errors, output = check(small_config())
    assert (status, errors) == (0, [])
    assert train.draw_map([[0, 13], [1, 14], [2, 15]]) in output
    assert "hidden matrices" in output and "98,304  value embeddings" in output


def test_check_leaves_no_trace(check, small_config, tmp_path):
    check(small_config())
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


def test_fast_paths_need_triton_on_cuda(check, small_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "triton", None)
    assert_one_line(check(small_config(fast_paths=["mlp"])), "small.toml: fast_paths: needs Triton", "leave the key out")


BAD_KEYS = [
    ("num_iteration", 5, "unknown key", "num_iterations"),
    ("Train_Seq_Len", 5, "unknown key", "train_seq_len"),
    ("num_iterations", "many", "an integer", '"many"'),
    ("num_iterations", 1.5, "an integer", "1.5"),
    ("num_iterations", True, "an integer", "true"),
    ("cooldown_frac", "0.5", "a number", '"0.5"'),
    ("save_checkpoint", 1, "true or false", "1"),
    ("train_files", 3, "a string", "3"),
    ("seed", "x", "an integer", '"x"'),
    ("num_iterations", 0, "at least 1"),
    ("cooldown_frac", 1.5, "at most 1"),
    ("cooldown_frac", -0.1, "at least 0"),
    ("sequences_per_step", 0, "at least 1"),
    ("val_loss_every", -1, "at least 0"),
    ("warmup_steps", -1, "at least 0"),
    ("vocab_size", 70000, "at most 65536"),
    ("run_id", 1000, "at most 999"),
    ("seed", -1, "at least 0"),
    ("train_seq_len", 1000, "multiple of 128", "896 or 1024"),
    ("val_seq_len", 100, "multiple of 128", "use 128"),
    ("value_embeddings", "0", "a list of tables"),
    ("value_embeddings", [0, 13], "table 0 is 0", "write [0]"),
    ("value_embeddings", [["a"]], "not an integer", '"a"'),
    ("value_embeddings", [[1.0]], "not an integer", "1.0"),
    ("value_embeddings", [[True]], "not an integer"),
    ("value_embeddings", [[0], []], "table 1 is empty"),
    ("value_embeddings", [[16]], "no layer 16", "0 to 15"),
    ("value_embeddings", [[-1]], "no layer -1"),
    ("value_embeddings", [[0], [7]], "layer 7 has no attention"),
    ("value_embeddings", [[0, 13], [1, 13]], "layer 13 is named twice", "table 0 and table 1"),
    ("value_embeddings", [[3, 3]], "layer 3 is named twice"),
    ("fast_paths", "mlp", "a list of names", '"mlp"'),
    ("fast_paths", [1], "a list of names"),
    ("fast_paths", ["attention"], 'no fast path "attention"', "tables, mlp, head, blocks"),
    ("fast_paths", ["mlp", "head", "mlp"], "mlp is named twice"),
]


@pytest.mark.parametrize("key, value, fragments", [(key, value, fragments) for key, value, *fragments in BAD_KEYS])
def test_a_bad_key_of_a_config_is_named_with_the_file(check, small_config, key, value, fragments):
    path = small_config(**{key: value})
    assert_one_line(check(path), f"{path}: {key}: ", *fragments)


@pytest.mark.parametrize("option, fragments", [
    (["--num_iteration", "5"], ["--num_iteration: unknown key", "--num_iterations"]),
    (["--num_iteration=5"], ["--num_iteration: unknown key", "--num_iterations"]),
    (["--num_iterations", "x"], ["--num_iterations: expected an integer", '"x"']),
    (["--num_iterations", "0"], ["--num_iterations: 0 is too small"]),
    (["--num_iterations", "-3"], ["--num_iterations: -3 is too small"]),
    (["--num_iterations", "1\nseed = 3"], ["--num_iterations: expected an integer"]),
    (["--cooldown_frac", "nan"], ["--cooldown_frac: nan is too small"]),
    (["--save_checkpoint", "True"], ["--save_checkpoint: expected true or false", '"True"']),
    (["--value_embeddings", "[[7]]"], ["--value_embeddings: table 0: layer 7 has no attention"]),
    (["--num_iterations"], ["expected one argument", "usage"]),
    (["other.toml"], ["other.toml: no such config file"]),
    (["--log_dir", ""], ["--log_dir: is empty"]),
    (["--train_files", "\udce9*.bin"], ["train_files: no file matches \\udce9*.bin"]),
])
def test_a_bad_option_is_named(check, small_config, option, fragments):
    assert_one_line(check(small_config(), *option), *fragments)


def test_no_config_named(check):
    assert_one_line(check(), "CONFIG.toml", "usage")


def test_no_such_config(check):
    assert_one_line(check("configs/basline.toml"), "configs/basline.toml: no such config", "baseline.toml")


def test_toml_syntax_error_is_named_with_its_line(check, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("num_iterations = 5\nseed = = 3\n")
    assert_one_line(check(path), path, "TOML syntax error", "line 2")


def test_windows_line_ends_and_a_byte_order_mark_are_no_mistake(check, small_config):
    path = small_config()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert check(path)[0] == 0


def test_a_config_that_is_no_text(check, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert_one_line(check(path), path, "UTF-8")


@pytest.mark.parametrize("keys, fragments", [
    (dict(model_dim=256), ["model_dim: 256 is not 128 * num_heads", "use 128"]),
    (dict(val_tokens=1000), ["val_tokens: 1000 is not divisible by val_seq_len 256", "use 1024"]),
    (dict(train_files="nowhere/*.bin"), ["train_files: no file matches nowhere/*.bin"]),
    (dict(val_files="nowhere/*.bin"), ["val_files: no file matches nowhere/*.bin"]),
    # 3 shards of 20,000 hold 39 batches of 512 each: 38 * 512 + 512 + 1 < 20,000
    (dict(num_iterations=118), ["train_files: too few tokens", "60,416", "60,000", "good for 117"]),
    (dict(val_tokens=10240), ["val_files: too few tokens", "10,240", "10,000", "good for 39"]),
    (dict(vocab_size=200), ["s_train_000001.bin", "vocab_size is 200"]),
    (dict(init_from="nowhere.pt"), ["init_from: nowhere.pt: no such file"]),
])
def test_keys_that_do_not_fit_each_other_or_the_data(check, small_config, keys, fragments):
    path = small_config(**keys)
    assert_one_line(check(path), f"{path}: ", *fragments)


def test_exactly_enough_tokens_pass(check, small_config):
    assert check(small_config(num_iterations=117, val_tokens=9984))[0] == 0


@pytest.mark.parametrize("world_size, keys, fragments", [
    (3, {}, ["sequences_per_step: 4 sequences cannot be divided among 3 ranks", "1 or 2 or 4"]),
    (4, dict(val_tokens=512), ["val_tokens: 2 validation sequences", "4 ranks", "1 or 2 ranks"]),
])
def test_a_world_size_that_does_not_divide_the_work(check, small_config, monkeypatch, world_size, keys, fragments):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert_one_line(check(small_config(**keys)), *fragments)


@pytest.mark.parametrize("which", ["train", "val"])
@pytest.mark.parametrize("bad, fragment", [
    (dict(magic=1), "magic number 1 instead of 20240520"),
    (dict(version=2), "version 2 instead of 1"),
    (dict(count=100), "wrong length"),
    (dict(count=30_000), "wrong length"),
    (dict(count=-5), "wrong length"),
])
def test_a_bad_shard_is_named(check, small_config, tmp_path, which, bad, fragment):
    write_shard(tmp_path / "b_1.bin", random_tokens(20_000, seed=1, vocab_size=256))
    write_shard(tmp_path / "b_2.bin", random_tokens(20_000, seed=1, vocab_size=256), **bad)
    assert_one_line(check(small_config(**{f"{which}_files": f"{tmp_path}/b_*.bin"})), f"{which}_files: {tmp_path}/b_2.bin: ", fragment)


@pytest.mark.parametrize("size", [0, 100, 1023, 1024])
def test_a_shard_that_is_too_short_for_its_header_or_empty(check, small_config, tmp_path, size):
    (tmp_path / "b_1.bin").write_bytes((np.array([20240520, 1, 0] + 253 * [0], "<i4").tobytes())[:size])
    assert_one_line(check(small_config(train_files=f"{tmp_path}/b_*.bin")), f"{tmp_path}/b_1.bin: ")


def test_a_folder_among_the_shards(check, small_config, tmp_path):
    (tmp_path / "b_1.bin").mkdir()
    assert_one_line(check(small_config(train_files=f"{tmp_path}/b_*.bin")), "train_files: ", f"{tmp_path}/b_1.bin")


def test_one_wrong_token_id_in_a_small_shard_is_found(check, small_config, tmp_path):
    tokens = random_tokens(1_000_000, seed=1, vocab_size=256)
    tokens[765_432] = 256
    write_shard(tmp_path / "b_1.bin", tokens)
    assert_one_line(check(small_config(train_files=f"{tmp_path}/b_*.bin")), f"{tmp_path}/b_1.bin: holds token id 256", "vocab_size is 256")


def test_wrong_token_ids_here_and_there_in_a_large_shard_are_found(tmp_path):
    tokens = np.zeros(3 * train.WHOLLY_CHECKED_TOKENS, np.uint16)
    tokens[::10_000] = 300
    write_shard(tmp_path / "b_1.bin", tokens)
    with pytest.raises(ValueError, match="holds token id 300"):
        train.check_stream(str(tmp_path / "*.bin"), 256, 1024, 1, "a test")


@pytest.mark.slow
def test_checking_32_shards_of_200_mb_takes_under_two_seconds(tmp_path):
    """One file under 32 names, so that the test needs no 6.4 GB of disk; the sampling is that of 32 files."""
    shard = np.zeros(100_000_000, np.uint16)
    write_shard(tmp_path / "b_00.bin", shard)
    for i in range(1, 32):
        (tmp_path / f"b_{i:02d}.bin").hardlink_to(tmp_path / "b_00.bin")
    start = time.perf_counter()
    train.check_stream(str(tmp_path / "*.bin"), 50257, 8 * 65536, 5960, "a test")
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("last_line, taken", [
    ("peak memory allocated: 1 MiB reserved: 2 MiB\n", True),
    ("peak memory resident: 1 MiB\n", True),
    ("peak memory resident: 1 MiB", False),  # torn: it was still being written
    ("step:4/4 val_loss:5.000000 train_time:5ms step_avg:1.00ms\n", False),
    ("", False),
])
def test_an_explicit_run_id_is_taken_by_a_finished_run(check, small_config, tmp_path, last_line, taken):
    log = tmp_path / "logs" / "small" / "005.txt"
    log.parent.mkdir(parents=True)
    log.write_text("peak memory resident: 1 MiB\n" + 100 * "the text of the program\n" + last_line)
    if taken:
        assert_one_line(check(small_config(), "--run_id", 5), "run_id: run 5 is finished", "never overwritten")
    else:
        assert check(small_config(), "--run_id", 5)[0] == 0
    assert check(small_config(), "--run_id", 6)[0] == 0


def test_a_checkpoint_without_its_log_is_not_gone_on_with(check, small_config, tmp_path):
    (tmp_path / "logs" / "small").mkdir(parents=True)
    (tmp_path / "logs" / "small" / "005.ckpt").touch()
    assert_one_line(check(small_config(), "--run_id", 5), "run 5 has a checkpoint", "but no log")


def test_a_config_whose_logs_would_be_outside_log_dir(check, small_config, tmp_path):
    small_config().rename(tmp_path / "...toml")
    assert_one_line(check(tmp_path / "...toml"), "...toml: ", "outside log_dir", "rename the config")


def test_several_configs_are_checked_together_and_run_one_by_one(check, small_config, tmp_path, capsys):
    first = small_config()
    second = tmp_path / "second.toml"
    second.write_text(first.read_text())
    status, errors, output = check(first, second)
    assert (status, errors) == (0, []) and f"logs: {tmp_path}/logs/small\n" in output and f"logs: {tmp_path}/logs/second\n" in output
    second.write_text(first.read_text().replace("num_iterations = 4", "num_iterations = 0"))
    assert_one_line(check(first, second), f"{second}: num_iterations: 0 is too small")
    assert train.main([str(first), str(second)]) == 2
    assert "one config a run" in capsys.readouterr().err


def test_a_link_to_nowhere_in_place_of_a_log_or_folder(check, small_config, tmp_path):
    """As where a volume is not mounted: its run_id is taken, and a folder cannot be made there."""
    log = tmp_path / "logs" / "small" / "000.txt"
    log.parent.mkdir(parents=True)
    log.symlink_to("/nowhere/000.txt")
    config = small_config()
    assert train.choose_run_id(train.load_hyperparameters(config, {}), config) == 1
    (tmp_path / "link").symlink_to("/nowhere")
    assert_one_line(check(small_config(log_dir=f"{tmp_path}/link")), "log_dir: cannot write")


def test_an_old_format_checkpoint_is_read(check, small_config, tmp_path):
    torch.save({"model": fitting_weights()}, tmp_path / "init.pt", _use_new_zipfile_serialization=False)
    assert check(small_config(init_from=f"{tmp_path}/init.pt"))[0] == 0


def test_log_dir_that_is_a_file(check, small_config, tmp_path):
    (tmp_path / "file").touch()
    assert_one_line(check(small_config(log_dir=f"{tmp_path}/file")), "log_dir: cannot write")


def fitting_weights():
    return golden_weights(num_tables=3, d=128, vocab_size=256)


@pytest.mark.parametrize("change, fragments", [
    (lambda w: w.pop("value_embeds.2.weight"), ["value_embeds.2.weight is missing"]),
    (lambda w: w.update({"value_embeds.3.weight": w["embed.weight"]}), ["value_embeds.3.weight is not in this model"]),
    (lambda w: w.update({"scalars": torch.zeros(79)}), ["scalars is [79] instead of [80]"]),
    (lambda w: w.update({"scalars": 3}), ["scalars is int instead of [80]"]),
    (lambda w: w.update({"scalars": torch.zeros(80, dtype=torch.int64)}), ["scalars is no plain tensor of finite numbers"]),
    (lambda w: w.update({"scalars": torch.zeros(80, dtype=torch.complex64)}), ["scalars is no plain tensor of finite numbers"]),
    (lambda w: w.update({"scalars": torch.zeros(80, device="meta")}), ["scalars is no plain tensor of finite numbers"]),
    (lambda w: w["embed.weight"][7, 7].fill_(torch.nan), ["embed.weight is no plain tensor of finite numbers"]),
])
def test_a_checkpoint_that_does_not_fit_the_map(check, small_config, tmp_path, change, fragments):
    weights = fitting_weights()
    change(weights)
    torch.save({"model": weights}, tmp_path / "init.pt")
    assert_one_line(check(small_config(init_from=f"{tmp_path}/init.pt")), f"init_from: {tmp_path}/init.pt: ", *fragments)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", 1000 * b"\0"])
def test_a_file_that_is_no_checkpoint(check, small_config, tmp_path, content):
    (tmp_path / "init.pt").write_bytes(content)
    assert_one_line(check(small_config(init_from=f"{tmp_path}/init.pt")), f"init_from: {tmp_path}/init.pt: not a checkpoint")


class RunsCode:
    """Unpickling this would run a program."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('this was run')",))


def test_a_checkpoint_cannot_run_code(check, small_config, tmp_path):
    torch.save({"model": RunsCode()}, tmp_path / "init.pt")
    assert_one_line(check(small_config(init_from=f"{tmp_path}/init.pt")), "not a checkpoint")


def test_a_missing_shard_of_a_config_in_the_repository(check, tmp_path, monkeypatch):
    """Without FineWeb every config stops at the data, not before."""
    monkeypatch.chdir(tmp_path)
    for path in sorted((train.Path(train.__file__).parent / "configs").glob("*.toml")):
        if path.stem != "tiny":
            assert_one_line(check(path), f"{path}: train_files: no file matches data/fineweb10B/fineweb_train_*.bin")


def test_the_empty_config_is_the_baseline(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(check(write_config(tmp_path / "empty.toml")), "data/fineweb10B/fineweb_train_*.bin")
