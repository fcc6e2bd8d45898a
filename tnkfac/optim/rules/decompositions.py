"""Decompositions of a pair of factors, to precondition with: eigenbases, or damped inverses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature.structures import Decomposable, Parts, Structure

Decomposition = dict[str, Parts]
METHODS = {"eigen": ("tikhonov",), "cholesky": ("pi", "factor"), "ekfac": ("tikhonov",)}
"""How each method may damp, the default first."""
_LARGEST = 2.0
"""Norm of a damped inverse times its damping: at most one, up to rounding."""
_LARGEST_NOISE = 30.0
"""Size of a preconditioned gradient that is rounding alone, in that of a whole one."""


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
        eps: Relative rounding of factors and gradients.
    """

    method: str
    damping_type: str
    k: Decomposable
    c: Decomposable
    relative: bool = False
    eps: float = torch.finfo(torch.float64).eps

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Decomposition:
        """Decomposition that leaves a gradient almost as it is, before there are factors."""
        eye_A, eye_B = (s.identity(groups, dtype, device) for s in (self.k, self.c))
        if self.method == "cholesky":
            return {"A_inv": eye_A, "B_inv": eye_B}
        basis = {
            "Q_A": eye_A if self.k.basis_shapes else (),
            "Q_B": eye_B if self.c.basis_shapes else (),
        }
        wide = torch.promote_types(dtype, torch.float32)  # eigenvalues are of any size
        a, b = (torch.ones(groups, s.dim, dtype=wide, device=device) for s in (self.k, self.c))
        return self._with_spectra(basis, a, b)

    def decompose(self, A: Parts, B: Parts, damping: float) -> Decomposition:
        """Decompose both factors in their own precision.

        Raises:
            torch.linalg.LinAlgError: If it fails.
        """
        if self.method == "cholesky":
            shift_A, shift_B = self._shifts(A, B, damping)
            return {"A_inv": self.k.inverse(A, shift_A), "B_inv": self.c.inverse(B, shift_B)}
        (a, Q_A), (b, Q_B) = self.k.eigen(A), self.c.eigen(B)
        a, b = (_above_rounding(values, self.eps) for values in (a, b))
        return self._with_spectra({"Q_A": Q_A, "Q_B": Q_B}, a, b)

    def sound(self, derived: Mapping[str, Parts], A: Parts, B: Parts, damping: float) -> Tensor:
        """Whether what :meth:`decompose` found can be right, for every channel group ``[G]``.

        LAPACK returns NaN for some singular matrices, and where rounding exceeds the damping, an
        inverse that is much larger than one over it.
        """
        parts = [part for several in derived.values() for part in several]
        good = torch.stack([part.isfinite().flatten(1).all(1) for part in parts]).all(0)
        if self.method != "cholesky":
            return good
        shift_A, shift_B = self._shifts(A, B, damping)
        for structure, factor, name, shift in (
            (self.k, A, "A_inv", shift_A),
            (self.c, B, "B_inv", shift_B),
        ):
            least = torch.maximum(shift, structure.trace(factor) * torch.finfo(shift.dtype).eps)
            if structure.dim:
                good = good & (structure.norm(derived[name]) * least <= _LARGEST)
        return good

    def repaired(self, A: Parts, B: Parts, damping: float) -> Decomposition:
        """Decompose both factors, whatever it takes, into parts of their dtype.

        In their own precision, in float64, in float64 on the CPU; at last, inverses are made of
        eigenvalues that are kept above rounding.

        Raises:
            torch.linalg.LinAlgError: If not even eigenvalues are found.
        """
        dtype, device = A[0].dtype, A[0].device
        reason = "its decomposition is not finite"
        cpu = torch.device("cpu")
        rungs = ((dtype, device), (torch.float64, device), (torch.float64, cpu))
        for rung in dict.fromkeys(rungs):
            wide = tuple(tuple(part.to(rung[1], rung[0]) for part in parts) for parts in (A, B))
            try:
                derived = self.decompose(wide[0], wide[1], damping)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                reason = str(error)
                continue
            if bool(self.sound(derived, wide[0], wide[1], damping).all()):
                return {name: _narrowed(parts, A[0]) for name, parts in derived.items()}
        if self.method == "cholesky":
            shifts = self._shifts(wide[0], wide[1], damping)
            A_inv, B_inv = (
                _clamped_inverse(structure, factor, shift, self.eps)
                for structure, factor, shift in zip((self.k, self.c), wide, shifts, strict=True)
            )
            return {"A_inv": _narrowed(A_inv, A[0]), "B_inv": _narrowed(B_inv, A[0])}
        raise torch.linalg.LinAlgError(reason)  # type: ignore[attr-defined]

    def bounded(
        self, derived: Mapping[str, Parts], A: Parts, B: Parts, damping: float
    ) -> Decomposition:
        """Stand-in for a decomposition that failed: no update is larger than a right one.

        Eigenvectors stay as they are. In their basis a symmetric matrix is at most the diagonal
        one of its rows' absolute sums, which take the place of the eigenvalues.

        Args:
            derived: The last decomposition.
            A: Input factor.
            B: Output factor.
            damping: As always.
        """
        if self.method == "cholesky":
            shift_A, shift_B = self._shifts(A, B, damping)
            A_inv, B_inv = _least(self.k, A, shift_A), _least(self.c, B, shift_B)
            return {"A_inv": A_inv, "B_inv": B_inv}
        Q_A, Q_B = (tuple(part.to(A[0].dtype) for part in derived[name]) for name in ("Q_A", "Q_B"))
        sums = _row_sums(self.k, A, Q_A), _row_sums(self.c, B, Q_B)
        return self._with_spectra({"Q_A": Q_A, "Q_B": Q_B}, *sums)

    def _with_spectra(self, bases: Decomposition, a: Tensor, b: Tensor) -> Decomposition:
        if self.method == "ekfac":
            return {**bases, "scales": (_outer(b, a),)}
        return {**bases, "d_A": (a,), "d_B": (b,)}

    def _shifts(self, A: Parts, B: Parts, damping: float) -> tuple[Tensor, Tensor]:
        """Damping of both factors, ``[G]`` each.

        Both shares divide a gradient. Where it has but the rounding of larger numbers, they are
        not so small that this would outweigh the rest.
        """
        mean_A, mean_B = self.k.trace(A), self.c.trace(B)
        usable = (mean_A > 0) & (mean_B > 0)
        mean_A, mean_B = (torch.where(usable, mean, 1.0) for mean in (mean_A, mean_B))
        if self.damping_type == "factor":
            shift_A, shift_B = torch.full_like(mean_A, damping), torch.full_like(mean_B, damping)
        else:
            pi = (mean_A / mean_B).sqrt()
            shift_A, shift_B = pi * damping**0.5, damping**0.5 / pi
        if self.relative:
            share = damping if self.damping_type == "factor" else damping**0.5
            shift_A, shift_B = share * mean_A, share * mean_B
        least = (self.eps / _LARGEST_NOISE) ** 0.5
        if damping == 0:
            return least * mean_A, least * mean_B
        short = (least * mean_A / shift_A).sqrt() * (least * mean_B / shift_B).sqrt()
        more = torch.where(usable & short.isfinite(), short, 1.0).clamp(min=1.0)
        return shift_A * more, shift_B * more

    def precondition(
        self, derived: Mapping[str, Parts], gradient: Tensor, damping: float
    ) -> Tensor:
        """Apply the inverse to a gradient matrix ``[G, C_out / G, D]``."""
        if self.method == "cholesky":
            right = self.k.product(derived["A_inv"], gradient.mT).mT
            return self.c.product(derived["B_inv"], right)
        # in this order no product needs a copy of its operands: both leave what the next one takes
        turned = self.c.product(derived["Q_B"], gradient, transpose=True).mT
        turned = self.k.product(derived["Q_A"], turned, transpose=True)
        shift = torch.full((), damping, dtype=turned.dtype, device=turned.device)  # without a copy
        if self.method == "ekfac":
            scales = derived["scales"][0].mT
            damped = scales + (shift * _level(scales) if self.relative else shift)
        else:
            a, b = derived["d_A"][0].unsqueeze(2), derived["d_B"][0].unsqueeze(1)
            if self.relative:
                shift = shift * _level(a) * _level(b)
            damped = torch.addcmul(shift, a, b)
        if damping == 0:  # where there is no curvature at all, the gradient stays as it is
            damped = torch.where(damped > 0, damped, 1.0)
        turned = self.k.product(derived["Q_A"], torch.div(turned, damped, out=damped))
        return self.c.product(derived["Q_B"], turned.mT)


