"""Provide candidates, faster ways to compute parts of the model: `apply(model, ["tables", "mlp", "head"])`.

    tables  sort the tokens, sum each token's gradient rows of an embedding table and write each sum once
    mlp     compute squared ReLU and its derivative within the products before them, without passes over (T, 4d)
    head    compute the gradients of the loss together with the loss, half of the sequence at a time

`apply` replaces methods of one instance, before `compile_parts`. A candidate that pays in tests/benchmark.py on a GPU
moves into the model; the others are deleted. Each Triton kernel (https://triton-lang.org) is behind a custom operator,
which torch.compile leaves alone. Bytes and times are for T = 65,536, d = 1024 and bf16.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

import train_gpt_medium as train

# -----------------------------------------------------------------------------
# The gradient of an embedding table

ROW_SUMS_PROGRAMS, ROW_SUMS_TILE = 512, dict(ROWS=32, COLUMNS=128)


@lru_cache(maxsize=1)  # a model looks up the same tokens in every table
def find_occurrences(tokens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return order (T,) and starts (V + 1,), int64, without waiting for the GPU.

    Token v of `tokens` (T,) occurs at the positions order[starts[v] : starts[v + 1]].
    """
    ids, order = tokens.sort(stable=True)
    return order, torch.searchsorted(ids, torch.arange(vocab_size + 1, dtype=ids.dtype, device=ids.device))


