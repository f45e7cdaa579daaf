"""Masks against a plain reading of the rule, and dense attention against compiled FlexAttention."""

from itertools import accumulate

import pytest
import torch

import train_gpt_medium as train

EOT_ID, T = 255, 1024
DOCUMENTS = {  # where documents start, other than at token 0
    "one document": [], "long ones": [350, 750], "end of text at token 0": [0, 450],
    "starts at block edges": [128, 512, 640], "many short ones": [*range(5, T, 23)],
    "starts before and after block edges": [127, 129, 383, 641, 895, 897],
    "short ones and a long one": [*range(3, 300, 11), 1000, 1001, 1002]}


def tokens_with(documents):
    tokens = torch.randint(0, EOT_ID, (T,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    tokens[DOCUMENTS[documents]] = EOT_ID
    return tokens


def plain_mask(tokens, window):
    """Whether each query attends to each key, bool (T, T), worked out block by block."""
    docs = list(accumulate(int(token == EOT_ID) for token in tokens.tolist()))
    blocks, expected = [docs[i : i + 128] for i in range(0, T, 128)], torch.zeros(T, T, dtype=torch.bool)
    for i, query in enumerate(blocks):
        full, partial = [], []
        for j in range(i, -1, -1):
            key = blocks[j]
            if set(range(query[0], query[-1] + 1)) & set(range(key[0], key[-1] + 1)):
                (full if j < i and len({*query, *key}) == 1 else partial).append(j)
        for j in full[: max(window - 1, 0)] + partial[: max(window - len(full), 1)]:
            expected[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = True
    docs = torch.tensor(docs)
    return expected & (docs[:, None] == docs).tril()


@pytest.mark.parametrize("window", [1, 5, 27])  # and half of each: 0, 2 and 13
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_the_long_and_the_short_mask_follow_the_rule(documents, window):
    """In the narrowest window, too, every token sees itself: a row without any key would be NaN."""
    tokens = tokens_with(documents)
    masks = train.attention_masks(tokens, EOT_ID, torch.tensor(window, dtype=torch.int32))
    for mask, blocks in zip(masks, (window, window // 2), strict=True):
        assert torch.equal(mask, torch.zeros(T, T).masked_fill(~plain_mask(tokens, blocks), -torch.inf))
        assert (mask.diagonal() == 0).all()


def test_lists_for_flex_attention_name_each_block_once():
    """By queries and, for the backward, by keys."""
    docs = (tokens_with("short ones and a long one") == EOT_ID).cumsum(0)
    partial, full = train.visible_blocks(docs, torch.tensor(4, dtype=torch.int32))
    for blocks in (partial, full, partial.T, full.T):
        counts, lists = train.dense_to_ordered(blocks)
        assert counts.shape == (1, 1, 8) and lists.shape == (1, 1, 8, 8)
        for row, count, columns in zip(blocks, counts[0, 0], lists[0, 0]):
            assert sorted(columns[:count].tolist()) == row.nonzero().flatten().tolist()


def flex_attend(q, k, v, tokens, window):
    """Make the BlockMask of a window and attend under it: one compiled program, as on CUDA."""
    docs = (tokens == EOT_ID).cumsum(0)
    return train.attend(q, k, v, train.flex_mask(docs, window))


@pytest.mark.slow
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_dense_attention_equals_compiled_flex_attention(documents):
    tokens, generator = tokens_with(documents), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, T, 128, generator=generator) for _ in range(3))
    for window in torch.tensor([0, 2, 5, 27], dtype=torch.int32):
        with torch.no_grad():
            flex = torch.compile(flex_attend, dynamic=False)(q, k, v, tokens, window)
        mask, _ = train.attention_masks(tokens, EOT_ID, window)
        assert (train.attend(q, k, v, mask) - flex).abs().max() < 1e-5 and flex.abs().max() > 1  # not zeros
