"""The functions of torch that multiply an input with a weight, and how: one row for each.

A row reads the arguments of a call as a :class:`Product`. What is no row, or has arguments of
another kind (``out=``, ``alpha``), is no product of a weight, and nothing is measured of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from string import ascii_letters
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tnkfac.curvature.capture.calls import Rows
from tnkfac.curvature.layers import Layer
from tnkfac.curvature.layers.convolution import Convolution, TransposedConvolution, convolution

Known = Callable[[Any], bool]
"""Whether an argument is a weight, or a view or cast of one."""


class Product(NamedTuple):
    """A call that multiplies an input with a weight.

    Attributes:
        x: The input.
        weight: The weight as an argument: ``[rows, columns]``, ``[E, rows, columns]``, or that of
            a convolution.
        outputs_first: Whether its rows are outputs.
        bias: What is added to the product, if anything.
        rows: Input ``[.., C_in]`` and output gradient ``[.., C_out]`` from those of the call; of a
            stack ``[E, n, C_in]`` and ``[E, n, C_out]``.
        ends: Where the rows of each matrix of a stack end, ``[E]``, if they are ``[T, C]``.
        convolution: The layer with or without a bias, of a convolution.
        matrix: Shape ``(rows, columns)`` as which the weight is to be seen.
    """

    x: Tensor
    weight: Tensor
    outputs_first: bool
    bias: Any = None
    rows: Rows | None = None
    ends: Tensor | None = None
    convolution: Callable[[bool], Layer] | None = None
    matrix: tuple[int, int] | None = None


Parser = Callable[[Any, Any, Known], Product | None]


def _arguments(args: Any, kwargs: Any, *names: str) -> Iterator[Any]:
    """Arguments by place or by name, None for those that are missing."""
    return (args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names))


def _transposed(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return (x.mT if x.ndim > 1 else x), (g.mT if g.ndim > 1 else g)


def _linear(args: Any, kwargs: Any, known: Known) -> Product | None:
    x, weight, bias = _arguments(args, kwargs, "input", "weight", "bias")
    return Product(x, weight, True, bias) if known(weight) and weight.ndim == 2 else None


def _inner(args: Any, kwargs: Any, known: Known) -> Product | None:
    x, weight = _arguments(args, kwargs, "input", "other")
    usable = known(weight) and weight.ndim == 2 and "out" not in kwargs
    return Product(x, weight, True) if usable else None


def _tensordot(args: Any, kwargs: Any, known: Known) -> Product | None:
    """As an einsum."""
    left, right, dims = _arguments(args, kwargs, "a", "b", "dims")
    if kwargs.get("out") is not None or not (known(left) or known(right)):
        return None
    if isinstance(dims, Tensor):
        return None
    if dims is None or isinstance(dims, int):
        count = 2 if dims is None else dims
        pairs = [(left.ndim - count + i, i) for i in range(count)]
    else:
        pairs = [(a % left.ndim, b % right.ndim) for a, b in zip(*dims, strict=True)]
    letters = [chr(ord("a") + i) for i in range(left.ndim + right.ndim)]
    of_left, of_right = letters[: left.ndim], letters[left.ndim :]
    for a, b in pairs:
        of_right[b] = of_left[a]
    result = [c for c in of_left + of_right if (c in of_left) != (c in of_right)]
    equation = f"{''.join(of_left)},{''.join(of_right)}->{''.join(result)}"
    return _einsum((equation, left, right), {}, known)


def _addmm(args: Any, kwargs: Any, known: Known) -> Product | None:
    bias, left, right = _arguments(args, kwargs, "input", "mat1", "mat2")
    scales = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if len(args) > 3 or scales != (1, 1) or "out" in kwargs or not known(right):
        return None
    return Product(left, right, False, bias)


def _matmul(args: Any, kwargs: Any, known: Known, swapped: bool = False) -> Product | None:
    if "out" in kwargs or len(args) + len(kwargs) != 2:
        return None
    factors: list[Any] = [*args, *kwargs.values()]
    left, right = reversed(factors) if swapped else factors
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return None
    if known(right) and (right.ndim == 2 or 3 == right.ndim <= left.ndim):
        by_matrix = _by_matrix if right.ndim == 3 and _is_stack(right) else None
        return Product(left, right, False, rows=by_matrix)
    if known(left) and (left.ndim == 2 or 3 == left.ndim <= right.ndim):
        by_matrix = _transposed_by_matrix if left.ndim == 3 and _is_stack(left) else _transposed
        return Product(right, left, True, rows=by_matrix)
    return None


def _is_stack(weight: Tensor) -> bool:
    """Whether an argument has several matrices, and not the same one for all of a batch."""
    return weight.shape[0] > 1 and weight.stride(0) != 0


def _by_matrix(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``[.., E, n, C]`` as ``[E, .., C]``, for one matrix after the other."""
    x, g = (t.movedim(-3, 0).reshape(t.shape[-3], -1, t.shape[-1]) for t in (x, g))
    return x, g


