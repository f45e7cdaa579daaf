"""Test the sources of values: rows, shapes, initial values, narrow sources, layers without own values, all at once."""

import os
import signal

import pytest
import torch
from faults import Ranks
from golden import golden_weights
from helpers import relative_error, val_losses

import train_gpt_medium as train
from configs import checks

ALL_KINDS = [[0, 13], {"layers": [1, 14, 0], "source": "bigram", "rows": 301, "heads": 1},
             {"layers": [2, 14], "source": "embedding"}, {"layers": [15], "source": "embedding", "heads": 1}]
ONLY = [14, 15]
WINDOW = torch.tensor(2, dtype=torch.int32)


def make_model(entries=ALL_KINDS, only=ONLY, **keys):
    torch.manual_seed(0)
    hp = train.Hyperparameters(value_embeddings=entries, value_embeddings_only=only, num_heads=2, model_dim=256,
                               vocab_size=250, train_seq_len=128, val_seq_len=128, **keys)
    return train.GPT(hp), hp


def sequence():
    tokens = torch.randint(0, 250, (129,), generator=torch.Generator().manual_seed(0))
    tokens[[5, 60]] = 249
    return tokens[:-1].int(), tokens[1:]


def test_names_and_shapes_are_the_references():
    model, _ = make_model(value_embedding_gate=True)
    expected = {name: w.shape for name, w in golden_weights(ALL_KINDS, 256, 250, gate=True).items()}
    assert {name: w.shape for name, w in model.state_dict().items()} == expected


def test_a_bigram_table_has_five_rows_per_padded_token_by_default():
    model, _ = make_model([{"layers": [3], "source": "bigram"}], [])
    assert model.value_embeds[0].weight.shape == (5 * 256, 256)


def test_bigram_rows_follow_the_formula():
    """In 64-bit integers; the first token of the sequence and the end-of-text token take the last row."""
    tokens = [50256, 50255, 17, 50256, 50254, 3]
    expected = [((36313 * t) ^ (27191 * before)) % 251_519 for before, t in zip(tokens, tokens[1:])]
    expected = [251_519, *(251_519 if t == 50256 else row for t, row in zip(tokens[1:], expected))]
    table = train.BigramTable(train.Hyperparameters(), heads=1, rows=251_520)
    table.weight.data[:, 0] = torch.arange(251_520)
    assert table(torch.tensor(tokens, dtype=torch.int32), None)[:, 0].tolist() == expected
    assert table(torch.tensor([7, 8]), None)[:, 0].tolist() == [251_519, ((36313 * 8) ^ (27191 * 7)) % 251_519]


def test_initial_values():
    model, _ = make_model(value_embedding_std=2.0)
    tables = model.value_embeds
    assert tables[0].weight.std().item() == pytest.approx(2, rel=0.02) and not tables[1].weight.any()
    for w in (tables[2].proj_w, tables[3].proj_w):
        assert w.std().item() == pytest.approx(0.5 / 16, rel=0.02) and w.abs().max() <= 3**0.5 * 0.5 / 16


