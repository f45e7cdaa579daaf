"""What a step costs, part by part, plain and with the candidates: python tests/benchmark.py [--json FILE] [PART ...]

It times the full-size model in bf16, compiled, on one GPU. "Plain" is the model as it is, "candidates" the same with
all of tests/candidates.py; both are called in turn, and the table has their medians. Without a GPU it runs a tiny size
with Triton's kernels interpreted: that shows that the benchmark works and nothing else. It needs Triton.

Parts, in the order named; without a name all but the last two:
    machine     the rates of a large product and of a copy, from which the floors follow
    parts       masks, tables, attention, MLP, head and loss: one sequence forward and backward
    step        one sequence, a step of 8 sequences, a validation sequence, AdamW, Muon (a rank's of 8, and all)
    tables      one sequence and AdamW with 0, 3, 6 and 8 tables: the cost of a table
    start       the program itself for two steps, with empty caches and again with what the first run left there
    profile     the kernels of one sequence that take longest
    options     FlexAttention's kernel options, and other tiles for the candidates

Windows are those of the middle of a run, unless a row says otherwise. A floor is the larger of operations over the
machine's rate and bytes over its bandwidth, counting what the function must read and write. Tokens are made up: Zipfian
ids, documents of 700 tokens on average. After TIME_LIMIT_S no row is begun; the last lines name what was left out. A
part that fails does not stop the others; the exit status is then 1.
"""

import argparse
import faulthandler
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import candidates  # noqa: E402

import train_gpt_medium as train  # noqa: E402
from configs.keys import load  # noqa: E402
from data.batches import train_batches, val_sequences  # noqa: E402
from data.shards import open_shards, write_shard  # noqa: E402
from logs import machine, ranks  # noqa: E402

DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
REPEATS, UNTIMED = (9, 2) if ON_GPU else (1, 0)  # calls of a function
TIME_LIMIT_S = 450
MIDDLE_WINDOW = 14  # blocks
MIDDLE_STEP = next(step for step in range(5960) if train.window_blocks(step, 5960) == MIDDLE_WINDOW)
TABLE_CONFIGS = ("none", "baseline", "untied_6", "add_5") if ON_GPU else ("none", "baseline")
TINY = dict(vocab_size=256, num_heads=1, model_dim=128, train_seq_len=128, val_seq_len=128, sequences_per_step=1)

FLEX_OPTIONS = [
    dict(ROWS_GUARANTEED_SAFE=True),
    dict(fwd_BLOCK_M=128, fwd_BLOCK_N=128, fwd_num_warps=8, fwd_num_stages=2),
    dict(bwd_BLOCK_M1=64, bwd_BLOCK_N1=128, bwd_BLOCK_M2=128, bwd_BLOCK_N2=64, bwd_num_warps=8, bwd_num_stages=2),
    dict(bwd_BLOCK_M1=64, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=64, bwd_num_warps=4, bwd_num_stages=3),
]
MLP_TILES = [
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=4),
    dict(BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=4),
]
HEAD_TILES = [dict(TILE=4096, num_warps=8), dict(TILE=8192, num_warps=32), dict(TILE=65536, num_warps=32)]

Timed = Callable[[], Any]


