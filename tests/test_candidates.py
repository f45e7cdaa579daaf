"""Candidates and benchmark, in Triton's interpreter: each candidate computes what the model's own method does, in fp32.

test_gpu.py tests them in bf16.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from golden import golden_weights
from helpers import ROOT, relative_error

import train_gpt_medium as train

pytest.importorskip("triton")
import candidates  # noqa: E402

ON_A_CPU = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ON_A_CPU, reason="on a GPU, test_gpu.py runs them")]
SMALL = dict(num_heads=1, model_dim=128, train_seq_len=128, val_seq_len=128)
SOME_OFTEN = torch.tensor([0, 7, 3, *[7] * 70, 9, 49, 49], dtype=torch.int32)  # more than a tile's rows of a token


def random_tokens(n, vocab_size):
    return torch.randint(0, vocab_size, (n,), generator=torch.Generator().manual_seed(0)).int()


@pytest.mark.parametrize("name, tokens, dtype, tolerance, head_scale", [
    ("tables", SOME_OFTEN, torch.float32, 1e-6, 1), ("tables", SOME_OFTEN, torch.bfloat16, 2**-8, 1),
    ("mlp", random_tokens(128, 50), torch.float32, 1e-6, 1), ("head", random_tokens(30, 50), torch.float32, 1e-6, 1),
    ("head", random_tokens(30, 50), torch.float32, 1e-6, 200)],
    ids=["tables", "tables in bf16", "mlp", "head", "head, logits at the cap"])
def test_a_part_and_its_gradients_equal_the_model_s(name, tokens, dtype, tolerance, head_scale, monkeypatch):
    """In fp64. Sums of a table's rows are rounded to bf16 once. (The interpreter truncates instead.)"""
    monkeypatch.setattr(candidates, "ROW_SUMS_PROGRAMS", 12)  # each has several tokens
    monkeypatch.setattr(candidates, "HEAD_CHUNK_TOKENS", 24)  # the last chunk is shorter
    monkeypatch.setitem(candidates.HEAD_TILE, "TILE", 256 if head_scale == 1 else 32)  # more and less than a row
    hp = train.Hyperparameters(vocab_size=50, value_embeddings=[[0, 13]], **SMALL)
    expected = candidates.evaluate(hp, name, [], tokens, torch.float64, head_scale)
    actual = candidates.evaluate(hp, name, [name], tokens, dtype, head_scale)
    for result, reference in zip(actual, expected, strict=True):
        assert relative_error(result, reference) < tolerance


def losses_and_gradients(names, is_compiled=False):
    """Of a model with several tables in a layer, and gates: losses with and without gradients, and all gradients."""
    hp = train.Hyperparameters(**SMALL, vocab_size=50, value_embeddings=[[0, 13], [0, 1, 2]], value_embedding_gate=True)
    model = train.GPT(hp)
    model.load_state_dict(golden_weights(hp.value_embeddings, 128, 50, gate=True))
    candidates.apply(model, names)
    if is_compiled:
        torch._dynamo.reset()
        model.compile_parts(128)
    tokens = random_tokens(129, 50)
    sequence = tokens[:-1], tokens[1:].long(), torch.tensor(2, dtype=torch.int32)
    with torch.no_grad():
        without_gradients = model(*sequence)
    loss = model(*sequence)
    loss.backward(gradient=torch.tensor(0.3))
    return [loss.item(), without_gradients.item()], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_model_has_the_same_loss_and_gradients(is_compiled):
    """Compiled: the compiler's code for CPUs around the interpreted kernels."""
    expected, expected_gradients = losses_and_gradients([])
    losses, gradients = losses_and_gradients(candidates.CANDIDATES, is_compiled)
    assert losses == pytest.approx(expected, abs=3e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-5, name


# -----------------------------------------------------------------------------
# The benchmark, at its tiny size


def run_benchmark(path, *parts, env=()):
    """Run parts of the benchmark without a GPU; return its rows, its figures and what it printed."""
    command = [sys.executable, ROOT / "tests/benchmark.py", *parts, "--json", path]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | dict(env)
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(path.read_text())
    return {row["part"]: row for row in record["rows"]}, record["figures"], result.stdout


@pytest.mark.slow
def test_plain_and_candidates_are_compared(tmp_path):
    rows, figures, output = run_benchmark(tmp_path / "b.json", "machine", "parts")
    for name in ("embedding and tables", "MLP", "head and loss"):
        assert rows[name]["plain"] > 0 and rows[name]["candidates"] > 0
    assert f"| MLP | {rows['MLP']['plain']:,.2f} |" in output and set(figures["rates"]) == {"TFLOP/s", "GB/s"}


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
    rows, figures, output = run_benchmark(tmp_path / "b.json", "step", "tables", "start", "profile")
    assert {"one sequence", "a validation sequence", "Muon, all"} <= set(rows)
    assert set(figures) == {"start, cold", "start, warm"}
    assert "Self CPU time total" in output
