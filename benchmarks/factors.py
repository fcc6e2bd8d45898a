"""Input factors of KFAC against the ways that users have today.

    python benchmarks/factors.py --quick
    python benchmarks/factors.py --batch 32 --out benchmarks/results

KFAC-expand and KFAC-reduce, dense and diagonal, over the distinct convolutions of nine networks
(and KFAC-expand of a list of transposed convolutions): ``tnkfac.curvature.input_factor`` against
im2col (``unfold`` and a matrix product) and the simplified networks of einconv, if it is installed.
For each layer the ways run interleaved in one process. Printed are geometric means of the peers'
time over ours, by network and by category, larger being better for us; every layer where a peer is
faster by more than 5 % when measured again; and whether the bars are met, which is also the exit
status. All rows go to a CSV file; beside it are a box plot of the ratios and the memory of both.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory import peak_bytes
from operations import distinct_layers, geometric_mean, timed
from peers import TRANSPOSED, Problem, einconv_simplified, im2col, transposed_module
from tnkfac.curvature import input_factor

QUANTITIES = tuple((a, s) for a in ("expand", "reduce") for s in ("dense", "diagonal"))
SLOWEST = 0.95
Row = dict[str, Any]


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Everything that is asked for."""
    for layer in distinct_layers(8 if args.quick else 1):
        if args.only not in f"{layer['network']} {layer['name']}":
            continue
        hyper = (layer["kernel_size"], layer["stride"], layer["padding"], layer["dilation"])
        if min(layer["kernel_size"]) < args.kernel or args.stride not in (0, max(layer["stride"])):
            continue
        groups = layer["groups"]
        module = nn.Conv2d(
            layer["in_channels"], groups, *map(tuple, hyper), groups=groups, bias=False
        ).to(args.device)
        shape = (args.batch, layer["in_channels"], *layer["input_size"])
        x = torch.randn(shape, device=args.device)
        for approx, structure in QUANTITIES:
            if args.quantity not in f"{approx} {structure}":
                continue
            yield Problem(
                layer["network"], layer["name"], layer["category"], module, x, approx, structure
            )
    for name, row in list(TRANSPOSED.items())[:: 4 if args.quick else 1]:
        if args.stride or args.kernel:
            break
        if args.only in f"transposed {name}" and args.quantity in "expand dense":
            transposed = transposed_module(row).to(args.device)
            x = torch.randn(args.batch, row[1], *[row[2]] * row[0], device=args.device)
            yield Problem("transposed", name, "transposed", transposed, x, "expand", "dense")


def interleaved(
    calls: list[Callable[[], Tensor] | None], args: argparse.Namespace, rounds: int
) -> list[float]:
    """Median milliseconds of every call."""
    times: list[list[float]] = [[] for _ in calls]
    spent = 0.0
    for turn in range(rounds + 1):  # the first warms up
        for index, call in enumerate(calls):
            seconds = float("nan") if call is None else timed(call, args.device)
            if turn or rounds == 0:
                times[index].append(1e3 * seconds)
            spent += 0.0 if call is None else seconds
        if turn and spent > args.budget * (1 + rounds / args.repeats):
            break
    return [statistics.median(t) for t in times]


def extra_memory(call: Callable[[], Tensor], device: str) -> float:
    """MiB at the peak, besides input and result."""
    if device == "cpu":
        result = call()
        return (peak_bytes(call) - result.numel() * result.element_size()) / 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    size = result.numel() * result.element_size()
    return (torch.cuda.max_memory_allocated() - before - size) / 2**20


def error(problem: Problem, found: Tensor) -> float:
    """Relative error of a result against im2col in float64; not a number where that is too big."""
    if problem.unfolded > 2**25:
        return float("nan")
    exact = Problem(**{**vars(problem), "x": problem.x.double()})
    reference = im2col(exact)()
    return float((found.double() - reference).norm() / reference.norm())


