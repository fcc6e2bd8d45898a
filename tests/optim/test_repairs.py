"""Decompositions where rounding exceeds the damping, in every precision, and where LAPACK fails."""

import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import dense_factor, fit, squares
from oracles.zoo import mlp
from tnkfac import KFAC, KFACPreconditioner
from tnkfac.curvature.structures import Decomposable, resolve_structure
from tnkfac.optim.params.state import pack
from tnkfac.optim.rules.decompositions import METHODS, Decomposer

WAYS = [(method, damping) for method, types in METHODS.items() for damping in types]
each_way = pytest.mark.parametrize(("method", "damping_type"), WAYS)
EPS = torch.finfo(torch.float32).eps


def rank_deficient(dim: int, rank: int, scale: float, seed: int) -> Tensor:
    rows = torch.randn(rank, dim, generator=torch.Generator().manual_seed(seed)).double()
    return rows.T @ rows * (scale / rank)


def restricted(structure: Decomposable, matrix: Tensor) -> Tensor:
    """What the structure keeps of a matrix ``[d, d]``."""
    blocks = {"dense": structure.dim, "diagonal": 1}.get(structure.name, 4)
    block = torch.arange(structure.dim) // blocks
    return matrix * (block[:, None] == block[None, :])


def parts_of(structure: Decomposable, matrix: Tensor) -> tuple[Tensor, ...]:
    if structure.name == "dense":
        return (matrix[None],)
    if structure.name == "diagonal":
        return (matrix.diagonal()[None],)
    count, rest = divmod(structure.dim, 4)
    whole = [matrix[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] for i in range(count)]
    return torch.stack(whole)[None], matrix[4 * count :, 4 * count :][None].reshape(1, rest, rest)


def right_update(
    A: Tensor, B: Tensor, G: Tensor, way: tuple[str, str], damping: float, relative: bool
) -> Tensor:
    """The damped inverse applied to a gradient, densely and in float64."""
    mean_A, mean_B = A.diagonal().mean(), B.diagonal().mean()
    if way[0] != "cholesky":
        shift = damping * (mean_A * mean_B if relative else 1.0)
        curvature = torch.kron(B, A) + shift * torch.eye(G.numel()).double()
        return torch.linalg.solve(curvature, G.flatten()).view_as(G)
    on_A = on_B = damping if way[1] == "factor" else damping**0.5
    if relative:
        on_A, on_B = on_A * mean_A, on_B * mean_B
    elif way[1] == "pi":
        pi = (mean_A / mean_B).sqrt()
        on_A, on_B = on_A * pi, on_B / pi
    right = torch.linalg.solve(A + on_A * torch.eye(len(A)).double(), G.T).T
    return torch.linalg.solve(B + on_B * torch.eye(len(B)).double(), right)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e8, 1.0), (1e8, 1e8), (1e30, 1e-20)], ids=str)
@pytest.mark.parametrize("damping", [1e-3, 1e-8])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("structure", ["dense", "block4diagonal", "diagonal"])
@each_way
def test_no_update_is_too_large(
    method: str,
    damping_type: str,
    structure: str,
    relative: bool,
    damping: float,
    scales: tuple[float, float],
) -> None:
    """In float32, of gradients in the range of singular factors: at most 30 times the right one.

    And it goes downhill.
    """
    k, c = resolve_structure(structure, 14), resolve_structure(structure, 10)
    A, B = rank_deficient(14, 5, scales[0], 0), rank_deficient(10, 4, scales[1], 1)
    G = B @ torch.ones(10, 14).double() @ A
    G = (G / G.abs().max() * (scales[0] * scales[1]) ** 0.5).float().double()
    A, B = restricted(k, A), restricted(c, B)
    found = right_update(A, B, G, (method, damping_type), damping, relative)
    decomposer = Decomposer(method, damping_type, k, c, relative, EPS)
    factors = [tuple(p.float() for p in parts_of(s, m)) for s, m in ((k, A), (c, B))]
    try:
        kept = decomposer.decompose(*factors, damping)
        sound = bool(decomposer.sound(kept, *factors, damping).all())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        sound = False
    kept = kept if sound else decomposer.repaired(*factors, damping)
    update = decomposer.precondition(kept, G.float()[None], damping)[0].double()
    assert update.isfinite().all()
    assert float(update.norm()) <= 30 * float(found.norm())
    assert float((update * G).sum()) > 0


SHAPES = ("dense", "block7diagonal", "diagonal")


