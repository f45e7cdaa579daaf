"""Optimizers: Muon's update against its formulas, its bf16-plus-mantissa weights, its sharding; who optimizes what."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import relative_error

import train_gpt_medium as train

HP = train.Hyperparameters(num_heads=1, model_dim=128, vocab_size=256, train_seq_len=128, val_seq_len=128,
                           value_embedding_gate=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(momentum=0.9, lr=0.025, weight_decay=0.01):
    return [torch.tensor(x, dtype=torch.float64) for x in (momentum, lr, weight_decay)]


@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (256, 64), (4, 32, 96)])
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
    assert shape == (96, 96) or 0.6 < values.min() and values.max() < 1.3  # a square matrix has values near zero


@pytest.mark.parametrize("shape, scale", [((64, 64), 1.0), ((256, 64), 2.0), ((64, 256), 1.0), ((4, 32, 32), 1.0)])
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


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (4, 16, 16)])
def test_bf16_and_mantissa_equal_an_fp32_master_weight_bit_for_bit(shape):
    """Updates far below bf16's resolution add up."""
    p, mantissa, momentum_buffer = normal(*shape).bfloat16(), torch.zeros(shape, dtype=torch.uint16), torch.zeros(shape)
    master, buf, scale = p.float(), torch.zeros(shape), max(1, shape[-2] / shape[-1]) ** 0.5
    for step in range(100):
        grad = normal(*shape, seed=step).bfloat16()
        m, lr, wd = numbers(0.85 + step / 1000, 0.025 * (1 - step / 200), 0.01)
        train.muon_update(p, grad, momentum_buffer, mantissa, m, lr, wd)
        buf = m * buf + (1 - m) * grad.float()
        v = train.newton_schulz((m * buf + (1 - m) * grad.float()).bfloat16())
        master = master * (1 - lr * wd) - (lr * scale) * v.float()
        assert torch.equal(train.join_bits(p, mantissa).view(torch.int32), master.view(torch.int32)), step
    assert v.dtype == torch.bfloat16 and torch.equal(p.view(torch.int16).int(), master.view(torch.int32) >> 16)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bits_are_truncated_and_joined_again(is_compiled):
    """Any fp32 number, also those whose upper 16 bits would round up, comes back exactly."""
    bits = torch.randint(-(2**31), 2**31, (10_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    master = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-8 + 2**-20])])
    p, mantissa = torch.zeros(len(master), dtype=torch.bfloat16), torch.zeros(len(master), dtype=torch.uint16)
    def split_and_join(p, mantissa, master):
        train.split_bits_(p, mantissa, master)
        return train.join_bits(p, mantissa)
    joined = (torch.compile(split_and_join) if is_compiled else split_and_join)(p, mantissa, master)
    assert torch.equal(joined.view(torch.int32), master.view(torch.int32))
    assert torch.equal(p.view(torch.int16).int(), master.view(torch.int32) >> 16)
    assert p[-1].item() == 1.0  # rounding would give 1.0078125


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-4)])
def test_compiled_update_equals_the_plain_one(dtype, tolerance):
    """The program that CUDA runs, compiled for a CPU; in bf16 it may round elsewhere within Newton-Schulz."""
    results = []
    for update in (train.muon_update, torch.compile(train.muon_update, dynamic=False, fullgraph=True)):
        p, momentum_buffer = normal(64, 32).to(dtype), torch.zeros(64, 32)
        mantissa = torch.zeros(64, 32, dtype=torch.uint16) if dtype == torch.bfloat16 else None
        with torch.no_grad():
            for step in range(3):
                update(p, normal(64, 32, seed=step).to(dtype), momentum_buffer, mantissa, *numbers(0.9 + step / 100))
        results.append(p if mantissa is None else train.join_bits(p, mantissa))
    assert relative_error(results[1], results[0]) < tolerance


