"""SINGD in its reference mode against recorded trajectories and the slow reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Size, Tensor, nn

from oracles.grids import all_pairs
from oracles.loops import dense_factor
from oracles.singd_cases import (
    CASES,
    TOLERANCE,
    Case,
    assert_close_to_record,
    assert_numbers_close,
    load_record,
    numbers,
    probe,
    train,
)
from oracles.singd_reference import SingdReference
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights
from tnkfac import SINGD

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:alpha1=.* has no effect"),
]


def reference_mode(params: Any, **options: Any) -> SINGD:
    return SINGD(params, **{**SINGD.REFERENCE, **options})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recorded_trajectories(case: Case) -> None:
    optimizers = []

    def make(model: nn.Module, **options: Any) -> SINGD:
        optimizers.append(reference_mode(model.parameters(), **options))
        return optimizers[0]

    model, losses = train(case, make)
    record = load_record(case)
    assert_close_to_record(record, model, losses)
    for kind, structure in zip(("K", "C"), case.options["structures"], strict=True):
        for name, expected in record[kind].items():
            state = optimizers[0].state[model.get_submodule(name).weight]
            (factor,) = dense_factor(state, kind, structure)
            assert_numbers_close(f"{kind} of {name}", probe(factor), expected)


def test_reference_is_a_dict_of_arguments() -> None:
    """Users splat it into the constructor, and it must not be shared state that they may spoil."""
    assert SINGD.REFERENCE["init"] == "identity"
    assert SINGD.REFERENCE["grafting"] is None
    assert SINGD.REFERENCE["decoupled_weight_decay"] is False
    assert SINGD.REFERENCE["structures"] == ("dense", "dense")
    paper = {"momentum": 0.9, "damping": 1e-3, "lr_cov": 1e-2, "T": 10, "alpha1": 0.5}
    (group,) = SINGD(nn.Linear(2, 2).parameters(), **SINGD.REFERENCE).param_groups
    assert {name: group[name] for name in paper} == paper


# --- all layers, against the slow reference -----------------------------------------------------

BASE: dict[str, Any] = {
    "lr": 0.01,
    "momentum": 0.9,
    "damping": 0.02,
    "alpha1": 0.5,
    "weight_decay": 0.0,
    "T": 1,
    "loss_average": "batch",
    "lr_cov": 0.05,
    "structures": ("dense", "dense"),
    "kfac_approx": "expand",
    "kfac_like": False,
    "normalize_lr_cov": False,
}
STRUCTURES = (
    "dense",
    "diagonal",
    "block3diagonal",
    "hierarchical2_1",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
    "triltopleftdiag",
    "trilbottomrightdiag",
    "triutopleftdiag",
    "triubottomrightdiag",
)
PAIRS = (
    ("dense", "dense"),
    ("dense", "diagonal"),
    ("block3diagonal", "dense"),
    ("diagonal", "block3diagonal"),
    ("hierarchical1_3", "triltoeplitz"),
    ("triutoeplitz", "diagonal"),
    ("dense", "triutopleftdiag"),
    ("trilbottomrightdiag", "hierarchical3_1"),
)
WHOLE = (5,)
UNEVEN = (1, 3, 1)


def per_output(module: nn.Module, shape: Size) -> int:
    """Loss terms of a mean over samples and positions, told by a callable."""
    assert isinstance(module, nn.Module)
    return shape.numel()


def thrice(module: nn.Module, shape: Size) -> int:
    """More loss terms for convolutions, so that the module is used."""
    return shape[0] * (3 if hasattr(module, "kernel_size") else 1)


def warm_up(step: int) -> float:
    return 0.01 * min(step + 1, 5)


def _id(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in value.items()) or "base"
    return str(value)


def mean_squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).sum(1).mean()


def sum_squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def compare(
    model: nn.Module,
    batch: Callable[[int], tuple[Any, Any]],
    split: tuple[int, ...],
    options: dict[str, Any],
    steps: int = 10,
) -> None:
    """Train with SINGD and with the reference; weights and factors must stay the same."""
    total = options["loss_average"] is None
    loss_fn = sum_squares if total else mean_squares
    reference = SingdReference(model, loss_fn, **options)
    optimizer = reference_mode(model.parameters(), **options)
    for step in range(steps):
        x, y = batch(step)
        parts = zip(x.split(split), y.split(split), strict=True)
        micro = [(u, v, 1.0 if total else u.shape[0] / x.shape[0]) for u, v in parts]
        expected = reference.step(micro)
        optimizer.zero_grad()
        loss = 0.0
        for u, v, weight in micro:
            part = weight * loss_fn(model(u), v)
            part.backward()
            loss += part.item()
        optimizer.step()
        assert abs(loss - expected) <= 1e-11 * max(1.0, abs(expected)), step
    trained = dict(reference.model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, trained[name], rtol=1e-11, atol=1e-11, msg=name)
    for name in reference.K:
        state = optimizer.state[model.get_submodule(name).weight]
        pair = options["structures"]
        for kind, factors, structure in zip("KC", (reference.K, reference.C), pair, strict=True):
            actual = dense_factor(state, kind, structure)
            torch.testing.assert_close(actual, factors[name], rtol=1e-11, atol=1e-11)


SETTINGS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "default": (WHOLE, {}),
    "kfac-like": (WHOLE, {"kfac_like": True, "alpha1": 0.0}),
    "normalised": (WHOLE, {"normalize_lr_cov": True, "damping": 2.0}),
    "T=2": (WHOLE, {"T": 2}),
    "sum": (WHOLE, {"loss_average": None, "lr": 0.002}),
    "batch+sequence": (WHOLE, {"loss_average": "batch+sequence"}),
    "uneven": (UNEVEN, {}),
}


@pytest.mark.parametrize(
    ("structure", "approx", "setting"), all_pairs(STRUCTURES, ["expand", "reduce"], SETTINGS)
)
def test_structures_in_every_mode(structure: str, approx: str, setting: str) -> None:
    split, changed = SETTINGS[setting]
    options = {**BASE, "structures": (structure, structure), "kfac_approx": approx, **changed}
    compare(fixed_weights(AllLayers()), all_layers_batch, split, options, steps=6)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("pair", PAIRS, ids=_id)
def test_pairs_of_structures(pair: tuple[str, str], approx: str) -> None:
    """Another structure on each side, on uneven micro-batches and every other step."""
    options = {**BASE, "structures": pair, "kfac_approx": approx, "T": 2}
    compare(fixed_weights(AllLayers()), all_layers_batch, UNEVEN, options)


VARIANTS: list[dict[str, Any]] = [
    {"kfac_like": True, "alpha1": 0.0},
    {"kfac_like": True, "alpha1": 0.5, "T": 2},  # alpha1 has no effect
    {"normalize_lr_cov": True, "damping": 2.0},
    {"alpha1": 0.0},
    {"momentum": 0.0},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"weight_decay": 0.1},
    {"damping": 0.0},
    {"lr_cov": warm_up},
    {"lr_cov": warm_up, "T": 3},
    {"loss_average": "batch+sequence"},
    {"loss_average": None, "lr": 0.002},
    {"loss_average": None, "lr": 0.002, "kfac_like": True, "alpha1": 0.0, "lr_cov": 0.01},
    {"loss_average": per_output, "lr_cov": 0.005},
    {"loss_average": thrice, "kfac_approx": "reduce"},
    {"loss_average": "batch+sequence", "kfac_approx": "reduce", "kfac_like": True, "alpha1": 0.0},
]


@pytest.mark.parametrize(
    ("pair", "split"), [(PAIRS[0], UNEVEN), (PAIRS[3], WHOLE)], ids=["dense-uneven", "mixed-whole"]
)
@pytest.mark.parametrize("changed", VARIANTS, ids=_id)
def test_options(changed: dict[str, Any], pair: tuple[str, str], split: tuple[int, ...]) -> None:
    """Every option, on the whole batch and on uneven micro-batches of it."""
    options = {**BASE, "structures": pair, **changed}
    compare(fixed_weights(AllLayers()), all_layers_batch, split, options, steps=6)


# --- networks that use a layer more than once, or not in every step -----------------------------


class Twice(nn.Module):
    """One layer on two inputs of different length: its own module, or two that share parameters."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = self.first
        if tied:
            self.second = nn.Linear(3, 4)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 5, 3]`` to ``[N, 2]``."""
        first = torch.tanh(self.first(x[:, :4])).mean(1)
        y: Tensor = self.last(first + torch.tanh_(self.second(input=x[:, 4])))
        return y


class Recurrent(nn.Module):
    """A convolution and a linear layer applied again and again to a state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1, groups=2)
        self.linear = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 2, 3]`` to ``[N, 2]``."""
        for _ in range(3):
            x = torch.tanh(self.conv(x))
            x = self.linear(x.flatten(1)).view(-1, 2, 3)
        y: Tensor = self.last(x.flatten(1))
        return y


REUSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "module called twice": (lambda: Twice(tied=False), (5, 3)),
    "two modules share parameters": (lambda: Twice(tied=True), (5, 3)),
    "recurrence": (Recurrent, (2, 3)),
}


@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence", None])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", REUSE)
def test_reused_layers(name: str, approx: str, loss_average: str | None) -> None:
    """Factors sum over calls, the loss terms too; a shared weight is stepped once."""
    build, shape = REUSE[name]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return numbers(5, *shape, seed=step), numbers(5, 2, seed=step + 50)

    options = {**BASE, "kfac_approx": approx, "loss_average": loss_average, "lr_cov": 0.02}
    compare(fixed_weights(build()), batch, UNEVEN, options)


def test_tolerance_of_the_records() -> None:
    """The records are compared as tightly as promised."""
    assert TOLERANCE == 1e-12
