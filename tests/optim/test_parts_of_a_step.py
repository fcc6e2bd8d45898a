"""Parts of a step by themselves: what applies updates, flags, gates, and the fallback's rate."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import fit
from tnkfac import SINGD
from tnkfac.optim.finite import finite, finite_on_host, non_finite
from tnkfac.optim.params.state import write_where
from tnkfac.optim.step.apply import StepOptions, _apply_listed, apply_reference_

OPTIONS = [
    StepOptions(0.1, momentum, decay, decoupled, averaged, nesterov)
    for momentum, decay, decoupled, averaged, nesterov in product(
        (0.0, 0.7), (0.0, 0.3), (False, True), (False, True), (False, True)
    )
]


def tensors(count: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4 + i, generator=generator).to(dtype) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flag", [None, 0.0, 1.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_at_once_is_one_after_the_other(
    options: StepOptions, flag: float | None, dtype: torch.dtype
) -> None:
    """The fused step against the formulas; nothing moves where the flag is one."""
    found_inf = None if flag is None else torch.tensor(flag)
    params, updates = tensors(3, 0, dtype), tensors(3, 1, torch.promote_types(dtype, torch.float32))
    buffers = tensors(3, 2, dtype) if options.momentum else []
    before = [t.clone() for t in (*params, *buffers)]
    expected = [t.clone() for t in before]
    for _ in range(2):
        for i, update in enumerate(updates):
            buffer = expected[3 + i] if buffers else None
            apply_reference_(options, expected[i], update.clone(), buffer, found_inf)
        _apply_listed(options, params, [u.clone() for u in updates], buffers, found_inf)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for found, wanted, old in zip((*params, *buffers), expected, before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        assert torch.equal(found, old) == (flag == 1.0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_numbers_that_are_not_finite_are_found(bad: float, place: int) -> None:
    """On the host and in the way that is taken on a device, whatever their size and place."""
    several = [torch.randn(5), torch.full((4,), 1e30), torch.zeros(0, 3), torch.randn(2, 2)]
    assert bool(finite(several))
    assert finite_on_host(several)
    assert non_finite(several) is False
    [several[i] for i in (0, 1, 3)][place].view(-1)[1] = bad
    assert not bool(finite(several))
    assert not finite_on_host(several)
    assert non_finite(several) is True


@pytest.mark.parametrize("flag", [None, 0.0, 1.0])
@pytest.mark.parametrize("bad", [False, True])
def test_states_are_written_where_all_is_well(flag: float | None, bad: bool) -> None:
    state = {"K.0": torch.zeros(2, 2), "K.1": torch.zeros(3), "C": torch.zeros(2)}
    new = {"K": (torch.ones(2, 2), torch.ones(3)), "C": (torch.ones(2),)}
    if bad:
        new["C"][0][1] = float("inf")
    write_where(state, new, None if flag is None else torch.tensor(flag))
    written = flag != 1.0 and not bad
    assert all(bool((part == float(written)).all()) for part in state.values())


@pytest.mark.parametrize("own", [None, 0.04])
@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_the_rate_of_the_fallback_follows_a_schedule(own: float | None, fallback: str) -> None:
    """A norm is trained by torch's optimizer at that rate; the schedule is that of the group."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if own is None else {"fallback_options": {"lr": own}}
    model, twin = nn.LayerNorm(6), nn.LayerNorm(6)
    optimizer = SINGD(model.parameters(), lr=0.01, fallback=fallback, momentum=0.9, **options)
    rate = own or 0.01
    if fallback == "adamw":
        other: Any = torch.optim.AdamW(twin.parameters(), lr=rate, weight_decay=0.0)
    else:
        other = torch.optim.SGD(twin.parameters(), lr=rate, momentum=0.9)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.5**step
        for group in other.param_groups:
            group["lr"] = rate * 0.5**step
        data = [(torch.randn(8, 6), torch.randn(8, 6))]
        fit(model, optimizer, data)
        fit(twin, other, data)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