def test_an_embedding_source_is_a_normed_map_of_x0():
    model, _ = make_model()
    x0 = torch.randn(5, 256)
    expected = (x0.double() @ model.value_embeds[2].proj_w.double().T).view(5, 2, 128)
    expected /= (expected.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    assert relative_error(model.value_embeds[2](None, x0), expected.view(5, 256)) < 1e-6


def test_a_narrow_source_reaches_the_first_heads_only():
    torch.manual_seed(0)
    attn, rotary = train.CausalSelfAttention(256, 2, is_gated=False), train.Rotary(128)
    x, narrow = torch.randn(128, 256), torch.randn(128, 128)
    attn.qkvo_w.data[3] = torch.eye(256)
    docs = torch.zeros(128, dtype=torch.long)
    mask, lambdas = train.dense_mask(train.document_blocks(docs), docs), torch.tensor([0.5, 0.7])
    wide = torch.cat([narrow, torch.zeros(128, 128)], dim=1)
    out, plain = attn(x, [narrow], lambdas, mask, rotary), attn(x, [], lambdas[:1], mask, rotary)
    assert torch.equal(out, attn(x, [wide], lambdas, mask, rotary))
    assert torch.equal(out[:, 128:], plain[:, 128:]) and not torch.equal(out[:, :128], plain[:, :128])


def test_a_layer_without_own_values_uses_its_sources_alone():
    """Its value matrix gets a zero gradient and only decays; its first lambda gets none either."""
    model, hp = make_model()
    model.load_state_dict(golden_weights(ALL_KINDS, 256, 250))
    model(*sequence(), WINDOW).backward()
    gradients = [block.attn.qkvo_w.grad[2].abs().max().item() if block.attn else None for block in model.blocks]
    assert [layer for layer, gradient in enumerate(gradients) if gradient == 0] == ONLY
    assert [layer for layer in range(16) if model.scalars.grad[48 + 2 * layer] == 0] == [7, *ONLY]
    before = model.blocks[14].attn.qkvo_w.detach().clone()
    _, muon = train.make_optimizers(model, hp, 0, 1)
    muon.step()
    assert torch.allclose(model.blocks[14].attn.qkvo_w[2], before[2] * (1 - 0.025 * 0.01), rtol=1e-6)


def test_an_embedding_source_trains_the_embedding():
    gradients = []
    for entries in ([[3]], [{"layers": [3], "source": "embedding"}]):
        model, _ = make_model(entries, [])
        model.load_state_dict(golden_weights(entries, 256, 250))
        model(*sequence(), WINDOW).backward()
        gradients.append(model.embed.weight.grad)
    assert relative_error(*gradients) > 1e-3


def test_decay_and_betas_are_those_of_the_tables_and_maps_are_muons():
    model, hp = make_model(value_embedding_weight_decay=0.05, value_embedding_betas=[0.7, 0.99])
    adamw, muon = train.make_optimizers(model, hp, 0, 1)
    settings = {group["name"]: (group["betas"], group["weight_decay"]) for group in adamw.param_groups}
    assert settings.pop("value_embeds.*.weight") == ((0.7, 0.99), 0.05)
    assert set(settings.values()) == {((0.8, 0.95), 0.0)}
    maps = [group for group in muon.param_groups if group["name"] == "value_embeds.*.proj_w"]
    assert [(len(group["params"]), group["weight_decay"], group["lr"]) for group in maps] == [(1, 0.01, 0.025)] * 2


@pytest.mark.parametrize("entry, num_heads, scale, heads", [
    ({"layers": [1]}, 4, "x", 4), ({"layers": [1], "heads": 5}, 4, "x", 3), ({"layers": [1], "heads": 4}, 1, "x", 1),
    ({"layers": [1], "heads": 3}, 4, "", 3), ({"layers": [1], "heads": 12}, 16, "x", 12)])
def test_heads_shrink_with_the_scale_rounded_up(entry, num_heads, scale, heads):
    assert checks.num_source_heads(checks.read_entry(entry), num_heads, scale) == heads


def test_equal_entries_are_one_configuration():
    entries = [{"source": "bigram", "layers": [0]}, {"layers": [1], "source": "token"}, {"layers": [2], "heads": 1}]
    assert train.Hyperparameters.__dataclass_fields__["value_embeddings"].metadata["check"](entries) == [
        {"layers": [0], "source": "bigram"}, [1], {"layers": [2], "heads": 1}]


@pytest.mark.slow
def test_all_kinds_at_once_on_1_2_and_4_ranks_and_after_a_kill(small_config, tmp_path):
    """Sources with fewer matrices than ranks too. A killed and resumed run has the losses of an undisturbed one."""
    config = small_config(value_embeddings=ALL_KINDS, value_embeddings_only=ONLY, value_embedding_gate=True,
                          num_heads=2, model_dim=256, num_iterations=3, val_loss_every=1, checkpoint_every=1)
    losses = {}
    for name, ranks, fault in (("one", 1, 0), ("two", 2, 0), ("four", 4, 0), ("killed", 2, 1), ("killed", 2, 0)):
        fault = "at_step(2, on_last(send(signal.SIGKILL)))" if fault else ""
        run = Ranks(tmp_path / f"output_{name}{bool(fault)}", config, "--run_id", 0, "--log_dir", tmp_path / name,
                    ranks=ranks, fault=fault)
        assert run.statuses() == ([1, -signal.SIGKILL] if fault else [0] * ranks), run.output("stderr")
        losses[name] = val_losses((tmp_path / name / "small/000.txt").read_text())
    assert list(losses["one"]) == [0, 1, 2, 3] and losses["killed"] == losses["two"]
    # AdamW's tiny eps turns the rounding of small gradients into steps: the tolerance is that of two-head golden cases.
    assert losses["two"] == pytest.approx(losses["one"], abs=3e-5) == losses["four"]
    assert "resumed at step 2" in (tmp_path / "killed/small/000.txt").read_text()
    assert os.listdir(tmp_path / "killed/small") == ["000.txt"]
