"""Masks: the block lists against a plain reading of the rule, and dense attention against compiled FlexAttention."""

import pytest
import torch

import train_gpt_medium as train

END_OF_TEXT = 255
T, BLOCKS = 2048, 16

# Where documents start, other than at token 0.
DOCUMENTS = {
    "one document": [],
    "starts at block edges": [128, 512, 1280],
    "starts before and after block edges": [127, 129, 383, 641, 1151, 1153, 1919],
    "long ones": [700, 1500],
    "many short ones": list(range(5, T, 23)),
    "short ones and a long one": [*range(3, 600, 11), 1900, 1901, 1902],
    "end of text at token 0": [0, 900],
}
WINDOWS = [0, 1, 2, 7, 14, 27]


def tokens_with_documents(starts, length=T):
    tokens = torch.randint(0, END_OF_TEXT, (length,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    tokens[starts] = END_OF_TEXT
    return tokens


def plain_lists(tokens, window):
    """The kept full and partial key blocks of each query block, worked out one by one."""
    docs, count = [], 0
    for token in tokens.tolist():
        count += token == END_OF_TEXT
        docs.append(count)
    blocks = [docs[i : i + 128] for i in range(0, len(docs), 128)]
    kept = []
    for i, query in enumerate(blocks):
        full, partial = [], []
        for j in range(i, -1, -1):
            key = blocks[j]
            if not set(range(query[0], query[-1] + 1)) & set(range(key[0], key[-1] + 1)):
                continue
            whole = j < i and len({*query, *key}) == 1
            (full if whole else partial).append(j)
        kept.append((full[: max(window - 1, 0)], partial[: max(window - len(full), 1)]))
    return docs, kept


def window_blocks(tokens, window):
    docs = train.document_ids(tokens, END_OF_TEXT)
    return docs, train.clip_to_window(train.document_blocks(docs), torch.tensor(window, dtype=torch.int32))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_seen_blocks_follow_the_rule(documents, window):
    tokens = tokens_with_documents(DOCUMENTS[documents])
    expected_docs, expected = plain_lists(tokens, window)
    docs, seen = window_blocks(tokens, window)
    assert docs.tolist() == expected_docs
    for i, (full, partial) in enumerate(expected):
        assert seen.full[i].nonzero().flatten().tolist() == full[::-1]
        assert seen.partial[i].nonzero().flatten().tolist() == partial[::-1]


def test_lists_for_flex_attention_name_each_block_once():
    """By queries and, for the backward, by keys; what stands behind a row's count is not read."""
    _, seen = window_blocks(tokens_with_documents(DOCUMENTS["short ones and a long one"]), 7)
    for blocks in (*seen, seen.partial.T, seen.full.T):
        counts, lists = train.listed(blocks)
        assert counts.shape == (1, 1, BLOCKS) and lists.shape == (1, 1, BLOCKS, BLOCKS)
        for row, count, columns in zip(blocks, counts[0, 0], lists[0, 0]):
            assert sorted(columns[:count].tolist()) == row.nonzero().flatten().tolist()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_dense_mask_shows_what_the_lists_allow(documents, window):
    tokens = tokens_with_documents(DOCUMENTS[documents])
    docs, kept = plain_lists(tokens, window)
    docs = torch.tensor(docs)
    expected = torch.zeros(T, T, dtype=torch.bool)
    for i, (full, partial) in enumerate(kept):
        for j in full + partial:
            expected[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = True
    expected &= (docs[:, None] == docs[None, :]).tril()
    actual_docs, seen = window_blocks(tokens, window)
    assert torch.equal(train.dense_mask(seen, actual_docs), torch.zeros(T, T).masked_fill(~expected, -torch.inf))


def test_every_token_sees_itself():
    """In the narrowest window too: a row without any key would be NaN."""
    docs, seen = window_blocks(tokens_with_documents(DOCUMENTS["many short ones"]), 0)
    assert (train.dense_mask(seen, docs).diagonal() == 0).all()


@pytest.fixture(scope="module")
def compiled_attend():
    """Attention under the BlockMask of a window, built and run inside one compiled program as on CUDA."""

    def attend(q, k, v, tokens, window):
        docs = train.document_ids(tokens, END_OF_TEXT)
        return train.attend(q, k, v, train.flex_mask(train.clip_to_window(train.document_blocks(docs), window), docs))

    return torch.compile(attend, dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_dense_attention_equals_compiled_flex_attention(compiled_attend, documents, window):
    tokens = tokens_with_documents(DOCUMENTS[documents])
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, T, 128, generator=generator) for _ in range(3))
    with torch.no_grad():
        flex = compiled_attend(q, k, v, tokens, torch.tensor(window, dtype=torch.int32))
    docs, seen = window_blocks(tokens, window)
    dense = train.attend(q, k, v, train.dense_mask(seen, docs))
    assert (dense - flex).abs().max() < 1e-5
    assert flex.abs().max() > 1  # something was computed


def test_attention_masks_are_long_and_half_as_long():
    tokens = tokens_with_documents([])
    masks = train.attention_masks(tokens, END_OF_TEXT, torch.tensor(7, dtype=torch.int32))
    for mask, window in zip(masks, (7, 3)):
        docs, seen = window_blocks(tokens, window)
        assert torch.equal(mask, train.dense_mask(seen, docs))


def test_attention_scores_are_scaled_by_012():
    """Two tokens: the weight of the first in the second's output is the softmax of two scores."""
    docs = torch.zeros(128, dtype=torch.long)
    mask = train.dense_mask(train.document_blocks(docs), docs)
    q, k, v = (torch.zeros(1, 1, 128, 128) for _ in range(3))
    q[..., 1, 0], k[..., 0, 0], v[..., 0, 0] = 10.0, 1.0, 1.0
    expected = 1 / (1 + torch.tensor(-1.2).exp().item())
    assert train.attend(q, k, v, mask)[0, 0, 1, 0].item() == pytest.approx(expected, rel=1e-5)
