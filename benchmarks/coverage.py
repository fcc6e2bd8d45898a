"""Which share of the matrices of real networks SINGD measures curvature of.

    python benchmarks/coverage.py --jobs 2          # resumes where it was stopped
    python benchmarks/coverage.py --only timm/swin  # some, printed alone
    python benchmarks/coverage.py --report          # the table and the picture of what there is

Every network takes two steps. What a network multiplies with is read off the graph of its loss: a
parameter counts that reaches a matrix product or a convolution through views and casts alone.
Embeddings and heads that are tied to them, tables that are added, weights that are computed from
others (standardised, parametrised) and those of fused recurrent kernels are listed beside.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing as mp
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tnkfac
from zoo import Network, networks

RESULTS = Path(__file__).parent / "results" / "coverage.csv"
GOOD, PART, LEAST = 0.99, 0.97, 0.9
"""Share that is wanted, of how many networks, and of all others."""
LARGEST = 100e6
"""Parameters up to which networks are built."""
PRODUCTS = re.compile(r"^(Addmm|Mm|Bmm|Addmv|Mv|Baddbmm|.*Convolution|GroupedMm)Backward\d*$")
VIEWS = re.compile(
    r"^(T|Transpose|Permute|View|UnsafeView|ReshapeAlias|AsStrided|Slice|Select|Split|Unbind|"
    r"SplitWithSizes|Chunk|ToCopy|Expand|Unsqueeze|Squeeze|Clone|Alias|Contiguous)Backward\d*$"
)
LOOKUPS = re.compile(r"^(Embedding|EmbeddingBag|Index|IndexSelect|Gather)Backward\d*$")


class OptimizerFailedError(Exception):
    """A network that runs by itself did not with an optimizer."""


@dataclass(frozen=True)
class Coverage:
    """How the matrices of a network were treated.

    Attributes:
        library: Where it comes from.
        name: What it is called there.
        parameters: Numbers of all parameters.
        matrices: Numbers of the parameters that calls multiply with as they are.
        stock: Of these, numbers of those whose layers of ``torch.nn`` were called.
        measured: Of these, numbers whose curvature was measured within two steps.
        aside: Numbers of other parameters with two axes or more.
        note: Why nothing was measured, or the largest matrix without curvature.
    """

    library: str
    name: str
    parameters: int = 0
    matrices: int = 0
    stock: int = 0
    measured: int = 0
    aside: int = 0
    note: str = ""

    @property
    def share(self) -> float:
        """Of the matrices, how much was measured."""
        return self.measured / self.matrices if self.matrices else 1.0

    @property
    def share_of_modules(self) -> float:
        """The same, were only calls of supported modules looked at."""
        return self.stock / self.matrices if self.matrices else 1.0


# ------------------------------------------------------------------------------- one network


def loss_of(output: Any) -> Tensor:
    """A loss that all outputs have a part in."""
    logits = getattr(output, "logits", None)
    leaves = [logits] if isinstance(logits, Tensor) else tree_leaves(_values(output))
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    return sum((t.float().square().mean() for t in wanted), torch.zeros(()))


def _values(output: Any) -> Any:
    return dict(output) if hasattr(output, "items") else output


def called(model: nn.Module, inputs: Any) -> Any:
    """The outputs of a network."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def multiplied(loss: Tensor) -> tuple[set[int], set[int]]:
    """``id`` of the parameters that products take as they are, and of those that are looked up."""
    products: set[int] = set()
    lookups: set[int] = set()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if PRODUCTS.match(name):
            products |= {id(p) for p in _operands(node)}
        elif LOOKUPS.match(name):
            lookups |= {id(p) for p in _operands(node)}
        waiting += [following for following, _ in node.next_functions]
    return products, lookups


def _operands(node: Any) -> Iterator[Tensor]:
    """Parameters that a node takes, through views and casts."""
    for following, _ in node.next_functions:
        if following is None:
            continue
        if hasattr(following, "variable"):
            yield following.variable
        elif VIEWS.match(following.name()):
            yield from _operands(following)


