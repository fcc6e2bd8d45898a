"""Curves of a training run: CSV files that a resumed run goes on with, TensorBoard, a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from checkpoints import replacing, writing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = ("step", "epoch", "loss", "top1", "lr", "images_per_second", "grad_norm")
EPOCHS = ("step", "epoch", "loss", "top1", "top5", "seconds")
CURVATURE = ("step", "layer", "condition_input", "condition_output", "update_rms", "trust_region")


class Table:
    """Rows of a CSV file, each of which begins with a step.

    Args:
        path: The file.
        fields: Names of the columns.
        step: Rows of later steps are dropped: they are about to be made again.
    """

    def __init__(self, path: Path, fields: Sequence[str], step: int) -> None:
        self.path, self.fields = path, list(fields)
        self.rows: list[dict[str, Any]] = _rows(path, step) if step and path.exists() else []
        text = io.StringIO()
        writer = csv.DictWriter(text, self.fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: row.get(name, "") for name in self.fields} for row in self.rows)
        with replacing(path) as file:
            file.write(text.getvalue().encode())

    def add(self, **row: Any) -> None:
        """Append a row, and have it on disk."""
        self.rows.append(row)
        with writing(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.fields, lineterminator="\n").writerow(row)

    def column(self, name: str) -> list[float]:
        """Numbers of a column."""
        return [float(row[name]) for row in self.rows]


def _rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows up to a step; none of which only a part was written."""
    whole, end, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    rows = csv.DictReader(io.StringIO(whole + end))
    complete = [row for row in rows if None not in row and None not in row.values()]
    return [row for row in complete if row["step"].isdigit() and int(row["step"]) <= step]


class Logs:
    """All that one process of a run writes down.

    Args:
        folder: Where to.
        step: The step that the run goes on from.
        tensorboard: Whether to write for TensorBoard, too.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.steps = Table(folder / "steps.csv", STEPS, step)
        self.epochs = Table(folder / "epochs.csv", EPOCHS, step)
        self.curvature = Table(folder / "curvature.csv", CURVATURE, step)
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def step(self, **row: Any) -> None:
        """One row of training."""
        self.steps.add(**row)
        self._write("train", row)

    def epoch(self, **row: Any) -> None:
        """One row of evaluation."""
        self.epochs.add(**row)
        self._write("val", row)

    def diagnose(self, step: int, optimizer: Any) -> None:
        """What an optimizer knows of its curvature; nothing for one of torch."""
        if not hasattr(optimizer, "diagnostics"):
            return
        found = optimizer.diagnostics()
        for row in found:
            self.curvature.add(
                step=step,
                layer=row.name,
                condition_input=row.condition_input,
                condition_output=row.condition_output,
                update_rms=row.update_rms,
                trust_region=found.trust_region,
            )
        if self.writer is not None:
            with writing(self.folder):
                found.write(self.writer, step)

    def _write(self, prefix: str, row: dict[str, Any]) -> None:
        if self.writer is None:
            return
        with writing(self.folder):
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self.writer.add_scalar(f"{prefix}/{name}", value, row["step"])

    def draw(self, title: str) -> Path:
        """Loss and accuracy over epochs, and the condition of the factors; returns the file."""
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
        axes[0].plot(self.steps.column("step"), self.steps.column("loss"), label="training")
        axes[0].plot(
            self.epochs.column("step"), self.epochs.column("loss"), "o-", label="validation"
        )
        axes[0].set(xlabel="step", ylabel="loss", title=title)
        axes[0].legend()
        for name in ("top1", "top5"):
            values = [100 * value for value in self.epochs.column(name)]
            axes[1].plot(self.epochs.column("epoch"), values, "o-", label=name.replace("p", "p-"))
        axes[1].set(xlabel="epoch", ylabel="accuracy, %", title="validation", ylim=(0, 105))
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        axes[1].legend()
        self._draw_conditions(axes[2])
        figure.tight_layout()
        path = self.folder / "curves.png"
        with replacing(path) as file:
            figure.savefig(file, dpi=110, format="png")
        plt.close(figure)
        return path

    def _draw_conditions(self, axis: Any) -> None:
        rows = [row for row in self.curvature.rows if row["condition_input"] not in (None, "")]
        axis.set(xlabel="step", title="condition of the input factors")
        if not rows:
            axis.text(0.5, 0.5, "no curvature", ha="center", transform=axis.transAxes)
            return
        for name in dict.fromkeys(row["layer"] for row in rows):
            own = [row for row in rows if row["layer"] == name]
            values = [float(row["condition_input"]) for row in own]
            axis.plot([int(row["step"]) for row in own], values, lw=1, alpha=0.6)
        axis.set_yscale("log")
