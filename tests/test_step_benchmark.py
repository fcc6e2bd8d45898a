"""The benchmark of a step: what it asks for, and when it says that a bar is missed."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import step
from step_report import bars, draw, table

NAME = "SINGD diagonal, reduce, T=1"


def row(arch: str, name: str, ratio: float, memory: float = 1.0) -> dict[str, Any]:
    values = (arch, 16, 224, name, 100.0, ratio, ratio - 0.01, ratio + 0.01, memory, memory)
    return dict(zip(step.FIELDS, values, strict=True))


def test_the_bars_are_about_what_is_measured() -> None:
    archs = {run["arch"] for runs in step.STUDY["runs"].values() for run in runs}
    assert archs <= set(torchvision.models.list_models())
    assert set(step.STUDY["bars"]) <= archs
    known = {*step.OPTIMIZERS, *(n.replace("no update", "T=10") for n in step.OPTIMIZERS)}
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


def test_what_has_a_bar_is_repeated_more_often() -> None:
    problem = step.Problem(Namespace(rounds=None, device="cpu"), "resnet18", 16, 224)
    more, fewer = (step.STUDY["rounds"]["cpu"][kind] for kind in ("with a bar", "others"))
    assert more > fewer
    for name in (NAME, NAME.replace("T=1", "no update"), step.REFERENCE):
        assert step.rounds(problem, name) == more
    assert step.rounds(problem, "AdamW") == fewer
    problem.args.rounds = 2
    assert step.rounds(problem, NAME) == 2


def test_the_interval_has_the_median_as_often_as_it_says() -> None:
    random = torch.Generator().manual_seed(0)
    drawn = torch.rand(2000, 60, generator=random).exp()  # a skew one, whose median is exp(0.5)
    held = [low <= math.exp(0.5) <= high for low, high in map(step.interval, drawn.tolist())]
    assert 0.93 <= sum(held) / len(held) <= 0.985
    assert step.interval([3.0, 1.0]) == (1.0, 3.0)


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
