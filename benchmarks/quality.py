"""Steps and seconds that optimizers need on small tasks, at their defaults.

    python benchmarks/quality.py                  # all runs that are missing, then the report
    python benchmarks/quality.py --minutes 20     # as many as fit; the next call goes on
    python benchmarks/quality.py --shard 0/2      # every second one; another process does 1/2
    python benchmarks/quality.py --time           # milliseconds of a step, all optimizers in turns
    python benchmarks/quality.py --report         # the report alone; joins what shards have written
    python benchmarks/quality.py --quick          # two tasks, few steps, nothing is kept
    python benchmarks/quality.py --pilot          # what the targets were taken from

Every optimizer gets the same grid of learning rates on one seed, the same number of steps and a
cosine schedule; the learning rate that reaches the target first (else, that ends lowest) is run on
other seeds, whose means are reported. Tasks, grid, budget, seeds and targets stand in
``quality_study.json``. The exit status of a report tells whether its bars are met.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quality_time
import tnkfac
from quality_report import report
from quality_tasks import TASKS, held_out_loss

STUDY = json.loads(Path(__file__).with_name("quality_study.json").read_text(encoding="utf-8"))
RESULTS = Path(__file__).parent / "results" / "quality.csv"
FIELDS = ("task", "optimizer", "lr", "seed", "steps", "ms", "final", "held_out", "curve")
WINDOW = 10
"""Steps over which the training loss is averaged."""


class Together:
    """Two optimizers that step as one, for packages that train some parameters only."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Of all."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Of all."""
        for optimizer in self.optimizers:
            optimizer.step()


def muon(model: nn.Module, lr: float) -> Together:
    """PyTorch's Muon for matrices, AdamW for all else."""
    params = list(model.parameters())
    matrices = [p for p in params if p.ndim == 2]
    others = [p for p in params if p.ndim != 2]
    adamw = torch.optim.AdamW(others, lr=lr)
    return Together(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"), adamw)


def reference_singd(model: nn.Module, lr: float) -> Together:
    """The ``singd`` package at its defaults for what it supports, AdamW for all else."""
    from singd.optim.optimizer import SINGD

    supported = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    mine = {id(p): p for m in supported for p in m.parameters()}
    others = [p for p in model.parameters() if id(p) not in mine]
    first = SINGD(model, params=[{"params": list(mine.values())}], lr=lr, T=10)
    return Together(first, *([torch.optim.AdamW(others, lr=lr)] if others else []))


Build = Callable[[nn.Module, float], Any]
OPTIMIZERS: dict[str, Build] = {
    "AdamW": lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr),
    "SGD": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9),
    "Muon": muon,
    "SINGD": lambda m, lr: tnkfac.SINGD(m.parameters(), lr=lr),
    "SINGD dense": lambda m, lr: tnkfac.SINGD(m.parameters(), lr=lr, structures="dense"),
    "SINGD dense T=1": lambda m, lr: tnkfac.SINGD(m.parameters(), lr=lr, structures="dense", T=1),
    "SINGD diagonal": lambda m, lr: tnkfac.SINGD(m.parameters(), lr=lr, structures="diagonal"),
    "KFAC": lambda m, lr: tnkfac.KFAC(m.parameters(), lr=lr),
    "EKFAC": lambda m, lr: tnkfac.KFAC(m.parameters(), lr=lr, compute_method="ekfac"),
    "singd": reference_singd,
}


