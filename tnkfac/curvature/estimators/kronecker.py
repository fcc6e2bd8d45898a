"""Curvature of one layer as a Kronecker product, and its damped inverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnkfac.curvature.layers import Layer

DAMPING_TYPES = ("tikhonov", "pi", "factor")
Vectors = Tensor | Mapping[str, Tensor] | Sequence[Tensor | None]


@dataclass(frozen=True)
class Operator(ABC):
    """A symmetric matrix over the parameters of a layer, a block for every channel group.

    The parameters are ordered as in ``[W | b]``, ``[G, C_out / G, D]``, row by row and with the
    bias last in every row.

    Attributes:
        layer: Whose parameters these are; its ``bias`` tells whether the bias belongs to them.
    """

    layer: Layer

    @abstractmethod
    def apply(self, matrix: Tensor) -> Tensor:
        """Product with joint matrices ``[G, C_out / G, D]``."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix, ``[P, P]`` with ``P = C_out * D``; zero between channel groups."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """All ``P`` eigenvalues, ascending."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Sum of the eigenvalues."""

    def logdet(self) -> Tensor:
        """Sum of the logarithms of the eigenvalues; ``-inf`` for a singular matrix."""
        return self.eigenvalues().clamp(min=0).log().sum()

    def matvec(self, vectors: Vectors) -> Any:
        """Product with one vector, given in the shapes of the parameters.

        Args:
            vectors: Weight ``[C_out, C_in / G, K1, ..]`` (or as the module has it) and bias
                ``[C_out]``: a dictionary with the keys ``"weight"`` and ``"bias"``, or keys that
                end in ``".weight"`` and ``".bias"``; a sequence ``(weight, bias)``, where the bias
                is None or left out for a layer without; or a weight alone.

        Returns:
            The product in the same form.

        Raises:
            ValueError: If a parameter is missing, superfluous, or of another shape.
        """
        if isinstance(vectors, Tensor):
            return self._product(vectors, None)[0]
        if isinstance(vectors, Mapping):
            keys = {key.rpartition(".")[2]: key for key in vectors}
            if keys.keys() - {"weight", "bias"} or len(keys) != len(vectors):
                raise ValueError(f"vectors: got {list(vectors)}. Supported: 'weight', 'bias'.")
            given = {name: vectors[key] for name, key in keys.items()}
            weight, bias = self._product(given.get("weight"), given.get("bias"))
            parts = {"weight": weight, "bias": bias}
            return {key: parts[name] for name, key in keys.items()}
        if not 1 <= len(vectors) <= 2:
            raise ValueError(f"vectors: got {len(vectors)} tensors. Supported: (weight, bias).")
        return self._product(vectors[0], vectors[1] if len(vectors) == 2 else None)[: len(vectors)]

    def _product(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shapes = {"weight": self.layer.weight_shape}
        if self.layer.bias:
            shapes["bias"] = (self.layer.out_channels,)
        given = {"weight": weight, "bias": bias}
        shown = {name: tuple(v.shape) for name, v in given.items() if v is not None}
        if weight is None or shown != shapes:
            raise ValueError(f"vectors: got {shown}. Supported: {shapes}.")
        product = self.apply(self.layer.to_matrix(weight, bias))
        return self.layer.from_matrix(product, self.layer.weight_shape)


@dataclass(frozen=True)
class Kronecker(Operator):
    """``B (x) A`` for every channel group of a layer.

    Attributes:
        A: Input factors ``[G, D, D]``; ``D`` counts ``C_in / G * K`` features, and the bias last.
            Of an embedding under KFAC-expand their diagonals ``[G, D]``: the rest is zero.
        B: Output-gradient factors ``[G, C_out / G, C_out / G]``.

    Example:
        >>> import torch, tnkfac
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> data = [(torch.rand(8, 3), torch.tensor([0, 1] * 4))]
        >>> found = tnkfac.curvature.kfac(model, torch.nn.CrossEntropyLoss(), data)
        >>> found["0"].inverse(1e-3).matvec({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
        {'weight': tensor(...), 'bias': tensor(...)}
    """

    A: Tensor
    B: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """``B M A``, in the dtype of ``M``."""
        return _times(self.B @ matrix.to(self.B.dtype), self.A).to(matrix.dtype)

    def to_dense(self) -> Tensor:
        """The matrix ``[P, P]``."""
        pairs = zip(self.B, _written_out(self.A), strict=True)
        return _block_diagonal([_kron(b, a) for b, a in pairs])

    def eigenvalues(self) -> Tensor:
        """Products of the factors' eigenvalues, ascending, never negative."""
        a, b = (_eigenvalues(factor) for factor in (self.A, self.B))
        return (b.unsqueeze(2) * a.unsqueeze(1)).flatten().sort()[0].to(self.A.dtype)

    def trace(self) -> Tensor:
        """Sum of the products of traces."""
        a = (self.A if self.A.ndim == 2 else self.A.diagonal(dim1=1, dim2=2)).sum(1)
        return (a * self.B.diagonal(dim1=1, dim2=2).sum(1)).sum()

    def inverse(self, damping: float, damping_type: str = "tikhonov") -> Operator:
        """The inverse after damping, decomposed in float64.

        Args:
            damping: Non-negative ``d``; zero needs regular factors.
            damping_type: ``"tikhonov"``, the exact inverse of ``B (x) A + d I``; ``"pi"``, of
                ``(B + sqrt(d) / pi I) (x) (A + pi sqrt(d) I)`` with ``pi^2`` the ratio of the mean
                eigenvalues of ``A`` and ``B`` (arXiv 1503.05671, eq. 30); ``"factor"``, of
                ``(B + d I) (x) (A + d I)``.

        Raises:
            ValueError: For a negative damping, an unknown type, or singular factors undamped.
        """
        if not damping >= 0:
            raise ValueError(f"damping: got {damping!r}. Supported: non-negative numbers.")
        if damping_type not in DAMPING_TYPES:
            listed = ", ".join(DAMPING_TYPES)
            raise ValueError(f"damping_type: got {damping_type!r}. Supported: {listed}.")
        (a, vectors_a), (b, vectors_b) = _eigen(self.A), _eigen(self.B)
        spectrum = b.unsqueeze(2) * a.unsqueeze(1)
        if damping_type == "tikhonov":
            damped = spectrum + damping
        else:
            left, right = _split(a, b, damping, damping_type)
            damped = (b + right).unsqueeze(2) * (a + left).unsqueeze(1)
        dtype = self.A.dtype
        if damping == 0 and (_singular(a, dtype) or _singular(b, dtype)):
            raise ValueError(f"damping: got {damping!r}, but the factors are singular.")
        Q_A = None if vectors_a is None else vectors_a.to(dtype)
        assert vectors_b is not None
        return Eigenbasis(self.layer, Q_A, vectors_b.to(dtype), (1 / damped).to(dtype))


@dataclass(frozen=True)
class Eigenbasis(Operator):
    """``(Q_B (x) Q_A) diag(values) (Q_B (x) Q_A)^T`` for every channel group of a layer.

    Attributes:
        Q_A: Eigenvectors ``[G, D, D]``, in columns; None for the unit vectors.
        Q_B: Eigenvectors ``[G, C_out / G, C_out / G]``, in columns.
        values: Eigenvalues ``[G, C_out / G, D]``.
    """

    Q_A: Tensor | None
    Q_B: Tensor
    values: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """``Q_B ((Q_B^T M Q_A) * values) Q_A^T``, in the dtype of ``M``."""
        inner = self.Q_B.mT @ matrix.to(self.Q_B.dtype)
        if self.Q_A is None:
            return (self.Q_B @ (inner * self.values)).to(matrix.dtype)
        inner = inner @ self.Q_A
        return (self.Q_B @ (inner * self.values) @ self.Q_A.mT).to(matrix.dtype)

    def to_dense(self) -> Tensor:
        """The matrix ``[P, P]``."""
        blocks = []
        ones = torch.ones_like(self.values[:, 0])
        Q_A = torch.diag_embed(ones) if self.Q_A is None else self.Q_A
        for a, b, values in zip(Q_A, self.Q_B, self.values, strict=True):
            basis = _kron(b, a)
            blocks.append(basis * values.flatten() @ basis.T)
        return _block_diagonal(blocks)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues, ascending."""
        return self.values.flatten().sort()[0]

    def trace(self) -> Tensor:
        """Sum of the eigenvalues."""
        return self.values.sum()


def _kron(b: Tensor, a: Tensor) -> Tensor:
    return torch.kron(b.contiguous(), a.contiguous())


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def _written_out(factor: Tensor) -> Tensor:
    return torch.diag_embed(factor) if factor.ndim == 2 else factor


def _times(matrix: Tensor, factor: Tensor) -> Tensor:
    """Product with a factor ``[G, D, D]`` or a diagonal one ``[G, D]`` from the right."""
    return matrix * factor.unsqueeze(1) if factor.ndim == 2 else matrix @ factor


def _eigen(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues, with rounding errors below zero set to it, and eigenvectors; in float64."""
    if factor.ndim == 2:
        return factor.double(), None
    values, vectors = torch.linalg.eigh(factor.double())
    return _without_noise(values), vectors


def _eigenvalues(factor: Tensor) -> Tensor:
    if factor.ndim == 2:
        return factor.double()
    return _without_noise(torch.linalg.eigvalsh(factor.double()))


def _without_noise(values: Tensor) -> Tensor:
    """Zero where an eigenvalue of a singular matrix differs from it by rounding only."""
    noise = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:].abs()
    return torch.where(values > noise, values, 0.0)


def _singular(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether eigenvalues of a matrix known in some precision may be zero."""
    least = values.shape[1] * torch.finfo(dtype).eps * values.amax(1)
    return bool((values.amin(1) <= least).any())


def _split(a: Tensor, b: Tensor, damping: float, damping_type: str) -> tuple[Tensor, Tensor]:
    """Damping of the eigenvalues ``[G, D]`` and ``[G, C_out / G]``, ``[G, 1]`` each."""
    if damping_type == "factor":
        both = torch.full_like(a[:, :1], damping)
        return both, both
    mean_a, mean_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    usable = (mean_a > 0) & (mean_b > 0)
    pi = torch.where(usable, mean_a / torch.where(usable, mean_b, 1.0), 1.0).sqrt()
    return pi * damping**0.5, damping**0.5 / pi
