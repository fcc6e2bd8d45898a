"""Exact rewrites of tensor networks, and :func:`simplify`, which applies them all.

A rule is a pure function ``Network -> Network | None``; ``None`` means that it does not apply.
Every rewrite either removes an operand, a leg or a pixel, so the fixed point is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations

from tnkfac.einsum.geometry import Axis
from tnkfac.einsum.network import Network
from tnkfac.einsum.operands import Delta, Ones, Operand, Pattern, Source, Variable
from tnkfac.einsum.views import Merge, Slice, Squeeze, Step, Window

Rule = Callable[[Network], Network | None]


def _holders(network: Network, leg: str) -> list[Operand]:
    """All operands, the output included, that have the leg."""
    return [op for op in (*network.operands, network.output) if leg in op.legs]


def _pattern_axis(operand: Operand) -> Axis | None:
    """The axis of an index pattern whose three legs are intact."""
    source = operand.source
    intact = isinstance(source, Pattern) and len({*operand.legs}) == 3
    return source.axis if isinstance(source, Pattern) and intact else None


def _held_as_pixels(network: Network, axis: Axis, pixels: str) -> bool:
    """Whether only tensors and equal patterns hold the leg, once each, as their pixels."""
    for op in _holders(network, pixels):
        if op.legs.count(pixels) != 1 or isinstance(op.source, Delta | Ones):
            return False
        if isinstance(op.source, Pattern) and (_pattern_axis(op) != axis or op.legs[2] != pixels):
            return False
    return True


def _constant(source: Source, shape: tuple[int, ...], *legs: str) -> Operand:
    return Operand(source, shape, legs)


def _delta(size: int, a: str, b: str) -> Operand:
    return _constant(Delta(size), (size, size), a, b)


def _stepped(operand: Operand, step: Step, legs: tuple[str, ...]) -> Operand:
    return replace(operand, view=(*operand.view, step), legs=legs)


def crop_unused_pixels(network: Network) -> Network | None:
    """Cut pixels that no tap ever meets off everything that holds them."""
    for operand in network.operands:
        axis = _pattern_axis(operand)
        if axis is None or axis.used == axis.input_size:
            continue
        small, pixels = axis.cropped(), operand.legs[2]
        if small == axis or not _held_as_pixels(network, axis, pixels):
            continue
        view = Slice(0, small.input_size)
        return _mapped(network, partial(_over_pixels, pixels=pixels, view=view, axis=small))
    return None


def skip_untouched_pixels(network: Network) -> Network | None:
    """Keep every ``gcd(stride, dilation)``-th pixel where the others are never met."""
    for operand in network.operands:
        axis = _pattern_axis(operand)
        if axis is None or axis.coarse is None:
            continue
        if not _held_as_pixels(network, axis, operand.legs[2]):
            continue
        first, step, coarse = axis.coarse
        view = Slice(0, coarse.input_size, first, step)
        change = partial(_over_pixels, pixels=operand.legs[2], view=view, axis=coarse)
        return _mapped(network, change)
    return None


def _over_pixels(op: Operand, pixels: str, view: Slice, axis: Axis) -> Operand:
    """See only the pixels of a slice; patterns become those of ``axis``."""
    if pixels not in op.legs:
        return op
    if isinstance(op.source, Pattern):
        shape = (axis.kernel_size, axis.output_size, axis.input_size)
        return Operand(Pattern(axis), shape, op.legs)
    return _stepped(op, replace(view, axis=op.legs.index(pixels)), op.legs)


def non_overlapping_windows(network: Network) -> Network | None:
    """Replace a pattern that uses no pixel twice by a view.

    Dense layers (kernel = stride), down-sampling (kernel < stride), 1x1 kernels, kernels as large
    as the input: unfolding only rearranges pixels, so the pixel leg becomes the legs ``o, k`` of
    every tensor that holds it, the output included. A second copy of the pattern on the same
    pixels becomes a pair of deltas.
    """
    for operand in network.operands:
        axis = _pattern_axis(operand)
        if axis is None or not axis.is_injective:
            continue
        k, o, pixels = operand.legs
        others = [op for op in _holders(network, pixels) if op is not operand]
        if not others or not _held_as_pixels(network, axis, pixels):
            continue
        twins = any(_pattern_axis(op) is not None for op in others)
        # On padded axes deltas would count taps on padding, and a result would grow.
        if not axis.is_unpadded and (twins or pixels in network.output.legs):
            continue
        return _windowed(network, operand, axis, k, o, pixels)
    return None


def _windowed(
    network: Network, pattern: Operand, axis: Axis, k: str, o: str, pixels: str
) -> Network:
    """Give every holder of the pixels the legs ``o, k`` in their place; drop the pattern."""
    operands: list[Operand] = []
    for op in network.operands:
        if op is pattern:
            continue
        if _pattern_axis(op) is not None and pixels in op.legs:
            operands += _pair_of_deltas(axis, (op.legs[1], o), (op.legs[0], k))
        else:
            operands.append(_see_windows(op, axis, k, o, pixels))
    output = network.output
    if pixels in output.legs and {k, o} & {*output.legs}:  # a result has each leg only once
        fresh = f"{o}~{pixels}", f"{k}~{pixels}"
        operands += _pair_of_deltas(axis, (o, fresh[0]), (k, fresh[1]))
        output = _see_windows(output, axis, fresh[1], fresh[0], pixels)
    else:
        output = _see_windows(output, axis, k, o, pixels)
    present = {leg for op in operands for leg in op.legs}
    for leg, size in ((k, axis.kernel_size), (o, axis.output_size)):
        if leg in output.legs and leg not in present:  # only the pattern had it
            operands.append(_constant(Ones(size), (size,), leg))
    return replace(network, operands=tuple(operands), output=output)


def _pair_of_deltas(
    axis: Axis, positions: tuple[str, str], taps: tuple[str, str]
) -> tuple[Operand, Operand]:
    return _delta(axis.output_size, *positions), _delta(axis.kernel_size, *taps)


def _see_windows(op: Operand, axis: Axis, k: str, o: str, pixels: str) -> Operand:
    if pixels not in op.legs:
        return op
    index = op.legs.index(pixels)
    return _stepped(op, Window(index, axis), (*op.legs[:index], o, k, *op.legs[index + 1 :]))


def join_equal_patterns(network: Network) -> Network | None:
    """Two equal patterns that share two legs are one pattern and a delta.

    Any two of tap, position and pixel fix the third.
    """
    patterns = [op for op in network.operands if _pattern_axis(op) is not None]
    for a, b in combinations(patterns, 2):
        if a.source != b.source:
            continue
        differ = [(p, q) for p, q in zip(a.legs, b.legs, strict=True) if p != q]
        if len(differ) > 1:
            continue
        operands = [op for op in network.operands if op is not b]
        if differ:
            operands.append(_delta(network.sizes[differ[0][0]], *differ[0]))
        return replace(network, operands=tuple(operands))
    return None


def sum_over_pixels(network: Network) -> Network | None:
    """A pattern whose pixels are on nothing else is one everywhere if no tap meets padding."""
    for pattern in network.operands:
        axis = _pattern_axis(pattern)
        if axis is None or not axis.is_unpadded:
            continue
        k, o, pixels = pattern.legs
        if len(_holders(network, pixels)) == 1 and pattern.legs.count(pixels) == 1:
            ones = (
                _constant(Ones(axis.kernel_size), (axis.kernel_size,), k),
                _constant(Ones(axis.output_size), (axis.output_size,), o),
            )
            operands = tuple(op for op in network.operands if op is not pattern)
            return replace(network, operands=(*operands, *ones))
    return None


def contract_deltas(network: Network) -> Network | None:
    """Remove a delta by giving its two legs one name, unless the output has both."""
    for delta in network.operands:
        if not isinstance(delta.source, Delta) or len(delta.legs) != 2:
            continue
        a, b = delta.legs
        outputs = network.output.legs
        if a in outputs and b in outputs and a != b:
            continue
        keep, drop = (a, b) if a in outputs else (b, a)
        operands = [op.renamed({drop: keep}) for op in network.operands if op is not delta]
        scale = network.scale
        if not any(keep in op.legs for op in operands):
            if keep in outputs:
                operands.append(_constant(Ones(delta.source.size), (delta.source.size,), keep))
            else:
                scale *= delta.source.size
        return Network(tuple(operands), network.output, scale)
    return None


def drop_ones(network: Network) -> Network | None:
    """Remove a vector of ones: its leg is on another operand, or it is a number."""
    for ones in network.operands:
        if not isinstance(ones.source, Ones) or not ones.legs:
            continue
        leg = ones.legs[0]
        operands = tuple(op for op in network.operands if op is not ones)
        if any(leg in op.legs for op in operands):
            return replace(network, operands=operands)
        if leg not in network.output.legs and operands:
            return Network(operands, network.output, network.scale * ones.source.size)
    return None


def squeeze_legs(network: Network) -> Network | None:
    """Drop legs of size one, and constants that have no leg left."""
    single = [leg for leg, size in network.sizes.items() if size == 1]
    if not single:
        return None

    def squeezed(op: Operand) -> Operand:
        for leg in single:
            while leg in op.legs:
                index = op.legs.index(leg)
                op = _stepped(op, Squeeze(index), op.legs[:index] + op.legs[index + 1 :])
        return op

    network = _mapped(network, squeezed)
    operands = tuple(
        op for op in network.operands if op.legs or isinstance(op.source, Variable | Pattern)
    )
    return replace(network, operands=operands) if operands else network


def merge_parallel_legs(network: Network) -> Network | None:
    """Merge two legs that stand side by side in this order wherever they occur."""
    for op in (*network.operands, network.output):
        for a, b in zip(op.legs, op.legs[1:], strict=False):
            if all(_side_by_side(operand, a, b) for operand in (*network.operands, network.output)):
                return _mapped(network, partial(_merged, a=a, b=b))
    return None


def _side_by_side(op: Operand, a: str, b: str) -> bool:
    if a not in op.legs and b not in op.legs:
        return True
    if not isinstance(op.source, Variable) or op.legs.count(a) != 1 or op.legs.count(b) != 1:
        return False
    return op.legs.index(b) == op.legs.index(a) + 1


def _merged(op: Operand, a: str, b: str) -> Operand:
    if a not in op.legs:
        return op
    index = op.legs.index(a)
    return _stepped(op, Merge(index, 2), (*op.legs[:index], f"{a}*{b}", *op.legs[index + 2 :]))


def _mapped(network: Network, change: Callable[[Operand], Operand]) -> Network:
    operands = tuple(change(op) for op in network.operands)
    return Network(operands, change(network.output), network.scale)


def unfold_inputs(network: Network) -> Network:
    """Turn every pattern whose pixels are on one tensor only into a view, overlapping or not.

    This is im2col. It is exact but may enlarge what is multiplied, so it is not among the rules:
    the planner compares both forms.
    """
    for operand in network.operands:
        axis = _pattern_axis(operand)
        if axis is None:
            continue
        k, o, pixels = operand.legs
        holders = [op for op in _holders(network, pixels) if op is not operand]
        tensors = [op for op in holders if op.legs.count(pixels) == 1 and op in network.operands]
        if len(holders) == len(tensors) == 1 and isinstance(holders[0].source, Variable):
            return unfold_inputs(_windowed(network, operand, axis, k, o, pixels))
    return network


RULES: Mapping[str, Rule] = {
    "join equal patterns": join_equal_patterns,
    "crop unused pixels": crop_unused_pixels,
    "skip untouched pixels": skip_untouched_pixels,
    "non-overlapping windows": non_overlapping_windows,
    "sum over pixels": sum_over_pixels,
    "contract deltas": contract_deltas,
    "drop ones": drop_ones,
    "squeeze legs": squeeze_legs,
    "merge parallel legs": merge_parallel_legs,
}
"""All rules by name, in the order in which they are tried."""


def simplify(network: Network) -> Network:
    """Apply every rule until none applies. Exact: the result is the same contraction.

    Args:
        network: Any network.

    Returns:
        A network of fewer operands, legs or pixels, with the same tensors and result.

    Example:
        >>> from tnkfac.einsum import networks, simplify
        >>> dense = networks.unfold((8, 3, 9), kernel_size=3, stride=3)
        >>> len(dense.operands), len(simplify(dense).operands)
        (2, 1)
    """
    while True:
        for rule in RULES.values():
            smaller = rule(network)
            if smaller is not None:
                network = smaller
                break
        else:
            return network
