"""The spatial part of a row: legs and patterns of a convolution or a transposed one.

Rows are written once for both layer types, over the legs of the layer's input, its output, and
its taps. Of a convolution the input has the pixels ``i`` and the output the positions ``o`` of
its index patterns; a transposed convolution has them the other way round, and its weight lists
input channels first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from typing_extensions import TypedDict, Unpack

from tnkfac.einsum.geometry import Axis, Padding, conv_axes, conv_transpose_axes
from tnkfac.einsum.network import Network, parse
from tnkfac.einsum.operands import Delta, Pattern, Source, Variable, grouped

Ints = int | Sequence[int]
Shape = tuple[int, ...]


class Hyper(TypedDict, total=False):
    """Hyper-parameters of a convolution, as in ``torch.nn.functional``.

    Attributes:
        stride: Pixels between output positions, one or one per dimension (default 1).
        padding: Zeros on each side: int, ``'same'``, ``'valid'``, or an int or a pair per
            dimension (default 0).
        dilation: Pixels between taps, one or one per dimension (default 1).
        groups: Channel groups ``G`` (default 1).
    """

    stride: Ints
    padding: Padding
    dilation: Ints
    groups: int


class TransposedHyper(Hyper, total=False):
    """Hyper-parameters of a transposed convolution.

    Attributes:
        output_padding: Rows added to one side of the output (default 0).
    """

    output_padding: Ints


@dataclass(frozen=True)
class Space:
    """Axes, groups and orientation of a layer.

    Attributes:
        axes: One axis per spatial dimension.
        groups: Channel groups ``G``.
        transposed: Whether the layer is the transposed convolution of these axes.
        operation: Name for error messages.
    """

    axes: tuple[Axis, ...]
    groups: int = 1
    transposed: bool = False
    operation: str = "operation"

    @classmethod
    def conv(
        cls, operation: str, input_size: Shape, kernel_size: Ints, **hyper: Unpack[Hyper]
    ) -> Space:
        """Space of a convolution over an input of spatial shape ``input_size``."""
        return cls._of(conv_axes, operation, input_size, kernel_size, False, **hyper)

    @classmethod
    def conv_transpose(
        cls, operation: str, input_size: Shape, kernel_size: Ints, **hyper: Unpack[TransposedHyper]
    ) -> Space:
        """Space of a transposed convolution over an input of spatial shape ``input_size``."""
        return cls._of(conv_transpose_axes, operation, input_size, kernel_size, True, **hyper)

    @classmethod
    def _of(
        cls,
        axes: object,
        operation: str,
        input_size: Shape,
        kernel_size: Ints,
        transposed: bool,
        groups: int = 1,
        **hyper: object,
    ) -> Space:
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            kind = ValueError if type(groups) is int else TypeError
            raise kind(f"{operation}: groups: got {groups!r}. Supported: a positive int.")
        known = {"stride", "padding", "dilation", *(["output_padding"] if transposed else [])}
        if hyper.keys() - known:
            raise TypeError(
                f"{operation}: got unexpected {sorted(hyper.keys() - known)} with "
                f"{sorted(hyper.items())}. Supported: groups, {', '.join(sorted(known))}."
            )
        if not isinstance(input_size, Sequence) or isinstance(input_size, str):
            raise TypeError(
                f"{operation}: input size: got {input_size!r}. Supported: one int per dimension."
            )
        input_size = tuple(input_size)
        if not input_size:
            raise ValueError(f"{operation}: the input has no spatial dimension.")
        try:
            spatial_axes = axes(input_size, kernel_size, **hyper)  # type: ignore[operator]
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{operation}: input size {tuple(input_size)}, kernel size {kernel_size}, "
                f"{hyper}: {error}"
            ) from None
        return cls(spatial_axes, groups, transposed, operation)

    def _legs(self, letter: str) -> str:
        return " ".join(f"{letter}{d}" for d in range(1, len(self.axes) + 1))

    @property
    def output_size(self) -> Shape:
        """Spatial shape of the layer's output."""
        return tuple(axis.input_size if self.transposed else axis.output_size for axis in self.axes)

    def fill(self, template: str) -> str:
        """Write out the legs that a template names."""
        x, y = ("o", "i") if self.transposed else ("i", "o")
        legs = {
            "x": self._legs(x),
            "y": self._legs(y),
            "k": self._legs("k"),
        }
        channels = "(g ci) co" if self.transposed else "(g co) ci"
        legs["w"] = f"{channels} {legs['k']}"
        legs["p"] = ", ".join(f"k{d} o{d} i{d}" for d in range(1, len(self.axes) + 1))
        return template.format(**legs)

    def network(
        self,
        template: str,
        scale: float = 1.0,
        sizes: Mapping[str, int] | None = None,
        **tensors: Shape,
    ) -> Network:
        """Build a row from its equation.

        ``{x}``, ``{y}``, ``{k}`` are the legs of input, output and taps, ``{w}`` the axes of the
        weight, ``{p}`` the index patterns; ``delta a b`` is a Kronecker delta.

        Args:
            template: The equation; its other operands are the tensors, in this order.
            scale: Number that multiplies the result.
            sizes: Sizes of legs that no tensor has.
            **tensors: Shape of every tensor. Sizes of legs follow from them and are checked.

        Raises:
            ValueError: If a shape does not fit.
        """
        left, right = self.fill(template).split("->")
        sizes = self._sizes() | dict(sizes or {})
        names = iter(tensors)
        operands: list[str] = []
        sources: list[Source | str] = []
        for text in (piece.strip() for piece in left.split(",")):
            if re.fullmatch(r"k\d+'* o\d+'* i\d+'*", text):
                sources.append(self._pattern(text))
            elif text.startswith("delta "):
                text = text.removeprefix("delta ")
                sources.append(text)
            else:
                name = next(names)
                self._infer(name, text, tensors[name], sizes)
                sources.append(Variable(name))
            operands.append(text)
        for leg in re.findall(r"[\w']+", left + right):
            base = leg.rstrip("'")
            if leg not in sizes and base in sizes:
                sizes[leg] = sizes[base]
        final: list[Source] = [
            Delta(sizes[s.split()[0]]) if isinstance(s, str) else s for s in sources
        ]
        return parse(f"{', '.join(operands)} -> {right}", final, sizes, scale)

    def times(self, network: Network, operand: str, result: str, **tensor: Shape) -> Network:
        """Multiply a network by one more tensor, over legs that it has open.

        Args:
            network: A network over the legs of this space.
            operand: Axes of the tensor, as in :meth:`network`.
            result: Axes of the new result.
            **tensor: Its shape.

        Raises:
            ValueError: If the shape does not fit.
        """
        ((name, shape),) = tensor.items()
        sizes = dict(network.sizes)
        text = self.fill(operand)
        self._infer(name, text, shape, sizes)
        factor = grouped(Variable(name), _groups(text), sizes)
        output = grouped(Variable("output"), _groups(self.fill(result)), sizes)
        return Network((*network.operands, factor), output, network.scale)

    def _pattern(self, text: str) -> Pattern:
        return Pattern(self.axes[int(re.findall(r"\d+", text)[0]) - 1])

    def _sizes(self) -> dict[str, int]:
        sizes = {"g": self.groups}
        for d, axis in enumerate(self.axes, start=1):
            sizes |= {
                f"i{d}": axis.input_size,
                f"o{d}": axis.output_size,
                f"k{d}": axis.kernel_size,
            }
        return sizes

    def _infer(self, name: str, text: str, shape: Shape, sizes: dict[str, int]) -> None:
        """Learn the sizes of new legs from a shape, and check the others."""
        groups = _groups(text)
        if len(groups) != len(shape):
            raise ValueError(
                f"{self.operation}: {name}: got shape {tuple(shape)}, but it needs the "
                f"{len(groups)} axes {text!r}."
            )
        for legs, size in zip(groups, shape, strict=True):
            new = [leg for leg in legs if self._size(leg, sizes) is None]
            known = prod(self._size(leg, sizes) or 1 for leg in legs)
            fits = size % known == 0 if new else size == known
            if len(new) > 1 or not fits:
                have = {leg: self._size(leg, sizes) for leg in legs}
                raise ValueError(
                    f"{self.operation}: {name}: got shape {tuple(shape)}, but the axis "
                    f"{' '.join(legs)!r} of size {size} does not fit {have}."
                )
            for leg in new:
                sizes[leg] = size // known

    def _size(self, leg: str, sizes: dict[str, int]) -> int | None:
        return sizes.get(leg, sizes.get(leg.rstrip("'")))


def _groups(text: str) -> list[list[str]]:
    """Legs of every axis of an operand in einops style."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", text)]


def leading(count: int) -> tuple[str, str]:
    """Names of ``count`` additional leading axes, and the same with a space behind."""
    legs = " ".join(f"v{a}" for a in range(1, count + 1))
    return legs, f"{legs} " if legs else ""


def spatial(operation: str, argument: str, shape: Shape) -> Shape:
    """Spatial part of a shape.

    Raises:
        TypeError: If it is not a sequence.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{operation}: {argument}: got {shape!r}. Supported: a tuple of ints.")
    return tuple(shape[2:])