def run(task_name: str, build: Build, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once."""
    task = TASKS[task_name]
    torch.manual_seed(seed)
    model = task.build()
    optimizer = build(model, lr)
    generator = torch.Generator().manual_seed(seed)
    starts = [group["lr"] for group in optimizer.param_groups]
    losses, seconds = [], []
    for step in range(steps):
        for group, start in zip(optimizer.param_groups, starts, strict=True):
            group["lr"] = start * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, y = task.draw(generator, task.batch_size, False)
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    means = [statistics.fmean(losses[max(0, k - WINDOW) : k]) for k in range(1, len(losses) + 1)]
    reached = [k for k, mean in enumerate(means, 1) if mean <= STUDY["targets"][task_name]]
    finite = len(losses) == steps and math.isfinite(means[-1])
    return {
        "steps": reached[0] if reached else "",
        "ms": f"{1e3 * statistics.fmean(seconds):.3f}",
        "final": f"{means[-1]:.5g}" if finite else "",
        "held_out": f"{held_out_loss(task, model):.5g}" if finite else "",
        "curve": " ".join(f"{mean:.4g}" for mean in means[4::5]),
    }


def pilot(task: str, steps: int) -> float:
    """Training loss of AdamW after 60 % of the steps at its best rate, on seeds of their own."""
    at = steps * 3 // 5 // 5 - 1  # every fifth step is kept
    runs = {
        lr: [run(task, OPTIMIZERS["AdamW"], lr, seed, steps) for seed in STUDY["pilot_seeds"]]
        for lr in STUDY["grid"]
    }

    def final(lr: float) -> float:
        return statistics.fmean(float(found["final"] or math.inf) for found in runs[lr])

    best = min(runs, key=final)
    return statistics.fmean(float(found["curve"].split()[at]) for found in runs[best])


def best_lr(rows: list[dict[str, Any]]) -> float:
    """Learning rate that reaches the target first; else, that ends lowest."""

    def key(row: dict[str, Any]) -> tuple[float, float]:
        steps = float(row["steps"] or math.inf)
        return steps, float(row["final"] or math.inf)

    return float(min(rows, key=key)["lr"])


def missing(rows: list[dict[str, Any]], tasks: Any, names: Any) -> Iterator[tuple[Any, ...]]:
    """Runs to do: the grid on the tuning seed first, then the best rate on the other seeds."""
    done = {(r["task"], r["optimizer"], float(r["lr"]), int(r["seed"])) for r in rows}
    for task in tasks:
        for name in names:
            grid = [(task, name, lr, STUDY["tuning_seed"]) for lr in STUDY["grid"]]
            left = [job for job in grid if job not in done]
            if left:
                yield from left
                continue
            mine = [r for r in rows if (r["task"], r["optimizer"]) == (task, name)]
            lr = best_lr([r for r in mine if int(r["seed"]) == STUDY["tuning_seed"]])
            yield from (
                (task, name, lr, seed)
                for seed in STUDY["seeds"]
                if (task, name, lr, seed) not in done
            )


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file and of the files of its shards, as far as they are there."""
    rows: list[dict[str, Any]] = []
    for part in [path, *sorted(path.parent.glob(f"{path.stem}.[0-9]*.csv"))]:
        if part.exists():
            with part.open(encoding="utf-8", newline="") as file:
                rows += csv.DictReader(file)
    return rows


def append(path: Path, fields: Sequence[str], row: dict[str, Any]) -> None:
    """Add a row to a file, which begins with the names of its columns."""
    fresh = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def merge(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """All rows, after putting those of all shards into one file."""
    rows = read(path)
    shards = list(path.parent.glob(f"{path.stem}.[0-9]*.csv"))
    if shards:
        if "optimizer" in fields:
            rows.sort(key=lambda row: [list(TASKS).index(row["task"]), row["optimizer"]])
        path.unlink(missing_ok=True)
        for row in rows:
            append(path, fields, row)
        for shard in shards:
            shard.unlink()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th pair of task and optimizer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pilot", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.pilot:
        for task in args.tasks:
            print(f"{task:28}{pilot(task, STUDY['steps']):9.4g}", flush=True)
        return 0
    installed = [name for name in OPTIMIZERS if name != "singd" or find_spec("singd")]
    names = args.optimizers or installed
    tasks, steps = args.tasks, STUDY["steps"]
    if args.quick:
        tasks, names, steps = ["digits CNN", "tones"], ["AdamW", "SINGD dense", "KFAC"], 30
        args.out = Path(tempfile.mkdtemp()) / "quality.csv"
    times = args.out.with_name(f"{args.out.stem}_time.csv")
    if args.time or args.quick:
        builds = {name: OPTIMIZERS[name] for name in names}
        found = {
            task: quality_time.step_times(TASKS[task], builds, STUDY["steps"], "AdamW")
            for task in tasks
        }
        quality_time.write(times, found)
    if args.time:
        return 0
    shard, shards = map(int, args.shard.split("/"))
    own = args.out.with_suffix(f".{shard}.csv") if shards > 1 else args.out
    begin = time.monotonic()
    mine = [
        pair for i, pair in enumerate((t, n) for t in tasks for n in names) if i % shards == shard
    ]
    for task, name in [] if args.report else mine:
        for _ in range(2):  # the grid decides what the second round is
            for job in list(missing(read(args.out), [task], [name])):
                if time.monotonic() - begin > 60 * args.minutes:
                    return 0
                row = dict(zip(FIELDS, job, strict=False))
                row |= run(task, OPTIMIZERS[name], job[2], job[3], steps)
                append(own, FIELDS, row)
        print(f"{task}: {name}", flush=True)
    if shards > 1:
        return 0
    rows = merge(args.out, FIELDS)
    return report(rows, quality_time.read(times), STUDY, args.out, best_lr)


if __name__ == "__main__":
    raise SystemExit(main())
