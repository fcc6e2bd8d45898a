"""Models that multiply with a parameter by themselves, and the stock layers that they amount to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles.uses_training import copy_weights

__all__ = ["PRODUCTS", "STACKS", "Form", "Stock", "Using", "pairs", "twins"]

Parts = Callable[[Tensor], list[Tensor]]


class Form(NamedTuple):
    """One way to multiply with a parameter.

    Attributes:
        shape: Of the parameter.
        run: The output ``[.., outputs]`` of input ``[.., 4]``, parameter and bias.
        weights: Views ``[outputs, inputs]`` of the parameter, one for each stock layer.
        bias: Size of the bias; 0 for none.
        biases: Views of the bias, one for each stock layer.
        added: Whether the bias is added behind the call, and so trained apart.
        takes: What each stock layer takes of the input; all of them everything if None.
        joins: Output of those of the stock layers.
        calls: How often one after the other, with an activation between.
        tolerance: Of the comparison; larger where products are those of float32.
    """

    shape: tuple[int, ...]
    run: Callable[[Tensor, Tensor, Any], Tensor]
    weights: Parts = lambda w: [w]
    bias: int = 0
    biases: Parts = lambda b: [b]
    added: bool = False
    takes: Callable[[Tensor], list[Tensor]] | None = None
    joins: Callable[[list[Tensor]], Tensor] = lambda outputs: torch.cat(outputs, -1)
    calls: int = 1
    tolerance: float = 1e-9


def turned(w: Tensor) -> list[Tensor]:
    return [w.T]


def three(w: Tensor) -> list[Tensor]:
    return [*w.split([2, 3, 4])]


def flat_rows(x: Tensor, w: Tensor, b: Any) -> Tensor:
    """Samples and positions as one axis."""
    return F.linear(x.reshape(-1, 4), w, b).view(*x.shape[:-1], -1)


def by_windows(x: Tensor, w: Tensor, b: Any) -> Tensor:
    """More entries on the first axis than samples."""
    return F.linear(x.reshape(-1, 2, 4), w, b).reshape(*x.shape[:-1], -1)


def twice(x: Tensor, w: Tensor, b: Any) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, w, b)), w, b)


PRODUCTS: dict[str, Form] = {
    # ------------------------------------------------------------ one matrix
    "F.linear": Form((3, 4), lambda x, w, b: F.linear(x, w)),
    "F.linear, bias": Form((3, 4), F.linear, bias=3),
    "F.linear, named": Form((3, 4), lambda x, w, b: F.linear(bias=b, weight=w, input=x), bias=3),
    "F.linear, the bias is added later": Form(
        (3, 4), lambda x, w, b: F.linear(x, w) + b, bias=3, added=True
    ),
    "F.linear, flattened": Form((3, 4), flat_rows, bias=3),
    "F.linear, windows": Form((3, 4), by_windows, bias=3),
    "F.linear, transposed": Form((4, 3), lambda x, w, b: F.linear(x, w.T), turned),
    "F.linear, contiguous": Form((3, 4), lambda x, w, b: F.linear(x, w.contiguous())),
    "F.linear, view of a kernel": Form(
        (3, 4, 1, 1), lambda x, w, b: F.linear(x, w[:, :, 0, 0]), lambda w: [w[:, :, 0, 0]]
    ),
    "F.linear, cast": Form(
        (3, 4), lambda x, w, b: F.linear(x.float(), w.float()).double(), tolerance=1e-5
    ),
    "F.linear, to(dtype)": Form(
        (3, 4), lambda x, w, b: F.linear(x.float(), w.to(torch.float32)).double(), tolerance=1e-5
    ),
    "F.linear, type_as": Form(
        (3, 4), lambda x, w, b: F.linear(x.float(), w.type_as(x.float())).double(), tolerance=1e-5
    ),
    "twice": Form((4, 4), twice, bias=4, calls=2),
    "addmm": Form(
        (4, 3),
        lambda x, w, b: torch.addmm(b, x.reshape(-1, 4), w).view(*x.shape[:-1], 3),
        turned,
        3,
    ),
    "Tensor.addmm": Form(
        (4, 3),
        lambda x, w, b: b.addmm(x.reshape(-1, 4), w).view(*x.shape[:-1], 3),
        turned,
        3,
    ),
    "matmul": Form((4, 3), lambda x, w, b: torch.matmul(x, w), turned),
    "Tensor.matmul": Form((4, 3), lambda x, w, b: x.matmul(w), turned),
    "@": Form((4, 3), lambda x, w, b: x @ w, turned),
    "@, transposed": Form((3, 4), lambda x, w, b: x @ w.T),
    "@, mT": Form((3, 4), lambda x, w, b: x @ w.mT),
    "@, t()": Form((3, 4), lambda x, w, b: x @ w.t()),
    "@, transpose": Form((3, 4), lambda x, w, b: x @ w.transpose(0, 1)),
    "@ from the left": Form((3, 4), lambda x, w, b: (w @ x.mT).mT),
    "@ from the left, transposed": Form((4, 3), lambda x, w, b: (w.T @ x.mT).mT, turned),
    "__rmatmul__": Form((4, 3), lambda x, w, b: w.__rmatmul__(x), turned),
    "mm": Form(
        (4, 3), lambda x, w, b: torch.mm(x.reshape(-1, 4), w).view(*x.shape[:-1], 3), turned
    ),
    "mm from the left": Form(
        (3, 4), lambda x, w, b: w.mm(x.reshape(-1, 4).T).T.reshape(*x.shape[:-1], 3)
    ),
    "bmm of one matrix": Form((4, 3), lambda x, w, b: torch.bmm(x, w.expand(len(x), 4, 3)), turned),
    "inner": Form((3, 4), lambda x, w, b: torch.inner(x, w)),
    "tensordot": Form((4, 3), lambda x, w, b: torch.tensordot(x, w, 1), turned),
    "tensordot, axes": Form((3, 4), lambda x, w, b: torch.tensordot(x, w, ([2], [1]))),
    "tensordot from the left": Form(
        (3, 4), lambda x, w, b: torch.tensordot(w, x, ([1], [2])).permute(1, 2, 0)
    ),
    # ------------------------------------------------------------ einsum
    "einsum": Form((4, 3), lambda x, w, b: torch.einsum("nti,io->nto", x, w), turned),
    "einsum, outputs first": Form((3, 4), lambda x, w, b: torch.einsum("nti,oi->nto", x, w)),
    "einsum, weight first": Form((3, 4), lambda x, w, b: torch.einsum("oi, nti -> nto", w, x)),
    "einsum, list": Form((4, 3), lambda x, w, b: torch.einsum("nti,io->nto", [x, w]), turned),
    "einsum, ellipsis": Form((4, 3), lambda x, w, b: torch.einsum("...i,io->...o", x, w), turned),
    "einsum, implicit": Form((4, 3), lambda x, w, b: torch.einsum("abi,ix", x, w), turned),
    "einsum, outputs elsewhere": Form(
        (4, 3), lambda x, w, b: torch.einsum("nti,io->ont", x, w).permute(1, 2, 0), turned
    ),
    "einsum, heads": Form(
        (4, 3, 2),
        lambda x, w, b: torch.einsum("nti,ihd->nthd", x, w).flatten(2),
        lambda w: [w.reshape(4, 6).T],
    ),
    "einsum, heads to outputs": Form(
        (2, 2, 3),
        lambda x, w, b: torch.einsum("nthd,hdo->nto", x.unflatten(2, (2, 2)), w),
        lambda w: [w.reshape(4, 3).T],
    ),
    # ------------------------------------------------------------ blocks of a matrix
    "row blocks": Form(
        (6, 4),
        lambda x, w, b: torch.cat([F.linear(x, w[:3]), F.linear(x, w[3:])], -1),
        lambda w: [w[:3], w[3:]],
    ),
    "row blocks, slices of the bias": Form(
        (9, 4),
        lambda x, w, b: torch.cat(
            [F.linear(x, w[i:j], b[i:j]) for i, j in ((0, 2), (2, 5), (5, 9))], -1
        ),
        three,
        9,
        three,
    ),
    "row blocks, split": Form(
        (9, 4),
        lambda x, w, b: torch.cat(
            [*map(F.linear, 3 * [x], w.split([2, 3, 4]), b.split([2, 3, 4]))], -1
        ),
        three,
        9,
        three,
    ),
    "row blocks, chunk": Form(
        (6, 4),
        lambda x, w, b: torch.cat([x @ part.T for part in w.chunk(3)], -1),
        lambda w: [*w.chunk(3)],
    ),
    "row blocks, narrow": Form(
        (6, 4),
        lambda x, w, b: torch.cat([x @ w.narrow(0, i, 2).T for i in (0, 2, 4)], -1),
        lambda w: [*w.chunk(3)],
    ),
    "row blocks of inputs": Form(
        (8, 3),
        lambda x, w, b: torch.cat([x @ w[:4], x @ w[4:]], -1),
        lambda w: [w[:4].T, w[4:].T],
    ),
    "column blocks": Form(
        (4, 6),
        lambda x, w, b: torch.cat([x @ w[:, :2], x @ w[:, 2:]], -1),
        lambda w: [w[:, :2].T, w[:, 2:].T],
    ),
    "column blocks of outputs first": Form(
        (3, 4),
        lambda x, w, b: torch.cat(
            [F.linear(x[..., :1], w[:, :1]), F.linear(x[..., 1:], w[:, 1:])], -1
        ),
        lambda w: [w[:, :1], w[:, 1:]],
        takes=lambda x: [x[..., :1], x[..., 1:]],
    ),
    "quarters": Form(
        (6, 4),
        lambda x, w, b: torch.cat(
            [F.linear(x[..., j : j + 2], w[i : i + 3, j : j + 2]) for i in (0, 3) for j in (0, 2)],
            -1,
        ),
        lambda w: [w[i : i + 3, j : j + 2] for i in (0, 3) for j in (0, 2)],
        takes=lambda x: 2 * [x[..., :2], x[..., 2:]],
    ),
    # ------------------------------------------------------------ entries of a stack
    "unbind": Form(
        (2, 3, 4),
        lambda x, w, b: torch.cat([F.linear(x, part) for part in w.unbind()], -1),
        lambda w: [*w],
    ),
    "entries": Form(
        (2, 4, 3), lambda x, w, b: torch.cat([x @ w[0], x @ w[-1]], -1), lambda w: [w[0].T, w[1].T]
    ),
    "entries, iterated": Form(
        (2, 4, 3),
        lambda x, w, b: torch.cat([x @ each for each in w], -1),
        lambda w: [w[0].T, w[1].T],
    ),
    "entries, select": Form(
        (2, 3, 4),
        lambda x, w, b: torch.cat([F.linear(x, w.select(0, e)) for e in (1, 0)], -1),
        lambda w: [w[1], w[0]],
    ),
}
"""Inputs are ``[N, T, 4]``."""


def to_stack(x: Tensor) -> Tensor:
    """Every token to each of two matrices, as ``[2, n, 4]``."""
    return torch.stack([x.reshape(-1, 4), x.reshape(-1, 4).sin()])


def of_stack(x: Tensor) -> list[Tensor]:
    return [x, x.sin()]


def joined(y: Tensor, x: Tensor) -> Tensor:
    """``[2, n, C]`` as ``[N, T, 2 C]``."""
    return y.movedim(0, 1).reshape(*x.shape[:-1], -1)


def loop(x: Tensor, w: Tensor, b: Any) -> Tensor:
    """Tokens with a positive first feature go to one expert, the others to another one."""
    rows = x.reshape(-1, 4)
    out = rows.new_zeros(len(rows), 3)
    for e, chosen in enumerate((rows[:, 0] > 0, rows[:, 0] <= 0)):
        place = chosen.nonzero()[:, 0]
        out = out.index_add(0, place, F.linear(rows[place], w[e]))
    return out.view(*x.shape[:-1], 3)


def loop_takes(x: Tensor) -> list[Tensor]:
    rows = x.reshape(-1, 4)
    return [rows[rows[:, 0] > 0], rows[rows[:, 0] <= 0]]


def sorted_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, 4)
    first = (rows[:, 0] > 0).nonzero()[:, 0]
    second = (rows[:, 0] <= 0).nonzero()[:, 0]
    ends = torch.tensor([len(first), len(rows)], dtype=torch.int32)
    return rows[torch.cat([first, second])], ends, torch.cat([first, second])


def grouped(x: Tensor, w: Tensor, function: Any) -> Tensor:
    rows, ends, order = sorted_rows(x)
    out = function(rows.float(), w.float(), offs=ends).double()
    return torch.zeros_like(out).index_copy(0, order, out).view(*x.shape[:-1], 4)


def chosen_by_index(x: Tensor, w: Tensor, b: Any) -> Tensor:
    """A copy of its expert's matrix for every token."""
    rows = x.reshape(-1, 4)
    experts = (rows[:, 0] <= 0).long()
    return torch.bmm(w[experts], rows.unsqueeze(-1)).squeeze(-1).view(*x.shape[:-1], 3)


