"""Milliseconds and memory of a training step of SINGD and KFAC over those of SGD.

    python benchmarks/step.py                    # the networks of step_bars.json, bars, picture
    python benchmarks/step.py --arch resnet50 --batch 8 --size 224
    python benchmarks/step.py --quick            # one network, small images; no bar is computed
    python benchmarks/step.py --device cuda --autocast --channels-last --compile

Two networks of the same weights are trained side by side, one step each in turns. Each time is
divided by the mean of SGD's steps before and after it, and the median of these ratios counts. On a
CPU that shares its memory with others single ratios scatter by a tenth and more, so what has a bar
is repeated more often, and the interval that has the median with 95 % is told. Steps without an
update of the preconditioner are measured apart, so that the mean over an interval of ten can be
told. Memory is that of live tensors on the CPU, and what the allocator reports on CUDA. The exit
status tells whether the bars are met.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import tnkfac
from memory import PeakMemory
from step_report import bars, draw, table

STUDY = json.loads(Path(__file__).with_name("step_bars.json").read_text(encoding="utf-8"))
RESULTS = Path(__file__).parent / "results"
TIMES = ("ms", "ratio", "low", "high")
FIELDS = ("arch", "batch", "size", "optimizer", *TIMES, "memory", "memory_without_state")
NEVER = 10**9
WARM_UP = 2
"""Steps that make state, plans, and the second taps."""
CLASSES = 100
Build = Callable[[nn.Module], Any]


def singd(structures: str, approx: str, T: int) -> Build:
    """SINGD at its defaults, but for these."""
    return lambda m: tnkfac.SINGD(m.parameters(), structures=structures, kfac_approx=approx, T=T)


def reference(model: nn.Module) -> Any:
    """The ``singd`` package for what it supports, in the same setting."""
    from singd.optim.optimizer import SINGD

    supported = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    params = [p for m in supported for p in m.parameters()]
    structures = ("diagonal", "diagonal")
    return SINGD(
        model, params=[{"params": params}], T=1, kfac_approx="reduce", structures=structures
    )


OPTIMIZERS: dict[str, Build] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "SINGD diagonal, reduce, T=1": singd("diagonal", "reduce", 1),
    "SINGD diagonal, reduce, no update": singd("diagonal", "reduce", NEVER),
    "SINGD diagonal, expand, T=1": singd("diagonal", "expand", 1),
    "SINGD diagonal, expand, no update": singd("diagonal", "expand", NEVER),
    "SINGD block32diagonal, reduce, T=1": singd("block32diagonal", "reduce", 1),
    "SINGD block32diagonal, reduce, no update": singd("block32diagonal", "reduce", NEVER),
    "SINGD auto, reduce, T=1": singd("auto", "reduce", 1),
    "SINGD auto, reduce, no update": singd("auto", "reduce", NEVER),
    "KFAC auto, reduce, factors at every step": lambda m: tnkfac.KFAC(
        m.parameters(), kfac_approx="reduce", inv_update_steps=NEVER
    ),
    "KFAC auto, reduce, no update": lambda m: tnkfac.KFAC(
        m.parameters(), kfac_approx="reduce", factor_update_steps=NEVER, inv_update_steps=NEVER
    ),
    "singd diagonal, reduce, T=1": reference,
}
TALK = "SINGD diagonal, reduce, T=1"
REFERENCE = "singd diagonal, reduce, T=1"


@dataclass
class Problem:
    """A network and its batch.

    Attributes:
        args: Of the command line.
        arch: Name of a torchvision network.
        batch: Samples.
        size: Pixels of a side.
    """

    args: argparse.Namespace
    arch: str
    batch: int
    size: int

    def prepare(self, build: Build) -> tuple[nn.Module, Any, Callable[[], None]]:
        """Model, optimizer, and a function that does a step."""
        args = self.args
        torch.manual_seed(0)
        more = {"image_size": self.size} if self.arch.startswith("vit") else {}
        model = torchvision.models.get_model(self.arch, num_classes=CLASSES, **more)
        x = torch.randn(self.batch, 3, self.size, self.size, device=args.device)
        y = torch.randint(CLASSES, (self.batch,), device=args.device)
        model = model.to(args.device).train()
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)
        optimizer = build(model)
        call: Any = torch.compile(model) if args.compile else model
        half = torch.autocast(args.device, torch.bfloat16) if args.autocast else nullcontext()

        def step() -> None:
            optimizer.zero_grad()
            with half:
                loss = functional.cross_entropy(call(x), y)
            loss.backward()
            optimizer.step()

        return model, optimizer, step


def seconds(step: Callable[[], None], cuda: bool) -> float:
    """Duration of a step."""
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def sgd(model: nn.Module) -> Any:
    """What all others are divided by."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def rounds(problem: Problem, name: str) -> int:
    """How often a step is measured: more often where there is a bar."""
    if problem.args.rounds is not None:
        return int(problem.args.rounds)
    barred = STUDY["bars"].get(problem.arch, {})
    named = name in barred or name.replace("no update", "T=10") in barred
    shared = name == REFERENCE and TALK in barred
    numbers: dict[str, int] = STUDY["rounds"][problem.args.device]
    return numbers["with a bar" if named or shared else "others"]


