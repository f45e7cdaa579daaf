"""Fast paths: each computes what the plain path computes, its kernels in Triton's interpreter, in fp32; on a GPU: test_gpu.py."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from golden import golden_weights
from helpers import ROOT, relative_error, start_trainer

import train_gpt_medium as train

CPU = torch.device("cpu")
EACH = [["tables"], ["mlp"], ["head"]]
interpreted = pytest.mark.skipif(not train.can_run_kernels(CPU), reason="needs Triton and, to interpret its kernels, no GPU")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_model(**keys):
    model = train.GPT(train.Hyperparameters(**dict(num_heads=1, model_dim=128, vocab_size=250, train_seq_len=256, val_seq_len=512) | keys))
    model.load_state_dict(golden_weights(len(model.value_embeds), 128, 250))
    return model


def sequence(length=256, seed=0):
    tokens = torch.randint(0, 250, (length + 1,), generator=torch.Generator().manual_seed(seed))
    return tokens[:-1].int(), tokens[1:]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """The compiler keeps a number of programs for each function, whichever model's it was."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WINDOW = torch.tensor(2, dtype=torch.int32)
TOKENS = {
    "random ones": lambda: torch.randint(0, 250, (256,), generator=torch.Generator().manual_seed(0), dtype=torch.int32),
    "a frequent one": lambda: torch.tensor([7] * 200 + [3, 7, 9, 7, 249, 0] + [7] * 50, dtype=torch.int32),
    "only one": lambda: torch.full((256,), 249, dtype=torch.int32),
    "each once": lambda: torch.arange(250, dtype=torch.int32).flip(0),
}


@pytest.mark.parametrize("case", TOKENS)
def test_occurrences_of_each_token(case):
    tokens = TOKENS[case]()
    found = train.find_occurrences(tokens)
    distinct = sorted(set(tokens.tolist()))
    assert found.count.tolist() == [len(distinct)]
    for i, token in enumerate(distinct):
        start, stop = found.starts[i], found.starts[i + 1]
        assert found.order[start:stop].tolist() == (tokens == token).nonzero().flatten().tolist()
        assert set(found.ids[start:stop].tolist()) == {token}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", TOKENS)
def test_gradient_of_a_table_is_the_sum_of_its_rows_gradients(case, dtype):
    """In fp32, brought to bf16 once: bf16 sums of 250 rows would be far off. (The interpreter truncates where a GPU rounds.)"""
    tokens, width = TOKENS[case](), 256
    grad = normal(len(tokens), width).to(dtype)
    expected = torch.zeros(250, width, dtype=torch.float64).index_add(0, tokens, grad.double())
    actual = train.embedding_gradient(grad, 250, *train.find_occurrences(tokens))
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < (1e-6 if dtype == torch.float32 else 2**-8)
    assert (actual[expected.abs().sum(1) == 0] == 0).all()


@interpreted
@pytest.mark.parametrize("rows, inner, columns", [(128, 128, 512), (384, 64, 256), (256, 256, 1024)])
def test_relu_squared_of_a_product(rows, inner, columns):
    a, w = normal(rows, inner), normal(columns, inner, seed=1)
    h = a.double() @ w.double().T
    assert relative_error(train.relu_squared(a, w.T), F.relu(h).square()) < 1e-6
    squares, b = normal(rows, columns, seed=2).relu().square(), normal(inner, columns, seed=3)
    derivative = 2 * squares.double().sqrt()
    assert relative_error(train.relu_squared(a, b, squares), (a.double() @ b.double()) * derivative) < 1e-6


@interpreted
def test_fused_mlp_and_its_gradients():
    x, fc_w, proj_w, grad = normal(256, 128), normal(512, 128, seed=1), normal(128, 512, seed=2), normal(256, 128, seed=3)
    inputs = [t.requires_grad_() for t in (x, fc_w, proj_w)]
    in_double = [t.detach().double().requires_grad_() for t in inputs]
    plain = F.linear(F.relu(F.linear(in_double[0], in_double[1])).square(), in_double[2])
    fused, _ = train.fused_mlp(*inputs)
    assert relative_error(fused, plain) < 1e-6
    plain.backward(grad.double())
    fused.backward(grad)
    for actual, expected in zip(inputs, in_double):
        assert relative_error(actual.grad, expected.grad) < 1e-6


def capped_loss(x, w, targets):
    z = x @ w.T
    return F.cross_entropy(15 * z / (z.square() + 225).sqrt(), targets)


