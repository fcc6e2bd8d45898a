"""Milliseconds and memory of a training step of SINGD and KFAC over those of SGD.

    python benchmarks/step.py                    # the networks of step_bars.json, bars, picture
    python benchmarks/step.py --arch resnet50 --batch 8 --size 224
    python benchmarks/step.py --quick            # one network, small images; no bar is computed
    python benchmarks/step.py --device cuda --autocast --channels-last --compile

Networks of the same weights are trained side by side, one step each in turns, with one of SGD
between any two of them. Each time is divided by the mean of SGD's steps before and after it, and
the median of these ratios counts. On a CPU that shares its memory with others single ratios scatter
by a tenth and more, and medians depend on where in memory a process happens to work: what has a bar
is measured in several processes, one after the other, whose medians are averaged; the interval that
has the median process with 95 % is told. Steps without an update of the preconditioner are measured
apart, so that the mean over an interval of ten can be told. Memory is that of live tensors on the
CPU, and what the allocator reports on CUDA. The exit status tells whether the bars are met.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory import PeakMemory
from step_problems import OPTIMIZERS, REFERENCE, TALK, Build, Problem, sgd
from step_report import bars, draw, table
from step_times import WARM_UP, Duration, in_processes, mixed, summary

STUDY = json.loads(Path(__file__).with_name("step_bars.json").read_text(encoding="utf-8"))
RESULTS = Path(__file__).parent / "results"
TIMES = ("ms", "ratio", "low", "high")
FIELDS = ("arch", "batch", "size", "optimizer", *TIMES, "memory", "memory_without_state", "each")


def has_bar(problem: Problem, name: str) -> bool:
    """Whether a bar is about an optimizer, which is measured more often then."""
    barred = STUDY["bars"].get(problem.arch, {})
    named = name in barred or name.replace("no update", "T=10") in barred
    return named or (name == REFERENCE and TALK in barred)


def times(problem: Problem, names: list[str]) -> dict[str, Duration]:
    """Durations of steps: those with a bar in turns, all others one after the other."""
    args = problem.args
    rounds, processes = STUDY["rounds"][args.device], STUDY["processes"][args.device]
    often = args.rounds or rounds["with a bar"], args.processes or processes
    barred = [name for name in names if has_bar(problem, name)]
    found: dict[str, Duration] = {}
    if barred:
        runs = in_processes(problem, barred, *often)
        found = {name: summary(runs, name) for name in barred}
    for name in names:  # two networks at a time
        if name not in barred:
            runs = in_processes(problem, [name], args.rounds or rounds["others"], 1)
            found[name] = summary(runs, name)
    return {name: found[name] for name in names}


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
    timed = times(problem, list(builds))
    whole, state = memory(problem, sgd)
    peaks = {}
    for name, build in builds.items():
        mine, own = memory(problem, build)
        peaks[name] = mine / whole, (mine - own) / (whole - state)
    for name in builds:
        every, ten = (name.replace("no update", word) for word in ("T=1", "T=10"))
        if every != name and every in builds:
            timed[ten], peaks[ten] = mixed(timed[name], timed[every], 0.1), peaks[every]
    head = problem.arch, problem.batch, problem.size
    rows = []
    for name, duration in timed.items():
        figures = (duration.ms, duration.ratio, duration.low, duration.high, *peaks[name])
        each = " ".join(f"{ratio:.4f}" for ratio in duration.each)
        values = (*head, name, *(round(figure, 4) for figure in figures), each)
        rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print, draw, and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", help="one network instead of those of step_bars.json")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, help="instead of those of step_bars.json")
    parser.add_argument("--processes", type=int, help="instead of those of step_bars.json")
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
        args.rounds, args.processes = 3, 1
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
