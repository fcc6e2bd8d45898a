"""The square ``K K^T``: updates from the left, starts by Cholesky factors, and what is kept."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import assert_same_weights, fit, squares
from tnkfac import SINGD
from tnkfac.curvature.structures import Parts, resolve_structure
from tnkfac.curvature.structures.linalg import (
    EXACT,
    eigenvalue_bound,
    largest_eigenvalue,
    spectral_nodes,
    triangular_inverse,
)
from tnkfac.curvature.structures.structure import Decomposable
from tnkfac.optim.rules import singd_rule, singd_start
from tnkfac.optim.rules.singd_rule import LARGEST_CHANGE, Side, left_update, singd_update

PAIRS = (
    ("dense", "dense"),
    ("dense", "diagonal"),
    ("diagonal", "block4diagonal"),
    ("block5diagonal", "block3diagonal"),
    ("block4diagonal", "dense"),
)
pairs = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def structured(name: str, dim: int) -> Decomposable:
    structure = resolve_structure(name, dim)
    assert isinstance(structure, Decomposable)
    return structure


def covariance(dim: int, seed: int, rank: int | None = None, groups: int = 1) -> Tensor:
    """Positive semidefinite matrices of mean eigenvalue one, with a spectrum that falls."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(groups, dim, rank or 2 * dim, generator=generator, dtype=torch.float64)
    root = root * torch.logspace(0, -1, dim, dtype=torch.float64)[:, None]
    found = root @ root.mT
    return found / found.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]


def parts_of(structure: Decomposable, dense: Tensor) -> Parts:
    """What the structure reads of a symmetric matrix."""
    if structure.name == "diagonal":
        return (dense.diagonal(dim1=1, dim2=2).contiguous(),)
    if structure.name == "dense":
        return (dense,)
    count, size, _ = structure.part_shapes[0]
    ends = [(i * size, (i + 1) * size) for i in range(count)]
    whole = torch.stack([dense[:, a:b, a:b] for a, b in ends], 1)
    return whole, dense[:, count * size :, count * size :].contiguous()