@interpreted
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0], ids=["small logits", "medium logits", "logits at the cap"])
@pytest.mark.parametrize("vocab_size", [256, 4224], ids=["less than a tile", "more than a tile"])
def test_fused_head_and_its_gradients(vocab_size, scale, monkeypatch):
    monkeypatch.setattr(train, "HEAD_CHUNK_TOKENS", 24)  # the last chunk is shorter
    x, w = normal(64, 128).requires_grad_(), (scale * normal(vocab_size, 128, seed=1)).requires_grad_()
    targets = torch.randint(0, vocab_size, (64,), generator=torch.Generator().manual_seed(2))
    targets[:3] = torch.tensor([0, vocab_size - 1, vocab_size // 2])
    in_double = [t.detach().double().requires_grad_() for t in (x, w)]
    plain = capped_loss(*in_double, targets)
    plain.backward(torch.tensor(0.3, dtype=torch.float64))
    loss = train.fused_head(x, w, targets, True)[0]
    loss.backward(torch.tensor(0.3))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for actual, expected in zip((x, w), in_double):
        assert relative_error(actual.grad, expected.grad) < 1e-5


@interpreted
def test_head_without_gradients_has_the_same_loss():
    x, w, targets = normal(16, 128), normal(256, 128, seed=1), torch.arange(16)
    loss, *gradients = train.fused_head(x, w, targets, False)
    assert loss.item() == train.fused_head(x, w, targets, True)[0].item()
    assert [gradient.numel() for gradient in gradients] == [0, 0]


@interpreted
def test_fused_head_in_bf16_is_about_as_exact_as_the_plain_one(monkeypatch):
    """Within the factor of 2 between truncating, which the interpreter does, and rounding; a seventh of it, which is no bf16 number."""
    monkeypatch.setattr(train, "HEAD_CHUNK_TOKENS", 16)
    model, targets = make_model(), torch.arange(64)
    x = normal(64, 128).bfloat16()
    inputs = [x.double(), model.lm_head_w.detach().bfloat16().double()]
    expected = [capped_loss(*(t.requires_grad_() for t in inputs), targets)]
    expected[0].backward(torch.tensor(1 / 7, dtype=torch.float64))
    expected += [t.grad for t in inputs]

    def errors(loss_of):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        loss = loss_of(leaf)
        loss.backward(torch.tensor(1 / 7))
        return [relative_error(a, b) for a, b in zip((loss, leaf.grad, model.lm_head_w.grad), expected)]

    plain = errors(lambda leaf: model.summed_loss(leaf, targets) / 64)
    fused = errors(lambda leaf: train.fused_head(leaf, model.lm_head_w, targets, True)[0])
    assert all(0 < a <= 2 * b for a, b in zip(fused, plain)), (fused, plain)


def losses_and_gradients(model):
    tokens, targets = sequence()
    loss = model(tokens, targets, WINDOW)
    loss.backward(gradient=torch.tensor(0.125))
    with torch.no_grad():
        without_gradients = model(tokens, targets, WINDOW)
    return [loss.item(), without_gradients.item()], {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def plain_result():
    return losses_and_gradients(make_model())


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("paths", EACH, ids="".join)
def test_model_has_the_same_loss_and_gradients(paths, plain_result):
    (losses, gradients), (expected_losses, expected) = losses_and_gradients(make_model(fast_paths=paths)), plain_result
    assert losses == pytest.approx(expected_losses, abs=3e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == expected[name].dtype
        assert relative_error(gradient, expected[name]) < 1e-5, name


@interpreted
@pytest.mark.parametrize("operator, arguments", [
    (train.embedding_gradient, lambda: (normal(32, 128), 16, *train.find_occurrences(torch.arange(32, dtype=torch.int32) % 16))),
    (train.fused_mlp, lambda: (normal(128, 128).requires_grad_(), normal(512, 128).requires_grad_(), normal(128, 512).requires_grad_())),
    (train.fused_mlp_backward, lambda: (normal(128, 128), normal(128, 128), normal(128, 512).square(), normal(512, 128), normal(128, 512))),
    (train.fused_head, lambda: (normal(8, 128).requires_grad_(), normal(256, 128).requires_grad_(), torch.arange(8), True)),
    (train.fused_head, lambda: (normal(8, 128), normal(256, 128), torch.arange(8), False)),
], ids=["embedding_gradient", "mlp", "mlp_backward", "head", "head without gradients"])
def test_operators_are_what_the_compiler_is_told(operator, arguments):
    """PyTorch's own check: no input is changed, no output is an input's memory, the fake results have the real ones' form."""
    torch.library.opcheck(operator, arguments())


@pytest.mark.slow
@pytest.mark.skipif(train.triton is None, reason="needs Triton")
def test_kernels_compile_for_an_h100():
    """At full size and in bf16, as far as a compiler can tell: within its shared memory, no register spilled, products by Hopper's units."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, ROOT / "tests/kernels_for_h100.py"], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert len(kernels) == 5
    for name, kernel in kernels.items():
        assert 0 < kernel["shared"] <= 227 * 1024 and 0 < kernel["registers"] <= 255 and kernel["spilled"] == 0, name
        assert kernel["wgmma"] == name.startswith("relu squared"), name


@interpreted
@pytest.mark.slow
def test_compiled_by_parts_with_all_fast_paths(plain_result):
    """The compiler's code for CPUs around the interpreted kernels; dense masks, which are not compiled."""
    model = make_model(fast_paths=list(train.FAST_PATHS))
    model.compile_parts()
    model.attention_masks = train.attention_masks
    (losses, gradients), (expected_losses, expected) = losses_and_gradients(model), plain_result
    assert losses == pytest.approx(expected_losses, abs=3e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@interpreted
@pytest.mark.slow
def test_training_follows_the_plain_one(small_config, process_group, monkeypatch):
    """Two steps and a validation; larger tiles, for the interpreter's sake."""
    monkeypatch.setattr(train, "RELU_SQUARED_TILE", dict(BLOCK_M=128, BLOCK_N=512, BLOCK_K=128))
    losses = {}
    for paths in ([], ["tables", "mlp", "head"]):
        trainer = start_trainer(small_config(fast_paths=paths, val_tokens=256, sequences_per_step=2))
        assert trainer.raw_model.fast_paths == set(paths)
        batches = train.train_batches(trainer.hp, 0, 1, CPU)
        losses[bool(paths)] = [trainer.validate(0)]
        for step in range(2):
            trainer.train_step(step, *next(batches))
        losses[bool(paths)].append(trainer.validate(2))
    assert losses[True] == pytest.approx(losses[False], abs=1.5e-5)
    assert abs(losses[False][0] - losses[False][1]) > 1e-3  # the steps did something


def test_on_a_cpu_the_plain_paths_are_taken(small_config, process_group, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(train.Ranks, "device", CPU)
    trainer = start_trainer(small_config(fast_paths=list(train.FAST_PATHS)))
    assert trainer.raw_model.fast_paths == frozenset() and not trainer.raw_model.blocks[0].mlp.fused
    assert trainer.hp.fast_paths == list(train.FAST_PATHS)  # as configured, for the log and the checkpoint


@pytest.fixture
def parts_without_kernels(monkeypatch):
    """A model compiled by parts as on CUDA, FlexAttention and its backward included, but traced only: its tensors have no memory."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(train, "dense_mask", train.flex_mask)
    torch._dynamo.utils.counters.clear()
    return functools.partial(torch.empty, device="meta")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tables, kinds", [([], 2), ([[0, 13], [1, 14], [2, 15]], 3), ([[i] for i in range(16) if i != 7], 2)], ids=["none", "baseline", "all 15"])
def test_each_kind_of_block_is_compiled_once(parts_without_kernels, tables, kinds):
    """And the masks, the embeddings and the loss, for training and for validation; never again."""
    empty, counters = parts_without_kernels, torch._dynamo.utils.counters
    hp = train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=250, train_seq_len=256, val_seq_len=512, value_embeddings=tables, fast_paths=["blocks"])
    with torch.device("meta"):
        model = train.GPT(hp)
    model.use_bf16()
    model.compile_parts()

    def train_and_validate():
        window = empty((), dtype=torch.int32)
        model(empty(256, dtype=torch.int32), empty(256, dtype=torch.int64), window).backward(gradient=empty(()))
        with torch.no_grad():
            model(empty(512, dtype=torch.int32), empty(512, dtype=torch.int64), window)

    train_and_validate()
    assert counters["stats"]["unique_graphs"] == 2 * (3 + kinds) and not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        train_and_validate()
        model.zero_grad()
        train_and_validate()


@pytest.mark.slow
def test_parts_with_flex_attention_equal_the_dense_model(monkeypatch):
    """As far as a CPU can run it: forward only. New windows and sequences are no new programs."""
    model = make_model()
    windows = [torch.tensor(window, dtype=torch.int32) for window in (1, 3)]
    batches = [sequence(512, seed) for seed in (0, 1)]
    with torch.no_grad():
        dense = [model(*batch, window).item() for batch in batches for window in windows]
        monkeypatch.setattr(train, "dense_mask", train.flex_mask)
        model.compile_parts()
        flex = [model(*batches[0], windows[0]).item()]
        with torch._dynamo.config.patch(error_on_recompile=True):
            flex += [model(*batch, window).item() for batch in batches for window in windows][1:]
    assert flex == pytest.approx(dense, abs=3e-6)
    assert len(set(dense)) == 4
