"""What a step costs, part by part, plain and by the fast paths: python tests/benchmark.py [--json FILE] [PART ...]

On a GPU: the full-size model on one, in bf16, compiled. Plain is PyTorch's own operations under torch.compile; fast is all of
the script's FAST_PATHS. Both are timed in turn, in the same process, and the medians compared. On a CPU it runs a tiny size
with Triton's kernels interpreted, which shows that the benchmark works and nothing else.

Parts (naming some runs only them, in the order named):
    machine     the rate of a large product in the model's dtype and of a copy, from which the floors follow
    parts       masks, embeddings, attention, MLP, head and loss, one sequence forward and backward
    step        the step of 8 accumulated sequences, AdamW, an eighth of Muon (as one of 8 ranks has it), all of Muon
    tables      one sequence and AdamW with 0, 3, 4, 5, 8 and 15 value-embedding tables, compiled by parts both ways
    start       compile time, cold and with the caches of the run before, and peak memory: in processes of their own
    profile     the kernels of one plain and one fast sequence that take longest (only where named)
    options     FlexAttention's kernel options, and other tiles for the MLP and the head (only where named)

Windows are of the middle of a run, where nothing else is said. A floor is the larger of operations over the measured rate and
bytes over the measured bandwidth, of what the function must read and write. Tokens are of the first FineWeb shard in
data/fineweb10B, or else made: Zipfian ids, documents of log-normal length, 700 tokens in the mean. After TIME_LIMIT_S nothing
more is begun; the last lines name what was left out. A part that fails does not stop the others; the exit status is then 1.
The JSON is written anew after each part.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers import write_shard  # noqa: E402

import train_gpt_medium as train  # noqa: E402

DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
REPEATS, UNTIMED = (15, 3) if ON_GPU else (1, 0)  # calls of what is timed
REPEATS_OF_LONG = 5 if ON_GPU else 1  # of whole steps
PEAK_TFLOPS = 989.4  # of an H100 SXM in dense bf16, for the MFU
TIME_LIMIT_S = 450  # of the 8 minutes, with time for what has begun
MIDDLE_STEP = next(step for step in range(5960) if train.window_blocks(step, 5960) == 14)
MAPS = [train.load_hyperparameters(ROOT / f"configs/{name}.toml", {}).value_embeddings for name in ("none", "baseline", "add_1", "add_2", "add_5")]
MAPS.append([[layer] for layer in range(train.NUM_LAYERS) if layer != train.NO_ATTENTION_LAYER])
TABLES = {len(tables): tables for tables in MAPS}
WINDOWS = (3, 14, 27) if ON_GPU else (2,)  # blocks
FLEX_OPTIONS = [
    {"ROWS_GUARANTEED_SAFE": True},
    {"PRESCALE_QK": True},
    {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_warps": 8, "fwd_num_stages": 2},
    {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3},
    {"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64, "bwd_num_warps": 8, "bwd_num_stages": 2},
    {"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64, "bwd_num_warps": 4, "bwd_num_stages": 3},
]

MLP_TILES = [
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4),
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    dict(BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=4),
]
HEAD_TILES = [dict(TILE=4096, num_warps=8), dict(TILE=4096, num_warps=16), dict(TILE=8192, num_warps=32), dict(TILE=65536, num_warps=32)]


def configuration(**changes: Any) -> train.Hyperparameters:
    """The full size on a GPU, a tiny one on a CPU."""
    keys: dict[str, Any] = dict(seed=0, run_id=0, coordinate_descent_tuning=False)
    if not ON_GPU:
        keys |= dict(vocab_size=256, num_heads=1, model_dim=128, train_seq_len=128, val_seq_len=128, val_tokens=128, sequences_per_step=1)
    return train.Hyperparameters(**keys | changes)


FAST = list(train.FAST_PATHS) if train.can_run_kernels(DEVICE) else None  # None: Triton is missing


def made_tokens(count: int, vocab_size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    weight = 1 / (np.arange(vocab_size - 1) + 2.7)
    tokens = rng.choice(vocab_size - 1, size=count, p=weight / weight.sum())
    starts = np.cumsum(rng.lognormal(np.log(700) - 0.5, 1.0, size=count // 100 + 2).astype(int) + 1)
    tokens[np.concatenate([[0], starts[starts < count]])] = vocab_size - 1
    return tokens.astype(np.uint16)


class Bench:
    """The rows of the table: what was timed, in ms, plain and fast, and the floor."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.record: dict[str, Any] = {}
        self.rate, self.bandwidth = 0.0, 0.0  # operations and bytes a second; 0: not measured
        self.hp = configuration()
        fineweb = train.FINEWEB_FOLDER / "fineweb_train_000001.bin"
        self.tokens_from = "FineWeb" if ON_GPU and fineweb.is_file() else "made"
        count = self.hp.sequences_per_step * self.hp.train_seq_len + 1
        tokens = train.open_shards(str(fineweb))[0][:count] if self.tokens_from == "FineWeb" else made_tokens(count, self.hp.vocab_size)
        self.inputs, self.targets = train.to_inputs_and_targets(torch.from_numpy(tokens.astype(np.int32)), self.hp.train_seq_len, DEVICE)

    def floor_ms(self, operations: float, moved: float) -> float | None:
        return None if not self.bandwidth else 1000 * max(operations / self.rate, moved / self.bandwidth)

    def sequence(self, hp: train.Hyperparameters, by_parts: bool, with_adamw: bool = False) -> Callable[[], Any]:
        """Forward and backward of the first sequence, the model compiled by parts or as a whole; and AdamW's step."""
        model, window = make_model(hp), train.window_tensor(14, DEVICE)
        adamw, _ = train.make_optimizers(model, rank=0, world_size=1)
        function = model if by_parts else compiled(model)
        if by_parts and ON_GPU:
            model.compile_parts()

        def run() -> None:
            function(self.inputs[0], self.targets[0], window).backward()
            if with_adamw:
                adamw.step()
            model.zero_grad(set_to_none=True)

        return run

    def sequence_as_run(self, hp: train.Hyperparameters) -> Callable[[], Any]:
        """As a run has it compiled: plain as a whole, fast by parts."""
        return self.sequence(hp, by_parts=bool(hp.fast_paths))

    def remaining_s(self) -> float:
        return TIME_LIMIT_S - (time.monotonic() - self.began)

    def add(self, name: str, functions: dict[str, Callable[[], Any]], operations: float = 0, moved: float = 0, repeats: int = REPEATS) -> dict[str, Any]:
        """Time "plain" and, if it is there, "fast", in turn; each is first called UNTIMED times. The row, {} where no time is left."""
        if self.remaining_s() < 0:
            self.left_out.append(name)
            return {}
        for function in functions.values():
            for _ in range(UNTIMED):
                function()
        times: dict[str, list[float]] = {which: [] for which in functions}
        for _ in range(repeats):
            for which, function in functions.items():
                times[which].append(time_once(function))
        row = dict(part=name, **{which: statistics.median(each) for which, each in times.items()}, floor=self.floor_ms(operations, moved))
        row["tflop"] = operations / 1e12
        self.rows.append(row)
        print(format_row(row), flush=True)
        return row


