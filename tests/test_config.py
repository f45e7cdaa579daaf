"""configs/config.py, with a dataclass of this file. test_mistakes.py has the mistakes in single keys."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.config import check_log_dir, error_context, expand_path, key, load, parse_command_line


@dataclass(frozen=True)
class Keys:
    steps: int = key(100, "training steps", min=1, max=999, scale=True)
    width: int = key(256, "tokens", multiple_of=128, scale=True)
    seed: int | None = key(None, "seed")
    rate: float = key(0.5, "a fraction", min=0, max=1)
    save: bool = key(False, "a switch")
    files: str = key("data", "files", check=expand_path, scale=True)
    tables: list = key([[0, 13]], "a map", check=lambda tables: [sorted(table) for table in tables])
    scale: str = key("", "a scale")


@pytest.fixture
def read(tmp_path):
    """Read the config `c.toml` of this text, under options."""

    def read(text="", **options):
        (tmp_path / "c.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "s.toml").write_text("steps = 30\nwidth = 128")
        (tmp_path / "bad.toml").write_text("rate = 0.5")
        return load(Keys, tmp_path / "c.toml", {name: text.format(tmp_path) for name, text in options.items()})

    return read


@pytest.mark.parametrize("text, options, message", [
    ("Width = 5", {}, "{}/c.toml: Width: unknown key; did you mean width?"),
    ("x = 5", {}, "{}/c.toml: x: unknown key; use one of steps, width, seed, rate, save, files, tables, scale"),
    ("seed = 1.5", {}, "{}/c.toml: seed: expected an integer, found 1.5"),
    ("steps = 5\nseed = = 3", {}, "{}/c.toml: not a TOML file in UTF-8: Invalid value (at line 2"),
    (b"\xff\xfe\0", {}, "{}/c.toml: not a TOML file in UTF-8"),
    ("scale = 'no/x.toml'", {}, "{}/c.toml: scale: no/x.toml: not a file; use one of configs/scales/*.toml"),
    ("", dict(tables="[[0,"), "--tables: expected a list, found \"[[0,\"; close its brackets and quote it: --tables"),
    ("", dict(scale="{}/bad.toml"),
     "--scale: {}/bad.toml: rate: a scale sets only size and data; move this key to the config"),
    ([], {}, "the following arguments are required: CONFIG.toml; usage"),
    (["c.toml", "--files", "a_1.bin", "a_2.bin"], {}, "unexpected argument a_2.bin: name a config by its .toml file, "
     "set a key with --KEY VALUE, and quote a VALUE with brackets, spaces or *"),
])
def test_a_mistake_is_one_line_with_its_place_and_fix(read, tmp_path, text, options, message):
    """In a config, in an option, or in the words of a command line."""
    with pytest.raises(ValueError) as raised:
        parse_command_line(Keys, text, "about") if isinstance(text, list) else read(text, **options)
    assert str(raised.value).startswith(message.format(tmp_path)) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name, text, value", [
    ("steps", "9_9", 99), ("rate", "1", 1.0), ("rate", "0.25", 0.25), ("seed", "7", 7), ("save", "true", True),
    ("tables", "[[13, 0], []]", [[0, 13], []]), ("files", "5", "5"), ("files", "~/a_*.bin", f"{Path.home()}/a_*.bin"),
])
def test_any_key_can_be_an_option_beside_several_configs_and_flags_in_any_order(read, name, text, value):
    for words in ([f"--{name}={text}"], [f"--{name}", text]):
        configs, overrides, options = parse_command_line(Keys, ["a.toml", "b.toml", "--check", "--json", *words], "")
        found = getattr(read(**overrides), name)
        assert (configs, found, type(found)) == ([Path("a.toml"), Path("b.toml")], value, type(value))
        assert options.json and options.check


def test_help_explains_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_command_line(Keys, ["--help"], "about")
    assert "--steps VALUE training steps (default: 100)" in " ".join(capsys.readouterr().out.split())


def test_an_option_wins_over_the_scale_over_the_config_over_the_default(read):
    keys = read("scale = '{}/s.toml'\nsteps = 1\nseed = 1", scale="{}/s.toml", width="512")
    assert (keys.steps, keys.width, keys.seed, keys.rate) == (30, 512, 1, 0.5)
    assert read("steps = 1\nscale = 'x'", scale="").steps == 1
    assert read(b"\xef\xbb\xbfseed = 3\r\nsteps = 5\r\n") == Keys(seed=3, steps=5)  # a file from Windows


def test_a_folder_that_cannot_hold_logs_and_an_error_of_the_system_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="log_dir: cannot write logs below .*/file; set log_dir to a writable folder"):
        check_log_dir(tmp_path / "file" / "logs")
    with pytest.raises(ValueError, match="^place: .*No such file"), error_context("place"):
        open(tmp_path / "nowhere")
