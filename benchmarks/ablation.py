"""What each default is worth: one change at a time, steps to target on the tuning seed.

    python benchmarks/ablation.py                # runs that are missing, then the table
    python benchmarks/ablation.py --shard 0/2    # every second variant; another process does 1/2
    python benchmarks/ablation.py --report       # the table alone

Tasks, budget, schedule and targets are those of ``quality.py`` (all tasks but the three slowest),
and three of its learning rates; the best counts, all steps where none reaches the target.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quality
import tnkfac
from quality_tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "ablation.csv"
FIELDS = ("variant", "task", "lr", "steps", "final")
LEFT_OUT = ("ResNet on textures", "ViT on textures", "GPT on documentation")
CHOSEN = [name for name in TASKS if name not in LEFT_OUT]
LRS = (3e-3, 1e-2, 3e-2)
TINY = 8
"""Batch size of the variants that are about small batches."""
Build = Callable[[nn.Module, float], Any]


def singd(**options: Any) -> Build:
    """SINGD with dense factors, but for these options."""
    return lambda m, lr: tnkfac.SINGD(
        m.parameters(), lr=lr, **{"structures": "dense", **_at(options, lr)}
    )


def kfac(**options: Any) -> Build:
    """KFAC with dense factors, but for these options."""
    return lambda m, lr: tnkfac.KFAC(
        m.parameters(), lr=lr, **{"structures": "dense", **_at(options, lr)}
    )


def _at(options: dict[str, Any], lr: float) -> dict[str, Any]:
    """Options in which ``fallback`` multiplies the learning rate of the fallback."""
    options = dict(options)
    if "times" in options:
        options["fallback_options"] = {"lr": lr * options.pop("times")}
    return options


def falling(step: int) -> float:
    """A step size of the preconditioner that averages the first batches evenly."""
    return max(0.2, 10 / (10 + step))


def biases_by_adamw(model: nn.Module, lr: float) -> quality.Together:
    """SINGD without the biases of its layers."""
    biases = [p for n, p in model.named_parameters() if n.endswith("bias") and "norm" not in n]
    mine = {id(p) for p in biases}
    others = [p for p in model.parameters() if id(p) not in mine]
    first = tnkfac.SINGD(others, lr=lr, structures="dense")
    return quality.Together(first, torch.optim.AdamW(biases, lr=lr))


VARIANTS: dict[str, Build] = {
    "AdamW": quality.OPTIMIZERS["AdamW"],
    "SINGD dense, defaults": singd(),
    "momentum=0.9": singd(momentum=0.9),
    "momentum=0.5": singd(momentum=0.5),
    "momentum=0.0": singd(momentum=0.0),
    "damping=1e-3": singd(damping=1e-3),
    "relative_damping=0.003": singd(relative_damping=0.003),
    "relative_damping=0.3": singd(relative_damping=0.3),
    "lr_cov=0.01": singd(lr_cov=0.01),
    "lr_cov=0.05": singd(lr_cov=0.05),
    "lr_cov=0.5": singd(lr_cov=0.5),
    "lr_cov falling from 1 to 0.2": singd(lr_cov=falling),
    "alpha1=0.0": singd(alpha1=0.0),
    "alpha1=0.9": singd(alpha1=0.9),
    'init="identity"': singd(init="identity"),
    "T=1": singd(T=1),
    "T=1, lr_cov=0.02": singd(T=1, lr_cov=0.02),
    "T=3": singd(T=3),
    "T=30": singd(T=30),
    "T growing from 1 to 10": singd(T="auto"),
    'grafting="rms"': singd(grafting="rms"),
    'grafting="adam"': singd(grafting="adam"),
    'grafting="sgd"': singd(grafting="sgd"),
    "grafting=None, kl_clip=1e-3": singd(grafting=None, kl_clip=1e-3, momentum=0.9),
    'kfac_approx="reduce"': singd(kfac_approx="reduce"),
    "kfac_like=True": singd(kfac_like=True, alpha1=0.0),
    "normalize_lr_cov=True": singd(normalize_lr_cov=True),
    "biases by AdamW": biases_by_adamw,
    "fallback lr x 0.3": singd(times=0.3),
    "fallback lr x 3": singd(times=3.0),
    'structures="auto"': singd(structures="auto"),
    'structures="block32diagonal"': singd(structures="block32diagonal"),
    'structures="hierarchical16_16"': singd(structures="hierarchical16_16"),
    'structures=("dense", "diagonal")': singd(structures=("dense", "diagonal")),
    'structures=("diagonal", "dense")': singd(structures=("diagonal", "dense")),
    'structures="diagonal"': singd(structures="diagonal"),
    "KFAC, defaults": kfac(),
    "KFAC, classic": kfac(damping=1e-3),
    'KFAC, compute_method="cholesky"': kfac(compute_method="cholesky"),
    'KFAC, compute_method="ekfac"': kfac(compute_method="ekfac"),
    "KFAC, factor_decay=0.8": kfac(factor_decay=0.8),
    "KFAC, inv_update_steps=1": kfac(inv_update_steps=1),
    'KFAC, fisher_type="forward-only"': kfac(fisher_type="forward-only"),
    f"batches of {TINY}": singd(),
    f'batches of {TINY}, init="identity"': singd(init="identity"),
    f"batches of {TINY}, AdamW": quality.OPTIMIZERS["AdamW"],
}


def run(variant: str, task: str, lr: float) -> dict[str, Any]:
    """One row of the results."""
    whole = TASKS[task]
    if variant.startswith("batches of"):
        TASKS[task] = replace(whole, batch_size=TINY)
    try:
        seed, steps = quality.STUDY["tuning_seed"], quality.STUDY["steps"]
        found = quality.run(task, VARIANTS[variant], lr, seed, steps)
    finally:
        TASKS[task] = whole
    return {"variant": variant, "task": task, "lr": lr, **{k: found[k] for k in FIELDS[3:]}}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: steps by task, and their geometric mean over that of AdamW."""
    steps: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["variant"], row["task"]
        steps[key] = min(steps.get(key, math.inf), float(row["steps"] or quality.STUDY["steps"]))
    lines = [f"| one change | {' | '.join(CHOSEN)} | mean |", "|---" * (len(CHOSEN) + 2) + "|"]
    for variant in VARIANTS:
        found = [steps.get((variant, task)) for task in CHOSEN]
        if None in found:
            continue
        logs = [math.log(s / steps["AdamW", t]) for s, t in zip(found, CHOSEN, strict=True) if s]
        cells = [f"{s:.0f}" for s in found if s] + [f"{math.exp(statistics.fmean(logs)):.2f}"]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th variant")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shard, shards = map(int, args.shard.split("/"))
    own = args.out.with_suffix(f".{shard}.csv") if shards > 1 else args.out
    done = {(r["variant"], r["task"], float(r["lr"])) for r in quality.read(args.out)}
    for index, variant in enumerate([] if args.report else VARIANTS):
        for task in CHOSEN if index % shards == shard else []:
            for lr in LRS:
                if (variant, task, lr) not in done:
                    quality.append(own, FIELDS, run(variant, task, lr))
    if shards == 1:
        print("\n".join(table(quality.merge(args.out, FIELDS))))


if __name__ == "__main__":
    main()