def loop(
    scales: list[float], dtype: torch.dtype, **options: Any
) -> tuple[list[float], KFACPreconditioner | None]:
    """Losses of SGD with inputs of growing size, relative to that; preconditioned if asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1)).to(dtype)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    preconditioner = KFACPreconditioner(model, lr=0.01, **options) if options else None
    losses = []
    for step in range(12):
        scale = scales[min(step, len(scales) - 1)]
        x = torch.randn(8, 20, dtype=dtype) * scale
        sgd.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        if preconditioner is not None:
            preconditioner.step()
            sgd.step()
        losses.append(float(loss.detach()) / scale**2)
    return losses, preconditioner


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scales", [[1.0], [1.0, 1e4], [1.0, 1e6], [1e4], [1e5]], ids=str)
@pytest.mark.parametrize("damping", [1e-3, 1e-6])
@pytest.mark.parametrize("normalization", ["kfac-pytorch", "fisher"])
@pytest.mark.parametrize("structures", SHAPES)
@pytest.mark.parametrize("method", ["eigen", "inverse"])
def test_training_with_the_preconditioner(
    method: str, structures: str, normalization: str, damping: float, scales: list[float]
) -> None:
    """Never far above a model that is left as it is, nothing fails, and nothing is lost."""
    untrained, _ = loop(scales, torch.float32)
    losses, preconditioner = loop(
        scales,
        torch.float32,
        compute_method=method,
        structures=structures,
        normalization=normalization,
        damping=damping,
        kl_clip=None,
    )
    assert preconditioner is not None
    assert all(one < 2 * max(untrained) for one in losses)
    assert losses[-1] < 1.1 * untrained[-1]
    assert not any(row.failures for row in preconditioner.report())


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("way", "inv_dtype", "dtype", "options"),
    [
        (way, inv_dtype, dtype, [{}, {"damping": 1e-2}][(a + b + c) % 2])
        for (a, way), (b, inv_dtype), (c, dtype) in product(
            enumerate(WAYS), enumerate(DTYPES), enumerate(DTYPES)
        )
    ],
    ids=str,
)
def test_every_dtype_of_decompositions(
    way: tuple[str, str],
    inv_dtype: torch.dtype,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    method, damping_type = way
    model = mlp(6, 8, 2).to(dtype)
    x = torch.randn(16, 6)
    y = torch.stack([x[:, 0] - x[:, 1], x[:, 2]], 1).tanh()
    optimizer = KFAC(
        model.parameters(),
        lr=1e-2,
        compute_method=method,
        damping_type=damping_type,
        inv_dtype=inv_dtype,
        inv_update_steps=4,
        **options,
    )
    data = [(x.to(dtype), y.to(dtype))] * 30
    losses = fit(model, optimizer, data, lambda out, target: squares(out.float(), target.float()))
    assert losses[-1] < 0.7 * losses[0]
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    assert all(bool(v.isfinite().all()) for v in (*tensors, *model.parameters()))
    assert not any(row.failures for row in optimizer.report())
    again = KFAC(model.parameters(), compute_method=method, damping_type=damping_type)
    again.load_state_dict(optimizer.state_dict())
    fit(model, again, data[:5], lambda out, target: squares(out.float(), target.float()))
    assert all(bool(v.isfinite().all()) for v in model.parameters())


@pytest.mark.parametrize("growth", [1.0, 1e3, 1e-3])
@pytest.mark.parametrize("structures", ["dense", "block3diagonal", "diagonal"])
@each_way
def test_what_stands_in_for_a_decomposition(
    method: str,
    damping_type: str,
    structures: str,
    growth: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With gradients of another size than the last decomposition is of, no step is longer.

    Length is that in the metric of the damped curvature.
    """

    def fails(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    moves = []
    for broken in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 5).double()
        optimizer = KFAC(
            model.parameters(),
            lr=1e-30,
            momentum=0.0,
            damping=1e-3,
            kl_clip=None,
            factor_decay=0.0,
            inv_update_steps=1,
            compute_method=method,
            damping_type=damping_type,
            structures=structures,
        )
        x, y = torch.randn(9, 6).double(), torch.randn(9, 5).double()
        with warnings.catch_warnings(), monkeypatch.context() as patch:
            warnings.simplefilter("ignore")
            for step in range(2):
                if broken and step:
                    for name in ("eigh", "cholesky"):
                        patch.setattr(torch.linalg, name, fails)
                size = growth if step else 1.0
                optimizer.zero_grad()
                squares(size * model(x * size), y).backward()
                gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                for p in model.parameters():
                    p.data.zero_()
                optimizer.step()
        moves.append([-p.detach() / 1e-30 for p in model.parameters()])
        failed = broken and structures != "diagonal"
        assert any(row.failures == 1 for row in optimizer.report()) == failed
    along = [
        sum(float((m * g).sum()) for m, g in zip(move, gradients, strict=True)) for move in moves
    ]
    assert 0 < along[1] <= along[0] * (1 + 1e-9)


def test_helpers_agree() -> None:
    """Parts that the table writes are those of the structure."""
    for name in ("dense", "block4diagonal", "diagonal"):
        structure = resolve_structure(name, 14)
        matrix = rank_deficient(14, 5, 1.0, 0)
        state: dict[str, Tensor] = {}
        state.update(pack("A", parts_of(structure, matrix)))
        assert torch.equal(dense_factor(state, "A")[0], restricted(structure, matrix))
