"""Checks that need a GPU: masks, FlexAttention's backward, gradients and losses in bf16 against fp32, candidates.

One GPU is enough; it accumulates what eight would share. Each test prints its time. The tests of the gradients' limits
need no GPU.
"""

import math
import time
from functools import cache

import pytest
import torch
from golden import golden_tokens, golden_weights, write_golden_case
from helpers import random_tokens, relative_error, run_program, start_trainer, val_losses, write_config

import train_gpt_medium as train
from data.loader import train_batches
from data.shards import open_shards, write_shard

pytest.importorskip("triton")
import candidates  # noqa: E402

pytestmark = pytest.mark.slow
BASELINE = [[0, 13], [1, 14], [2, 15]]
ON_GPU = pytest.mark.gpu


@pytest.fixture(autouse=True)
def print_time(request, capsys):
    start = time.perf_counter()
    yield
    with capsys.disabled():
        print(f" {request.node.name}: {time.perf_counter() - start:.1f} s")


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
        docs = (tokens == eot_id).cumsum(0)
        make_mask = train.flex_mask if tokens.is_cuda else train.dense_mask
        return train.attend(q, k, v, make_mask(train.apply_window(train.document_blocks(docs), window), docs))

    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v)]
        arguments = [*inputs, tokens.to(device), torch.tensor(window, dtype=torch.int32, device=device)]
        part = candidates.Part(attend, arguments, inputs, compiled=device == "cuda", grads=[grad.to(device, dtype)])
        results.append([tensor.cpu() for tensor in part.run()])
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


def losses_on_gpu_and_cpu(config, *options):
    """Run the program on each, in log folders of their own: a finished run refuses one on another device."""
    gpu, cpu = (run_program(config, f"--log_dir={config.parent}/{name}", *options, ranks=1, env=env, timeout=3600)
                for name, env in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})))
    assert (gpu.returncode, cpu.returncode) == (0, 0), gpu.stderr + cpu.stderr
    return val_losses(gpu.stdout), val_losses(cpu.stdout)


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
    *(lose_gradient(layer, 3) for layer in (0, 13, 15)), *(lose_gradient(layer, 1) for layer in (0, 3, 7, 11, 15))],
    ids=["short window not halved", *(f"table's gradient lost in layer {layer}" for layer in (0, 13, 15)),
         *(f"x0's gradient lost in layer {layer}" for layer in (0, 3, 7, 11, 15))])
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


@pytest.fixture(scope="module")
def gpt2_keys(tmp_path_factory):
    """Write shards of GPT-2's vocabulary, structured as the golden ones; return keys for 20 steps on them."""
    folder = tmp_path_factory.mktemp("gpt2")
    for name, n, seed in (("train", 12_000_000, 1), ("val", 600_000, 2)):
        write_shard(folder / f"g_{name}.bin", golden_tokens(n, seed, 50257))
    return dict(train_files=f"{folder}/g_train.bin", val_files=f"{folder}/g_val.bin", log_dir=f"{folder}/logs",
                num_iterations=20, val_loss_every=10, val_tokens=2 * 262144, warmup_steps=2,
                coordinate_descent_tuning=False)


@ON_GPU
def test_full_width_model_follows_the_cpu(tmp_path, gpt2_keys):
    torch.save({"model": golden_weights(BASELINE, 1024, 50257)}, tmp_path / "init.pt")
    config = write_config(tmp_path / "wide.toml", **gpt2_keys | dict(
        init_from=f"{tmp_path}/init.pt", train_seq_len=256, val_seq_len=1024, val_tokens=4096, sequences_per_step=2))
    gpu, cpu = losses_on_gpu_and_cpu(config)
    assert gpu == pytest.approx(cpu, abs=0.05)


@ON_GPU
def test_full_model_trains_20_steps_at_full_length(tmp_path, gpt2_keys):
    result = run_program(write_config(tmp_path / "full.toml", **gpt2_keys), ranks=1)
    assert result.returncode == 0, result.stderr
    losses = val_losses(result.stdout)
    assert losses[0] == pytest.approx(10.825840, abs=1e-4)
    assert losses[20] < losses[10] < losses[0]
    assert "peak memory allocated" in result.stdout


def val_losses_of_50_steps(config, names):
    """Return the validation losses at steps 0, 25 and 50."""
    trainer = start_trainer(config, "cuda:0")
    candidates.apply(trainer.model, names)
    trainer.model.compile_parts(trainer.hp.train_seq_len)
    hp, losses = trainer.hp, [trainer.validate(0)]
    batches = train_batches(trainer.train_shards, hp.sequences_per_step, hp.train_seq_len, 0, 50, 0, 1, trainer.device)
    for step, batch in enumerate(batches, start=1):
        trainer.train_step(step - 1, *batch)
        if step in (25, 50):
            losses.append(trainer.validate(step))
    return losses


@ON_GPU
def test_50_steps_of_the_full_model_agree_with_candidates(process_group, tmp_path, gpt2_keys):
    """Within 0.01 and three times what two plain runs of one seed differ by: one such pair shows that only roughly."""
    config = write_config(tmp_path / "full.toml", **gpt2_keys | dict(num_iterations=50, sequences_per_step=2))
    plain, again, fast = (val_losses_of_50_steps(config, names) for names in ([], [], candidates.CANDIDATES))
    assert plain[2] < plain[0] - 0.5
    for a, b, c in zip(plain, again, fast, strict=True):
        assert abs(c - a) <= 3 * abs(a - b) + 0.01
