"""Plans: networks compiled to a few torch calls.

:func:`plan` simplifies a network, picks a contraction order with opt_einsum, folds index patterns
into constants, and notices what would be computed twice. The result is built once per network
and called many times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from opt_einsum import paths
from torch import Tensor

from tnkfac.einsum.geometry import Axis
from tnkfac.einsum.network import Network
from tnkfac.einsum.operands import Delta, Ones, Pattern, Variable
from tnkfac.einsum.program import Program, Step, by_halves, peak_memory, slot_to_scale, whole
from tnkfac.einsum.rules import simplify, unfold_inputs
from tnkfac.einsum.views import Slice, View, Window
from tnkfac.einsum.views import Step as ViewStep

Apply = Callable[[Tensor], Tensor]


class Plan:
    """A compiled network.

    Call it with the named tensors. Printing it lists its steps and their cost.

    Attributes:
        network: The network as given.
        flops: Multiply-adds of one call, besides constants that are computed once.
        peak_memory: Largest number of entries that intermediate results and the result hold at
            one time.

    Example:
        >>> import torch
        >>> from tnkfac.einsum import networks, plan
        >>> factor = plan(networks.kfc_factor((2, 3, 5, 5), kernel_size=3))
        >>> factor(x=torch.rand(2, 3, 5, 5)).shape
        torch.Size([1, 27, 27])
    """

    def __init__(self, network: Network, *, simplified: bool = True) -> None:
        """Search the order; :func:`plan` does so once per network.

        Args:
            network: The contraction.
            simplified: Whether to rewrite it first; False is for comparison only.
        """
        self.network = network
        plain = whole(network, _search)
        small, program = _best(network, plain) if simplified else (network, plain)
        self._program = program
        self._names = network.names
        self._shapes = {
            op.source.name: op.shape for op in network.operands if isinstance(op.source, Variable)
        }
        self._constants: dict[tuple[torch.dtype, torch.device], dict[int, Tensor]] = {}
        self._scale = small.scale
        self._scaled_slot = slot_to_scale(program)
        views: list[tuple[int, str, tuple[Apply, ...]]] = []
        for op in program.leaves:
            if isinstance(op.source, Variable):
                views.append((program.leaf(op), op.source.name, compile_view(op.shape, op.view)))
        self._views = views
        last = {slot: step.output for step in program.running for slot in step.inputs}
        self._running = [
            (
                step.output,
                step.inputs,
                self._scaled(step),
                tuple(slot for slot in set(step.inputs) if last[slot] == step.output),
            )
            for step in program.running
        ]
        self._finish = compile_adjoint(network.output.shape, small.output.view)
        self.flops = program.flops
        self.peak_memory = peak_memory(program)

    def __call__(self, **tensors: Tensor) -> Tensor:
        """Contract the network.

        Args:
            **tensors: One tensor per name of the network, of the shapes it was built for.

        Returns:
            The result, of shape ``network.shape``. It never shares memory with an argument.

        Raises:
            ValueError: If a tensor is missing, unknown, or has another shape.
        """
        if tensors.keys() != self._shapes.keys():
            raise ValueError(f"Expected tensors {sorted(self._shapes)}: got {sorted(tensors)}.")
        for name, shape in self._shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name}: got shape {tuple(tensors[name].shape)}, not {shape}.")
        first = tensors[self._names[0]] if self._names else torch.empty(0, device="cpu")
        values: dict[int, Tensor] = dict(self._fold_constants(first.dtype, first.device))
        for slot, name, view in self._views:
            value = tensors[name]
            for apply in view:
                value = apply(value)
            values[slot] = value
        for output, inputs, call, dead in self._running:
            if len(inputs) == 2:
                values[output] = call(values[inputs[0]], values[inputs[1]])
            else:
                values[output] = call(values[inputs[0]])
            for slot in dead:
                del values[slot]
        result = values[self._program.result]
        for apply in self._finish:
            result = apply(result)
        if self._scaled_slot is None and self._scale != 1:
            return result * self._scale
        return result if self.flops else result.clone()

    def _scaled(self, step: Step) -> Callable[..., Tensor]:
        """The call of a step, times the scale if it belongs there."""
        call, scale = _call(step), self._scale
        if step.output != self._scaled_slot or scale == 1:
            return call
        return lambda *values: call(*values) * scale

    def _fold_constants(self, dtype: torch.dtype, device: torch.device) -> dict[int, Tensor]:
        """Values that depend on no variable, computed once per dtype and device."""
        values = self._constants.get((dtype, device))
        if values is None:
            values = {}
            for op in self._program.leaves:
                slot = self._program.leaf(op)
                if self._program.constant[slot]:
                    value = constant(op.source, dtype, device)
                    for apply in compile_view(op.shape, op.view):
                        value = apply(value)
                    values[slot] = value
            for step in self._program.steps:
                if self._program.constant[step.output]:
                    inputs = (values[slot] for slot in step.inputs)
                    values[step.output] = _call(step)(*inputs)
            if self._scaled_slot in values:
                values[self._scaled_slot] = values[self._scaled_slot] * self._scale
            read = {slot for step in self._program.running for slot in step.inputs}
            values = {s: v for s, v in values.items() if s in read or s == self._program.result}
            if len(self._constants) >= 8:
                self._constants.clear()
            self._constants[dtype, device] = values
        return values

    @property
    def steps(self) -> list[Step]:
        """Contractions of a call, in order."""
        return self._program.running

    def __repr__(self) -> str:
        """The network, the cost and every step."""
        program = self._program
        lines = [
            f"Plan of {self.network.equation}",
            f"  {self.flops:,} multiply-adds, at most {self.peak_memory:,} entries at a time",
        ]
        for op in program.leaves:
            legs = " ".join(op.legs)
            name = op.source.name if isinstance(op.source, Variable) else op.source
            lines.append(f"  v{program.leaf(op)} = {name} [{legs}] {op.sizes}")
        lines += [f"  {step}" for step in program.steps]
        lines.append(f"  result v{program.result} * {self._scale:g} -> {self.network.shape}")
        return "\n".join(lines)


def constant(source: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of a constant: ``[k, o, i]`` of a pattern, an identity, or ones."""
    if isinstance(source, Pattern):
        axis = source.axis
        shape = (axis.kernel_size, axis.output_size, axis.input_size)
        pattern = torch.zeros(shape, dtype=dtype, device="cpu")
        taps = list(axis.taps())
        if taps:
            k, o, i = torch.tensor(taps, device="cpu").unbind(1)
            pattern[k, o, i] = 1
        return pattern.to(device)
    if isinstance(source, Delta):
        return torch.eye(source.size, dtype=dtype, device=device)
    if isinstance(source, Ones):
        return torch.ones(source.size, dtype=dtype, device=device)
    raise TypeError(f"{source!r} is not a constant.")