def _transposed_by_matrix(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return _by_matrix(x.mT, g.mT)


def _grouped(args: Any, kwargs: Any, known: Known) -> Product | None:
    """``[T, C_in] @ [E, C_in, C_out]``, given where the rows of each matrix end."""
    named = {"input": "mat_a", "mat2": "mat_b"}  # in torch.nn.functional
    given = {old: kwargs[new] for old, new in named.items() if new in kwargs} | kwargs
    x, weight, ends = _arguments(args, given, "input", "mat2", "offs")
    others = (kwargs.get(name) for name in ("bias", "out_dtype"))
    if (
        not known(weight)
        or ends is None
        or x.ndim != 2
        or weight.ndim != 3
        or any(other is not None for other in others)
    ):
        return None

    return Product(x, weight, False, ends=ends)


def _einsum(args: Any, kwargs: Any, known: Known) -> Product | None:
    """Two operands, one a weight of inputs, outputs, and perhaps matrices in a stack.

    Inputs and outputs are each adjacent axes of the weight.
    """
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if kwargs or not isinstance(equation, str) or len(operands) != 2:
        return None
    equation = _spelled_out(equation, operands)
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    if not arrow:
        result = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    for w, x in ((0, 1), (1, 0)):
        if known(operands[w]):
            return _contraction(operands[x], operands[w], terms[x], terms[w], result)
    return None


def _spelled_out(equation: str, operands: list[Tensor]) -> str:
    """The equation with letters in the place of ``...``, which must not be in both operands."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    free = [c for c in ascii_letters if c not in equation]
    for term, operand in zip(terms, operands, strict=False):
        if "..." in term:
            count = operand.ndim - len(term.replace("...", ""))
            return equation.replace("...", "".join(free[: max(count, 0)]))
    return equation


def _contraction(x: Tensor, weight: Tensor, of_x: str, of_w: str, of_y: str) -> Product | None:
    """The product that two operands of an einsum are, given the letters of their axes."""
    inputs = "".join(c for c in of_w if c in of_x and c not in of_y)
    outputs = "".join(c for c in of_w if c in of_y and c not in of_x)
    stack = "".join(c for c in of_w if c in of_x and c in of_y)
    rows = "".join(c for c in of_x if c not in of_w)
    repeated = any(len(set(letters)) != len(letters) for letters in (of_x, of_w, of_y))
    lost = len(inputs + outputs + stack) != len(of_w) or any(c not in of_y for c in rows)
    if repeated or lost or not (inputs and outputs) or len(stack) > 1:
        return None
    if of_w not in (stack + outputs + inputs, stack + inputs + outputs):
        return None
    sizes = dict(zip(of_w, weight.shape, strict=True))
    count_in, count_out = (_size(letters, sizes) for letters in (inputs, outputs))
    outputs_first = of_w == stack + outputs + inputs
    if stack and (len(inputs), len(outputs)) != (1, 1):
        return None
    order_x = [of_x.index(c) for c in stack + rows + inputs]
    order_y = [of_y.index(c) for c in stack + rows + outputs]
    first = len(stack) + len(rows)

    def moved(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        x, g = x.permute(order_x).flatten(first), g.permute(order_y).flatten(first)
        if not stack:
            return x, g
        return x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])

    if stack:
        return Product(x, weight, outputs_first, rows=moved)
    matrix = (count_out, count_in) if outputs_first else (count_in, count_out)
    return Product(x, weight, outputs_first, rows=moved, matrix=matrix)


def _size(letters: str, sizes: dict[str, int]) -> int:
    size = 1
    for letter in letters:
        size *= sizes[letter]
    return size


def _convolution(kind: type[Convolution], args: Any, kwargs: Any, known: Known) -> Product | None:
    if kind is TransposedConvolution:
        x, weight, bias, stride, padding, output_padding, groups, dilation = _arguments(
            args, kwargs, "input", "weight", "bias", "stride", "padding", "output_padding",
            "groups", "dilation",
        )  # fmt: skip
    else:
        output_padding = None
        x, weight, bias, stride, padding, dilation, groups = _arguments(
            args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
        )
    if not known(weight):
        return None
    groups = groups or 1
    geometry = (
        groups,
        *(
            default if value is None else value if isinstance(value, str | int) else tuple(value)
            for value, default in ((stride, 1), (padding, 0), (dilation, 1), (output_padding, 0))
        ),
        "zeros",
        (),
    )
    outward, inward = weight.shape[0], weight.shape[1] * groups
    if kind is TransposedConvolution:
        outward, inward = inward, outward
    kernel_size = tuple(weight.shape[2:])

    def layer(bias: bool) -> Layer:
        return convolution(kind, (inward, outward, bias), kernel_size, geometry)

    return Product(x, weight, kind is Convolution, bias, convolution=layer)


def _table() -> dict[Any, Parser]:
    table: dict[Any, Parser] = {F.linear: _linear, torch.einsum: _einsum}
    table |= {torch.inner: _inner, Tensor.inner: _inner, torch.tensordot: _tensordot}
    for function in (torch.addmm, Tensor.addmm):
        table[function] = _addmm
    for name in ("matmul", "mm", "mv", "bmm"):
        table[getattr(torch, name)] = table[getattr(Tensor, name)] = _matmul
    table[Tensor.__matmul__] = _matmul
    table[Tensor.__rmatmul__] = partial(_matmul, swapped=True)
    for room, name in ((torch, "_grouped_mm"), (F, "grouped_mm")):
        if hasattr(room, name):  # since torch 2.8 and 2.10
            table[getattr(room, name)] = _grouped
    for dims in (1, 2, 3):
        for room in (torch, F):
            table[getattr(room, f"conv{dims}d")] = partial(_convolution, Convolution)
            transposed = partial(_convolution, TransposedConvolution)
            table[getattr(room, f"conv_transpose{dims}d")] = transposed
    return table


PRODUCTS = _table()
"""Function -> how its arguments are read. Aliases are functions of their own."""
CASTS = {
    getattr(Tensor, name)
    for name in ("to", "type_as", "type", "float", "half", "bfloat16", "double", "contiguous")
}
"""Methods that copy a weight, if they do not return it."""
