"""Training on a GPU, whose tensors take paths of their own; what can be runs on the CPU as well."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from oracles.loops import fit, state_by_name, weights
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights
from tnkfac import KFAC, SINGD
from tnkfac.curvature import plain_path

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]

OPTIMIZERS: dict[str, Any] = {
    "diagonal": lambda p: SINGD(p, structures="diagonal", T=2),
    "diagonal, reduce": lambda p: SINGD(p, structures="diagonal", kfac_approx="reduce", T=1),
    "diagonal, without grafting": lambda p: SINGD(p, structures="diagonal", grafting=None, T=1),
    "dense": lambda p: SINGD(p, structures="dense", T=2),
    "blocks": lambda p: SINGD(p, structures="block2diagonal", T=2),
    "KFAC": lambda p: KFAC(p, inv_update_steps=3),
    "KFAC, diagonal": lambda p: KFAC(p, structures="diagonal"),
}


class Net(nn.Module):
    """Kinds of layers that kernels treat apart: few channels, strides, groups, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.ReLU(),
            nn.ConvTranspose2d(24, 8, 3, 2, 1, 1),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3, H, W]`` to ``[N, 10]``."""
        found: Tensor = self.body(x)
        return found


def batches(device: str, count: int) -> list[tuple[Tensor, Tensor]]:
    """Images that tell their class by their mean, made on the CPU: the same on all devices."""
    random = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        y = torch.randint(10, (16,), generator=random)
        x = torch.randn(16, 3, 20, 18, generator=random) + 0.3 * y.view(-1, 1, 1, 1)
        found.append((x.to(device), y.to(device)))
    return found


def net(device: str) -> Net:
    torch.manual_seed(0)
    return Net().to(device)


def trained(device: str, name: str, steps: int = 5) -> tuple[nn.Module, Any, list[float]]:
    model = net(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    losses = fit(model, optimizer, batches(device, steps), nn.functional.cross_entropy)
    return model, optimizer, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_equal_the_plain_path(device: str, name: str) -> None:
    """In float32, in which Triton's kernels work."""
    model, optimizer, losses = trained(device, name)
    with plain_path():
        twin, other, expected = trained(device, name)
    assert losses == pytest.approx(expected, rel=1e-3)
    for key, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[key], rtol=1e-3, atol=1e-4, msg=key)
    states, others = state_by_name(model, optimizer), state_by_name(twin, other)
    for key in (key for key in states if key.split("/")[1] in ("K", "C")):
        torch.testing.assert_close(states[key], others[key], rtol=1e-3, atol=1e-3, msg=key)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_cpu(name: str) -> None:
    """In float64, with every kind of layer."""
    found = []
    for device in ("cpu", "cuda"):
        model = fixed_weights(AllLayers()).to(device)
        optimizer = OPTIMIZERS[name](model.parameters())
        steps = [all_layers_batch(seed) for seed in range(5)]
        fit(model, optimizer, [(x.to(device), y.to(device)) for x, y in steps])
        found.append({key: value.cpu() for key, value in weights(model).items()})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_is_skipped(device: str, name: str, where: str) -> None:
    model, optimizer, _ = trained(device, name, 3)
    before, states = weights(model), copy.deepcopy(state_by_name(model, optimizer))
    ((x, y),) = batches(device, 1)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    (loss * float("nan") if where == "loss" else loss).backward()
    if where == "gradient":
        next(model.parameters()).grad.view(-1)[-1] = float("inf")  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.skipped_updates == 1
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]), key
    after = state_by_name(model, optimizer)
    for key in (key for key in states if key.split("/")[1] in ("K", "C", "momentum_buffer")):
        assert torch.equal(after[key], states[key]), key
    fit(model, optimizer, batches(device, 1), nn.functional.cross_entropy)
    assert not torch.equal(before["body.0.weight"], weights(model)["body.0.weight"])


@pytest.mark.parametrize("name", ["diagonal, reduce", "KFAC"])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_channels_last(device: str, name: str) -> None:
    model = net(device).to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[name](model.parameters())
    losses = []
    for x, y in batches(device, 1) * 40:  # learned by heart
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = nn.functional.cross_entropy(
                model(x.contiguous(memory_format=torch.channels_last)), y
            )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert optimizer.skipped_updates == 0


WAITLESS: dict[str, Any] = {
    "diagonal": OPTIMIZERS["diagonal"],
    "diagonal, reduce": OPTIMIZERS["diagonal, reduce"],
    "diagonal, without grafting": OPTIMIZERS["diagonal, without grafting"],
    "KFAC between decompositions": lambda p: KFAC(p, inv_update_steps=1000),
    "KFAC, diagonal": OPTIMIZERS["KFAC, diagonal"],
}


@needs_gpu
@pytest.mark.parametrize("name", WAITLESS)
def test_nothing_waits_for_the_gpu(name: str) -> None:
    """Once plans, kernels and numbers are there: three whole steps of training."""
    model = net("cuda")
    optimizer = WAITLESS[name](model.parameters())
    data = batches("cuda", 8)
    fit(model, optimizer, data[:5], nn.functional.cross_entropy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data[5:]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launched(run: Any) -> int:
    """Kernels and copies on the device while a function runs."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    marks = {event.name for event in prof.events() or [] if event.is_user_annotation}
    return sum(
        event.device_type == DeviceType.CUDA and event.name not in marks
        for event in prof.events() or []
    )


@needs_gpu
def test_launches_of_resnet18() -> None:
    """At most 60 in the step, and 10 for each layer in its hook, as counted without a GPU."""
    torchvision, _ = pytest.importorskip("torchvision"), pytest.importorskip("triton")
    passes, steps = {}, {}
    for name, T in (("update", 1), ("no update", 1000)):
        model = torchvision.models.resnet18(num_classes=10).cuda()
        optimizer = SINGD(model.parameters(), structures="diagonal", kfac_approx="reduce", T=T)
        x, y = torch.randn(4, 3, 64, 64, device="cuda"), torch.zeros(4, device="cuda").long()

        def passed(model: Any = model, x: Any = x, y: Any = y) -> None:
            nn.functional.cross_entropy(model(x), y).backward()

        for _ in range(4):
            optimizer.zero_grad()
            passed()
            optimizer.step()
        optimizer.zero_grad()
        passes[name], steps[name] = launched(passed), launched(optimizer.step)
    assert 10 < min(steps.values()) <= max(steps.values()) <= 60, steps
    assert 2 * 21 < passes["update"] - passes["no update"] <= 10 * 21, passes
