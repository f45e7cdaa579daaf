"""logs/log_format.py: step lines, headers, and the comparison of two programs and configurations."""

import math

import pytest

from logs import log_format
from logs.log_format import RULE, Header, StepLine, differences, format_header, format_step_line, parse_step_lines

VALIDATION = "step:125/5960 val_loss:4.325680 train_time:27923ms step_avg:223.39ms"
TRAINING = "step:126/5960 train_time:28146ms step_avg:223.38ms"
ENVIRONMENT = f"Running Python 3.12.7 (main)\nRunning PyTorch 2.9.0\n|=========+=========|\n{RULE}\n"
LOOK_ALIKE = f'"""A log has lines:\n{VALIDATION}\n{RULE}\nlr = 0.3\n{RULE}\n{TRAINING}\n"""\nx = 1\n'
KEYS = dict(description='" ünicode\u2028\x85\\udce9\udce9', ve=[[0, 13]], seed=None, gate=False, data=[["a", 9, "b"]])


@pytest.mark.parametrize("values, line", [
    ((125, 5960, 27923.4, 4.32568), VALIDATION), ((126, 5960, 28146.0), TRAINING),
    ((0, 5960, 0.17, 10.82584), "step:0/5960 val_loss:10.825840 train_time:0ms step_avg:0.17ms"),
    ((2, 9, 5.0, math.inf), "step:2/9 val_loss:inf train_time:5ms step_avg:2.50ms")])
def test_step_lines_to_the_letter(values, line):
    step, total, time_ms, val_loss = (*values, None)[:4]
    parsed = StepLine(step, total, val_loss, round(time_ms), round(time_ms / max(step, 1), 2))
    assert format_step_line(*values) == line and list(parse_step_lines(line)) == [parsed]


@pytest.mark.parametrize("line, n", [
    (f"{VALIDATION}\n{TRAINING}\u2028more\n{TRAINING}\n", 2), (f"{VALIDATION} lx:0.773 y:-1\n", 1),
    (VALIDATION.replace("4.325680", "nan"), 1), (VALIDATION[:-1], 0), (f" {VALIDATION}", 0), (f"{VALIDATION} x", 0),
    (VALIDATION.replace("4.32", "4.3\0"), 0), (VALIDATION.replace("loss:", "loss:-"), 0),
    (VALIDATION.replace("125", "१२५"), 0), (VALIDATION.replace("125", "9" * 13), 0)])
def test_only_complete_step_lines_count(line, n):
    assert [(step.step, step.step_avg_ms) for step in parse_step_lines(line)] == [(125, 223.39), (126, 223.38)][:n]


def test_the_code_is_that_of_the_files_that_decide_the_numbers():
    for name in ("train_gpt_medium.py", "configs/checks.py", "data/loader.py", "data/shards.py"):
        assert f"# {name}\n{(log_format.ROOT / name).read_text('utf-8')}" in log_format.program_text()


@pytest.mark.parametrize("code", ["# a.py\nx = 1\n\n# b", LOOK_ALIKE, f"{LOOK_ALIKE}{RULE}\n{ENVIRONMENT}{TRAINING}"])
def test_a_header_is_read_as_it_was_written(tmp_path, code):
    path, text = tmp_path / "000.txt", format_header(code, KEYS, ENVIRONMENT.split(RULE)[0], "a map")
    path.write_text(f"{text}\n{VALIDATION}\n", encoding="utf-8", errors="backslashreplace")
    expected = (code, KEYS), f"\n{VALIDATION}\n"
    assert log_format.split_log(path.read_text()) == expected and log_format.read_header(path) == expected[0]
    assert log_format.split_log(f"x\n{RULE}\nlr = 0.3\n{RULE}\nend") == (("x", {"lr": 0.3}), "\nend")  # no environment
    assert 'ünicode\u2028\x85' in text and 'seed = null\ngate = false\ndata = [["a", 9, "b"]]\n' in text


@pytest.mark.parametrize("text, code", [
    ("", None), (f"{VALIDATION}\n", ""), (f"code\n{RULE}\n{ENVIRONMENT}", "code"),
    (f"{LOOK_ALIKE}{RULE}\n{ENVIRONMENT}{VALIDATION}\n{RULE}\nend\n", LOOK_ALIKE[:-1]),
    *((f"code\n{RULE}\nseed = {value}\n{RULE}\n{VALIDATION}\n", None) for value in ("\0", "[" * 99999))], ids=range(6))
def test_a_log_without_a_readable_configuration(tmp_path, text, code):
    """The speedrun's logs and bare result lines are such logs."""
    path = tmp_path / "000.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: no readable configuration in its header; move the log away"):
        log_format.read_header(path)
    header, results = log_format.split_log(text)
    assert code is None or header == Header(code, {})
    assert len(list(parse_step_lines(results))) == text.replace(LOOK_ALIKE, "").count("val_loss")


@pytest.mark.parametrize("edited, same", [
    ('# new\n"""About."""\ndef f(a,\n      b):\n    """Adds."""\n    return (a + 1)  # why\n"""Second file."""', True),
    ("def f(a, b): return a + 2", False), ("def f(a, b): return 'a + 1'", False), ("def f(a, b) return a + 1", False)])
def test_comments_formatting_and_docstrings_are_not_code(edited, same):
    changes = differences({"code": "def f(a, b):\n    return a + 1\n"}, {"code": edited}, ())
    assert changes == ([] if same else ["the code has changed"])


@pytest.mark.parametrize("text", ["not Python at all", "x = \0", "(" * 9999, "-" * 99999 + "1"], ids=str.__len__)
def test_texts_that_do_not_parse_are_compared_as_text(text):
    assert differences({"code": text}, {"code": f"{text} "}, ()) == ["the code has changed"]


def test_differences_are_named_with_both_values():
    then = dict(seed=1, same=(1, 2), lr=0.3, gate=True, train_data="a" * 200)
    now = dict(seed=2, same=[1, 2], lr=0.1, train_data="b" * 200, width=256)
    assert differences(then, now, {"seed"}) == [
        "lr was 0.3 and is 0.1", "gate was true and is null", "train_data has changed", "width was null and is 256"]