@triton.jit
def row_sums_kernel(rows, order, starts, sums, V, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write each token's sum of `rows` (T, WIDTH) to `sums` (V, WIDTH); ROWS at a time, as some have thousands."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(0).to(tl.int64)
    while token < V:
        start, stop = tl.load(starts + token), tl.load(starts + token + 1)
        total = tl.zeros((COLUMNS,), tl.float32)
        while start < stop:
            place = start + tl.arange(0, ROWS)
            source = tl.load(order + place, mask=place < stop, other=0)
            part = tl.load(rows + source[:, None] * WIDTH + columns[None, :], mask=(place < stop)[:, None], other=0.0)
            total += tl.sum(part.to(tl.float32), axis=0)
            start += ROWS
        tl.store(sums + token * WIDTH + columns, total.to(sums.dtype.element_ty))
        token += tl.num_programs(0)


@torch.library.custom_op("candidates::table_gradient", mutates_args=())
def table_gradient(grad: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Return the gradient (V, d) of a table from that of its rows (T, d) and `find_occurrences`.

    It sums in fp32, always in the same order, and rounds once. It reads grad (134 MB) and writes the table (103 MB):
    at least 0.08 ms at an H100's 3.35 TB/s.
    """
    sums = grad.new_empty(len(starts) - 1, grad.size(1))
    programs = (ROW_SUMS_PROGRAMS, grad.size(1) // ROW_SUMS_TILE["COLUMNS"])
    row_sums_kernel[programs](grad.contiguous(), order, starts, sums, *sums.shape, **ROW_SUMS_TILE)
    return sums


table_gradient.register_fake(lambda grad, order, starts: grad.new_empty(len(starts) - 1, grad.size(1)))


class Lookup(torch.autograd.Function):
    """Look up tokens (T,) in a table (V, d) as F.embedding does, with `table_gradient` as its backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(*find_occurrences(tokens, len(weight)))
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return table_gradient(grad, *ctx.saved_tensors), None


def table_forward(table: nn.Embedding, tokens: Tensor, x0: Tensor | None = None) -> Tensor:
    """Replace nn.Embedding.forward."""
    return Lookup.apply(table.weight, tokens) if torch.is_grad_enabled() else F.embedding(tokens, table.weight)


# -----------------------------------------------------------------------------
# The MLP

RELU_SQUARED_TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)


@triton.jit
def relu_squared_kernel(a, b, squares, out, N: tl.constexpr, K: tl.constexpr, B_K_STRIDE: tl.constexpr,
                        B_N_STRIDE: tl.constexpr, BACKWARD: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write a tile of `out` (M, N): relu(a @ b)**2 or, if BACKWARD, (a @ b) * 2 * sqrt(squares); a (M, K), b (K, N).

    2 * sqrt(relu(h)**2) is the derivative of relu(h)**2, so no kernel writes h itself.
    """
    tile = tl.program_id(0)  # the tiles of the same rows follow each other, to read `a` once; `b` stays in the L2 cache
    row = (tile // (N // BLOCK_N)).to(tl.int64) * BLOCK_M  # M * N may be more than 2**31
    m = tl.arange(0, BLOCK_M)
    n = tile % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a += row * K + m[:, None] * K + k[None, :]
    b += k[:, None] * B_K_STRIDE + n[None, :] * B_N_STRIDE
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        h = tl.dot(tl.load(a), tl.load(b), h)
        a += BLOCK_K
        b += BLOCK_K * B_K_STRIDE
    place = row * N + m[:, None] * N + n[None, :]
    if BACKWARD:
        h *= 2 * tl.sqrt(tl.load(squares + place).to(tl.float32))
    else:
        h = tl.maximum(h, 0.0)
        h *= h
    tl.store(out + place, h.to(out.dtype.element_ty))


@torch.library.custom_op("candidates::relu_squared", mutates_args=())
def relu_squared(a: Tensor, b: Tensor, squares: Tensor | None = None) -> Tensor:
    """Return relu(a @ b)**2, (M, N), or, given that as `squares`, (a @ b) times its derivative."""
    (M, K), N, tile = a.shape, b.size(1), RELU_SQUARED_TILE
    assert M % tile["BLOCK_M"] == N % tile["BLOCK_N"] == K % tile["BLOCK_K"] == 0, "a whole number of tiles"
    out = a.new_empty(M, N)
    relu_squared_kernel[(M // tile["BLOCK_M"] * (N // tile["BLOCK_N"]),)](
        a.contiguous(), b, out if squares is None else squares, out, N=N, K=K, B_K_STRIDE=b.stride(0),
        B_N_STRIDE=b.stride(1), BACKWARD=squares is not None, **tile)
    return out


relu_squared.register_fake(lambda a, b, squares=None: a.new_empty(len(a), b.size(1)))


class FusedMLP(torch.autograd.Function):
    """Compute relu(x @ fc_w.T)**2 @ proj_w.T, (T, d), and keep the squares (T, 4d) for the backward.

    A pass for squared ReLU and one for its derivative would read or write (T, 4d) up to five times more: 2.7 GB a
    layer. Idea: the speedrun's fused MLP (https://github.com/KellerJordan/modded-nanogpt).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fc_w: Tensor, proj_w: Tensor) -> Tensor:
        squares = relu_squared(x, fc_w.T)
        ctx.save_for_backward(x, squares, fc_w, proj_w)
        return F.linear(squares, proj_w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, squares, fc_w, proj_w = ctx.saved_tensors
        grad_h = relu_squared(grad, proj_w, squares)
        return grad_h @ fc_w, grad_h.T @ x, grad.T @ squares


def mlp_forward(module: train.MLP, x: Tensor) -> Tensor:
    """Replace MLP.forward."""
    return FusedMLP.apply(x, module.fc_w, module.proj_w)


# -----------------------------------------------------------------------------
# Head and loss

HEAD_CHUNK_TOKENS = 32 * 1024  # logits of 3.3 GB at once
HEAD_TILE = dict(TILE=4096, num_warps=32)  # two rows a multiprocessor, 0.1 MB each: all in work fit the L2 cache


@triton.jit
def capped_cross_entropy_kernel(z, targets, losses, gradient_scale, LOGITS: tl.constexpr, CAP: tl.constexpr,
                                WITH_GRADIENTS: tl.constexpr, TILE: tl.constexpr):
    """Write the cross-entropy of a row of `z` (T, LOGITS), capped, to `losses` (T,).

    WITH_GRADIENTS then replaces the row by `gradient_scale` times its gradient. Capped logits are at most 15, so fp32
    holds the sum of their exponentials. All threads read the target before the sum, so before any thread writes.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * LOGITS
    target = tl.load(targets + row)
    target_z = tl.load(z + target).to(tl.float32)
    column = tl.arange(0, TILE)
    exponentials = tl.zeros((TILE,), tl.float32)
    for start in range(0, LOGITS, TILE):
        x = tl.load(z + start + column, mask=start + column < LOGITS, other=0.0).to(tl.float32)
        exponentials += tl.where(start + column < LOGITS, tl.exp(CAP * x * tl.rsqrt(x * x + CAP * CAP)), 0.0)
    log_sum = tl.log(tl.sum(exponentials, axis=0))
    tl.store(losses + row, log_sum - CAP * target_z * tl.rsqrt(target_z * target_z + CAP * CAP))
    if WITH_GRADIENTS:
        for start in range(0, LOGITS, TILE):
            is_logit = start + column < LOGITS
            x = tl.load(z + start + column, mask=is_logit, other=0.0).to(tl.float32)
            r = CAP * tl.rsqrt(x * x + CAP * CAP)  # the capped logit is r x, its derivative r**3
            gradient = (tl.exp(r * x - log_sum) - tl.where(start + column == target, 1.0, 0.0)) * r * r * r
            tl.store(z + start + column, (gradient_scale * gradient).to(z.dtype.element_ty), mask=is_logit)


@torch.library.custom_op("candidates::head", mutates_args=())
def head(x: Tensor, w: Tensor, targets: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean cross-entropy, () fp32, of targets (T,) under the capped logits x (T, d) @ w (V, d).T.

    Also return its gradients by x and w, empty unless asked for. A product writes the logits of a sequence (6.6 GB)
    once, the kernel reads and replaces them once, and two products read them; they never exist in fp32. w's gradient
    is summed in w's dtype. Idea: the fused linear cross-entropy of Liger Kernel (https://arxiv.org/abs/2410.10989).
    """
    w_low = w.to(x.dtype)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    grad_x, grad_w = (t.new_zeros(t.shape if with_gradients else 0) for t in (x, w))
    for start in range(0, len(x), HEAD_CHUNK_TOKENS):
        chunk = slice(start, start + HEAD_CHUNK_TOKENS)
        z = x[chunk] @ w_low.T
        capped_cross_entropy_kernel[(len(z),)](z, targets[chunk], losses[chunk], 1 / len(x), LOGITS=len(w),
                                               CAP=train.LOGIT_CAP, WITH_GRADIENTS=with_gradients, **HEAD_TILE)
        if with_gradients:
            torch.mm(z, w_low, out=grad_x[chunk])
            grad_w += z.T @ x[chunk]
    return losses.mean(), grad_x, grad_w


head.register_fake(lambda x, w, targets, with_gradients: (
    x.new_empty((), dtype=torch.float32), *(t.new_empty(t.shape if with_gradients else 0) for t in (x, w))))


class FusedLoss(torch.autograd.Function):
    """Compute `head`'s loss, whose gradients the forward has computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        loss, *grads = head(x, w, targets, with_gradients)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        grad_x = (grad * grad_x.float()).to(grad_x.dtype)  # a bf16 product would round grad first
        return grad_x, grad * grad_w, None, None


def model_loss(model: train.GPT, x: Tensor, targets: Tensor) -> Tensor:
    """Replace GPT.loss."""
    return FusedLoss.apply(x, model.lm_head_w, targets, torch.is_grad_enabled())


# -----------------------------------------------------------------------------
# The harness of the tests and the benchmark

CANDIDATES = ("tables", "mlp", "head")


def apply(model: train.GPT, names: Sequence[str]) -> None:
    """Replace methods of a model with those of the named candidates."""
    assert set(names) <= set(CANDIDATES), names
    token_tables = [source for source in model.value_embeds if isinstance(source, train.TokenTable)]
    for table in (model.embed, *token_tables) if "tables" in names else ():
        table.forward = MethodType(table_forward, table)
    for block in model.blocks if "mlp" in names else ():
        block.mlp.forward = MethodType(mlp_forward, block.mlp)
    if "head" in names:
        model.loss = MethodType(model_loss, model)


def fill_zeros(model: train.GPT) -> None:
    """Fill matrices of zeros, whose products would hide errors and take less power, and so less time."""
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            train.init_(p)


def forward_and_backward(function: Callable, arguments: list, inputs: list[Tensor], grads: list) -> list[Tensor]:
    """Return a function's outputs, then their gradients by `inputs`, where the outputs' own gradients are `grads`."""
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def part_of(model: train.GPT, name: str, tokens: Tensor, compiled: bool) -> Callable[[], list[Tensor]]:
    """Return a call of `forward_and_backward` for the part that a candidate replaces.

    Its activations (T, d) are random; `tokens` (T,) are also the targets.
    """
    weights, mlp = [table.weight for table in (model.embed, *model.value_embeds)], model.blocks[0].mlp
    x, grad = (torch.randn(len(tokens), weights[0].size(1), device=tokens.device).bfloat16().to(weights[0].dtype)
               for _ in range(2))
    x.requires_grad_()
    if name == "tables":  # the model does not compile the look-ups either
        def look_up():
            return [model.embed(tokens), *(table(tokens, None) for table in model.value_embeds)]
        return partial(forward_and_backward, look_up, [], weights, [grad] * len(weights))
    function, arguments, inputs, grads = {
        "mlp": (mlp.forward, [x], [x, mlp.fc_w, mlp.proj_w], [grad]),
        "head": (model.loss, [x, tokens.long()], [x, model.lm_head_w], [torch.tensor(0.3, device=x.device)])}[name]
    return partial(forward_and_backward, torch.compile(function, dynamic=False) if compiled else function,
                   arguments, inputs, grads)


def evaluate(hp: train.Hyperparameters, name: str, names: Sequence[str], tokens: Tensor, dtype: torch.dtype,
             head_scale: float = 1.0, compiled: bool = False) -> list[Tensor]:
    """Return outputs and gradients of part `name` in a model with candidates, from the same numbers in every dtype."""
    torch.manual_seed(0)
    with tokens.device:
        model = train.GPT(hp)
    apply(model, names)
    fill_zeros(model)
    model.lm_head_w.data *= head_scale
    model.bfloat16().to(dtype)
    model.lm_head_w.data = model.lm_head_w.data.to(torch.promote_types(dtype, torch.float32))
    return part_of(model, name, tokens, compiled)()
