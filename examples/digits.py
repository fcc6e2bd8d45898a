"""Train a small network on handwritten digits with SINGD, SGD and AdamW side by side.

    python examples/digits.py
    python examples/digits.py --structures all

The 1,797 images of 8 x 8 pixels ship inside scikit-learn, so nothing is downloaded. All runs
start from the same weights, see the same batches and follow the same cosine schedule. Written to
the output folder: ``digits.png`` (training loss over steps and over seconds) and ``digits.csv``
(the curves).
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import tnkfac

BATCH_SIZE = 64
STRUCTURES = (
    "dense",
    "block30diagonal",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
    "triltopleftdiag",
    "trilbottomrightdiag",
    "triutopleftdiag",
    "triubottomrightdiag",
    "diagonal",
)


def singd(structures: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """SINGD with some structures."""
    return lambda model: tnkfac.SINGD(model.parameters(), lr=1e-2, structures=structures)


# Those of SGD and AdamW give the lowest final loss, or equal it within 1 %, at the default budget
# and as a mean over two seeds, of 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1. SINGD takes AdamW's.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    **{f"SINGD {structure}": singd(structure) for structure in STRUCTURES},
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=3e-1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


class DigitsNet(nn.Sequential):
    """A convolutional network with every kind of layer: grouped, transposed, normalised, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.act1 = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(64)
        self.act2 = nn.ReLU(inplace=True)
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.act3 = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(32 * 4 * 4, 10)


@dataclass
class Curve:
    """What one run measures."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    final_loss: float = math.nan
    accuracy: float = math.nan
    state_mib: float = 0.0


def digits(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised images ``[N, 1, 8, 8]`` and labels: a fixed, stratified 80/20 split."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    x_train, x_test = ((torch.tensor(part).float() - 4.9) / 6.0 for part in parts[:2])
    y_train, y_test = (torch.tensor(part) for part in parts[2:])
    images = (part.reshape(-1, 1, 8, 8).to(device) for part in (x_train, x_test))
    labels = (part.to(device) for part in (y_train, y_test))
    return (*images, *labels)  # type: ignore[return-value]


def batches(count: int, epochs: int, seed: int) -> Iterator[list[Tensor]]:
    """Shuffled index batches of every epoch; the last, smaller batch is used too."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield list(torch.randperm(count, generator=generator).split(BATCH_SIZE))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of correct answers."""
    model.eval()
    with torch.no_grad():
        correct = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return correct


def train(name: str, args: argparse.Namespace) -> tuple[Curve, torch.optim.Optimizer]:
    """Train one network; an ordinary loop, the same for every optimizer."""
    torch.manual_seed(args.seed)
    x, x_test, y, y_test = digits(args.device)
    model = DigitsNet().to(args.device)
    optimizer = OPTIMIZERS[name](model)
    steps = args.epochs * math.ceil(len(x) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve = Curve()
    elapsed = 0.0
    progress = tqdm(batches(len(x), args.epochs, args.seed), name, args.epochs, unit="epoch")
    for epoch in progress:
        start = time.perf_counter()
        for index in epoch:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            schedule.step()
            curve.losses.append(loss.item())
            curve.seconds.append(elapsed + time.perf_counter() - start)
        elapsed = curve.seconds[-1]
        curve.final_loss = sum(curve.losses[-len(epoch) :]) / len(epoch)
        curve.accuracy = accuracy(model, x_test, y_test)
        progress.set_postfix(loss=f"{curve.losses[-1]:.4f}", accuracy=f"{curve.accuracy:.1%}")
    curve.state_mib = state_mib(optimizer)
    return curve, optimizer


def state_mib(optimizer: torch.optim.Optimizer) -> float:
    """Memory of the tensors that the optimizer keeps."""
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / 2**20


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Debiased moving average of the logarithm: an arithmetic one would show its own decay.

    Losses below 1e-9, which a mean of 64 float32 terms does not resolve, count as 1e-9.
    """
    total, out = 0.0, []
    for step, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * math.log(max(value, 1e-9))
        out.append(math.exp(total / (1 - weight**step)))
    return out


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Training loss over steps and over seconds."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    colors = iter(plt.get_cmap("tab20" if len(curves) > 10 else "tab10").colors)
    for (name, curve), color in zip(curves.items(), colors, strict=False):
        losses = smooth(curve.losses)
        style = {"color": color, "linestyle": "-" if name.startswith("SINGD") else "--"}
        panels[0].semilogy(range(1, len(losses) + 1), losses, label=name, **style)
        panels[1].semilogy(curve.seconds, losses, **style)
    for panel, label in zip(panels, ("step", "time in training [s]"), strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training loss (geometric moving average)")
    figure.legend(loc="outside right center", fontsize="small")
    figure.suptitle("Handwritten digits, 8 x 8 pixels")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_csv(curves: dict[str, Curve], path: Path) -> None:
    """One row per optimizer and step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["optimizer", "step", "seconds", "loss"])
        for name, curve in curves.items():
            for step, row in enumerate(zip(curve.seconds, curve.losses, strict=True), start=1):
                writer.writerow([name, step, f"{row[0]:.4f}", f"{row[1]:.6e}"])


