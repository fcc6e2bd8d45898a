"""The breakdown of a step: parts that add up, and readings that are counted right."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import profile_step
import tnkfac
from tnkfac.curvature.capture.statistics import Statistics
from tnkfac.curvature.capture.tap import Tap


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
    assert Statistics.measure.__name__ == "measure"
    assert Tap.__call__.__name__ == "__call__"


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


def event(name: str, start: float, end: float, id: int = 0, kind: str = "CPU") -> Any:
    """What the profiler tells of a call, or of a kernel."""
    return SimpleNamespace(
        name=name,
        id=id,
        device_type=getattr(DeviceType, kind),
        is_user_annotation=name in profile_step.PARTS,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
    )


def test_launches_belong_to_what_lasts_in_any_thread() -> None:
    """Calls of the runtime, with the kernels that they queue, which run later."""
    parts = profile_step.PARTS
    events = [
        event(parts[2], 0, 100),  # the backward pass; what is inside runs in another thread
        event("cudaLaunchKernel", 10, 11, id=1),
        event("kernel of torch", 200, 2200, id=1, kind="CUDA"),
        event(parts[3], 20, 60),
        event("cuLaunchKernelEx", 30, 31, id=2),
        event("kernel of Triton", 3000, 6000, id=2, kind="CUDA"),
        event("aten::mul", 40, 42, id=7),
        event(parts[8], 120, 200),
        event("cudaMemcpyAsync", 130, 131, id=3),
        event("cudaEventQuery", 140, 141, id=4),
        event(parts[8], 7000, 9000, id=2, kind="CUDA"),  # how long its kernels last, on the device
        event("cudaLaunchKernel", 300, 301, id=5),  # after the step
    ]
    times, launches = profile_step.launched(events)
    assert launches == {parts[2]: 1, parts[3]: 1, parts[8]: 1}
    assert {name: ms for name, ms in times.items() if ms} == {parts[2]: 2.0, parts[3]: 3.0}
