"""Table, picture and bars of the cost of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]


def table(rows: list[Row], arch: str) -> str:
    """Lines of one network."""
    mine = [row for row in rows if row["arch"] == arch]
    head = f"{arch}, batch {mine[0]['batch']}, {mine[0]['size']} x {mine[0]['size']} pixels"
    lines = [f"\n{head:44}{'ms':>9}{'x SGD':>9}{'95 %':>15}{'memory':>9}{'no state':>10}"]
    lines += [
        f"{row['optimizer']:44}{float(row['ms']):9.1f}{float(row['ratio']):9.3f}"
        f"{_interval(row):>15}"
        f"{float(row['memory']):9.3f}{float(row['memory_without_state']):10.4f}"
        for row in mine
    ]
    return "\n".join(lines)


def _interval(row: Row) -> str:
    return f"{float(row['low']):.3f}-{float(row['high']):.3f}"


def bars(rows: list[Row], study: dict[str, Any]) -> int:
    """Print which bars are met; 1 if one is missed or nothing was measured that has one."""
    lines: list[tuple[str, float, float, str]] = []
    found = {(row["arch"], row["optimizer"]): row for row in rows}
    for arch, wanted in study["bars"].items():
        for name, bar in wanted.items():
            row = found.get((arch, name))
            if row is None:
                continue
            lines.append((f"{arch}: {name}", float(row["ratio"]), bar, f", {_interval(row)}"))
            if not name.endswith("T=1"):
                continue
            words = ("peak memory", "peak memory without state")
            for field, word in zip(("memory", "memory_without_state"), words, strict=True):
                lines.append((f"{arch}: {name}, {word}", float(row[field]), study[word], ""))
            theirs = found.get((arch, name.replace("SINGD", "singd")))
            if theirs is not None:
                word = "share of the overhead of singd"
                share = _share(row["ratio"], theirs["ratio"])
                pairs = zip(row["each"].split(), theirs["each"].split(), strict=True)
                each = ", each process: " + " ".join(f"{_share(*pair):.2f}" for pair in pairs)
                lines.append((f"{arch}: {word}", share, study[word], each))
    for words, value, bar, scatter in lines:
        print(f"{'met   ' if value <= bar else 'MISSED'} {words}: {value:.3f}{scatter} (bar {bar})")
    return 0 if lines and all(value <= bar for _, value, bar, _ in lines) else 1


def _share(mine: Any, theirs: Any) -> float:
    """One overhead over another, of ratios to SGD."""
    return (float(mine) - 1) / (float(theirs) - 1)


def draw(rows: list[Row], talk: dict[str, dict[str, float]], name: str, path: Path) -> None:
    """Bars of all optimizers for each network, beside what the talk has measured of one."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    figure, axes = plt.subplots(1, len(archs), figsize=(6.5 * len(archs), 5), squeeze=False)
    for axis, arch in zip(axes.flat, archs, strict=True):
        mine = [row for row in rows if row["arch"] == arch]
        labels = [row["optimizer"] for row in mine]
        values = [float(row["ratio"]) for row in mine]
        colors = ["tab:blue" if label != name else "tab:orange" for label in labels]
        for word, value in talk.get(arch, {}).items():
            labels.append(f"talk (A40), {word}")
            values.append(value)
            colors.append("tab:gray")
        axis.barh(labels, values, color=colors)
        axis.axvline(1.0, color="black", linewidth=0.8)
        for place, value in enumerate(values):
            axis.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set(title=f"{arch}, batch {mine[0]['batch']}", xlabel="step over SGD's step")
        axis.set_xlim(0, max(values) * 1.15)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
