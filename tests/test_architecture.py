"""The way of the data through the files: as `docs/architecture.md` has it, and not longer.

Printed by `pytest -s tests/test_architecture.py`.
"""

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import tnkfac

ROOT = Path(tnkfac.__file__).parent
PAGE = (Path(__file__).parents[1] / "docs/architecture.md").read_text("utf-8")
PARTS = {
    title.strip(): text
    for title, _, text in (part.partition("\n") for part in PAGE.split("\n## ")[1:])
}
INTERVAL = 2


def files_of(function: Callable[[], Any]) -> list[str]:
    """Files of the package in which something is called, in their order."""
    files: dict[str, None] = {}

    def record(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            files.setdefault(path.relative_to(ROOT).as_posix())

    before = sys.getprofile()
    sys.setprofile(record)
    threading.setprofile(record)
    try:
        function()
    finally:
        sys.setprofile(before)
        threading.setprofile(before)  # type: ignore[arg-type]
    return list(files)


@pytest.fixture(scope="module")
def traces() -> dict[str, list[str]]:
    """Of the last two steps of four: one with an update of the factors, and one without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 10))
    optimizer = tnkfac.SINGD(model.parameters(), structures="dense", T=INTERVAL)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    traces: dict[str, list[str]] = {}
    for step in range(2 * INTERVAL):
        updates = step % INTERVAL == 0
        losses: list[Any] = []
        optimizer.zero_grad()
        forward = files_of(lambda: losses.append(nn.functional.cross_entropy(model(x), y)))  # noqa: B023
        with torch.autograd.set_multithreading_enabled(False):
            backward = files_of(losses[0].backward)
        stepped = files_of(optimizer.step)
        if updates:
            traces |= {"Forward": forward, "Backward": backward, "Step": stepped}
        else:
            traces |= {"Step without an update": stepped}
    saved: list[Any] = []
    traces["Save"] = files_of(lambda: saved.append(optimizer.state_dict()))
    traces["Load"] = files_of(lambda: optimizer.load_state_dict(saved[0]))
    for title, files in traces.items():
        print(f"{title}: {len(files)} files", *files, sep="\n    ")
    return traces


@pytest.mark.parametrize("title", PARTS)
def test_the_page_names_the_files_that_are_passed(title: str, traces: dict[str, list[str]]) -> None:
    assert set(re.findall(r"`([\w/]+\.py)`", PARTS[title])) == set(traces[title])


@pytest.mark.parametrize(("title", "most"), [("Step without an update", 15), ("Step", 20)])
def test_a_step_passes_few_files(title: str, most: int, traces: dict[str, list[str]]) -> None:
    assert len(traces[title]) <= most, traces[title]


def test_a_step_without_an_update_passes_no_other_files(traces: dict[str, list[str]]) -> None:
    assert set(traces["Step without an update"]) < set(traces["Step"])
