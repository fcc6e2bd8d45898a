"""A step that is interrupted leaves an optimizer whose checkpoint goes on as it does itself."""

import copy
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import tnkfac
from oracles.loops import weights
from tnkfac import KFAC, SINGD

ROOT = str(Path(tnkfac.__file__).parent)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SINGD": (SINGD, {"T": 2}),
    "SINGD diagonal": (SINGD, {"T": 2, "structures": "diagonal"}),
    "SINGD Toeplitz": (SINGD, {"T": 2, "structures": "triltoeplitz"}),
    "KFAC": (KFAC, {"inv_update_steps": 2}),
    "EKFAC": (KFAC, {"inv_update_steps": 2, "compute_method": "ekfac"}),
}
PLACES = 12
"""Interrupts of each step, evenly spread over its lines."""


class Interrupter:
    """Counts lines of the package, and interrupts at one of them."""

    def __init__(self, line: int | None = None) -> None:
        self.lines, self._stop = 0, line

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self._stop:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def run(self, optimizer: Any) -> bool:
        """Make a step; tell whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            optimizer.step()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def started(kind: str, steps: int) -> tuple[nn.Module, Any]:
    cls, options = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2)
    ).double()
    optimizer = cls(model.parameters(), lr=0.05, **options)
    for step in range(steps):
        passes(model, optimizer, step)
        optimizer.step()
    return model, optimizer


def passes(model: nn.Module, optimizer: Any, step: int) -> None:
    x = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(step)).double()
    optimizer.zero_grad()
    (model(x) - x[:, :, 1, 1]).square().mean().backward()


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["first", "without an update", "update"])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_steps(kind: str, steps: int) -> None:
    model, optimizer = started(kind, steps)
    passes(model, optimizer, steps)
    counter = Interrupter()
    assert not counter.run(optimizer)
    lines = {1 + counter.lines * place // PLACES for place in range(PLACES)}
    for line in sorted(lines):
        model, optimizer = started(kind, steps)
        passes(model, optimizer, steps)
        assert Interrupter(line).run(optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        twin, resumed = started(kind, 0)
        twin.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        for step in range(steps + 1, steps + 5):
            for net, its in ((model, optimizer), (twin, resumed)):
                passes(net, its, step)
                its.step()
        for name, value in weights(model).items():
            torch.testing.assert_close(
                value, weights(twin)[name], rtol=0, atol=0, msg=f"{name}, line {line}"
            )
            assert value.isfinite().all()