def factor(structure: Decomposable, dim: int, seed: int, groups: int) -> Parts:
    """A factor near the identity that is not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        part + 0.1 * torch.randn(part.shape, generator=generator, dtype=torch.float64)
        for part in structure.identity(groups, torch.float64, torch.device("cpu"))
    )


@pairs
@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_from_the_left_is_from_the_right(
    pair: tuple[str, str], kfac_like: bool, groups: int
) -> None:
    """Twenty updates, against the rule that is written as in the paper."""
    k, c = (structured(name, dim) for name, dim in zip(pair, (13, 7), strict=True))
    K, C = factor(k, 13, 0, groups), factor(c, 7, 1, groups)
    right = K, C
    damping = torch.full((groups,), 0.03, dtype=torch.float64), 0.05
    for step in range(20):
        A = parts_of(k, covariance(13, 10 + step, groups=groups))
        B = parts_of(c, covariance(7, 50 + step, groups=groups))
        sides = (
            Side(k, K, k.square(K), A, damping[0]),
            Side(c, C, c.square(C), B, damping[1]),
        )
        K, C = left_update(*sides, lr_cov=0.1, kfac_like=kfac_like, bounded=False)
        new = singd_update(
            k,
            c,
            *right,
            None,
            None,
            A,
            B,
            damping=damping,
            alpha1=0.0,
            lr_cov=0.1,
            kfac_like=kfac_like,
            normalize=False,
        )
        right = new[0], new[1]
        for found, expected in zip((*K, *C), (*right[0], *right[1]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pairs
@pytest.mark.parametrize("level", [1.0, 30.0, 1e6])
def test_the_bound_of_a_step(pair: tuple[str, str], level: float) -> None:
    """The change is at most by half, but for the estimate; and all of it where that is less."""
    k, c = (structured(name, dim) for name, dim in zip(pair, (13, 7), strict=True))
    K, C = factor(k, 13, 0, 1), factor(c, 7, 1, 1)
    A, B = parts_of(k, level * covariance(13, 2)), parts_of(c, covariance(7, 3))
    sides = Side(k, K, k.square(K), A, 0.03), Side(c, C, c.square(C), B, 0.03)
    for bounded in (False, True):
        moved = left_update(*sides, lr_cov=0.4, kfac_like=True, bounded=bounded)
        for side, new in zip(sides, moved, strict=True):
            structure = side.structure
            old, now = structure.to_dense(side.K), structure.to_dense(new)
            change = torch.linalg.solve(old.mT, (now - old).mT).mT
            size = float(torch.linalg.eigvals(change).abs().max())
            metric = structure.to_dense(side.A) + 0.03 * torch.eye(structure.dim)
            W = old @ old.mT @ metric - torch.eye(structure.dim)
            free = 0.2 * float(torch.linalg.eigvals(W).abs().max())
            if bounded and free > LARGEST_CHANGE:
                assert 0.999 * LARGEST_CHANGE <= size <= 1.25 * LARGEST_CHANGE
            else:
                assert size == pytest.approx(free, rel=1e-9)


def test_estimates_of_the_largest_eigenvalue() -> None:
    """One is never above, the other never below."""
    for seed in range(20):
        M, P = covariance(20, seed), covariance(20, 100 + seed)
        W = P @ M - torch.eye(20, dtype=torch.float64)
        largest = float(torch.linalg.eigvals(W).real.abs().max())
        below, above = float(largest_eigenvalue(W, M)), float(eigenvalue_bound(W))
        assert 0.7 * largest <= below <= largest * (1 + 1e-12)
        assert largest <= above <= 20**0.5 * largest


@pytest.mark.parametrize(("count", "dim"), [(1, 30), (3, EXACT // 3), (1, 161), (40, 64), (1, 577)])
def test_means_over_spectra(count: int, dim: int) -> None:
    """Exact for small matrices, by quadrature within some per cent for large ones."""
    blocks = torch.stack([covariance(dim, seed)[0] for seed in range(count)])[None]
    blocks = torch.cat([blocks, 2 * blocks + 0.1 * torch.eye(dim, dtype=torch.float64)])
    nodes, weights = spectral_nodes(blocks)
    exact = torch.linalg.eigvalsh(blocks)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
    tolerance = 1e-12 if count * dim <= EXACT else 0.05
    for shift in (0.03, 0.3, 3.0):
        found = (weights / (nodes + shift)).sum(1)
        expected = (1 / (exact + shift)).flatten(1).mean(1)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    state = torch.get_rng_state()
    again = spectral_nodes(blocks)
    assert torch.equal(nodes, again[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dim", [0, 1, 31, 32, 33, 65, 130])
def test_the_inverse_by_halves(dim: int) -> None:
    L = torch.linalg.cholesky(covariance(dim, 0, groups=2) + 0.1 * torch.eye(dim))
    eye = torch.eye(dim, dtype=torch.float64).expand(2, dim, dim)
    torch.testing.assert_close(triangular_inverse(L) @ L, eye, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "pair",
    [
        ("dense", "dense"),
        ("block64diagonal", "block64diagonal"),
        ("dense", "diagonal"),
        ("block7diagonal", "dense"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("damping", [0.003, 0.03, 3.0])
def test_a_start_by_cholesky_factors(pair: tuple[str, str], damping: float) -> None:
    """Squares are those of the start by eigenvectors, within the error of the quadrature."""
    dims = 300, 70
    k, c = (structured(name, dim) for name, dim in zip(pair, dims, strict=True))
    factors = covariance(dims[0], 0, rank=150, groups=2), covariance(dims[1], 1, groups=2)
    A, B = (
        tuple(part.float() for part in parts_of(s, dense))
        for s, dense in zip((k, c), factors, strict=True)
    )
    problem = [(k, c, A, B)]
    assert singd_start._can_be_estimated(problem, damping)
    found = singd_start._by_cholesky(problem, damping)[0]
    expected = singd_start._by_eigenvectors(problem, damping)[0]
    for structure, one, two in zip((k, c), found, expected, strict=True):
        a, b = (structure.to_dense(structure.square(parts)) for parts in (one, two))
        assert float((a - b).norm() / b.norm()) < (0.1 if damping < 0.01 else 0.03)
    double = [(k, c, *(tuple(p.double() for p in parts) for parts in (A, B)))]
    assert not singd_start._can_be_estimated(double, damping)  # exact, as the formulas say
    assert not singd_start._can_be_estimated(problem, 0.0)


def test_a_factor_that_is_not_positive_definite_starts_by_eigenvectors() -> None:
    """Rounding may leave one; every start is finite."""
    k, c = structured("dense", 40), structured("dense", 5)
    A, B = covariance(40, 0).float(), covariance(5, 1).float()
    A = A - 2 * torch.eye(40)
    ((K, C),) = singd_start.stationary_points([(k, c, (A,), (B,))], 0.03)
    assert K[0].isfinite().all()
    assert C[0].isfinite().all()


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_factor_of_zeros_starts_at_the_limit(zero: str) -> None:
    """Next to a group that has curvature."""
    k, c = structured("dense", 6), structured("dense", 5)
    A, B = covariance(6, 0, groups=2).float(), covariance(5, 1, groups=2).float()
    (A if zero == "A" else B)[1] = 0
    ((K, C),) = singd_start.stationary_points([(k, c, (A,), (B,))], 0.04)
    for X in (K[0][1], C[0][1]):
        torch.testing.assert_close(X @ X.mT, 5 * torch.eye(len(X)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 5))


def data(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = (16, 90), (16, 5)
    return [tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(count)]


def kept(optimizer: SINGD) -> list[Tensor]:
    """Squares of the first layer."""
    layer = optimizer._registry.layers[0]
    return [part for _, parts in layer.cached_products.values() for part in parts]


def test_squares_are_kept_until_factors_change() -> None:
    model = network()
    optimizer = SINGD(model.parameters(), lr=1e-2, T=3)
    fit(model, optimizer, data(2))
    before = kept(optimizer)
    fit(model, optimizer, data(1))
    assert all(a is b for a, b in zip(before, kept(optimizer), strict=True))
    fit(model, optimizer, data(1))  # an update
    assert not any(a is b for a, b in zip(before, kept(optimizer), strict=True))
    before = kept(optimizer)
    with torch.no_grad():
        optimizer.state[model[0].weight]["K.0"].mul_(2)  # by hand
    fit(model, optimizer, data(1))
    assert not torch.equal(before[0], kept(optimizer)[0])


def test_squares_follow_a_loaded_state_and_lie_in_no_file() -> None:
    model = network()
    optimizer = SINGD(model.parameters(), lr=1e-2, T=3)
    fit(model, optimizer, data(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    twin = network()
    other = SINGD(twin.parameters(), lr=1e-2, T=3)
    fit(twin, other, data(3))  # squares of its own
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    keys = {key for state in saved["optimizer"]["state"].values() for key in state}
    assert not any("square" in key for key in keys)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    fit(model, optimizer, data(8)[5:])
    fit(twin, other, data(8)[5:])
    assert_same_weights(twin, model)  # bit by bit


def test_a_closed_optimizer_keeps_no_squares() -> None:
    model = network()
    optimizer = SINGD(model.parameters(), lr=1e-2)
    fit(model, optimizer, data(2))
    layers = list(optimizer._registry.layers)
    assert kept(optimizer)
    optimizer.close()
    assert not any(layer.cached_products for layer in layers)


@pytest.mark.parametrize("structure", ["block64diagonal", "block50diagonal", "dense"])
@pytest.mark.parametrize("groups", [1, 2])
def test_large_gradients_are_preconditioned_in_pieces(
    monkeypatch: pytest.MonkeyPatch, structure: str, groups: int
) -> None:
    """As all at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 96, 3, groups=groups), nn.Flatten(), nn.Linear(864, 3))
    twin = nn.Sequential(nn.Conv2d(64, 96, 3, groups=groups), nn.Flatten(), nn.Linear(864, 3))
    twin.load_state_dict(model.state_dict())
    batches = [(torch.randn(4, 64, 5, 5), torch.randn(4, 3)) for _ in range(3)]
    for net, numbers in ((model, 1 << 10), (twin, 1 << 30)):
        monkeypatch.setattr(singd_rule, "IN_CACHE", numbers)
        fit(net, SINGD(net.parameters(), lr=1e-2, structures=structure, T=2), batches, squares)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [1, 3, 100])
