"""Table, picture and bars of the study of quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
TUNED = "AdamW"


def report(
    rows: list[Row],
    times: dict[tuple[str, str], float],
    study: dict[str, Any],
    path: Path,
    best_lr: Callable[[list[Row]], float],
) -> int:
    """Print tables and bars, draw the curves beside the file, and return an exit status."""
    found = summary(rows, times, study, best_lr)
    tasks = list(dict.fromkeys(task for task, _ in found))
    names = list(dict.fromkeys(name for _, name in found))
    for field, words in (
        ("steps", "steps to target"),
        ("seconds", "seconds to target"),
        ("ms", "milliseconds of a step, all optimizers in turns"),
        ("reached", "share of seeds that reach the target; the others count with all their steps"),
        ("final", "final loss"),
        ("held_out", "held-out loss"),
        ("share", "share of learning rates that reach the target"),
        ("lr", "learning rate"),
    ):
        print(f"\n{words}")
        print(f"{'':28}" + "".join(f"{name:>17}" for name in names))
        for task in tasks:
            cells = [found.get((task, name), {}).get(field, math.nan) for name in names]
            print(f"{task:28}" + "".join(f"{cell:17.4g}" for cell in cells))
    draw(rows, found, tasks, names, path.with_suffix(".png"))
    return bars(found, tasks, study)


def summary(
    rows: list[Row],
    times: dict[tuple[str, str], float],
    study: dict[str, Any],
    best_lr: Callable[[list[Row]], float],
) -> dict[tuple[str, str], dict[str, float]]:
    """What is reported of every task and optimizer: means over the seeds that did not tune."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key in dict.fromkeys((row["task"], row["optimizer"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["optimizer"]) == key]
        grid = [row for row in mine if int(row["seed"]) == study["tuning_seed"]]
        lr = best_lr(grid)
        runs = [r for r in mine if int(r["seed"]) in study["seeds"] and float(r["lr"]) == lr]
        if not runs:
            continue

        def mean(field: str, instead: float = math.inf, runs: list[Row] = runs) -> float:
            return statistics.fmean(float(row[field] or instead) for row in runs)

        steps = mean("steps", study["steps"])  # the whole budget where a seed does not get there
        ms = times.get(key, math.nan)
        found[key] = {
            "lr": lr,
            "steps": steps,
            "ms": ms,
            "seconds": steps * ms / 1e3,
            "reached": sum(row["steps"] != "" for row in runs) / len(runs),
            "final": mean("final"),
            "held_out": mean("held_out"),
            "share": sum(row["steps"] != "" for row in grid) / len(grid),
            "diverged": sum(row["final"] == "" for row in grid),
        }
    return found


def ratio(
    found: dict[tuple[str, str], dict[str, float]], tasks: list[str], name: str, field: str
) -> list[float]:
    """An optimizer over tuned AdamW, for every task."""
    return [found[task, name][field] / found[task, TUNED][field] for task in tasks]


def bars(
    found: dict[tuple[str, str], dict[str, float]], tasks: list[str], study: dict[str, Any]
) -> int:
    """Print which bars are met; 1 if one is missed."""
    bar = study["bars"]
    complete = [t for t in tasks if (t, TUNED) in found]
    lines: list[tuple[str, float, float, bool]] = []

    def add(words: str, names: list[str], field: str) -> None:
        """The optimizer with the lowest geometric mean."""
        means = {}
        for name in names:
            if all((task, name) in found for task in complete):
                ratios = ratio(found, complete, name, field)
                means[name] = math.exp(statistics.fmean(math.log(r) for r in ratios))
                listed = ", ".join(f"{t} {r:.2f}" for t, r in zip(complete, ratios, strict=True))
                print(f"\n{field} of {name} over those of {TUNED}: {means[name]:.3f} ({listed})")
        if means:
            best = min(means.values())
            lines.append((words, best, bar[words], best <= bar[words]))

    add("steps of the better of SINGD dense and KFAC", ["SINGD dense", "KFAC"], "steps")
    add("seconds of SINGD diagonal", ["SINGD diagonal"], "seconds")
    if all((task, "SINGD dense") in found for task in complete):
        ratios = ratio(found, complete, "SINGD dense", "seconds")
        print(f"\nseconds of SINGD dense: {', '.join(f'{r:.2f}' for r in ratios)}")
        share = sum(r <= bar["seconds of SINGD dense"] for r in ratios) / len(ratios)
        bound = bar["share of tasks for the seconds of SINGD dense"]
        lines.append(("share of tasks, seconds of SINGD dense", share, bound, share >= bound))
    for name in ("SINGD dense", "SINGD diagonal", "KFAC"):
        if all((task, name) in found for task in complete):
            ours = statistics.fmean(found[task, name]["share"] for task in complete)
            bound = statistics.fmean(found[task, TUNED]["share"] for task in complete)
            lines.append((f"learning rates that work, {name}", ours, bound, ours >= bound))
            gone = sum(found[task, name]["diverged"] for task in complete)
            lines.append((f"learning rates that diverge, {name}", gone, 0, gone == 0))
    for kind in ("steps", "seconds"):
        if all((t, name) in found for t in complete for name in ("SINGD dense", "singd")):
            pair = [(found[t, "SINGD dense"][kind], found[t, "singd"][kind]) for t in complete]
            wins = sum(ours < theirs for ours, theirs in pair)
            met = wins == len(complete)
            lines.append((f"tasks won against singd, {kind}", wins, len(complete), met))
    print("" if lines else "\nNo bar can be computed yet.")
    for words, value, bound, met in lines:
        print(f"{'met   ' if met else 'MISSED'} {words}: {value:.3g} (bar {bound:.3g})")
    return 0 if lines and all(met for *_, met in lines) else 1


def draw(
    rows: list[Row],
    found: dict[tuple[str, str], dict[str, float]],
    tasks: list[str],
    names: list[str],
    path: Path,
) -> None:
    """Curves of the tuning seed at the chosen learning rates."""
    columns = 4
    lines = -(-len(tasks) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for name in names:
            key = found.get((task, name))
            chosen = [
                r
                for r in rows
                if (r["task"], r["optimizer"]) == (task, name)
                and key
                and float(r["lr"]) == key["lr"]
            ]
            if chosen:
                curve = [float(value) for value in chosen[0]["curve"].split()]
                axis.plot(range(5, 5 * len(curve) + 1, 5), curve, label=name, linewidth=1)
        axis.set(title=task, yscale="log", xlabel="step")
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    axes.flat[0].set_ylabel("training loss")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
