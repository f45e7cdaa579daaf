"""Test the model: names, shapes, initial values, precision, attention, and each source of values."""

import math

import pytest
import torch
from golden import ALL_KEYS, golden_weights
from helpers import relative_error

import train_gpt_medium as train
from configs import checks

PAIRS = [[0, 14], [0, 14], [1, 15], [1, 15]]
WINDOW = torch.tensor(2, dtype=torch.int32)
EPS = torch.finfo(torch.float32).eps


def make_model(**keys):
    small = dict(num_heads=1, model_dim=128, vocab_size=250, train_seq_len=256, val_seq_len=512, seed=0)
    return train.GPT(train.Hyperparameters(**small | keys))


def with_golden_weights(**keys):
    """A model in which every path counts: no projection is zero."""
    model, hp = make_model(**keys), train.Hyperparameters(**keys)
    model.load_state_dict(golden_weights(hp.value_embeddings, model.embed.embedding_dim, 250, hp.value_embedding_gate))
    return model


def sequence(length):
    tokens = torch.randint(0, 250, (length + 1,), generator=torch.Generator().manual_seed(0))
    return tokens[:-1].int(), tokens[1:]


def rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


# -----------------------------------------------------------------------------
# The whole model


@pytest.mark.parametrize("keys, length, window, loss", [
    (dict(value_embeddings=PAIRS, value_embedding_gate=True), 512, 2, 5.746621),
    (dict(value_embeddings=PAIRS, value_embedding_gate=True), 512, 3, 5.746937), (ALL_KEYS, 128, 2, 5.824793)])
def test_the_loss_is_what_it_was_when_the_golden_cases_held(keys, length, window, loss):
    """A quick guard: another parameter name or shape, activation, skip, long-window layer or source changes it."""
    model = with_golden_weights(**keys)
    assert model(*sequence(length), torch.tensor(window, dtype=torch.int32)).item() == pytest.approx(loss, abs=5e-6)


@pytest.mark.parametrize("tables", [[], [[3, 4], [4, 5], [4]]])
def test_a_value_embedding_enters_in_the_layers_that_name_its_table(tables):
    """Each layer's attention gets its own tables' value embeddings, in their order, and a lambda for each."""
    model = with_golden_weights(value_embeddings=tables)
    tokens, targets = sequence(128)
    given = {}
    for i, block in enumerate(model.blocks):
        if block.attn is not None:
            block.attn.register_forward_pre_hook(lambda module, args, i=i: given.update({i: args[1:3]}))
    model(tokens, targets, WINDOW)
    assert set(given) == set(range(16)) - {7}
    extra = iter(model.scalars[80:])
    for layer, (ve, lambdas) in given.items():
        expected = [model.value_embeds[k].weight[tokens] for k, layers in enumerate(tables) if layer in layers]
        assert len(ve) == len(expected) and all(map(torch.equal, ve, expected))
        own = [*model.scalars[48 + 2 * layer : 50 + 2 * layer], *(next(extra) for _ in expected[1:])]
        assert lambdas.tolist() == [own_lambda.item() for own_lambda in own]
    assert list(extra) == []


@pytest.mark.slow
def test_compiled_forward_with_flex_attention_equals_the_dense_one(monkeypatch):
    """What runs on CUDA, as far as a CPU can: forward only, in fp32. A new window compiles nothing again."""
    model, batch = with_golden_weights(value_embeddings=PAIRS, value_embedding_gate=True), sequence(512)
    windows = [torch.tensor(window, dtype=torch.int32) for window in (1, 3)]
    dense = [model(*batch, window).item() for window in windows]
    monkeypatch.setattr(train, "dense_mask", train.flex_mask)

    def rotate(self, x):  # Inductor's FlexAttention for CPUs (PyTorch 2.13) cannot read the view that Rotary returns
        cos, sin, (x1, x2) = self.cos[: x.size(1), :, 0], self.sin[: x.size(1), :, 0], x.chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)

    monkeypatch.setattr(train.Rotary, "forward", rotate)
    model.compile_parts(512)
    with torch.no_grad():
        flex = [model(*batch, windows[0]).item()]
        with torch._dynamo.config.patch(error_on_recompile=True):
            flex += [model(*batch, windows[1]).item()]
    assert flex == pytest.approx(dense, abs=3e-6)
    assert abs(dense[0] - dense[1]) > 1e-4  # the window matters


# -----------------------------------------------------------------------------
# Initial values


