"""Checks that need a GPU: masks, FlexAttention's backward, gradients and losses in bf16 against fp32, candidates.

One GPU is enough; `--durations=0` prints each test's time. The tests of the gradients' limits need no GPU.
"""

import math
from functools import cache

import pytest
import torch
from golden import golden_tokens, golden_weights, write_golden_case
from helpers import random_tokens, relative_error, run_program, val_losses, write_config

import train_gpt_medium as train
from data.loader import train_batches
from data.shards import open_shards, write_shard

pytest.importorskip("triton")
import candidates  # noqa: E402

pytestmark = pytest.mark.slow
BASELINE = [[0, 13], [1, 14], [2, 15]]
ON_GPU = pytest.mark.gpu


@ON_GPU
@pytest.mark.parametrize("T", [65_536, 262_144])
def test_mask_lists_equal_those_of_the_cpu_bit_for_bit(T, monkeypatch):
    monkeypatch.setattr(train, "dense_mask", train.flex_mask)  # on the CPU too
    on_gpu = torch.compile(train.attention_masks, dynamic=False, fullgraph=True)
    for document in (700, 30_000):
        tokens = torch.from_numpy(random_tokens(T, 0, 50257, document)).int()
        for window in torch.tensor([1, 14, 27], dtype=torch.int32):
            expected = train.attention_masks(tokens, 50256, window)
            for a, b in zip(expected, on_gpu(tokens.cuda(), 50256, window.cuda()), strict=True):
                for name in (f"{of}_{what}" for of in ("kv", "full_kv", "q", "full_q")
                             for what in ("num_blocks", "indices")):
                    assert torch.equal(getattr(a, name), getattr(b, name).cpu()), (document, window, name)


@ON_GPU
@pytest.mark.parametrize("window", [0, 1, 2, 7, 27])
def test_flex_attention_and_its_gradients_equal_the_dense_ones(window):
    """bf16 on the GPU against dense fp32 on the CPU."""
    T, eot_id, generator = 2048, 255, torch.Generator().manual_seed(0)
    tokens = torch.randint(0, eot_id, (T,), dtype=torch.int32, generator=generator)
    tokens[[127, 129, 383, 640, 1500]] = eot_id
    q, k, v, grad = (torch.randn(1, 2, T, 128, generator=generator).bfloat16().float() for _ in range(4))

    def attend(q, k, v, tokens, window):
        return train.attend(q, k, v, train.attention_masks(tokens, eot_id, window)[0])

    results = []
    for device, dtype, function in (("cpu", torch.float32, attend),
                                    ("cuda", torch.bfloat16, torch.compile(attend, dynamic=False))):
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v)]
        arguments = [*inputs, tokens.to(device), torch.tensor(window, dtype=torch.int32, device=device)]
        tensors = candidates.forward_and_backward(function, arguments, inputs, [grad.to(device, dtype)])
        results.append([tensor.cpu() for tensor in tensors])
    for reference, actual in zip(*results, strict=True):
        assert relative_error(actual, reference) < 0.02


@ON_GPU
def test_batches_reach_the_gpu_without_a_synchronization(small_data):
    stream = (open_shards(f"{small_data}/s_train_*.bin"), 4, 128, 0, 4, 0, 1)
    expected = list(train_batches(*stream, torch.device("cpu")))
    batches = train_batches(*stream, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")  # a synchronization raises
    try:
        on_gpu = list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [[x.tolist() for x in batch] for batch in on_gpu] == [[x.tolist() for x in batch] for batch in expected]


@ON_GPU
def test_muon_update_is_as_exact_as_on_the_cpu():
    """The change of a weight of 1, in bf16 and mantissa, against Newton-Schulz in fp64."""
    grad = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    momentum, lr, weight_decay = numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.9, 0.025, 0.01)]
    v = train.newton_schulz((1 - momentum) * (1 + momentum) * grad.double())
    expected, errors = -lr * weight_decay - lr * math.sqrt(2) * v, []
    compiled = torch.compile(train.muon_update, dynamic=False, fullgraph=True)
    for update, device in ((train.muon_update, "cpu"), (compiled, "cuda")):
        p, momentum_buffer = torch.ones_like(grad, device=device), torch.zeros(grad.shape, device=device)
        mantissa = torch.zeros(grad.shape, dtype=torch.uint16, device=device)
        with torch.no_grad():
            update(p, grad.to(device), momentum_buffer, mantissa, *numbers)
        errors.append(relative_error(train.join_bits(p, mantissa).cpu() - 1, expected))
    assert errors[0] < 0.02 and errors[1] < 1.2 * errors[0]


@ON_GPU
@pytest.mark.parametrize("name", candidates.CANDIDATES)
def test_candidate_in_bf16_is_no_less_exact_than_the_model(name, monkeypatch):
    monkeypatch.setattr(candidates, "HEAD_CHUNK_TOKENS", 768)  # three of them
    hp = train.Hyperparameters(train_seq_len=2048, val_seq_len=2048)
    tokens = (torch.rand(2048, generator=torch.Generator().manual_seed(0)) ** 4 * 50257).int().cuda()  # some often
    expected = candidates.evaluate(hp, name, [], tokens, torch.float64)
    plain, fast = (candidates.evaluate(hp, name, names, tokens, torch.bfloat16, compiled=True)
                   for names in ([], [name]))
    for reference, of_plain, of_fast in zip(expected, plain, fast, strict=True):
        plain_error, fast_error = relative_error(of_plain, reference), relative_error(of_fast, reference)
        assert fast_error <= 1.1 * plain_error + 1e-7 and fast_error < 0.02


