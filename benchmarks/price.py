"""What optimizers cost over forward and backward, side by side with AdamW, Muon and SOAP.

    python benchmarks/price.py                        # five networks, a quarter of an hour
    python benchmarks/price.py --networks gpt2        # a GPT-2 of 124 M parameters; 8 GiB
    python benchmarks/price.py --optimizers AdamW SINGD
    python benchmarks/price.py --quick                # one network, small images, nothing is kept

All optimizers train copies of a network in one process, an iteration of each in turns. Times are
process time over AdamW's forward and backward pass: the first step with its passes, which makes
state and, with SINGD, measures curvature; the mean of a step over an interval of ten, with what
hooks add to passes; a step that updates nothing. Memory is in numbers over those of the parameters:
the state, and what is kept beside it. The exit status tells whether the bars of
``price_bars.json`` are met.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import tnkfac
from quality import muon
from quality_tasks import GPT

STUDY = json.loads(Path(__file__).with_name("price_bars.json").read_text(encoding="utf-8"))
RESULTS = Path(__file__).parent / "results" / "price.csv"
FIELDS = ("network", "optimizer", "passes_ms", "first", "mean", "plain", "state", "kept")
Data = tuple[Tensor, Tensor]
Row = dict[str, Any]


def images(batch: int, size: int) -> Data:
    """Noise, and one of a thousand classes for each."""
    return torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))


def words(count: int, batch: int, length: int) -> Data:
    """Random words, and random ones that follow."""
    return torch.randint(count, (batch, length)), torch.randint(count, (batch, length))


def deit_tiny(size: int = 224) -> nn.Module:
    """torchvision has no vision transformer of width 192."""
    import timm

    model: nn.Module = timm.create_model("deit_tiny_patch16_224", img_size=size)
    return model


def gpt2() -> nn.Module:
    """The smallest GPT-2, whose head has the weight of its embedding."""
    model = GPT(50257, 1024, 768, 12, 12)
    model.head = nn.Linear(768, 50257, bias=False)
    model.head.weight = model.token.weight
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {
    "resnet18": (torchvision.models.resnet18, partial(images, 32, 64)),
    "densenet121": (torchvision.models.densenet121, partial(images, 32, 64)),
    "deit_tiny": (deit_tiny, partial(images, 8, 224)),
    "convnext_tiny": (torchvision.models.convnext_tiny, partial(images, 8, 128)),
    "gpt": (partial(GPT, 8192, 256, 384, 6, 6), partial(words, 8192, 4, 256)),
    "gpt2": (gpt2, partial(words, 50257, 1, 128)),
    "vit_b_16": (torchvision.models.vit_b_16, partial(images, 1, 224)),
    "resnet50": (torchvision.models.resnet50, partial(images, 8, 128)),
}
QUICK = {"resnet18": (torchvision.models.resnet18, partial(images, 2, 32))}


def soap(model: nn.Module) -> Any:
    """SOAP of ``pytorch_optimizer`` with a decomposition at every tenth step."""
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), precondition_frequency=10)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "Muon": lambda m: muon(m, 1e-3),
    "SOAP": soap,
    "SINGD": lambda m: tnkfac.SINGD(m.parameters()),
    "SINGD diagonal": lambda m: tnkfac.SINGD(m.parameters(), structures="diagonal"),
    "KFAC": lambda m: tnkfac.KFAC(m.parameters()),
}


class Run:
    """One optimizer on its copy of a network.

    Attributes:
        passes: Seconds of every forward and backward pass.
        steps: Seconds of every step.
    """

    def __init__(self, network: str, name: str, networks: dict[str, Any]) -> None:
        build, draw = networks[network]
        torch.manual_seed(0)
        self.model = build()
        self.x, self.y = draw()
        self.passes: list[float] = []
        self.steps: list[float] = []
        self.loss().backward()  # plans of the libraries
        self.optimizer = OPTIMIZERS[name](self.model)
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        """Of one forward pass."""
        output = self.model(self.x)
        return functional.cross_entropy(output.reshape(self.y.numel(), -1), self.y.reshape(-1))

    def iterate(self) -> None:
        """One iteration."""
        begin = time.process_time()
        self.loss().backward()
        middle = time.process_time()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.passes.append(middle - begin)
        self.steps.append(time.process_time() - middle)

    def memory(self) -> tuple[float, float]:
        """Numbers of the state, and of what is kept beside it, over those of the parameters."""
        single = getattr(self.optimizer, "optimizers", (self.optimizer,))
        state = [v for o in single for s in o.state.values() for v in s.values()]
        tensors = [t for v in state for t in (v if isinstance(v, list) else [v])]
        held = sum(t.numel() for t in tensors if isinstance(t, Tensor) and t.ndim)
        registry = getattr(self.optimizer, "_registry", None)
        kept = sum(
            part.numel()
            for layer in (registry.layers if registry is not None else ())
            for _, parts in layer.cached_products.values()
            for part in parts
        )
        count = sum(p.numel() for p in self.model.parameters())
        return held / count, kept / count


def measure(network: str, names: list[str], rounds: int, networks: dict[str, Any]) -> list[Row]:
    """One row for each optimizer."""
    interval = STUDY["interval"]
    runs = {name: Run(network, name, networks) for name in names}
    for _ in range(1 + interval * rounds):
        for run in runs.values():
            run.iterate()
    base = statistics.median(runs["AdamW" if "AdamW" in runs else names[0]].passes[1:])
    rows = []
    for name, run in runs.items():
        own = statistics.median(run.passes[1:])  # of passes without hooks
        added = [p - own for p in run.passes[interval::interval]]  # of those that measure
        spent = sum(run.steps[1:]) + sum(added)
        state, kept = run.memory()
        figures = (
            1e3 * own,
            (run.passes[0] + run.steps[0]) / base,
            spent / (interval * rounds) / base,
            statistics.median(run.steps[1:]) / base,
            state,
            kept,
        )
        values = (network, name, *(round(figure, 4) for figure in figures))
        rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


def table(rows: list[Row]) -> str:
    """Lines of one network."""
    head = f"\n{rows[0]['network']:18}{'passes, ms':>12}"
    lines = [head + "".join(f"{field:>9}" for field in FIELDS[3:])]
    for row in rows:
        line = f"{row['optimizer']:18}{float(row['passes_ms']):12.0f}"
        lines.append(line + "".join(f"{float(row[field]):9.3f}" for field in FIELDS[3:]))
    return "\n".join(lines)


def bars(rows: list[Row]) -> int:
    """Print which bars SINGD's defaults meet; 1 if one is missed."""
    missed = 0
    for row in (row for row in rows if row["optimizer"] == "SINGD"):
        network = row["network"]
        wanted = {field: STUDY["bars"][field].get(network) for field in ("mean", "first")}
        wanted["state"] = STUDY["bars"]["state"]
        for field, bar in wanted.items():
            value = float(row[field]) + (float(row["kept"]) if field == "state" else 0.0)
            if bar is not None:
                missed |= value > bar
                verdict = "MISSED" if value > bar else "met   "
                print(f"{verdict} {network}, {field}: {value:.3f} (bar {bar})")
    return missed


