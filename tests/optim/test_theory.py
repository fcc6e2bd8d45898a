"""What SINGD's update means (arXiv 2312.05705), on the package's own update rule."""

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.singd_reference import mean_trace, project
from oracles.zoo import STRUCTURES
from tnkfac.curvature.layers import describe
from tnkfac.curvature.structures import resolve_structure
from tnkfac.curvature.structures.diagonal import Diagonal
from tnkfac.optim.rules import singd_start
from tnkfac.optim.rules.singd_rule import damped, singd_update

ARGUMENTS: dict[str, Any] = {"alpha1": 0.0, "kfac_like": False, "normalize": False}


def symmetric(dim: int, seed: int) -> Tensor:
    """A positive definite matrix ``[1, dim, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(1, dim, dim + 2, generator=generator, dtype=torch.float64)
    return root @ root.mT / dim


def inverse_gram(K: Tensor) -> Tensor:
    return torch.linalg.inv(K @ K.mT)


def start(dim: int, seed: int) -> Tensor:
    """A factor near the identity, not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, dim, dim, generator=generator, dtype=torch.float64)
    return torch.eye(dim, dtype=torch.float64) + 0.2 * noise


def update(K: Tensor, C: Tensor, A: Tensor, B: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    k, c = (resolve_structure("dense", X.shape[1]) for X in (K, C))
    arguments = {**ARGUMENTS, **options}
    (new_K,), (new_C,), _, _ = singd_update(k, c, (K,), (C,), None, None, (A,), (B,), **arguments)
    return new_K, new_C


def test_ikfac_agrees_with_kfac_to_second_order() -> None:
    """One step is KFAC's moving average of ``A + damping I`` but for ``O(rate^2)``.

    With rates halved the difference falls to a quarter, for both factors.
    """
    A, B, K, C = symmetric(6, 0), symmetric(4, 1), start(6, 2), start(4, 3)
    damping = 0.1
    errors = []
    for rate in (0.02, 0.01, 0.005, 0.0025, 0.00125):
        moved = update(K, C, A, B, damping=(damping, damping), lr_cov=rate, kfac_like=True)
        for old, new, factor in zip((K, C), moved, (A, B), strict=True):
            eye = torch.eye(old.shape[1], dtype=torch.float64)
            average = (1 - rate) * inverse_gram(old) + rate * (factor + damping * eye)
            errors.append(float((new @ new.mT - torch.linalg.inv(average)).norm()))
    for one, half in zip(errors, errors[2:], strict=False):
        assert 3.5 < one / half < 4.5
    assert errors[-1] < 1e-3


def test_stationary_point() -> None:
    """Iterated on constant factors the update comes to rest where the paper says.

    There ``(K K^T)^-1 = tr(C^T B C)/d A + damping tr(C^T C)/d I``, its mirror image holds, and
    the mean eigenvalue of the preconditioned curvature is one.
    """
    A, B, damping = symmetric(6, 0), symmetric(4, 1), 0.1
    K, C = start(6, 2), start(4, 3)
    for _ in range(3000):
        K, C = update(K, C, A, B, damping=(damping, damping), lr_cov=0.05)
    for X, Y, M, N in ((K, C, A, B), (C, K, B, A)):
        eye = torch.eye(X.shape[1], dtype=torch.float64)
        trace_H, trace_Y = (m.diagonal(dim1=1, dim2=2).mean() for m in (Y.mT @ N @ Y, Y.mT @ Y))
        torch.testing.assert_close(
            inverse_gram(X), trace_H * M + damping * trace_Y * eye, rtol=1e-10, atol=1e-10
        )
    P = torch.kron(C[0] @ C[0].mT, K[0] @ K[0].mT)
    curvature = torch.kron(B[0], A[0]) + damping * torch.eye(24, dtype=torch.float64)
    mean = torch.linalg.eigvals(P @ curvature).real.mean()
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-10, atol=0)