def make_tokens(count: int, vocab_size: int) -> np.ndarray:
    """(count,) Zipfian token ids in documents of log-normal lengths."""
    rng = np.random.default_rng(0)
    weight = 1 / (np.arange(vocab_size - 1) + 2.7)
    tokens = rng.choice(vocab_size - 1, size=count, p=weight / weight.sum())
    starts = np.cumsum(rng.lognormal(np.log(700) - 0.5, 1.0, size=count // 100 + 2).astype(int) + 1)
    tokens[np.concatenate([[0], starts[starts < count]])] = vocab_size - 1
    return tokens


def configuration(folder: Path) -> train.Hyperparameters:
    """The full size on a GPU, a tiny one on a CPU; with shards in `folder` for two steps and a validation sequence."""
    hp = train.Hyperparameters(**{} if ON_GPU else TINY)
    hp = replace(hp, seed=0, val_tokens=hp.val_seq_len, warmup_steps=1, log_dir=f"{folder}/logs",
                 coordinate_descent_tuning=False, train_files=f"{folder}/train.bin", val_files=f"{folder}/val.bin")
    write_shard(hp.train_files, make_tokens(2 * hp.sequences_per_step * hp.train_seq_len + 2, hp.vocab_size))
    write_shard(hp.val_files, make_tokens(hp.val_tokens + 2, hp.vocab_size))
    return hp


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False) if ON_GPU else function


def time_once(function: Timed) -> float:
    """Milliseconds of one call, by CUDA events on a GPU."""
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


def format_row(row: dict[str, Any]) -> str:
    plain, candidate, floor = row["plain"], row.get("candidates"), row["floor"]
    ratio = f"{candidate / plain:.2f}" if candidate and plain else ""
    cells = [f"{ms:,.2f}" if ms else "" for ms in (plain, candidate)] + [ratio, f"{floor:,.2f}" if floor else ""]
    return f"| {row['part']} | {' | '.join(cells)} |"


class Bench:
    """The rows of the table, in ms, and what they are measured on."""

    def __init__(self, folder: Path):
        self.start = time.monotonic()
        device = torch.cuda.get_device_name(0) if ON_GPU else "CPU, Triton interpreted"
        self.machine = f"{device}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
        self.folder, self.hp = folder, configuration(folder)
        self.inputs, self.targets = next(train_batches(open_shards(self.hp.train_files), self.hp, 0, 1, DEVICE))
        self.window = train.window_tensor(MIDDLE_WINDOW, DEVICE)
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self.figures: dict[str, Any] = {}  # what is no row
        self.rate, self.bandwidth = 0.0, 0.0  # operations and bytes a second; 0: not measured

    def remaining_s(self) -> float:
        return TIME_LIMIT_S - (time.monotonic() - self.start)

    def add(self, part: str, functions: dict[str, Timed], operations: float = 0, moved: float = 0) -> dict[str, Any]:
        """Time "plain" and, if it is there, "candidates" in turn; the row, or {} if no time is left."""
        if self.remaining_s() < 0:
            self.left_out.append(part)
            return {}
        for function in functions.values():
            for _ in range(UNTIMED):
                function()
        times = [{which: time_once(function) for which, function in functions.items()} for _ in range(REPEATS)]
        row = dict(part=part, **{which: statistics.median(t[which] for t in times) for which in functions})
        seconds = max(operations / self.rate, moved / self.bandwidth) if self.bandwidth else 0
        self.rows.append(row | dict(floor=1000 * seconds, tflop=operations / 1e12))
        print(format_row(self.rows[-1]), flush=True)
        return self.rows[-1]

    def note(self, name: str, value: dict[str, Any]) -> None:
        self.figures[name] = value
        print(f"{name}: " + ", ".join(f"{key} {number:,.2f}" for key, number in value.items()), flush=True)

    def write(self, path: Path) -> None:
        kept = {name: getattr(self, name) for name in ("machine", "rows", "figures", "left_out", "failed")}
        path.write_text(json.dumps(kept | dict(configuration=asdict(self.hp)), indent=1))


def both(make: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What `make(*arguments, names)` makes with no candidates and with all of them."""
    gc.collect()  # compiled models and optimizers of before are in reference cycles
    if ON_GPU:
        torch.cuda.empty_cache()
    return {"plain": make(*arguments, ()), "candidates": make(*arguments, candidates.CANDIDATES)}


def prepare(model: train.GPT, names: tuple[str, ...]) -> None:
    """Apply candidates, and fill what starts at zero: products of zeros take less power, and so less time."""
    for name, p in model.named_parameters():
        if name.endswith(("qkvo_w", "proj_w", "lm_head_w")):
            train.init_(p)
    candidates.apply(model, names)
    if ON_GPU:
        model.compile_parts()


def make_model(hp: train.Hyperparameters, names: tuple[str, ...]) -> train.GPT:
    with DEVICE:
        model = train.GPT(hp)
    if ON_GPU:
        model.use_bf16()
    prepare(model, names)
    return model


def forward_and_backward(function: Callable[..., Any], inputs: list[Tensor], *arguments: Any) -> Timed:
    """A function that calls `function(*arguments)` and computes the gradients by `inputs`, from random ones."""
    outputs = function(*arguments)  # a tensor or a list of them
    gradients = [torch.randn_like(out) for out in (outputs if isinstance(outputs, list) else [outputs])]
    return lambda: torch.autograd.grad(function(*arguments), inputs, gradients)


# -----------------------------------------------------------------------------
# Operations


def seen_blocks(bench: Bench, window: int) -> tuple[train.SeenBlocks, Tensor]:
    """The mask's blocks for the first sequence under a window, and the sequence's documents."""
    docs = train.document_ids(bench.inputs[0], bench.hp.vocab_size - 1)
    limit = torch.tensor(window, dtype=torch.int32, device=DEVICE)
    return train.clip_to_window(train.document_blocks(docs), limit), docs


def attention_operations(bench: Bench, window: int) -> float:
    """Of one layer's forward: 4 a pair of a query and a key, head, and dimension of the head."""
    blocks, _ = seen_blocks(bench, window)
    pairs = int(blocks.partial.sum() + blocks.full.sum()) * train.BLOCK_SIZE**2
    return 4 * pairs * train.HEAD_DIM * bench.hp.num_heads


def sequence_operations(bench: Bench) -> float:
    """Of forward and backward of the first sequence: 6 a weight and token, and three times the attention's forward."""
    model = train.model_on_meta(bench.hp)
    weights = model.lm_head_w.numel() + sum(p.numel() for p in model.blocks.parameters())
    long, short = (attention_operations(bench, window) for window in (MIDDLE_WINDOW, MIDDLE_WINDOW // 2))
    num_long = len(train.LONG_WINDOW_LAYERS)
    attention = num_long * long + (train.NUM_LAYERS - 1 - num_long) * short
    return 6 * bench.hp.train_seq_len * weights + 3 * attention


def newton_schulz_operations(p: Tensor) -> float:
    rows, columns = sorted(p.shape[-2:])
    matrices = p.numel() // (rows * columns)
    return matrices * len(train.NEWTON_SCHULZ_COEFFICIENTS) * (4 * rows**2 * columns + 2 * rows**3)


# -----------------------------------------------------------------------------
# Parts


def measure_machine(bench: Bench) -> None:
    n = 8192 if ON_GPU else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    source = torch.empty(2**30 if ON_GPU else 2**22, dtype=torch.uint8, device=DEVICE)
    destination = torch.empty_like(source)
    product = bench.add(f"a product of {n} x {n} x {n}", {"plain": lambda: a @ b}, operations=2 * n**3)
    copy = bench.add(f"a copy of {source.numel() / 2**20:,.0f} MiB", {"plain": lambda: destination.copy_(source)})
    bench.rate = 2 * n**3 / (product["plain"] / 1000)
    bench.bandwidth = 2 * source.numel() / (copy["plain"] / 1000)
    bench.note("rates", {"TFLOP/s": bench.rate / 1e12, "GB/s": bench.bandwidth / 1e9})


def flex_inputs(bench: Bench, window: int) -> tuple[list[Tensor], train.Mask]:
    """q, k and v, strided as in the model, and the mask of the first sequence."""
    shape = (1, bench.hp.train_seq_len, bench.hp.num_heads, train.HEAD_DIM)
    qkv = [torch.randn(shape, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_() for _ in range(3)]
    return qkv, (train.flex_mask if ON_GPU else train.dense_mask)(*seen_blocks(bench, window))


def activations(bench: Bench) -> Tensor:
    shape = (bench.hp.train_seq_len, bench.hp.model_dim)
    return torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_()


def run_mlp(bench: Bench, names: tuple[str, ...]) -> Timed:
    mlp, x = make_model(bench.hp, names).blocks[0].mlp, activations(bench)
    return forward_and_backward(compiled(mlp.forward), [x, mlp.fc_w, mlp.proj_w], x)


def run_head(bench: Bench, names: tuple[str, ...]) -> Timed:
    model, x = make_model(bench.hp, names), activations(bench)
    return forward_and_backward(model.loss, [x, model.lm_head_w], x, bench.targets[0])


def run_tables(bench: Bench, names: tuple[str, ...]) -> Timed:
    model = make_model(bench.hp, names)
    tables = [model.embed, *model.value_embeds]
    weights = [table.weight for table in tables]
    return forward_and_backward(lambda tokens: [table(tokens) for table in tables], weights, bench.inputs[0])


def measure_parts(bench: Bench) -> None:
    hp, size = bench.hp, torch.finfo(DTYPE).bits // 8
    T, d, V, tables = hp.train_seq_len, hp.model_dim, hp.vocab_size, 1 + len(hp.value_embeddings)
    masks = compiled(train.attention_masks)
    bench.add("masks of a sequence", {"plain": lambda: masks(bench.inputs[0], V - 1, bench.window)})
    bench.add(f"embedding and {tables - 1} tables", both(run_tables, bench),
              moved=size * tables * d * (3 * T + V))
    for window in (3, 14, 27) if ON_GPU else (2,):
        qkv, mask = flex_inputs(bench, window)
        attend, operations = compiled(train.attend), attention_operations(bench, window)
        bench.add(f"attention, window {window}, forward", {"plain": lambda: attend(*qkv, mask)}, operations)
        run = forward_and_backward(attend, qkv, *qkv, mask)
        bench.add(f"attention, window {window}, forward and backward", {"plain": run}, 3.5 * operations)
    bench.add("MLP", both(run_mlp, bench), operations=6 * T * 8 * d**2, moved=size * T * d * 5)
    padded = train.model_on_meta(hp).lm_head_w.numel()
    bench.add("head and loss", both(run_head, bench), operations=6 * T * padded, moved=size * T * V * 3)


def make_trainer(hp: train.Hyperparameters, names: tuple[str, ...]) -> train.Trainer:
    trainer = train.Trainer(hp, DEVICE)
    prepare(trainer.model, names)
    return trainer


def run_sequence(bench: Bench, model: nn.Module) -> None:
    model(bench.inputs[0], bench.targets[0], bench.window).backward()
    model.zero_grad()


def measure_step(bench: Bench) -> None:
    trainers = both(make_trainer, bench.hp)

    def each(call: Callable[[train.Trainer], Any]) -> dict[str, Timed]:
        return {which: partial(call, trainer) for which, trainer in trainers.items()}

    operations, sequences = sequence_operations(bench), bench.hp.sequences_per_step
    bench.add("one sequence", each(lambda trainer: run_sequence(bench, trainer.model)), operations)
    step = each(lambda trainer: trainer.train_step(MIDDLE_STEP, bench.inputs, bench.targets))
    bench.add(f"step of {sequences} sequences", step, sequences * operations)
    _, inputs, targets = next(val_sequences(trainers["plain"].val_shards, bench.hp, 0, 1, DEVICE))
    with torch.no_grad():
        validate = each(lambda trainer: trainer.model(inputs, targets, bench.window))
        bench.add("a validation sequence", validate)
    measure_optimizers(bench, trainers["plain"])


def measure_optimizers(bench: Bench, trainer: train.Trainer) -> None:
    adamw, muon = trainer.optimizers
    for p in trainer.model.parameters():
        p.grad = torch.randn_like(p)
    moved = sum(p.numel() * p.element_size() for group in adamw.param_groups for p in group["params"])
    bench.add("AdamW", {"plain": adamw.step}, moved=7 * moved)  # 4 tensors read, 3 written
    eighth = train.Muon([group | dict(params=group["params"][::8]) for group in muon.param_groups], 0.025, 0, 1)
    eighth.update = muon.update
    for part, optimizer in (("Muon, as one of 8 ranks", eighth), ("Muon, all", muon)):
        bench.add(part, {"plain": optimizer.step}, sum(newton_schulz_operations(p) for p in optimizer.owned))


def run_sequence_and_adamw(bench: Bench, tables: list[list[int]], names: tuple[str, ...]) -> Timed:
    hp = replace(bench.hp, value_embeddings=tables)
    model = make_model(hp, names)
    adamw, _ = train.make_optimizers(model, hp, rank=0, world_size=1)

    def run() -> None:
        model(bench.inputs[0], bench.targets[0], bench.window).backward()
        adamw.step()
        model.zero_grad()

    return run


def measure_tables(bench: Bench) -> None:
    """And the cost of a table and of a layer that uses one, by least squares."""
    design, times = [], []
    for name in TABLE_CONFIGS:
        tables = load(train.Hyperparameters, ROOT / f"configs/{name}.toml", {}).value_embeddings
        runs = both(run_sequence_and_adamw, bench, tables)
        row = bench.add(f"sequence and AdamW, {len(tables)} tables", runs)
        if row:
            design.append([1, len(tables), sum(map(len, tables))])
            times.append([row["plain"], row["candidates"]])
    if len(design) > 2:
        _, a_table, a_use = np.linalg.lstsq(np.array(design), np.array(times), rcond=None)[0]
        for k, which in enumerate(("plain", "candidates")):
            bench.note(f"ms by tables, {which}", {"a table": float(a_table[k]), "a layer's use": float(a_use[k])})


def measure_start(bench: Bench) -> None:
    config = bench.folder / "start.toml"
    keys = {name: value for name, value in asdict(bench.hp).items() if value not in (None, "")}
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items()))
    caches = dict(TORCHINDUCTOR_CACHE_DIR=f"{bench.folder}/inductor", TRITON_CACHE_DIR=f"{bench.folder}/triton")
    command = [sys.executable, ROOT / "train_gpt_medium.py", config, "--num_iterations=2"]
    for temperature in ("cold", "warm"):
        start = time.monotonic()
        try:
            result = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True,
                                    timeout=max(0, bench.remaining_s()))
        except subprocess.TimeoutExpired:
            bench.left_out.append(f"start, {temperature}")
            continue
        if result.returncode:
            raise RuntimeError(result.stderr[-2000:])
        peak = re.search(r"peak memory \w+: (\d+) MiB", result.stdout)
        bench.note(f"start, {temperature}", {"s": time.monotonic() - start, "peak MiB": int(peak[1])})


def measure_profile(bench: Bench) -> None:
    activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    for which, model in both(make_model, bench.hp).items():
        run = partial(run_sequence, bench, model)
        for _ in range(UNTIMED):
            run()
        with torch.profiler.profile(activities=[activity]) as profile:
            run()
        longest = f"self_{DEVICE.type}_time_total"
        print(f"{which}:\n{profile.key_averages().table(sort_by=longest, row_limit=30, max_name_column_width=90)}")


def try_options(bench: Bench, part: str, choices: list[dict[str, Any]], make: Callable[[dict[str, Any]], Timed],
                plain: Timed) -> None:
    """A row for each choice; one that does not work is named with its error."""
    for options in choices:
        name = f"{part}: {json.dumps(options)}"
        try:
            bench.add(name, {"plain": plain, "candidates": make(options)})
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")


def measure_options(bench: Bench) -> None:
    """Rows of the choices in the column of the candidates, what is used today in that of plain."""
    if not ON_GPU:
        return print("options: only on a GPU")
    qkv, mask = flex_inputs(bench, MIDDLE_WINDOW)

    def attend(options: dict[str, Any] | None) -> Timed:
        keys = dict(block_mask=mask, scale=train.ATTENTION_SCALE, kernel_options=options)
        return forward_and_backward(compiled(partial(train.flex_attention, **keys)), qkv, *qkv)

    def under(name: str, run: Timed, options: dict[str, Any]) -> Timed:
        def call() -> None:
            with patch.object(candidates, name, options):
                run()

        return call

    try_options(bench, "attention", FLEX_OPTIONS, attend, attend(None))
    for part, run, name, tiles in (("MLP", run_mlp(bench, ("mlp",)), "RELU_SQUARED_TILE", MLP_TILES),
                                   ("head and loss", run_head(bench, ("head",)), "HEAD_TILE", HEAD_TILES)):
        try_options(bench, part, tiles, partial(under, name, run), run)


MEASURES = dict(machine=measure_machine, parts=measure_parts, step=measure_step, tables=measure_tables,
                start=measure_start, profile=measure_profile, options=measure_options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", metavar="PART", nargs="*", help=", ".join(MEASURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, again after each part")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in MEASURES]:
        parser.error(f"there is no part {unknown[0]}; there are {', '.join(MEASURES)}")
    machine.find_device()
    ranks.start_process_group()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print(f"{bench.machine}\n| part | plain ms | candidates ms | ratio | floor ms |")
        for part in arguments.parts or list(MEASURES)[:-2]:
            faulthandler.cancel_dump_traceback_later()  # the timer of start_process_group or of a step: no step follows
            try:
                MEASURES[part](bench)
            except Exception:
                bench.failed.append(part)
                traceback.print_exc()
            if arguments.json:
                bench.write(arguments.json)
    for what, names in (("not measured, for lack of time", bench.left_out), ("failed, as printed above", bench.failed)):
        if names:
            print(f"{what}: {', '.join(names)}")
    dist.destroy_process_group()
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
