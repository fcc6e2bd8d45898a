"""Factors have all their digits, whatever precision training multiplies with."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.loops import state_by_name
from oracles.zoo import Everyday, everyday_batch
from tnkfac import SINGD
from tnkfac.curvature import input_factor, kfac, precision
from tnkfac.curvature.moments import second_moment
from tnkfac.curvature.precision import FullPrecision


@pytest.fixture(params=["high", "medium"])
def reduced(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def settings() -> tuple[str, str]:
    matmul, conv = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    return matmul.fp32_precision, conv.fp32_precision


def test_settings_come_back(reduced: str) -> None:
    """Also after an error, and unknown to those who use the older interface."""
    before = settings()
    with FullPrecision(torch.device("cpu")):
        assert settings()[0] == "ieee"
    assert settings() == before
    with pytest.raises(KeyError), FullPrecision(torch.device("cpu")):
        raise KeyError
    assert settings() == before
    assert torch.get_float32_matmul_precision() == reduced


def test_the_last_of_several_threads_brings_settings_back(reduced: str) -> None:
    """Backends have one setting for all threads, and every GPU has one for its backward pass."""
    before = settings()
    first, second = (FullPrecision(torch.device("cpu")) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert settings()[0] == "ieee"
    second.__exit__()
    assert settings() == before


def train() -> dict[str, Tensor]:
    """State after two steps that share their forward and backward numbers."""
    torch.manual_seed(0)
    model = Everyday()
    optimizer = SINGD(model.parameters(), T=1, structures="dense", lr=0.0, init="identity")
    optimizer.param_groups[0]["lr"] = 1e-30
    for seed in range(2):
        optimizer.zero_grad()
        x, y = everyday_batch(seed, dtype=torch.float32)
        with FullPrecision(torch.device("cpu")):
            functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return state_by_name(model, optimizer)


CALLS: dict[str, Callable[[], Any]] = {
    "input factor": lambda: input_factor(nn.Linear(300, 2, bias=False), sample()),
    "expand": lambda: input_factor(nn.Conv2d(30, 2, 3), sample().view(4, 30, 10, 64)),
    "kfac": lambda: kfac(linear(), nn.MSELoss(), [(sample(), torch.zeros(256, 2))])[""].A,
}


def sample() -> Tensor:
    return torch.randn(256, 300, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(300, 2)


@pytest.mark.parametrize("name", CALLS)
def test_factors_are_the_same(name: str, reduced: str) -> None:
    found = CALLS[name]()
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, CALLS[name]())


def test_training_is_in_full_precision_where_it_matters(
    reduced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics in the backward pass and preconditioning in the step."""
    seen = []
    read = second_moment.SecondMoment.dense

    def dense(moment: second_moment.SecondMoment) -> Tensor:
        seen.append(settings()[0])
        return read(moment)

    monkeypatch.setattr(second_moment.SecondMoment, "dense", dense)
    found = train()
    assert set(seen) == {"ieee"}
    torch.set_float32_matmul_precision("highest")
    expected = train()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_an_interrupt_that_leaves_the_lock_held_stops_nobody() -> None:
    """Neither the thread that was interrupted nor another one."""
    lock = precision._lock._lock
    lock.acquire()
    done: list[int] = []
    try:
        with FullPrecision(torch.device("cpu")):
            done.append(0)

        def inside() -> None:
            with FullPrecision(torch.device("cpu")):
                done.append(1)

        thread = threading.Thread(target=inside, daemon=True)
        thread.start()
        thread.join(timeout=20)
    finally:
        lock.release()
    assert done == [0, 1]


@pytest.mark.parametrize("setting", ["bf16", "ieee"])
def test_an_interrupted_pass_leaves_settings_as_they_were(setting: str) -> None:
    """Contexts that were entered and never left, at whatever line."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = setting
    try:
        lost = FullPrecision(torch.device("cpu"))
        lost.__enter__()
        del lost
        for _ in range(2):
            with FullPrecision(torch.device("cpu")):
                assert backend.fp32_precision == "ieee"
            assert backend.fp32_precision == setting
    finally:
        backend.fp32_precision = before
