"""Train the modded-nanogpt GPT-2-Medium speedrun's model with a configurable map of value embeddings.

Unusual parts (authors: https://github.com/KellerJordan/modded-nanogpt#world-record-history; extensions, all off by
default: configs/README.md):
- Value embeddings: a table holds a row of d numbers for each token, and attention layers add it to their values
  (@KoszarskyB, after Zhou et al. 2024, https://arxiv.org/abs/2410.17897).
- Learned skip connections, between layers and from the embedding to every layer (@brendanh0gan, @KoszarskyB).
- FlexAttention within documents, under a window that grows during training (@KoszarskyB, @fernbear.bsky.social).
- Query-key norm, squared ReLU (https://arxiv.org/abs/2109.08668), zero-initialized projections, half of the rotary
  frequencies zero (@Grad62304977, @YouJiacheng), soft-capped logits (Gemma 2, https://arxiv.org/abs/2408.00118).
- Muon for the matrices (Keller Jordan, https://kellerjordan.github.io/posts/muon/).
"""

import hashlib
import json
import math
import os
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial, reduce
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before there is anything to save needs no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 omits it
try:
    import torch
except ImportError:
    sys.exit("train_gpt_medium.py: PyTorch is missing; start ./run.sh once, which installs it for .venv/bin/torchrun")
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from configs import checks
from configs.checks import NO_ATTENTION_LAYER, NUM_LAYERS, num_source_heads, read_entry
from configs.config import check_log_dir, error_context, expand_path, key, load, parse_command_line, scale_path
from data.loader import train_batches, val_sequences
from data.shards import open_shards
from logs import checkpoint, distributed, run_log, summary
from logs.distributed import on_all_ranks
from logs.log_format import program_text

# -----------------------------------------------------------------------------
# Constants (record 8's values; configs/checks.py has the number of layers), then the keys of a config

HEAD_DIM = 128
SKIPS = {9: 6, 10: 4, 11: 2}  # layer -> the earlier layer whose output it adds
ATTENTION_SCALE, LOGIT_CAP = 0.12, 15.0
ROPE_MIN_FREQUENCY = 1 / 1024  # radians per token; the highest is 1
GATE_DIM = 16  # features of the attention's input that a value-embedding gate reads
BLOCK_SIZE = 128  # tokens per block of the attention mask
MAX_WINDOW = 3456  # tokens; the long window grows to it
LONG_WINDOW_LAYERS = {0, 4, 11, 15}  # the other attention layers see half of the window
ADAMW_BETAS, ADAMW_EPS, MUON_LR = (0.8, 0.95), 1e-10, 0.025
MIN_MOMENTUM, MAX_MOMENTUM, MOMENTUM_STEPS = 0.85, 0.95, 300  # Muon's momentum rises linearly over these steps
NEWTON_SCHULZ_COEFFICIENTS = (  # (a, b, c) of each iteration, by @YouJiacheng
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012))
Mask = BlockMask | Tensor  # on CUDA | on a CPU
LOSS_CHUNK_TOKENS = 64 * 1024  # logits of 65,536 tokens take 13 GB in fp32, so longer sequences are split


@dataclass(frozen=True)
class Hyperparameters:
    """The keys of a config file. The defaults are the published baseline."""
    description: str = key("", "the question that the experiment asks")
    scale: str = key("", "size and data: a name in configs/scales, or a .toml file; its keys override the config's")
    value_embeddings: list = key(
        [[0, 13], [1, 14], [2, 15]], "the layers of each source of values, as [0, 13] for a table of tokens, or "
        '{layers = [0, 13], source = "token" | "bigram" | "embedding", rows = R, heads = H}',
        check=lambda entries: checks.check_entries(entries, {kind: s.has_rows for kind, s in SOURCES.items()}))
    value_embeddings_only: list = key([], "layers that use only their sources' values", check=checks.check_layers)
    value_embedding_gate: bool = key(False, "give each layer with sources a gate per head on their sum")
    value_embedding_std: float = key(1.0, "standard deviation of the token tables' initial values", min=0, max=1000)
    value_embedding_lr: float = key(0.3, "learning rate of the tables", min=0, max=1000)
    value_embedding_weight_decay: float = key(0.0, "AdamW's weight decay of the tables", min=0, max=1000)
    value_embedding_betas: list = key(list(ADAMW_BETAS), "AdamW's betas of the tables", check=checks.check_betas)
    train_files: str = key("data/fineweb10B/fineweb_train_*.bin", "training shards", check=expand_path, scale=True)
    val_files: str = key("data/fineweb10B/fineweb_val_*.bin", "validation shards", check=expand_path, scale=True)
    val_tokens: int = key(10_485_760, "tokens per validation", min=1, scale=True)
    train_seq_len: int = key(64 * 1024, "tokens per training sequence", min=1, multiple_of=BLOCK_SIZE, scale=True)
    val_seq_len: int = key(256 * 1024, "tokens per validation sequence", min=1, multiple_of=BLOCK_SIZE, scale=True)
    sequences_per_step: int = key(8, "training sequences per step, over all ranks", min=1, scale=True)
    num_iterations: int = key(5960, "training steps", min=1, scale=True)
    cooldown_frac: float = key(0.7, "fraction of the steps over which learning rates fall to 0", min=0, max=1)
    vocab_size: int = key(50257, "number of token ids", min=2, max=2**16, scale=True)
    end_of_text: int | None = key(None, "token id that starts each document; default: the last id", min=0, scale=True)
    num_heads: int = key(8, "attention heads", min=1, max=256, scale=True)
    model_dim: int = key(1024, f"width, {HEAD_DIM} * num_heads", min=1, scale=True)
    target_loss: float = key(2.92, "validation loss to which compare measures the time", min=0, max=1000, scale=True)
    val_loss_every: int = key(125, "steps between validations; 0: only at the end", min=0, scale=True)
    warmup_steps: int = key(10, "untimed steps that compile every kernel and are then undone", min=0, scale=True)
    coordinate_descent_tuning: bool = key(False, "let the compiler search longer for faster kernels (CUDA only)")
    seed: int | None = key(None, "seed of the initial weights; default: run_id", min=0, max=2**63 - 1)
    run_id: int | None = key(None, "number of the run; default: the first free one", min=0, max=999)
    init_from: str = key("", "checkpoint that holds the initial weights", check=os.path.expanduser)
    log_dir: str = key("logs", "write logs to LOG_DIR/[SCALE/]CONFIG/RUN_ID.txt", check=expand_path)
    save_checkpoint: bool = key(False, "write the final weights beside the log, as RUN_ID.ckpt")
    checkpoint_every: int = key(1000, "steps between resumable checkpoints; 0: none", min=0)
    step_timeout: int = key(600, "seconds without progress before a run ends as hung", min=1, max=10**9)

    @property
    def eot_id(self) -> int:
        return self.vocab_size - 1 if self.end_of_text is None else self.end_of_text

    @property
    def num_val_sequences(self) -> int:
        return self.val_tokens // self.val_seq_len


