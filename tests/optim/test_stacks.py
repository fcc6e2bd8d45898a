"""Layers of equal shape, taken together: the same numbers as one after the other."""

from typing import Any

import pytest
import torch
from torch import nn

from oracles.loops import fit, state_by_name, weights
from oracles.zoo import STRUCTURES
from tnkfac import KFAC, SINGD
from tnkfac.curvature import plain_path
from tnkfac.optim.params import batches as params_batches


def twins() -> nn.Sequential:
    """Three equal layers of one kind, two of another, and a single one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv1d(4, 4, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
    ).double()


def batches(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 4, 5), (7, 6)
    kind = torch.float64
    return [tuple(torch.randn(s, generator=generator, dtype=kind) for s in shapes)] * count


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"SINGD {name}": (SINGD, {"structures": name}) for name in STRUCTURES},
    "SINGD from the identity": (SINGD, {"init": "identity"}),
    "SINGD ikfac": (SINGD, {"kfac_like": True, "alpha1": 0.0}),
    "SINGD normalised": (SINGD, {"normalize_lr_cov": True}),
    "SINGD a number as damping": (SINGD, {"damping": 0.1, "grafting": None}),
    "SINGD trust region": (SINGD, {"grafting": None, "kl_clip": 1e-4}),
    "KFAC eigen": (KFAC, {}),
    "KFAC cholesky": (KFAC, {"compute_method": "cholesky"}),
    "KFAC pi": (KFAC, {"compute_method": "cholesky", "damping": 0.1, "damping_type": "pi"}),
    "KFAC ekfac": (KFAC, {"compute_method": "ekfac"}),
    "KFAC blocks": (KFAC, {"structures": "block3diagonal"}),
    "KFAC diagonal": (KFAC, {"structures": "diagonal"}),
}


def trained(cls: Any, options: dict[str, Any]) -> Any:
    model = twins()
    intervals: dict[str, Any] = {"T": 2} if cls is SINGD else {"inv_update_steps": 2}
    optimizer = cls(model.parameters(), lr=1e-2, **intervals, **options)
    fit(model, optimizer, batches(6))
    return model, optimizer


@pytest.mark.parametrize("name", CASES)
def test_stacks_change_nothing(name: str) -> None:
    """Weights and state in float64."""
    cls, options = CASES[name]
    model, optimizer = trained(cls, options)
    with plain_path():
        twin, other = trained(cls, options)
    for key, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[key], msg=key, rtol=1e-9, atol=1e-12)
    states, others = state_by_name(model, optimizer), state_by_name(twin, other)
    for key, value in states.items():
        if not key.split("/")[1].startswith("Q_"):  # eigenvectors of equal values are not unique
            torch.testing.assert_close(value, others[key], msg=key, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("cls", [SINGD, KFAC], ids=["SINGD", "KFAC"])
def test_what_goes_together(cls: Any) -> None:
    """So the comparison above compares something."""
    _, optimizer = trained(cls, {"structures": "dense"})
    layers = optimizer._registry.layers
    state = optimizer.state
    assert params_batches.stacks(layers, state) == [[0, 1], [2], [3, 4, 5]]
    with plain_path():
        assert params_batches.stacks(layers, state) == [[i] for i in range(6)]
    kept = next(key for key in state[layers[3].weight] if key in ("K", "A"))
    state[layers[3].weight][kept] = state[layers[3].weight][kept].bfloat16()
    assert params_batches.stacks(layers, state) == [[0, 1], [2], [3], [4, 5]]
    layers[0].group = dict(layers[0].group)
    assert params_batches.stacks(layers, state) == [[0], [1], [2], [3], [4, 5]]


def test_stacks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = trained(SINGD, {"structures": "dense"})
    layers = optimizer._registry.layers[3:]
    monkeypatch.setattr(params_batches, "TOGETHER", 2 * (7 * 7 + 6 * 6))
    assert params_batches.stacks(layers, optimizer.state) == [[0, 1], [2]]
    monkeypatch.setattr(params_batches, "SMALL", 80)
    assert params_batches.stacks(layers, optimizer.state) == [[0], [1], [2]]


@pytest.mark.filterwarnings("error")
def test_one_failing_decomposition_does_not_cost_the_others_theirs() -> None:
    """A layer of the same stack has the inverse that it would have alone."""
    model = twins()
    optimizer = KFAC(model.parameters(), lr=1e-2, inv_update_steps=1, compute_method="cholesky")
    fit(model, optimizer, batches(2))
    broken = optimizer.state[model[8].weight]
    before = broken["A_inv"].clone(), optimizer.state[model[6].weight]["A_inv"].clone()
    broken["A"].copy_(-100 * torch.eye(7))  # finite, but no covariance
    fit(model, optimizer, batches(1))
    assert bool((torch.linalg.eigvalsh(broken["A_inv"]) > 0).all())
    assert not torch.equal(broken["A_inv"], before[0])
    other = optimizer.state[model[6].weight]
    assert not torch.equal(other["A_inv"], before[1])
    A, B = (other[name] / other["factor_weight"] for name in ("A", "B"))
    mean_A, mean_B = (m.diagonal(dim1=-2, dim2=-1).mean() for m in (A, B))
    share = float(optimizer.param_groups[0]["relative_damping"]) ** 0.5
    for name, m, mean in (("A_inv", A, mean_A), ("B_inv", B, mean_B)):
        dense = m + share * mean * torch.eye(m.shape[-1]).double()
        torch.testing.assert_close(other[name], torch.linalg.inv(dense), rtol=1e-9, atol=1e-9)


def test_layers_in_other_groups_or_precisions_stay_apart() -> None:
    model = twins()
    parts = [{"params": model[6].parameters(), "lr_cov": 0.1}, {"params": model[8].parameters()}]
    rest = [p for i in (0, 2, 4, 10) for p in model[i].parameters()]
    optimizer = SINGD([*parts, {"params": rest}], structures="dense", T=1, lr=1e-2)
    fit(model, optimizer, batches(3))
    with plain_path():
        twin = twins()
        parts = [{"params": twin[6].parameters(), "lr_cov": 0.1}, {"params": twin[8].parameters()}]
        rest = [p for i in (0, 2, 4, 10) for p in twin[i].parameters()]
        fit(twin, SINGD([*parts, {"params": rest}], structures="dense", T=1, lr=1e-2), batches(3))
    for key, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[key], msg=key, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_lost_in_float32_are_found_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LAPACK returns NaN for some singular matrices instead of failing."""
    known = torch.linalg.eigh

    def failing(matrix: torch.Tensor) -> Any:
        values, vectors = known(matrix)
        return (values, vectors) if matrix.dtype == torch.float64 else (values, vectors * torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    model = twins().float()
    optimizer = KFAC(model.parameters(), lr=1e-2, inv_update_steps=1)
    fit(model, optimizer, [(x.float(), y.float()) for x, y in batches(2)])  # no warning
    for layer in optimizer._registry.layers:
        state = optimizer.state[layer.weight]
        assert state["Q_A"].isfinite().all()
        assert state["Q_A"].dtype == torch.float32
        assert int(state["failures"]) == 0
        assert int(state["last_refresh"]) == 1