def test_initial_values():
    model = make_model(**ALL_KEYS, value_embedding_std=2.0)
    attentions, mlps = [block.attn for block in model.blocks if block.attn], [block.mlp for block in model.blocks]
    table, bigrams, wide_map, narrow_map = model.value_embeds
    for w, std in ((model.embed.weight, 1), (table.weight, 2)):
        assert w.mean().item() == pytest.approx(0, abs=0.03) and w.std().item() == pytest.approx(std, rel=0.02)
        assert w.abs().max() > 3.5 * std
    std = 0.5 * 256**-0.5
    uniform = [attn.qkvo_w[:3] for attn in attentions] + [mlp.fc_w for mlp in mlps]
    for w in (*uniform, wide_map.proj_w, narrow_map.proj_w):
        assert w.std().item() == pytest.approx(std, rel=0.02)
        assert 0.99 * math.sqrt(3) * std < w.abs().max() <= math.sqrt(3) * std
    gates = [attn.ve_gate_w for attn in attentions if attn.ve_gate_w is not None]
    zeros = [attn.qkvo_w[3] for attn in attentions] + [mlp.proj_w for mlp in mlps] + [model.lm_head_w, bigrams.weight]
    assert len(gates) == 6 and not any(w.any() for w in zeros + gates)
    assert model.scalars.tolist() == 16 * [1.0] + 16 * [1.0, 0.0] + 16 * [0.5, 0.5] + 2 * [0.5]


def test_initial_values_depend_on_the_seed_and_the_parameters_name_alone():
    """Adding a table changes no other value; the tables' standard deviation scales the same numbers."""
    one, other_seed = (make_model(value_embeddings=[[1]], seed=seed).state_dict() for seed in (0, 1))
    two = make_model(value_embeddings=[[1], [2]], value_embedding_std=2.0).state_dict()
    assert two.keys() - one.keys() == {"value_embeds.1.weight"}
    assert torch.equal(two.pop("value_embeds.0.weight"), 2 * one["value_embeds.0.weight"])
    assert all(torch.equal(w, two[name]) for name, w in one.items() if name in two and name != "scalars")
    assert not torch.equal(two["value_embeds.1.weight"], 2 * one["value_embeds.0.weight"])
    assert not torch.equal(one["blocks.0.mlp.fc_w"], one["blocks.1.mlp.fc_w"])
    changed = {name for name, w in one.items() if not torch.equal(w, other_seed[name])}
    assert changed == {name for name in one if not name.endswith(("proj_w", "lm_head_w", "scalars"))}


# -----------------------------------------------------------------------------
# Precision


