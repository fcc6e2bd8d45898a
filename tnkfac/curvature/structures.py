"""Small classes of matrices, closed under multiplication, in which factors are kept.

A structured matrix is a tuple of tensors with the channel group as leading axis, its *parts*; a
:class:`Structure` is the arithmetic on parts. ``Pi`` projects a symmetric matrix onto the class
such that ``(Pi(M) + Pi(M)^T) / 2`` is ``M`` on the support (arXiv 2312.05705, section 3.2).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tnkfac.curvature.grams import Gram

Parts = tuple[Tensor, ...]
LARGEST_DENSE = 1024
"""Above this many rows ``"auto"`` keeps blocks instead of the whole matrix."""
AUTO_BLOCK = 256
"""Rows of a block of ``"auto"``."""


@dataclass(frozen=True)
class Structure(ABC):
    """A class of ``[G, dim, dim]`` matrices. ``K`` and ``M`` below are parts, ``M`` symmetric.

    Attributes:
        dim: Number of rows of one matrix.
    """

    dim: int

    @property
    @abstractmethod
    def name(self) -> str:
        """What a user writes to get this structure."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every part, without the leading ``G``."""

    @abstractmethod
    def statistic(self, gram: Gram) -> Parts:
        """``Pi`` of a Gram matrix, reading only what the structure needs of it."""

    @abstractmethod
    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Parts of ``groups`` identity matrices."""

    @abstractmethod
    def matmul(self, K: Parts, M: Parts) -> Parts:
        """``K M`` of two matrices of the class."""

    @abstractmethod
    def gram(self, K: Parts) -> Parts:
        """``Pi(K^T K)``."""

    @abstractmethod
    def pull(self, K: Parts, M: Parts) -> Parts:
        """``Pi(K^T M K)``."""

    @abstractmethod
    def trace(self, M: Parts) -> Tensor:
        """Trace divided by ``dim``: ``[G]``."""

    @abstractmethod
    def norm(self, M: Parts) -> Tensor:
        """Spectral norm ``[G]``, where it has to be estimated from a few power iterations."""

    @abstractmethod
    def apply(self, K: Parts, X: Tensor) -> Tensor:
        """``K K^T X`` for ``X`` of shape ``[G, dim, columns]``."""

    @abstractmethod
    def eigen(self, M: Parts) -> tuple[Tensor, Parts]:
        """Eigenvalues ``[G, dim]`` of a symmetric matrix, and its eigenvectors as parts."""

    @abstractmethod
    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """The symmetric matrix with these eigenvalues ``[G, dim]`` and eigenvectors."""

    @abstractmethod
    def to_dense(self, K: Parts) -> Tensor:
        """The matrix written out: ``[G, dim, dim]``."""


def _tr(matrix: Tensor) -> Tensor:
    return matrix.transpose(-1, -2)


def _eyes(groups: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    eye = torch.eye(shape[-1], dtype=dtype, device=device)
    return eye.expand(groups, *shape).contiguous()


def _spectral_norm(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Estimate from below for symmetric matrices ``[.., d, d]``; zero for empty ones."""
    if not matrix.shape[-1]:
        return matrix.new_zeros(matrix.shape[:-2])
    vector = matrix.abs().sum(-1, keepdim=True)  # large where the leading eigenvector is
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        length = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        vector = matrix @ (vector / length.clamp(min=tiny))
    norm: Tensor = torch.linalg.vector_norm(vector, dim=(-2, -1))
    return norm


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigen-decomposition of symmetric matrices in float64, cast back."""
    values, vectors = torch.linalg.eigh(((matrix + _tr(matrix)) / 2).double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


@dataclass(frozen=True)
class Dense(Structure):
    """All matrices: one part ``[G, d, d]``."""

    name = "dense"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """``d x d``."""
        return ((self.dim, self.dim),)

    def statistic(self, gram: Gram) -> Parts:
        """The whole Gram matrix."""
        return (gram.dense(),)

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Identity matrices."""
        return (_eyes(groups, self.shapes[0], dtype, device),)

    def matmul(self, K: Parts, M: Parts) -> Parts:
        """Matrix product."""
        return (K[0] @ M[0],)

    def gram(self, K: Parts) -> Parts:
        """``K^T K``."""
        return (_tr(K[0]) @ K[0],)

    def pull(self, K: Parts, M: Parts) -> Parts:
        """``K^T M K``."""
        return (_tr(K[0]) @ M[0] @ K[0],)

    def trace(self, M: Parts) -> Tensor:
        """Mean of the diagonal."""
        return M[0].diagonal(dim1=-2, dim2=-1).mean(-1)

    def norm(self, M: Parts) -> Tensor:
        """By power iterations."""
        return _spectral_norm(M[0])

    def apply(self, K: Parts, X: Tensor) -> Tensor:
        """``K (K^T X)``."""
        return K[0] @ (_tr(K[0]) @ X)

    def eigen(self, M: Parts) -> tuple[Tensor, Parts]:
        """Of the symmetric part, in float64."""
        values, vectors = _eigh(M[0])
        return values, (vectors,)

    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """``V diag(values) V^T``."""
        return ((vectors[0] * values.unsqueeze(-2)) @ _tr(vectors[0]),)

    def to_dense(self, K: Parts) -> Tensor:
        """Already dense."""
        return K[0]


@dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal matrices: one part ``[G, d]``."""

    name = "diagonal"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """``d``."""
        return ((self.dim,),)

    def statistic(self, gram: Gram) -> Parts:
        """The diagonal only; nothing is unfolded."""
        return (gram.diagonal(),)

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Ones."""
        return (torch.ones(groups, self.dim, dtype=dtype, device=device),)

    def matmul(self, K: Parts, M: Parts) -> Parts:
        """Elementwise product."""
        return (K[0] * M[0],)

    def gram(self, K: Parts) -> Parts:
        """Squares."""
        return (K[0].square(),)

    def pull(self, K: Parts, M: Parts) -> Parts:
        """``K^2 M``."""
        return (K[0].square() * M[0],)

    def trace(self, M: Parts) -> Tensor:
        """Mean."""
        return M[0].mean(-1)

    def norm(self, M: Parts) -> Tensor:
        """Largest magnitude."""
        return M[0].abs().amax(-1)

    def apply(self, K: Parts, X: Tensor) -> Tensor:
        """Rows of ``X`` scaled by ``K^2``."""
        return K[0].square().unsqueeze(-1) * X

    def eigen(self, M: Parts) -> tuple[Tensor, Parts]:
        """The diagonal; its eigenvectors are the unit vectors."""
        return M[0], ()

    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """The values."""
        return (values,)

    def to_dense(self, K: Parts) -> Tensor:
        """Diagonal matrices."""
        return torch.diag_embed(K[0])


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Blocks of ``size`` rows along the diagonal, the last one smaller.

    Two parts: ``[G, d // size, size, size]`` and ``[G, r, r]`` with ``r = d mod size``.

    Attributes:
        size: Rows of a block.
    """

    size: int = AUTO_BLOCK

    @property
    def name(self) -> str:
        """E.g. ``block30diagonal``."""
        return f"block{self.size}diagonal"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The whole blocks and the rest."""
        rest = self.dim % self.size
        return (self.dim // self.size, self.size, self.size), (rest, rest)

    def statistic(self, gram: Gram) -> Parts:
        """The diagonal blocks only."""
        return gram.blocks(self.size)

    def identity(self, groups: int, dtype: torch.dtype, device: torch.device) -> Parts:
        """Identity blocks."""
        return tuple(_eyes(groups, shape, dtype, device) for shape in self.shapes)

    def matmul(self, K: Parts, M: Parts) -> Parts:
        """Block by block."""
        return tuple(k @ m for k, m in zip(K, M, strict=True))

    def gram(self, K: Parts) -> Parts:
        """``K_i^T K_i``."""
        return tuple(_tr(k) @ k for k in K)

    def pull(self, K: Parts, M: Parts) -> Parts:
        """``K_i^T M_i K_i``."""
        return tuple(_tr(k) @ m @ k for k, m in zip(K, M, strict=True))

    def trace(self, M: Parts) -> Tensor:
        """Mean of the diagonal of all blocks."""
        whole, rest = (m.diagonal(dim1=-2, dim2=-1) for m in M)
        return (whole.sum((-1, -2)) + rest.sum(-1)) / self.dim

    def norm(self, M: Parts) -> Tensor:
        """That of the largest block."""
        whole, rest = (_spectral_norm(m) for m in M)
        return torch.cat([whole, rest.unsqueeze(1)], dim=1).amax(1)

    def apply(self, K: Parts, X: Tensor) -> Tensor:
        """``K_i K_i^T`` on the rows of block ``i``."""
        count, size, _ = self.shapes[0]
        whole = X[:, : count * size].reshape(X.shape[0], count, size, X.shape[2])
        rest = X[:, count * size :]
        done = [k @ (_tr(k) @ x) for k, x in zip(K, (whole, rest), strict=True)]
        return torch.cat([done[0].flatten(1, 2), done[1]], dim=1)

    def eigen(self, M: Parts) -> tuple[Tensor, Parts]:
        """Of every block, in the order of the blocks."""
        (values, vectors), (last, rest) = (_eigh(m) for m in M)
        return torch.cat([values.flatten(1), last], dim=1), (vectors, rest)

    def from_eigen(self, values: Tensor, vectors: Parts) -> Parts:
        """``V_i diag(values_i) V_i^T``."""
        count, size, _ = self.shapes[0]
        whole = values[:, : count * size].reshape(values.shape[0], count, size)
        split = whole, values[:, count * size :]
        return tuple((v * e.unsqueeze(-2)) @ _tr(v) for v, e in zip(vectors, split, strict=True))

    def to_dense(self, K: Parts) -> Tensor:
        """Blocks written out."""
        dense = K[0].new_zeros(K[0].shape[0], self.dim, self.dim)
        start = 0
        for block in (*K[0].unbind(1), K[1]):
            end = start + block.shape[-1]
            dense[:, start:end, start:end] = block
            start = end
        return dense


STRUCTURES = {"dense": Dense, "diagonal": Diagonal}
"""Structures by name. Block-diagonal ones are spelled ``block{k}diagonal``."""
CHOICES = ("auto", *STRUCTURES, "block{k}diagonal")


def check_structure(name: str) -> str:
    """Return the name if it is known.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is unknown.
    """
    if not isinstance(name, str):
        raise TypeError(f"structure: got {name!r}. Supported: {', '.join(CHOICES)}.")
    block = re.fullmatch(r"block(\d+)diagonal", name)
    if name == "auto" or name in STRUCTURES or (block and int(block[1]) > 0):
        return name
    raise ValueError(f"structure: got {name!r}. Supported: {', '.join(CHOICES)}.")


def resolve_structure(name: str, dim: int) -> Structure:
    """The structure of that name for matrices with ``dim`` rows.

    ``"auto"`` is dense up to 1,024 rows and block-diagonal above.

    Raises:
        TypeError: If the name is not a string.
        ValueError: If it is unknown.
    """
    if check_structure(name) == "auto":
        return Dense(dim) if dim <= LARGEST_DENSE else BlockDiagonal(dim, AUTO_BLOCK)
    if name in STRUCTURES:
        return STRUCTURES[name](dim)
    return BlockDiagonal(dim, int(name[len("block") : -len("diagonal")]))
