"""Time a step, part by part, plain and with the candidates: python tests/benchmark.py [--json FILE] [PART ...]

It times the full-size model in bf16, compiled, on one GPU. It calls "plain", the model as it is, and "candidates", with
all of tests/candidates.py, in turn and prints their medians. Without a GPU it runs a tiny size with Triton's kernels
interpreted, which shows only that the benchmark works. The parts (default: the first five):

    machine     the rates of a large product and of a copy
    parts       masks, tables, attention, MLP, head and loss: one sequence forward and backward
    step        one sequence, a step of 8 sequences, a validation sequence, AdamW, Muon (a rank's of 8, and all)
    tables      one sequence and AdamW with 0, 3, 6 and 8 tables: the cost of a table
    start       the program itself for two steps, with empty caches and again with the first run's caches
    profile     the kernels of one sequence that take longest
    kernels     the candidates' kernels compiled for an H100 (without a GPU, set TRITON_INTERPRET=0): bytes of shared
                memory, registers per thread, bytes spilled, and whether products use its own instruction (wgmma)

Windows are those of the middle of a run, unless a row says otherwise. Tokens are made up: Zipfian ids, documents of 700
tokens on average. A part that fails does not stop the others; the exit status is then 1.
"""

import argparse
import faulthandler
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import candidates  # noqa: E402
import triton  # noqa: E402
from helpers import run_program, write_config  # noqa: E402

import train_gpt_medium as train  # noqa: E402
from configs.config import load  # noqa: E402
from data.loader import train_batches, val_sequences  # noqa: E402
from data.shards import write_synthetic_shard  # noqa: E402
from logs import distributed  # noqa: E402

DEVICE, DTYPE = (torch.device("cuda", 0), torch.bfloat16) if ON_GPU else (torch.device("cpu"), torch.float32)
REPEATS, UNTIMED = (9, 2) if ON_GPU else (1, 0)  # calls of a function
MIDDLE_WINDOW = 14  # blocks
MIDDLE_STEP = next(step for step in range(5960) if train.window_blocks(step, 5960) == MIDDLE_WINDOW)
TABLE_CONFIGS = ("none", "baseline", "untied_6", "add_5") if ON_GPU else ("none", "baseline")
TINY = dict(vocab_size=96, num_heads=1, model_dim=128, train_seq_len=128, val_seq_len=128, sequences_per_step=1)


def time_once(function):
    """Return the milliseconds of one call, by CUDA events on a GPU."""
    candidates.find_occurrences.cache_clear()  # repeats would share one sort of the tokens
    if not ON_GPU:
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(4_000_000)  # cycles, about 2 ms, in which the CPU gets ahead, as it is in training
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


class Bench:
    """Measure rows of the table, in ms, at full size on a GPU, else at a tiny one. --json writes `record`."""

    def __init__(self, folder):
        self.folder = folder
        hp = train.Hyperparameters(**{} if ON_GPU else TINY)
        self.hp = hp = replace(
            hp, seed=0, val_tokens=hp.val_seq_len, warmup_steps=1, log_dir=f"{folder}/logs",
            coordinate_descent_tuning=False, train_files=f"{folder}/train.bin", val_files=f"{folder}/val.bin")
        train_tokens = 2 * hp.sequences_per_step * hp.train_seq_len
        for path, num_tokens in ((hp.train_files, train_tokens), (hp.val_files, hp.val_tokens)):
            write_synthetic_shard(path, num_tokens + 2, hp.vocab_size, hp.eot_id)
        shards = train.open_shards(hp.train_files)
        self.batch = next(train_batches(shards, hp.sequences_per_step, hp.train_seq_len, 0, 1, 0, 1, DEVICE))
        self.sequence = (self.batch[0][0], self.batch[1][0], torch.tensor(MIDDLE_WINDOW, device=DEVICE).int())
        machine = f"{torch.cuda.get_device_name(0) if ON_GPU else 'CPU'}, PyTorch {torch.__version__}"
        self.record = dict(machine=f"{machine}, {time.strftime('%Y-%m-%d')}", configuration=asdict(hp), rows=[],
                           figures={}, failed=[])

    def add(self, part, functions):
        """Time "plain" and, if it is there, "candidates" in turn; return the row."""
        for function in functions.values():
            for _ in range(UNTIMED):
                function()
        times = [{which: time_once(function) for which, function in functions.items()} for _ in range(REPEATS)]
        row = {which: float(np.median([t[which] for t in times])) for which in functions}
        cells = row["plain"], row.get("candidates"), row.get("candidates", 0) / row["plain"]
        print(f"| {part} | {' | '.join(f'{x:,.2f}' if x else '' for x in cells)} |", flush=True)
        self.record["rows"].append(dict(part=part, **row))
        return row

    def note(self, name, figures):
        self.record["figures"][name] = figures
        print(f"{name}: " + ", ".join(f"{key} {number:,.2f}" for key, number in figures.items()), flush=True)

    def train_sequence(self, trainer, with_adamw=False):
        trainer.model(*self.sequence).backward()
        if with_adamw:
            trainer.optimizers[0].step()
        trainer.model.zero_grad()


