"""How wrong is a weight gradient from a sample of the stored input, and what should be dropped?

    python examples/crs_study.py

The nine convolutions of an untrained All-CNN-C (CIFAR-100) run on generated smooth images. At
every kept fraction of their stored inputs, randomised backpropagation drops channels, pixels (rows
and columns), or samples of the batch. Its error is the norm of the residual of a layer's weight
gradient, relative to the exact one; shown are the mean over layers and draws, and the range of the
layers' means. Channels are disjoint blocks of the gradient, so that their error is sqrt(1 / p - 1)
in the root mean square, for any data. Neighbouring pixels contribute alike, so that those kept
stand in for those dropped: the error is smaller at the same memory.

Written to the output folder: ``crs-study.png`` and ``crs-study.csv``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tnkfac.einsum import crs

CLASSES = 100
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9)
STYLES = {  # what is sampled: colour, marker, label
    "channels": ("tab:orange", "o", "channels"),
    "batch": ("tab:green", "s", "samples"),
    "space": ("tab:blue", "D", "pixels (rows and columns)"),
}
Errors = dict[str, Tensor]  # what is sampled -> [fraction, draw, layer]


def all_cnn_c() -> nn.Sequential:
    """All-CNN-C for 100 classes as in DeepOBS, without dropout."""
    layers: list[nn.Module] = []
    for c_in, c_out, kernel, stride, padding in (
        (3, 96, 3, 1, 1),
        (96, 96, 3, 1, 1),
        (96, 96, 3, 2, 0),
        (96, 192, 3, 1, 1),
        (192, 192, 3, 1, 1),
        (192, 192, 3, 2, 0),
        (192, 192, 3, 1, 0),
        (192, 192, 1, 1, 0),
        (192, CLASSES, 1, 1, 0),
    ):
        if stride == 2:  # TensorFlow's "same" puts the odd zero behind
            layers.append(nn.ZeroPad2d((0, 1, 0, 1)))
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding)
        nn.init.xavier_normal_(conv.weight)
        nn.init.constant_(conv.bias, 0.1)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def generated_batch(size: int) -> tuple[Tensor, Tensor]:
    """Smooth random images ``[size, 3, 32, 32]`` and random labels."""
    coarse = torch.randn(size, 3, 6, 6)
    images = F.interpolate(coarse, (32, 32), mode="bicubic") + 0.1 * torch.randn(size, 3, 32, 32)
    images = (images - images.mean()) / images.std()
    return images, torch.randint(CLASSES, (size,))


def weight_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradient of the mean loss with respect to the weight of every convolution."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    loss = F.cross_entropy(model(images), labels)
    return list(torch.autograd.grad(loss, weights))


def measure(draws: int, batch: int) -> Errors:
    """Relative errors of all draws, at all fractions and for all that is sampled."""
    model, (images, labels) = all_cnn_c(), generated_batch(batch)
    exact = weight_gradients(model, images, labels)
    errors = {key: torch.empty(len(FRACTIONS), draws, len(exact)) for key in STYLES}
    rounds = [
        (key, f, draw) for key in STYLES for f in range(len(FRACTIONS)) for draw in range(draws)
    ]
    for key, f, draw in tqdm(rounds, leave=False):
        with crs.apply(model, keep={key: FRACTIONS[f]}):
            estimates = weight_gradients(model, images, labels)
        for layer, (estimate, truth) in enumerate(zip(estimates, exact, strict=True)):
            errors[key][f, draw, layer] = (estimate - truth).norm() / truth.norm()
    return errors


def theory(fraction: float) -> float:
    """Root mean square of the relative error of channel sampling."""
    return float((1 / fraction - 1) ** 0.5)


def write_table(path: Path, errors: Errors) -> None:
    """Mean errors, to the terminal and to a file."""
    rows = [
        [p, *(errors[key][f].mean().item() for key in STYLES), theory(p)]
        for f, p in enumerate(FRACTIONS)
    ]
    header = ["kept fraction", *STYLES, "sqrt(1/p - 1)"]
    print("  ".join(f"{title:>13}" for title in header))
    for row in rows:
        print("  ".join(f"{value:>13.2f}" for value in row))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{value:.4f}" for value in row] for row in rows)


def draw_figure(path: Path, errors: Errors) -> None:
    """Errors over the kept fraction."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    curve = torch.linspace(0.085, 0.92, 200).tolist()
    label = r"theory for channels: $\sqrt{1/p - 1}$"
    axes.plot(curve, [theory(p) for p in curve], color="0.3", ls="--", lw=1.2, label=label)
    for key, (colour, marker, name) in STYLES.items():
        layers = errors[key].mean(1)
        low, high = layers.min(1).values.tolist(), layers.max(1).values.tolist()
        axes.fill_between(FRACTIONS, low, high, color=colour, alpha=0.15, lw=0)
        mean = layers.mean(1).tolist()
        axes.plot(FRACTIONS, mean, color=colour, marker=marker, ms=5, label=name)
    axes.set_yscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 3]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xticks(FRACTIONS)
    axes.set_xlabel("kept fraction p of the stored layer input")
    axes.set_ylabel("relative error of the weight gradient")
    axes.set_title("Randomised backpropagation, untrained All-CNN-C", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def positive(text: str) -> int:
    """An int of at least one, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=positive, default=4, help="masks (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="weights, images and masks")
    parser.add_argument("--out", type=Path, default=Path("crs-results"), help="output folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    errors = measure(args.draws, args.batch)
    write_table(args.out / "crs-study.csv", errors)
    draw_figure(args.out / "crs-study.png", errors)
    print(f"\nWritten: {args.out / 'crs-study.png'}, {args.out / 'crs-study.csv'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
