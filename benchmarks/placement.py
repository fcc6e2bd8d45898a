"""What `grad_worker_fraction` costs and saves: messages, memory, critical path, for many processes.

The plan is that of the optimizer; a step is added up from it. `--check` counts the bytes of a run
of four processes and compares them with what is simulated for it.

    python benchmarks/placement.py            # table, results/placement.csv and .png
    python benchmarks/placement.py --check
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import log2, prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tnkfac import KFAC, SINGD
from tnkfac.optim.distributed import reduction
from tnkfac.optim.distributed.assignment import Assignment, update_cost
from tnkfac.optim.distributed.buckets import BUCKET
from tnkfac.optim.params.state import ON_HOST

RESULTS = Path(__file__).parent / "results"
INTERVAL = 10
"""Steps between updates."""
WIRE = 25e9
"""Bytes a second that a process sends or receives: one link of 200 Gbit/s."""
LATENCY = 20e-6
"""Seconds that a message takes for each doubling of the processes."""
RATES = {"KFAC": 25 / 1e12, "SINGD": 12 / 40e12}
"""Seconds for each multiply-add of the plan: eigendecompositions at 1 Tflop/s of 25 n^3, and six
products of 2 n^3 at 40 Tflop/s."""


class GPT(nn.Module):
    """The linear layers of GPT-2 medium (24 blocks, width 1,024); it is not run."""

    def __init__(self, width: int = 1024, blocks: int = 24) -> None:
        super().__init__()
        sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        self.layers = nn.ModuleList(nn.Linear(*size) for _ in range(blocks) for size in sizes)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet50": torchvision.models.resnet50,
    "ConvNeXt-T": torchvision.models.convnext_tiny,
    "ViT-B/16": torchvision.models.vit_b_16,
    "GPT-2 medium": GPT,
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "KFAC": (KFAC, {"structures": "auto"}),
    "SINGD": (SINGD, {"structures": "auto"}),
}


@dataclass(frozen=True)
class Load:
    """What one choice asks of the processes.

    Attributes:
        network: The network.
        optimizer: The optimizer.
        world: Number of processes.
        workers: How many keep the preconditioner of a layer.
        statistics: Bytes that are added up over all at an update.
        preconditioners: Bytes of all messages with preconditioners, at an update.
        gradients: Bytes of all messages with preconditioned gradients within a row, at a step.
        kept: Bytes of the fullest process.
        wire: Bytes that the busiest process receives, for each step.
        seconds: Critical path, for each step.
    """

    network: str
    optimizer: str
    world: int
    workers: int
    statistics: int
    preconditioners: int
    gradients: int
    kept: int
    wire: float
    seconds: float


def simulate(
    network: str, name: str, optimizer: Any, world: int, workers: int
) -> tuple[Load, list[int]]:
    """The load, and the bytes that every process keeps.

    Args:
        network: Name of the network.
        name: Name of the optimizer.
        optimizer: An optimizer of its parameters, which may be on the meta device.
        world: Number of processes.
        workers: How many keep the preconditioner of a layer.
    """
    layers = [layer for layer in optimizer._registry.layers if layer.statistics.bound]
    assignment = Assignment(world)
    costs = [
        update_cost(la.statistics.layer.groups, (la.statistics.k, la.statistics.c)) for la in layers
    ]
    assignment.extend(layers, costs, [workers] * len(layers))
    statistics = shared = gradients = 0
    kept, received = [0] * world, [0.0] * world
    gathered = [0.0] * world
    for layer in layers:
        own, place = layer.statistics, assignment.of(layer)
        state = optimizer._runner.fresh(layer)
        size = {k: v.numel() * v.element_size() for k, v in state.items() if k not in ON_HOST}
        item = layer.weight.element_size()
        statistics += item * (own.layer.groups * (_sent(own.k) + _sent(own.c)) + 3)
        sent = sum(
            v
            for k, v in size.items()
            if name == "SINGD" or k.split(".")[0] in optimizer.rule.derived
        )
        natural = item * own.layer.groups * own.k.dim * own.c.dim
        if place.inv_worker is not None and len(place.grad_workers) > 1:
            shared += sent
        if len(place.grad_workers) < world:
            gradients += natural
        keepers = set(place.grad_workers)
        for rank in range(world):
            if rank in keepers:
                kept[rank] += sum(size.values())
                received[rank] += sent * (place.inv_worker not in (None, rank))
            else:
                gathered[rank] += natural
    ring = 2 * statistics * (world - 1) / world
    wire = (ring + max(received)) / INTERVAL + max(gathered)
    messages = (statistics + shared) / BUCKET / INTERVAL + gradients / BUCKET
    messages += (1 + min(workers, len(layers))) / INTERVAL + (workers < world)
    seconds = wire / WIRE + messages * LATENCY * max(1.0, log2(world))
    seconds += max(assignment.loads) * RATES[name] / INTERVAL
    load = Load(
        network, name, world, workers, statistics, shared, gradients, max(kept), wire, seconds
    )
    return load, kept


def _sent(structure: Any) -> int:
    """Numbers of a statistic as it is sent: triangles of what is square."""
    found = 0
    for shape in structure.part_shapes:
        rows, numbers = shape[-1], prod(shape)
        square = len(shape) > 1 and numbers > 0
        found += numbers // rows**2 * (rows * (rows + 1) // 2) if square else numbers
    return found


def choices(world: int) -> list[int]:
    """One keeper, the root of the number of processes, half of them, all."""
    return [1, 2 ** int(log2(world) / 2), world // 2, world]


def draw(loads: list[Load], path: Path) -> None:
    """Messages, memory and critical path over the number of processes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(load.network for load in loads))
    worlds = sorted({load.world for load in loads})
    figure, axes = plt.subplots(3, len(names), figsize=(3.6 * len(names), 8.4), sharex=True)
    quantities = (
        ("wire", 1e6, "received per step, MB"),
        ("kept", 1e6, "kept by the fullest process, MB"),
        ("seconds", 1e-3, "critical path per step, ms"),
    )
    labels = ["one process", "root of all", "half", "all"]
    for column, network in enumerate(names):
        for row, (quantity, unit, label) in enumerate(quantities):
            axis = axes[row][column]
            for name, style in (("KFAC", "-"), ("SINGD", "--")):
                mine = [x for x in loads if x.network == network and x.optimizer == name]
                for place, text in enumerate(labels):
                    points = [x for x in mine if x.workers == choices(x.world)[place]]
                    axis.plot(
                        [x.world for x in points],
                        [getattr(x, quantity) / unit for x in points],
                        style,
                        color=f"C{place}",
                        marker="o",
                        markersize=3,
                        label=f"{name}: {text}",
                    )
            axis.set_xscale("log", base=2)
            axis.set_xticks(worlds, [f"{world:,}" for world in worlds])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(network)
            if row == 2:
                axis.set_xlabel("processes")
            if column == 0:
                axis.set_ylabel(label)
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="lower center", ncols=4, title="kept by", fontsize=9)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------- a real run