@pytest.mark.parametrize("outputs", [1, 7])
def test_products_with_the_square_are_those_with_its_factors(T: int, outputs: int) -> None:
    """Whichever is chosen for an interval and a width."""
    torch.manual_seed(0)
    model = nn.Linear(20, outputs).double()
    optimizer = SINGD(model.parameters(), T=T, structures="dense")
    fit(model, optimizer, [(torch.randn(8, 20).double(), torch.randn(8, outputs).double())])
    (layer,) = optimizer._registry.layers
    gradient = torch.randn(1, outputs, 21).double()
    (found,) = optimizer._precondition([layer], [gradient])
    K, C = (optimizer.state[model.weight][name] for name in ("K", "C"))
    torch.testing.assert_close(found, C @ C.mT @ gradient @ K @ K.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:A start is a multiple")
@pytest.mark.parametrize("scale", [1e-4, 1e-8, 1e-10, 1e-20, 1e-30])
@pytest.mark.parametrize("damping", [None, 1e-3])
@pytest.mark.parametrize("shape", [(300, 300), (40, 20)])
def test_tiny_curvature_starts_somewhere(
    scale: float, damping: float | None, shape: tuple[int, int]
) -> None:
    """Squares of it vanish in single precision; nothing fails for it."""
    torch.manual_seed(0)
    model = nn.Linear(*shape)
    optimizer = SINGD(model.parameters(), structures="dense", damping=damping)
    for _ in range(2):
        optimizer.zero_grad()
        (scale * model(torch.randn(3, shape[0])).square().mean()).backward()
        optimizer.step()
    assert all(bool(t.isfinite().all()) for t in optimizer.state[model.weight].values())


@pytest.mark.parametrize("columns", [slice(64, 128), slice(3000, 3001)])
def test_a_start_sees_blocks_that_are_not_looked_at(columns: slice) -> None:
    """Most blocks of an input that is mostly zero have no curvature."""
    k, c = structured("block64diagonal", 4096), structured("dense", 20)
    x = torch.zeros(50, 4096)
    x[:, columns] = torch.randn(50, 4096)[:, columns]
    A = x.reshape(50, 64, 64).permute(1, 2, 0)
    parts = (A @ A.mT)[None] * 64, torch.zeros(1, 0, 0)
    B = covariance(20, 1).float()
    ((K, _),) = singd_start.stationary_points([(k, c, parts, (B,))], 0.03)
    ((expected, _),) = singd_start._by_eigenvectors([(k, c, parts, (B,))], 0.03)
    P, Q = k.square(K)[0], k.square(expected)[0]
    assert float((P - Q).norm() / Q.norm()) < 0.05


def test_a_callable_interval_is_asked_for_steps_to_come_only() -> None:
    """Not for the step zero, nor more than once a step."""
    asked: list[int] = []
    model = network()
    optimizer = SINGD(model.parameters(), T=lambda step: asked.append(step) or 2)  # type: ignore
    fit(model, optimizer, data(5))
    assert asked == [1, 2, 3, 4, 5]


def test_momentum_of_the_factors_can_be_turned_on() -> None:
    """By hand, as a learning rate can."""
    model, twin = network(), network()
    optimizer = SINGD(model.parameters(), T=1)
    other = SINGD(twin.parameters(), T=1, alpha1=0.5)
    for net, one in ((model, optimizer), (twin, other)):
        fit(net, one, data(1))  # momenta are zero after the start
    optimizer.param_groups[0]["alpha1"] = 0.5
    for net, one in ((model, optimizer), (twin, other)):
        fit(net, one, data(4)[1:])
    assert optimizer.state[model[0].weight].keys() == other.state[twin[0].weight].keys()
    assert_same_weights(model, twin)


def test_half_precision_forms_no_squares() -> None:
    """Rounding would cost their small eigenvalues."""
    model = network().bfloat16()
    optimizer = SINGD(model.parameters(), lr=1e-3, T=2)
    fit(model, optimizer, [(x.bfloat16(), y.bfloat16()) for x, y in data(4)])
    assert not kept(optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
