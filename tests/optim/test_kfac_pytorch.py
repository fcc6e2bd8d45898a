"""Against numbers recorded of kfac-pytorch: the same where it is right, and where it errs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.factors import input_factor
from oracles.kfac_pytorch_cases import CASES, TRAPS, Case, Trap, load_records, run, trap_input
from oracles.singd_cases import assert_numbers_close, probe
from tnkfac import KFACPreconditioner

FLOAT32 = 2e-5
"""kfac-pytorch decomposes in float32; relative to the largest entry of a gradient."""
RIGHT = ["plain"]
SILENT = {
    "dilation": "takes the patches of an undilated kernel",
    "padding_mode": "pads with zeros",
    "checkpoint": "averages the input in twice, as the forward pass runs twice",
    "no_grad": "averages in a forward pass that has no gradient",
}
LOUD = {
    "groups": "shapes cannot be multiplied",
    "padding-same": "not supported between instances of 'str' and 'int'",
    "inplace": "BackwardHookFunction is a view and is being modified inplace",
}


def state_of(preconditioner: KFACPreconditioner, weight: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = preconditioner._kfac.state[weight]
    return state


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_factors_and_preconditioned_gradients(case: Case) -> None:
    """Factors to 1e-12 at every step, gradients as far as float32 decompositions go."""
    made: list[KFACPreconditioner] = []

    def precondition(model: Any, **options: Any) -> KFACPreconditioner:
        made.append(KFACPreconditioner(model, **options))
        return made[-1]

    def step(model: Any) -> dict[str, Any]:
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight")}
        states = {name: state_of(made[-1], module.weight) for name, module in layers.items()}
        return {
            "A": {name: probe(state["A"][0]) for name, state in states.items()},
            "B": {name: probe(state["B"][0]) for name, state in states.items()},
            "gradients": torch.cat([p.grad.flatten() for p in model.parameters()]),
        }

    found, recorded = run(case, precondition, step), load_records()["cases"][case.name]
    assert len(found) == len(recorded)
    for number, (actual, expected) in enumerate(zip(found, recorded, strict=True)):
        for side in "AB":
            assert actual[side].keys() == expected[side].keys()
            for name, values in expected[side].items():
                label = f"step {number}: {side} of layer {name}"
                assert_numbers_close(label, actual[side][name], values)
        gradients = torch.tensor(expected["gradients"], dtype=torch.float64)
        error = (actual["gradients"] - gradients).abs().max() / gradients.abs().max()
        assert error < FLOAT32, f"step {number}: gradients off by {error:.1e}"


@pytest.mark.parametrize("name", TRAPS)
def test_where_it_errs(name: str) -> None:
    """Its factor is wrong, or it stops with an error; ours is that of brute force."""
    model = Trap(**TRAPS[name])
    preconditioner = KFACPreconditioner(model, factor_decay=0.5, kl_clip=None)
    x = trap_input()
    model(x).backward()
    preconditioner.step()
    positions = model.conv(x)[0, 0].numel()
    new = input_factor(model.conv, x) / positions**2  # what it divides by
    expected = 0.5 * torch.eye(new.shape[1], dtype=torch.float64) + 0.5 * new
    torch.testing.assert_close(state_of(preconditioner, model.conv.weight)["A"], expected)

    recorded = load_records()["traps"][name]
    if name in LOUD:
        assert LOUD[name] in recorded["error"]
        return
    theirs = torch.tensor(recorded["A"], dtype=torch.float64)
    same = theirs.shape == expected[0].shape and torch.allclose(theirs, expected[0], rtol=1e-9)
    assert same == (name in RIGHT), SILENT.get(name)


def test_every_trap_is_named() -> None:
    assert {*RIGHT, *SILENT, *LOUD} == set(TRAPS) == set(load_records()["traps"])
