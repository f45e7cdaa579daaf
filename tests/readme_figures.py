"""Print the figures in the READMEs that no other command prints. Each function names its README.

    .venv/bin/python tests/readme_figures.py                       # after ./run.sh compare, which installs SciPy
    ./run.sh configs/add_{1,3,5}.toml --scale tiny --save_checkpoint true
    .venv/bin/python tests/readme_figures.py logs/tiny/*/000.ckpt  # also those of saved weights at `tiny`
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr, t

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.shards import open_shards
from logs.plot import layers_of
from logs.results import Curve, read_configurations
from logs.run_statistics import Comparison, final_slopes

PUBLISHED = ROOT / "logs/published"


def compare(*paths, baseline="baseline", runs=None):
    return Comparison(runs or read_configurations([*paths])[0], baseline, None)


def published_runs():
    """configs/README.md, "Findings in the published runs"; logs/README.md, "Better?"."""
    comparison = compare(PUBLISHED, baseline="baseline_ttest")
    losses, loss = comparison.losses, comparison.loss
    zero, repeats = losses["baseline_ttest"].mean(), len(losses["baseline_ttest"])
    for words, names in (("a table fewer", ["remove_0_13", "remove_1_14", "remove_2_15"]),
                         ("shared tables", ["share_01_1415", "share_012_131415"]),
                         ("a use fewer", [f"remove_{layer}" for layer in (0, 1, 13, 14, 15)])):
        sample = np.concatenate([losses[name] for name in names])
        statistic = (sample.mean() - zero) / loss.deviation / np.sqrt(1 / len(sample) + 1 / repeats)
        print(f"{words}, {len(sample)} runs: {sample.mean() - zero:+.4f} nats, t {statistic:.1f}, "
              f"p {2 * t.sf(abs(statistic), loss.dof):.1g}")
    removals = [name for name in losses if name.startswith("remove_")]
    for words, names in (("all removals", removals), ("of one use", [n for n in removals if n.count("_") == 1])):
        both = np.array([losses[name] for name in names])
        print(f"{words}, first and second losses: Spearman {spearmanr(*both.T).statistic:.2f}, "
              f"p {spearmanr(*both.T).pvalue:.2g}, {len(names)} maps")
    print(f"baseline's final slope {final_slopes(comparison.curves['baseline_ttest'])[0]:.2g}, gain from 5820 to 5960 "
          f"steps {(losses['record_add_2'].mean() - losses['record'].mean()) / 140:.2g} nats a step")
    runs = dict(comparison.runs)
    runs["record"] = [run._replace(curve=Curve(*(column[is_kept] for column in run.curve))) for run in runs["record"]
                      for is_kept in [(run.curve.steps % 1000 == 0) | (run.curve.steps == run.num_iterations)]]
    rare = compare(baseline="baseline_ttest", runs=runs)
    later = [rare.time.samples["record"].mean() - comparison.time.samples["record"].mean(),
             rare.crossings["record"].seconds - comparison.crossings["record"].seconds]
    print(f"validated every 1000 steps, record is {later[0]:.1f} s later, {later[1]:.1f} s in the mean curve")


def maps_at_tiny():
    """logs/published/README.md, "tiny_maps"."""
    small, large = compare(PUBLISHED / "tiny", PUBLISHED / "tiny_maps"), compare(PUBLISHED)
    names = [name for name in small.loss.samples if name in large.loss.samples]
    uses = np.array([sum(map(len, layers_of(small.keys[name]))) for name in names])
    y = np.array([large.losses[name].mean() for name in names])
    x = np.array([small.losses[name].mean() for name in names])
    seeds = [np.array([small.losses[name][seed] for name in names]) for seed in (0, 1)]
    a, b, c = (spearmanr(*pair).statistic for pair in ((x, y), (uses, x), (uses, y)))
    r, n = (a - b * c) / ((1 - b**2) * (1 - c**2)) ** 0.5, len(names)
    low, high = np.tanh(np.arctanh(r) + np.array([-1.96, 1.96]) * np.sqrt((1 + r**2 / 2) / (n - 4)))
    print(f"{n} maps: Spearman {a:.2f}, seeds alone {[round(float(spearmanr(s, y)[0]), 2) for s in seeds]}; with the "
          f"uses {b:.2f} and {c:.2f}; given them {r:.2f} ({low:.2f} to {high:.2f}); among maps of 4, 5, 6 uses "
          f"{[round(float(spearmanr(x[uses == u], y[uses == u])[0]), 2) for u in (4, 5, 6)]}")


def ids_of_small_scales():
    """configs/README.md, "Scales": of the shards that ./run.sh makes."""
    for folder, vocab_size, steps in (("local_text", 257, 160), ("local_text_bpe", 2048, 200)):
        if not any((ROOT / "data" / folder).glob("local_train_*.bin")):
            continue
        (shard,) = open_shards(f"{ROOT}/data/{folder}/local_train_*.bin", vocab_size)
        tokens = shard.read(0, steps * 2048).reshape(steps, 2048)
        is_there = np.array([np.bincount(step, minlength=vocab_size) > 0 for step in tokens])
        used = is_there.any(axis=0)
        print(f"{folder}: {is_there.sum(axis=1).mean():.0f} of {used.sum()} ids in a step, the median id in "
              f"{np.median(is_there[:, used].mean(axis=0)):.0%} of the steps")
        if vocab_size == 257:
            text = shard.read(0, shard.num_tokens).astype(int)
            pairs = np.stack([text[1:], text[:-1]])[:, text[1:] != 256]
            pairs, counts = np.unique(pairs, axis=1, return_counts=True)
            most_frequent = np.zeros(1919, int)
            np.maximum.at(most_frequent, (36313 * pairs[0] ^ 27191 * pairs[1]) % 1919, counts)
            print(f"{len(counts)} pairs; {most_frequent.sum() / counts.sum():.0%} are the most frequent of their row")


def validation_text(checkpoints):
    """logs/published/README.md, "tiny": the error that 65,536 tokens leave in a difference of two saved models."""
    import torch

    import train_gpt_medium as train
    from configs.config import load
    from data.loader import val_sequences
    losses = []
    for path in map(Path, checkpoints):
        hp = load(train.Hyperparameters, ROOT / f"configs/{path.parent.name}.toml", {"scale": "tiny"})
        model = train.GPT(hp)
        model.load_state_dict(train.checkpoint.read_weights(str(path), model))
        window = torch.tensor(train.window_blocks(hp.num_iterations, hp.num_iterations), dtype=torch.int32)
        sequences = val_sequences(open_shards(hp.val_files, hp.vocab_size), hp.val_seq_len, hp.num_val_sequences, 0, 1,
                                  torch.device("cpu"))
        with torch.no_grad():
            losses.append([model(inputs, targets, window).item() for _, inputs, targets in sequences])
    for path, other in zip(checkpoints[1:], losses[1:]):
        blocks = (np.array(other) - losses[0]).reshape(-1, 8).mean(axis=1)  # 2,048 tokens each
        print(f"{path} minus {checkpoints[0]}: {blocks.mean():+.4f}, standard error "
              f"{blocks.std(ddof=1) / len(blocks) ** 0.5:.4f}")


if __name__ == "__main__":
    published_runs()
    maps_at_tiny()
    ids_of_small_scales()
    if checkpoints := sys.argv[1:]:
        validation_text(checkpoints)
