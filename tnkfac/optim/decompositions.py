"""What KFAC keeps of a pair of factors to precondition with: eigenbases, or damped inverses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature import Decomposable, Parts

Decomposition = dict[str, Parts]
METHODS = {"eigen": ("tikhonov",), "cholesky": ("pi", "factor"), "ekfac": ("tikhonov",)}
"""How each method may damp, the default first."""


@dataclass(frozen=True)
class Decomposer:
    """Decomposes ``A`` and ``B``, and applies what it has found.

    Attributes:
        method: ``"eigen"``: eigenvectors and eigenvalues; ``"ekfac"``: eigenvectors, and the
            second moments of gradients in their basis; ``"cholesky"``: inverses of damped factors.
        damping_type: ``"tikhonov"``: added to the eigenvalues of ``B (x) A``; ``"factor"``: to
            both factors; ``"pi"``: its root to both, balanced by their traces (arXiv 1503.05671,
            eq. 30).
        k: Structure of ``A``.
        c: Structure of ``B``.
        relative: Whether damping is in units of the mean eigenvalue of ``B (x) A``, or of each
            factor for ``"factor"``.
    """

    method: str
    damping_type: str
    k: Decomposable
    c: Decomposable
    relative: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Names of what is kept, and of how many parts each is made."""
        k, c = self.k, self.c
        if self.method == "cholesky":
            return {"A_inv": len(k.shapes), "B_inv": len(c.shapes)}
        kept = {"Q_A": len(k.basis_shapes), "Q_B": len(c.basis_shapes)}
        return {**kept, **({"scales": 1} if self.method == "ekfac" else {"d_A": 1, "d_B": 1})}

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Decomposition:
        """What leaves a gradient almost as it is, before there are factors."""
        eye_A, eye_B = (s.identity(groups, dtype, device) for s in (self.k, self.c))
        if self.method == "cholesky":
            return {"A_inv": eye_A, "B_inv": eye_B}
        basis = {
            "Q_A": eye_A if self.k.basis_shapes else (),
            "Q_B": eye_B if self.c.basis_shapes else (),
        }
        a, b = (torch.ones(groups, s.dim, dtype=dtype, device=device) for s in (self.k, self.c))
        if self.method == "ekfac":
            return {**basis, "scales": (_outer(b, a),)}
        return {**basis, "d_A": (a,), "d_B": (b,)}

    def decompose(self, A: Parts, B: Parts, damping: float) -> Decomposition:
        """Decompose both factors in their own precision, or in float64 where that fails.

        Raises:
            torch.linalg.LinAlgError: If it fails in float64, too.
        """
        dtype = A[0].dtype
        try:
            return self._decompose(A, B, damping)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if dtype == torch.float64:
                raise
        return self.decompose_in_double(A, B, damping)

    def decompose_in_double(self, A: Parts, B: Parts, damping: float) -> Decomposition:
        """The same by way of float64: in float32 LAPACK returns NaN for some singular matrices.

        Raises:
            torch.linalg.LinAlgError: If it fails.
        """
        dtype = A[0].dtype
        A, B = (tuple(part.double() for part in parts) for parts in (A, B))
        found = self._decompose(A, B, damping)
        return {name: tuple(part.to(dtype) for part in parts) for name, parts in found.items()}

    def _decompose(self, A: Parts, B: Parts, damping: float) -> Decomposition:
        if self.method == "cholesky":
            shift_A, shift_B = self._shifts(A, B, damping)
            return {"A_inv": self.k.inverse(A, shift_A), "B_inv": self.c.inverse(B, shift_B)}
        (a, Q_A), (b, Q_B) = self.k.eigen(A), self.c.eigen(B)
        a, b = a.clamp(min=0), b.clamp(min=0)  # rounding leaves zeros of either sign
        if self.method == "ekfac":
            return {"Q_A": Q_A, "Q_B": Q_B, "scales": (_outer(b, a),)}
        return {"Q_A": Q_A, "Q_B": Q_B, "d_A": (a,), "d_B": (b,)}

    def _shifts(self, A: Parts, B: Parts, damping: float) -> tuple[Tensor, Tensor]:
        """What is added to both factors, ``[G]`` each."""
        mean_A, mean_B = self.k.trace(A), self.c.trace(B)
        usable = (mean_A > 0) & (mean_B > 0)
        if self.relative:
            share = damping if self.damping_type == "factor" else damping**0.5
            mean_A, mean_B = (torch.where(usable, mean, 1.0) for mean in (mean_A, mean_B))
            return share * mean_A, share * mean_B
        if self.damping_type == "factor":
            return torch.full_like(mean_A, damping), torch.full_like(mean_B, damping)
        pi = torch.where(usable, mean_A / torch.where(usable, mean_B, 1.0), 1.0).sqrt()
        return pi * damping**0.5, damping**0.5 / pi

    def precondition(self, kept: Mapping[str, Parts], gradient: Tensor, damping: float) -> Tensor:
        """Apply the inverse to a gradient matrix ``[G, C_out / G, D]``."""
        if self.method == "cholesky":
            right = self.k.product(kept["A_inv"], gradient.mT).mT
            return self.c.product(kept["B_inv"], right)
        # in this order no product needs a copy of its operands: both leave what the next one takes
        turned = self.c.product(kept["Q_B"], gradient, transpose=True).mT
        turned = self.k.product(kept["Q_A"], turned, transpose=True)
        shift = torch.full((), damping, dtype=turned.dtype, device=turned.device)  # without a copy
        if self.method == "ekfac":
            scales = kept["scales"][0].mT
            damped = scales + (shift * _level(scales) if self.relative else shift)
        else:
            a, b = kept["d_A"][0].unsqueeze(2), kept["d_B"][0].unsqueeze(1)
            if self.relative:
                shift = shift * _level(a) * _level(b)
            damped = torch.addcmul(shift, a, b)
        turned = self.k.product(kept["Q_A"], torch.div(turned, damped, out=damped))
        return self.c.product(kept["Q_B"], turned.mT)


def _outer(b: Tensor, a: Tensor) -> Tensor:
    """``[G, C_out / G, D]`` from ``[G, C_out / G]`` and ``[G, D]``."""
    return b.unsqueeze(2) * a.unsqueeze(1)


def _level(values: Tensor) -> Tensor:
    """Mean ``[G, 1, 1]`` of the eigenvalues of each channel group; one where it is zero."""
    mean = values.mean((1, 2), keepdim=True)
    return torch.where(mean > 0, mean, 1.0)