def unsorted(outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs)


def experts_first(w: Tensor) -> list[Tensor]:
    return [w[0].T, w[1].T]


ROUTED = {"takes": loop_takes, "joins": unsorted}
STACKS: dict[str, Form] = {
    "bmm": Form(
        (2, 4, 3),
        lambda x, w, b: joined(torch.bmm(to_stack(x), w), x),
        experts_first,
        takes=of_stack,
    ),
    "matmul of stacks": Form(
        (2, 4, 3), lambda x, w, b: joined(to_stack(x) @ w, x), experts_first, takes=of_stack
    ),
    "matmul of stacks, transposed": Form(
        (2, 3, 4), lambda x, w, b: joined(to_stack(x) @ w.mT, x), lambda w: [*w], takes=of_stack
    ),
    "matmul of stacks from the left": Form(
        (2, 3, 4),
        lambda x, w, b: joined((w @ to_stack(x).mT).mT, x),
        lambda w: [*w],
        takes=of_stack,
    ),
    "einsum of stacks": Form(
        (2, 4, 3),
        lambda x, w, b: joined(torch.einsum("eni,eio->eno", to_stack(x), w), x),
        experts_first,
        takes=of_stack,
    ),
    "einsum of stacks, elsewhere": Form(
        (2, 3, 4),
        lambda x, w, b: torch.einsum("ntei,eoi->nteo", torch.stack([x, x.sin()], 2), w).flatten(2),
        lambda w: [*w],
        takes=of_stack,
    ),
    "experts in a loop": Form((2, 3, 4), loop, lambda w: [*w], **ROUTED),
    "experts by an index vector": Form((2, 3, 4), chosen_by_index, lambda w: [*w], **ROUTED),
}
"""Routed tokens keep no order in stock layers, which the loss does not see."""
if hasattr(torch, "_grouped_mm"):
    STACKS["torch._grouped_mm"] = Form(
        (2, 4, 4),
        lambda x, w, b: grouped(x, w, torch._grouped_mm),
        experts_first,
        tolerance=1e-5,
        **ROUTED,
    )
