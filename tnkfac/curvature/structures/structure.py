"""Interface of all structures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.structures.linalg import (
    eigenvalue_bound,
    largest_eigenvalue,
    spectral_nodes,
    triangular_inverse,
)

Parts = tuple[Tensor, ...]
_ITERATIONS = 6


class Matrices(ABC):
    """Several matrices, and what an update of SINGD's factors does with them.

    Below ``K`` and ``m`` are the parts of matrices, and ``A`` is what was read of symmetric ones. A
    number for each matrix is a tensor ``[G]``.
    """

    @abstractmethod
    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Parts of ``groups`` identity matrices."""

    @abstractmethod
    def matmul(self, K: Parts, m: Parts) -> Parts:
        """``K m``."""

    @abstractmethod
    def gram(self, K: Parts) -> Parts:
        """``Pi(K^T K)``."""

    @abstractmethod
    def congruence(self, K: Parts, A: Parts) -> Parts:
        """``Pi(K^T A K)``."""

    @abstractmethod
    def trace(self, m: Parts) -> Tensor:
        """Trace divided by the dimension: ``[G]``."""

    @abstractmethod
    def statistic_trace(self, A: Parts) -> Tensor:
        """Trace of ``A`` divided by the dimension, ``[G]``."""

    @abstractmethod
    def norm(self, m: Parts) -> Tensor:
        """Spectral norm ``[G]``, perhaps estimated."""

    def largest(self, m: Parts) -> Tensor:
        """Largest magnitude of the numbers of each matrix, ``[G]``."""
        return torch.stack([part.abs().flatten(1).amax(1) for part in m if part.numel()]).amax(0)

    def scaled(self, m: Parts, by: Tensor | float) -> Parts:
        """Each matrix times its number."""
        if not isinstance(by, Tensor):
            return tuple(by * part for part in m)
        return tuple(by.reshape(-1, *[1] * (part.ndim - 1)) * part for part in m)


