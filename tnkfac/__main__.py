"""The command line: ``python -m tnkfac``."""

from __future__ import annotations

import argparse
import ast
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnkfac import SINGD, __version__
from tnkfac.curvature import explain
from tnkfac.einsum import networks
from tnkfac.optim.params.parts import home
from tnkfac.optim.report.cost import estimated, rows_of_layers
from tnkfac.optim.report.named_models import NamedModel, Sizes, find_model

EXAMPLES = """\
examples:
  python -m tnkfac report resnet18
  python -m tnkfac report gpt2 --tokens 512 --batch 4
  python -m tnkfac report vit_b_16 --structures diagonal block32diagonal --batch 64
  python -m tnkfac explain "Conv2d(64, 64, 3, padding=1)" 8,64,56,56
  python -m tnkfac draw kfac_reduce_factor x=8,16,32,32 kernel_size=3 padding=1 --out factor.svg
  python -m tnkfac bench resnet18 --batch 8 --size 64
exit codes: 0 done, 2 for what is wrong with the arguments
"""
STRUCTURES = ("auto", "diagonal", "block32diagonal", "dense")


class UsageError(Exception):
    """An error in the arguments of a command."""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = argparse.ArgumentParser(
        prog="python -m tnkfac",
        description="What SINGD and KFAC make of a network, and what that costs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"tnkfac {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="layers of a network, treatment, state, cost")
    report.add_argument("model", help="a network of torchvision, timm or transformers")
    report.add_argument("--structures", nargs="+", default=list(STRUCTURES), metavar="NAME")
    report.add_argument("--kfac-approx", choices=("expand", "reduce"), default="reduce")
    report.add_argument("--interval", type=int, default=10, help="steps between updates")
    report.add_argument("--layers", action="store_true", help="a line for each parameter, too")
    bench = commands.add_parser("bench", help="time of a step over that of SGD, on this machine")
    bench.add_argument("model", nargs="?", default="resnet18")
    bench.add_argument("--structures", nargs="+", default=["diagonal"], metavar="NAME")
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--device", default="cpu")
    for command, batch, size in ((report, 32, 224), (bench, 8, 64)):
        command.add_argument("--tokens", type=int, default=128, help="of a sentence")
        command.add_argument("--batch", type=int, default=batch)
        command.add_argument("--size", type=int, default=size, help="pixels")
    routes = commands.add_parser("explain", help="how the input factor of a layer is computed")
    routes.add_argument("layer", help='for example "Conv2d(64, 64, 3, padding=1)"')
    routes.add_argument("shape", help="of its input, for example 8,64,56,56")
    routes.add_argument("--kfac-approx", choices=("expand", "reduce"), default="expand")
    routes.add_argument("--structure", default="dense")
    draw = commands.add_parser("draw", help="the tensor network of an operation, as a diagram")
    draw.add_argument("operation", help="a name of tnkfac.einsum.networks")
    draw.add_argument("arguments", nargs="*", metavar="NAME=VALUE", help="shapes as 8,16,32,32")
    draw.add_argument("--out", default="network.svg", help=".svg or .png")
    return root


# ------------------------------------------------------------------------------- commands


def report(args: argparse.Namespace) -> None:
    """Layers and their treatment; for every structure bytes of the state and cost of a step."""
    named = _model(args.model)
    with torch.device("meta"):
        model = named.build().train()
        inputs = named.inputs(model, Sizes(args.batch, args.size, args.tokens, "meta"))
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs.values())
    print(f"{args.model}, input {shapes}, kfac_approx={args.kfac_approx}, T={args.interval}\n")
    rows: list[tuple[str, float, float]] = []
    for name in args.structures:
        optimizer = _optimizer(model, name, args)
        try:
            seen = rows_of_layers(optimizer, model, lambda: named.run(model, inputs))
        except Exception as error:  # whatever a network raises that needs numbers
            seen = {}
            if not rows:
                print(f"Without numbers it does not run, so that costs are unknown: {error}\n")
        if not rows:
            print(_share(optimizer, model, seen), "\n")
            if args.layers:
                print(optimizer.report(), "\n")
        estimate = estimated(optimizer, seen, args.interval)
        rows.append((name, estimate.state_bytes / 2**20, estimate.ratio))
        optimizer.close()
    print(f"{'structures':<20}{'state, MiB':>12}{'step over SGD, estimated':>28}")
    for name, mebibytes, ratio in rows:
        print(f"{name:<20}{mebibytes:>12.1f}{ratio:>28.2f}")
    adam = 2 * sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(f"{'(AdamW)':<20}{adam:>12.1f}{1:>28.2f}")
    print("\nEstimates count multiply-adds; `python -m tnkfac bench` measures.")


