"""Triton's kernels of a step by its interpreter, against the plain path: a script of a test."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tnkfac
from oracles.flags import Delayed, flag
from tnkfac.curvature import plain_path
from tnkfac.optim import base
from tnkfac.optim.step import triton_kernels, triton_step

calls = {"gradients": 0}


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls[name] += 1
        return function(*arguments)

    return call


def use_kernels() -> None:
    triton_kernels.BLOCK = 32  # several tiles to a layer
    triton_kernels.scaled = counted("gradients", triton_kernels.scaled)
    triton_step.triton_kernels = lambda like: triton_kernels


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, (3, 2), stride=2, groups=2, bias=False),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, (1, 2), bias=False),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def lines() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 6, 3, stride=2), nn.Flatten(),
        nn.LazyLinear(5, bias=False), nn.BatchNorm1d(5),
    )  # fmt: skip


def volumes() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, groups=2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2), nn.Flatten(),
        nn.LazyLinear(5),
    )  # fmt: skip


SHAPES = {convolutions: (4, 3, 5, 4), lines: (4, 3, 9), volumes: (4, 2, 4, 3, 4)}
CASES: dict[str, tuple[Callable[[], nn.Sequential], dict[str, Any]]] = {
    "defaults": (convolutions, {}),
    "one axis": (lines, {"T": 1, "kfac_approx": "reduce"}),
    "three axes": (volumes, {"T": 1}),
    "channels last": (convolutions, {"channels_last": True, "T": 1}),
    "fixed damping": (convolutions, {"damping": 1e-2, "lr_cov": 0.05, "alpha1": 0.0}),
    "no grafting": (convolutions, {"grafting": None, "init": "identity", "T": 1, "lr_cov": 0.1}),
    "product of means": (lines, {"grafting": None, "relative_damping": 0.3, "lr": 1e-3}),
    "no bound": (volumes, {"init": "identity", "T": 1, "lr_cov": 0.02, "grafting": "rms"}),
    "sum of losses": (lines, {"damping": 0.1, "loss_average": None, "T": 1}),
    "decay": (convolutions, {"weight_decay": 0.1, "momentum": 0.0}),
    "groups": (convolutions, {"apart": True, "T": 1}),
    "frozen bias": (convolutions, {"frozen": True, "T": 1}),
    "a bad batch": (convolutions, {"bad": 2, "T": 2}),
    "a bad first batch": (lines, {"bad": 0}),
}


def kinds(case: str) -> tuple[torch.dtype, ...]:
    """Float64 tells most; what float32 has of its own is the same in all cases."""
    return (torch.float32, torch.float64) if case in ("defaults", "one axis") else (torch.float64,)


def trained(case: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and state after five steps."""
    build, options = CASES[case]
    options = dict(options)
    torch.manual_seed(0)
    model, shape = build(), SHAPES[build]
    model(torch.zeros(shape))
    layout = torch.channels_last if options.pop("channels_last", False) else torch.preserve_format
    model = model.to(dtype=dtype, memory_format=layout)
    if options.pop("frozen", False):
        model[0].bias.requires_grad_(False)
    params: Any = model.parameters()
    if options.pop("apart", False):
        biases = [p for p in model.parameters() if p.ndim == 1]
        weights = [p for p in model.parameters() if p.ndim > 1]
        params = [{"params": weights}, {"params": biases, "lr": 0.01, "weight_decay": 0.2}]
    bad = options.pop("bad", -1)
    optimizer = tnkfac.SINGD(params, **{"structures": "diagonal", "T": 2, **options})
    for step in range(5):
        torch.manual_seed(step)
        x, y = torch.randn(shape, dtype=dtype), torch.randint(5, shape[:1])
        loss = nn.functional.cross_entropy(model(x), y) * (float("nan") if step == bad else 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = [
        value for p in model.parameters() for key, value in optimizer.state[p].items()
        if key in ("K", "C", "m_K", "m_C", "momentum_buffer")
    ]  # fmt: skip
    return [p.detach().clone() for p in model.parameters()], found


if __name__ == "__main__":
    base.non_finite, base.AsyncFlags = flag, Delayed
    expected = {}
    with plain_path():
        for name in CASES:
            for kind in kinds(name):
                expected[name, kind] = trained(name, kind)
    use_kernels()
    for name in CASES:
        before = dict(calls)
        for kind in kinds(name):
            rounding = {"rtol": 2e-5, "atol": 2e-6} if kind == torch.float32 else {}
            rounding = rounding or {"rtol": 1e-6, "atol": 1e-8}  # scalars are in float32
            for one, other in zip(trained(name, kind), expected[name, kind], strict=True):
                assert len(one) == len(other) > 0
                for a, b in zip(one, other, strict=True):
                    torch.testing.assert_close(a, b, **rounding, msg=lambda m, n=name: f"{n}: {m}")
        assert calls["gradients"] >= before["gradients"] + 4, name
        print(name, "agrees")
    triton_kernels.check(torch.device("cpu"))
    right = triton_kernels.scaled
    triton_kernels.scaled = lambda *args: 1.001 * right(*args)
    try:
        triton_kernels.check(torch.device("cpu"))
    except AssertionError:
        sys.exit(0)
    sys.exit("A trial passes kernels that are wrong by a thousandth.")
