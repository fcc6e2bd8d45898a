"""Where the time of a training step of SINGD goes, what it launches, and what its hooks read.

    python benchmarks/profile_step.py                        # ResNet18, batch 16, 224 x 224 pixels
    python benchmarks/profile_step.py --arch vgg11 --size 128 --structures dense
    python benchmarks/profile_step.py --device cuda --batch 128 --size 256
    python benchmarks/profile_step.py --quick                # small images

A step with an update of the preconditioner and one without are broken into parts by torch's
profiler, next to a step of SGD. Launches are CUDA kernels and copies; on the CPU the operations
that would be one are counted instead. The second table holds, for each layer, what the hooks read
over the least that there is to read: its input and its output gradient, once.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import tnkfac
from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.capture.tap import Tap
from tnkfac.curvature.moments import position_sums
from tnkfac.optim import base
from tnkfac.optim.rules import runner
from tnkfac.optim.step import pipeline

CLASSES = 100
PARTS = (
    "forward",
    "taps in the forward pass",
    "backward",
    "statistics in the backward pass",
    "search for non-finite numbers",
    "factor update",
    "preconditioning",
    "parameter update",
    "rest of the step",
)
VIEWS = ("view", "reshape", "expand", "transpose", "permute", "detach", "alias", "as_strided",
         "unsqueeze", "squeeze", "select", "slice", "t", "unbind", "split", "flatten", "movedim",
         "split_with_sizes", "empty", "empty_like", "empty_strided", "resolve_conj", "lift_fresh",
         "unfold", "diagonal", "chunk", "narrow", "result_type", "is_nonzero", "item", "to",
         "_unsafe_view", "_local_scalar_dense", "_reshape_alias", "detach_", "view_as",
         "expand_as")  # fmt: skip
"""Operations that launch nothing by themselves."""
LISTS = ("aten::_foreach_norm", "aten::_foreach_copy_", "aten::_fused_", "aten::_foreach_add")
"""Operations on lists of tensors that are one kernel, or few."""
RUNTIME = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")
"""How calls that launch a kernel or a copy begin."""


def _named(owner: Any, name: str, part: str) -> tuple[Any, str, Any]:
    """Put calls of a function under the name of a part; returns what undoes it."""
    known = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return known(*args, **kwargs)

    setattr(owner, name, call)
    return owner, name, known


@contextmanager
def parts_named() -> Iterator[None]:
    """Name the parts of a step for the profiler."""
    changed = [
        _named(Tap, "__call__", PARTS[1]),
        _named(Statistics, "measure", PARTS[3]),
        _named(base, "non_finite", PARTS[4]),
        _named(runner.RuleRunner, "update", PARTS[5]),
        _named(pipeline, "scaled_gradients", PARTS[6]),
        _named(pipeline.triton_step, "sized_gradients", PARTS[6]),
        _named(runner.RuleRunner, "diagonals", PARTS[6]),
        _named(runner.RuleRunner, "precondition", PARTS[6]),
        _named(pipeline, "graft_", PARTS[7]),
        _named(pipeline, "apply_", PARTS[7]),
        _named(pipeline.elementwise, "norm", PARTS[6]),
        _named(pipeline.elementwise, "step_large", PARTS[7]),
        _named(base, "step_others", PARTS[7]),
    ]
    try:
        yield
    finally:
        for owner, name, known in reversed(changed):
            setattr(owner, name, known)


def profiled(
    model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, device: str
) -> tuple[dict[str, float], Counter[str]]:
    """Milliseconds and launches of every part of one step; on CUDA, those of its kernels."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with parts_named(), profile(activities=kinds) as prof:
        optimizer.zero_grad()
        with record_function(PARTS[0]):
            loss = nn.functional.cross_entropy(model(x), y)
        with record_function(PARTS[2]):
            loss.backward()
        with record_function(PARTS[8]):
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    events = list(prof.events() or [])
    return launched(events) if device == "cuda" else _on_host(events)


def _on_host(events: Iterable[Any]) -> tuple[dict[str, float], Counter[str]]:
    """The same where one thread does everything, and operations stand for launches."""
    times = dict.fromkeys(PARTS, 0.0)
    launches: Counter[str] = Counter()
    for event in events:
        if event.name in PARTS:
            spent = event.time_range.elapsed_us() / 1e3
            times[event.name] += spent
            outer = _part(event.cpu_parent)
            if outer is not None:  # what is inside of another part is not that part's
                times[outer] -= spent
        part = _part(event)
        if part is not None:
            launches[part] += _is_launch(event)
    return times, launches


def launched(events: Sequence[Any]) -> tuple[dict[str, float], Counter[str]]:
    """Milliseconds and number of what was launched inside of every part.

    A launch belongs to the innermost part that lasts when it is called, in whatever thread: the
    backward pass has one of its own, for which the main thread waits. Kernels of Triton are
    launched by no operation of torch, so calls of the runtime are counted.

    Args:
        events: Of the profiler. A call of the runtime and what it launches have the same ``id``.
    """
    times = dict.fromkeys(PARTS, 0.0)
    launches: Counter[str] = Counter()
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    parts = [event.time_range for event in on_host if event.name in PARTS]
    names = [event.name for event in on_host if event.name in PARTS]
    spent = {
        event.id: event.time_range.elapsed_us()
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    }
    for event in on_host:
        if event.name.startswith(RUNTIME):
            now = event.time_range.start
            lasting = [i for i, part in enumerate(parts) if part.start <= now <= part.end]
            if lasting:
                name = names[min(lasting, key=lambda i: parts[i].elapsed_us())]
                launches[name] += 1
                times[name] += spent.get(event.id, 0.0) / 1e3
    return times, launches