# -----------------------------------------------------------------------------
# Masks
#
# Attention is causal, within documents, and within a window. On 128-token blocks: every query of a block attends to
# every key of a *full* block; mask_mod masks a *partial* block token by token. FlexAttention has no backward on a CPU,
# where the same blocks make a dense mask.


def count_to_row_end(blocks: Tensor) -> Tensor:
    """Count true entries of (query blocks, key blocks) from each column to its row's end: the nearest block gets 1."""
    return blocks.flip(1).cumsum(1).flip(1)


def visible_blocks(docs: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partial and the full key blocks of each query block, bool (query blocks, key blocks).

    `docs` (T,) is each token's document. `window` counts blocks: it keeps the nearest `window - 1` full ones, then the
    nearest partial ones that still fit, but at least one. It is a 0-dimensional int32 tensor, so that a new value does
    not recompile anything.
    """
    first, last = docs.view(-1, BLOCK_SIZE)[:, 0], docs.view(-1, BLOCK_SIZE)[:, -1]
    block = torch.arange(len(first), device=docs.device)
    # Document numbers never fall, so a key block up to the query block shares a document with it if last >= first.
    visible = (block <= block[:, None]) & (last >= first[:, None])
    full = (block < block[:, None]) & (first == last[:, None])
    partial = visible & ~full
    left_for_partial = (window - full.sum(1, keepdim=True)).clamp(min=1)
    return partial & (count_to_row_end(partial) <= left_for_partial), full & (count_to_row_end(full) <= window - 1)


def dense_to_ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return FlexAttention's num_blocks (1, 1, rows) and indices (1, 1, rows, columns) of `blocks` (rows, columns).

    It counts instead of sorting: compiling a sort takes as long as compiling one of the model's blocks.
    """
    place = count_to_row_end(blocks)
    column = torch.arange(len(blocks), dtype=torch.int32, device=blocks.device).expand_as(place)
    indices = column.new_zeros(len(place), len(place) + 1).scatter(1, place * blocks, column)  # unused ones go to 0
    return place[None, None, :, 0].int(), indices[None, None, :, 1:].contiguous()


def flex_mask(docs: Tensor, window: Tensor) -> BlockMask:
    """Return the BlockMask of one sequence for all heads; the transposed lists serve the backward."""

    def document_causal(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (docs[q_idx] == docs[kv_idx])

    partial, full = visible_blocks(docs, window)
    ordered = {}
    for name, blocks in {"kv": partial, "full_kv": full, "q": partial.T, "full_q": full.T}.items():
        ordered[f"{name}_num_blocks"], ordered[f"{name}_indices"] = dense_to_ordered(blocks)
    return BlockMask((len(docs), len(docs)), **ordered, BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE), mask_mod=document_causal)


def dense_mask(docs: Tensor, window: Tensor) -> Tensor:
    """Return the same mask as (T, T) fp32 to add to the scores: 0 where a query attends to a key, else -inf."""
    partial, full = (blocks.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)
                     for blocks in visible_blocks(docs, window))
    visible = full | partial & (docs[:, None] == docs).tril()
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)


