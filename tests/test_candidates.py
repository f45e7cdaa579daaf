"""Candidates: each computes what the model's own way does, in fp32 in Triton's interpreter. In bf16: test_gpu.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from golden import golden_weights
from helpers import ROOT, relative_error

import train_gpt_medium as train

pytest.importorskip("triton")
import candidates  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU, test_gpu.py runs them")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TOKENS = {
    "random": torch.randint(0, 250, (64,), generator=torch.Generator().manual_seed(0), dtype=torch.int32),
    "a frequent one": torch.tensor([7] * 60 + [3, 7, 9, 7, 249, 0] + [7] * 50, dtype=torch.int32),
    "only one": torch.full((64,), 249, dtype=torch.int32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_gradient_of_a_table_is_the_sum_of_its_rows_gradients(tokens, dtype):
    """In fp32, rounded to bf16 once: bf16 sums of 100 rows would be far off. (The interpreter truncates instead.)"""
    grad = normal(len(tokens), 128).to(dtype)
    expected = torch.zeros(250, 128, dtype=torch.float64).index_add(0, tokens, grad.double())
    actual = candidates.table_gradient(grad, 250, *candidates.find_occurrences(tokens))
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < (1e-6 if dtype == torch.float32 else 2**-8)


def test_mlp_and_its_gradients():
    module, grad = train.MLP(128), normal(256, 128, seed=1)
    x = normal(256, 128)
    module.proj_w.data = normal(128, 512, seed=2)

    def outputs(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, module.fc_w, module.proj_w)]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]

    expected = outputs(lambda x, fc_w, proj_w: F.linear(F.relu(F.linear(x, fc_w)).square(), proj_w), torch.float64)
    for actual, reference in zip(outputs(lambda *args: candidates.mlp(*args)[0], torch.float32), expected, strict=True):
        assert relative_error(actual, reference) < 1e-6


def capped_loss(x, w, targets):
    z = x @ w.T
    return F.cross_entropy(15 * z / (z.square() + 225).sqrt(), targets)


@pytest.mark.parametrize("scale", [0.1, 10.0], ids=["small logits", "logits at the cap"])
@pytest.mark.parametrize("vocab_size", [256, 4224], ids=["less than a tile", "more than a tile"])
def test_head_and_its_gradients(vocab_size, scale, monkeypatch):
    monkeypatch.setattr(candidates, "HEAD_CHUNK_TOKENS", 24)  # the last chunk is shorter
    x, w = normal(64, 128).requires_grad_(), (scale * normal(vocab_size, 128, seed=1)).requires_grad_()
    targets = torch.randint(0, vocab_size, (64,), generator=torch.Generator().manual_seed(2))
    targets[:3] = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    in_double = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = capped_loss(*in_double, targets)
    loss = candidates.head(x, w, targets, True)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward(torch.tensor(0.3, dtype=torch.float64))
    loss.backward(torch.tensor(0.3))
    for actual, reference in zip((x, w), in_double):
        assert relative_error(actual.grad, reference.grad) < 1e-5
    assert candidates.head(x, w, targets, False)[0].item() == loss.item()


@pytest.mark.parametrize("operator, arguments", [
    (candidates.table_gradient, lambda: (normal(32, 128), 16, *candidates.find_occurrences(torch.arange(32) % 16))),
    (candidates.mlp, lambda: [normal(*s).requires_grad_() for s in ((128, 128), (512, 128), (128, 512))]),
    (candidates.mlp_backward, lambda: [normal(*s).abs()
                                       for s in ((128, 128), (128, 128), (128, 512), (512, 128), (128, 512))]),
    (candidates.head, lambda: (*(normal(*s).requires_grad_() for s in ((8, 128), (256, 128))), torch.arange(8), True)),
    (candidates.head, lambda: (normal(8, 128), normal(256, 128), torch.arange(8), False)),
], ids=["table_gradient", "mlp", "mlp_backward", "head", "head without gradients"])
def test_operators_are_what_the_compiler_is_told(operator, arguments):
    """PyTorch's own check: no input is changed or returned, the fake results have the real ones' shapes and dtypes."""
    torch.library.opcheck(operator, arguments())


def losses_and_gradients(names, compiled=False):
    """Of a model with several tables in a layer, and gates."""
    hp = train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=250, train_seq_len=128, val_seq_len=128,
                               value_embeddings=[[0, 13], [0, 1, 2]], value_embedding_gate=True)
    model = train.GPT(hp)
    model.load_state_dict(golden_weights(hp.value_embeddings, 128, 250, gate=True))
    candidates.apply(model, names)
    tokens = torch.randint(0, 250, (129,), generator=torch.Generator().manual_seed(0))
    if compiled:
        model.compile_parts()
    sequence = tokens[:-1].int(), tokens[1:], torch.tensor(2, dtype=torch.int32)
    with torch.no_grad():
        without_gradients = model(*sequence)
    loss = model(*sequence)
    loss.backward(gradient=torch.tensor(0.125))
    return [loss.item(), without_gradients.item()], {name: p.grad for name, p in model.named_parameters()}


def assert_same(actual, expected):
    assert actual[0] == pytest.approx(expected[0], abs=3e-6)
    for name, gradient in actual[1].items():
        assert relative_error(gradient, expected[1][name]) < 1e-5, name


@pytest.fixture(scope="module")
def plain():
    return losses_and_gradients([])


@pytest.mark.slow
def test_model_has_the_same_loss_and_gradients(plain):
    assert_same(losses_and_gradients(candidates.CANDIDATES), plain)


@pytest.mark.campaign
def test_compiled_model_with_all_candidates(plain):
    """The compiler's code for CPUs around the interpreted kernels."""
    torch._dynamo.reset()
    assert_same(losses_and_gradients(candidates.CANDIDATES, compiled=True), plain)


@pytest.mark.slow
def test_kernels_compile_for_an_h100():
    """At full size, in bf16: within its shared memory, no register spilled, products by its own instruction."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests/kernels_for_h100.py"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert len(kernels) == 5
    for name, kernel in kernels.items():
        assert 0 < kernel["shared"] <= 227 * 1024 and 0 < kernel["registers"] <= 255 and kernel["spilled"] == 0, name
        assert kernel["wgmma"] == name.startswith("relu squared"), name