def table(curves: dict[str, Curve]) -> str:
    """One line per optimizer; the final loss is the mean over the last epoch's steps."""
    header = f"{'optimizer':28}{'final loss':>12}{'accuracy':>10}{'ms / step':>11}{'state MiB':>11}"
    lines = [header, "-" * len(header)]
    for name, curve in curves.items():
        step_ms = 1e3 * curve.seconds[-1] / len(curve.seconds)
        lines.append(
            f"{name:28}{curve.final_loss:12.1e}{curve.accuracy:10.2%}"
            f"{step_ms:11.2f}{curve.state_mib:11.3f}"
        )
    return "\n".join(lines)


def positive_int(text: str) -> int:
    """An int of at least one, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value


def structure_list(text: str) -> list[str]:
    """Names of structures, for argparse."""
    names = list(STRUCTURES) if text == "all" else text.split(",")
    unknown = [name for name in names if name not in STRUCTURES]
    if unknown:
        supported = ", ".join(("all", *STRUCTURES))
        raise argparse.ArgumentTypeError(f"got {unknown[0]!r}. Supported: {supported}.")
    return names


def usable_device(text: str) -> str:
    """The name of a device that holds tensors here, for argparse."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from None
    return text


def main(argv: list[str] | None = None) -> int:
    """Train, print the table and the report, draw the picture."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    shown = " (default: %(default)s)"
    option("--device", type=usable_device, default=default, help=f"cpu, cuda, ..{shown}")
    option("--epochs", type=positive_int, default=15, help=f"passes over the images{shown}")
    option("--seed", type=int, default=0, help=f"of the weights and the order of the data{shown}")
    option(
        "--structures",
        type=structure_list,
        default="diagonal,dense",
        help=f"of SINGD, separated by commas, or all{shown}",
    )
    option("--out", type=Path, default=Path("digits-results"), help=f"folder to write to{shown}")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    if args.device == "cpu":
        torch.set_num_threads(1)  # layers this small gain nothing from more

    names = [*(f"SINGD {structure}" for structure in args.structures), "SGD", "AdamW"]
    runs = {name: train(name, args) for name in names}
    curves = {name: curve for name, (curve, _) in runs.items()}
    first = runs[names[0]][1]
    assert isinstance(first, tnkfac.SINGD)
    print(f"\nHow {names[0]} trains each parameter:\n{first.report()}")
    print(f"\n{table(curves)}")
    draw(curves, args.out / "digits.png")
    write_csv(curves, args.out / "digits.csv")
    print(f"\nWritten: {args.out / 'digits.png'}, {args.out / 'digits.csv'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
