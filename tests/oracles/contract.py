"""The contract of an optimizer of torch: behaviours, each of which holds for every kind.

A behaviour is a function of ``make``, which builds an optimizer from parameters and options.
``torch.optim.AdamW`` is one of the kinds: what does not hold for it is not torch's contract.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import assert_same_state, assert_same_weights, fit, mlp_batch, weights
from oracles.soap import SOAP
from tnkfac import KFAC, SINGD

__all__ = [
    "KINDS",
    "Behaviours",
    "Check",
    "Make",
    "Tiny",
    "assert_close_weights",
    "assert_goes_on_alike",
    "assert_same",
    "batches",
    "like",
    "moved",
    "through_a_file",
    "tiny",
    "trained",
]

Make = Callable[..., torch.optim.Optimizer]
Check = Callable[[Make], None]

KINDS: dict[str, Make] = {
    "AdamW": torch.optim.AdamW,
    **{f"SINGD {name}": partial(SINGD, structures=name, T=2) for name in ("diagonal", "dense")},
    "SINGD auto": partial(SINGD, structures="auto", T=2),
    **{
        f"KFAC {name}": partial(
            KFAC, compute_method=name, factor_update_steps=2, inv_update_steps=2
        )
        for name in ("eigen", "ekfac", "cholesky")
    },
    "SOAP": partial(SOAP, precondition_frequency=2),
}
NOT_UNIQUE = ("gradients_add_up", "channels_last, 4 axes", "lower_precision: float32")
"""Behaviours that depend on rounding for SOAP: eigenvectors of equal eigenvalues are not unique."""


class Behaviours:
    """A table of behaviours, filled by decorators."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Check, str]] = []

    def __call__(self, check: Check) -> Check:
        """Enter a behaviour under the name of the function."""
        self.rows.append((check.__name__, check, ""))
        return check

    def beyond_torch(self, reason: str) -> Callable[[Check], Check]:
        """Enter what holds for this package's optimizers, and does not for AdamW."""

        def enter(check: Check) -> Check:
            self.rows.append((check.__name__, check, reason))
            return check

        return enter

    def over(
        self, cases: Mapping[str, Any], beyond_torch: str = ""
    ) -> Callable[[Callable[..., None]], Any]:
        """Enter one behaviour for each case; the function is given ``make`` and the case."""

        def enter(check: Callable[..., None]) -> Callable[..., None]:
            for name, case in cases.items():
                row: Check = partial(check, case=case)
                self.rows.append((f"{check.__name__}: {name}", row, beyond_torch))
            return check

        return enter

    def for_every_kind(self) -> pytest.MarkDecorator:
        """Parametrize a test by ``check`` and ``make``."""
        cases = []
        for name, check, reason in self.rows:
            for kind, make in KINDS.items():
                control = pytest.mark.xfail(strict=True, reason=reason)
                marks = [control] if reason and kind == "AdamW" else []
                if kind == "SOAP" and any(part in name for part in NOT_UNIQUE):
                    continue
                cases.append(pytest.param(check, make, id=f"{name}-{kind}", marks=marks))
        return pytest.mark.parametrize(("check", "make"), cases)


class Tiny(nn.Module):
    """Two layers with curvature, and parameters that belong to no such layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 4]`` to ``[N, 3]``."""
        y: Tensor = self.scale * self.last(torch.tanh(self.norm(self.first(x))))
        return y


def tiny(dtype: torch.dtype = torch.float64) -> Tiny:
    """The same network at every call."""
    torch.manual_seed(0)
    return Tiny().to(dtype)


def batches(
    start: int, count: int, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for it, the same for the same numbers."""
    return (mlp_batch(step, 4, 3, dtype=dtype) for step in range(start, start + count))


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that are no longer what they were."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def through_a_file(value: Any) -> Any:
    """What comes back from ``torch.save``, read without trusting it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, map_location="cpu")


def trained(make: Make, steps: int = 3, **options: Any) -> tuple[nn.Module, Any]:
    """A network after some steps, and its optimizer."""
    model = tiny()
    optimizer = make(model.parameters(), **{"lr": 0.01, **options})
    fit(model, optimizer, batches(0, steps))
    return model, optimizer


def like(model: nn.Module) -> nn.Module:
    """A new network with the same weights."""
    other = tiny()
    other.load_state_dict(model.state_dict())
    return other


def assert_goes_on_alike(one: nn.Module, a: Any, two: nn.Module, b: Any, start: int = 3) -> None:
    """Bit for bit the same state now, and the same training from here."""
    assert_same_state(two, b, one, a)
    assert fit(one, a, batches(start, 5)) == fit(two, b, batches(start, 5))
    assert_same_weights(two, one)
    assert_same_state(two, b, one, a)


def assert_same(actual: Any, expected: Any) -> None:
    """The same nested dicts and lists, tensors bit for bit with their dtypes."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


def assert_close_weights(model: nn.Module, twin: nn.Module, rtol: float = 1e-9) -> None:
    """Equal up to rounding."""
    expected = weights(twin)
    for name, p in weights(model).items():
        torch.testing.assert_close(p, expected[name], rtol=rtol, atol=1e-12, msg=name)
