"""Optimizers: Muon's update against its formulas, its sharding, each parameter's settings, and the schedules."""

import math
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from faults import Ranks
from helpers import model_on_meta, relative_error

import train_gpt_medium as train
from logs import distributed

HP = train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=256, num_iterations=200, value_embedding_gate=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(momentum=0.9, lr=0.025, weight_decay=0.01):
    return [torch.tensor(x, dtype=torch.float64) for x in (momentum, lr, weight_decay)]


# -----------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (4, 32, 96)])
def test_newton_schulz_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    """Each of q, k, v, o becomes U f(S) V^T with its own U and V; f is the five quintics one after the other."""
    factors = torch.tensor([1.0, 10.0, 0.1, 100.0])[:, None, None]
    u = normal(*shape).double() * (factors if len(shape) == 3 else 1)
    U, S, Vh = torch.linalg.svd(u, full_matrices=False)
    s = S / (S.norm(dim=-1, keepdim=True) + 1e-7)
    for a, b, c in [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]:
        s = a * s + b * s**3 + c * s**5
    result = train.newton_schulz(u.float())
    assert relative_error(result, U @ s.diag_embed() @ Vh) < 1e-5
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("shape, scale", [((256, 64), 2.0), ((64, 256), 1.0), ((4, 32, 32), 1.0)])
def test_muon_update_follows_the_formulas(shape, scale):
    p, momentum_buffer = normal(*shape), torch.zeros(shape)
    expected, buf = p.double(), torch.zeros(shape, dtype=torch.float64)
    for step in range(5):
        grad = normal(*shape, seed=step + 1)
        m, lr, wd = 0.85 + 0.01 * step, 0.025 - 0.001 * step, 0.02
        train.muon_update(p, grad, momentum_buffer, None, *numbers(m, lr, wd))
        buf = m * buf + (1 - m) * grad.double()
        expected *= 1 - lr * wd
        expected -= lr * scale * train.newton_schulz(m * buf + (1 - m) * grad.double())
    assert (p - expected).abs().max() < 1e-5 and (momentum_buffer - buf).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(64, 16), (4, 16, 16)])
def test_bf16_and_mantissa_equal_an_fp32_master_weight_bit_for_bit(shape):
    """Updates far below bf16's resolution add up."""
    p, mantissa, momentum_buffer = normal(*shape).bfloat16(), torch.zeros(shape, dtype=torch.uint16), torch.zeros(shape)
    master, buf, scale = p.float(), torch.zeros(shape), max(1, shape[-2] / shape[-1]) ** 0.5
    for step in range(30):
        grad = normal(*shape, seed=step).bfloat16()
        m, lr, wd = numbers(0.85 + step / 1000, 0.025 * (1 - step / 60), 0.01)
        train.muon_update(p, grad, momentum_buffer, mantissa, m, lr, wd)
        buf = m * buf + (1 - m) * grad.float()
        v = train.newton_schulz((m * buf + (1 - m) * grad.float()).bfloat16())
        master = master * (1 - lr * wd) - (lr * scale) * v.float()
        assert torch.equal(train.join_bits(p, mantissa).view(torch.int32), master.view(torch.int32)), step
    assert v.dtype == torch.bfloat16 and torch.equal(p.view(torch.int16).int(), master.view(torch.int32) >> 16)


@pytest.mark.slow
def test_compiled_update_equals_the_plain_one():
    """The program that CUDA runs, compiled for a CPU; in bf16 it may round elsewhere within Newton-Schulz."""
    results = []
    for update in (train.muon_update, torch.compile(train.muon_update, dynamic=False, fullgraph=True)):
        p, momentum_buffer = normal(64, 32).bfloat16(), torch.zeros(64, 32)
        mantissa = torch.zeros(64, 32, dtype=torch.uint16)
        with torch.no_grad():
            for step in range(3):
                update(p, normal(64, 32, seed=step).bfloat16(), momentum_buffer, mantissa, *numbers(0.9 + step / 100))
        results.append(train.join_bits(p, mantissa))
    assert relative_error(results[1], results[0]) < 2e-4


def train_sharded(folder):
    """Take two steps on matrices in fp32 and bf16, with gradients equal on every rank; save this rank's weights."""
    distributed.start_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    groups = [[torch.nn.Parameter(normal(*shape, seed=i).to(dtype)) for i in range(count)]
              for count, shape, dtype in ((5, (16, 32), torch.bfloat16), (2, (4, 16, 16), torch.float32))]
    muon = train.Muon([dict(params=group) for group in groups], lr=0.025, rank=rank, world_size=world_size)
    weights = [p for group in groups for p in group]
    for step in range(2):
        for i, p in enumerate(weights):
            p.grad = normal(*p.shape, seed=100 * step + i).to(p.dtype)
        muon.step()
    torch.save([p.detach() for p in weights], f"{folder}/weights_{world_size}_{rank}.pt")
    distributed.synchronize(torch.device("cpu"))


