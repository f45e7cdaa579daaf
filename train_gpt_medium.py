"""Train the modded-nanogpt GPT-2-Medium speedrun's model under any map of value embeddings.

    torchrun --standalone --nproc_per_node=8 train_gpt_medium.py configs/baseline.toml [--scale NAME] [--KEY VALUE ...]
    python train_gpt_medium.py configs/baseline.toml --check

What is unusual about the model, and who had the idea, as credited by the speedrun's record list
(https://github.com/KellerJordan/modded-nanogpt#world-record-history):
- value embeddings: a table of V x d numbers whose row for a token is added to the attention values of the layers that
  use the table (@KoszarskyB, after Zhou et al. 2024, https://arxiv.org/abs/2410.17897)
- skip connections between layers, and from the embedding to every layer, with learned weights
  (@brendanh0gan, @KoszarskyB)
- FlexAttention within documents, under a sliding window that grows with training; most layers see half of it
  (@KoszarskyB, @fernbear.bsky.social)
- query-key norm, ReLU squared (https://arxiv.org/abs/2109.08668), zero-initialised projections, half of the rotary
  frequencies zero (@Grad62304977, @YouJiacheng)
- logits capped softly, after Gemma 2 (https://arxiv.org/abs/2408.00118)
- Muon for the matrices (Keller Jordan, https://kellerjordan.github.io/posts/muon/)

Beyond the published model, each off by default: several tables in a layer (snimu's experiment 00007,
https://github.com/snimu/modded-nanogpt-experiments), a gate on them (the speedrun's later records; nanochat,
https://github.com/karpathy/nanochat), their initial values and learning rate (the speedrun's pull request 218).
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from configs import run_queue
from configs.checks import check_data, check_run, count_parameters, draw_map, expand_path, fitting_ranks
from configs.keys import key, load, parse_command_line
from data.batches import to_inputs_and_targets, train_batches, val_sequences
from data.shards import open_shards
from logs import checkpoint, log_file, machine, ranks, run_log
from logs.log_file import log_path, plural
from logs.resume import Run, begin_log, claim, save
from logs.weights import read_weights

# -----------------------------------------------------------------------------
# Architecture: what no config changes

NUM_LAYERS = 16
HEAD_DIM = 128
SKIPS = {9: 6, 10: 4, 11: 2}  # layer -> the earlier layer whose output it adds
LONG_WINDOW_LAYERS = {0, 4, 11, 15}  # every other layer sees half of the window
NO_ATTENTION_LAYER = 7
BLOCK_SIZE = 128  # tokens in a block of the attention mask
ATTENTION_SCALE = 0.12
LOGIT_CAP = 15.0
GATE_DIM = 16  # numbers of the attention's input that a value embedding's gate sees

# -----------------------------------------------------------------------------
# Configuration


def check_value_embeddings(tables: list) -> list[list[int]]:
    """The map, a list of layers for each table. Raises ValueError if a table or layer is not possible."""
    if tables and all(isinstance(table, int) for table in tables):
        raise ValueError(f"{tables} is a list of layers, not of tables; for one table write [{tables}]")
    for k, table in enumerate(tables):
        if not isinstance(table, list) or not table:
            raise ValueError(f"table {k} is {json.dumps(table, default=str)}; write the layers that use it, as [0, 13]")
        for layer in table:
            if type(layer) is not int or not 0 <= layer < NUM_LAYERS:
                shown = json.dumps(layer, default=str)
                raise ValueError(f"table {k}: there is no layer {shown}; layers are the integers 0 to {NUM_LAYERS - 1}")
            if layer == NO_ATTENTION_LAYER:
                raise ValueError(f"table {k}: layer {layer} has no attention to add a value embedding to; remove it")
            if table.count(layer) > 1:
                raise ValueError(f"table {k}: layer {layer} is named twice; remove one")
    return tables


@dataclass(frozen=True)
class Hyperparameters:
    """The keys of a config file. The defaults are the published baseline."""

    description: str = key("", "what the experiment asks")
    scale: str = key("", "size and data: a name in configs/scales, or a .toml file; its keys win over the config's")
    value_embeddings: list[list[int]] = key(
        [[0, 13], [1, 14], [2, 15]], "tables, each the list of layers that use it", check=check_value_embeddings)
    value_embedding_gate: bool = key(False, "a gate for each head of a layer, on the sum of its tables")
    value_embedding_std: float = key(1.0, "standard deviation of the tables' initial values", at_least=0, at_most=1000)
    value_embedding_lr: float = key(0.3, "learning rate of the tables", at_least=0, at_most=1000)
    # data; a sequence is a whole number of the mask's blocks of 128
    train_files: str = key("data/fineweb10B/fineweb_train_*.bin", "training shards", check=expand_path, scale=True)
    val_files: str = key("data/fineweb10B/fineweb_val_*.bin", "validation shards", check=expand_path, scale=True)
    val_tokens: int = key(10_485_760, "tokens of one validation", at_least=1, scale=True)
    train_seq_len: int = key(64 * 1024, "tokens in a training sequence", at_least=1, multiple_of=128, scale=True)
    val_seq_len: int = key(256 * 1024, "tokens in a validation sequence", at_least=1, multiple_of=128, scale=True)
    sequences_per_step: int = key(8, "training sequences in a step, over all ranks", at_least=1, scale=True)
    # optimization
    num_iterations: int = key(5960, "training steps", at_least=1, scale=True)
    cooldown_frac: float = key(0.7, "part of the steps in which the learning rates fall to 0", at_least=0, at_most=1)
    # architecture; shards hold uint16, so there are at most 65,536 ids, of which the last is the end-of-text token
    vocab_size: int = key(50257, "token ids", at_least=2, at_most=2**16, scale=True)
    num_heads: int = key(8, "attention heads", at_least=1, at_most=256, scale=True)
    model_dim: int = key(1024, "width, 128 * num_heads", at_least=1, scale=True)
    # evaluation, compilation and bookkeeping
    val_loss_every: int = key(125, "steps between validations; 0: only at the end", at_least=0, scale=True)
    warmup_steps: int = key(10, "untimed steps that compile every kernel and are then undone", at_least=0, scale=True)
    coordinate_descent_tuning: bool = key(True, "let the compiler search longer for faster kernels (CUDA only)")
    seed: int | None = key(None, "seed of the initial weights; default: run_id", at_least=0, at_most=2**63 - 1)
    run_id: int | None = key(None, "number of the run; default: the first free one", at_least=0, at_most=999)
    init_from: str = key("", "checkpoint to take the initial weights from", check=os.path.expanduser)
    log_dir: str = key("logs", "logs go to LOG_DIR/[SCALE/]CONFIG/RUN_ID.txt", check=expand_path)
    save_checkpoint: bool = key(False, "write the final weights beside the log, as RUN_ID.ckpt")
    checkpoint_every: int = key(1000, "steps between checkpoints of an interruptible run; 0: none", at_least=0)
    step_timeout: int = key(600, "seconds without progress after which a run is ended as hung", at_least=1)


def tables_of_layers(tables: list[list[int]]) -> list[list[int]]:
    """For each layer the tables that it uses, in their order."""
    return [[k for k, table in enumerate(tables) if layer in table] for layer in range(NUM_LAYERS)]


# -----------------------------------------------------------------------------
# Masks
#
# Attention is causal, within documents, and within a window of blocks of 128 tokens. Which key blocks a query block
# sees is worked out on blocks: a *full* block is seen by every token, a *partial* one is masked token by token.
# FlexAttention takes them as lists; the dense mask for CPUs is made from the same blocks.

Mask = BlockMask | Tensor


class SeenBlocks(NamedTuple):
    """Which key blocks each query block sees: bool, (query blocks, key blocks)."""

    partial: Tensor
    full: Tensor


def document_ids(tokens: Tensor, end_of_text: int) -> Tensor:
    """(T,) number of the document that each token of (T,) belongs to; the end-of-text token starts a document."""
    return (tokens == end_of_text).cumsum(0)


def document_blocks(docs: Tensor) -> SeenBlocks:
    """The blocks without a window, from the document of each token, (T,)."""
    first, last = docs.view(-1, BLOCK_SIZE)[:, 0], docs.view(-1, BLOCK_SIZE)[:, -1]
    block = torch.arange(len(first), device=docs.device)
    # Documents are numbered in order, so one comparison is enough for keys that do not come after the queries.
    candidate = (block <= block[:, None]) & (last >= first[:, None])
    full = (block < block[:, None]) & (first == last[:, None])
    return SeenBlocks(candidate & ~full, full)


def nearness(blocks: Tensor) -> Tensor:
    """How many of `blocks` (query, key) are true from each one's column to its row's last: 1 for the nearest."""
    return blocks.flip(1).cumsum(1).flip(1)


def clip_to_window(blocks: SeenBlocks, window: Tensor) -> SeenBlocks:
    """Keep the nearest window - 1 full blocks, and as many partial ones as fill the window, but at least one.

    `window` is in blocks, 0-dimensional int32: a tensor, so that nothing is compiled again for a new window.
    """
    left_for_partial = (window - blocks.full.sum(1, keepdim=True)).clamp(min=1)
    return SeenBlocks(blocks.partial & (nearness(blocks.partial) <= left_for_partial),
                      blocks.full & (nearness(blocks.full) <= window - 1))


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and, row by row, lists of the columns that are true in `blocks` (rows, columns), for FlexAttention.

    Counted, not sorted: compiling a sort takes as long as compiling one of the model's Transformer blocks.
    """
    place = nearness(blocks)
    column = torch.arange(len(blocks), dtype=torch.int32, device=blocks.device).expand_as(place)
    columns = column.new_zeros(len(place), len(place) + 1).scatter(1, place * blocks, column)  # 0 takes the others
    return place[None, None, :, 0].int(), columns[None, None, :, 1:].contiguous()


