"""When a layer was updated: one copy of each number, in the state, whatever happens to it."""

import copy
import io
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch.nn import functional

from oracles.grids import all_pairs
from oracles.loops import assert_same_state, assert_same_weights, fit, state_by_name
from oracles.zoo import STRUCTURES, Everyday, everyday_batch, fixed_weights
from tnkfac import KFAC, SINGD

METHODS: dict[str, dict[str, Any]] = {
    "eigen": {"compute_method": "eigen"},
    "ekfac": {"compute_method": "ekfac"},
    "pi": {"compute_method": "cholesky"},
    "factor": {"compute_method": "cholesky", "damping_type": "factor"},
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"KFAC {name}": (KFAC, options) for name, options in METHODS.items()},
    "KFAC blocks": (KFAC, {"structures": "block3diagonal"}),
    "KFAC diagonal": (KFAC, {"structures": "diagonal", "compute_method": "ekfac"}),
    **{f"SINGD {name}": (SINGD, {"structures": name}) for name in ("auto", *STRUCTURES)},
}
PERIOD = 2


def network() -> Any:
    return fixed_weights(Everyday(), 2.0)


def build(case: str, steps: tuple[int, int] = (PERIOD, 2 * PERIOD)) -> tuple[Any, Any]:
    kind, options = CASES[case]
    model = network()
    schedule = {"factor_update_steps": steps[0], "inv_update_steps": steps[1]}
    if kind is SINGD:
        schedule = {"T": PERIOD}
    return model, kind(model.parameters(), lr=1e-2, **schedule, **options)


def train(model: Any, optimizer: Any, first: int, count: int) -> None:
    data = [everyday_batch(seed) for seed in range(first, first + count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, optimizer, data, functional.cross_entropy)


def resumed(case: str, model: Any, optimizer: Any, **options: Any) -> tuple[Any, Any]:
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other, second = build(case, **options)
    saved, state = torch.load(file, weights_only=True)
    other.load_state_dict(saved)
    second.load_state_dict(state)
    return other, second


def spoil(model: Any, optimizer: Any) -> None:
    """Make a factor of one layer infinite."""
    state = optimizer.state[model.up.weight]
    key = next(key for key in ("A", "A.0", "K", "K.0", "K.1") if key in state)
    state[key].fill_(float("inf"))


@pytest.mark.parametrize("phase", range(1, 2 * PERIOD + 2))
@pytest.mark.parametrize("case", CASES)
def test_resumed_at_any_phase(case: str, phase: int) -> None:
    model, optimizer = build(case)
    train(model, optimizer, 0, phase)
    other, second = resumed(case, model, optimizer)
    train(model, optimizer, phase, 5)
    train(other, second, phase, 5)
    assert_same_weights(other, model)
    assert_same_state(other, second, model, optimizer)


@pytest.mark.parametrize(
    ("case", "phase", "steps"),
    all_pairs(
        [case for case in CASES if case.startswith("KFAC")],
        range(1, 5),
        [(2, 4), (4, 1), (3, 2)],
    ),
)
def test_resumed_around_a_restart(case: str, phase: int, steps: tuple[int, int]) -> None:
    """A factor is not finite after some steps; the checkpoint is taken at any step around that."""
    spoiled = 2
    model, optimizer = build(case, steps)
    train(model, optimizer, 0, spoiled)
    spoil(model, optimizer)
    train(model, optimizer, spoiled, phase)
    other, second = resumed(case, model, optimizer, steps=steps)
    train(model, optimizer, spoiled + phase, 5)
    train(other, second, spoiled + phase, 5)
    assert_same_weights(other, model)
    assert_same_state(other, second, model, optimizer)
    assert all(bool(value.isfinite().all()) for value in state_by_name(model, optimizer).values())


@pytest.mark.parametrize("pending", [True, False], ids=["with statistics", "without"])
@pytest.mark.parametrize("method", METHODS)
def test_a_restarted_layer_is_measured_at_the_next_step(method: str, pending: bool) -> None:
    """And decomposed, though neither is due: until then it has no factors."""
    model = network()
    optimizer = KFAC(
        model.parameters(), factor_update_steps=4, inv_update_steps=4, **METHODS[method]
    )
    train(model, optimizer, 0, 4 if pending else 5)
    spoil(model, optimizer)
    state = optimizer.state[model.up.weight]
    if not pending:  # a decomposition that is due for another reason
        state["last_refresh"].fill_(-1)
    train(model, optimizer, 5, 1)
    restarted = {key: state[key].clone() for key in ("A", "factor_weight", "last_update")}
    assert int(restarted["last_update"]) == int(state["last_refresh"]) == -1
    assert float(restarted["factor_weight"]) == 0.0
    assert not bool(restarted["A"].any())
    row = next(row for row in optimizer.report() if row.name == "up.weight")
    assert (row.last_update, row.failures) == (None, 1)
    step = optimizer.param_groups[0]["step"]
    train(model, optimizer, 6, 1)
    assert int(state["last_update"]) == int(state["last_refresh"]) == step
    assert int(state["failures"]) == 0
    assert float(state["factor_weight"]) > 0.0
    others = optimizer.state[model.conv.weight]
    assert int(others["last_update"]) == 4


@pytest.mark.parametrize("case", CASES)
def test_what_the_state_says_counts(case: str) -> None:
    """Numbers that somebody writes into the state, or a state of another run, are taken."""
    model, optimizer = build(case)
    train(model, optimizer, 0, 2)
    weight = model.conv.weight
    optimizer.state[weight]["last_update"].fill_(-1)
    rows = {row.name: row.last_update for row in optimizer.report()}
    assert rows["conv.weight"] is None
    assert rows["up.weight"] is not None
    optimizer.state[weight]["last_update"] = torch.tensor(1)
    assert {row.name: row.last_update for row in optimizer.report()}["conv.weight"] == 1
    kept = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2, 3)
    optimizer.load_state_dict(kept)
    assert {row.name: row.last_update for row in optimizer.report()}["conv.weight"] == 1


@pytest.mark.parametrize("case", CASES)
def test_an_emptied_state_starts_anew(case: str) -> None:
    model, optimizer = build(case)
    train(model, optimizer, 0, 3)
    optimizer.state = defaultdict(dict)
    assert {row.last_update for row in optimizer.report()} == {None}
    train(model, optimizer, 3, 2)
    updates = {row.last_update for row in optimizer.report() if row.structure}
    assert updates == {4}
