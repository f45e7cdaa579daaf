"""Candidates: each computes what the model's own method does, in fp32 in Triton's interpreter; test_gpu.py: in bf16."""

import os

import pytest
import torch
from golden import golden_weights
from helpers import relative_error

import train_gpt_medium as train

pytest.importorskip("triton")
import candidates  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU, test_gpu.py runs them")
FP32 = (torch.float32, 1e-6)  # with the tolerance
SMALL = dict(num_heads=1, model_dim=128, train_seq_len=128, val_seq_len=128)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(candidates, "ROW_SUMS_PROGRAMS", 12)  # each has several tokens


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def random_tokens(n, vocab_size):
    drawn = torch.randint(0, vocab_size, (n - 2,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([0, vocab_size - 1]), drawn]).int()


def check(name, tokens, vocab_size, dtype, tolerance, head_scale=1):
    """Compare a candidate's outputs and gradients with the model's in fp64."""
    hp = train.Hyperparameters(vocab_size=vocab_size, value_embeddings=[[0, 13]], **SMALL)
    expected = candidates.evaluate(hp, name, [], tokens, torch.float64, head_scale)
    actual = candidates.evaluate(hp, name, [name], tokens, dtype, head_scale)
    for result, reference in zip(actual, expected, strict=True):
        assert relative_error(result, reference) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [FP32, (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [random_tokens(64, 50), torch.tensor([7] * 60 + [3, 7, 9, 7, 49, 0] + [7] * 50),
                                    torch.full((64,), 49)], ids=["random", "a frequent one", "only one"])
def test_gradient_of_a_table_is_the_sum_of_its_rows_gradients(tokens, dtype, tolerance):
    """It is rounded to bf16 once: bf16 sums of 100 rows would be far off. (The interpreter truncates instead.)"""
    check("tables", tokens.int(), 50, dtype, tolerance)


def test_mlp_and_its_gradients():
    check("mlp", random_tokens(256, 50), 50, *FP32)


@pytest.mark.parametrize("head_scale", [1, 200], ids=["small logits", "logits at the cap"])
@pytest.mark.parametrize("vocab_size", [250, 4200], ids=["less than a tile", "more than a tile"])
def test_head_and_its_gradients(vocab_size, head_scale, monkeypatch):
    monkeypatch.setattr(candidates, "HEAD_CHUNK_TOKENS", 24)  # the last chunk is shorter
    check("head", random_tokens(64, vocab_size), vocab_size, *FP32, head_scale)


@pytest.mark.parametrize("operator, make_arguments", [
    (candidates.table_gradient, lambda: (normal(32, 128), *candidates.find_occurrences(torch.arange(32) % 16, 18))),
    (candidates.relu_squared, lambda: (normal(128, 128), normal(256, 128).T)),
    (candidates.relu_squared, lambda: (normal(128, 256).T, normal(128, 256), normal(256, 256).abs())),
    (candidates.head, lambda: (normal(8, 128), normal(256, 128), torch.arange(8), True)),
    (candidates.head, lambda: (normal(8, 128), normal(256, 128), torch.arange(8), False)),
], ids=["table_gradient", "relu_squared", "relu_squared, backward", "head", "head without gradients"])
def test_operators_are_what_the_compiler_is_told(operator, make_arguments):
    """PyTorch checks: no input is changed or returned, the fake results have the real ones' shapes and dtypes."""
    torch.library.opcheck(operator, make_arguments())


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
