"""Test the model: names, shapes, initial values, precision, and where each value embedding enters."""

import math

import pytest
import torch
from golden import golden_weights
from helpers import relative_error

import train_gpt_medium as train

BASELINE = [[0, 13], [1, 14], [2, 15]]
POOL = [[0, 1, 14, 15], [0, 1, 14, 15]]
PAIRS = [[0, 14], [0, 14], [1, 15], [1, 15]]


def hyperparameters(**keys):
    small = dict(num_heads=1, model_dim=128, vocab_size=250, train_seq_len=256, val_seq_len=512)
    return train.Hyperparameters(**small | keys)


def make_model(seed=0, **keys):
    return train.GPT(hyperparameters(seed=seed, **keys))


def with_golden_weights(value_embeddings=BASELINE, value_embedding_gate=False):
    """A model in which every path counts: no projection is zero."""
    model = make_model(value_embeddings=value_embeddings, value_embedding_gate=value_embedding_gate)
    model.load_state_dict(golden_weights(value_embeddings, 128, 250, value_embedding_gate))
    return model


def sequence(length=256, vocab_size=250):
    tokens = torch.randint(0, vocab_size, (length + 1,), generator=torch.Generator().manual_seed(0))
    return tokens[:-1].int(), tokens[1:]


WINDOW = torch.tensor(2, dtype=torch.int32)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("tables", [[], BASELINE, [[layer] for layer in range(16) if layer != 7], POOL, PAIRS])
def test_names_and_shapes_are_those_of_a_published_checkpoint(tables, gate):
    """And, for what no published checkpoint has, those of the reference."""
    expected = {name: w.shape for name, w in golden_weights(tables, 128, 250, gate).items()}
    model = make_model(value_embeddings=tables, value_embedding_gate=gate)
    assert {name: w.shape for name, w in model.state_dict().items()} == expected


def test_dtypes_on_cuda_are_bf16_but_for_the_head_and_scalars():
    model = make_model(value_embedding_gate=True)
    model.blocks[3].scale = torch.nn.Parameter(torch.ones(()))  # a scalar that a user adds
    model.use_bf16()
    fp32 = {name for name, w in model.state_dict().items() if w.dtype == torch.float32}
    assert fp32 == {"lm_head_w", "scalars", "blocks.3.scale"}
    assert {w.dtype for name, w in model.state_dict().items() if name not in fp32} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_activations_are_bf16_from_the_embedding_to_the_head(monkeypatch):
    """The precision of CUDA, on a CPU; only the attention itself, whose dense mask is fp32, is done in fp32."""
    model, batch = with_golden_weights(PAIRS, value_embedding_gate=True), sequence(128)
    reference = model(*batch, WINDOW).item()
    dtypes = []

    def attend_in_fp32(q, k, v, mask, attend=train.attend):
        dtypes.extend([q.dtype, k.dtype, v.dtype])
        return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)

    monkeypatch.setattr(train, "attend", attend_in_fp32)
    for module in [model.embed, *model.value_embeds, *model.blocks, *(block.mlp for block in model.blocks)]:
        module.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    model.use_bf16()
    loss = model(*batch, WINDOW)
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) == 15 * 3 + 5 + 2 * 16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference, abs=0.02) and loss.item() != reference