def test_matrices_but_the_head_and_activations_are_bf16_as_on_cuda(monkeypatch):
    """Only the attention itself, whose dense mask is fp32, is done in fp32."""
    model, batch = with_golden_weights(value_embeddings=PAIRS, value_embedding_gate=True), sequence(128)
    reference = model(*batch, WINDOW).item()
    dtypes = []

    def attend_in_fp32(q, k, v, mask, attend=train.attend):
        dtypes.extend([q.dtype, k.dtype, v.dtype])
        return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)

    monkeypatch.setattr(train, "attend", attend_in_fp32)
    for module in [model.embed, *model.value_embeds, *model.blocks, *(block.mlp for block in model.blocks)]:
        module.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    model.blocks[3].scale = torch.nn.Parameter(torch.ones(()))  # a scalar that a user adds
    model.use_bf16()
    loss = model(*batch, WINDOW)
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) == 15 * 3 + 5 + 2 * 16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference, abs=0.02) and loss.item() != reference
    fp32 = {name for name, w in model.named_parameters() if w.dtype == torch.float32}
    assert fp32 == {"lm_head_w", "scalars", "blocks.3.scale"}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_rope_of_bf16_is_computed_in_fp32_and_rounded_once():
    x = torch.randn(1, 256, 2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotary = train.Rotary(256)
    rotary.reset_parameters()
    assert torch.equal(rotary(x), rotary(x.float()).bfloat16())


def test_the_head_multiplies_in_bf16_and_caps_in_fp32_over_the_padded_vocabulary(monkeypatch):
    """A long sequence's loss is the same, in chunks."""
    model, targets = with_golden_weights(), torch.arange(64)
    model.lm_head_w.data *= 20  # the cap matters
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    z = (x @ model.lm_head_w.bfloat16().T).float()
    assert z.shape == (64, 256) and z.abs().max() > 30
    logits = 15 * z / (z.square() + 225).sqrt()
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert model.loss(x, targets).item() == pytest.approx(expected, rel=1e-6)
    assert model.loss(x.float(), targets).item() != pytest.approx(expected, rel=1e-5)  # the test can tell them apart
    monkeypatch.setattr(train, "LOSS_CHUNK_TOKENS", 25)
    assert model.loss(x, targets).item() == pytest.approx(expected, rel=1e-6)


def test_the_root_of_a_bf16_square_is_close_enough_to_relu():
    """ReluSquared's backward takes relu(x) from the kept square: at most one bf16 rounding (2**-8) away."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    train.ReluSquared.apply(x).backward(torch.ones_like(x))
    expected = 2 * x.detach().double().relu()
    assert ((x.grad.double() - expected).abs() <= 2**-8 * expected).all() and relative_error(x.grad, expected) < 2e-3


# -----------------------------------------------------------------------------
# Attention and the sources of values


@pytest.mark.parametrize("is_extended", [False, True], ids=["published", "gated, no own values, a narrow source"])
def test_attention_against_the_formulas(is_extended):
    """A layer's attention, head by head and in float64, as the reference writes it."""
    torch.manual_seed(0)
    T, heads, d = 256, 2, 256
    hp = train.Hyperparameters(model_dim=d, num_heads=heads, value_embedding_gate=is_extended,
                               value_embeddings_only=[0] * is_extended)
    attn = train.CausalSelfAttention(hp, layer=0, has_sources=True)
    torch.nn.init.normal_(attn.qkvo_w, std=0.05)
    x, ve, lambdas = torch.randn(T, d), [torch.randn(T, d)], torch.tensor([0.6, 0.3])
    if is_extended:
        torch.nn.init.normal_(attn.ve_gate_w)
        ve, lambdas = [*ve, torch.randn(T, 128)], torch.tensor([0.6, 0.3, -0.7])
    docs = torch.zeros(T, dtype=torch.long)
    mask = train.dense_mask(docs, torch.tensor(3))
    rotary = train.Rotary(T)
    rotary.reset_parameters()
    actual = attn(x, ve, lambdas, mask, rotary)

    frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, 32).double(), torch.zeros(32).double()])
    theta = torch.arange(T).double()[:, None] * frequency

    def rope(y):
        y1, y2 = y[:, :64], y[:, 64:]
        return torch.cat([y1 * theta.cos() + y2 * theta.sin(), -y1 * theta.sin() + y2 * theta.cos()], dim=1)

    wq, wk, wv, wo = attn.qkvo_w.double()
    x, ve = x.double(), [source.double() for source in ve]
    outputs = []
    for head in range(heads):
        part = slice(128 * head, 128 * (head + 1))
        q, k, v = (rms_norm((x @ w.T)[:, part]) for w in (wq, wk, wv))
        v = 0.6 * v + 0.3 * ve[0][:, part]
        if is_extended:
            v = 0.3 * ve[0][:, part] - (0.7 * ve[1] if head == 0 else 0)
            v = v * 2 * (rms_norm(x)[:, :16] @ attn.ve_gate_w[head].double()).sigmoid()[:, None]
        scores = (0.12 * rope(q) @ rope(k).T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    assert relative_error(actual, torch.cat(outputs, dim=1) @ wo.T) < 1e-5


def test_bigram_rows_follow_the_formula():
    """In 64-bit integers; the first token of the sequence and the end-of-text token take the last row."""
    tokens = [50256, 50255, 17, 50256, 50254, 3]
    expected = [((36313 * t) ^ (27191 * before)) % 251_519 for before, t in zip(tokens, tokens[1:])]
    expected = [251_519, *(251_519 if t == 50256 else row for t, row in zip(tokens[1:], expected))]
    table = train.BigramTable(train.Hyperparameters(), heads=1, rows=251_520)
    table.weight.data[:, 0] = torch.arange(251_520)
    assert table(torch.tensor(tokens, dtype=torch.int32), None)[:, 0].tolist() == expected
    by_default = make_model(value_embeddings=[{"layers": [3], "source": "bigram"}]).value_embeds[0]
    assert by_default.weight.shape == (5 * 256, 128)  # five rows per token of the padded vocabulary


def test_an_embedding_source_is_a_normed_map_of_x0_and_trains_it():
    torch.manual_seed(0)
    source = train.EmbeddingMap(train.Hyperparameters(model_dim=256), heads=2, rows=0)
    source.reset_parameters()
    x0 = torch.randn(5, 256, requires_grad=True)
    values = source(None, x0)
    expected = rms_norm((x0.double() @ source.proj_w.double().T).view(5, 2, 128))
    assert relative_error(values, expected.view(5, 256)) < 1e-6
    assert torch.autograd.grad(values.sum(), x0)[0].abs().min() > 0


@pytest.mark.parametrize("entry, num_heads, scale, heads", [
    ({"layers": [1]}, 4, "x", 4), ({"layers": [1], "heads": 5}, 4, "x", 3), ({"layers": [1], "heads": 4}, 1, "x", 1),
    ({"layers": [1], "heads": 3}, 4, "", 3), ({"layers": [1], "heads": 12}, 16, "x", 12)])
def test_heads_shrink_with_the_scale_rounded_up(entry, num_heads, scale, heads):
    assert checks.num_source_heads(checks.read_entry(entry), num_heads, scale) == heads


def test_equal_entries_are_one_configuration():
    entries = [{"source": "bigram", "layers": [0]}, {"layers": [1], "source": "token"}, {"layers": [2], "heads": 1}]
    assert train.Hyperparameters.__dataclass_fields__["value_embeddings"].metadata["check"](entries) == [
        {"layers": [0], "source": "bigram"}, [1], {"layers": [2], "heads": 1}]