@dataclass(frozen=True)
class Structure(Matrices):
    """A class of ``[G, dim, dim]`` matrices.

    Below ``K`` and ``m`` are the parts of two of its matrices, and ``A`` is what :meth:`statistic`
    read of a symmetric matrix.

    Attributes:
        dim: Number of rows of one matrix.
        has_eigenbasis: Whether symmetric matrices of the class can be decomposed within it. Where
            not, :meth:`eigen` knows of them no more than their trace.
        reads_factor: Whether :meth:`statistic` depends on the current ``K``.
    """

    dim: int
    has_eigenbasis: ClassVar[bool] = False
    reads_factor: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Name by which a user asks for this structure."""

    @property
    @abstractmethod
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every part of ``K``, without the leading ``G``."""

    @property
    def statistic_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every part of a statistic; by default that of ``K``."""
        return self.part_shapes

    @cached_property
    def numel(self) -> int:
        """How many numbers a matrix is kept in."""
        return sum(prod(shape) for shape in self.part_shapes)

    @abstractmethod
    def statistic(self, moment: SecondMoment, K: Parts | None = None) -> Parts:
        """Statistic of a second moment that :meth:`congruence` needs; additive over batches.

        Args:
            moment: The second moment, not yet formed.
            K: The factor that :meth:`congruence` will be called with; None for the identity.
        """

    @abstractmethod
    def apply_kkt(self, K: Parts, X: Tensor) -> Tensor:
        """``K K^T X`` for ``X`` of shape ``[G, dim, columns]``."""

    @abstractmethod
    def to_dense(self, K: Parts) -> Tensor:
        """The matrix written out: ``[G, dim, dim]``."""

    def norm(self, m: Parts) -> Tensor:
        """Spectral norm ``[G]``, estimated from below by a few power iterations."""
        vector = torch.cos(torch.arange(self.dim, dtype=m[0].dtype, device=m[0].device))
        vector = vector.expand(m[0].shape[0], self.dim).unsqueeze(2)
        tiny = torch.finfo(vector.dtype).tiny
        for _ in range(_ITERATIONS):
            length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
            vector = self.apply_kkt(m, vector / length.clamp(min=tiny))
        norm: Tensor = torch.linalg.vector_norm(vector, dim=(1, 2)).sqrt()
        return norm

    def pieces(self, K: Parts, rows: int) -> list[tuple[slice, Structure, Parts]]:
        """Cut matrices into independent ones, whose rows are not mixed by a product.

        Args:
            K: Parts of the matrices.
            rows: About how many rows each is to have.

        Returns:
            Rows, structure and parts of each; by default there is one.
        """
        return [(slice(0, self.dim), self, K)]

    def eigen(self, A: Parts) -> tuple[Tensor, Parts]:
        """Eigenvalues ``[G, dim]`` of ``A``, and its eigenvectors as parts.

        Without an eigenbasis in the class all values are their mean.
        """
        return self.statistic_trace(A).unsqueeze(1).expand(-1, self.dim), ()

    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """The symmetric matrix with these eigenvalues ``[G, dim]`` and eigenvectors."""
        eye = self.identity(values.shape[0], values.dtype, values.device)
        scale = values.mean(1)
        return tuple(part * scale.reshape(-1, *[1] * (part.ndim - 1)) for part in eye)


@dataclass(frozen=True)
class Decomposable(Structure):
    """A structure that holds the eigenvectors and the inverse of its symmetric matrices.

    Its statistic is ``A`` itself, restricted to the support. Matrices of the class can be
    multiplied in any order; by default every part is a batch of square matrices.
    """

    has_eigenbasis: ClassVar[bool] = True

    @property
    def basis_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every part of the eigenvectors; by default that of ``K``."""
        return self.part_shapes

    # ---------------------------------------------------------------- products

    def matmul(self, K: Parts, m: Parts) -> Parts:
        """``K m``."""
        return tuple(left @ right for left, right in zip(K, m, strict=True))

    def gram(self, K: Parts) -> Parts:
        """``K^T K``."""
        return tuple(part.mT @ part for part in K)

    def square(self, K: Parts) -> Parts:
        """``K K^T``."""
        return tuple(part @ part.mT for part in K)

    def congruence(self, K: Parts, A: Parts) -> Parts:
        """``K^T A K``."""
        return tuple(part.mT @ a @ part for part, a in zip(K, A, strict=True))

    def inner(self, P: Parts, A: Parts) -> Tensor:
        """Trace of ``P A`` of symmetric matrices, divided by ``dim``: ``[G]``."""
        products = [
            torch.linalg.vecdot(p.flatten(1), a.flatten(1)) for p, a in zip(P, A, strict=True)
        ]
        return torch.stack(products).sum(0) / self.dim

    def add_identity_(self, m: Parts, by: Tensor | float) -> Parts:
        """Add to each matrix a multiple ``[G]`` of the identity, in place."""
        for part in m:
            at = part.diagonal(dim1=-2, dim2=-1)
            at += by.reshape(-1, *[1] * (at.ndim - 1)) if isinstance(by, Tensor) else by
        return m

    @abstractmethod
    def product(self, Q: Parts, X: Tensor, transpose: bool = False) -> Tensor:
        """``Q X`` or ``Q^T X`` for ``X [G, dim, columns]``; eigenvectors or a symmetric matrix."""

    def product_into(self, out: Tensor, Q: Parts, X: Tensor) -> None:
        """Write ``Q X`` into a tensor, perhaps a part of a larger one."""
        out.copy_(self.product(Q, X))

    # ---------------------------------------------------------------- spectra

    def statistic_trace(self, A: Parts) -> Tensor:
        """Trace of ``A`` divided by ``dim``."""
        return self.trace(A)

    def similar_norm(self, W: Parts, metric: Parts, enough: float) -> Tensor:
        """Largest magnitude of the eigenvalues of ``W``, self-adjoint in a metric: ``[G]``.

        Args:
            W: Parts of the matrices.
            metric: Parts of positive definite ``M`` with symmetric ``M W``.
            enough: A bound that does not exceed it will do; looking at it waits for a device. Zero
                if the norm is to be estimated from below in any case.
        """
        if enough:
            bound = torch.cat([eigenvalue_bound(w).reshape(len(w), -1) for w in W], 1).amax(1)
            if bool((bound <= enough).all()):
                return bound
        norms = [largest_eigenvalue(w, m) for w, m in zip(W, metric, strict=True)]
        return torch.cat([norm.reshape(len(norm), -1) for norm in norms], 1).amax(1)

    def spectrum(self, A: Parts) -> tuple[Tensor, Tensor]:
        """Nodes and weights ``[G, n]``: weighted sums are means over the eigenvalues of ``A``.

        Those of large matrices are estimated.
        """
        parts = [part.reshape(len(part), -1, *part.shape[-2:]) for part in A if part.numel()]
        nodes, weights = zip(*(spectral_nodes(part) for part in parts), strict=True)
        shares = [part.shape[1] * part.shape[2] / self.dim for part in parts]
        weighted = [share * weight for share, weight in zip(shares, weights, strict=True)]
        return torch.cat(nodes, 1), torch.cat(weighted, 1)

    @abstractmethod
    def eigen(self, A: Parts) -> tuple[Tensor, Parts]:
        """Eigenvalues ``[G, dim]`` of ``A``, and its eigenvectors as parts."""

    @abstractmethod
    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """The symmetric matrix with these eigenvalues ``[G, dim]`` and eigenvectors."""

    @abstractmethod
    def inverse(self, A: Parts, shift: Tensor) -> Parts:
        """``(A + shift I)^-1`` for ``shift [G]``, by Cholesky factors.

        Raises:
            torch.linalg.LinAlgError: If a shifted matrix is not positive definite.
        """

    def inverse_root(self, A: Parts) -> Parts:
        """Upper triangular ``K`` with ``K K^T = A^-1``.

        Raises:
            torch.linalg.LinAlgError: If ``A`` is not positive definite.
        """
        return tuple(triangular_inverse(torch.linalg.cholesky(part)).mT.contiguous() for part in A)