# -----------------------------------------------------------------------------
# One sequence's gradients


def one_sequence(device="cpu", is_bf16=False, spoil=lambda model: None):
    """Return the gradients of all parameters, the scalars' in three, on 1,024 tokens under a window of three blocks."""
    hp = train.Hyperparameters(vocab_size=512, num_heads=1, model_dim=128, train_seq_len=1024, val_seq_len=1024)
    model, weights = train.GPT(hp), golden_weights(BASELINE, 128, 512)
    of_x, of_x0 = weights["scalars"][16:48].view(16, 2).T
    of_x -= 0.2  # these weights give each layer more than 4% of the embedding's gradient
    of_x0 += torch.tensor([0.7] * 5 + [1.4, 1.4, 2.1, 1.4, 1.4, 1.4, 1.4] + [0.7] * 4)
    model.load_state_dict(weights)
    model.to(device)
    if is_bf16:
        model.use_bf16()
    if device == "cuda":
        model.compile_parts(1024)
    elif is_bf16:  # dense attention wants a mask of the queries' dtype
        model.attention_masks = lambda *of: tuple(mask.bfloat16() for mask in train.attention_masks(*of))
    spoil(model)
    tokens = torch.from_numpy(random_tokens(1025, 0, 512, document=2000)).to(device)
    model(tokens[:-1].int(), tokens[1:], torch.tensor(3, dtype=torch.int32, device=device)).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    scalars = gradients.pop("scalars").split([16, 32, 32])
    return gradients | dict(zip(("scalars: skips", "scalars: blocks", "scalars: attention"), scalars))


in_fp32 = cache(one_sequence)


def beyond_limits(gradients):
    """Return the parameters, with their errors, whose gradients differ from fp32 by more than bf16 explains."""
    errors = {name: relative_error(gradients[name], exact) for name, exact in in_fp32().items()}
    return {name: error for name, error in errors.items() if not error < (0.25 if "scalars" in name else 0.04)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_gradients_in_bf16_are_those_in_fp32(device):
    assert beyond_limits(one_sequence(device, is_bf16=True)) == {}


def lose_gradient(layer, number):
    """Detach an argument of a block's forward: 1 is x0, 3 the list of its sources' values."""
    def detach(block, arguments):
        lost = arguments[number]
        lost = [value.detach() for value in lost] if isinstance(lost, list) else lost.detach()
        return *arguments[:number], lost, *arguments[number + 1:]
    return lambda model: model.blocks[layer].register_forward_pre_hook(detach)


@pytest.mark.parametrize("spoil", [
    lambda model: setattr(model, "attention_masks", lambda *of: train.attention_masks(*of)[:1] * 2),
    lose_gradient(0, 3), lose_gradient(3, 1)],  # the layers whose loss is hardest to see
    ids=["short window not halved", "a table's gradient lost in a layer", "x0's gradient lost in a layer"])
def test_a_fault_of_the_gradients_is_beyond_the_limits(spoil):
    assert beyond_limits(one_sequence(spoil=spoil))


# -----------------------------------------------------------------------------
# Training


@ON_GPU
def test_shrunken_model_follows_the_cpu(tmp_path):
    """20 steps in bf16, compiled, with FlexAttention, against losses stored from a CPU (fp32, dense attention)."""
    config = write_golden_case("baseline_short", tmp_path)
    result = run_program(config, "--num_iterations=20", "--val_loss_every=5", ranks=1)
    assert result.returncode == 0, result.stderr
    expected = {0: 6.415833, 5: 3.746636, 10: 3.317314, 15: 3.224975, 20: 3.198279}
    assert val_losses(result.stdout) == pytest.approx(expected, abs=0.005)


@ON_GPU
def test_full_model_trains_20_steps_at_full_length(tmp_path):
    """On tokens of GPT-2's vocabulary, structured as the golden ones."""
    for name, n, seed in (("train", 12_000_000, 1), ("val", 600_000, 2)):
        write_shard(tmp_path / f"g_{name}.bin", golden_tokens(n, seed, 50257))
    config = write_config(
        tmp_path / "full.toml", train_files=f"{tmp_path}/g_train.bin", val_files=f"{tmp_path}/g_val.bin",
        log_dir=f"{tmp_path}/logs", num_iterations=20, val_loss_every=10, val_tokens=2 * 262144, warmup_steps=2)
    result = run_program(config, ranks=1)
    assert result.returncode == 0, result.stderr
    losses = val_losses(result.stdout)
    assert losses[0] == pytest.approx(10.825840, abs=1e-4)
    assert losses[20] < losses[10] < losses[0]
    assert "peak memory allocated" in result.stdout
