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
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from tnkfac.curvature.capture.resets import Resets, handing
from tnkfac.curvature.eigenbasis import second_moments
from tnkfac.curvature.layers import Layer, describe
from tnkfac.curvature.moments.second_moment import Approx, accumulation_dtype
from tnkfac.curvature.structures import Decomposable, Parts, Structure, resolve_structure

LossTerms = Callable[..., float]
LossAverage = str | None | LossTerms
LOSS_AVERAGES = ("batch", "batch+sequence", None)
NOT_SAMPLED = "called, but neither sample_fisher() nor fisher_pass() was"


@dataclass(frozen=True)
class Factors:
    """Normalised factors of one batch, in the structures of their layer.

    Attributes:
        A: Parts of the input factor, without the leading ``G`` as in its structure.
        B: Parts of the output-gradient factor; the identity where it is not measured.
        counts: ``[samples, rows, terms]`` of the batch.
        squares: Second moments ``[G, C_out / G, D]``, see :meth:`Statistics.use_eigenbasis`.
    """

    A: Parts
    B: Parts
    counts: Tensor
    squares: Tensor | None = None


class Statistics:
    """Statistics that the taps of one weight measure, and the leaves that collect them.

    Attributes:
        approx: ``"expand"`` or ``"reduce"``.
        loss_average: What the loss is averaged over.
        enabled: Whether taps measure at all.
        hooks: Handles of the taps.
        factors_in_use: ``K`` and ``C``, for structures whose statistics depend on them.
        told_terms: What a callable ``loss_average`` said of the last call since the last step.
        last_event: Why the last call or backward pass was not measured; empty before the first.
        refused: Why nothing can be measured any more, or empty.
        layer: The layer, once its shape is known; its ``bias`` tells whether the bias is trained.
        k: Structure of the input side, once the shape is known.
        c: Structure of the output side, likewise.
        sink: Node of the graph that collects the counts of every pass.
        turns: Terms of the loss of every pass that has contributed, by its number, where a matrix
            may have no rows in some.
    """

    layer: Layer
    k: Structure
    c: Structure
    told_terms: float | None
    _kept: list[Tensor] | None
    _drawn: float
    _draws: float
    _passes: int
    _first: int
    sink: Node

    def __init__(
        self,
        approx: Approx,
        structures: tuple[str, str],
        bias: bool,
        loss_average: LossAverage,
        outputs: bool = True,
        squares: bool = False,
        explicit_passes: bool = False,
        params: Sequence[Tensor] = (),
    ) -> None:
        """Nothing is allocated before the first pass.

        Args:
            approx: ``"expand"`` or ``"reduce"``.
            structures: Names of the structures of input and output factor.
            bias: Whether the factors have a bias row.
            loss_average: ``"batch"``, ``"batch+sequence"``, None for a sum, or a callable.
            outputs: Whether output gradients are measured, too.
            squares: Whether per-sample gradients are squared in an eigenbasis.
            explicit_passes: Whether only backward passes inside of :meth:`listening` count.
            params: The weight, and the bias that is trained with it.
        """
        self.outputs, self.squares, self.explicit_passes = outputs, squares, explicit_passes
        self._recording = False
        self._counting = False
        self._forget()
        self._basis: tuple[Parts, Parts] | None = None
        self.approx: Approx = approx
        self.loss_average = loss_average
        self.enabled = True
        self.last_event = ""
        self.refused = ""
        self._spoiled = False
        self.turns: dict[int, float] = {}
        self.factors_in_use: tuple[Parts | None, Parts | None] = (None, None)
        self._used = False
        self._structures = structures
        self._bias = bias
        self.hooks: list[RemovableHandle] = []
        self._leaves: tuple[Tensor, ...] = ()
        self._graph_leaves: tuple[Tensor, ...] = ()
        self._resets = Resets(params)
        self._doubtful: Tensor | None = None
        self.bound = False

    def bind(self, module: nn.Module) -> Layer:
        """Describe a module that measures into these statistics; its shape must be known."""
        layer = replace(describe(module), bias=self._bias)
        if not self.bound:
            self.bind_to(layer)
        return layer

    def bind_to(self, layer: Layer) -> None:
        """Measure a layer of this shape from now on."""
        self.layer = layer
        self._resolve(layer)
        self.bound = True

    def _resolve(self, layer: Layer) -> None:
        k, c = self._structures
        if not (layer.in_dim and layer.out_dim):
            k = c = "dense"  # a matrix without entries has no structure
        self.k = resolve_structure(k, layer.in_dim)
        self.c = resolve_structure(c, layer.out_dim, output=True)

    def set_structures(self, structures: tuple[str, str]) -> None:
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
        self.factors_in_use = (None, None)
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
            with torch.inference_mode(False):
                zero = torch.zeros((), dtype=dtype, device=like.device)
                self._leaves = tuple(zero.expand(s).requires_grad_() for s in (*shapes, (3,)))
                self._graph_leaves = handing(self, self._leaves)
                self.sink = get_gradient_edge(self._leaves[-1]).node
            if not self._used:
                self.factors_in_use = self._identities(zero)
        return self._leaves

    def graph_leaves(self, like: Tensor) -> tuple[Tensor, ...]:
        """Stand-ins for the leaves in a compiled graph."""
        self.leaves(like)
        return self._graph_leaves

    def use_factors(self, factors: tuple[Parts, Parts] | None) -> None:
        """Measure with these factors ``K`` and ``C`` from now on, or with the identity."""
        self._used = factors is not None
        if factors is not None:
            self.factors_in_use = factors
        elif self._leaves:
            self.factors_in_use = self._identities(self._leaves[0])

    def _identities(self, like: Tensor) -> tuple[Parts | None, Parts | None]:
        """Identity matrices where statistics depend on the factors in use."""
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
        self,
        layer: Layer,
        x: Tensor,
        g: Tensor,
        terms: float | None,
        draws: list[int] | None = None,
    ) -> tuple[Tensor, ...] | None:
        """Statistics of one call, shaped like the leaves; None for a pass that does not count.

        Args:
            layer: The layer that was called; tied layers may differ in their stride.
            x: Input as the module received it.
            g: Gradient with respect to its output.
            terms: Loss terms of this call if a callable told them.
            draws: Number of passes through this call that have counted; None for all to count.
        """
        if draws is not None:
            if not self._recording:
                self.last_event = NOT_SAMPLED
                return None
            if self._counting:
                self._count(draws, x.numel())
        dtype = self._leaves[0].dtype
        a, b = layer.moments(x, g, self.approx, dtype)
        rows = a.samples * a.positions
        if terms is None:
            terms = rows if self.loss_average == "batch+sequence" else a.samples
        count = _filled if torch.compiler.is_compiling() else _kept_counts
        counts = count(a.samples, rows, terms, dtype, g.device)
        K, C = self.factors_in_use
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

    def use_eigenbasis(self, basis: tuple[Parts, Parts] | None) -> None:
        """Square gradients in this eigenbasis from now on."""
        self._basis = basis

    @contextmanager
    def listening(self, draws: int | None = None, terms: float | None = None) -> Iterator[None]:
        """Backward passes inside count; what others have left behind is dropped.

        Args:
            draws: Passes through the same outputs of the model, whose mean counts; None to count
                those through the same call of the layer, here and before.
            terms: Loss terms that these passes are the sum of; None for a loss that is averaged,
                or not, like that of training.
        """
        self.drop_stale()
        for leaf in self._leaves:
            leaf.grad = None
        self._recording, self._counting = True, draws is None
        try:
            yield
        finally:
            self._recording = False
            self._resets.mark()
            sums = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
            if sums:
                self._keep(sums, draws, terms)
            for leaf in self._leaves:
                leaf.grad = None

    def _keep(self, sums: list[Tensor], draws: int | None, terms: float | None) -> None:
        """Add sums over some passes to what is kept: that of one pass through the whole batch."""
        old, new = 1.0, 1 / (draws or 1)
        if draws is None and self._first:
            mean = self._passes / self._first
            old, new, self._draws = self._draws / mean, 1 / mean, mean
        old_B, new_B = old, new
        if terms is not None:  # gradients of the mean over all terms so far
            before, self._drawn = self._drawn, self._drawn + terms
            old_B *= (before / self._drawn) ** 2 if before else 1.0
            new_B /= self._drawn**2
        outputs = len(sums) - self._inputs - 1

        def scaled(tensors: list[Tensor], on_A: float, on_B: float) -> list[Tensor]:
            scales = [on_A] * self._inputs + [on_B] * outputs + [on_A]  # counts are the last
            return [*torch._foreach_mul(tensors, scales)]

        total = scaled(sums, new, new_B)
        if self._kept:
            torch._foreach_add_(total, scaled(self._kept, old, old_B))
        self._kept = total

    def _count(self, draws: list[int], size: int) -> None:
        """One more pass through a call of this size."""
        self._passes += size
        self._first += 0 if draws[0] else size
        draws[0] += 1

    @property
    def _inputs(self) -> int:
        """How many of the sums belong to the input factor; they are the first."""
        return sum(0 not in shape for shape in self.k.statistic_shapes)

    def add(self, measured: Sequence[Tensor | None]) -> None:
        """Collect what a pass has measured that does not reach the leaves."""
        for leaf, part in zip(self._leaves, measured, strict=True):
            if part is not None:
                leaf.grad = part if leaf.grad is None else leaf.grad + part

    def add_terms(self, terms: float) -> None:
        """Count terms of the loss of passes that had no rows here: gradients are of their mean."""
        leaf = self._leaves[-1]
        assert leaf.grad is not None
        leaf.grad = leaf.grad + _kept_counts(0, 0, terms, leaf.dtype, leaf.device)

    def spoil(self, why: str) -> None:
        """Count nothing until :meth:`clear`, since a part of what was to be measured is lost."""
        self._spoiled, self.last_event = True, why

    def refuse(self, why: str) -> None:
        """Say that nothing can be measured any more; the step takes this up."""
        self.refused = why

    def begins(self) -> None:
        """A backward pass is about to add to what was collected."""
        if self.explicit_passes:
            if not self._recording:
                self._resets.mark_after_pass()
            return
        if self.pending:
            self.drop_stale()
        self._resets.mark_pass()

    def arrives(self) -> None:
        """A compiled backward pass has ended, and is about to add to what was collected."""
        if not self.explicit_passes and self.pending and self._resets.changed_before_pass:
            self.clear()  # whether anything was left of the gradients cannot be known any more
        self._resets.mark_after_pass()

    def drop_stale(self) -> None:
        """Drop what was collected if the gradients of the same passes were reset since."""
        if not self.pending:
            return
        resets = self._resets
        if not resets.changed:
            self._drop_unnoticed()
            return
        if resets.gone or (resets.on_host and resets.all_zero()):
            self.clear()
        elif not resets.on_host:
            self._drop_on_device()
        resets.mark()

    def _drop_unnoticed(self) -> None:
        """Drop what is stale by changes without a version, as by way of ``.data`` or NumPy."""
        resets = self._resets
        if self.explicit_passes or not resets.on_host or not resets.between_passes:
            return
        if self._is_contradicted():
            self.clear()

    def _drop_on_device(self) -> None:
        """Drop what is stale where gradients cannot be read without waiting."""
        if self.explicit_passes:
            self.clear()
            return
        stale = self._resets.all_zero_flag()
        for leaf in self._leaves:
            if leaf.grad is not None:
                leaf.grad = leaf.grad.masked_fill(stale, 0)
        self._doubtful = self._leaves[-1].grad

    def settle(self) -> bool:
        """Whether a step can take what was collected; what is stale is dropped.

        Gradients may be zero here because they were clipped, and were so before: that they were
        reset is certain only if inputs and output gradients were not zero.
        """
        if not self.pending:
            return False
        resets = self._resets
        stale = resets.changed and (resets.gone or (resets.on_host and self._is_contradicted()))
        if stale or self._is_unsure():
            self.clear()
            return False
        return True

    def _is_unsure(self) -> bool:
        """Whether nothing came since what there is may have been dropped on a device."""
        doubtful = self._doubtful
        return doubtful is not None and self.sums()[-1] is doubtful and doubtful._version == 0

    def _is_contradicted(self) -> bool:
        """Whether gradients are all zero that should not be."""
        if not self.outputs or not self._resets.all_zero():
            return False
        inputs = sum(0 not in shape for shape in self.k.statistic_shapes)
        *parts, _ = self.sums()
        return any(p.any() for p in parts[:inputs]) and any(p.any() for p in parts[inputs:])

    @property
    def hooked(self) -> bool:
        """Whether a tap is still on its module, where others may have removed it."""
        return any(hook.id in (hook.hooks_dict_ref() or ()) for hook in self.hooks)

    @property
    def hidden_leaves(self) -> tuple[Tensor, ...]:
        """The leaves that there are so far."""
        return self._leaves

    @property
    def pending(self) -> bool:
        """Whether any pass has contributed since the last :meth:`clear`."""
        if self._spoiled:
            return False
        if self.explicit_passes:
            return bool(self._kept)
        return bool(self._leaves) and self._leaves[-1].grad is not None  # every pass has counts

    def sums(self) -> list[Tensor]:
        """Un-normalised sums and counts that were collected."""
        if self._spoiled:
            return []
        if self.explicit_passes:
            return self._kept or []
        return [leaf.grad for leaf in self._leaves if leaf.grad is not None]

    def normalizers(
        self, counts: Tensor, loss_scale: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Scales by which sums become those of the input factor, and of the output factor.

        Args:
            counts: Samples, rows and terms, ``[.., 3]``.
            loss_scale: Number by which the loss was multiplied before it was back-propagated.
        """
        samples, rows, terms = counts.unbind(-1)
        loss_terms = torch.ones_like(terms) if self.loss_average is None else terms
        return 1 / (rows if self.approx == "expand" else samples), loss_terms / loss_scale**2

    def factors(self, loss_scale: Tensor | float = 1.0) -> Factors:
        """Normalise what has been collected.

        Args:
            loss_scale: Number by which the loss was multiplied before it was back-propagated.
        """
        *collected, counts = self.sums()
        filled = iter(collected)
        sums = [counts.new_zeros(s) if 0 in s else next(filled) for s in self._shapes()]
        weight, loss_terms = self.normalizers(counts, loss_scale)
        split = len(self.k.statistic_shapes)
        A = tuple(part * weight for part in sums[:split])
        squares = sums.pop() * loss_terms if self.squares else None
        B = tuple(part * loss_terms for part in sums[split:])
        if not self.outputs:
            B = self.c.identity(self.layer.groups, counts.dtype, counts.device)
        return Factors(A, B, counts, squares)

    def to_reduce(self, share: float) -> list[tuple[Tensor, bool]]:
        """Tensors that processes add up: zeros where nothing has been collected.

        Every process has a loss of its own, averaged over its own terms, so output gradients are
        weighted with these; :meth:`set_reduced` takes the sum over processes.

        Args:
            share: One over the number of processes.

        Returns:
            Tensors in a fixed order, and whether each is a stack of symmetric matrices.
        """
        sums = self.sums() or [torch.zeros_like(leaf) for leaf in self._leaves]
        *parts, counts = sums
        inputs = self._inputs
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

    def set_reduced(self, sums: Sequence[Tensor]) -> None:
        """Replace what has been collected by the sums over processes of :meth:`to_reduce`."""
        *parts, counts = sums
        self._spoiled = False  # others may have measured what was lost here
        if self.loss_average is not None:  # what normalises multiplies with the terms of all
            inputs = self._inputs
            by = 1 / torch.where(counts[2] > 0, counts[2], 1.0)
            parts = [*parts[:inputs], *(part * by for part in parts[inputs:])]
        if self.explicit_passes:
            self._kept = [*parts, counts]
            return
        for leaf, new in zip(self._leaves, (*parts, counts), strict=True):
            leaf.grad = new

    def clear(self) -> None:
        """Drop what has been collected."""
        if self.explicit_passes:
            self._forget()
        self._spoiled = False
        self.turns.clear()
        self._doubtful = None
        for leaf in self._leaves:
            leaf.grad = None

    def _forget(self) -> None:
        """Begin anew with passes that are chosen."""
        self._kept = None
        self._drawn = 0.0  # terms of the loss
        self._draws = 1.0  # passes through each call, in the mean
        self._passes = self._first = 0  # sizes of the calls, of every pass and of their first ones
        self.told_terms = None


def _counts(
    samples: int, rows: int, terms: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.tensor([samples, rows, terms], dtype=dtype, device=device)


def _filled(
    samples: int, rows: int, terms: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Counts without a copy from the host, for which a compiled pass would wait."""
    numbers = (torch.full((), n, dtype=dtype, device=device) for n in (samples, rows, terms))
    return torch.stack([*numbers])


_kept_counts = lru_cache(maxsize=256)(_counts)
"""Counts already on the device: copying them there would wait for it."""
