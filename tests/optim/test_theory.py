"""What SINGD's update means (arXiv 2312.05705), on the package's own update rule."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tnkfac.curvature.structures import resolve_structure
from tnkfac.optim.singd import singd_update

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
        moved = update(K, C, A, B, damping=damping, lr_cov=rate, kfac_like=True)
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
        K, C = update(K, C, A, B, damping=damping, lr_cov=0.05)
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


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_only_the_product_of_both_factors_matters(scale: float) -> None:
    """``A`` times a number and ``B`` over it give the same step, except with ``kfac_like``."""
    A, B, K, C = symmetric(5, 0), symmetric(3, 1), start(5, 2), start(3, 3)
    plain = update(K, C, A, B, damping=0.1, lr_cov=0.1)
    scaled = update(K, C, scale * A, B / scale, damping=0.1, lr_cov=0.1)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    ikfac = update(K, C, scale * A, B / scale, damping=0.1, lr_cov=0.1, kfac_like=True)
    assert not torch.allclose(
        ikfac[0], update(K, C, A, B, damping=0.1, lr_cov=0.1, kfac_like=True)[0]
    )