def interval(values: list[float]) -> tuple[float, float]:
    """Where the median of what values are drawn from lies with a probability of 95 %.

    That is so for independent values; neighbouring ratios share a step of SGD, so theirs is rather
    too narrow.
    """
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    first = max(0, int(len(values) / 2 - reach))
    return ordered[first], ordered[-1 - first]


def times(problem: Problem, builds: dict[str, Build]) -> dict[str, tuple[float, ...]]:
    """Milliseconds, ratio to SGD's steps before and after, and its interval, by optimizer."""
    cuda = problem.args.device == "cuda"
    found: dict[str, tuple[float, ...]] = {}
    for name, build in builds.items():  # two networks at a time: more would crowd the caches
        base, step = problem.prepare(sgd)[2], problem.prepare(build)[2]
        for _ in range(WARM_UP):
            base()
            step()
        before = seconds(base, cuda)
        spent, ratios = [], []
        for _ in range(rounds(problem, name)):
            mine, after = seconds(step, cuda), seconds(base, cuda)
            spent.append(1e3 * mine)
            ratios.append(2 * mine / (before + after))
            before = after
        medians = statistics.median(spent), statistics.median(ratios)
        found[name] = (*medians, *interval(ratios))
    return found


def memory(problem: Problem, build: Build) -> tuple[float, float]:
    """Peak bytes of a step with everything that lives, and of these the optimizer's state."""
    gc.collect()
    before = _live()
    model, optimizer, step = problem.prepare(build)
    for _ in range(WARM_UP):
        step()
    optimizer.zero_grad()
    gc.collect()
    fixed = sum(_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])
    state = float(_live() - before - fixed)
    if problem.args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return float(torch.cuda.max_memory_allocated()), state
    with PeakMemory() as peak:
        step()
    return float(fixed + state + peak.peak), state


def _live() -> int:
    """Bytes of all tensors that there are, wherever an optimizer may keep them."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure(problem: Problem, builds: dict[str, Build]) -> list[dict[str, Any]]:
    """One row for each optimizer, and one for each mean over an interval of ten."""
    timed = times(problem, builds)
    whole, state = memory(problem, sgd)
    rows = []
    for name, build in builds.items():
        mine, own = memory(problem, build)
        values = (*timed[name], mine / whole, (mine - own) / (whole - state))
        rows.append((name, values))
    by_name = dict(rows)
    for name, without in list(by_name.items()):
        if name.endswith(", no update") and (every := name.replace("no update", "T=1")) in by_name:
            mean = [0.9 * a + 0.1 * b for a, b in zip(without, by_name[every], strict=True)]
            count = len(TIMES)
            rows.append(
                (name.replace("no update", "T=10"), (*mean[:count], *by_name[every][count:]))
            )
    head = problem.arch, problem.batch, problem.size
    return [
        dict(zip(FIELDS, (*head, name, *(round(v, 4) for v in values)), strict=True))
        for name, values in rows
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, draw, and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", help="one network instead of those of step_bars.json")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, help="instead of those of step_bars.json")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="the first network, batch 4, 64 x 64 pixels, 3 rounds"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    installed = [n for n in OPTIMIZERS if not n.startswith("singd") or find_spec("singd")]
    builds = {name: OPTIMIZERS[name] for name in args.optimizers or installed}
    runs = STUDY["runs"][args.device]
    if args.arch:
        runs = [{"arch": args.arch, "batch": args.batch, "size": args.size}]
    if args.quick:
        args.rounds = 3
        runs = [{**runs[0], "batch": 4, "size": 64}]
    rows: list[dict[str, Any]] = []
    for run in runs:
        rows += measure(Problem(args, **run), builds)
        print(table(rows, run["arch"]), flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    if args.out is None and (args.quick or args.arch or args.optimizers):
        return 0
    kinds = [k for k in ("autocast", "channels_last", "compile") if getattr(args, k)]
    out = args.out or RESULTS / f"step-{'-'.join([args.device, *kinds])}.csv"
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, STUDY["talk"], TALK, out.with_suffix(".png"))
    return bars(rows, STUDY)


if __name__ == "__main__":
    raise SystemExit(main())
