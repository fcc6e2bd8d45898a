"""Durations of steps in turns with those of SGD, in several processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context

import torch

from step_problems import OPTIMIZERS, Problem, sgd

WARM_UP = 2
"""Steps that make state, plans, and the second taps."""
Measured = dict[str, list[tuple[float, float]]]
"""Milliseconds, and ratio to SGD's steps before and after, of every step by optimizer."""


@dataclass
class Duration:
    """What was found of one optimizer.

    Attributes:
        ms: Median of its steps.
        ratio: Mean over processes of the median ratio to SGD's steps.
        low: Lower end of its interval.
        high: Upper end.
        each: The median of every process.
    """

    ms: float
    ratio: float
    low: float
    high: float
    each: list[float]


def seconds(step: Callable[[], None], cuda: bool) -> float:
    """Duration of a step."""
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def turns(problem: Problem, names: Sequence[str], rounds: int) -> Measured:
    """One step of each optimizer in turns, with one of SGD between any two of them."""
    torch.set_num_threads(problem.args.threads)
    cuda = problem.args.device == "cuda"
    base = problem.prepare(sgd)[2]
    steps = {name: problem.prepare(OPTIMIZERS[name])[2] for name in names}
    for step in (base, *steps.values()) * WARM_UP:
        step()
    found: Measured = {name: [] for name in names}
    before = seconds(base, cuda)
    for _ in range(rounds):
        for name, step in steps.items():
            mine, after = seconds(step, cuda), seconds(base, cuda)
            found[name].append((1e3 * mine, 2 * mine / (before + after)))
            before = after
    return found


def in_processes(
    problem: Problem, names: Sequence[str], rounds: int, processes: int
) -> list[Measured]:
    """The same in several new processes, one after the other."""
    if processes == 1:
        return [turns(problem, names, rounds)]
    found = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        tasks = (repeat(same, processes) for same in (problem, names, rounds))
        for measured in pool.map(turns, *tasks):
            found.append(measured)
            medians = (f"{name}: {_median(steps):.4f}" for name, steps in measured.items())
            print(f"{problem.arch}, process {len(found)}: {'; '.join(medians)}", flush=True)
    return found


def summary(runs: list[Measured], name: str) -> Duration:
    """What the processes have found of one optimizer.

    The interval is that of the processes' medians, or of the ratios if there was but one process.
    """
    each = [_median(run[name]) for run in runs]
    ms = statistics.median(ms for run in runs for ms, _ in run[name])
    values = each if len(each) > 1 else [ratio for _, ratio in runs[0][name]]
    return Duration(ms, statistics.mean(each), *interval(values), each)


def mixed(most: Duration, some: Duration, share: float) -> Duration:
    """The mean over steps of which a share are of the second kind."""

    def mean(first: float, second: float) -> float:
        return (1 - share) * first + share * second

    each = [mean(*pair) for pair in zip(most.each, some.each, strict=True)]
    ends = mean(most.low, some.low), mean(most.high, some.high)
    low, high = interval(each) if len(each) > 1 else ends
    return Duration(mean(most.ms, some.ms), statistics.mean(each), low, high, each)


def _median(steps: list[tuple[float, float]]) -> float:
    return statistics.median(ratio for _, ratio in steps)


def interval(values: list[float]) -> tuple[float, float]:
    """Where the median of what values are drawn from lies with a probability of 95 %.

    That is so for independent values. Of six it is the smallest and the largest.
    """
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    first = max(0, int(len(values) / 2 - reach))
    return ordered[first], ordered[-1 - first]