def _optimizer(model: nn.Module, structures: str, args: argparse.Namespace) -> SINGD:
    try:
        return SINGD(
            model.parameters(),
            structures=structures,
            kfac_approx=args.kfac_approx,
            T=args.interval,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _share(optimizer: SINGD, model: nn.Module, seen: dict[int, int]) -> str:
    """Which share of the matrices of a network is preconditioned, and what is not."""
    registry = optimizer._registry
    used = [la.weight for la in registry.layers if not seen or id(la.statistics) in seen]
    matrices = sum(p.numel() for p in model.parameters() if _is_matrix(p))
    numbers = sum(p.numel() for p in model.parameters())
    share = sum(weight.numel() for weight in used) / max(1, matrices)
    listed = optimizer.report()
    captured = sum(bool(row.approximation) for row in listed)
    others = sorted(
        ((p.numel(), n) for n, p in registry.named() if _is_matrix(p) and _is_left(p, used)),
        reverse=True,
    )
    lines = [
        f"{numbers:,} parameters in {sum(1 for _ in model.parameters())} tensors, of which",
        f"{matrices:,} in matrices: {share:.1%} of these are preconditioned"
        + (f" (as {captured} tensors)." if seen else ", if all are used as their modules promise."),
    ]
    reasons = {row.name: row.reason for row in listed}
    lines += [f"  not {name}, {size:,}: {reasons.get(name, '')}" for size, name in others[:5]]
    return "\n".join(lines)


def _is_matrix(param: Tensor) -> bool:
    return sum(size > 1 for size in param.shape) > 1


def _is_left(param: Tensor, used: Sequence[Tensor]) -> bool:
    return all(home(weight) is not param for weight in used)


def bench(args: argparse.Namespace) -> None:
    """Steps of SGD and of SINGD in turns; the median of the ratios."""
    if args.rounds < 1:
        raise UsageError("--rounds: at least 1")
    named = _model(args.model)

    def prepared(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[], float]:
        torch.manual_seed(0)
        model = named.build().to(args.device)
        optimizer = make(model)
        sizes = Sizes(args.batch, args.size, args.tokens, args.device)
        inputs = named.inputs(model, sizes)
        y = torch.arange(args.batch, device=args.device) % 10

        def step() -> float:
            start = _now(args.device)
            optimizer.zero_grad()
            _loss(named.run(model, inputs), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return _now(args.device) - start

        step()
        step()
        return step

    reference = prepared(lambda m: torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9))
    print(f"{args.model}, batch {args.batch}, {args.size} pixels, {args.device}, reduce, T=1")
    print(f"{'optimizer':<32}{'ms':>10}{'over SGD':>12}")
    for name in args.structures:
        try:
            candidate = prepared(
                lambda m, name=name: SINGD(  # type: ignore[misc]
                    m.parameters(), lr=1e-4, structures=name, kfac_approx="reduce", T=1
                )
            )
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
        times, ratios = [], []
        for _ in range(args.rounds):
            before, duration, after = reference(), candidate(), reference()
            times.append(duration)
            ratios.append(2 * duration / (before + after))
        text = f"SINGD {name}"
        print(
            f"{text:<32}{1e3 * statistics.median(times):>10.1f}{statistics.median(ratios):>12.3f}"
        )


def explained(args: argparse.Namespace) -> None:
    """Candidates for the input factor of a layer."""
    try:
        with torch.device("meta"):
            module = _layer(args.layer)
        explain(module, _shape(args.shape), args.kfac_approx, args.structure)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def draw(args: argparse.Namespace) -> None:
    """Write the diagram of an operation."""
    if args.operation not in networks.__all__:
        listed = ", ".join(networks.__all__)
        raise UsageError(f"operation: got {args.operation!r}. Supported: {listed}.")
    operation = getattr(networks, args.operation)
    given: dict[str, Any] = {}
    for text in args.arguments:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"arguments: got {text!r}. Supported: NAME=VALUE.")
        given[name] = _value(value)
    try:
        network = operation(**given)
        network.draw(args.out, title=args.operation)
    except (TypeError, ValueError) as error:
        wanted = inspect.signature(operation)
        raise UsageError(f"{error}\n{args.operation}{wanted}") from error
    except ImportError as error:
        raise UsageError(str(error)) from error
    print(f"{network.equation}\n{args.out}")


# ------------------------------------------------------------------------------- arguments


def _model(name: str) -> NamedModel:
    """A network of torchvision, timm or transformers."""
    found = find_model(name)
    if found is None:
        raise UsageError(
            f"model: got {name!r}. Supported: networks of torchvision, timm and transformers, as "
            "far as these are installed."
        )
    return found


def _layer(text: str) -> nn.Module:
    """A module from how it is written in Python; nothing is evaluated."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id  # type: ignore[attr-defined]
        positional = [ast.literal_eval(value) for value in call.args]
        named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(
            f"layer: got {text!r}. Supported: as in Python, Conv2d(64, 64, 3, padding=1)."
        ) from error
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"layer: got {name!r}. Supported: names of torch.nn.")
    module: nn.Module = kind(*positional, **named)
    return module


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise ValueError(f"shape: got {text!r}. Supported: numbers, as in 8,64,56,56.") from error


def _loss(output: Any, y: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output[0]
    if logits.ndim > 2:  # of every token
        logits, y = logits.flatten(0, -2), y.repeat_interleave(logits.shape[1])
    return F.cross_entropy(logits, y)


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 for what is wrong with its arguments."""
    options = parser()
    args = options.parse_args(argv)
    commands = {"report": report, "bench": bench, "explain": explained, "draw": draw}
    try:
        commands[args.command](args)
    except UsageError as error:
        print(f"python -m tnkfac {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
