"""Symbolic tensor networks: products of operands, summed over legs.

A :class:`Network` holds no tensor and needs no torch. It is a value: two networks that mean the
same contraction in the same order are equal and hash alike, so plans can be cached by network.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from tnkfac.einsum.legs import fresh_names
from tnkfac.einsum.operands import Delta, Ones, Operand, Source, Variable, grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Network:
    """A scaled contraction of operands; all legs that the output lacks are summed.

    Attributes:
        operands: The factors of the product.
        output: Legs of the result, and the view whose adjoint shapes it.
        scale: Number that multiplies the result.

    Raises:
        ValueError: If one leg has two sizes, or an output leg is on no operand.

    Example:
        >>> x = Variable("x")
        >>> network = parse("n i, n j -> i j", (x, x), {"n": 5, "i": 2, "j": 2})
        >>> network.equation, network.shape
        ('n i, n j -> i j', (2, 2))
    """

    operands: tuple[Operand, ...]
    output: Operand
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check that legs and sizes fit together."""
        missing = set(self.output.legs) - {leg for op in self.operands for leg in op.legs}
        if missing:
            raise ValueError(f"Output legs {sorted(missing)} are on no operand.")
        _ = self.sizes

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of every leg."""
        sizes: dict[str, int] = {}
        for operand in (*self.operands, self.output):
            if len(operand.legs) != len(operand.sizes):
                raise ValueError(f"{operand.legs} do not fit a tensor of shape {operand.sizes}.")
            for leg, size in zip(operand.legs, operand.sizes, strict=True):
                if sizes.setdefault(leg, size) != size:
                    raise ValueError(f"Leg {leg!r} has sizes {sizes[leg]} and {size}.")
        return sizes

    @cached_property
    def _hash(self) -> int:
        return hash((self.operands, self.output, self.scale))

    def __hash__(self) -> int:
        """Hash once: networks are keys of the plan cache."""
        return self._hash

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.output.shape

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors to supply, each once, in order of appearance."""
        sources = (op.source for op in self.operands)
        return tuple(dict.fromkeys(s.name for s in sources if isinstance(s, Variable)))

    @property
    def equation(self) -> str:
        """The contraction in einops style, e.g. ``n (g ci) i1, k1 o1 i1 -> n (g ci k1) o1``."""
        return f"{', '.join(map(str, self.operands))} -> {self.output}"

    def draw(self, path: str | None = None, title: str | None = None) -> Figure:
        """Draw the diagram: tensors as nodes, legs as labelled lines, open legs dangling.

        Needs matplotlib, which ``pip install tnkfac[examples]`` brings.

        Args:
            path: Where to write it, ``.svg`` or ``.png``; None only returns the figure.
            title: Above the diagram.

        Returns:
            The ``matplotlib`` figure.

        Raises:
            ImportError: If matplotlib is missing.
        """
        from tnkfac.einsum.drawing.draw import draw_network

        return draw_network(self, path, title)

    def scaled(self, factor: float) -> Network:
        """The network times a number."""
        return replace(self, scale=self.scale * factor)

    def arranged(self, *groups: Sequence[str]) -> Network:
        """This product with one axis per group of legs; output legs left out are summed.

        Raises:
            ValueError: If a leg is not an output leg of this network.
        """
        self._check_open("arranged", (leg for group in groups for leg in group))
        return Network(self.operands, grouped(Variable("output"), groups, self.sizes), self.scale)

    def doubled(self, shared: Collection[str]) -> Network:
        """Two copies of the product that have only the ``shared`` output legs in common.

        The output has one axis per leg: those of the first copy, then the unshared ones of the
        second, primed.

        Raises:
            ValueError: If a shared leg is not an output leg of this network.
        """
        self._check_open("gram", shared)
        prime = {leg: f"{leg}'" for leg in self.sizes if leg not in shared}
        copies = (*self.operands, *(op.renamed(prime) for op in self.operands))
        sizes = self.sizes | {prime[leg]: self.sizes[leg] for leg in prime}
        second = [prime[leg] for leg in self.output.legs if leg in prime]
        legs = [(leg,) for leg in (*self.output.legs, *second)]
        return Network(copies, grouped(Variable("output"), legs, sizes), self.scale**2)

    def gram(
        self,
        shared: Collection[str],
        rows: Sequence[Sequence[str]] = (),
        keep: Sequence[Sequence[str]] = (),
    ) -> Network:
        """Contract the network with a second copy of itself.

        Every statistic of a layer is such a product, and differs only in what the copies share.

        Args:
            shared: Output legs that both copies have in common. They are summed unless kept.
            rows: Groups of unshared legs that form one axis each, once per copy.
            keep: Groups of shared legs that form the leading axes.

        Returns:
            The network with axes ``keep``, then ``rows``, then ``rows`` of the second copy.

        Raises:
            ValueError: If a named leg is not an output leg of this network.
        """
        twice = {leg for group in rows for leg in group}
        self._check_open("gram", twice)
        if twice & {*shared}:
            raise ValueError(f"gram: rows {list(rows)} have legs of shared {sorted(shared)}.")
        second = ([f"{leg}'" for leg in group] for group in rows)
        return self.doubled(shared).arranged(*keep, *rows, *second)

    def with_names(self, names: Mapping[str, str]) -> Network:
        """This product of tensors under other names."""

        def named(op: Operand) -> Operand:
            if not isinstance(op.source, Variable):
                return op
            return replace(op, source=Variable(names.get(op.source.name, op.source.name)))

        return replace(self, operands=tuple(named(op) for op in self.operands))

    def vmap(self, name: str, size: int, leg: str = "v") -> Network:
        """Add a leading axis to one tensor, and to the result.

        Args:
            name: Tensor that gets the axis; it must occur once.
            size: Size of the axis.
            leg: Name of the new leg.

        Raises:
            ValueError: If the tensor does not occur exactly once, or the leg exists.
        """
        index = self._only(name, "vmap")
        if leg in self.sizes:
            raise ValueError(f"vmap: leg {leg!r} exists already. Legs: {', '.join(self.sizes)}.")

        def batched(op: Operand) -> Operand:
            view = tuple(replace(step, axis=step.axis + 1) for step in op.view)
            return Operand(op.source, (size, *op.shape), (leg, *op.legs), view)

        operands = list(self.operands)
        operands[index] = batched(operands[index])
        return Network(tuple(operands), batched(self.output), self.scale)

    def vjp(self, name: str, cotangent: str = "v") -> Network:
        """Vector-Jacobian product: tensor and result change places.

        Args:
            name: Tensor to differentiate with respect to; it must occur once.
            cotangent: Name of the tensor in place of the result.

        Raises:
            ValueError: If the tensor does not occur exactly once, or the cotangent's name is
                that of another tensor.
        """
        index = self._only(name, "vjp")
        self._check_new("vjp", cotangent, name)
        seed = replace(self.output, source=Variable(cotangent))
        output = replace(self.operands[index], source=Variable("output"))
        operands = (*self.operands[:index], seed, *self.operands[index + 1 :])
        return Network(_covered(operands, output), output, self.scale)

    def jvp(self, name: str, tangent: str) -> Network:
        """Jacobian-vector product: the tangent takes the place of the tensor.

        Raises:
            ValueError: If the tensor does not occur exactly once, or the tangent's name is that
                of another tensor.
        """
        self._only(name, "jvp")
        self._check_new("jvp", tangent, name)
        return self.with_names({name: tangent})

    def jacobian(self, name: str) -> Network:
        """Delete a tensor; its axes become trailing axes of the result.

        A leg that the result has already is doubled, and a Kronecker delta ties both.

        Raises:
            ValueError: If the tensor does not occur exactly once.
        """
        index = self._only(name, "jacobian")
        gone = self.operands[index]
        doubled = [leg for leg in gone.legs if leg in self.output.legs]
        fresh = fresh_names(doubled, "'", self.sizes)
        remaining = self.operands[:index] + self.operands[index + 1 :]
        ties = tuple(
            Operand(Delta(self.sizes[leg]), (self.sizes[leg],) * 2, (leg, new))
            for leg, new in fresh.items()
        )
        shift = len(self.output.legs)
        view = tuple(replace(step, axis=step.axis + shift) for step in gone.view)
        output = Operand(
            Variable("output"),
            (*self.output.shape, *gone.shape),
            (*self.output.legs, *gone.renamed(fresh).legs),
            (*self.output.view, *view),
        )
        return Network(_covered((*remaining, *ties), output), output, self.scale)

    def compose(self, name: str, inner: Network) -> Network:
        """Put the result of another network in place of a tensor.

        Args:
            name: The tensor; it must occur once.
            inner: A network whose result has its shape and splits into the same legs.

        Raises:
            ValueError: If the tensor does not occur exactly once or the results do not match.
        """
        index = self._only(name, "compose")
        outer = self.operands[index]
        if (outer.shape, outer.view) != (inner.output.shape, inner.output.view):
            raise ValueError(
                f"compose: the result {inner.output} of shape {inner.shape} does not fit "
                f"{name!r}, which is {outer} of shape {outer.shape}."
            )
        names = fresh_names(inner.sizes, "°", self.sizes | inner.sizes)
        names |= dict(zip(inner.output.legs, outer.legs, strict=True))
        operands = tuple(op.renamed(names) for op in inner.operands)
        joined = (*self.operands[:index], *operands, *self.operands[index + 1 :])
        return Network(joined, self.output, self.scale * inner.scale)

    def _check_open(self, method: str, legs: Iterable[str]) -> None:
        unknown = {*legs} - {*self.output.legs}
        if unknown:
            raise ValueError(
                f"{method}: legs {sorted(unknown)} are not among the output legs "
                f"{self.output.legs}."
            )

    def _check_new(self, method: str, new: str, old: str) -> None:
        if new != old and new in self.names:
            raise ValueError(f"{method}: the name {new!r} is taken. Tensors: {self.names}.")

    def _only(self, name: str, method: str) -> int:
        indices = [i for i, op in enumerate(self.operands) if op.source == Variable(name)]
        if len(indices) != 1:
            raise ValueError(
                f"{method}: {name!r} occurs {len(indices)} times, not once. "
                f"Tensors: {', '.join(self.names)}."
            )
        return indices[0]