def train_sharded(rank, world_size, folder):
    """Take two steps of all optimizers on gradients that are the same on every rank; save this rank's weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store_{world_size}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model, matrices = train.GPT(HP), [torch.nn.Parameter(normal(16, 32, seed=i).bfloat16()) for i in range(5)]
    of_matrices = train.Muon([dict(params=matrices)], lr=0.025, rank=rank, world_size=world_size)
    optimizers = *train.make_optimizers(model, HP, rank, world_size), of_matrices
    weights = [*model.parameters(), *matrices]
    for step in range(2):
        for i, p in enumerate(weights):
            p.grad = normal(*p.shape, seed=100 * step + i).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    torch.save([p.detach() for p in weights], f"{folder}/weights_{world_size}_{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's own end once aborted on a busy machine


@pytest.mark.slow
def test_sharding_over_1_2_and_3_ranks_gives_the_same_weights(tmp_path):
    """A model in fp32, and a few small matrices in bf16 with mantissas: products in bf16 are slow on CPUs."""
    for world_size in (1, 2, 3):
        mp.spawn(train_sharded, (world_size, tmp_path), nprocs=world_size)
    reference, *others = map(torch.load, sorted(tmp_path.glob("weights_*.pt")))
    assert len(others) == 5 and all(all(map(torch.equal, weights, reference)) for weights in others)


def test_adamw_has_the_embeddings_head_gates_and_scalars_and_muon_the_rest_each_once():
    """AdamW keeps its states in the parameters' dtype."""
    model, hp = train.GPT(HP), replace(HP, value_embedding_lr=0.1)
    model.use_bf16()
    names, optimizers = {p: name for name, p in model.named_parameters()}, train.make_optimizers(model, hp, 0, 1)
    adamw, muon = ([(names[p], group) for group in optimizer.param_groups for p in group["params"]]
                   for optimizer in optimizers)
    assert sorted(name for name, _ in adamw + muon) == sorted(names.values())
    assert {name: group["lr"] for name, group in adamw} == {
        "lm_head_w": 1 / 320, "scalars": 0.015, "embed.weight": 0.3,
        **{f"value_embeds.{k}.weight": 0.1 for k in range(3)},
        **{f"blocks.{layer}.attn.ve_gate_w": 0.008 for layer in (0, 1, 2, 13, 14, 15)}}
    for _, group in adamw:
        assert (group["betas"], group["eps"], group["weight_decay"], group["fused"]) == ((0.8, 0.95), 1e-10, 0.0, True)
    decay = {(name.split(".")[-1], group["weight_decay"], group["lr"]) for name, group in muon}
    assert decay == {("qkvo_w", 0.01, 0.025), ("fc_w", 0.02, 0.025), ("proj_w", 0.02, 0.025)}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    dtypes = [(p.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype) for p, state in optimizers[0].state.items()]
    assert len(dtypes) == len(adamw) and all(len(set(of_one)) == 1 for of_one in dtypes)


def register_elsewhere(model):
    model.blocks[3].mlp.gate_w = model._parameters.pop("scalars")  # a shared parameter would go by its first name


@pytest.mark.parametrize("name, count, change", [
    ("bias", 0, lambda model, patch: model.register_parameter("bias", torch.nn.Parameter(torch.zeros(3)))),
    ("blocks.3.mlp.gate_w", 0, lambda model, patch: register_elsewhere(model)),
    ("lm_head_w", 2, lambda model, patch: patch.setattr(
        train, "fnmatchcase", lambda name, pattern, match=train.fnmatchcase: (
            match(name, pattern) or (name, pattern) == ("lm_head_w", "embed.weight"))))])
def test_a_parameter_in_no_group_or_two_is_named(monkeypatch, name, count, change):
    change(model := train.GPT(HP), monkeypatch)
    with pytest.raises(ValueError, match=f"parameter {name} is in {count} groups of make_optimizers; name it in one"):
        train.make_optimizers(model, HP, 0, 1)


def test_weight_decay_is_by_the_scheduled_learning_rate():
    """A step without gradients, where the schedule halves the rate: only the decay is left."""
    model, hp = train.GPT(HP), replace(HP, num_iterations=200)
    adamw, muon = train.make_optimizers(model, hp, 0, 1)
    before = {p: p.detach().double() for p in model.parameters()}
    for p in before:
        p.grad = torch.zeros_like(p)
    train.set_schedules(adamw, muon, 130, hp)
    muon.step()
    for p, decay in ((p, 0.0125 * group["weight_decay"]) for group in muon.param_groups for p in group["params"]):
        assert torch.allclose(p.double(), before[p] * (1 - decay), rtol=1e-7, atol=0)