def small() -> nn.Module:
    """Convolutions with and without groups, a transposed one, linear layers, a normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.Flatten(),
        nn.Linear(800, 150),
        nn.Tanh(),
        nn.Linear(150, 10),
    )


def counted(rank: int, store: str, world: int, found: Any) -> None:
    """Two steps of a real run; put what each process has sent and keeps into `found`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    reduce, broadcast = dist.all_reduce, dist.broadcast
    sums, copies = [0], [0]

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sums[0] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **kwargs)

    def one_to_all(tensor: Tensor, source: int, *args: Any, **kwargs: Any) -> Any:
        copies[0] += tensor.numel() * tensor.element_size() * (source == rank)
        return broadcast(tensor, source, *args, **kwargs)

    for name, (cls, options) in OPTIMIZERS.items():
        for workers in (1, 2, 4):
            model = DistributedDataParallel(small())
            interval = {"T": 2} if cls is SINGD else {"factor_update_steps": 2}
            optimizer = cls(
                model.parameters(), grad_worker_fraction=workers / world, **interval, **options
            )
            seen = []
            for _ in range(4):
                model(torch.randn(4, 3, 16, 16)).square().mean().backward()
                sums[0] = copies[0] = 0
                reduction.dist.all_reduce, reduction.dist.broadcast = all_reduce, one_to_all
                if cls is KFAC:  # decompose at every update of the factors
                    optimizer.param_groups[0]["inv_update_steps"] = 2
                optimizer.step()
                reduction.dist.all_reduce, reduction.dist.broadcast = reduce, broadcast
                optimizer.zero_grad()
                seen.append((sums[0], copies[0]))
            kept = sum(
                value.numel() * value.element_size()
                for layer in optimizer._registry.layers
                for key, value in optimizer.state[layer.weight].items()
                if key not in ("momentum_buffer", *ON_HOST)
            )
            found[name, workers, rank] = (*seen[2], *seen[3], kept)
            optimizer.close()
    dist.destroy_process_group()