def _above_rounding(values: Tensor, eps: float) -> Tensor:
    """Eigenvalues ``[G, D]`` of positive semi-definite matrices, none below what is rounding.

    That is as large as it is known to be: where it has left negative ones, these tell.
    """
    if not values.shape[1]:
        return values
    least, largest = (end.unsqueeze(1) for end in torch.aminmax(values, dim=1))
    return torch.maximum(values, torch.maximum(largest * eps, -least))


def _clamped_inverse(structure: Decomposable, matrix: Parts, shift: Tensor, eps: float) -> Parts:
    """``(matrix + shift)^-1`` by eigenvalues, none of which is below rounding."""
    values, vectors = structure.eigen(matrix)
    values = _above_rounding(values, eps) + shift.unsqueeze(1)
    return structure.from_eigen(1 / torch.where(values > 0, values, 1.0), vectors)


def _row_sums(structure: Decomposable, matrix: Parts, Q: Parts) -> Tensor:
    """Absolute sums ``[G, D]`` of the rows of a matrix in a basis, the given one without parts."""
    dense = structure.to_dense(matrix)
    if Q:
        basis = structure.to_dense(Q)
        dense = basis.mT @ dense @ basis
    return dense.abs().sum(2)


def _least(structure: Decomposable, matrix: Parts, shift: Tensor) -> Parts:
    """A multiple of the identity that is at most ``(matrix + shift)^-1``."""
    size = _row_sums(structure, matrix, ()).amax(1) + shift
    values = (1 / torch.where(size > 0, size, 1.0)).unsqueeze(1).expand(-1, structure.dim)
    return Structure.from_eigen(structure, values, ())


def _narrowed(parts: Parts, like: Tensor) -> Parts:
    """The parts on the device and in the dtype of a tensor."""
    return tuple(saturated(part, like.dtype).to(like.device) for part in parts)


def saturated(part: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, with the largest number of that in the place of larger ones."""
    if part.dtype == dtype:
        return part
    largest = torch.finfo(dtype).max
    return part.clamp(-largest, largest).to(dtype)


def _outer(b: Tensor, a: Tensor) -> Tensor:
    """``[G, C_out / G, D]`` from ``[G, C_out / G]`` and ``[G, D]``."""
    return b.unsqueeze(2) * a.unsqueeze(1)


def _level(values: Tensor) -> Tensor:
    """Mean ``[G, 1, 1]`` of the eigenvalues of each channel group; one where it is zero."""
    mean = values.mean((1, 2), keepdim=True)
    return torch.where(mean > 0, mean, 1.0)
