"""Masks: the block lists against a plain reading of the rule, and dense attention against compiled FlexAttention."""

from itertools import accumulate

import pytest
import torch

import train_gpt_medium as train

EOT_ID, T = 255, 2048
DOCUMENTS = {  # where documents start, other than at token 0
    "one document": [], "long ones": [700, 1500], "end of text at token 0": [0, 900],
    "starts at block edges": [128, 512, 1280], "many short ones": [*range(5, T, 23)],
    "starts before and after block edges": [127, 129, 383, 641, 1151, 1153, 1919],
    "short ones and a long one": [*range(3, 600, 11), 1900, 1901, 1902]}
on_all_masks = pytest.mark.parametrize("documents, window", [(d, w) for d in DOCUMENTS for w in (0, 1, 2, 7, 14, 27)])


def tokens_with(documents):
    tokens = torch.randint(0, EOT_ID, (T,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    tokens[DOCUMENTS[documents]] = EOT_ID
    return tokens


def plain_lists(tokens, window):
    """The kept full and partial key blocks of each query block, worked out one by one."""
    docs = list(accumulate(int(token == EOT_ID) for token in tokens.tolist()))
    blocks, kept = [docs[i : i + 128] for i in range(0, T, 128)], []
    for i, query in enumerate(blocks):
        full, partial = [], []
        for j in range(i, -1, -1):
            key = blocks[j]
            if set(range(query[0], query[-1] + 1)) & set(range(key[0], key[-1] + 1)):
                (full if j < i and len({*query, *key}) == 1 else partial).append(j)
        kept.append((full[: max(window - 1, 0)], partial[: max(window - len(full), 1)]))
    return docs, kept


def window_blocks(tokens, window):
    docs = (tokens == EOT_ID).cumsum(0)
    return docs, train.apply_window(train.document_blocks(docs), torch.tensor(window, dtype=torch.int32))


@on_all_masks
def test_visible_blocks_and_the_dense_mask_follow_the_rule(documents, window):
    """Every token sees itself, in the narrowest window too: a row without any key would be NaN."""
    tokens = tokens_with(documents)
    plain_docs, kept = plain_lists(tokens, window)
    docs, visible = window_blocks(tokens, window)
    assert docs.tolist() == plain_docs
    expected = torch.zeros(T, T, dtype=torch.bool)
    for i, (full, partial) in enumerate(kept):
        assert visible.full[i].nonzero().flatten().tolist() == full[::-1]
        assert visible.partial[i].nonzero().flatten().tolist() == partial[::-1]
        for j in full + partial:
            expected[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = True
    expected &= (docs[:, None] == docs[None, :]).tril()
    mask = train.dense_mask(visible, docs)
    assert torch.equal(mask, torch.zeros(T, T).masked_fill(~expected, -torch.inf)) and (mask.diagonal() == 0).all()


def test_lists_for_flex_attention_name_each_block_once():
    """By queries and, for the backward, by keys; what stands behind a row's count is not read."""
    _, visible = window_blocks(tokens_with("short ones and a long one"), 7)
    for blocks in (*visible, visible.partial.T, visible.full.T):
        counts, lists = train.dense_to_ordered(blocks)
        assert counts.shape == (1, 1, 16) and lists.shape == (1, 1, 16, 16)
        for row, count, columns in zip(blocks, counts[0, 0], lists[0, 0]):
            assert sorted(columns[:count].tolist()) == row.nonzero().flatten().tolist()


def flex_attend(q, k, v, tokens, window):
    """Make the BlockMask of a window and attend under it: one compiled program, as on CUDA."""
    docs = (tokens == EOT_ID).cumsum(0)
    return train.attend(q, k, v, train.flex_mask(train.apply_window(train.document_blocks(docs), window), docs))


@pytest.mark.slow
@on_all_masks
def test_dense_attention_equals_compiled_flex_attention(documents, window):
    tokens, generator = tokens_with(documents), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, T, 128, generator=generator) for _ in range(3))
    with torch.no_grad():
        flex = torch.compile(flex_attend, dynamic=False)(q, k, v, tokens, torch.tensor(window, dtype=torch.int32))
    docs, visible = window_blocks(tokens, window)
    dense = train.attend(q, k, v, train.dense_mask(visible, docs))
    assert (dense - flex).abs().max() < 1e-5 and flex.abs().max() > 1  # something was computed


def test_attention_masks_are_long_and_half_as_long():
    tokens = tokens_with("one document")
    for mask, window in zip(train.attention_masks(tokens, EOT_ID, torch.tensor(7, dtype=torch.int32)), (7, 3)):
        docs, visible = window_blocks(tokens, window)
        assert torch.equal(mask, train.dense_mask(visible, docs))
