"""Statistics of one layer on their way from backward passes to a step.

Autograd sums what the passes of a step contribute, as gradients of hidden *leaves*: module reuse,
micro-batches and several backward calls need no bookkeeping. Counts travel the same way, so that
everything is normalised once, over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from tnkfac.curvature.eigenbasis import second_moments
from tnkfac.curvature.layers import Layer, describe
from tnkfac.curvature.moments.second_moment import Approx, accumulation_dtype
from tnkfac.curvature.structures import Decomposable, Parts, Structure, resolve_structure

LossTerms = Callable[..., float]
LossAverage = str | None | LossTerms
LOSS_AVERAGES = ("batch", "batch+sequence", None)


@dataclass(frozen=True)
class Factors:
    """Normalised factors of one batch, in the structures of their layer.

    Attributes:
        A: Parts of the input factor, without the leading ``G`` as in its structure.
        B: Parts of the output-gradient factor; the identity where it is not measured.
        counts: ``[samples, rows, terms]`` of the batch.
        squares: Second moments ``[G, C_out / G, D]`` in the basis of :meth:`Statistics.project`.
    """

    A: Parts
    B: Parts
    counts: Tensor
    squares: Tensor | None = None


class Statistics:
    """What the taps of one weight measure, and the leaves that collect it.

    Attributes:
        approx: ``"expand"`` or ``"reduce"``.
        loss_average: What the loss is averaged over.
        on: Whether taps measure at all.
        live: The factors ``K`` and ``C`` in use, for structures whose statistics depend on them.
        layer: The layer, once its shape is known; its ``bias`` tells whether the bias is trained.
        k: Structure of the input side, once the shape is known.
        c: Structure of the output side, likewise.
    """

    layer: Layer
    k: Structure
    c: Structure

    def __init__(
        self,
        approx: Approx,
        structures: tuple[str, str],
        bias: bool,
        loss_average: LossAverage,
        outputs: bool = True,
        squares: bool = False,
        chosen_passes: bool = False,
    ) -> None:
        """Nothing is allocated before the first pass.

        Args:
            approx: ``"expand"`` or ``"reduce"``.
            structures: Names of the structures of input and output factor.
            bias: Whether the factors have a bias row.
            loss_average: ``"batch"``, ``"batch+sequence"``, None for a sum, or a callable.
            outputs: Whether output gradients are measured, too.
            squares: Whether per-sample gradients are squared in an eigenbasis.
            chosen_passes: Whether only backward passes inside of :meth:`listening` count.
        """
        self.outputs, self.squares, self.chosen_passes = outputs, squares, chosen_passes
        self._heard = False
        self._kept: list[Tensor] | None = None
        self._basis: tuple[Parts, Parts] | None = None
        self.approx: Approx = approx
        self.loss_average = loss_average
        self.on = True
        self.live: tuple[Parts | None, Parts | None] = (None, None)
        self._used = False
        self._structures = structures
        self._bias = bias
        self._leaves: tuple[Tensor, ...] = ()
        self.bound = False

    def bind(self, module: nn.Module) -> Layer:
        """Describe a module that measures into these statistics; its shape must be known."""
        layer = replace(describe(module), bias=self._bias)
        if not self.bound:
            self.layer = layer
            self._resolve(layer)
            self.bound = True
        return layer

    def _resolve(self, layer: Layer) -> None:
        self.k = resolve_structure(self._structures[0], layer.in_dim)
        self.c = resolve_structure(self._structures[1], layer.out_dim, output=True)

    def expect(self, structures: tuple[str, str]) -> None:
        """Take these structures once the shape is known."""
        self._structures = structures

    def restructure(self, structures: tuple[str, str], like: Tensor) -> None:
        """Take other structures from now on; what has been collected is dropped.

        Args:
            structures: Names of the structures of input and output factor.
            like: A tensor on the device and of the dtype of the layer.
        """
        self._structures = structures
        self._resolve(self.layer)
        self.clear()
        self._leaves = ()
        self._used = False
        self.live = (None, None)
        self.leaves(like)

    def leaves(self, like: Tensor) -> tuple[Tensor, ...]:
        """Hidden leaves: non-empty parts of ``A`` and ``B``, and counts ``[n, n * s, terms]``.

        Args:
            like: A tensor on the device and of the dtype of the layer.
        """
        dtype = accumulation_dtype(like.dtype)
        if (
            not self._leaves
            or self._leaves[0].device != like.device
            or (self._leaves[0].dtype != dtype)
        ):
            shapes = [shape for shape in self._shapes() if 0 not in shape]
            zero = torch.zeros((), dtype=dtype, device=like.device)
            self._leaves = tuple(zero.expand(s).requires_grad_() for s in (*shapes, (3,)))
            if not self._used:
                self.live = self._identities(zero)
        return self._leaves

    def use(self, factors: tuple[Parts, Parts] | None) -> None:
        """Measure with these factors ``K`` and ``C`` from now on, or with the identity."""
        self._used = factors is not None
        if factors is not None:
            self.live = factors
        elif self._leaves:
            self.live = self._identities(self._leaves[0])

    def _identities(self, like: Tensor) -> tuple[Parts | None, Parts | None]:
        """Where statistics depend on the factors in use."""
        args = self.layer.groups, like.dtype, like.device
        k, c = (s.identity(*args) if s.reads_factor else None for s in (self.k, self.c))
        return k, c

    def _shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all parts of ``A`` and ``B``."""
        shapes = [*self.k.statistic_shapes]
        if self.outputs:
            shapes += self.c.statistic_shapes
        if self.squares:
            shapes.append((self.c.dim, self.k.dim))
        return [(self.layer.groups, *shape) for shape in shapes]

    def measure(
        self, layer: Layer, x: Tensor, g: Tensor, terms: float | None
    ) -> tuple[Tensor, ...] | None:
        """Statistics of one call, shaped like the leaves; None for a pass that does not count.

        Args:
            layer: The layer that was called; tied layers may differ in their stride.
            x: Input as the module received it.
            g: Gradient with respect to its output.
            terms: Loss terms of this call if a callable told them.
        """
        if self.chosen_passes and not self._heard and not torch.compiler.is_compiling():
            return None
        dtype = self._leaves[0].dtype
        a, b = layer.moments(x, g, self.approx, dtype)
        rows = a.samples * a.positions
        if terms is None:
            terms = rows if self.loss_average == "batch+sequence" else a.samples
        count = _filled if torch.compiler.is_compiling() else _kept_counts
        counts = count(a.samples, rows, terms, dtype, g.device)
        K, C = self.live
        parts = list(self.k.statistic(a, K))
        if self.outputs:
            parts += self.c.statistic(b, C)
        if self.squares:
            parts.append(self._squared(layer, x, g.to(dtype)))
        return (*(part for part in parts if part.numel()), counts)

    def _squared(self, layer: Layer, x: Tensor, g: Tensor) -> Tensor:
        if self._basis is None:
            return g.new_zeros(layer.groups, self.c.dim, self.k.dim)
        assert isinstance(self.k, Decomposable)
        assert isinstance(self.c, Decomposable)
        x = x if layer.reads_indices else x.to(g.dtype)
        basis = tuple(tuple(part.to(g.dtype) for part in parts) for parts in self._basis)
        return second_moments(layer, x, g, self.k, self.c, (basis[0], basis[1]))

    def project(self, basis: tuple[Parts, Parts] | None) -> None:
        """Square gradients in this eigenbasis from now on."""
        self._basis = basis

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Backward passes inside count; what others have left behind is dropped."""
        for leaf in self._leaves:
            leaf.grad = None
        self._heard = True
        try:
            yield
        finally:
            self._heard = False
            found = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
            if found and self._kept:
                found = torch._foreach_add(found, self._kept)  # type: ignore[assignment]
            self._kept = found or self._kept
            for leaf in self._leaves:
                leaf.grad = None

    @property
    def hidden_leaves(self) -> tuple[Tensor, ...]:
        """The leaves that there are so far."""
        return self._leaves

    @property
    def pending(self) -> bool:
        """Whether any pass has contributed since the last :meth:`clear`."""
        if self.chosen_passes:
            return bool(self._kept)
        return bool(self._leaves) and self._leaves[-1].grad is not None  # every pass has counts

    def sums(self) -> list[Tensor]:
        """What has been collected: un-normalised sums and counts."""
        if self.chosen_passes:
            return self._kept or []
        return [leaf.grad for leaf in self._leaves if leaf.grad is not None]

    def factors(self, loss_scale: Tensor | float = 1.0) -> Factors:
        """Normalise what has been collected.

        Args:
            loss_scale: Number by which the loss was multiplied before it was back-propagated.
        """
        *collected, counts = self.sums()
        filled = iter(collected)
        sums = [counts.new_zeros(s) if 0 in s else next(filled) for s in self._shapes()]
        samples, rows, terms = counts.unbind()
        weight = 1 / (rows if self.approx == "expand" else samples)
        loss_terms = (1.0 if self.loss_average is None else terms) / loss_scale**2
        split = len(self.k.statistic_shapes)
        A = tuple(part * weight for part in sums[:split])
        squares = sums.pop() * loss_terms if self.squares else None
        B = tuple(part * loss_terms for part in sums[split:])
        if not self.outputs:
            B = self.c.identity(self.layer.groups, counts.dtype, counts.device)
        return Factors(A, B, counts, squares)

    def exchanged(self, share: float) -> list[tuple[Tensor, bool]]:
        """What processes add up: zeros where nothing has been collected.

        Every process has a loss of its own, averaged over its own terms, so output gradients are
        weighted with these; the sum over processes is that of a single one (see :meth:`take`).

        Args:
            share: One over the number of processes.

        Returns:
            Tensors in a fixed order, and whether each is a stack of symmetric matrices.
        """
        sums = self.sums() or [torch.zeros_like(leaf) for leaf in self._leaves]
        *parts, counts = sums
        inputs = sum(0 not in shape for shape in self.k.statistic_shapes)
        if self.loss_average is not None:
            terms = counts[2] * share
            parts = [*parts[:inputs], *(part * terms for part in parts[inputs:])]
        square = [
            isinstance(structure, Decomposable) and len(shape) > 1
            for structure in ((self.k, self.c) if self.outputs else (self.k,))
            for shape in structure.statistic_shapes
            if 0 not in shape
        ]
        square += [False] * (len(parts) - len(square))
        return [*zip(parts, square, strict=True), (counts, False)]

    def take(self, sums: Sequence[Tensor]) -> None:
        """Replace what has been collected by the sums over processes of :meth:`exchanged`."""
        *parts, counts = sums
        if self.loss_average is not None:  # what normalises multiplies with the terms of all
            inputs = sum(0 not in shape for shape in self.k.statistic_shapes)
            by = 1 / torch.where(counts[2] > 0, counts[2], 1.0)
            parts = [*parts[:inputs], *(part * by for part in parts[inputs:])]
        if self.chosen_passes:
            self._kept = [*parts, counts]
            return
        for leaf, new in zip(self._leaves, (*parts, counts), strict=True):
            leaf.grad = new

    def clear(self) -> None:
        """Drop what has been collected."""
        self._kept = None
        for leaf in self._leaves:
            leaf.grad = None


def _counts(
    samples: int, rows: int, terms: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.tensor([samples, rows, terms], dtype=dtype, device=device)


def _filled(
    samples: int, rows: int, terms: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same without a copy from the host, for which a compiled pass would wait."""
    numbers = (torch.full((), n, dtype=dtype, device=device) for n in (samples, rows, terms))
    return torch.stack([*numbers])


_kept_counts = lru_cache(maxsize=256)(_counts)
"""Counts already on the device: copying them there would wait for it."""
