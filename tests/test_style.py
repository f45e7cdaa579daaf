"""Test the repository's rules: ruff, one-way imports, no side effects at import."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

MODULES = sorted(path for folder in ("configs", "data", "logs") for path in (ROOT / folder).glob("*.py"))
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem != "__init__"]


def assert_silent(*arguments, cwd=ROOT):
    """Run Python, with the repository importable: it must succeed without a word."""
    command, env = [sys.executable, *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ruff_finds_nothing():
    assert_silent("-m", "ruff", "check", "--quiet", "--no-cache", "--output-format=concise", ".")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_one_way_and_a_module_shadows_no_library(path):
    """data <- logs <- configs <- script."""
    layers = ["data", "logs", "configs", "train_gpt_medium"]
    later = "|".join(layers[layers.index(path.parent.name) + 1 :])
    assert not re.search(rf"^\s*(import|from) ({later})\b", path.read_text(), re.MULTILINE)
    assert path.stem not in sys.stdlib_module_names  # python logs/X.py puts logs/ first on the path


@pytest.mark.slow
def test_importing_prints_writes_and_starts_nothing(tmp_path):
    started = "torch.distributed.is_initialized() or torch.cuda.is_initialized() or threading.active_count() > 1"
    modules = ", ".join([*NAMES, "threading", "torch", "train_gpt_medium"])
    assert_silent("-c", f"import {modules}; assert not ({started})", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_starts_often_imports_little():
    """The queue no NumPy; fetching, making data and comparing no PyTorch; status no package."""
    modules = "data.cached_fineweb10B, data.local_text, logs.compare, logs.run_log"
    assert_silent("-c", f"import {modules}, sys; assert not {{'torch', 'huggingface_hub'}} & set(sys.modules)")
    assert_silent("-c", "import configs.run_queue, sys; assert not {'torch', 'numpy'} & set(sys.modules)")
    assert_silent("-S", "-c", "import logs.status")


@pytest.mark.slow
def test_a_check_does_not_import_the_compiler():
    assert_silent("-c", "import sys, train_gpt_medium as train; hp = train.Hyperparameters(); "
                  "train.check_run(hp, '', 1); assert not {'torch._dynamo', 'sympy'} & set(sys.modules)")
