"""The benchmark of the step, at its tiny size: every part runs and says what it timed."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytest.importorskip("triton")


def run_benchmark(path, *parts, env=()):
    """Run parts of the benchmark without a GPU; return what it wrote to `path` and printed."""
    command = [sys.executable, ROOT / "tests/benchmark.py", *parts, "--json", path]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | dict(env)
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(path.read_text())
    assert record["left_out"] == record["failed"] == []
    return {row["part"]: row for row in record["rows"]}, record["figures"], result.stdout


@pytest.mark.slow
def test_an_unknown_part_is_a_mistake():
    result = subprocess.run([sys.executable, ROOT / "tests/benchmark.py", "part"], capture_output=True, text=True)
    assert result.returncode == 2 and "invalid choice: 'part' (choose from 'machine', 'parts'," in result.stderr


@pytest.mark.slow
def test_plain_and_candidates_are_compared(tmp_path):
    rows, _, output = run_benchmark(tmp_path / "b.json", "machine", "parts")
    for name in ("embedding and 3 tables", "MLP", "head and loss"):
        assert all(rows[name][key] > 0 for key in ("plain", "candidates", "floor"))
    assert f"| MLP | {rows['MLP']['plain']:,.2f} |" in output


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path):
    """At full size, in bf16: within its shared memory, no register spilled, products by its own instruction."""
    _, kernels, _ = run_benchmark(tmp_path / "b.json", "kernels", env={"TRITON_INTERPRET": "0"})
    assert len(kernels) == 5
    for name, kernel in kernels.items():
        assert 0 < kernel["shared"] <= 227 * 1024 and 0 < kernel["registers"] <= 255 and kernel["spilled"] == 0, name
        assert kernel["wgmma"] == name.startswith("MLP"), name


@pytest.mark.campaign
def test_the_other_parts_run(tmp_path):
    rows, figures, output = run_benchmark(tmp_path / "b.json", "step", "tables", "start", "profile", "options")
    assert {"one sequence", "a validation sequence", "Muon, all"} <= set(rows)
    assert set(figures) == {"start, cold", "start, warm"}
    assert "Self CPU time total" in output
