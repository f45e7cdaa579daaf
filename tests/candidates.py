"""Candidates: faster ways to parts of the model, on trial. `apply(model, ["tables", "mlp", "head"])` puts them in.

    tables  the gradient of an embedding table: tokens are sorted, each token's rows added up and written once
    mlp     ReLU squared and its derivative inside the products before them, instead of passes over (T, 4d)
    head    the gradients of the loss computed together with the loss, half of the sequence at a time

The model knows nothing of them: `apply` replaces methods of one instance, before `compile_parts`. tests/benchmark.py
times them against the model's own; what pays on a GPU moves into the model, the rest is deleted. The kernels are
Triton's (https://triton-lang.org), each behind a custom operator, which torch.compile leaves as it is. Bytes and times
below are for T = 65,536, d = 1024 and bf16.
"""

from functools import lru_cache
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


@lru_cache(maxsize=1)  # the tables of a model are read one after the other for the same tensor
def find_occurrences(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each token of a sequence (T,) occurs; does not wait for the GPU.

    Returns ids (T,), the tokens sorted; order (T,) int64, their positions; starts (T + 1,) int64; count (1,) int64 of
    distinct tokens. The i-th distinct token is at the positions order[starts[i] : starts[i + 1]], for i < count.
    """
    T = len(tokens)
    ids, order = tokens.sort(stable=True)
    is_first = torch.cat([torch.ones_like(ids[:1], dtype=torch.bool), ids[1:] != ids[:-1]])
    number = is_first.cumsum(0) - 1
    position = torch.arange(T, device=tokens.device)
    starts = torch.full((T + 1,), T, device=tokens.device).scatter(0, torch.where(is_first, number, T), position)
    return ids, order, starts, number[-1:] + 1


@triton.jit
def row_sums_kernel(rows, ids, order, starts, count, sums,
                    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The fp32 sum of each distinct token's `rows` (T, WIDTH), into its row of `sums` (V, WIDTH).

    It reads ROWS rows at a time: a frequent token has thousands, and one by one they would outlast all other tokens'.
    """
    i = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = tl.load(count)
    while i < tokens:
        start, stop = tl.load(starts + i), tl.load(starts + i + 1)
        target = tl.load(ids + start).to(tl.int64)
        total = tl.zeros((COLUMNS,), tl.float32)
        while start < stop:
            place = start + tl.arange(0, ROWS)
            source = tl.load(order + place, mask=place < stop, other=0)
            part = tl.load(rows + source[:, None] * WIDTH + columns[None, :], mask=(place < stop)[:, None], other=0.0)
            total += tl.sum(part.to(tl.float32), axis=0)
            start += ROWS
        tl.store(sums + target * WIDTH + columns, total.to(sums.dtype.element_ty))
        i += tl.num_programs(0)


ROW_SUMS_TILE = dict(ROWS=32, COLUMNS=128)


@torch.library.custom_op("candidates::table_gradient", mutates_args=())
def table_gradient(grad: Tensor, vocab_size: int, ids: Tensor, order: Tensor, starts: Tensor, count: Tensor) -> Tensor:
    """The gradient (V, d) of a table from that of its rows (T, d); the other arguments are of `find_occurrences`.

    Added up in fp32, always in the same order, and rounded once. It reads grad (134 MB) and writes the table (103 MB):
    at least 0.08 ms at an H100's 3.35 TB/s.
    """
    width = grad.size(1)
    sums = grad.new_zeros(vocab_size, width)
    programs = (min(len(ids), 512), width // ROW_SUMS_TILE["COLUMNS"])
    row_sums_kernel[programs](grad.contiguous(), ids, order, starts, count, sums, WIDTH=width, **ROW_SUMS_TILE)
    return sums


@table_gradient.register_fake
def _(grad: Tensor, vocab_size: int, ids: Tensor, order: Tensor, starts: Tensor, count: Tensor) -> Tensor:
    return grad.new_empty(vocab_size, grad.size(1))


class Lookup(torch.autograd.Function):
    """F.embedding of tokens (T,) in a table (V, d), with `table_gradient` as its backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, *occurrences: Tensor) -> Tensor:
        ctx.vocab_size = len(weight)
        ctx.save_for_backward(*occurrences)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return table_gradient(grad, ctx.vocab_size, *ctx.saved_tensors), None, None, None, None, None


def table_forward(table: nn.Embedding, tokens: Tensor) -> Tensor:
    """In place of nn.Embedding.forward."""
    if not torch.is_grad_enabled():
        return F.embedding(tokens, table.weight)
    return Lookup.apply(table.weight, tokens, *find_occurrences(tokens))


# -----------------------------------------------------------------------------
# The MLP


@triton.jit
def relu_squared_kernel(a, b, squares, out, N: tl.constexpr, K: tl.constexpr, B_K_STRIDE: tl.constexpr,
                        B_N_STRIDE: tl.constexpr, BACKWARD: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of `out` (M, N): relu(a @ b)**2 or, with BACKWARD, (a @ b) * 2 * sqrt(squares); a (M, K), b (K, N).

    2 * sqrt(relu(h)**2) is the derivative of relu(h)**2: so h itself is never written.
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


RELU_SQUARED_TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)


def relu_squared(a: Tensor, b: Tensor, squares: Tensor | None = None) -> Tensor:
    """relu(a @ b)**2 or, given that as `squares`, (a @ b) times its derivative; a (M, K) contiguous, b (K, N)."""
    (M, K), N, tile = a.shape, b.size(1), RELU_SQUARED_TILE
    assert M % tile["BLOCK_M"] == N % tile["BLOCK_N"] == K % tile["BLOCK_K"] == 0, "a whole number of tiles"
    out = a.new_empty(M, N)
    relu_squared_kernel[(M // tile["BLOCK_M"] * (N // tile["BLOCK_N"]),)](
        a, b, out if squares is None else squares, out, N=N, K=K, B_K_STRIDE=b.stride(0), B_N_STRIDE=b.stride(1),
        BACKWARD=squares is not None, **tile)
    return out


@torch.library.custom_op("candidates::mlp", mutates_args=())
def mlp(x: Tensor, fc_w: Tensor, proj_w: Tensor) -> tuple[Tensor, Tensor]:
    """relu(x @ fc_w.T)**2 @ proj_w.T, (T, d), and the squares (T, 4d) before the second product, for the backward.

    A pass for ReLU squared and one for its derivative would read or write (T, 4d) up to five times more: 2.7 GB a
    layer. Idea: the speedrun's fused MLP (https://github.com/KellerJordan/modded-nanogpt).
    """
    squares = relu_squared(x.contiguous(), fc_w.T)
    return F.linear(squares, proj_w), squares


@mlp.register_fake
def _(x: Tensor, fc_w: Tensor, proj_w: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), len(fc_w))


@torch.library.custom_op("candidates::mlp_backward", mutates_args=())
def mlp_backward(grad: Tensor, x: Tensor, squares: Tensor, fc_w: Tensor,
                 proj_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, fc_w and proj_w, from that of `mlp`'s first result."""
    grad_h = relu_squared(grad.contiguous(), proj_w, squares)
    return grad_h @ fc_w, grad_h.T @ x, grad.T @ squares


@mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, squares: Tensor, fc_w: Tensor, proj_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), fc_w.new_empty(fc_w.shape), proj_w.new_empty(proj_w.shape)


def keep_for_mlp_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    x, fc_w, proj_w = inputs
    ctx.save_for_backward(x, output[1], fc_w, proj_w)


mlp.register_autograd(lambda ctx, grad, _: mlp_backward(grad, *ctx.saved_tensors), setup_context=keep_for_mlp_backward)


def mlp_forward(module: train.MLP, x: Tensor) -> Tensor:
    """In place of MLP.forward."""
    return mlp(x, module.fc_w, module.proj_w)[0]


# -----------------------------------------------------------------------------
# Head and loss

HEAD_CHUNK_TOKENS = 32 * 1024  # logits of 3.3 GB at once
HEAD_TILE = dict(TILE=4096, num_warps=32)  # two rows a multiprocessor, 0.1 MB each: all in work fit the L2 cache


@triton.jit
def capped_cross_entropy_kernel(z, targets, losses, gradient_scale, LOGITS: tl.constexpr, CAP: tl.constexpr,
                                WITH_GRADIENTS: tl.constexpr, TILE: tl.constexpr):
    """The cross-entropy of a row of `z` (T, LOGITS), capped, into `losses` (T,).

    WITH_GRADIENTS, the row is then replaced by `gradient_scale` times its gradient. Capped logits are at most 15, so
    their exponentials can be added up in fp32 as they are. The target is read before the sum, at which all threads
    meet, so that no thread has written by then.
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
    """Mean cross-entropy, () fp32, of targets (T,) under the capped logits x (T, d) @ w (V, d).T; its gradients.

    The gradients are by x and w, empty if not asked for. The logits of a sequence (6.6 GB) are written once by the
    product, read and replaced by their gradients once, and read by two products; they never exist in fp32. w's
    gradient is added up in w's dtype. Idea: the fused linear cross-entropy of Liger Kernel
    (https://arxiv.org/abs/2410.10989).
    """
    w_low = w.to(x.dtype)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    sizes = (x.shape, w.shape) if with_gradients else (0, 0)
    grad_x, grad_w = x.new_empty(sizes[0]), w.new_zeros(sizes[1])
    for start in range(0, len(x), HEAD_CHUNK_TOKENS):
        chunk = slice(start, start + HEAD_CHUNK_TOKENS)
        z = x[chunk] @ w_low.T
        capped_cross_entropy_kernel[(len(z),)](z, targets[chunk], losses[chunk], 1 / len(x), LOGITS=len(w),
                                               CAP=train.LOGIT_CAP, WITH_GRADIENTS=with_gradients, **HEAD_TILE)
        if with_gradients:
            torch.mm(z, w_low, out=grad_x[chunk])
            grad_w += z.T @ x[chunk]
    return losses.mean(), grad_x, grad_w


@head.register_fake
def _(x: Tensor, w: Tensor, targets: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (x.shape, w.shape) if with_gradients else (0, 0)
    return x.new_empty((), dtype=torch.float32), x.new_empty(sizes[0]), w.new_empty(sizes[1])


def keep_for_head_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def head_backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_w = ctx.saved_tensors
    return (grad * grad_x.float()).to(grad_x.dtype), grad * grad_w, None, None  # a bf16 product would round grad first


head.register_autograd(head_backward, setup_context=keep_for_head_backward)


def model_loss(model: train.GPT, x: Tensor, targets: Tensor) -> Tensor:
    """In place of GPT.loss."""
    return head(x, model.lm_head_w, targets, torch.is_grad_enabled())[0]


# -----------------------------------------------------------------------------

CANDIDATES = ("tables", "mlp", "head")


def apply(model: train.GPT, names: list[str]) -> None:
    """Replace methods of a model by those of the named candidates."""
    assert set(names) <= set(CANDIDATES), names
    if "tables" in names:
        for table in (model.embed, *model.value_embeds):
            table.forward = MethodType(table_forward, table)
    if "mlp" in names:
        for block in model.blocks:
            block.mlp.forward = MethodType(mlp_forward, block.mlp)
    if "head" in names:
        model.loss = MethodType(model_loss, model)