def check(world: int = 4) -> int:
    """Compare a real run with the simulation; the number of differences."""
    with torch.multiprocessing.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        found = manager.dict()
        importlib.import_module("torch._dynamo")  # as wrappers do, but once for all processes
        gc.freeze()  # optimizers look for wrappers among all objects
        torch.multiprocessing.start_processes(
            counted,
            (str(Path(folder) / "store"), world, found),
            nprocs=world,
            start_method="fork",
        )
        measured = dict(found)
    wrong = 0
    for name, (cls, options) in OPTIMIZERS.items():
        model = small()
        optimizer = cls(model.parameters(), **options)
        layers = len(optimizer._registry.layers)
        for workers in (1, 2, 4):
            load, kept = simulate("small", name, optimizer, world, workers)
            rows = [measured[name, workers, rank] for rank in range(world)]
            flags = 8 * layers if name == "KFAC" else 0  # whether decompositions went well
            each = {
                "statistics": (load.statistics + flags, rows[0][0]),
                "preconditioners": (
                    load.preconditioners,
                    sum(row[1] for row in rows) - sum(row[3] for row in rows),
                ),
                "gradients": (load.gradients * workers, sum(row[3] for row in rows)),
                "kept": (kept, [row[4] for row in rows]),
            }
            for what, (expected, counts) in each.items():
                wrong += expected != counts
                mark = "equal" if expected == counts else "DIFFERENT"
                print(f"{name}, {workers} of {world} keep, {what}: {expected} {counts} {mark}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="count the bytes of a real run")
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.check:
        return min(check(), 1)
    loads = list(_simulated(args.worlds))
    with (args.out / "placement.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(loads[0])), lineterminator="\n")
        writer.writeheader()
        for load in loads:
            writer.writerow(
                {**asdict(load), "wire": round(load.wire), "seconds": f"{load.seconds:.3e}"}
            )
    print(f"{'':40}   MB received per step   MB kept   ms per step")
    for load in loads:
        title = f"{load.network}, {load.optimizer}, {load.workers} of {load.world}"
        print(
            f"{title:40} {load.wire / 1e6:22.1f} {load.kept / 1e6:9.1f} {load.seconds * 1e3:13.2f}"
        )
    draw(loads, args.out / "placement.png")
    return 0


def _simulated(worlds: Iterable[int]) -> Iterable[Load]:
    for network, build in NETWORKS.items():
        with torch.device("meta"):
            model = build()
        for name, (cls, options) in OPTIMIZERS.items():
            optimizer = cls(model.parameters(), **options)
            for world in worlds:
                for workers in sorted(set(choices(world))):
                    yield simulate(network, name, optimizer, world, workers)[0]
            optimizer.close()


if __name__ == "__main__":
    sys.exit(main())