if hasattr(F, "grouped_mm"):
    STACKS["F.grouped_mm"] = Form(
        (2, 4, 4),
        lambda x, w, b: grouped(x, w, F.grouped_mm),
        experts_first,
        tolerance=1e-5,
        **ROUTED,
    )


class Using(nn.Module):
    """A supported layer, and a parameter that is multiplied with by a function."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(form.shape) / 2)
        self.bias = nn.Parameter(torch.randn(form.bias)) if form.bias else None
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4] -> [N, T, outputs]``."""
        return self.form.run(torch.tanh(self.first(x)), self.weight, self.bias)


class Stock(nn.Module):
    """The same of stock layers."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        views, joint = form.weights(torch.zeros(form.shape)), form.bias > 0 and not form.added
        self.layers = nn.ModuleList(nn.Linear(*view.T.shape, bias=joint) for view in views)
        self.bias = nn.Parameter(torch.zeros(form.bias)) if form.added else None
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4] -> [N, T, outputs]``, perhaps in another order."""
        form, x = self.form, torch.tanh(self.first(x))
        for call in range(form.calls):
            taken = form.takes(x) if form.takes else [x] * len(self.layers)
            x = form.joins([layer(part) for layer, part in zip(self.layers, taken, strict=True)])
            x = x if call + 1 == form.calls else torch.tanh(x)
        return x if self.bias is None else x + self.bias


def pairs(used: Using, stock: Stock) -> list[tuple[Tensor, Tensor]]:
    """What has to be equal: views of parameters of one, and parameters of the other."""
    form = used.form
    found = [*zip(used.first.parameters(), stock.first.parameters(), strict=True)]
    found += zip(
        form.weights(used.weight.detach()), (la.weight for la in stock.layers), strict=True
    )
    if used.bias is not None:
        own = [stock.bias] if form.added else [layer.bias for layer in stock.layers]
        found += zip(form.biases(used.bias.detach()), own, strict=True)
    return found


def twins(form: Form) -> tuple[Using, Stock]:
    """Both with the same weights, in float64."""
    torch.manual_seed(0)
    used, stock = Using(form).double(), Stock(form).double()
    copy_weights(pairs(used, stock))
    return used, stock