def test_starts_are_found_in_a_few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """For many layers at once, of any scale and condition, also where others are done already."""
    problems = []
    for place in range(12):
        torch.manual_seed(place)
        A = torch.rand(1 + place % 3, 5 + place, dtype=torch.float64).pow(1 + 3 * place)
        B = torch.rand(1 + place % 3, 3 + place, dtype=torch.float64) * 10.0 ** (place - 6)
        problems.append((Diagonal(5 + place), Diagonal(3 + place), (A,), (B,)))
    expected = [singd_start.stationary_points([problem], 0.1)[0] for problem in problems]
    monkeypatch.setattr(singd_start, "_ITERATIONS", 12)
    for found, one in zip(singd_start.stationary_points(problems, 0.1), expected, strict=True):
        for (actual,), (wanted,) in zip(found, one, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_only_the_product_of_both_factors_matters(scale: float) -> None:
    """``A`` times a number and ``B`` over it give the same step, except with ``kfac_like``."""
    A, B, K, C = symmetric(5, 0), symmetric(3, 1), start(5, 2), start(3, 3)
    plain = update(K, C, A, B, damping=(0.1, 0.1), lr_cov=0.1)
    scaled = update(K, C, scale * A, B / scale, damping=(0.1, 0.1), lr_cov=0.1)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    ikfac = update(K, C, scale * A, B / scale, damping=(0.1, 0.1), lr_cov=0.1, kfac_like=True)
    assert not torch.allclose(
        ikfac[0], update(K, C, A, B, damping=(0.1, 0.1), lr_cov=0.1, kfac_like=True)[0]
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_hundreds_of_random_updates(structure: str) -> None:
    """The factors stay in their class, finite and invertible, and near what dense algebra gives.

    The dense twin applies the same projections to full matrices, so that an entry outside the
    structure, or a missing factor of two, would add up.
    """
    dims = 7, 5
    k, c = (resolve_structure(structure, dim) for dim in dims)
    eyes = [s.identity(1, torch.float64, torch.device("cpu")) for s in (k, c)]
    (K, C), (dense_K, dense_C) = eyes, [s.to_dense(e) for s, e in zip((k, c), eyes, strict=True)]
    rate, damping = 0.05, 0.1
    for step in range(300):
        rows = torch.randn(1, 7, 9, generator=torch.Generator().manual_seed(step)).double()
        columns = torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(-step - 1)).double()
        read = []
        for factor, data, s, dim in ((K, rows, k, 7), (C, columns, c, 5)):
            module = torch.nn.Linear(dim, 1, bias=False)
            moment = describe(module).input_moment(data[0].T, "expand")
            read.append(tuple(part / 9 for part in s.statistic(moment, factor)))
        K, C, _, _ = singd_update(
            k,
            c,
            K,
            C,
            None,
            None,
            read[0],
            read[1],
            damping=(damping, damping),
            lr_cov=rate,
            **ARGUMENTS,
        )
        new = []
        A, B = rows @ rows.mT / 9, columns @ columns.mT / 9
        H_K, KK = (project(structure, dense_K.mT @ m @ dense_K) for m in (A, torch.eye(7).double()))
        H_C, CC = (project(structure, dense_C.mT @ m @ dense_C) for m in (B, torch.eye(5).double()))
        for X, H, gram_X, other_H, other in (
            (dense_K, H_K, KK, H_C, CC),
            (dense_C, H_C, CC, H_K, KK),
        ):
            m = 0.5 * (mean_trace(other_H) * H + damping * mean_trace(other) * gram_X)
            new.append(X - rate * X @ (m - 0.5 * torch.eye(X.shape[1])))
        dense_K, dense_C = new
    for s, factor, dense in ((k, K, dense_K), (c, C, dense_C)):
        torch.testing.assert_close(s.to_dense(factor), dense, rtol=1e-9, atol=1e-9)
        assert torch.linalg.svdvals(dense).min() > 1e-3


@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("grafting", [None, 1.0])
def test_relative_damping_is_a_share_of_what_it_is_added_to(
    kfac_like: bool, grafting: float | None
) -> None:
    """Of each factor with IKFAC, else of the curvature; of one where factors are normalised."""
    k, c = resolve_structure("dense", 6), resolve_structure("dense", 4)
    A, B = 5 * symmetric(6, 0), 0.3 * symmetric(4, 1)
    a, b = (float(X.diagonal(dim1=1, dim2=2).mean()) for X in (A, B))
    group = {
        "damping": None,
        "relative_damping": 0.1,
        "grafting": grafting,
        "kfac_like": kfac_like,
    }
    found = damped(k, c, (A,), (B,), group)
    expected = (0.1, 0.1) if grafting else (0.1 * a, 0.1 * b) if kfac_like else (0.1 * a * b,) * 2
    assert [float(found.on_K), float(found.on_C)] == pytest.approx(expected)
    scale = (1 / a, 1 / b) if grafting else (1.0, 1.0)
    torch.testing.assert_close(found.A[0], A * scale[0])
    torch.testing.assert_close(found.B[0], B * scale[1])
    assert grafting or float(found.level) == pytest.approx(a * b)