def measure(problem: Problem, args: argparse.Namespace) -> Row:
    """Times, memory and error of one factor."""
    m, x = problem.module, problem.x

    def ours() -> Tensor:
        factor = input_factor(m, x, problem.approx, problem.structure)
        assert isinstance(factor, Tensor)
        return factor

    fits = problem.unfolded <= args.most
    plain = im2col(problem) if fits else None
    reference = einconv_simplified(problem)
    calls = [ours, plain, reference]
    found = ours()
    for peer in (plain, reference):
        if peer is not None:
            torch.testing.assert_close(
                peer(), found, rtol=1e-3, atol=1e-3 * float(found.abs().max())
            )
    times = interleaved(calls, args, args.repeats)
    for attempt in range(3):
        if _ratio(times) >= SLOWEST:
            break
        times = interleaved(calls, args, args.repeats * 3 * (attempt + 1))
    return {
        "network": problem.network,
        "layer": problem.name,
        "category": problem.category,
        "quantity": problem.quantity,
        "kernel": min(m.kernel_size),
        "stride": max(m.stride),
        "ours_ms": times[0],
        "im2col_ms": times[1],
        "einconv_ms": times[2],
        "im2col_ratio": times[1] / times[0],
        "einconv_ratio": times[2] / times[0],
        "ratio": _ratio(times),
        "ours_mib": extra_memory(ours, args.device),
        "im2col_mib": extra_memory(plain, args.device) if plain is not None else float("nan"),
        "input_mib": x.numel() * x.element_size() / 2**20,
        "padded_mib": _padded(problem) * x.element_size() / 2**20,
        "error": error(problem, found),
    }


def _padded(problem: Problem) -> int:
    """Numbers of the input with padding."""
    m, x = problem.module, problem.x
    numbers = x.shape[0] * x.shape[1]
    for size, padding in zip(x.shape[2:], m.padding, strict=True):
        numbers *= size + 2 * padding
    return int(numbers)


def _ratio(times: list[float]) -> float:
    """Time of the faster peer over ours."""
    peers = [t for t in times[1:] if t == t]
    return min(peers) / times[0] if peers else float("nan")


def bars(rows: list[Row]) -> Iterator[tuple[str, float, bool]]:
    """Every bar, what was measured, and whether it is met; nothing for what did not run."""

    def mean(column: str, chosen: list[Row], least: float, text: str) -> Iterator[Any]:
        value = geometric_mean([row[column] for row in chosen])
        if value == value:
            yield f"{text}: at least {least:g}x", value, value >= least

    convs = [r for r in rows if r["network"] != "transposed"]
    reduce = [r for r in convs if r["quantity"] == "reduce dense"]
    large = [r for r in reduce if r["kernel"] >= 3]
    yield from mean("im2col_ratio", large, 10, "reduce, K >= 3, against im2col")
    yield from mean("einconv_ratio", reduce, 3, "reduce, all, against einconv")
    expand = [r for r in convs if r["quantity"] == "expand dense" and r["kernel"] >= 3]
    plain = [r for r in expand if r["stride"] == 1]
    yield from mean("ratio", plain, 4, "expand, stride 1, K >= 3, against the better peer")
    strided = [r for r in rows if r["network"] == "transposed" and r["stride"] > 1]
    yield from mean("im2col_ratio", strided, 10, "transposed, stride > 1, against im2col")
    slowest = min(rows, key=lambda r: r["ratio"] if r["ratio"] == r["ratio"] else 9.0)
    text = f"slowest against the better peer ({slowest['layer']}, {slowest['quantity']})"
    yield f"{text}: at least {SLOWEST}", slowest["ratio"], slowest["ratio"] >= SLOWEST
    used = [r["ours_mib"] / r["im2col_mib"] for r in expand if r["im2col_mib"] > 0]
    if used:
        yield (
            "expand, K >= 3, memory over im2col's, largest: at most 0.25",
            max(used),
            (max(used) <= 0.25),
        )
    if large:
        most = max(r["ours_mib"] - r["padded_mib"] for r in large)  # a table of box ends is left
        yield "reduce, K >= 3, MiB beyond the padded input: at most 0.05", most, most <= 0.05
    errors = [r["error"] for r in rows if r["error"] == r["error"]]
    if errors:
        yield "largest relative error in float32: at most 2e-5", max(errors), max(errors) <= 2e-5


def print_table(rows: list[Row], key: str) -> None:
    """Geometric means of both ratios by quantity and by one column."""
    kinds = list(dict.fromkeys(row[key] for row in rows))
    names = list(dict.fromkeys(row["quantity"] for row in rows))
    print(f"\npeers' time / ours, geometric means: im2col | einconv, by {key}")
    print(f"{key:18}" + "".join(f"{name:>22}" for name in names))
    for kind in [*kinds, "all"]:
        cells = []
        for name in names:
            chosen = [r for r in rows if r["quantity"] == name and kind in (r[key], "all")]
            pair = (geometric_mean([r[c] for r in chosen]) for c in _RATIOS)
            cells.append(" | ".join("-".rjust(7) if v != v else f"{v:7.1f}" for v in pair))
        print(f"{kind:18}" + "".join(f"{cell:>22}" for cell in cells))


