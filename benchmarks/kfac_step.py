"""Mean cost of a step of KFAC over that of SGD, when factors and inverses are updated now and then.

    python benchmarks/kfac_step.py
    python benchmarks/kfac_step.py --quick

Steps come in three kinds: without an update, with an update of the factors, and with new
decompositions on top. Networks of the same weights are trained side by side with SGD and with KFAC
that does each kind, in turns. Each time is divided by that of SGD's step before it, and the medians
of these ratios are weighted by how often each kind occurs. The exit status tells whether the mean
stays below the bar.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch.nn import functional

import tnkfac

BAR = 1.15


def prepare(args: argparse.Namespace, build: Callable[[Any], Any]) -> Callable[[], float]:
    """A network with its optimizer: a function that does a step and returns its seconds."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.arch, num_classes=100).to(args.device).train()
    optimizer = build(model)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    y = torch.randint(100, (args.batch,), device=args.device)

    def step() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def kfac(args: argparse.Namespace, factors: int, inverses: int) -> Callable[[Any], Any]:
    """KFAC with some intervals; one far away means never again after the first step."""
    return lambda model: tnkfac.KFAC(
        model.parameters(),
        lr=1e-3,
        structures=args.structures,
        kfac_approx=args.approx,
        factor_update_steps=factors,
        inv_update_steps=inverses,
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--structures", default="auto")
    parser.add_argument("--approx", default="expand")
    parser.add_argument("--factors", type=int, default=10, help="steps between updates of factors")
    parser.add_argument("--inverses", type=int, default=100, help="and between decompositions")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="batch 4, 64 x 64 pixels, 3 rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.size, args.rounds = 4, 64, 3
    never = 10**9
    ways = {
        "without update": prepare(args, kfac(args, never, never)),
        "with factors": prepare(args, kfac(args, 1, never)),
        "with factors and inverses": prepare(args, kfac(args, 1, 1)),
    }
    sgd = prepare(args, lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(args.rounds + 2):  # the first two make state, plans and the second taps
        for name, step in ways.items():
            before, seconds = sgd(), step()
            if number >= 2:
                found[name].append((seconds, seconds / before))
    ratios = {}
    for name, pairs in found.items():
        seconds, ratios[name] = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:28}{1e3 * seconds:10.1f} ms{ratios[name]:8.3f} x SGD")
    every, inverse = 1 / args.factors, 1 / args.inverses
    ratio = (
        (1 - every) * ratios["without update"]
        + (every - inverse) * ratios["with factors"]
        + inverse * ratios["with factors and inverses"]
    )
    print(f"{'mean step':41}{ratio:8.3f} x SGD")
    print(f"{'met' if ratio <= BAR else 'MISSED'}: at most {BAR} x SGD")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
