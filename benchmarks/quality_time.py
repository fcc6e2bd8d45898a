"""Milliseconds of a training step, measured for all optimizers in turns."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quality_tasks import Task

CYCLE = 10
"""Steps after which what an optimizer does repeats itself."""
CYCLES = 7
FIELDS = ("task", "optimizer", "ms")


def step_times(
    task: Task, builds: dict[str, Callable[[nn.Module, float], Any]], steps: int, base: str
) -> dict[str, float]:
    """Mean over a run of some steps, the first one included, in milliseconds.

    Ten steps of every optimizer follow ten of every other, so that a machine that slows down slows
    down all of them; of the ratios to those of one optimizer the median counts.

    Args:
        task: What is trained; all optimizers see the same batches.
        builds: Makes each optimizer for a model and a learning rate.
        steps: Length of a run.
        base: Optimizer that the others are divided by.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [task.draw(generator, task.batch_size, False) for _ in range(CYCLE)]
    first, cycles = dict[str, float](), {name: list[float]() for name in builds}
    runs = {}

    def seconds(name: str, x: Any, y: Any) -> float:
        model, optimizer = runs[name]
        begin = time.perf_counter()
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
        return time.perf_counter() - begin

    for name, build in builds.items():
        torch.manual_seed(0)
        model = task.build()
        runs[name] = (model, build(model, 1e-3))
        first[name] = seconds(name, *batches[0])
    for _ in range(CYCLES):
        for name in builds:
            cycles[name].append(sum(seconds(name, x, y) for x, y in batches))
    unit = 1e3 * statistics.median(cycles[base]) / CYCLE
    means = {}
    for name, mine in cycles.items():
        ratio = statistics.median(a / b for a, b in zip(mine, cycles[base], strict=True))
        extra = 1e3 * max(first[name] - first[base], 0.0)  # the first batch is slow for all
        means[name] = unit * ratio + extra / steps
    return means


def write(path: Path, found: dict[str, dict[str, float]]) -> None:
    """Keep the times of all tasks."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for task, times in found.items():
            writer.writerows((task, name, f"{ms:.3f}") for name, ms in times.items())


def read(path: Path) -> dict[tuple[str, str], float]:
    """Times by task and optimizer, as far as they were measured."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {(r["task"], r["optimizer"]): float(r["ms"]) for r in csv.DictReader(file)}