def _best(network: Network, plain: Program) -> tuple[Network, Program]:
    """The cheapest program over all forms, also that with unfolded inputs, and both orders.

    Of those that do no more multiply-adds than the plain program of the network itself: what a
    form writes less of never pays for more arithmetic.
    """
    small = simplify(network)
    candidates: list[tuple[Network, Program | None]] = [(network, plain)]
    for form in dict.fromkeys((small, simplify(unfold_inputs(small)))):
        halves = by_halves(form, _search)
        candidates.append((form, halves))
        if halves is None or len(form.operands) < 5:  # else the plain program is near
            candidates.append((form, whole(form, _search)))
    allowed = [
        (form, program)
        for form, program in candidates
        if program is not None and program.flops <= plain.flops
    ]
    return min(allowed, key=lambda pair: pair[1].cost)


def _search(
    terms: list[frozenset[str]], output: frozenset[str], sizes: dict[str, int]
) -> list[tuple[int, ...]]:
    """The best order for up to four operands; for more, a greedy one, which takes a fifth."""
    order: list[tuple[int, ...]]
    find: Any = paths.optimal if len(terms) < 5 else paths.greedy
    order = find(terms, output, sizes)
    return order


def _call(step: Step) -> Callable[..., Tensor]:
    """The torch call of a step."""
    equation = step.equation
    if step.kind == "pack":
        return lambda a: torch.einsum(equation, a).contiguous()
    if step.kind == "einsum":
        return lambda *values: torch.einsum(equation, *values)
    left, right, result = equation.replace("->", ",").split(",")
    order = [right.index(letter) for letter in left]
    summed = [axis for axis, letter in enumerate(left) if letter not in result]
    letters = [letter for letter in left if letter in result]
    final = [letters.index(letter) for letter in result]

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        product = a * b.permute(order)
        return (product.sum(summed) if summed else product).permute(final)

    return multiply