def attention_masks(tokens: Tensor, eot_id: int, window: Tensor) -> tuple[Mask, Mask]:
    """Return the long-window and the short-window layers' masks for tokens (T,)."""
    docs = (tokens == eot_id).cumsum(0)  # (T,) the number of each document, which the end-of-text token starts
    make_mask = flex_mask if tokens.device.type == "cuda" else dense_mask
    return make_mask(docs, window), make_mask(docs, window // 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Apply attention to q, k, v (1, heads, T, head_dim) under either kind of mask."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=ATTENTION_SCALE)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=ATTENTION_SCALE)


# -----------------------------------------------------------------------------
# Model


def norm(x: Tensor) -> Tensor:
    """Apply RMS norm over the last dimension, without a weight."""
    return F.rms_norm(x, (x.size(-1),))


def init_(w: Tensor) -> None:
    """Fill matrices (..., d) from a uniform distribution around 0 with standard deviation 0.5 * d**-0.5."""
    bound = math.sqrt(3) * 0.5 * w.size(-1) ** -0.5
    nn.init.uniform_(w, -bound, bound)


def sum_tensors(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors)


class Share(torch.autograd.Function):
    """Hand a tensor to `count` readers and sum their gradients in one pass, which saves 2.4 ms a step on paper."""

    sum_gradients = sum_tensors  # compiled on CUDA

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return Share.sum_gradients(*grads), None


class ReluSquared(torch.autograd.Function):
    """Compute relu(x)**2 and keep only the result, whose root is relu(x), for the backward: 512 MiB less per layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2 * ctx.saved_tensors[0].sqrt()


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864); half of the frequencies are 0."""

    def __init__(self, max_seq_len: int):
        super().__init__()
        self.max_seq_len = max_seq_len

    def reset_parameters(self) -> None:
        frequency = ROPE_MIN_FREQUENCY ** torch.linspace(0, 1, HEAD_DIM // 4)
        frequency = torch.cat([frequency, torch.zeros(HEAD_DIM // 4)])
        theta = torch.arange(self.max_seq_len, dtype=torch.float32)[:, None] * frequency
        theta = torch.stack([theta, -theta], dim=1)[:, None]
        self.register_buffer("cos", theta[:, :, :1].cos(), persistent=False)  # (max_seq_len, 1, 1, head_dim / 2) fp32
        self.register_buffer("sin", theta.sin(), persistent=False)  # (max_seq_len, 1, 2, head_dim / 2) fp32

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (1, T, heads, head_dim) by position in fp32; the result has x's dtype."""
        halves = x.float().unflatten(-1, (2, -1))
        rotated = halves * self.cos[: x.size(1)] + halves.flip(-2) * self.sin[: x.size(1)]
        return rotated.flatten(-2).type_as(x)


# Sources of values, each called once per sequence with tokens (T,) and x0 = norm(embed(tokens)) (T, d). They return
# (T, 128 * heads), the values of the first heads. To add a kind, write a class and name it in SOURCES.


class TokenTable(nn.Embedding):
    """Read a row for each token; weight (V, 128 * heads)."""
    has_rows = False  # whether an entry of the map may set `rows`

    def __init__(self, hp: Hyperparameters, heads: int, rows: int):
        super().__init__(hp.vocab_size, HEAD_DIM * heads, _weight=torch.empty(hp.vocab_size, HEAD_DIM * heads))
        self.std = hp.value_embedding_std

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, tokens: Tensor, x0: Tensor) -> Tensor:
        return super().forward(tokens)


class BigramTable(nn.Embedding):
    """Read a row for each hashed pair of tokens (modded-nanogpt's pull request 201); weight (rows, 128 * heads)."""
    has_rows = True

    def __init__(self, hp: Hyperparameters, heads: int, rows: int):
        super().__init__(rows, HEAD_DIM * heads, _weight=torch.empty(rows, HEAD_DIM * heads))
        self.eot_id = hp.eot_id

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, tokens: Tensor, x0: Tensor) -> Tensor:
        token, previous, last = tokens[1:].long(), tokens[:-1].long(), len(self.weight) - 1
        rows = ((36313 * token) ^ (27191 * previous)) % last
        rows = rows.masked_fill(token == self.eot_id, last)  # no pair crosses documents
        return super().forward(F.pad(rows, (1, 0), value=last))


class EmbeddingMap(nn.Module):
    """Map x0 to values, normed per head (value residual learning, https://arxiv.org/abs/2410.17897)."""
    has_rows = False

    def __init__(self, hp: Hyperparameters, heads: int, rows: int):
        super().__init__()
        self.proj_w = nn.Parameter(torch.empty(HEAD_DIM * heads, hp.model_dim))  # (128 * heads, d)

    def reset_parameters(self) -> None:
        init_(self.proj_w)

    def forward(self, tokens: Tensor, x0: Tensor) -> Tensor:
        return norm(F.linear(x0, self.proj_w).unflatten(-1, (-1, HEAD_DIM))).flatten(-2)


SOURCES = {"token": TokenTable, "bigram": BigramTable, "embedding": EmbeddingMap}


class CausalSelfAttention(nn.Module):
    def __init__(self, hp: Hyperparameters, layer: int, has_sources: bool):
        super().__init__()
        self.num_heads, self.has_own_values = hp.num_heads, layer not in hp.value_embeddings_only
        is_gated = hp.value_embedding_gate and has_sources
        self.qkvo_w = nn.Parameter(torch.zeros(4, hp.model_dim, hp.model_dim))  # query, key, value, output: (4, d, d)
        self.ve_gate_w = nn.Parameter(torch.zeros(hp.num_heads, GATE_DIM)) if is_gated else None  # (heads, 16)

    def reset_parameters(self) -> None:
        init_(self.qkvo_w[:3])

    def forward(self, x: Tensor, ve: list[Tensor], sa_lambdas: Tensor, mask: Mask, rotary: Rotary) -> Tensor:
        """Map x (T, d) to (T, d). `ve`: values (T, 128 * heads) per source; `sa_lambdas`: of v, then of each source."""
        qkv = F.linear(x, self.qkvo_w[:3].flatten(end_dim=1)).view(1, len(x), 3, self.num_heads, HEAD_DIM)
        q, k, v = qkv.unbind(dim=2)  # (1, T, heads, head_dim) each
        q, k = rotary(norm(q)), rotary(norm(k))
        # Lambdas expand to (1, T, heads, 1), so that one kernel sums their gradients with the norm's. They make v fp32
        # until the cast below: it is rounded to bf16 once instead of several times.
        v_lambda, *ve_lambdas = sa_lambdas.expand(*v.shape[:-1], 1, -1).unbind(-1)
        values = [v_lambda * norm(v)] if self.has_own_values else []
        if ve:
            ve = [F.pad(s, (0, x.size(1) - s.size(1))) if s.shape != x.shape else s for s in ve]  # 0 for later heads
            total = sum_tensors(*(w * source.view_as(v) for w, source in zip(ve_lambdas, ve)))
            if self.ve_gate_w is not None:  # each head's gate in (0, 2)
                total = 2 * torch.sigmoid(F.linear(norm(x)[:, :GATE_DIM], self.ve_gate_w))[..., None] * total
            values.append(total)
        v = sum_tensors(*values)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.type_as(q).transpose(1, 2), mask)
        return F.linear(y.transpose(1, 2).reshape(x.shape), self.qkvo_w[3])


class MLP(nn.Module):
    def __init__(self, model_dim: int):
        super().__init__()
        self.fc_w = nn.Parameter(torch.empty(4 * model_dim, model_dim))  # (4d, d)
        self.proj_w = nn.Parameter(torch.zeros(model_dim, 4 * model_dim))  # (d, 4d)

    def reset_parameters(self) -> None:
        init_(self.fc_w)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(ReluSquared.apply(F.linear(x, self.fc_w)), self.proj_w)


class Block(nn.Module):
    def __init__(self, hp: Hyperparameters, layer: int, has_sources: bool):
        super().__init__()
        self.attn = CausalSelfAttention(hp, layer, has_sources) if layer != NO_ATTENTION_LAYER else None
        self.mlp = MLP(hp.model_dim)

    def forward(self, x: Tensor, x0: Tensor, skip: Tensor | None, ve: list[Tensor], skip_weight: Tensor | None,
                block_lambdas: Tensor, sa_lambdas: Tensor, mask: Mask, rotary: Rotary) -> Tensor:
        """Map x, x0 and skip (T, d), with each of ve (T, 128 * heads), to (T, d). Attention's input is not normed."""
        if skip is not None:
            x = x + skip_weight * skip
        x = block_lambdas[0] * x + block_lambdas[1] * x0
        if self.attn is not None:
            x = x + self.attn(x, ve, sa_lambdas, mask, rotary)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The 16-layer model; parameter names and shapes are those of a published checkpoint. Initial values:

    embed N(0, 1), token tables N(0, value_embedding_std**2); q, k, v, mlp.fc_w and embedding maps uniform with standard
    deviation 0.5 * d**-0.5; bigram tables, output projections, head and gates 0 (a gate is then 1). In `scalars`: skip
    weights 1, block lambdas (1, 0), attention lambdas (0.5, 0.5), and 0.5 for each further source, layer by layer.
    """

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        torch.manual_seed(hp.seed or 0)  # for random values that a new module makes outside reset_parameters
        self.eot_id = hp.eot_id
        sources = [read_entry(entry) for entry in hp.value_embeddings]
        padded_vocab_size = -(-hp.vocab_size // 128) * 128
        self.sources_by_layer = [[k for k, source in enumerate(sources) if layer in source.layers]
                                 for layer in range(NUM_LAYERS)]
        self.num_extra_lambdas = [max(0, len(used) - 1) for used in self.sources_by_layer]
        self.embed = nn.Embedding.from_pretrained(torch.empty(hp.vocab_size, hp.model_dim), freeze=False)  # (V, d)
        self.value_embeds = nn.ModuleList(
            SOURCES[source.source](hp, num_source_heads(source, hp.num_heads, hp.scale),
                                   source.rows or 5 * padded_vocab_size) for source in sources)
        self.blocks = nn.ModuleList(Block(hp, layer, bool(used)) for layer, used in enumerate(self.sources_by_layer))
        self.attention_masks = attention_masks  # an attribute, so that compile_parts can replace it
        self.rotary = Rotary(max(hp.train_seq_len, hp.val_seq_len))
        self.lm_head_w = nn.Parameter(torch.zeros(padded_vocab_size, hp.model_dim))  # (padded V, d)
        self.scalars = nn.Parameter(torch.tensor(
            NUM_LAYERS * [1.0]  # skip weights (L,), by the layer whose output is added
            + NUM_LAYERS * [1.0, 0.0]  # block lambdas (L, 2)
            + NUM_LAYERS * [0.5, 0.5]  # attention lambdas (L, 2): of v and of the first source
            + sum(self.num_extra_lambdas) * [0.5]))
        for name, module in self.named_modules():  # each seeded by its name: adding a table changes no other value
            if hasattr(module, "reset_parameters") and not self.scalars.is_meta:
                torch.manual_seed(zlib.crc32(f"{hp.seed} {name}".encode()))
                module.reset_parameters()

    def use_bf16(self) -> None:
        """Store every matrix but the head in bf16, as on CUDA; activations take the embedding's dtype."""
        for name, p in self.named_parameters():
            if p.ndim > 1 and name != "lm_head_w":
                p.data = p.data.bfloat16()

    def forward(self, tokens: Tensor, targets: Tensor, window: Tensor) -> Tensor:
        """Return the mean cross-entropy (nats, fp32) of targets (T,) after tokens (T,); `window` is in blocks."""
        L = NUM_LAYERS
        skip_weights, block_lambdas, sa_lambdas, *extra = self.scalars.split([L, 2 * L, 2 * L, *self.num_extra_lambdas])
        skip_weights, block_lambdas = skip_weights.unbind(), block_lambdas.view(L, 2).unbind()
        sa_lambdas = [torch.cat([pair, more]) if len(more) else pair
                      for pair, more in zip(sa_lambdas.view(L, 2).unbind(), extra)]
        long_mask, short_mask = self.attention_masks(tokens, self.eot_id, window)
        x, *x0 = Share.apply(norm(self.embed(tokens)), 1 + L)
        # Value embeddings enter here, where x is x0: each source is read once, and its layers get the same values.
        ve = [source(tokens, x) for source in self.value_embeds]  # (T, 128 * heads) each
        skips: dict[int, Tensor] = {}  # outputs that a later layer adds; keeping all would fill a validation's memory
        for i, block in enumerate(self.blocks):
            skip, skip_weight = (skips[SKIPS[i]], skip_weights[SKIPS[i]]) if i in SKIPS else (None, None)
            x = block(x, x0[i], skip, [ve[k] for k in self.sources_by_layer[i]], skip_weight, block_lambdas[i],
                      sa_lambdas[i], long_mask if i in LONG_WINDOW_LAYERS else short_mask, self.rotary)
            if i in SKIPS.values():
                skips[i] = x
        return self.loss(norm(x), targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (T,) from the last block's normed output x (T, d)."""
        losses = []
        for x_chunk, target_chunk in zip(x.split(LOSS_CHUNK_TOKENS), targets.split(LOSS_CHUNK_TOKENS)):
            z = F.linear(x_chunk, self.lm_head_w.to(x.dtype)).float()  # over the padded vocabulary
            logits = LOGIT_CAP * z * torch.rsqrt(z.square() + LOGIT_CAP**2)
            losses.append(F.cross_entropy(logits, target_chunk, reduction="sum"))
        return sum(losses) / len(x)

    def compile_parts(self, seq_len: int) -> None:
        """Compile the masks, the loss and each kind of block once (regional compilation): parameters are inputs."""
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks, for training and for validation
        for block in self.blocks:
            block.compile(dynamic=False, fullgraph=True)
        Share.sum_gradients = torch.compile(sum_tensors, dynamic=False)
        with torch.no_grad():  # this call compiles it: the backward's thread would not know the compiler's options
            Share.sum_gradients(*self.embed.weight.new_empty(1 + NUM_LAYERS, seq_len, self.embed.embedding_dim))
        self.attention_masks = torch.compile(attention_masks, dynamic=False, fullgraph=True)
        self.loss = torch.compile(self.loss, dynamic=False, fullgraph=True)


# -----------------------------------------------------------------------------
# Optimizers and their schedules


def newton_schulz(u: Tensor) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix to each u (..., rows, cols) by five Newton-Schulz iterations."""
    is_wide = u.size(-2) <= u.size(-1)
    x = u if is_wide else u.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if is_wide else x.mT


def join_bits(p: Tensor, mantissa: Tensor) -> Tensor:
    """Return the fp32 master weight with upper 16 bits `p` (bf16) and lower 16 bits `mantissa` (uint16)."""
    return (p.view(torch.int16).to(torch.int32) << 16 | mantissa.to(torch.int32)).view(torch.float32)


def split_bits_(p: Tensor, mantissa: Tensor, master: Tensor) -> None:
    """Write an fp32 master weight to `p` (truncated, not rounded) and `mantissa`: the inverse of `join_bits`."""
    bits = master.view(torch.int32)
    p.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))
    mantissa.copy_((bits & 0xFFFF).to(torch.uint16))


def muon_update(p: Tensor, grad: Tensor, momentum_buffer: Tensor, mantissa: Tensor | None,
                momentum: Tensor, lr: Tensor, weight_decay: Tensor) -> None:
    """Update p (..., rows, cols), its momentum buffer (fp32) and its mantissa in place.

    `momentum`, `lr` and `weight_decay` are 0-dimensional tensors, so that new values do not recompile anything.
    """
    g = grad.float()
    momentum_buffer.copy_(momentum * momentum_buffer + (1 - momentum) * g)
    v = newton_schulz((momentum * momentum_buffer + (1 - momentum) * g).to(p.dtype))
    master = p if mantissa is None else join_bits(p, mantissa)
    step_size = lr * math.sqrt(max(1, p.size(-2) / p.size(-1)))
    master = master * (1 - lr * weight_decay) - step_size * v.float()
    if mantissa is None:
        p.copy_(master)
    else:
        split_bits_(p, mantissa, master)


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Keller Jordan, https://kellerjordan.github.io/posts/muon/), sharded over the ranks.

    Each group's parameters share one shape (..., rows, cols). `step` takes a group in rounds of one parameter per rank:
      1. Each rank updates its own parameter of the round from the summed gradient. Only this rank holds its state: the
         momentum buffer and, for a bf16 parameter, the lower 16 bits (mantissa) of the fp32 master weight.
      2. The rank starts an all-gather of the round's new parameters and continues with the next round.
      3. After the last round it waits for every all-gather.
    """

    def __init__(self, param_groups: list[dict], lr: float, rank: int, world_size: int):
        super().__init__(param_groups, dict(lr=lr, weight_decay=0.0, momentum=MAX_MOMENTUM))
        self.rank, self.world_size = rank, world_size
        self.update = muon_update
        self.owned = [p for group in self.param_groups for p in group["params"][rank::world_size]]
        for group in self.param_groups:
            assert len({p.shape for p in group["params"]}) == 1, "a group's parameters share one shape"
            # Every rank joins every all-gather; a rank without a parameter in the last round sends this one.
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


def parameter_groups(model: GPT, hp: Hyperparameters) -> tuple[list[dict], list[dict]]:
    """Return AdamW's groups and Muon's. Raises ValueError unless each parameter is in exactly one group."""
    adamw = {"lm_head_w": dict(lr=1 / 320), "embed.weight": dict(lr=0.3),
             "value_embeds.*.weight": dict(lr=hp.value_embedding_lr, betas=tuple(hp.value_embedding_betas),
                                           weight_decay=hp.value_embedding_weight_decay),
             "blocks.*.attn.ve_gate_w": dict(lr=0.008), "scalars": dict(lr=0.015)}
    muon = {"blocks.*.attn.qkvo_w": dict(weight_decay=0.01), "blocks.*.mlp.fc_w": dict(weight_decay=0.02),
            "blocks.*.mlp.proj_w": dict(weight_decay=0.02), "value_embeds.*.proj_w": dict(weight_decay=0.01)}
    groups = {pattern: dict(options, name=pattern, params=[], initial_lr=options.get("lr", MUON_LR))
              for pattern, options in (adamw | muon).items()}
    for name, p in model.named_parameters():
        matching = [pattern for pattern in groups if fnmatchcase(name, pattern)]
        if len(matching) != 1:
            raise ValueError(f"parameter {name} is in {len(matching)} groups of parameter_groups; name it in one")
        groups[matching[0]]["params"].append(p)
    muon_groups = [groups[name] | dict(params=[p for p in groups[name]["params"] if p.shape == shape])
                   for name in muon for shape in dict.fromkeys(p.shape for p in groups[name]["params"])]
    return [groups[name] for name in adamw], muon_groups


def make_optimizers(model: GPT, hp: Hyperparameters, rank: int, world_size: int) -> tuple[torch.optim.AdamW, Muon]:
    """Return AdamW, replicated, and Muon, sharded."""
    adamw_groups, muon_groups = parameter_groups(model, hp)
    return (torch.optim.AdamW(adamw_groups, betas=ADAMW_BETAS, eps=ADAMW_EPS, weight_decay=0.0, fused=True),
            Muon(muon_groups, lr=MUON_LR, rank=rank, world_size=world_size))


def lr_scale(step: int, num_iterations: int, cooldown_frac: float) -> float:
    """Return the factor of all learning rates after `step` updates: 1, then down to 0 in the last cooldown_frac."""
    x = step / num_iterations
    return 1.0 if x < 1 - cooldown_frac else (1 - x) / cooldown_frac


def muon_momentum(step: int) -> float:
    fraction = min(step / MOMENTUM_STEPS, 1)
    return (1 - fraction) * MIN_MOMENTUM + fraction * MAX_MOMENTUM


def window_blocks(step: int, num_iterations: int) -> int:
    """Return the long window in blocks: a cubic of the progress, from 1 block to at most MAX_WINDOW tokens."""
    x = step / num_iterations
    return max(1, math.ceil(MAX_WINDOW * (4 * x**3 - 6 * x**2 + 3 * x) / BLOCK_SIZE))


def set_schedules(adamw: torch.optim.AdamW, muon: Muon, step: int, hp: Hyperparameters) -> None:
    """Set every group's learning rate, and Muon's momentum, for a step."""
    for group in adamw.param_groups + muon.param_groups:
        group["lr"] = group["initial_lr"] * lr_scale(step, hp.num_iterations, hp.cooldown_frac)
    for group in muon.param_groups:
        group["momentum"] = muon_momentum(step)


# -----------------------------------------------------------------------------
# Training


class Trainer:
    """Hold the model, its optimizers and the training step, which is the same function for every world size.

    Each loss has weight 1 / sequences_per_step, and each rank sums its gradients. An all-reduce of each gradient, in
    its dtype, sums over the ranks. It starts when the last sequence's backward has made that gradient. The graph fixes
    their order, so all ranks start their all-reduces in the same order.
    """

    def __init__(self, hp: Hyperparameters, device: torch.device):
        self.hp, self.device, self.rank, self.world_size = hp, device, dist.get_rank(), dist.get_world_size()
        # The compiler tunes one kernel after another. For the published script this took half an hour in all.
        self.timeout_s = max(hp.step_timeout, distributed.START_TIMEOUT_S * (3 if hp.coordinate_descent_tuning else 1))
        with device:
            self.model = GPT(hp)
        if device.type == "cuda":
            self.model.use_bf16()
        if hp.init_from:
            self.model.load_state_dict(checkpoint.read_weights(hp.init_from, self.model))
        self.is_last_sequence, self.reductions = False, {}  # parameter -> dist.Work
        self.parameters = dict(self.model.named_parameters())
        for p in self.parameters.values():
            dist.broadcast(p.detach(), 0)
            p.register_post_accumulate_grad_hook(self.start_reduction)
        # Opened once, so that replacing files during a run does not change its data.
        step_tokens = hp.sequences_per_step * hp.train_seq_len
        self.train_shards = open_shards(hp.train_files, hp.vocab_size, step_tokens, hp.num_iterations)
        self.val_shards = open_shards(hp.val_files, hp.vocab_size, hp.val_seq_len, hp.num_val_sequences)
        self.optimizers = make_optimizers(self.model, hp, self.rank, self.world_size)
        self.loss_weight = torch.tensor(1 / hp.sequences_per_step, device=device)
        self.windows = [torch.tensor(blocks, dtype=torch.int32, device=device)  # made once: a copy would stall the CPU
                        for blocks in range(math.ceil(MAX_WINDOW / BLOCK_SIZE) + 1)]
        if device.type == "cuda":
            torch._inductor.config.coordinate_descent_tuning = hp.coordinate_descent_tuning
            self.model.compile_parts(hp.train_seq_len)
            self.optimizers[1].update = torch.compile(muon_update, dynamic=False, fullgraph=True)

    def start_reduction(self, p: Tensor) -> None:
        """Start to sum p's gradient over the ranks, if this is the last sequence's backward."""
        if self.is_last_sequence:
            self.reductions[p] = dist.all_reduce(p.grad, async_op=True)

    def loss(self, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, targets, self.windows[window_blocks(step, self.hp.num_iterations)])

    def train_step(self, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
        """Update the weights from sequences (n, train_seq_len); return the last one's loss, a scalar on the device.

        Raises ValueError if a parameter has no gradient.
        """
        for number, sequence in enumerate(zip(inputs, targets), start=1):
            self.is_last_sequence = number == len(inputs)
            loss = self.loss(step, *sequence)
            loss.backward(gradient=self.loss_weight)
            loss = loss.detach()  # the graph ends with its backward
        self.is_last_sequence = False
        if missing := [name for name, p in self.parameters.items() if p.grad is None]:
            raise ValueError(f"parameter {missing[0]} got no gradient: the loss ignores it; use it in GPT.forward")
        set_schedules(*self.optimizers, step, self.hp)
        for optimizer in reversed(self.optimizers):  # Muon's gradients are there first, the embedding's last
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                self.reductions.pop(p).wait()
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        distributed.reset_watchdog(self.timeout_s)
        return loss

    def report_compiled(self, log: run_log.RunLog, started_at: float, part: Any) -> None:
        """Reset the watchdog when a part is compiled, and log it if tuning its kernels can take minutes from here."""
        distributed.reset_watchdog(self.timeout_s)
        if self.hp.coordinate_descent_tuning:
            log.line(f"warm-up: tuning part {part.compile_id} after {time.monotonic() - started_at:.0f} s")

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """Return the mean loss over the validation sequences, equal for every world size."""
        losses = torch.zeros(self.hp.num_val_sequences, device=self.device)
        for number, inputs, targets in val_sequences(self.val_shards, self.hp.val_seq_len, self.hp.num_val_sequences,
                                                     self.rank, self.world_size, self.device):
            losses[number] = self.loss(step, inputs, targets)
            distributed.reset_watchdog(self.timeout_s)
        dist.all_reduce(losses)
        return losses.double().mean().item()

    def warm_up(self) -> tuple[float, float]:
        """Compile and warm every kernel on random tokens, then restore weights and optimizer states.

        Returns the seconds of the last step and of a validation, (0, 0) without warmup_steps.
        """
        hp = self.hp
        distributed.reset_watchdog(self.timeout_s)
        if hp.warmup_steps == 0:
            return 0.0, 0.0
        weights = {name: w.clone() for name, w in self.model.state_dict().items()}
        tokens = torch.randint(hp.vocab_size, (hp.sequences_per_step // self.world_size, hp.train_seq_len),
                               device=self.device)
        for _ in range(hp.warmup_steps):
            started_at = distributed.synchronize(self.device)
            self.train_step(0, tokens.int(), tokens)
        step_s = distributed.synchronize(self.device) - started_at
        tokens = torch.randint(hp.vocab_size, (hp.val_seq_len,), device=self.device)
        for _ in range(2):  # the first one compiles
            started_at = distributed.synchronize(self.device)
            with torch.no_grad():
                self.loss(0, tokens.int(), tokens)  # a validation that does not fit in memory fails here
        sequence_s = distributed.synchronize(self.device) - started_at
        self.model.load_state_dict(weights)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return step_s, sequence_s * hp.num_val_sequences / self.world_size


def train(trainer: Trainer, log: run_log.RunLog, identity: dict[str, Any], stop: distributed.StopFlag, first_step: int,
          time_ms: float) -> None:
    """Validate and train from `first_step`, after `time_ms` of training in earlier sessions.

    Timed: steps, waits for their data, log lines and the exchange of signals. Not timed: validations and checkpoints.
    Raises Diverged if a loss, weight or optimizer state is not finite, Stopped after a signal.
    """
    hp, device = trainer.hp, trainer.device
    batches = train_batches(trainer.train_shards, hp.sequences_per_step, hp.train_seq_len, first_step,
                            hp.num_iterations, trainer.rank, trainer.world_size, device)
    log.show_progress(hp.num_iterations, first_step)
    loss_copy = distributed.LossCopy(log, device)
    started_at = distributed.synchronize(device)  # seconds; waits for every rank's GPU
    for step in range(first_step, hp.num_iterations + 1):
        is_last = step == hp.num_iterations
        if is_last or (hp.val_loss_every and step % hp.val_loss_every == 0):
            time_ms += 1000 * (distributed.synchronize(device) - started_at)
            loss_copy.log_if_done()
            val_loss = trainer.validate(step)
            log.validation_line(step, hp.num_iterations, time_ms, val_loss)
            if not math.isfinite(val_loss):
                raise distributed.Diverged(step, f"the validation loss is {val_loss}")
            started_at = distributed.synchronize(device)
        if is_last:
            break
        train_loss = trainer.train_step(step, *next(batches))
        log.train_line(step + 1, hp.num_iterations, time_ms + 1000 * (time.perf_counter() - started_at))
        loss_copy.update(step + 1, train_loss)
        trainer.timeout_s = hp.step_timeout
        signal_number = stop.poll()
        if signal_number or (hp.checkpoint_every and (step + 1) % hp.checkpoint_every == 0):
            time_ms += 1000 * (distributed.synchronize(device) - started_at)
            loss_copy.log_if_done()
            if hp.checkpoint_every:
                checkpoint.save(log, identity, trainer.model, trainer.optimizers, step + 1, time_ms)
            if signal_number:
                raise distributed.Stopped(signal_number, has_checkpoint=hp.checkpoint_every > 0)
            started_at = distributed.synchronize(device)


def run_training(hp: Hyperparameters, device: torch.device, identity: dict[str, Any], drawing: str,
                 log: run_log.RunLog, state: dict[str, Any] | None) -> None:
    """Warm up, then train on every rank, from step 0 or from a checkpoint's `state`. Raises what `train` raises."""
    stop, started_at = distributed.StopFlag(log), time.monotonic()
    step, time_ms = checkpoint.begin_log(log, identity, state, drawing, device)
    log.line(f"log: {log.path}\nwarm-up: {run_log.plural(hp.warmup_steps, 'step')}, not timed, then undone")
    trainer = Trainer(hp, device)
    torch._dynamo.on_compile_end(partial(trainer.report_compiled, log, started_at))
    step_s, validation_s = trainer.warm_up()
    if step_s:
        log.line(f"{summary.estimate(range(step, hp.num_iterations), hp.val_loss_every, step_s, validation_s)}; "
                 f"the warm-up took {time.monotonic() - started_at:.0f} s")
    if state is not None:
        checkpoint.restore(state, trainer.model, *trainer.optimizers)
        state.clear()  # the memory-mapped file would keep its place on the disk until the end of the run
    train(trainer, log, identity, stop, step, time_ms)
    if log.path is not None:
        if hp.save_checkpoint:
            checkpoint.write(log.path.with_suffix(".ckpt"), dict(step=hp.num_iterations, code=identity["code"],
                                                                 model=checkpoint.weights_of(trainer.model)))
        log.line(distributed.peak_memory(device))
        log.line(summary.describe_end(log.path, hp.scale, hp.num_iterations))
        run_log.remove_checkpoint(log.path)
    log.end("finished")
    distributed.synchronize(device)


# -----------------------------------------------------------------------------
# Main: check everything, open the log, train


def check_run(hp: Hyperparameters, config: Path, world_size: int) -> str:
    """Check all but the data; return the map's drawing and the parameter counts. Raises ValueError for a mistake."""
    with error_context(str(config)):
        checks.check_sources(hp.value_embeddings, hp.value_embeddings_only, hp.num_heads, hp.scale)
        checks.check_sizes(hp.model_dim, HEAD_DIM * hp.num_heads, hp.val_tokens, hp.val_seq_len)
        checks.check_world_size(world_size, hp.sequences_per_step, hp.num_val_sequences, hp.run_id)
        check_log_dir(Path(hp.log_dir))
        with torch.device("meta"):  # no memory, and no values: making them there would import the compiler, for seconds
            model = GPT(hp)
        if hp.init_from:
            with error_context("init_from"):
                checkpoint.read_weights(hp.init_from, model)
        groups = sum(parameter_groups(model, hp), [])
    drawing = checks.draw_map(hp.value_embeddings, hp.value_embeddings_only, hp.num_heads, hp.scale)
    warning = checks.warn_of_lengths(hp.train_seq_len, hp.val_seq_len, MAX_WINDOW)
    return f"{drawing}\n{checks.count_parameters(groups)}{warning}"


def check_data(hp: Hyperparameters, config: Path, device_type: str) -> dict[str, Any]:
    """Check shards and finished runs; return a new run's identity. Raises ValueError or MissingShardsError."""
    step_tokens = hp.sequences_per_step * hp.train_seq_len
    with error_context(str(config)):
        data = checks.check_streams(hp.vocab_size, hp.eot_id, hp.train_files, step_tokens, hp.num_iterations,
                                    hp.val_files, hp.val_seq_len, hp.num_val_sequences)
        identity = asdict(hp) | data | {"device": device_type, "code": program_text()}
        if hp.init_from:
            identity["init_sha256"] = hashlib.sha256(Path(hp.init_from).read_bytes()).hexdigest()[:16]
        run_log.check_finished_runs(run_log.log_path(hp.log_dir, hp.scale, config, 0).parent, identity)
    return identity


def check_for_queue(config: Path, overrides: dict[str, str], cpu_scale: str = "") -> dict[str, Any]:
    """Check a config and return what configs/run_queue.py needs.

    "refusal" says why this machine cannot train it, "data_fault" why its data or its finished runs forbid it; "" means
    no reason. "fetch" is the command that gets missing data, or []. A config without a scale gets `cpu_scale` on a CPU.
    """
    hp, (devices, device_kind) = load(Hyperparameters, config, overrides), distributed.count_devices()
    if cpu_scale and device_kind == "CPU cores" and not hp.scale:
        hp = load(Hyperparameters, config, overrides | {"scale": cpu_scale})
    drawing, device_type = check_run(hp, config, world_size=1), "cuda" if device_kind == "GPUs" else "cpu"
    fetch, refusal, data_fault = [], "", ""
    try:
        distributed.check_machine(config, device_type, max(hp.train_seq_len, hp.val_seq_len))
    except ValueError as error:
        refusal = str(error)
    try:
        drawing += checks.warn_of_documents(check_data(hp, config, device_type)["val_documents"])
    except ValueError as error:
        fetch, data_fault = getattr(error, "command", []), str(error)
    log_folder = run_log.log_path(hp.log_dir, hp.scale, config, 0).parent
    files = [str(config), *([str(scale_path(hp.scale))] if hp.scale else [])]
    world_sizes = checks.valid_world_sizes(hp.sequences_per_step, hp.num_val_sequences)
    return dict(config=str(config), files=files, log_folder=str(log_folder), configuration=asdict(hp), drawing=drawing,
                num_ranks=max(n for n in world_sizes if n <= devices), devices=devices, device_kind=device_kind,
                fetch=fetch, refusal=refusal, data_fault=data_fault, eot_id=hp.eot_id)


def main(arguments: list[str]) -> int:
    """Check, then train. Returns the exit status; a user's mistake is one line and status 2."""
    distributed.start_process_group()
    configs, overrides, options = on_all_ranks(parse_command_line, Hyperparameters, arguments, __doc__)
    if options.json:
        described = [on_all_ranks(check_for_queue, config, overrides, options.cpu_scale) for config in configs]
        run_log.say(json.dumps(described))
        return 0
    config, hp = configs[0], on_all_ranks(load, Hyperparameters, configs[0], overrides)
    device = on_all_ranks(distributed.find_device)
    drawing = on_all_ranks(check_run, hp, config, dist.get_world_size())
    if dist.get_rank() == 0:
        run_log.say(f"{drawing}\n{distributed.describe_device(device)}")  # before the data, which may be missing
    on_all_ranks(distributed.check_machine, config, device.type, max(hp.train_seq_len, hp.val_seq_len))
    identity = on_all_ranks(check_data, hp, config, device.type)
    on_all_ranks(distributed.check_equal_on_ranks, identity)
    warning = checks.warn_of_documents(identity["val_documents"])
    if warning and dist.get_rank() == 0:
        run_log.say(warning.strip())
    if options.check:
        return 0
    # Rank 0 locks the log, which settles run_id, seed and checkpoint; then all ranks learn them.
    path = run_log.log_path(hp.log_dir, hp.scale, config, hp.run_id or 0)
    log, identity, state = on_all_ranks(checkpoint.open_run, path, hp.run_id is None, identity)
    identity, resume_from = distributed.gather((identity, state and run_log.checkpoint_path(log.path)))[0]
    hp = replace(hp, run_id=identity["run_id"], seed=identity["seed"])
    state = on_all_ranks(checkpoint.load, resume_from) if resume_from else None
    return distributed.run_and_report(log, run_training, hp, device, identity, drawing + warning, log, state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