def flex_mask(blocks: SeenBlocks, docs: Tensor) -> BlockMask:
    """The mask for FlexAttention, for one batch entry and all heads alike."""

    def document_causal(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (docs[q_idx] == docs[kv_idx])

    keys, queries = ((*listed(partial), *listed(full)) for partial, full in (blocks, (x.T for x in blocks)))
    return BlockMask((len(docs), len(docs)), *keys, *queries, (BLOCK_SIZE, BLOCK_SIZE), document_causal)


def dense_mask(blocks: SeenBlocks, docs: Tensor) -> Tensor:
    """The same mask as (T, T) fp32, added to the scores: 0 if a query sees a key, else -inf."""
    partial, full = (x.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1) for x in blocks)
    seen = full | partial & (docs[:, None] == docs).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, -math.inf)


def attention_masks(tokens: Tensor, end_of_text: int, window: Tensor) -> tuple[Mask, Mask]:
    """The masks of the long-window and of the short-window layers for a sequence (T,).

    Dense on a CPU, where FlexAttention has no backward.
    """
    docs = document_ids(tokens, end_of_text)
    blocks = document_blocks(docs)
    make_mask = flex_mask if tokens.device.type == "cuda" else dense_mask
    return make_mask(clip_to_window(blocks, window), docs), make_mask(clip_to_window(blocks, window // 2), docs)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of q, k, v (1, heads, T, head_dim) under either kind of mask."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=ATTENTION_SCALE)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=ATTENTION_SCALE)


# -----------------------------------------------------------------------------
# Model

LOSS_CHUNK_TOKENS = 64 * 1024  # logits of more tokens at once would not fit: 65,536 x 50,304 in fp32 are 13 GB


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


def init_(w: Tensor) -> None:
    """Fill matrices (..., d) from a uniform distribution around 0 of standard deviation 0.5 * d**-0.5."""
    bound = math.sqrt(3) * 0.5 * w.size(-1) ** -0.5
    nn.init.uniform_(w, -bound, bound)


def add_up(*tensors: Tensor) -> Tensor:
    """The sum of the tensors."""
    return sum(tensors[1:], tensors[0])


@lru_cache(maxsize=1)
def compiled_add_up() -> Callable[..., Tensor]:
    return torch.compile(add_up, dynamic=False)


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864); half of the frequencies are 0."""

    def __init__(self, max_seq_len: int):
        super().__init__()
        frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, HEAD_DIM // 4), torch.zeros(HEAD_DIM // 4)])
        theta = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * frequency
        theta = torch.stack([theta, -theta], dim=1)[:, None]
        self.register_buffer("cos", theta[:, :, :1].cos(), persistent=False)  # (max_seq_len, 1, 1, head_dim / 2) fp32
        self.register_buffer("sin", theta.sin(), persistent=False)  # (max_seq_len, 1, 2, head_dim / 2)

    def forward(self, x: Tensor) -> Tensor:
        """x (1, T, heads, head_dim), rotated by position in fp32, in x's dtype."""
        halves = x.float().unflatten(-1, (2, -1))
        rotated = halves * self.cos[: x.size(1)] + halves.flip(-2) * self.sin[: x.size(1)]
        return rotated.flatten(-2).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, model_dim: int, num_heads: int, is_gated: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkvo_w = nn.Parameter(torch.zeros(4, model_dim, model_dim))  # query, key, value, output: (4, d, d)
        init_(self.qkvo_w[:3])
        self.ve_gate_w = nn.Parameter(torch.zeros(num_heads, GATE_DIM)) if is_gated else None  # (H, 16)

    def forward(self, x: Tensor, rows: list[Tensor], lambdas: Tensor, mask: Mask, rotary: Rotary) -> Tensor:
        """x (T, d), the rows (T, d) of each of the layer's tables, lambdas of v and of each table -> (T, d)."""
        qkv = F.linear(x, self.qkvo_w[:3].flatten(end_dim=1)).view(1, len(x), 3, self.num_heads, HEAD_DIM)
        q, k, v = qkv.unbind(dim=2)  # (1, T, heads, head_dim) each
        q, k = rotary(norm(q)), rotary(norm(k))
        # Expanded to (1, T, heads, 1) so that their gradients are summed in the kernel that has the norm's. It makes v
        # fp32 until the cast below: one rounding to bf16, where 0-dimensional lambdas would give several.
        weight, *table_weights = lambdas.expand(*v.shape[:-1], 1, -1).unbind(-1)
        v = weight * norm(v)
        if rows:
            v = v + self.value_embedding(x, [w * row.view_as(v) for w, row in zip(table_weights, rows)])
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.type_as(q).transpose(1, 2), mask)
        return F.linear(y.transpose(1, 2).reshape(x.shape), self.qkvo_w[3])

    def value_embedding(self, x: Tensor, weighted_rows: list[Tensor]) -> Tensor:
        """What is added to v, (1, T, heads, head_dim): the sum of the rows, times a gate in (0, 2) for each head."""
        total = add_up(*weighted_rows)
        if self.ve_gate_w is None:
            return total
        return 2 * torch.sigmoid(F.linear(norm(x)[:, :GATE_DIM], self.ve_gate_w))[..., None] * total