_RATIOS = ("im2col_ratio", "einconv_ratio")


def draw(rows: list[Row], path: Path) -> None:
    """Box plot of the ratios per category, and memory against im2col's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["quantity"] for row in rows))
    figure, panels = plt.subplots(
        1, len(names) + 1, figsize=(3.2 * (len(names) + 1), 4), layout="constrained"
    )
    for panel, name in zip(panels, names, strict=False):
        kinds = list(dict.fromkeys(r["category"] for r in rows if r["quantity"] == name))
        for offset, (column, color) in enumerate(zip(_RATIOS, ("C0", "C1"), strict=True)):
            for place, kind in enumerate(kinds):
                chosen = [r for r in rows if (r["quantity"], r["category"]) == (name, kind)]
                values = [r[column] for r in chosen if r[column] == r[column]]
                if values:
                    box = panel.boxplot(
                        [values], positions=[2.5 * place + offset], widths=0.8, patch_artist=True
                    )
                    box["boxes"][0].set_facecolor(color)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_title(name)
        panel.set_xticks([2.5 * i + 0.5 for i in range(len(kinds))], kinds, rotation=45, ha="right")
    panels[0].set_ylabel("peer's time / our time")
    handles = [
        plt.Rectangle((0, 0), 1, 1, color="C0", label="im2col"),
        plt.Rectangle((0, 0), 1, 1, color="C1", label="einconv, simplified"),
    ]
    panels[0].legend(handles=handles, fontsize=8)
    scatter = panels[-1]
    for index, name in enumerate(names):
        chosen = [r for r in rows if r["quantity"] == name and r["im2col_mib"] == r["im2col_mib"]]
        x = [max(r["im2col_mib"], 1e-3) for r in chosen]
        y = [max(r["ours_mib"], 1e-3) for r in chosen]
        scatter.scatter(x, y, s=10, color=f"C{index + 2}", label=name)
    ends = scatter.get_xlim()
    scatter.plot([1e-3, ends[1]], [1e-3, ends[1]], color="black", linewidth=0.8)
    scatter.set(xscale="log", yscale="log", xlabel="im2col [MiB]", ylabel="ours [MiB]")
    scatter.set_title("extra memory")
    scatter.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every 8th layer, batch 8")
    parser.add_argument("--batch", type=int, default=32, help="batch size (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="most repeats of a call")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds per factor")
    parser.add_argument("--most", type=float, default=2**30, help="most numbers to unfold")
    parser.add_argument("--only", default="", help="part of 'network layer'")
    parser.add_argument("--quantity", default="", help="part of 'expand dense' and so on")
    parser.add_argument("--kernel", type=int, default=0, help="smallest kernel")
    parser.add_argument("--stride", type=int, default=0, help="only this stride")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.repeats, args.budget = min(args.batch, 8), 3, 0.5
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows: list[Row] = []
    for problem in problems(args):
        rows.append(measure(problem, args))
        print(f"\r{len(rows)} factors", end="", file=sys.stderr, flush=True)
    if not rows:
        parser.error("--only and --quantity leave nothing to measure.")
    print_table(rows, "network")
    print_table(rows, "category")
    losing = [r for r in rows if r["ratio"] < SLOWEST]
    print(f"\nslower than {SLOWEST} of the better peer: {len(losing)} of {len(rows)}")
    for row in losing:
        print(f"  {row['network']} {row['layer']}, {row['quantity']}: {row['ratio']:.2f}")
    checked = list(bars(rows))
    print()
    for text, value, met in checked:
        print(f"{'met   ' if met else 'MISSED'}  {text}: {value:.3g}")
    write(rows, args)
    return 0 if all(met for _, _, met in checked) else 1


def write(rows: list[Row], args: argparse.Namespace) -> None:
    """CSV and pictures."""
    args.out.mkdir(parents=True, exist_ok=True)
    part = "".join(f"-{v}".replace(" ", "-") for v in (args.only, args.quantity) if v)
    part += "".join(f"-{k}{getattr(args, k)}" for k in ("kernel", "stride") if getattr(args, k))
    part += "-quick" if args.quick else ""
    name = f"factors-{args.device}-batch{args.batch}{part}"
    with (args.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    draw(rows, args.out / f"{name}.png")
    threads = torch.get_num_threads()
    print(f"\nwritten: {args.out / name}.csv, .png; torch {torch.__version__}, {threads} threads")


if __name__ == "__main__":
    raise SystemExit(main())
