"""What planning costs: building a plan once, and what a later call adds to its tensor work.

    python benchmarks/planning.py

Times are medians of interleaved repetitions in one process. ``overhead`` is the difference
between a call of the function and the torch calls of its plan alone, on tensors so small that
nothing else is left.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tnkfac.einsum import Network, functional, networks
from tnkfac.einsum.plans import Plan


def tensor_work(plan: Plan, tensors: dict[str, Tensor]) -> Callable[[], None]:
    """The torch calls of a plan, with nothing around them."""
    first = next(iter(tensors.values()))
    values = dict(plan._fold_constants(first.dtype, first.device))

    def run() -> None:
        for slot, name, view in plan._views:
            value = tensors[name]
            for step in view:
                value = step(value)
            values[slot] = value
        for output, inputs, call, _ in plan._running:
            values[output] = call(*(values[slot] for slot in inputs))
        result = values[plan._program.result]
        for step in plan._finish:
            result = step(result)

    return run


def medians(calls: list[Callable[[], object]], repeats: int, inner: int) -> list[float]:
    """Microseconds per call, interleaved."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(inner):
                call()
            times[index].append((time.perf_counter() - start) / inner * 1e6)
    return [statistics.median(t) for t in times]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)

    print(f"{'cached call':22} {'call us':>9} {'tensor work us':>15} {'overhead us':>12}")
    for name, tensors, rest, options in (
        ("conv", {"x": x, "weight": weight}, (), {}),
        ("unfold", {"x": x}, (3,), {"padding": 1}),
        ("kfc_factor", {"x": x}, (3,), {"padding": 1}),
        ("kfac_reduce_factor", {"x": x}, (3,), {"padding": 1}),
        ("kfc_diagonal", {"x": x}, (3,), {"padding": 1}),
    ):
        function = getattr(functional, name)
        shapes = [tuple(t.shape) for t in tensors.values()]
        plan = Plan(getattr(networks, name)(*shapes, *rest, **options))

        def call(function=function, tensors=tensors, rest=rest, options=options) -> Tensor:
            return function(*tensors.values(), *rest, **options)

        whole, work = medians([call, tensor_work(plan, tensors)], args.repeats, 500)
        print(f"{name:22} {whole:9.1f} {work:15.1f} {whole - work:12.1f}")

    print(f"\n{'building once':22} {'network us':>11} {'plan us':>9} {'steps':>6}")
    sizes = iter(range(8, 10**6))  # a new shape every time, so that nothing is cached
    for name in ("conv", "kfc_factor", "kfac_reduce_factor", "kfc_diagonal"):
        function = getattr(networks, name)

        def build(function=function, name=name) -> Network:
            shape = (next(sizes), 16, 14, 14)
            return function(shape, (32, 16, 3, 3) if name == "conv" else 3, padding=1)

        network_us, both_us = medians([build, lambda b=build: Plan(b())], args.repeats, 20)
        steps = len(Plan(build()).steps)
        print(f"{name:22} {network_us:11.0f} {both_us - network_us:9.0f} {steps:6}")


if __name__ == "__main__":
    main()