def compile_view(shape: tuple[int, ...], view: View) -> tuple[Apply, ...]:
    """Functions that take a tensor of ``shape`` through the view, one reshape where possible."""
    functions: list[Apply] = []
    pending = False
    for step in view:
        if isinstance(step, Slice | Window):
            if pending:
                functions.append(_reshape(shape))
            functions.append(_slice(step) if isinstance(step, Slice) else _window(step))
            pending = False
        else:
            pending = True
        shape = step.shape(shape)
    if pending:
        functions.append(_reshape(shape))
    return tuple(functions)


def compile_adjoint(shape: tuple[int, ...], view: View) -> tuple[Apply, ...]:
    """Functions that take a tensor of the viewed shape back to ``shape``."""
    shapes = [shape]
    for step in view:
        shapes.append(step.shape(shapes[-1]))
    functions: list[Apply] = []
    pending = False
    for step, before in zip(reversed(view), reversed(shapes[:-1]), strict=True):
        if isinstance(step, Slice | Window):
            if pending:
                functions.append(_reshape(step.shape(before)))
            functions.append(_adjoint(step, before))
            pending = False
        else:
            pending = True
    if pending:
        functions.append(_reshape(shape))
    return tuple(functions)


def _reshape(shape: tuple[int, ...]) -> Apply:
    return lambda tensor: tensor.reshape(shape)


def _slice(step: Slice) -> Apply:
    if step.start == 0 and step.step == 1:
        return lambda tensor: tensor.narrow(step.axis, 0, step.size)
    end = step.start + step.step * (step.size - 1) + 1
    index = (*[slice(None)] * step.axis, slice(step.start, end, step.step))
    return lambda tensor: tensor[index]


def _window(step: Window) -> Apply:
    return lambda tensor: windows(tensor, step.axis, step.pattern)


def _adjoint(step: ViewStep, shape: tuple[int, ...]) -> Apply:
    if isinstance(step, Slice):
        return lambda tensor: _scattered(tensor, step, shape)
    assert isinstance(step, Window)
    axis, pattern = step.axis, step.pattern
    exact = pattern.output_size * pattern.kernel_size == pattern.input_size
    exact = exact and (pattern.stride == pattern.kernel_size or pattern.output_size == 1)
    if exact and pattern.left == 0 and pattern.dilation == 1:  # tiles without gaps
        return _reshape(shape)
    return lambda tensor: fold_windows(tensor, axis, pattern)


def _scattered(tensor: Tensor, step: Slice, shape: tuple[int, ...]) -> Tensor:
    full = tensor.new_zeros(shape)
    _slice(step)(full).copy_(tensor)
    return full


def _pad(tensor: Tensor, axis: int, left: int, right: int) -> Tensor:
    if left == right == 0:
        return tensor
    return torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - 1 - axis) + [left, right])


def windows(tensor: Tensor, axis: int, pattern: Axis) -> Tensor:
    """View the pixels on ``axis`` as ``[.., o, k, ..]``; only padding copies.

    Args:
        tensor: Any tensor with ``pattern.input_size`` entries on ``axis``.
        axis: Non-negative axis of the pixels.
        pattern: Hyper-parameters of the dimension.
    """
    right = max(0, pattern.end - pattern.input_size)
    tensor = _pad(tensor, axis, pattern.left, right)
    seen = tensor.unfold(axis, pattern.reach, pattern.stride)[..., :: pattern.dilation]
    return seen.narrow(axis, 0, pattern.output_size).movedim(-1, axis + 1)


def fold_windows(tensor: Tensor, axis: int, pattern: Axis) -> Tensor:
    """Adjoint of :func:`windows`: add the entries ``[.., o, k, ..]`` up at their pixels."""
    length = max(pattern.left + pattern.input_size, pattern.left + pattern.end)
    shape = (*tensor.shape[:axis], length, *tensor.shape[axis + 2 :])
    pixels = tensor.new_zeros(shape)
    span = pattern.stride * (pattern.output_size - 1) + 1
    for k in range(pattern.kernel_size):
        target = pixels.narrow(axis, pattern.dilation * k, span)
        index = (slice(None),) * axis + (slice(None, None, pattern.stride),)
        target[index].add_(tensor.select(axis + 1, k))
    return pixels.narrow(axis, pattern.left, pattern.input_size)


@lru_cache(maxsize=1024)
def plan(network: Network) -> Plan:
    """Compile a network; the same network is compiled once.

    Args:
        network: The contraction, as one of :mod:`tnkfac.einsum.networks` returns it.

    Returns:
        A callable :class:`Plan`. At most 1024 plans are kept.
    """
    return Plan(network)