@pytest.mark.slow
def test_sharding_over_1_2_and_3_ranks_gives_the_same_weights(tmp_path):
    """Also where a group has fewer matrices than ranks, or a last round without one for every rank."""
    for ranks in (1, 2, 3):
        fault = f"import test_optimizer; test_optimizer.train_sharded({str(tmp_path)!r}); os._exit(0)"
        run = Ranks(tmp_path / "output", ranks=ranks, fault=fault)
        assert run.statuses() == [0] * ranks, run.output("stderr")
    reference, *others = map(torch.load, sorted(tmp_path.glob("weights_*.pt")))
    assert len(others) == 5 and all(all(map(torch.equal, weights, reference)) for weights in others)


def test_without_a_gradient_only_weight_decay_by_the_group_s_learning_rate_remains():
    p = torch.nn.Parameter(normal(16, 16))
    before, p.grad = p.detach().clone(), torch.zeros(16, 16)
    train.Muon([dict(params=[p], weight_decay=0.1)], lr=0.5, rank=0, world_size=1).step()
    assert torch.allclose(p, before * 0.95, rtol=1e-6, atol=0)


# -----------------------------------------------------------------------------
# Parameter groups


def test_each_parameter_is_in_one_group_with_its_settings_and_the_scheduled_rate():
    """AdamW has the embeddings, head, gates and scalars, Muon the matrices; at step 130 of 200 the rates are halved."""
    hp = train.replace(
        HP, value_embeddings=[[0, 13], {"layers": [2], "source": "embedding"}], value_embedding_lr=0.1,
        value_embedding_weight_decay=0.05, value_embedding_betas=[0.7, 0.99])
    model = model_on_meta(hp)
    names = {p: name for name, p in model.named_parameters()}
    adamw, muon = train.make_optimizers(model, hp, rank=0, world_size=1)
    train.set_schedules(adamw, muon, 130, hp)
    of_adamw, of_muon = ([(names[p], group) for group in optimizer.param_groups for p in group["params"]]
                         for optimizer in (adamw, muon))
    assert sorted(name for name, _ in of_adamw + of_muon) == sorted(names.values())
    usual = (0.8, 0.95), 0.0
    assert {name: (group["lr"], group["betas"], group["weight_decay"]) for name, group in of_adamw} == {
        "lm_head_w": (0.5 / 320, *usual), "scalars": (0.0075, *usual), "embed.weight": (0.15, *usual),
        "value_embeds.0.weight": (0.05, (0.7, 0.99), 0.05),
        **{f"blocks.{layer}.attn.ve_gate_w": (0.004, *usual) for layer in (0, 2, 13)}}
    assert {(group["eps"], group["fused"]) for _, group in of_adamw} == {(1e-10, True)}
    decays = {(name.removeprefix("blocks.0."), group["weight_decay"]) for name, group in of_muon
              if name.startswith(("blocks.0.", "value_embeds."))}
    assert decays == {("attn.qkvo_w", 0.01), ("mlp.fc_w", 0.02), ("mlp.proj_w", 0.02), ("value_embeds.1.proj_w", 0.01)}
    assert {(group["lr"], group["momentum"]) for _, group in of_muon} == {(0.0125, train.muon_momentum(130))}


def test_a_parameter_in_two_groups_is_named(monkeypatch):
    """test_mistakes.py has one in none."""
    match = train.fnmatchcase
    monkeypatch.setattr(train, "fnmatchcase", lambda name, pattern: (
        match(name, pattern) or (name, pattern) == ("lm_head_w", "embed.weight")))
    with pytest.raises(ValueError, match="parameter lm_head_w is in 2 groups of parameter_groups; name it in one"):
        train.parameter_groups(model_on_meta(HP), HP)


# -----------------------------------------------------------------------------
# Schedules: exact values, worked out by hand from the reference's formulas


@pytest.mark.parametrize("step, n, cooldown, scale", [
    (29, 100, 0.7, 1.0), (65, 100, 0.7, 0.5), (99, 100, 0.7, 0.01 / 0.7), (99, 100, 0.0, 1.0), (25, 100, 1.0, 0.75)])
def test_lr_scale(step, n, cooldown, scale):
    assert train.lr_scale(step, n, cooldown) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("step, momentum", [(0, 0.85), (150, 0.90), (300, 0.95), (5959, 0.95)])
def test_muon_momentum(step, momentum):
    assert train.muon_momentum(step) == pytest.approx(momentum, rel=1e-12)


@pytest.mark.parametrize("n", [150, 5960])
def test_window_is_the_smallest_that_is_large_enough(n):
    """Against exact arithmetic, at every step; step 100 of 150 meets 14 * 128 tokens exactly."""
    for step in range(n + 1):
        x = Fraction(step, n)
        assert train.window_blocks(step, n) == max(1, math.ceil(3456 * (4 * x**3 - 6 * x**2 + 3 * x) / 128)), step
