"""The repository's own rules: ruff, the directions of imports, and no side effects of importing."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

MODULES = sorted(path for folder in ("configs", "data", "logs") for path in (ROOT / folder).glob("*.py"))
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem != "__init__"]


def assert_silent(*arguments, cwd=ROOT):
    """Runs Python, with the repository importable, which must end well without a word."""
    command, env = [sys.executable, *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ruff_finds_nothing():
    assert_silent("-m", "ruff", "check", "--quiet", "--no-cache", "--output-format=concise", ".")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_knows_nothing_of_the_training_script_and_shadows_no_library(path):
    assert not re.search(r"^\s*(import|from) train_gpt_medium\b", path.read_text(), re.MULTILINE)
    assert path.stem not in sys.stdlib_module_names  # python logs/X.py puts logs/ first on the path


@pytest.mark.slow
def test_importing_has_no_side_effects(tmp_path):
    assert_silent("-c", f"""
import os, signal, sys, threading
environment, handlers = dict(os.environ), [signal.getsignal(number) for number in (2, 15)]
import {', '.join(NAMES)}, train_gpt_medium
import torch
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert [signal.getsignal(number) for number in (2, 15)] == handlers and threading.active_count() == 1
changed = {{name for name in {{*environment, *os.environ}} if environment.get(name) != os.environ.get(name)}}
assert not any("TORCH" in name or "CUDA" in name or "OMP" in name for name in changed), changed
""", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_configs_data_and_logs_are_read_without_pytorch():
    """Fetching, making data, comparing and status do not wait for it."""
    modules = "configs.keys, data.cached_fineweb10B, data.local_text, logs.compare, logs.run_log, logs.status"
    assert_silent("-c", f"import {modules}, sys; assert 'torch' not in sys.modules")