def _part(event: Any) -> str | None:
    """The innermost part that an event belongs to."""
    while event is not None:
        if event.name in PARTS:
            return str(event.name)
        event = event.cpu_parent
    return None


def _is_launch(event: Any) -> bool:
    """Whether an event is an operation that would be a kernel or more on a device."""
    outer = event.cpu_parent
    while outer is not None:
        if _in_list(outer):
            return False
        outer = outer.cpu_parent
    if _in_list(event):
        return True
    if not event.name.startswith("aten::") or event.name.removeprefix("aten::") in VIEWS:
        return False
    inner = [child.name for child in event.cpu_children]
    return not any(n.startswith("aten::") and n.removeprefix("aten::") not in VIEWS for n in inner)


def _in_list(event: Any) -> bool:
    """Whether an event is one operation on a list of tensors, without broadcasting."""
    return event is not None and event.name.startswith(LISTS)


class Reading(TorchDispatchMode):
    """Bytes of the tensors that operations take, views aside."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in VIEWS:
            flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
            self.bytes += sum(_bytes(value) for value in flat if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def readings(
    optimizer: Any, backward: Callable[[], None]
) -> list[tuple[str, tuple[int, ...], float, float]]:
    """For every call of a layer: its name, the shape of its input, megabytes read, and the least.

    Args:
        optimizer: Whose taps are on.
        backward: Does a forward and a backward pass.
    """
    names = {id(layer.statistics): layer.name for layer in optimizer._registry.layers}
    found: list[tuple[str, tuple[int, ...], float, float]] = []
    known = Statistics.measure

    def measure(self: Any, layer: Any, x: Tensor, g: Tensor, *others: Any) -> Any:
        with Reading() as reading:
            result = known(self, layer, x, g, *others)
        least = _bytes(x) + _bytes(g)
        found.append((names[id(self)], tuple(x.shape), reading.bytes / 1e6, least / 1e6))
        return result

    Statistics.measure = measure  # type: ignore[method-assign]
    try:
        backward()
    finally:
        Statistics.measure = known  # type: ignore[method-assign]
    return found


def main(argv: list[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="resnet18", help="a network of torchvision")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--structures", default="diagonal")
    parser.add_argument("--kfac-approx", default="reduce", choices=["expand", "reduce"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--quick", action="store_true", help="batch 4, 64 x 64 pixels")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.size = 4, 64

    def network() -> nn.Module:
        torch.manual_seed(0)
        model = torchvision.models.get_model(args.arch, num_classes=CLASSES)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        return model.to(args.device, memory_format=layout)  # type: ignore[no-any-return]

    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    if args.channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = torch.randint(CLASSES, (args.batch,), device=args.device)
    first, second = network(), network()
    sgd = torch.optim.SGD(first.parameters(), lr=1e-3, momentum=0.9)
    structures, approx = args.structures, args.kfac_approx
    singd = tnkfac.SINGD(second.parameters(), structures=structures, kfac_approx=approx, T=2)
    for _ in range(4):  # state, plans, second taps; then steps 4 and 5 have and have not an update
        for model, optimizer in ((first, sgd), (second, singd)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def backward() -> None:
        nn.functional.cross_entropy(second(x), y).backward()

    read = readings(singd, backward)
    columns = {
        "SGD": profiled(first, sgd, x, y, args.device),
        "with an update": profiled(second, singd, x, y, args.device),
        "without": profiled(second, singd, x, y, args.device),
    }
    unit = "launches" if args.device == "cuda" else "operations"
    print(f"{args.arch}, batch {args.batch}, {args.size} x {args.size}, {structures}, {approx}")
    print(f"{'':34}" + "".join(f"{name:>26}" for name in columns))
    print(f"{'':34}" + f"{'ms':>14}{unit:>12}" * len(columns))
    for part in PARTS:
        cells = (f"{times[part]:14.2f}{counts[part]:12}" for times, counts in columns.values())
        print(f"{part:34}" + "".join(cells))
    layers = len(read)
    in_hooks = {
        name: sum(counts[part] for part in (PARTS[1], PARTS[3]))
        for name, (_, counts) in columns.items()
    }
    added = {name: sum(counts[part] for part in PARTS[4:]) for name, (_, counts) in columns.items()}
    print(
        f"\n{layers} layers; {unit} in hooks per layer: "
        f"{in_hooks['with an update'] / layers:.1f}; in step,"
    )
    over = {name: count - added["SGD"] for name, count in added.items()}
    print(
        f"over SGD's: {over['with an update']} with an update, {over['without']} without "
        f"({in_hooks['without']} in hooks)"
    )
    by_kernels = (structures, approx) == ("diagonal", "reduce")
    if by_kernels and position_sums.triton_kernels(x) is not None:
        print("\nTriton's kernels read every input and output gradient once.")
        return 0
    print(f"\n{'layer':28}{'input':>24}{'MB read':>12}{'least':>10}{'ratio':>8}")
    for name, shape, mine, least in read:
        print(f"{name:28}{shape!s:>24}{mine:12.2f}{least:10.2f}{mine / least:8.2f}")
    total, least = sum(row[2] for row in read), sum(row[3] for row in read)
    print(f"{'all':52}{total:12.2f}{least:10.2f}{total / least:8.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
