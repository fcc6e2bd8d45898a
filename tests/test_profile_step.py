"""The breakdown of a step: parts that add up, and readings that are counted right."""

import pytest
import torch
from torch import nn

import profile_step
import tnkfac


def test_parts_of_a_step() -> None:
    """Only the step with an update measures and updates factors, and what is wrapped comes back."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.LayerNorm(3))
    optimizer = tnkfac.SINGD(model.parameters(), structures="diagonal", T=2)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    found = [profile_step.profiled(model, optimizer, x, y, "cpu") for _ in range(4)]
    for number, (times, launches) in enumerate(found):
        updates = number % 2 == 0
        assert set(times) == set(profile_step.PARTS)
        assert all(spent > 0 for part, spent in times.items() if part in ("forward", "backward"))
        assert (launches["statistics in the backward pass"] > 0) == updates
        assert (launches["factor update"] > 0) == updates
        assert launches["preconditioning"] > 0
        assert launches["parameter update"] > 0
    assert tnkfac.curvature.Statistics.measure.__name__ == "measure"
    assert tnkfac.curvature.Tap.__call__.__name__ == "__call__"


def test_readings_of_a_layer() -> None:
    """A linear layer's diagonals: the square of each side, and the sum of the squares."""
    model = nn.Linear(6, 5, bias=False)
    optimizer = tnkfac.SINGD(model.parameters(), structures="diagonal")
    x = torch.randn(8, 6)
    ((name, shape, read, least),) = profile_step.readings(
        optimizer, lambda: model(x).sum().backward()
    )
    assert (name, shape) == ("", (8, 6))
    assert least == pytest.approx(4 * 8 * (6 + 5) / 1e6)
    assert read == pytest.approx(2 * least)


@pytest.mark.slow
def test_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_step.main(["--quick", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "layer4.1.conv2" in text
    assert "search for non-finite numbers" in text
