"""What the curvature of weights is worth that models use without calling a layer.

    python benchmarks/uses.py            # 7 minutes on one core

A GPT-2 (``Conv1D``), a vision transformer (``nn.MultiheadAttention``) and a mixture of experts
(3-d parameters) are trained by SINGD, with these weights captured at their calls and with these
left to the fallback. Both have their best learning rate of the same grid, found with another seed.
The target is the loss that the fallback has after four fifths of its steps.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, log
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnkfac
from quality_tasks import CONTEXT, digits, text

RESULTS = Path(__file__).parent / "results" / "uses.csv"
LRS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (1, 2, 3)
SMOOTH = 10


@dataclass(frozen=True)
class Task:
    """A network that uses weights by itself, and its data.

    Attributes:
        build: Makes it.
        left: What ``skip_layers`` names to leave these weights to the fallback.
        draw: A batch.
        loss: Of the network and a batch.
    """

    build: Callable[[], nn.Module]
    left: list[str]
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Tensor, Tensor], Tensor]


SIZES = {"vocab_size": 128, "use_cache": False}


def gpt2() -> nn.Module:
    """Two blocks of GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, **SIZES, **dropouts)
    return GPT2LMHeadModel(config)


def vit() -> nn.Module:
    """Three blocks of torchvision's vision transformer, on sixteen patches."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(8, 2, 3, 4, 48, 96, num_classes=10)
    model.conv_proj = nn.Conv2d(1, 48, 2, 2)
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def mixture() -> nn.Module:
    """Two blocks of Mixtral with four experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES,
    )
    return MixtralForCausalLM(config)


def next_codes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of the next code."""
    return F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten())


def classes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of the class."""
    return F.cross_entropy(model(x), y)


TASKS = {
    "GPT-2": Task(gpt2, ["Conv1D"], lambda g: text(g, 16, False), next_codes),
    "ViT": Task(vit, ["MultiheadAttention"], lambda g: digits(g, 64, False), classes),
    "Mixtral": Task(mixture, ["MixtralExperts"], lambda g: text(g, 16, False), next_codes),
}


def losses(task: Task, captured: bool, lr: float, seed: int, steps: int) -> list[float]:
    """Training losses."""
    torch.manual_seed(seed)
    model = task.build().train()
    if isinstance(getattr(model, "hidden_dim", None), int):  # of torchvision: for three channels
        model._process_input = lambda x: model.conv_proj(x).flatten(2).mT  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    skipped = () if captured else task.left
    optimizer = tnkfac.SINGD(model.parameters(), lr=lr, skip_layers=skipped)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, *task.draw(generator))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.item())
    return found


def smoothed(values: list[float]) -> list[float]:
    """Means over the last steps, from the first step on that has so many."""
    return [sum(values[i - SMOOTH : i]) / SMOOTH for i in range(SMOOTH, len(values) + 1)]


def reached(values: list[float], target: float) -> float:
    """Steps until the smoothed loss is at most the target."""
    return next((i + SMOOTH for i, v in enumerate(smoothed(values)) if v <= target), inf)


def main(argv: list[str] | None = None) -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--lrs", type=float, nargs="+", default=list(LRS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    rows = []
    print(f"{'':10}{'lr':>8}{'lr, left':>10}{'steps':>18}{'steps, left':>18}{'ratio':>8}")
    for name in args.tasks:
        task, started = TASKS[name], time.process_time()
        best = {}
        for captured in (True, False):
            finals = {
                lr: smoothed(losses(task, captured, lr, 0, args.steps))[-1] for lr in args.lrs
            }
            best[captured] = min(finals, key=lambda lr: finals[lr] if finals[lr] > 0 else inf)
        counts: dict[bool, list[float]] = {True: [], False: []}
        for seed in args.seeds:
            runs = {c: losses(task, c, best[c], seed, args.steps) for c in (True, False)}
            target = min(smoothed(runs[False])[: int(0.8 * args.steps) - SMOOTH + 1])
            for captured, values in runs.items():
                steps = reached(values, target)
                counts[captured].append(steps)
                rows.append([name, captured, best[captured], seed, target, steps, values[-1]])
        ratios = [a / b for a, b in zip(counts[True], counts[False], strict=True)]
        mean = exp(sum(map(log, ratios)) / len(ratios))
        words = [" ".join(f"{steps:g}" for steps in counts[c]) for c in (True, False)]
        print(
            f"{name:10}{best[True]:>8g}{best[False]:>10g}{words[0]:>18}{words[1]:>18}{mean:>8.2f}"
            f"   {time.process_time() - started:.0f} s",
            flush=True,
        )
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "captured", "lr", "seed", "target", "steps", "last loss"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