def time_once(function: Callable[[], Any]) -> float:
    """Milliseconds of one call, by CUDA events on a GPU."""
    if not ON_GPU:
        began = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - began)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(4_000_000)  # cycles, about 2 ms, in which the CPU gets ahead, as it is in training
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def format_row(row: dict[str, Any]) -> str:
    plain, fast, floor = row.get("plain"), row.get("fast"), row.get("floor")
    cells = [f"{x:,.2f}" if x else "" for x in (plain, fast)] + [f"{fast / plain:.2f}" if plain and fast else "", f"{floor:,.2f}" if floor else ""]
    return f"| {row['part']} | {' | '.join(cells)} |"


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False) if ON_GPU else function


def release_memory() -> None:
    """Give back what is left of models before: compiled methods and optimizers keep them in cycles."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def both(make: Callable[[train.Hyperparameters], Callable[[], Any]], **changes: Any) -> dict[str, Callable[[], Any]]:
    """What `make` makes of the plain and of the fast configuration."""
    release_memory()
    paths = {"plain": []} | ({} if FAST is None else {"fast": FAST})
    return {which: make(configuration(fast_paths=names, **changes)) for which, names in paths.items()}


def make_model(hp: train.Hyperparameters) -> train.GPT:
    """Weights in which every path counts: no projection is zero."""
    torch.manual_seed(0)
    with DEVICE:
        model = train.GPT(hp)
        with torch.no_grad():
            for p in [model.lm_head_w, *(block.mlp.proj_w for block in model.blocks), *(b.attn.qkvo_w for b in model.blocks if b.attn)]:
                train.uniform_(p, 0.5 * p.size(-1) ** -0.5)
    if ON_GPU:
        model.use_bf16()
    return model


def measure_machine(bench: Bench) -> None:
    n = 8192 if ON_GPU else 512
    a, b = torch.randn(n, n, device=DEVICE, dtype=DTYPE), torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    source = torch.empty(2**30 if ON_GPU else 2**22, dtype=torch.uint8, device=DEVICE)
    destination = torch.empty_like(source)
    bench.add(f"a product of {n} x {n} x {n}", {"plain": lambda: a @ b}, operations=2 * n**3)
    bench.rate = 2 * n**3 / (bench.rows[-1]["plain"] / 1000)
    bench.add(f"a copy of {source.numel() / 2**20:,.0f} MiB", {"plain": lambda: destination.copy_(source)})
    bench.bandwidth = 2 * source.numel() / (bench.rows[-1]["plain"] / 1000)
    bench.record["machine"] = dict(tflops=bench.rate / 1e12, gigabytes_per_second=bench.bandwidth / 1e9)
    print(f"rate {bench.rate / 1e12:,.1f} TFLOP/s, bandwidth {bench.bandwidth / 1e9:,.0f} GB/s")


def forward_and_backward(function: Callable[..., Any], inputs: list[torch.Tensor], *others: Any) -> Callable[[], Any]:
    """A function that calls `function` and works out the gradients of its tensor or list of tensors by `inputs`."""
    gradients: list[torch.Tensor] = []

    def run() -> None:
        outputs = function(*others)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        gradients.extend(torch.randn_like(out) for out in outputs[len(gradients) :])
        torch.autograd.grad(outputs, inputs, gradients)

    return run


def visible_pairs(mask_lists: train.BlockLists) -> int:
    """Pairs of a query and a key in the blocks that the mask lists."""
    return int(mask_lists.full_count.sum() + mask_lists.partial_count.sum()) * train.BLOCK_SIZE**2


def flex_inputs(bench: Bench, window: int) -> tuple[list[torch.Tensor], torch.Tensor, train.Mask, int]:
    """q, k, v, the gradient of the output, the mask of a window, and the pairs it lets through, of the first sequence."""
    T, heads = bench.hp.train_seq_len, bench.hp.num_heads
    q, k, v, grad = (torch.randn(1, T, heads, train.HEAD_DIM, device=DEVICE, dtype=DTYPE).transpose(1, 2) for _ in range(4))  # as in the model
    docs = train.document_ids(bench.inputs[0], bench.hp.vocab_size - 1)
    lists = train.clip_to_window(train.document_blocks(docs), torch.tensor(window, dtype=torch.int32, device=DEVICE))
    mask = (train.flex_mask if ON_GPU else train.dense_mask)(lists, docs)
    return [x.detach().requires_grad_() for x in (q, k, v)], grad, mask, visible_pairs(lists)


def measure_parts(bench: Bench) -> None:
    hp = bench.hp
    T, d, V, tables = hp.train_seq_len, hp.model_dim, hp.vocab_size, 1 + len(hp.value_embeddings)
    tokens, targets, size = bench.inputs[0], bench.targets[0], torch.finfo(DTYPE).bits // 8
    window = train.window_tensor(14, DEVICE)
    masks = compiled(train.attention_masks)
    bench.add("masks of a sequence", {"plain": lambda: masks(tokens, V - 1, window)})

    def embeddings(hp: train.Hyperparameters) -> Callable[[], Any]:
        model = make_model(hp)
        return forward_and_backward(compiled(model.embeddings), [model.embed.weight, *(t.weight for t in model.value_embeds)], tokens)

    bench.add(f"embedding and {tables - 1} tables", both(embeddings), moved=size * tables * d * (3 * T + V))

    for blocks in WINDOWS:
        (q, k, v), grad, mask, pairs = flex_inputs(bench, blocks)
        attend = compiled(train.attend)
        release_memory()
        operations = 4 * pairs * train.HEAD_DIM * hp.num_heads
        bench.add(f"attention, window {blocks}, forward", {"plain": lambda: attend(q, k, v, mask)}, operations)
        out = attend(q, k, v, mask)
        bench.add(f"attention, window {blocks}, backward", {"plain": lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)}, 2.5 * operations)

    x = torch.randn(T, d, device=DEVICE, dtype=DTYPE).requires_grad_()

    def mlp(hp: train.Hyperparameters) -> Callable[[], Any]:
        module = make_model(hp).blocks[0].mlp
        return forward_and_backward(compiled(module.forward), [x, module.fc_w, module.proj_w], x)

    bench.add("MLP", both(mlp), operations=6 * T * 8 * d**2, moved=size * T * d * 5)

    def head(hp: train.Hyperparameters) -> Callable[[], Any]:
        model = make_model(hp)
        return forward_and_backward(compiled(model.loss), [x, model.lm_head_w], x, targets)

    bench.add("head and loss", both(head), operations=6 * T * model_size(hp)["head"], moved=size * T * V * 3)

    row = bench.add("one sequence, forward and backward", both(bench.sequence_as_run), operations=sequence_operations(bench, 14))
    if ON_GPU:
        bench.record["mfu"] = mfu = {which: row["tflop"] / (row[which] / 1000) / PEAK_TFLOPS for which in ("plain", "fast") if which in row}
        print(f"MFU of {PEAK_TFLOPS} TFLOP/s: " + ", ".join(f"{which} {value:.1%}" for which, value in mfu.items()))


def model_size(hp: train.Hyperparameters) -> dict[str, int]:
    return train.parameter_counts(train.model_on_meta(hp))


def sequence_operations(bench: Bench, window: int) -> float:
    """Of forward and backward of the first sequence: 6 a weight and token, 12 a pair of a query and a key, head and dimension of the head."""
    hp, sizes = bench.hp, model_size(bench.hp)
    docs = train.document_ids(bench.inputs[0], hp.vocab_size - 1)
    lists = train.document_blocks(docs)
    long, short = (visible_pairs(train.clip_to_window(lists, torch.tensor(w, dtype=torch.int32, device=DEVICE))) for w in (window, window // 2))
    pairs = len(train.LONG_WINDOW_LAYERS) * long + (train.NUM_LAYERS - 1 - len(train.LONG_WINDOW_LAYERS)) * short
    return 6 * hp.train_seq_len * (sizes["hidden matrices"] + sizes["head"]) + 12 * pairs * train.HEAD_DIM * hp.num_heads


def measure_step(bench: Bench) -> None:
    trainers: list[train.Trainer] = []

    def make_trainer(hp: train.Hyperparameters) -> Callable[[], Any]:
        trainers.append(trainer := train.Trainer(hp, train.Ranks.from_environment()))
        trainer.raw_model.load_state_dict(make_model(hp).state_dict())
        return lambda: trainer.train_step(MIDDLE_STEP, bench.inputs, bench.targets)

    with tempfile.TemporaryDirectory() as folder:  # the trainer opens the validation shards
        write_shard(Path(folder) / "v.bin", made_tokens(10_000, bench.hp.vocab_size))
        steps = both(make_trainer, val_files=f"{folder}/v.bin")
    sequences = bench.hp.sequences_per_step
    bench.add(f"step of {sequences} sequences", steps, operations=sequences * sequence_operations(bench, 14), repeats=REPEATS_OF_LONG)
    adamw, muon = trainers[0].optimizers
    for p in trainers[0].raw_model.parameters():
        p.grad = torch.randn_like(p)
    moved = sum(p.numel() * p.element_size() for group in adamw.param_groups for p in group["params"])
    bench.add("AdamW", {"plain": adamw.step}, moved=7 * moved)  # weight, gradient and both moments read, all but the gradient written
    eighth = train.Muon([dict(group, params=group["params"][::8]) for group in muon.param_groups], lr=0.025, rank=0, world_size=1)
    eighth.update = muon.update
    for name, optimizer in (("Muon, an eighth", eighth), ("Muon, all", muon)):
        operations = sum(newton_schulz_operations(p) for group in optimizer.param_groups for p in group["params"])
        bench.add(name, {"plain": optimizer.step}, operations)


def newton_schulz_operations(p: torch.Tensor) -> float:
    rows, columns = sorted(p.shape[-2:])
    matrices = p.numel() // (rows * columns)
    return matrices * len(train.NEWTON_SCHULZ_COEFFICIENTS) * (4 * rows**2 * columns + 2 * rows**3)


def measure_start(bench: Bench) -> None:
    """Each way in processes of its own: with empty caches, then with what the first has left there."""
    bench.record["start"] = {}
    for which in ["plain"] + ([] if FAST is None else ["fast"]):
        with tempfile.TemporaryDirectory() as caches:
            folders = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
            for temperature in ("cold", "warm"):
                name = f"{which}, {temperature}"
                command = [sys.executable, __file__, "--one-start", which]
                try:
                    result = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True, timeout=max(0, bench.remaining_s()))
                except subprocess.TimeoutExpired:
                    bench.left_out.append(f"start, {name}")
                    continue
                if result.returncode:
                    raise RuntimeError(f"start, {name}: {result.stderr[-2000:]}")
                bench.record["start"][name] = figures = json.loads(result.stdout.splitlines()[-1])
                print(f"start, {name}: " + ", ".join(f"{figure} {value:,.1f}" for figure, value in figures.items()), flush=True)


def one_start(which: str) -> None:
    """Print what the start of a run takes: seconds of the first step and of the first validation, MiB at the peak of later ones."""
    hp = configuration(fast_paths=FAST if which == "fast" else [], warmup_steps=1)
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "v.bin", made_tokens(hp.val_seq_len + 1000, hp.vocab_size))
        trainer = train.Trainer(replace(hp, val_files=f"{folder}/v.bin", val_tokens=hp.val_seq_len), train.Ranks.from_environment())
        tokens = torch.from_numpy(made_tokens(hp.sequences_per_step * hp.train_seq_len + 1, hp.vocab_size).astype(np.int32))
        batch = train.to_inputs_and_targets(tokens, hp.train_seq_len, DEVICE)

        def seconds(function: Callable[[], Any]) -> float:
            began = time.perf_counter()
            function()
            if ON_GPU:
                torch.cuda.synchronize()
            return time.perf_counter() - began

        first_step = seconds(lambda: trainer.train_step(0, *batch))
        first_validation = seconds(lambda: trainer.validate(0))
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        second_step, second_validation = seconds(lambda: trainer.train_step(0, *batch)), seconds(lambda: trainer.validate(0))
    peak = {} if not ON_GPU else {"peak MiB": torch.cuda.max_memory_allocated() / 2**20}
    print(json.dumps({"compile s": first_step + first_validation - second_step - second_validation, "second step s": second_step} | peak))


def measure_tables(bench: Bench) -> None:
    """The step of a rank of 8 but for Muon and the ranks' sums: one sequence and AdamW. And the least-squares cost of a table and of
    a layer that uses one."""
    counts = [0, 3, 4, 5, 8, 15] if ON_GPU else [0, 3]

    def run_of(hp: train.Hyperparameters) -> Callable[[], Any]:
        return bench.sequence(hp, by_parts=True, with_adamw=True)

    rows = {}
    for count in counts:
        rows[count] = bench.add(f"sequence and AdamW, {count} tables", both(run_of, value_embeddings=TABLES[count]), repeats=REPEATS_OF_LONG)
    timed = [count for count in counts if rows[count]]
    if len(timed) < 3:
        return
    numbers = np.array([[1, count, sum(map(len, TABLES[count]))] for count in timed])
    for which in ("plain", "fast") if "fast" in rows[timed[0]] else ("plain",):
        _, a_table, a_use = np.linalg.lstsq(numbers, np.array([rows[count][which] for count in timed]), rcond=None)[0]
        bench.record.setdefault("table_ms", {})[which] = dict(table=float(a_table), use=float(a_use))
        print(f"{which}: a table costs {a_table:.2f} ms, each layer that uses one {a_use:.2f} ms")


def measure_profile(bench: Bench) -> None:
    activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    for which, run in both(bench.sequence_as_run).items():
        for _ in range(UNTIMED):
            run()
        with torch.profiler.profile(activities=[activity]) as profile:
            run()
        print(f"{which}:\n{profile.key_averages().table(sort_by=f'self_{DEVICE.type}_time_total', row_limit=30, max_name_column_width=90)}")


def try_options(bench: Bench, what: str, candidates: list[dict[str, Any]], plain: Callable[[], Any], with_options: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """A row for each candidate: plain, what there is; fast, with the candidate. One that does not work is named with its error."""
    for options in candidates:
        name = f"{what}: {json.dumps(options)}"
        try:
            bench.add(name, {"plain": plain, "fast": with_options(options)})
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")


def measure_options(bench: Bench) -> None:
    if not ON_GPU or FAST is None:
        return print("options: only on a GPU, with Triton")
    (q, k, v), grad, mask, _ = flex_inputs(bench, 14)

    def run_of(options: dict[str, Any] | None) -> Callable[[], Any]:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return train.flex_attention(q, k, v, block_mask=mask, scale=train.ATTENTION_SCALE, kernel_options=options)

        function = compiled(attend)
        return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), grad)

    try_options(bench, "attention", FLEX_OPTIONS, run_of(None), run_of)

    model = make_model(configuration(fast_paths=["mlp", "head"]))
    x = torch.randn(bench.hp.train_seq_len, bench.hp.model_dim, device=DEVICE, dtype=DTYPE).requires_grad_()
    mlp = model.blocks[0].mlp
    run_mlp = forward_and_backward(mlp.forward, [x, mlp.fc_w, mlp.proj_w], x)
    run_head = forward_and_backward(model.loss, [x, model.lm_head_w], x, bench.targets[0])

    def under(name: str, run: Callable[[], Any]) -> Callable[[dict[str, Any]], Callable[[], Any]]:
        """`run` with another value of a constant of the script."""

        def with_options(options: dict[str, Any]) -> Callable[[], Any]:
            def call() -> None:
                kept = getattr(train, name)
                setattr(train, name, options)
                try:
                    run()
                finally:
                    setattr(train, name, kept)

            return call

        return with_options

    try_options(bench, "MLP", MLP_TILES, run_mlp, under("RELU_SQUARED_TILE", run_mlp))
    try_options(bench, "head and loss", HEAD_TILES, run_head, under("HEAD_TILE", run_head))


MEASURES = {
    "machine": measure_machine, "parts": measure_parts, "step": measure_step, "tables": measure_tables, "start": measure_start,
    "profile": measure_profile, "options": measure_options,
}


def describe_machine() -> dict[str, Any]:
    kernels = "no Triton" if FAST is None else "Triton interpreted"
    device = torch.cuda.get_device_name(0) if ON_GPU else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {kernels}"
    return dict(device=device, date=time.strftime("%Y-%m-%d"), python=platform.python_version(), torch=torch.__version__,
                triton=getattr(train.triton, "__version__", None))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", metavar="PART", nargs="*", help=f"of {', '.join(MEASURES)}; default: all but the last two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--one-start", choices=("plain", "fast"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in MEASURES]:
        parser.error(f"there is no part {unknown[0]}; there are {', '.join(MEASURES)}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}; make it first")
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    torch._dynamo.config.recompile_limit = 64  # the models of one process differ in their tables
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    if arguments.one_start:
        one_start(arguments.one_start)
        dist.destroy_process_group()
        return 0
    bench = Bench()
    bench.record = describe_machine() | dict(tokens=bench.tokens_from, configuration=asdict(bench.hp), rows=bench.rows, left_out=bench.left_out, failed=[])
    print(", ".join(str(value) for value in describe_machine().values()) + f"; tokens: {bench.tokens_from}; ms: plain, fast, ratio, floor")
    for part in arguments.parts or list(MEASURES)[:-2]:
        try:
            MEASURES[part](bench)
        except Exception:
            bench.record["failed"].append(part)
            traceback.print_exc()
        release_memory()
        bench.record["seconds"] = time.monotonic() - bench.began
        if arguments.json:
            arguments.json.write_text(json.dumps(bench.record, indent=1) + "\n")
    print("\n| part | plain ms | fast ms | ratio | floor ms |\n|---|---|---|---|---|")
    print("\n".join(format_row(row) for row in bench.rows))
    for what, names in (("not measured, for lack of time", bench.left_out), ("failed, as printed above", bench.record["failed"])):
        if names:
            print(f"{what}: {', '.join(names)}")
    dist.destroy_process_group()
    return 1 if bench.record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