class ReluSquared(torch.autograd.Function):
    """relu(x)**2, which keeps only its result for the backward: x would be 512 MiB more a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        root = ctx.saved_tensors[0].sqrt()
        if root.dtype == torch.bfloat16:
            # Rounded to bf16 it is relu(x), exactly unless x**2 underflows (x < 1e-19). Compiled code rounds it only if
            # something reads its bits; this reads them, and changes nothing.
            root = root.view(torch.int16).abs().view(torch.bfloat16)
        return grad * 2 * root


class MLP(nn.Module):
    def __init__(self, model_dim: int):
        super().__init__()
        self.fc_w = nn.Parameter(torch.empty(4 * model_dim, model_dim))  # (4d, d)
        self.proj_w = nn.Parameter(torch.zeros(model_dim, 4 * model_dim))  # (d, 4d)
        init_(self.fc_w)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, d) -> (T, d), with ReLU squared between the two products."""
        return F.linear(ReluSquared.apply(F.linear(x, self.fc_w)), self.proj_w)


class Share(torch.autograd.Function):
    """Hands a tensor to `count` readers and sums their gradients in one pass; autograd alone adds them one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (compiled_add_up() if grads[0].is_cuda else add_up)(*grads), None


class Block(nn.Module):
    def __init__(self, layer: int, is_gated: bool, hp: Hyperparameters):
        super().__init__()
        has_attention = layer != NO_ATTENTION_LAYER
        self.attn = CausalSelfAttention(hp.model_dim, hp.num_heads, is_gated) if has_attention else None
        self.mlp = MLP(hp.model_dim)

    def forward(self, x: Tensor, x0: Tensor, skip: Tensor | None, rows: list[Tensor], skip_weight: Tensor | None,
                block_lambdas: Tensor, attn_lambdas: Tensor, mask: Mask, rotary: Rotary) -> Tensor:
        """x, x0 and skip (T, d), rows (T, d) of each table -> (T, d). The attention's input is not normed."""
        if skip is not None:
            x = x + skip_weight * skip
        x = block_lambdas[0] * x + block_lambdas[1] * x0
        if self.attn is not None:
            x = x + self.attn(x, rows, attn_lambdas, mask, rotary)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The 16-layer model; `forward` gives the loss of one sequence.

    Parameter names and shapes are those of a published checkpoint. Initial values:

        embed; value_embeds           N(0, 1); N(0, value_embedding_std**2)
        attention's q, k, v; mlp.fc_w uniform, std 0.5 * d**-0.5
        output projections, head      0
        gates                         0, at which a gate is 1
        scalars                       skip weights 1, block lambdas (1, 0), attention lambdas (0.5, 0.5), and 0.5 for
                                      each further table of a layer
    """

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.end_of_text = hp.vocab_size - 1
        self.tables_of = tables_of_layers(hp.value_embeddings)
        self.embed = nn.Embedding(hp.vocab_size, hp.model_dim)  # (V, d)
        self.value_embeds = nn.ModuleList(nn.Embedding(hp.vocab_size, hp.model_dim) for _ in hp.value_embeddings)
        for table in self.value_embeds:  # (V, d) each
            table.weight.data.mul_(hp.value_embedding_std)
        is_gated = [hp.value_embedding_gate and bool(tables) for tables in self.tables_of]  # by layer
        self.blocks = nn.ModuleList(Block(layer, is_gated[layer], hp) for layer in range(NUM_LAYERS))
        self.num_further = [max(0, len(tables) - 1) for tables in self.tables_of]  # uses beyond the first, by layer
        self.attention_masks = attention_masks  # an attribute, so that compile_parts can replace it
        self.rotary = Rotary(max(hp.train_seq_len, hp.val_seq_len))
        self.lm_head_w = nn.Parameter(torch.zeros(-(-hp.vocab_size // 128) * 128, hp.model_dim))  # (padded V, d)
        self.scalars = nn.Parameter(torch.cat([
            torch.ones(NUM_LAYERS),  # skip weights, (L,), by the layer that the skip comes from
            torch.tensor([1.0, 0.0]).repeat(NUM_LAYERS),  # block lambdas, (L, 2)
            torch.tensor([0.5, 0.5]).repeat(NUM_LAYERS),  # attention lambdas, (L, 2): of v and of the first table
            torch.full((sum(self.num_further),), 0.5),  # of a layer's further tables, layer by layer
        ]))

    def use_bf16(self) -> None:
        """Keep matrices but the head in bf16, for CUDA; scalars stay fp32. Activations take the embedding's dtype."""
        for name, p in self.named_parameters():
            if p.ndim > 1 and name != "lm_head_w":
                p.data = p.data.bfloat16()

    def forward(self, tokens: Tensor, targets: Tensor, window: Tensor) -> Tensor:
        """Mean cross-entropy (nats, fp32) of targets (T,) after tokens (T,), under a long window of `window` blocks."""
        L = NUM_LAYERS
        skip_weights, lambdas, pairs, *further = self.scalars.split([L, 2 * L, 2 * L, *self.num_further])
        skip_weights, block_lambdas, pairs = (x.unbind() for x in (skip_weights, lambdas.view(L, 2), pairs.view(L, 2)))
        attn_lambdas = [torch.cat([pair, more]) if len(more) else pair for pair, more in zip(pairs, further)]
        long_mask, short_mask = self.attention_masks(tokens, self.end_of_text, window)
        # A value embedding enters here: each table is read once, and every layer that uses it gets the same rows.
        rows = [table(tokens) for table in self.value_embeds]
        x, *x0_of = Share.apply(norm(self.embed(tokens)), L + 1)
        outputs: dict[int, Tensor] = {}  # only those that a skip needs: the others would fill a validation's memory
        for i, block in enumerate(self.blocks):
            skip, skip_weight = (outputs[SKIPS[i]], skip_weights[SKIPS[i]]) if i in SKIPS else (None, None)
            mask = long_mask if i in LONG_WINDOW_LAYERS else short_mask
            x = block(x, x0_of[i], skip, [rows[k] for k in self.tables_of[i]], skip_weight, block_lambdas[i],
                      attn_lambdas[i], mask, self.rotary)
            if i in SKIPS.values():
                outputs[i] = x
        return self.loss(norm(x), targets)

    def compile_parts(self) -> None:
        """Compile each kind of block once, and the masks and the loss.

        Blocks of one kind share a program, which takes their parameters as inputs. Idea: regional compilation
        (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
        """
        torch._dynamo.config.recompile_limit = 64  # Transformer blocks of each kind, for training and validation
        for block in self.blocks:
            block.compile(dynamic=False, fullgraph=True)
        self.attention_masks = torch.compile(attention_masks, dynamic=False, fullgraph=True)
        self.loss = torch.compile(self.loss, dynamic=False, fullgraph=True)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets (T,), from the normed output of the last block, (T, d)."""
        losses = []
        for x_chunk, target_chunk in zip(x.split(LOSS_CHUNK_TOKENS), targets.split(LOSS_CHUNK_TOKENS)):
            z = F.linear(x_chunk, self.lm_head_w.to(x.dtype)).float()  # over the padded vocabulary
            logits = LOGIT_CAP * z * torch.rsqrt(z.square() + LOGIT_CAP**2)
            losses.append(F.cross_entropy(logits, target_chunk, reduction="sum"))
        return sum(losses) / len(x)


def model_on_meta(hp: Hyperparameters) -> GPT:
    """The model without memory behind its parameters, for their names, shapes and numbers."""
    with torch.device("meta"):
        return GPT(replace(hp, train_seq_len=BLOCK_SIZE, val_seq_len=BLOCK_SIZE))


def describe_run(hp: Hyperparameters) -> str:
    """The map as a drawing and the numbers of parameters, to look at. Raises ValueError as `make_optimizers` does."""
    drawing = draw_map(tables_of_layers(hp.value_embeddings), notes={NO_ATTENTION_LAYER: "no attention"})
    return f"{drawing}\n{count_parameters(make_optimizers(model_on_meta(hp), hp, rank=0, world_size=1))}"


# -----------------------------------------------------------------------------
# Optimizers

NEWTON_SCHULZ_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalize(u: Tensor) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix to each u (..., rows, cols), by five Newton-Schulz iterations.

    Source: Muon (https://kellerjordan.github.io/posts/muon/), with @YouJiacheng's coefficients, a set an iteration.
    """
    wide = u.size(-2) <= u.size(-1)
    x = u if wide else u.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def join_bits(p: Tensor, mantissa: Tensor) -> Tensor:
    """The fp32 master weight whose upper 16 bits are the bf16 tensor `p` and whose lower 16 the uint16 `mantissa`."""
    return (p.view(torch.int16).to(torch.int32) << 16 | mantissa.to(torch.int32)).view(torch.float32)


