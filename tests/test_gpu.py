"""Checks that need a GPU: FlexAttention's backward, training in bf16 against fp32 on the CPU, candidates.

One GPU is enough; it accumulates what eight would share. `pytest -m gpu --durations=0` prints every test's time.
"""

import pytest
import torch
from golden import CASES, golden_tokens, golden_weights, write_golden_case
from helpers import relative_error, run_program, start_trainer, val_losses, write_config

import train_gpt_medium as train
from data.loader import train_batches
from data.shards import open_shards, write_shard

pytest.importorskip("triton")
import candidates  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


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


def test_muon_update_on_the_gpu_equals_the_one_on_the_cpu():
    results = []
    compiled = torch.compile(train.muon_update, dynamic=False, fullgraph=True)
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.9, 0.025, 0.01)]  # momentum, lr, weight decay
    for update, device in ((train.muon_update, "cpu"), (compiled, "cuda")):
        p = torch.ones(256, 128, dtype=torch.bfloat16, device=device)
        momentum_buffer = torch.zeros(256, 128, device=device)
        mantissa = torch.zeros(256, 128, dtype=torch.uint16, device=device)
        grad = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
        with torch.no_grad():
            update(p, grad, momentum_buffer, mantissa, *numbers)
        results.append(train.join_bits(p, mantissa).cpu() - 1)
    assert relative_error(results[1], results[0]) < 0.02


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


def test_shrunken_model_follows_the_cpu(tmp_path):
    """20 steps: compiled, bf16, NCCL, FlexAttention against fp32, gloo, dense."""
    config = write_golden_case("baseline_short", tmp_path)
    gpu, cpu = losses_on_gpu_and_cpu(config, "--num_iterations=20", "--val_loss_every=5")
    assert list(gpu) == [0, 5, 10, 15, 20]
    assert gpu == pytest.approx(cpu, abs=0.03)
    assert cpu[0] == pytest.approx(CASES["baseline_short"]["val_loss"]["0"], abs=1e-5)


@pytest.fixture(scope="module")
def gpt2_keys(tmp_path_factory):
    """Write shards of GPT-2's vocabulary, structured as the golden ones; return keys for 20 steps on them."""
    folder = tmp_path_factory.mktemp("gpt2")
    for name, n, seed in (("train", 12_000_000, 1), ("val", 600_000, 2)):
        write_shard(folder / f"g_{name}.bin", golden_tokens(n, seed, 50257))
    return dict(train_files=f"{folder}/g_train.bin", val_files=f"{folder}/g_val.bin", log_dir=f"{folder}/logs",
                num_iterations=20, val_loss_every=10, val_tokens=2 * 262144, warmup_steps=2,
                coordinate_descent_tuning=False)


def test_full_width_model_follows_the_cpu(tmp_path, gpt2_keys):
    torch.save({"model": golden_weights(train.Hyperparameters().value_embeddings, 1024, 50257)}, tmp_path / "init.pt")
    config = write_config(tmp_path / "wide.toml", **gpt2_keys | dict(
        init_from=f"{tmp_path}/init.pt", train_seq_len=256, val_seq_len=1024, val_tokens=4096, sequences_per_step=2))
    gpu, cpu = losses_on_gpu_and_cpu(config)
    assert gpu == pytest.approx(cpu, abs=0.05)


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


def test_50_steps_of_the_full_model_agree_with_candidates(process_group, tmp_path, gpt2_keys):
    """Within 0.01 and three times what two plain runs of one seed differ by: one such pair shows that only roughly."""
    config = write_config(tmp_path / "full.toml", **gpt2_keys | dict(num_iterations=50, sequences_per_step=2))
    plain, again, fast = (val_losses_of_50_steps(config, names) for names in ([], [], candidates.CANDIDATES))
    assert plain[2] < plain[0] - 0.5
    for a, b, c in zip(plain, again, fast, strict=True):
        assert abs(c - a) <= 3 * abs(a - b) + 0.01