def draw(rows: list[Row], path: Path) -> None:
    """The mean step and the first step of all optimizers on all networks."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.2))
    titles = {"mean": "mean step", "first": "first step with its passes", "state": "memory"}
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for at, name in enumerate(names):
            found = {row["network"]: row for row in rows if row["optimizer"] == name}
            values = [
                float(found[n][field]) + (float(found[n]["kept"]) if field == "state" else 0.0)
                for n in networks
            ]
            places = [place + 0.8 * at / len(names) for place in range(len(networks))]
            axis.bar(places, values, 0.8 / len(names), align="edge", label=name)
        axis.set_xticks([place + 0.4 for place in range(len(networks))], networks, rotation=20)
        over = "over the parameters" if field == "state" else "over forward and backward"
        axis.set(title=f"{title}, {over}", yscale="log")
        axis.grid(axis="y", alpha=0.3)
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="lower center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, draw, and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=STUDY["rounds"], help="intervals of ten")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    needed = {"SOAP": "pytorch_optimizer"}
    installed = [n for n in OPTIMIZERS if n not in needed or find_spec(needed[n])]
    names = args.optimizers or installed
    whole = not (args.networks or args.optimizers or args.quick)
    networks = QUICK if args.quick else NETWORKS
    rows: list[Row] = []
    for network in list(QUICK) if args.quick else args.networks or STUDY["networks"]:
        rows += measure(network, names, 1 if args.quick else args.rounds, networks)
        print(table(rows[-len(names) :]), flush=True)
    print(f"torch {torch.__version__}, one thread")
    if args.quick:
        return 0
    if whole or args.out:
        out = args.out or RESULTS
        with out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, out.with_suffix(".png"))
    return bars(rows)


if __name__ == "__main__":
    raise SystemExit(main())