def split_bits_(p: Tensor, mantissa: Tensor, master: Tensor) -> None:
    """Write an fp32 master weight back to `p` (truncated, not rounded) and `mantissa`: the inverse of `join_bits`."""
    bits = master.view(torch.int32)
    p.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
    mantissa.copy_((bits & 0xFFFF).to(torch.uint16))


def muon_update(p: Tensor, grad: Tensor, momentum_buffer: Tensor, mantissa: Tensor | None,
                momentum: Tensor, lr: Tensor, weight_decay: Tensor) -> None:
    """One Muon update of p (..., rows, cols), in place, with the momentum buffer (fp32) and mantissa of `Muon`.

    `momentum`, `lr` and `weight_decay` are 0-dimensional tensors, so that nothing is compiled again for new values.
    """
    g = grad.float()
    momentum_buffer.copy_(momentum * momentum_buffer + (1 - momentum) * g)
    v = orthogonalize((momentum * momentum_buffer + (1 - momentum) * g).to(p.dtype))
    master = p if mantissa is None else join_bits(p, mantissa)
    step_size = lr * math.sqrt(max(1, p.size(-2) / p.size(-1)))
    master = master * (1 - lr * weight_decay) - step_size * v.float()
    if mantissa is None:
        p.copy_(master)
    else:
        split_bits_(p, mantissa, master)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Keller Jordan, https://kellerjordan.github.io/posts/muon/), sharded over the ranks.

    Each group of parameters has one shape (..., rows, cols). `step` works through a group in rounds of one
    parameter a rank:
      1. each rank updates its own parameter of the round, from the gradient that all ranks have agreed on;
      2. it starts gathering the round's new parameters on all ranks, and goes on with the next round meanwhile;
      3. after the last round it waits for all of them.
    Only the rank that updates a parameter has its state: the momentum buffer and, for a bf16 parameter, the mantissa,
    the lower 16 bits of the fp32 master weight whose upper 16 bits are the parameter.
    """

    def __init__(self, param_groups: list[dict], lr: float, rank: int, world_size: int):
        super().__init__(param_groups, dict(lr=lr, weight_decay=0.0, momentum=0.95))
        self.rank, self.world_size = rank, world_size
        self.update = muon_update
        self.owned = [p for group in self.param_groups for p in group["params"][rank::world_size]]
        for group in self.param_groups:
            assert len({p.shape for p in group["params"]}) == 1, "a group's parameters share one shape"
            # Every rank takes part in every gathering; where a round has no parameter for it, with this one.
            group["padding"] = torch.empty_like(group["params"][0])

    @torch.no_grad()
    def step(self) -> None:
        gathers = []
        for group in self.param_groups:
            numbers = [torch.tensor(group[name], dtype=torch.float64) for name in ("momentum", "lr", "weight_decay")]
            for start in range(0, len(group["params"]), self.world_size):
                parameters = group["params"][start : start + self.world_size]
                if self.rank < len(parameters):
                    p = parameters[self.rank]
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
                        if p.dtype == torch.bfloat16:
                            state["mantissa"] = torch.zeros_like(p, dtype=torch.uint16)
                    self.update(p, p.grad, state["momentum_buffer"], state.get("mantissa"), *numbers)
                if self.world_size > 1:
                    outputs = parameters + [group["padding"]] * (self.world_size - len(parameters))
                    gathers.append(dist.all_gather(outputs, outputs[self.rank], async_op=True))
        for gather in gathers:
            gather.wait()


def make_optimizers(model: GPT, hp: Hyperparameters, rank: int, world_size: int) -> tuple[torch.optim.AdamW, Muon]:
    """AdamW, the same on every rank, and Muon, sharded; a new parameter gets a line in one of the two dictionaries.

    A group's `name` is the pattern of its parameters' names, for a schedule of its own. Raises ValueError if a
    parameter would be in no optimizer, so never trained, or in two groups.
    """
    adamw_lr = {
        "lm_head_w": 1 / 320,
        "embed.weight": 0.3,
        "value_embeds.*.weight": hp.value_embedding_lr,
        "blocks.*.attn.ve_gate_w": 0.008,
        "scalars": 0.015,
    }
    muon_weight_decay = {"blocks.*.attn.qkvo_w": 0.01, "blocks.*.mlp.fc_w": 0.02, "blocks.*.mlp.proj_w": 0.02}
    patterns = [*adamw_lr, *muon_weight_decay]
    groups: dict[str, list[Tensor]] = {pattern: [] for pattern in patterns}
    for name, p in model.named_parameters():
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if len(matching) != 1:
            raise ValueError(f"parameter {name} is in {len(matching)} groups of make_optimizers; name it in one")
        groups[matching[0]].append(p)
    adamw = torch.optim.AdamW([dict(params=groups[name], name=name, lr=lr) for name, lr in adamw_lr.items()],
                              betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = Muon([dict(params=groups[name], name=name, weight_decay=decay) for name, decay in muon_weight_decay.items()
                 if groups[name]],  # empty while the key that adds its parameters is off
                lr=0.025, rank=rank, world_size=world_size)
    for group in adamw.param_groups + muon.param_groups:
        group["initial_lr"] = group["lr"]
    return adamw, muon


# -----------------------------------------------------------------------------
# Schedules, by step: the number of updates already made


def lr_scale(step: int, num_iterations: int, cooldown_frac: float) -> float:
    """The factor of the learning rates: 1, then linearly down to 0 over the last cooldown_frac of the steps."""
    x = step / num_iterations
    return 1.0 if x < 1 - cooldown_frac else (1 - x) / cooldown_frac


def muon_momentum(step: int) -> float:
    """Linear from 0.85 at step 0 to 0.95 at step 300."""
    fraction = min(step / 300, 1)
    return (1 - fraction) * 0.85 + fraction * 0.95


def window_blocks(step: int, num_iterations: int) -> int:
    """The long window, in blocks of 128 tokens: a cubic of the progress, from 1 to 27 blocks (3456 tokens)."""
    x = step / num_iterations
    return max(1, math.ceil(3456 * (4 * x**3 - 6 * x**2 + 3 * x) / BLOCK_SIZE))


@lru_cache(maxsize=1)
def window_tensor(blocks: int, device: torch.device) -> Tensor:
    """The window as a tensor on the device; cached, because a copy to the GPU at every step would make the CPU wait."""
    return torch.tensor(blocks, dtype=torch.int32, device=device)


def set_schedules(optimizers: tuple[torch.optim.AdamW, Muon], step: int, hp: Hyperparameters) -> None:
    """Set every group's learning rate, and Muon's momentum, for a step."""
    adamw, muon = optimizers
    for group in adamw.param_groups + muon.param_groups:
        group["lr"] = group["initial_lr"] * lr_scale(step, hp.num_iterations, hp.cooldown_frac)
    for group in muon.param_groups:
        group["momentum"] = muon_momentum(step)


# -----------------------------------------------------------------------------
# Training


class Clock:
    """Time spent on training. It runs only between `start` and `stop`, and each of these waits for all ranks' GPUs."""

    def __init__(self, device: torch.device, stopped_ms: float = 0.0):
        self.device, self.stopped_ms, self.started_at = device, stopped_ms, 0.0

    def start(self) -> None:
        ranks.wait_for_all(self.device)
        self.started_at = time.perf_counter()

    def stop(self) -> None:
        ranks.wait_for_all(self.device)
        self.stopped_ms = self.running_ms()

    def running_ms(self) -> float:
        """Milliseconds up to now, of a running clock; the GPU may be a little behind."""
        return self.stopped_ms + 1000 * (time.perf_counter() - self.started_at)