def _covered(operands: tuple[Operand, ...], output: Operand) -> tuple[Operand, ...]:
    """Operands with ones on the output legs that none of them has."""
    present = {leg for op in operands for leg in op.legs}
    ones = tuple(
        Operand(Ones(size), (size,), (leg,))
        for leg, size in zip(output.legs, output.sizes, strict=True)
        if leg not in present
    )
    return (*operands, *ones)


def parse(
    equation: str, sources: Sequence[Source], sizes: Mapping[str, int], scale: float = 1.0
) -> Network:
    """Build a network from an einops-style equation.

    Args:
        equation: Operands separated by commas, legs by spaces, grouped axes in parentheses, and
            the output after ``->``.
        sources: One source per operand.
        sizes: Size of every leg.
        scale: Number that multiplies the result.

    Raises:
        ValueError: If the equation has a wrong number of operands or an unknown leg.
    """
    left, _, right = equation.partition("->")
    operands = left.split(",")
    if len(operands) != len(sources):
        raise ValueError(f"{equation!r} has {len(operands)} operands: got {len(sources)} sources.")

    def operand(source: Source, text: str) -> Operand:
        groups = [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", text)]
        unknown = {leg for group in groups for leg in group} - sizes.keys()
        if unknown:
            raise ValueError(f"Legs {sorted(unknown)} of {equation!r} have no size.")
        return grouped(source, groups, sizes)

    return Network(
        tuple(operand(s, text) for s, text in zip(sources, operands, strict=True)),
        operand(Variable("output"), right),
        scale,
    )
