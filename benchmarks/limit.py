"""How far a step of SINGD's defaults is from the least that it can cost.

    python benchmarks/limit.py                       # the networks of price_bars.json
    python benchmarks/limit.py --networks resnet18

The least: weights and momenta are read and written once and gradients read once, at the rate of a
copy; every gradient meets a block of 64 rows on either side, at the rate of such products in the
cache; and a tenth of an update, which is three products a side, reads inputs and output gradients
once, and multiplies every row with its block. Rates are measured first, by the process time of one
thread, as the step is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from price import NETWORKS, STUDY, Run, measure
from tnkfac.optim.params.auto_structure import StructurePair

BYTES = 20
"""Of a number: gradient, and momentum and weight to and fro, in single precision."""


def seconds(work: Callable[[], object], count: int = 30) -> float:
    """Median process time of a call."""
    times = []
    for _ in range(count):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def rates() -> tuple[float, float]:
    """Bytes a second of a copy, and multiply-adds a second of products of blocks."""
    x, y = torch.randn(2, 1 << 24)
    moved = 8 * x.numel() / seconds(lambda: y.copy_(x))
    blocks, columns = torch.randn(8, 64, 64), torch.randn(8, 64, 256)
    out = torch.empty(8, 64, 256)
    each = seconds(lambda: [torch.bmm(blocks, columns, out=out) for _ in range(20)])
    return moved, 20 * 8 * 64 * 64 * 256 / each


def least(run: Run, moved: float, multiplied: float) -> tuple[float, float, float]:
    """Seconds of memory, of products, and of a tenth of an update.

    Args:
        run: After a backward pass that has measured.
        moved: Bytes a second.
        multiplied: Multiply-adds a second.
    """
    count = sum(p.numel() for p in run.model.parameters())
    products = update = 0.0
    for layer in run.optimizer._registry.layers:
        measured, shape = layer.statistics, layer.statistics.layer
        pair = StructurePair(
            (measured.k.name, measured.c.name), measured.k, measured.c, shape.groups
        )
        rows = int(measured.sums()[-1][1])
        products += shape.groups * (pair.k.numel * shape.out_dim + pair.c.numel * shape.in_dim)
        update += pair.update_work + rows * pair.numel
    return BYTES * count / moved, products / multiplied, update / multiplied / STUDY["interval"]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=STUDY["networks"])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    moved, multiplied = rates()
    print(f"copy {moved / 1e9:.1f} GB/s, products of blocks {multiplied / 1e9:.1f} GMAC/s")
    names = ("memory", "products", "update", "least", "step", "times")
    print(f"{'ms a step':16}" + "".join(f"{name:>10}" for name in names))
    for network in args.networks:
        run = Run(network, "SINGD", NETWORKS)
        run.loss().backward()
        parts = least(run, moved, multiplied)
        (row,) = measure(network, ["SINGD"], 1, NETWORKS)
        step = 1e-3 * row["passes_ms"] * row["mean"]
        figures = (*parts, sum(parts), step)
        line = "".join(f"{1e3 * figure:10.2f}" for figure in figures)
        print(f"{network:16}{line}{step / sum(parts):10.2f}", flush=True)


if __name__ == "__main__":
    main()