class Trainer:
    """The model, its optimizers and the step; one on each rank.

    A step is the same function for every world size: each rank adds up the gradients of its share of the sequences,
    every loss weighted by 1 / sequences_per_step, and the all-reduce adds up the ranks', in the parameters' dtypes.
    """

    def __init__(self, hp: Hyperparameters, device: torch.device):
        self.hp, self.device = hp, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.timeout_s = max(ranks.START_TIMEOUT_S, hp.step_timeout)
        torch.manual_seed(hp.seed)
        with device:
            self.model = GPT(hp)
        if device.type == "cuda":
            self.model.use_bf16()
        if hp.init_from:
            self.model.load_state_dict(read_weights(hp.init_from, self.model))
        for p in self.model.parameters():
            dist.broadcast(p.detach(), 0)
        # Opened once, so that data replaced during a run do not change it.
        self.train_shards, self.val_shards = open_shards(hp.train_files), open_shards(hp.val_files)
        self.optimizers = make_optimizers(self.model, hp, self.rank, self.world_size)
        self.loss_weight = torch.tensor(1 / hp.sequences_per_step, device=device)
        if device.type == "cuda":
            torch._inductor.config.coordinate_descent_tuning = hp.coordinate_descent_tuning
            self.model.compile_parts()
            self.optimizers[1].update = torch.compile(muon_update, dynamic=False, fullgraph=True)

    def window(self, step: int) -> Tensor:
        return window_tensor(window_blocks(step, self.hp.num_iterations), self.device)

    def reduce_gradients(self, optimizer: torch.optim.Optimizer) -> list[dist.Work]:
        """Start adding up the ranks' gradients. Raises ValueError if a parameter has none."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.grad is None for p in parameters):
            name = next(name for name, p in self.model.named_parameters() if p.grad is None)
            raise ValueError(f"parameter {name} got no gradient: the loss does not depend on it; use it in GPT.forward")
        return [dist.all_reduce(p.grad, async_op=True) for p in parameters]

    def train_step(self, step: int, inputs: Tensor, targets: Tensor) -> None:
        """Update the weights from this rank's sequences, (n, train_seq_len) each."""
        for sequence, sequence_targets in zip(inputs, targets):
            self.model(sequence, sequence_targets, self.window(step)).backward(gradient=self.loss_weight)
        reductions = [self.reduce_gradients(optimizer) for optimizer in self.optimizers]
        set_schedules(self.optimizers, step, self.hp)
        for optimizer, works in zip(self.optimizers, reductions):
            for work in works:
                work.wait()
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        ranks.allow_seconds(self.timeout_s)

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """The mean loss over the validation sequences, the same for every world size."""
        losses = torch.zeros(self.hp.val_tokens // self.hp.val_seq_len, device=self.device)
        for number, inputs, targets in val_sequences(self.val_shards, self.hp, self.rank, self.world_size, self.device):
            losses[number] = self.model(inputs, targets, self.window(step))
            ranks.allow_seconds(self.timeout_s)
        dist.all_reduce(losses)
        return losses.double().mean().item()

    def warm_up(self) -> None:
        """Compile and warm every kernel on random tokens, then put weights and optimizer states back."""
        hp = self.hp
        ranks.allow_seconds(self.timeout_s)
        if hp.warmup_steps == 0:
            return
        weights = deepcopy(self.model.state_dict())

        def random_sequences(count: int, seq_len: int) -> tuple[Tensor, Tensor]:
            tokens = np.random.default_rng(0).integers(hp.vocab_size, size=count * seq_len + 1)
            return to_inputs_and_targets(tokens, seq_len, self.device)

        for _ in range(hp.warmup_steps):
            self.train_step(0, *random_sequences(hp.sequences_per_step // self.world_size, hp.train_seq_len))
        # Validation too: what it lacks, memory above all, shows now and not at the end of the run.
        inputs, targets = random_sequences(1, hp.val_seq_len)
        with torch.no_grad():
            self.model(inputs[0], targets[0], self.window(0))
        self.model.load_state_dict(weights)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def train(trainer: Trainer, run: Run, stop: ranks.StopFlag, first_step: int, time_ms: float) -> None:
    """Validate and train from `first_step` on, with the clock starting at `time_ms`.

    Timed: steps, the wait for their data, log lines, the exchange of signals. Not timed: validations and checkpoints.

    Raises Diverged if a loss, weight or optimizer state is not finite, Stopped after a signal.
    """
    hp, log = trainer.hp, run.log
    clock = Clock(trainer.device, time_ms)
    batches = train_batches(trainer.train_shards, hp, trainer.rank, trainer.world_size, trainer.device, first_step)
    log.show_progress(hp.num_iterations, first_step)
    clock.start()
    for step in range(first_step, hp.num_iterations + 1):
        is_last = step == hp.num_iterations
        if is_last or (hp.val_loss_every and step % hp.val_loss_every == 0):
            clock.stop()
            val_loss = trainer.validate(step)
            log.line(run_log.val_line(step, hp.num_iterations, val_loss, clock.stopped_ms))
            if not math.isfinite(val_loss):
                raise ranks.Diverged(f"diverged at step {step}: the validation loss is {val_loss}")
            clock.start()
        if is_last:
            break
        trainer.train_step(step, *next(batches))
        log.train_line(step + 1, hp.num_iterations, clock.running_ms())
        trainer.timeout_s = hp.step_timeout
        signal_number = stop.agreed()
        if signal_number or (hp.checkpoint_every and (step + 1) % hp.checkpoint_every == 0):
            clock.stop()
            if hp.checkpoint_every:
                save(run, trainer.train_shards, trainer.model, trainer.optimizers, step + 1, clock.stopped_ms)
            if signal_number:
                raise ranks.Stopped(signal_number, "with a checkpoint; the same config and run_id go on from it"
                                    if hp.checkpoint_every else "without a checkpoint, as checkpoint_every is 0")
            clock.start()


# -----------------------------------------------------------------------------
# Main


def plan_queue(arguments: Sequence[str]) -> list[run_queue.Experiment]:
    """The experiments that the queue shall run. Raises ValueError for the first thing but data that would stop one."""
    configs, overrides, _ = parse_command_line(Hyperparameters, arguments, __doc__)
    devices, kind = machine.count_devices()

    def read(config: os.PathLike) -> tuple[dict[str, Any], str]:
        return asdict(load(Hyperparameters, config, overrides)), machine.program_text()

    experiments = []
    for config in configs:
        hp = load(Hyperparameters, config, overrides)
        check_run(hp, config, world_size=1, make_model=model_on_meta)
        best = max(n for n in fitting_ranks(hp) if n <= devices)
        experiments.append(run_queue.Experiment(
            config, [f"--{name}={text}" for name, text in overrides.items()],
            log_path(hp.log_dir, hp.scale, config, 0).parent, best, devices, kind, *read(config), describe_run(hp),
            partial(check_data, hp, config), partial(read, config)))
    return experiments


def plan_run(arguments: Sequence[str]) -> tuple[Run, bool]:
    """The run that the command line asks for, and whether only to check it. Raises ValueError as `check_run` does."""
    configs, overrides, only_check = parse_command_line(Hyperparameters, arguments, __doc__)
    if len(configs) > 1:
        raise ValueError(f"unexpected argument {configs[1]}: a run has one config; ./run.sh takes several")
    hp, device = load(Hyperparameters, configs[0], overrides), machine.find_device()
    check_run(hp, configs[0], dist.get_world_size(), make_model=model_on_meta)
    return Run(configs[0], hp, device, machine.program_text(), run_log.RunLog(None)), only_check


def carry_out(run: Run) -> None:
    """The run itself, on every rank. Raises what `train` raises."""
    hp, log = run.hp, run.log
    stop = ranks.StopFlag(log)
    step, time_ms = begin_log(run, describe_run(hp))
    log.line(f"log: {log.path}\nwarm-up: {plural(hp.warmup_steps, 'step')}, not timed, then undone")
    trainer = Trainer(hp, run.device)
    trainer.warm_up()
    if run.state is not None:
        checkpoint.restore(run.state, trainer.model, *trainer.optimizers)
        run.state.clear()  # the file is mapped: until its end the run would hold its place on the disk
    train(trainer, run, stop, step, time_ms)
    if log.path is not None:
        if hp.save_checkpoint:
            weights = dict(step=hp.num_iterations, code=run.code, model=checkpoint.copy_weights(trainer.model))
            checkpoint.write(log.path.with_suffix(".ckpt"), weights)
        log.line(machine.peak_memory(run.device))
        checkpoint.remove(log_file.checkpoint_path(log.path))
    log.end("finished")
    ranks.wait_for_all(run.device)


def main(arguments: Sequence[str]) -> int:
    """Check, then run. Returns the exit status; for a user's mistake, prints it and exits with status 2."""
    if arguments[:1] == ["--queue"]:
        return run_queue.main(arguments[1:], plan_queue)
    ranks.start_process_group()
    run, only_check = ranks.together(plan_run, arguments)
    drawing = ranks.together(describe_run, run.hp)
    if dist.get_rank() == 0:  # also where data is missing
        run_log.say(f"{drawing}\n{machine.describe_device(run.device)}")
    ranks.together(check_data, run.hp, run.config)
    ranks.together(ranks.check_same, asdict(run.hp) | {"program text": run.code})
    if only_check:
        return 0
    # Rank 0 locks the log, which settles run_id, seed and the checkpoint; the others take these from it.
    run = ranks.together(lambda: claim(run) if dist.get_rank() == 0 else run)
    hp, path = ranks.gather((run.hp, run.state and log_file.checkpoint_path(run.log.path)))[0]
    run = run._replace(hp=hp, state=ranks.together(lambda: path and checkpoint.load(path)))
    return ranks.run_and_report(run.log, carry_out, run)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before there is anything to save needs no traceback
    sys.exit(main(sys.argv[1:]))