def test_rope_of_bf16_is_computed_in_fp32_and_rounded_once():
    x = torch.randn(1, 256, 2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotary = train.Rotary(256)
    assert torch.equal(rotary(x), rotary(x.float()).bfloat16())


def test_the_head_multiplies_in_bf16_and_caps_in_fp32():
    model = with_golden_weights()
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(64)
    z = (x @ model.lm_head_w.bfloat16().T).float()
    expected = torch.nn.functional.cross_entropy(15 * z / (z.square() + 225).sqrt(), targets, reduction="sum").item()
    assert 64 * model.loss(x, targets).item() == pytest.approx(expected, rel=1e-6)
    in_fp32 = 64 * model.loss(x.float(), targets).item()
    assert abs(in_fp32 - expected) > 1e-5 * expected  # the test can tell the two apart


def test_initial_values():
    model = make_model(num_heads=2, model_dim=256, vocab_size=1000)
    d = 256
    for w in (model.embed.weight, *(table.weight for table in model.value_embeds)):
        assert w.mean().item() == pytest.approx(0, abs=0.01) and w.std().item() == pytest.approx(1, rel=0.01)
        assert w.abs().max() > 3.5
    attentions = [block.attn for block in model.blocks if block.attn]
    for w in [attn.qkvo_w[:3] for attn in attentions] + [block.mlp.fc_w for block in model.blocks]:
        bound = math.sqrt(3) * 0.5 * d**-0.5
        assert w.std().item() == pytest.approx(0.5 * d**-0.5, rel=0.01)
        assert 0.99 * bound < w.abs().max() <= bound
    zeros = [attn.qkvo_w[3] for attn in attentions] + [block.mlp.proj_w for block in model.blocks] + [model.lm_head_w]
    assert all((w == 0).all() for w in zeros)
    assert model.scalars.tolist() == 16 * [1.0] + 16 * [1.0, 0.0] + 16 * [0.5, 0.5]


def test_extra_lambdas_begin_at_a_half_and_gates_at_zero():
    model = make_model(value_embeddings=PAIRS, value_embedding_gate=True)
    assert model.scalars[80:].tolist() == 4 * [0.5]
    gates = {name: w for name, w in model.named_parameters() if "ve_gate_w" in name}
    assert list(gates) == [f"blocks.{layer}.attn.ve_gate_w" for layer in (0, 1, 14, 15)]
    assert all((w == 0).all() for w in gates.values())


@pytest.mark.parametrize("std", [0.0, 0.01, 2.0])
def test_the_tables_standard_deviation_scales_the_same_numbers(std):
    model, plain = make_model(value_embedding_std=std), make_model()
    for table, other in zip(model.value_embeds, plain.value_embeds):
        assert torch.equal(table.weight, std * other.weight)
    rest = [(name, w) for name, w in plain.state_dict().items() if "value_embeds" not in name]
    assert all(torch.equal(model.state_dict()[name], w) for name, w in rest)


def test_initial_loss_is_that_of_a_uniform_guess_over_the_padded_vocabulary():
    assert make_model()(*sequence(), WINDOW).item() == pytest.approx(math.log(256), rel=1e-6)


def test_random_initial_values_differ_between_parameters_and_between_seeds():
    model, other = make_model().state_dict(), make_model(seed=1).state_dict()
    assert not torch.equal(model["value_embeds.0.weight"], model["value_embeds.1.weight"])
    assert not torch.equal(model["blocks.0.mlp.fc_w"], model["blocks.1.mlp.fc_w"])
    changed = {name for name, w in model.items() if not torch.equal(w, other[name])}
    assert changed == {name for name, w in model.items() if not name.endswith(("proj_w", "lm_head_w", "scalars"))}


def test_adding_a_table_changes_no_other_initial_value():
    few, many = make_model(value_embeddings=[[1]]).state_dict(), make_model(value_embeddings=[[1], [2]]).state_dict()
    assert many.keys() - few.keys() == {"value_embeds.1.weight"}
    assert all(torch.equal(w, many[name]) for name, w in few.items() if name != "scalars")


@pytest.mark.parametrize("tables", [[], BASELINE, [[5, 6, 8]], [[0, 1, 14, 15], [4]], POOL, [[3, 4], [4, 5], [4]]])
def test_a_value_embedding_enters_in_the_layers_that_name_its_table(tables):
    """Each layer's attention gets its own tables' value embeddings, in their order, and a lambda for each."""
    model = with_golden_weights(tables)
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


def loss_and_gradients(model, batch):
    loss = model(*batch, WINDOW)
    loss.backward()
    return loss.item(), {name: w.grad for name, w in model.named_parameters()}


def test_a_gate_at_zero_gives_the_published_function_bit_for_bit():
    gated, plain, batch = make_model(value_embedding_gate=True), with_golden_weights(), sequence(128)
    missing, _ = gated.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 6
    (loss, gradients), (plain_loss, plain_gradients) = (loss_and_gradients(model, batch) for model in (gated, plain))
    assert loss == plain_loss
    assert all(torch.equal(gradients[name], grad) for name, grad in plain_gradients.items())
    assert all(gradients[name].abs().max() > 0 for name in missing)


def test_a_second_table_of_weight_zero_gives_the_published_function_bit_for_bit():
    several, plain, batch = make_model(value_embeddings=[*BASELINE, [13, 0]]), with_golden_weights(), sequence(128)
    several.load_state_dict(plain.state_dict() | {"scalars": torch.cat([plain.scalars.detach(), torch.zeros(2)])} |
                            {"value_embeds.3.weight": torch.randn(250, 128)})
    assert several(*batch, WINDOW).item() == plain(*batch, WINDOW).item()


def test_tables_of_one_layer_are_added_each_with_its_lambda_and_then_gated_by_head():
    torch.manual_seed(0)
    attn, T = train.CausalSelfAttention(256, 2, is_gated=True, has_own_values=False), 8
    torch.nn.init.normal_(attn.ve_gate_w)
    attn.qkvo_w.data[3] = torch.eye(256)
    itself = torch.full((T, T), -torch.inf).fill_diagonal_(0)  # the mask: the output is the values
    x, first, second = torch.randn(T, 256), torch.randn(T, 256), torch.randn(T, 256)
    actual = attn(x, [first, second], torch.tensor([0.5, 0.3, -0.7]), itself, train.Rotary(T))
    rms = x.double() / (x.double().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    gate = 2 * (rms[:, :16] @ attn.ve_gate_w.double().T).sigmoid()
    expected = (0.3 * first - 0.7 * second).double() * gate.repeat_interleave(128, dim=1)
    assert relative_error(actual, expected) < 1e-6


def test_attention_against_the_formulas():
    """A layer's attention, head by head and in float64, as the reference writes it."""
    torch.manual_seed(0)
    T, heads, d = 256, 2, 256
    attn = train.CausalSelfAttention(d, heads, is_gated=False)
    torch.nn.init.normal_(attn.qkvo_w, std=0.05)
    x, ve, lambdas = torch.randn(T, d), torch.randn(T, d), torch.tensor([0.6, 0.3])
    docs = torch.zeros(T, dtype=torch.long)
    mask = train.dense_mask(train.document_blocks(docs), docs)
    actual = attn(x, [ve], lambdas, mask, train.Rotary(T))

    def rms(y):
        return y / (y.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, 32).double(), torch.zeros(32).double()])
    theta = torch.arange(T).double()[:, None] * frequency

    def rope(y):
        y1, y2 = y[:, :64], y[:, 64:]
        return torch.cat([y1 * theta.cos() + y2 * theta.sin(), -y1 * theta.sin() + y2 * theta.cos()], dim=1)

    wq, wk, wv, wo = attn.qkvo_w.double()
    outputs = []
    for head in range(heads):
        part = slice(128 * head, 128 * (head + 1))
        q, k, v = (rms((x.double() @ w.T)[:, part]) for w in (wq, wk, wv))
        q, k, v = rope(q), rope(k), 0.6 * v + 0.3 * ve.double()[:, part]
        scores = (0.12 * q @ k.T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    expected = torch.cat(outputs, dim=1) @ wo.T
    assert relative_error(actual, expected) < 1e-5


def test_the_root_of_a_bf16_square_is_close_enough_to_relu():
    """ReluSquared's backward takes relu(x) from the kept square: at most one bf16 rounding (2**-8) away."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    train.ReluSquared.apply(x).backward(torch.ones_like(x))
    expected = 2 * x.detach().double().relu()
    assert ((x.grad.double() - expected).abs() <= 2**-8 * expected).all() and relative_error(x.grad, expected) < 2e-3


def test_logits_are_capped_at_15_and_the_padded_vocabulary_counts():
    model = make_model()
    with torch.no_grad():
        model.lm_head_w.fill_(0)
        model.lm_head_w[3] = 100.0  # z is 12,800 for token 3 and 0 for the other 255
    x = torch.ones(128, 128)
    loss = model.loss(x, torch.full((128,), 3))
    logit = 15 * 12_800 / math.sqrt(12_800**2 + 225)
    # About 7.8e-5; sums of about 15 are coarse in fp32.
    assert loss.item() == pytest.approx(math.log1p(255 * math.exp(-logit)), rel=0.02)


@pytest.mark.parametrize("window, loss", [(2, 5.746621), (3, 5.746937)])
def test_the_whole_models_loss_is_what_it_was_when_the_golden_cases_held(window, loss):
    """A quick guard: another activation, skip or long-window layer changes it."""
    model = with_golden_weights(PAIRS, value_embedding_gate=True)
    assert model(*sequence(512), torch.tensor(window, dtype=torch.int32)).item() == pytest.approx(loss, abs=5e-6)


def test_the_loss_of_a_long_sequence_is_computed_in_chunks(monkeypatch):
    model, batch = with_golden_weights(), sequence(512)
    whole = model(*batch, WINDOW)
    monkeypatch.setattr(train, "LOSS_CHUNK_TOKENS", 200)
    assert model(*batch, WINDOW).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.slow
def test_compiled_forward_with_flex_attention_equals_the_dense_one(monkeypatch):
    """What runs on CUDA, as far as a CPU can: forward only, in fp32. A new window compiles nothing again."""
    model, batch = with_golden_weights(PAIRS, value_embedding_gate=True), sequence(512)
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
