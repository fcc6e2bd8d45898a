"""Convolution routines as planned tensor networks against PyTorch's own functionals.

    python benchmarks/operations.py --quick
    python benchmarks/operations.py --batch 8 --out benchmarks/results

Five routines (forward, input VJP, weight VJP, and the input factors of KFC and KFAC-reduce) over
the distinct convolutions of nine networks. For each layer three ways run interleaved in one
process: PyTorch (``conv``, its gradient functions, ``unfold`` and a matrix product), our plan, and
our plan without simplification. Printed are geometric means of the time ratio to PyTorch, below
one where the tensor network is faster, by network and by category of layer; all rows go to a CSV
file, and a box plot of the ratios beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.einsum import Network, networks, plan
from tnkfac.einsum.plans import Plan

LAYERS = Path(__file__).parent / "data" / "conv_layers.json"
LARGEST = 2**28  # entries of intermediate results; a plan that needs more is not run
Call = Callable[[], Tensor]
Row = dict[str, Any]


def distinct_layers(every: int) -> Iterator[Row]:
    """Every ``every``-th distinct convolution, with the name of its network."""
    nets = json.loads(LAYERS.read_text())["networks"]
    layers = [{**layer, "network": net} for net, row in nets.items() for layer in row["layers"]]
    yield from layers[::every]


def routines(layer: Row, batch: int, device: str) -> Iterator[tuple[str, Call, Network, Row]]:
    """Name, PyTorch's way, our network, and its tensors."""
    groups, kernel = layer["groups"], tuple(layer["kernel_size"])
    hyper = {name: tuple(layer[name]) for name in ("stride", "padding", "dilation")}
    x = torch.randn(batch, layer["in_channels"], *layer["input_size"], device=device)
    weight = torch.randn(layer["out_channels"], x.shape[1] // groups, *kernel, device=device)
    v = torch.randn_like(F.conv2d(x, weight, groups=groups, **hyper))
    shapes = {name: tuple(t.shape) for name, t in (("x", x), ("weight", weight), ("v", v))}
    ours = {**hyper, "groups": groups}
    size = shapes["x"][2:]

    def unfolded() -> Tensor:
        return F.unfold(x, kernel, hyper["dilation"], hyper["padding"], hyper["stride"])

    def kfc() -> Tensor:
        u = unfolded().unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
        return u @ u.transpose(1, 2) / u.shape[2]

    def reduce() -> Tensor:
        u = unfolded().mean(2).unflatten(1, (groups, -1)).transpose(0, 1)
        return u.transpose(1, 2) @ u / batch

    yield (
        "forward",
        lambda: F.conv2d(x, weight, groups=groups, **hyper),
        networks.conv(shapes["x"], shapes["weight"], **ours),
        {"x": x, "weight": weight},
    )
    yield (
        "input VJP",
        lambda: torch.nn.grad.conv2d_input(x.shape, weight, v, groups=groups, **hyper),
        networks.input_vjp(shapes["weight"], shapes["v"], size, **ours),
        {"weight": weight, "v": v},
    )
    yield (
        "weight VJP",
        lambda: torch.nn.grad.conv2d_weight(x, weight.shape, v, groups=groups, **hyper),
        networks.weight_vjp(shapes["x"], shapes["v"], kernel, **ours),
        {"x": x, "v": v},
    )
    yield "KFC", kfc, networks.kfc_factor(shapes["x"], kernel, **ours), {"x": x}
    yield "KFAC-reduce", reduce, networks.kfac_reduce_factor(shapes["x"], kernel, **ours), {"x": x}


def timed(call: Call, device: str) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(calls: list[Call | None], device: str, repeats: int, budget: float) -> list[float]:
    """Median seconds of each call; at least one repeat, then until the budget is spent."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        if call is not None:
            timed(call, device)  # plans and kernels; waits, so that none of it is left
    start = time.perf_counter()
    for done in range(repeats):
        if done and time.perf_counter() - start > budget:
            break
        for index, call in enumerate(calls):
            times[index].append(float("nan") if call is None else timed(call, device))
    return [statistics.median(t) for t in times]


def measure(layer: Row, args: argparse.Namespace) -> Iterator[Row]:
    """One row per routine."""
    for routine, torchs, network, tensors in routines(layer, args.batch, args.device):
        ours, raw = plan(network), Plan(network, simplified=False)
        expected, actual = torchs(), ours(**tensors)
        torch.testing.assert_close(
            actual.reshape(expected.shape), expected, rtol=1e-3, atol=1e-3 * expected.abs().max()
        )
        calls: list[Call | None] = [torchs, lambda p=ours, t=tensors: p(**t), None]
        if raw.peak_memory <= LARGEST and raw.flops <= 50 * max(ours.flops, 10**7):
            calls[2] = lambda p=raw, t=tensors: p(**t)
        torch_s, plan_s, raw_s = interleaved(calls, args.device, args.repeats, args.budget)
        yield {
            "network": layer["network"],
            "layer": layer["name"],
            "category": layer["category"],
            "routine": routine,
            "torch_ms": 1e3 * torch_s,
            "plan_ms": 1e3 * plan_s,
            "unsimplified_ms": 1e3 * raw_s,
            "ratio": plan_s / torch_s,
            "unsimplified_ratio": raw_s / torch_s,
        }


def geometric_mean(values: list[float]) -> float:
    """Of the numbers among the values."""
    numbers = [value for value in values if value == value]
    return statistics.geometric_mean(numbers) if numbers else float("nan")


def print_table(rows: list[Row], key: str) -> None:
    """Geometric means of both ratios by routine and by one column."""
    kinds = list(dict.fromkeys(row[key] for row in rows))
    names = list(dict.fromkeys(row["routine"] for row in rows))
    print(f"\ntime / PyTorch's time, geometric mean: plan (unsimplified), by {key}")
    print(f"{key:18}" + "".join(f"{name:>18}" for name in names))
    for kind in [*kinds, "all"]:
        cells = []
        for name in names:
            chosen = [r for r in rows if r["routine"] == name and kind in (r[key], "all")]
            ours, raw = (geometric_mean([r[c] for r in chosen]) for c in _RATIOS)
            cells.append(f"{ours:9.2f} ({raw:5.1f})")
        print(f"{kind:18}" + "".join(f"{cell:>18}" for cell in cells))


_RATIOS = ("ratio", "unsimplified_ratio")


def draw(rows: list[Row], path: Path) -> None:
    """Box plot of the ratios: one panel per routine, one pair of boxes per category."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["routine"] for row in rows))
    kinds = sorted({row["category"] for row in rows})
    figure, panels = plt.subplots(1, len(names), figsize=(3 * len(names), 4), sharey=True)
    for panel, name in zip(panels, names, strict=True):
        for offset, (column, color) in enumerate(zip(_RATIOS, ("C0", "C1"), strict=True)):
            data = [
                [r[column] for r in rows if (r["routine"], r["category"]) == (name, k)]
                for k in kinds
            ]
            data = [[v for v in column_values if v == v] for column_values in data]
            places = [2.5 * i + offset for i in range(len(kinds))]
            boxes = panel.boxplot(data, positions=places, widths=0.8, patch_artist=True)
            for box in boxes["boxes"]:
                box.set_facecolor(color)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_title(name)
        panel.set_xticks([2.5 * i + 0.5 for i in range(len(kinds))], kinds, rotation=30)
    panels[0].set_ylabel("time / PyTorch's time")
    figure.legend(
        handles=[
            plt.Rectangle((0, 0), 1, 1, color="C0", label="plan"),
            plt.Rectangle((0, 0), 1, 1, color="C1", label="plan without simplification"),
        ],
        loc="lower center",
        ncols=2,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every 6th layer, batch 2")
    parser.add_argument("--batch", type=int, default=8, help="batch size of all layers")
    parser.add_argument("--repeats", type=int, default=7, help="most repeats of a call")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per routine of a layer")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.repeats, args.budget = 2, 3, 0.4
    torch.manual_seed(0)
    rows: list[Row] = []
    for layer in distinct_layers(6 if args.quick else 1):
        rows += measure(layer, args)
        print(f"\r{len(rows)} rows", end="", flush=True)
    print_table(rows, "network")
    print_table(rows, "category")
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"operations-{args.device}-batch{args.batch}{'-quick' if args.quick else ''}"
    with (args.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    draw(rows, args.out / f"{name}.png")
    print(f"\nwritten: {args.out / name}.csv, .png; torch {torch.__version__}, {args.device}")


if __name__ == "__main__":
    main()
