"""The benchmark of a step: what it asks for, and when it says that a bar is missed."""

import csv
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import step
import step_times
from step_problems import OPTIMIZERS, REFERENCE, Problem
from step_problems import TALK as NAME
from step_report import bars, draw, table


def row(arch: str, name: str, ratio: float, memory: float = 1.0) -> dict[str, Any]:
    ends, each = (ratio - 0.01, ratio + 0.01), f"{ratio - 0.02:.4f} {ratio + 0.02:.4f}"
    values = (arch, 16, 224, name, 100.0, ratio, *ends, memory, memory, each)
    return dict(zip(step.FIELDS, values, strict=True))


def test_the_bars_are_about_what_is_measured() -> None:
    archs = {run["arch"] for runs in step.STUDY["runs"].values() for run in runs}
    assert archs <= set(torchvision.models.list_models())
    assert set(step.STUDY["bars"]) <= archs
    known = {*OPTIMIZERS, *(n.replace("no update", "T=10") for n in OPTIMIZERS)}
    assert {name for wanted in step.STUDY["bars"].values() for name in wanted} <= known


@pytest.mark.parametrize(
    ("ratio", "memory", "theirs", "missed"),
    [(1.05, 1.0, 1.2, 0), (1.12, 1.0, 1.5, 1), (1.05, 1.03, 1.2, 1), (1.09, 1.0, 1.1, 1)],
    ids=["met", "too slow", "too much memory", "no better than singd"],
)
def test_a_missed_bar_is_told(ratio: float, memory: float, theirs: float, missed: int) -> None:
    reference = row("resnet18", NAME.replace("SINGD", "singd"), theirs)
    rows = [row("resnet18", NAME, ratio, memory), reference]
    assert bars(rows, step.STUDY) == missed


def test_nothing_measured_is_no_success() -> None:
    assert bars([row("resnet50", NAME, 1.0)], step.STUDY) == 1


def test_what_has_a_bar_is_repeated_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def turns(problem: Any, names: list[str], *numbers: int) -> list[step_times.Measured]:
        asked.append((names, *numbers))
        return [{name: [(1.0, 1.0)] for name in names}]

    monkeypatch.setattr(step, "in_processes", turns)
    args = Namespace(rounds=None, processes=None, device="cpu", threads=1)
    barred = [NAME, NAME.replace("T=1", "no update"), REFERENCE]
    assert list(step.times(Problem(args, "resnet18", 16, 224), ["AdamW", *barred])) == [
        "AdamW",
        *barred,
    ]
    rounds = step.STUDY["rounds"]["cpu"]
    more = (rounds["with a bar"], step.STUDY["processes"]["cpu"])
    assert asked == [(barred, *more), (["AdamW"], rounds["others"], 1)]
    asked.clear()
    args.rounds, args.processes = 2, 3
    step.times(Problem(args, "resnet50", 16, 224), [NAME])
    step.times(Problem(args, "vgg11", 16, 128), [NAME])
    assert asked == [([NAME], 2, 1), ([NAME], 2, 3)]


def test_steps_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time is divided by those of SGD's steps next to it, in a clock that steps move."""
    now, done = [0.0], []

    def prepare(problem: Any, build: Any) -> tuple[None, None, Any]:
        name = next((n for n, known in OPTIMIZERS.items() if known is build), "SGD")

        def run() -> None:
            done.append(name)
            now[0] += {"SGD": len(done), "AdamW": 3.0, NAME: 50.0}[name]

        return None, None, run

    monkeypatch.setattr(Problem, "prepare", prepare)
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    problem = Problem(Namespace(device="cpu", threads=1), "resnet18", 16, 224)
    found = step_times.turns(problem, ["AdamW", NAME], 2)
    assert done[6:] == ["SGD", *["AdamW", "SGD", NAME, "SGD"] * 2]
    ratios = {name: [ratio for _, ratio in steps] for name, steps in found.items()}
    assert ratios == {"AdamW": [3 / 8, 3 / 12], NAME: [50 / 10, 50 / 14]}
    assert [ms for ms, _ in found[NAME]] == [50e3, 50e3]


def test_processes_are_averaged() -> None:
    steps = [[(10.0, ratio) for ratio in ratios] for ratios in ([1.0, 1.1, 1.5], [1.3, 1.3, 1.0])]
    found = step_times.summary([{NAME: each} for each in steps], NAME)
    assert found.each == [1.1, 1.3]
    assert (found.ms, found.low, found.high) == (10.0, 1.1, 1.3)
    assert found.ratio == pytest.approx(1.2)
    rare = step_times.Duration(20.0, 2.0, 1.9, 2.1, [1.9, 2.1])
    ten = step_times.mixed(found, rare, 0.1)
    assert ten.each == pytest.approx([1.18, 1.38])
    assert (ten.ms, ten.ratio, ten.low) == pytest.approx((11.0, 1.28, 1.18))


def test_the_interval_has_the_median_as_often_as_it_says() -> None:
    random = torch.Generator().manual_seed(0)
    drawn = torch.rand(2000, 60, generator=random).exp()  # a skew one, whose median is exp(0.5)
    held = [low <= math.exp(0.5) <= high for low, high in map(step_times.interval, drawn.tolist())]
    assert 0.93 <= sum(held) / len(held) <= 0.985
    assert step_times.interval([3.0, 1.0]) == (1.0, 3.0)


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [row("resnet18", NAME, 1.05), row("vgg11", NAME, 1.01)]
    assert "1.050" in table(rows, "resnet18")
    draw(rows, step.STUDY["talk"], NAME, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 5_000


@pytest.mark.slow
def test_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    """One network, few rounds; the mean over ten steps lies between its two kinds of steps."""
    arguments = ["--quick", "--arch", "resnet18", "--optimizers", NAME]
    assert step.main([*arguments, NAME.replace("T=1", "no update")]) == 0
    text = capsys.readouterr().out
    assert "SINGD diagonal, reduce, T=10" in text


@pytest.mark.slow
def test_several_processes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each in turns, with what every process has found in the table."""
    out = tmp_path / "step.csv"
    arguments = ["--arch", "resnet18", "--batch", "2", "--size", "32", "--out", str(out)]
    arguments += ["--optimizers", NAME, NAME.replace("T=1", "no update")]
    step.main([*arguments, "--rounds", "2", "--processes", "2"])
    text = capsys.readouterr().out
    assert "resnet18, process 2: " + NAME in text
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"][-4:] for row in rows] == [" T=1", "date", "T=10"]
    for row in rows:
        each = [float(value) for value in row["each"].split()]
        assert float(row["ratio"]) == pytest.approx(sum(each) / 2, abs=1e-3)
        assert [float(row["low"]), float(row["high"])] == pytest.approx(sorted(each), abs=1e-3)