def make_trainers(hp):
    """Return a trainer with no candidates and one with all of them."""
    gc.collect()  # earlier compiled models and optimizers are in reference cycles
    if ON_GPU:
        torch.cuda.empty_cache()
    trainers = {"plain": train.Trainer(hp, DEVICE), "candidates": train.Trainer(hp, DEVICE)}
    candidates.apply(trainers["candidates"].model, candidates.CANDIDATES)
    for trainer in trainers.values():
        candidates.fill_zeros(trainer.model)
        if ON_GPU:
            trainer.model.compile_parts(hp.train_seq_len)
    return trainers


def attention_part(bench, window):
    """Return attention under the sequence's mask, on random q, k and v, strided as in the model."""
    shape = (1, bench.hp.train_seq_len, bench.hp.num_heads, train.HEAD_DIM)
    *qkv, grad = (torch.randn(shape, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_() for _ in range(4))
    tokens, _, _ = bench.sequence
    mask, _ = train.attention_masks(tokens, bench.hp.eot_id, torch.tensor(window, device=DEVICE).int())
    attend = torch.compile(train.attend, dynamic=False) if ON_GPU else train.attend
    return partial(candidates.forward_and_backward, attend, [*qkv, mask], qkv, [grad.detach()])


def measure_machine(bench):
    n, size = (8192, 2**30) if ON_GPU else (512, 2**22)
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    product = bench.add(f"a product of {n} x {n} x {n}", {"plain": lambda: a @ b})
    copy = bench.add(f"a copy of {size / 2**20:,.0f} MiB", {"plain": lambda: target.copy_(source)})
    bench.note("rates", {"TFLOP/s": 2e-9 * n**3 / product["plain"], "GB/s": 2e-6 * size / copy["plain"]})


def measure_parts(bench):
    tokens, _, window = bench.sequence
    masks = torch.compile(train.attention_masks, dynamic=False) if ON_GPU else train.attention_masks
    bench.add("masks of a sequence", {"plain": lambda: masks(tokens, bench.hp.eot_id, window)})
    for blocks in (3, 14, 27) if ON_GPU else (2,):
        bench.add(f"attention, window {blocks}", {"plain": attention_part(bench, blocks)})
    trainers = make_trainers(bench.hp)
    for part, name in (("embedding and tables", "tables"), ("MLP", "mlp"), ("head and loss", "head")):
        bench.add(part, {which: candidates.part_of(trainer.model, name, tokens, compiled=ON_GPU)
                         for which, trainer in trainers.items()})


def measure_step(bench):
    hp, trainers = bench.hp, make_trainers(bench.hp)
    model, (adamw, muon) = trainers["plain"].model, trainers["plain"].optimizers
    [(_, *val)] = val_sequences(trainers["plain"].val_shards, hp.val_seq_len, 1, 0, 1, DEVICE)

    def add(part, function):
        bench.add(part, {which: partial(function, trainer) for which, trainer in trainers.items()})

    add("one sequence", bench.train_sequence)
    add(f"step of {hp.sequences_per_step} sequences", lambda trainer: trainer.train_step(MIDDLE_STEP, *bench.batch))
    with torch.no_grad():
        add("a validation sequence", lambda trainer: trainer.model(*val, bench.sequence[2]))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    eighth = train.Muon([group | dict(params=group["params"][::8]) for group in muon.param_groups], train.MUON_LR, 0, 1)
    eighth.update = muon.update
    for part, optimizer in (("AdamW", adamw), ("Muon, as one of 8 ranks", eighth), ("Muon, all", muon)):
        bench.add(part, {"plain": optimizer.step})


def measure_tables(bench):
    for name in TABLE_CONFIGS:
        tables = load(train.Hyperparameters, ROOT / f"configs/{name}.toml", {}).value_embeddings
        trainers = make_trainers(replace(bench.hp, value_embeddings=tables))
        runs = {which: partial(bench.train_sequence, trainer, True) for which, trainer in trainers.items()}
        bench.add(f"sequence and AdamW, {len(tables)} tables, {sum(map(len, tables))} layers", runs)


def measure_start(bench):
    keys = {name: value for name, value in asdict(bench.hp).items() if value not in (None, "")}
    config = write_config(bench.folder / "start.toml", **keys | dict(num_iterations=2))
    caches = dict(TORCHINDUCTOR_CACHE_DIR=f"{bench.folder}/inductor", TRITON_CACHE_DIR=f"{bench.folder}/triton")
    for part in ("start, cold", "start, warm"):
        start = time.monotonic()
        result = run_program(config, env=caches)
        if result.returncode:
            raise RuntimeError(result.stderr[-2000:])
        peak = re.search(r"peak memory \w+: (\d+) MiB", result.stdout)
        bench.note(part, {"s": time.monotonic() - start, "peak MiB": int(peak[1])})


def measure_profile(bench):
    activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    for which, trainer in make_trainers(bench.hp).items():
        for _ in range(UNTIMED):
            bench.train_sequence(trainer)
        candidates.find_occurrences.cache_clear()  # else the profile would lack the sort of the tokens
        with torch.profiler.profile(activities=[activity]) as profile:
            bench.train_sequence(trainer)
        longest = f"self_{DEVICE.type}_time_total"
        print(f"{which}:\n{profile.key_averages().table(sort_by=longest, row_limit=30, max_name_column_width=90)}")


def measure_kernels(bench):
    """Compile each kernel at full size."""
    mlp = dict(N=4096, K=1024, B_K_STRIDE=1, B_N_STRIDE=1024, BACKWARD=False, **candidates.RELU_SQUARED_TILE)
    head = dict(LOGITS=50304, CAP=train.LOGIT_CAP, WITH_GRADIENTS=True, **candidates.HEAD_TILE)
    for name, kernel, constants in (
            ("MLP", candidates.relu_squared_kernel, mlp),
            ("MLP, backward", candidates.relu_squared_kernel, mlp | dict(B_K_STRIDE=4096, B_N_STRIDE=1, BACKWARD=True)),
            ("head", candidates.capped_cross_entropy_kernel, head),
            ("head without gradients", candidates.capped_cross_entropy_kernel, head | dict(WITH_GRADIENTS=False)),
            ("tables", candidates.row_sums_kernel, dict(WIDTH=1024, **candidates.ROW_SUMS_TILE))):
        bench.note(name, compile_for_h100(kernel, constants))


def compile_for_h100(kernel, constants):
    """Return a kernel's figures, with pointers aligned to 16 bytes as PyTorch's are."""
    types = dict(targets="*i64", order="*i64", starts="*i64", losses="*fp32", gradient_scale="fp32", V="i32")
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(triton.compiler.ASTSource(kernel, signature, constants, aligned), options=options,
                              target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
    command = [triton.backends.nvidia.compiler.get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", "-"]
    report = subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True, check=True).stderr
    return dict(shared=compiled.metadata.shared, registers=int(re.search(r"Used (\d+) registers", report)[1]),
                spilled=sum(map(int, re.findall(r"(\d+) bytes spill", report))), wgmma="wgmma" in compiled.asm["ptx"])


MEASURES = dict(machine=measure_machine, parts=measure_parts, step=measure_step, tables=measure_tables,
                start=measure_start, profile=measure_profile, kernels=measure_kernels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", metavar="PART", nargs="*", choices=MEASURES, help=", ".join(MEASURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, again after each part")
    arguments = parser.parse_args()
    distributed.find_device()
    distributed.start_process_group()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print(f"{bench.record['machine']}\n| part | plain ms | candidates ms | ratio |")
        for part in arguments.parts or list(MEASURES)[:5]:
            faulthandler.cancel_dump_traceback_later()  # the timer of start_process_group or of a step: no step follows
            try:
                MEASURES[part](bench)
            except Exception:
                bench.record["failed"].append(part)
                traceback.print_exc()
            if arguments.json:
                arguments.json.write_text(json.dumps(bench.record, indent=1))
    print(f"failed: {bench.record['failed']}")
    dist.destroy_process_group()
    return 1 if bench.record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