LAYERS = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@contextmanager
def called_layers(model: nn.Module) -> Iterator[set[int]]:
    """``id`` of the weights of layers of ``torch.nn`` that are called inside."""
    found: set[int] = set()
    handles = [
        module.register_forward_hook(lambda m, *_: found.add(id(m.weight)))
        for module in model.modules()
        if type(module).forward in {kind.forward for kind in LAYERS}
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first_pass(model: nn.Module, network: Network) -> tuple[Any, set[int], set[int]]:
    """Inputs that a network bears, and what it multiplies with and looks up."""
    error: Exception | None = None
    for make in network.inputs:
        torch.manual_seed(0)
        try:
            inputs = make()
            loss = loss_of(called(model, inputs))
            found = multiplied(loss)
            loss.backward()  # type: ignore[no-untyped-call]
        except Exception as raised:  # of the network: another size may do
            error = error or raised
            continue
        model.zero_grad()
        return (inputs, *found)
    raise RuntimeError(f"{type(error).__name__}: {error}")


def two_steps(model: nn.Module, inputs: Any) -> list[Any]:
    """What an optimizer reports after two steps."""
    optimizer = tnkfac.SINGD(model.parameters(), lr=1e-5, structures="diagonal")
    try:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(called(model, inputs)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    except Exception as error:
        raise OptimizerFailedError(f"{type(error).__name__}: {error}") from error
    return optimizer.report()


def cover(network: Network) -> Coverage:
    """Build a network, train it for two steps, and see what was measured."""
    torch.manual_seed(0)
    model = network.build().train()
    with called_layers(model) as stock:
        inputs, products, lookups = first_pass(model, network)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items() if sum(size > 1 for size in p.shape) > 1}
    counted = {n: p for n, p in matrices.items() if id(p) in products and id(p) not in lookups}
    rows = two_steps(model, inputs)
    measured: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for row in rows:
        name = row.name.partition("[")[0]
        reasons[name] = row.reason
        if row.last_update is not None:
            measured[name] += prod(row.shape)
    lost = {n: p.numel() - measured[n] for n, p in counted.items() if measured[n] < p.numel()}
    worst = max(lost, key=lambda name: lost[name], default="")
    return Coverage(
        network.library,
        network.name,
        sum(p.numel() for p in named.values()),
        sum(p.numel() for p in counted.values()),
        sum(p.numel() for p in counted.values() if id(p) in stock),
        sum(p.numel() for p in counted.values()) - sum(lost.values()),
        sum(p.numel() for n, p in matrices.items() if n not in counted),
        f"{worst} ({lost[worst] / sum(lost.values()):.0%} of what is lost): {reasons.get(worst)}"
        if lost
        else "",
    )


# ------------------------------------------------------------------------------- all of them


def guarded(network: Network) -> Coverage:
    """The same; what a network itself does not bear is told in the note."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in network.build().parameters())
    except Exception:  # not all can be built without memory
        size = 0
    if size > LARGEST:
        return Coverage(network.library, network.name, size, note="skipped: too large")
    try:
        return cover(network)
    except OptimizerFailedError as error:
        text = "FAILED with the optimizer: " + " ".join(str(error).split())[:300]
        return Coverage(network.library, network.name, size, matrices=size, note=text)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        text = re.sub(r"/\S*/site-packages/", "", text)[:200]
        return Coverage(network.library, network.name, size, note=f"did not run: {text}")


def in_process(network: Network, seconds: float) -> Coverage:
    """The same in a process of its own, which may crash or hang."""
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        warnings.simplefilter("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sender.send(guarded(network))

    process = context.Process(target=work, daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        note = "did not run: no end in time"
    except EOFError:
        note = "did not run: the process ended"
    finally:
        process.kill()
        process.join()
    return Coverage(network.library, network.name, note=note)


def known(path: Path) -> list[Coverage]:
    """What has been measured before."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        kinds = {field.name: str if field.type == "str" else int for field in fields(Coverage)}
        return [
            Coverage(**{key: kinds[key](value) for key, value in row.items()})
            for row in csv.DictReader(file)
        ]


def measure(chosen: list[Network], path: Path, jobs: int, seconds: float) -> None:
    """Measure what is not known yet; every result is written at once."""
    done = {(found.library, found.name) for found in known(path)}
    left = [n for n in chosen if (n.library, n.name) not in done]
    new = not path.exists()
    with path.open("a", newline="") as file, ThreadPoolExecutor(jobs) as pool:
        writer = csv.DictWriter(file, [field.name for field in fields(Coverage)])
        if new:
            writer.writeheader()
        for found in pool.map(lambda n: in_process(n, seconds), left):
            writer.writerow(asdict(found))
            file.flush()


# ------------------------------------------------------------------------------- what is shown


def summary(found: list[Coverage]) -> str:
    """The table."""
    ran = [c for c in found if c.matrices]
    lines = [
        f"{'':<28}{'networks':>9}{'>= .99':>9}{'< .90':>7}{'median':>8}{'modules alone >= .99':>22}"
    ]
    libraries = sorted({c.library for c in ran})
    for library in [*libraries, "all"]:
        some = sorted((c for c in ran if library in (c.library, "all")), key=lambda c: c.share)
        good = sum(c.share >= GOOD for c in some) / len(some)
        before = sum(c.share_of_modules >= GOOD for c in some) / len(some)
        bad = sum(c.share < LEAST for c in some)
        median = some[len(some) // 2].share
        lines.append(
            f"{library:<28}{len(some):>9}{good:>9.1%}{bad:>7}{median:>8.3f}{before:>22.1%}"
        )
    skipped = sum("skipped" in c.note for c in found)
    lines.append(
        f"\n{skipped} larger than {LARGEST:.0e} parameters; {len(found) - len(ran) - skipped} "
        "could not be built from their name alone, or did not run without an optimizer."
    )
    below = sorted((c for c in ran if c.share < GOOD), key=lambda c: c.share)
    lines += [f"{c.share:6.3f}  {c.library}/{c.name}: {c.note}" for c in below[:40]]
    return "\n".join(lines)


def draw(found: list[Coverage], path: Path) -> None:
    """Shares of all networks in order, with and without the calls that models make themselves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ran = [c for c in found if c.matrices]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    sides = (
        ("calls of modules alone", [c.share_of_modules for c in ran], "tab:gray"),
        ("calls that use a weight", [c.share for c in ran], "tab:blue"),
    )
    for label, shares, color in sides:
        axes.step(range(1, len(shares) + 1), sorted(shares), where="mid", label=label, color=color)
    axes.set(
        xlabel=f"networks, in order ({len(ran)})",
        ylabel="share of the matrices",
        title="Matrices whose curvature was measured within two steps",
        ylim=(-0.02, 1.02),
        xlim=(1, max(2, len(ran))),
    )
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="print those alone whose library/name begins like this")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--seconds", type=float, default=120, help="for each network, at most")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.only:
        for network in networks():
            if f"{network.library}/{network.name}".startswith(args.only):
                found = guarded(network)
                print(f"{found.share_of_modules:.4f} -> {found.share:.4f} {found}", flush=True)
        return
    if not args.report:
        measure([*networks()], args.out, args.jobs, args.seconds)
    found = known(args.out)
    print(summary(found))
    draw(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
