"""Models that use weights by themselves, and the same ones of stock layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES, TOKENS, WIDTH = 6, 4, 8
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A model, what it is rewritten as, and what it is called with.

    Attributes:
        build: Makes the model.
        rewrite: Makes, of the model, one of stock layers, and pairs of tensors that are the same:
            (parts of) parameters of the model, and parameters of the other.
        inputs: What both are called with.
    """

    build: Callable[[], nn.Module]
    rewrite: Callable[[Any], tuple[nn.Module, Pairs]]
    inputs: Callable[[], tuple[Tensor, ...]]


class Uses(nn.Module):
    """A weight ``[out, in]`` or of another shape, a bias, and a function of both and the input."""

    def __init__(self, shape: Sequence[int], bias: int, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape) / 3)
        self.b = nn.Parameter(torch.randn(bias) / 3) if bias else None
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w, self.b)


class Maps(nn.Module):
    """The same function, given stock layers."""

    def __init__(self, layers: Sequence[nn.Module], use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers, self.use = nn.ModuleList(layers), use

    def forward(self, *args: Tensor) -> Tensor:
        return self.use(self.layers, *args)


def sequences() -> tuple[Tensor, ...]:
    return (torch.randn(SAMPLES, TOKENS, WIDTH),)


def vectors() -> tuple[Tensor, ...]:
    return (torch.randn(SAMPLES, WIDTH),)


# ------------------------------------------------------------------------------- whole weights


def whole(
    use: Callable[..., Tensor],
    *,
    bias: bool = True,
    turned: bool = False,
    calls: int = 1,
    inputs: Callable[[], tuple[Tensor, ...]] = sequences,
) -> Case:
    """One matrix, used as a linear layer is, perhaps several times."""
    out = WIDTH if calls > 1 else 5

    def rewrite(model: Uses) -> tuple[nn.Module, Pairs]:
        layer = nn.Linear(WIDTH, out, bias=bias)
        pairs = [(model.w.detach().T if turned else model.w.detach(), layer.weight)]
        if bias:
            assert model.b is not None
            pairs.append((model.b.detach(), layer.bias))

        def repeated(layers: Any, x: Tensor) -> Tensor:
            for _ in range(calls - 1):
                x = layers[0](x).tanh()
            return layers[0](x)

        return Maps([layer], repeated), pairs

    shape = (WIDTH, out) if turned else (out, WIDTH)
    return Case(lambda: Uses(shape, out * bias, use), rewrite, inputs)


def flattened(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """As Conv1D of transformers."""
    return torch.addmm(b, x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], -1)


def twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.linear(x, w, b).tanh(), w, b)


class OwnForward(nn.Linear):
    """A subclass that computes what its base does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Reader(nn.Module):
    """Reads the weight of a child that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.child.weight, self.child.bias)


def of_module(build: Callable[[], nn.Module], layer: Callable[[Any], Any]) -> Case:
    """A module around a linear layer."""

    def rewrite(model: Any) -> tuple[nn.Module, Pairs]:
        new, old = nn.Linear(WIDTH, 5), layer(model)
        pairs = [(old.weight.detach(), new.weight), (old.bias.detach(), new.bias)]
        return Maps([new], lambda layers, x: layers[0](x)), pairs

    return Case(build, rewrite, sequences)


WHOLE: dict[str, Case] = {
    "F.linear": whole(lambda x, w, b: F.linear(x, w, b)),
    "F.linear without bias": whole(lambda x, w, b: F.linear(x, w), bias=False),
    "F.linear of vectors": whole(lambda x, w, b: F.linear(x, w, b), inputs=vectors),
    "a child's weight": of_module(Reader, lambda model: model.child),
    "a subclass": of_module(lambda: OwnForward(WIDTH, 5), lambda model: model),
    "addmm": whole(flattened, turned=True),
    "matmul": whole(lambda x, w, b: torch.matmul(x, w), bias=False, turned=True),
    "@": whole(lambda x, w, b: x @ w, bias=False, turned=True),
    "@ of the transposed": whole(lambda x, w, b: x @ w.T, bias=False),
    "mm": whole(lambda x, w, b: torch.mm(x, w.t()), bias=False, inputs=vectors),
    "from the left": whole(lambda x, w, b: (w @ x.mT).mT, bias=False),
    "mm from the left": whole(lambda x, w, b: w.mm(x.T).T, bias=False, inputs=vectors),
    "F.linear of the transposed": whole(
        lambda x, w, b: F.linear(x, w.mT, b), bias=True, turned=True
    ),
    "tensordot": whole(lambda x, w, b: torch.tensordot(x, w, ([2], [1])), bias=False),
    "einsum": whole(lambda x, w, b: torch.einsum("ntc,dc->ntd", x, w), bias=False),
    "einsum, weight first": whole(lambda x, w, b: torch.einsum("dc,ntc->ntd", w, x), bias=False),
    "einsum of dots": whole(lambda x, w, b: torch.einsum("...c,cd", x, w), bias=False, turned=True),
    "einsum, turned output": whole(
        lambda x, w, b: torch.einsum("ntc,cd->dnt", x, w).permute(1, 2, 0), bias=False, turned=True
    ),
    "several calls": whole(twice, calls=2),
    "a cast that changes nothing": whole(lambda x, w, b: F.linear(x, w.type_as(x), b)),
    "a view": whole(lambda x, w, b: F.linear(x, w.view(5, WIDTH), b.view(-1))),
}


# ------------------------------------------------------------------------------- blocks


def blocks(
    use: Callable[..., Tensor],
    parts: Sequence[tuple[slice, slice]],
    rewritten: Callable[..., Tensor],
    *,
    rows: int = 3 * WIDTH,
    bias: bool = True,
) -> Case:
    """Blocks of one matrix, each used as a linear layer is."""

    def rewrite(model: Uses) -> tuple[nn.Module, Pairs]:
        layers: list[nn.Module] = []
        pairs: Pairs = []
        for outputs, inputs in parts:
            part = model.w.detach()[outputs, inputs]
            layer = nn.Linear(part.shape[1], part.shape[0], bias=bias)
            pairs.append((part, layer.weight))
            if bias:
                assert model.b is not None
                pairs.append((model.b.detach()[outputs], layer.bias))
            layers.append(layer)
        return Maps(layers, rewritten), pairs

    return Case(lambda: Uses((rows, WIDTH), rows * bias, use), rewrite, sequences)


def three(first: int, second: int, third: int) -> list[tuple[slice, slice]]:
    ends = [0, first, first + second, first + second + third]
    return [(slice(a, b), slice(None)) for a, b in itertools.pairwise(ends)]


def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Something of three maps in which none is like another."""
    return torch.cat((q.tanh(), 2 * k.sigmoid(), v), -1)


def by_layers(layers: Any, x: Tensor) -> Tensor:
    return joined(*(layer(x) for layer in layers))


def chunked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return joined(*(F.linear(x, u, c) for u, c in zip(w.chunk(3), b.chunk(3), strict=True)))


def unequal(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    sizes = (WIDTH, 4, 12)
    parts = zip(w.split(sizes), b.split(sizes), strict=True)
    return joined(*(F.linear(x, u, c) for u, c in parts))


def sliced(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    q, k, v = w[:WIDTH], w.narrow(0, WIDTH, WIDTH), w[2 * WIDTH :]
    return joined(F.linear(x, q), F.linear(x, k), x @ v.T)


def unbound(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return joined(*(x @ u.T for u in w.view(3, WIDTH, WIDTH).unbind()))


def columns(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x[..., :3], w[:, :3]) * F.linear(x[..., 3:], w[:, 3:])


def columns_by_layers(layers: Any, x: Tensor) -> Tensor:
    return layers[0](x[..., :3]) * layers[1](x[..., 3:])


BLOCKS: dict[str, Case] = {
    "chunks": blocks(chunked, three(WIDTH, WIDTH, WIDTH), by_layers),
    "unequal parts": blocks(unequal, three(WIDTH, 4, 12), by_layers),
    "slices": blocks(sliced, three(WIDTH, WIDTH, WIDTH), by_layers, bias=False),
    "unbound": blocks(unbound, three(WIDTH, WIDTH, WIDTH), by_layers, bias=False),
    "columns": blocks(
        columns,
        [(slice(None), slice(3)), (slice(None), slice(3, None))],
        columns_by_layers,
        rows=5,
        bias=False,
    ),
}


# ------------------------------------------------------------------------------- attention


class Attends(nn.Module):
    """Attention, and what it is called with."""

    def __init__(self, call: Callable[..., Tensor], **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **kwargs)
        self.call = call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call(self.attention, x, y)


def attended(layers: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Attention of stock layers; ``[N, L, C]``."""
    heads = [
        layer(t).unflatten(-1, (2, -1)).transpose(1, 2)
        for layer, t in zip(layers, (q, k, v), strict=False)
    ]
    found = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    return layers[3](found.transpose(1, 2).flatten(2))


def attention(call: Callable[..., Tensor], rewritten: Callable[..., Tensor], **kwargs: Any) -> Case:
    """``nn.MultiheadAttention`` as four linear layers."""

    def rewrite(model: Attends) -> tuple[nn.Module, Pairs]:
        old, bias = model.attention, kwargs.get("bias", True)
        if old.in_proj_weight is not None:
            weights = old.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(
                w.detach() for w in (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight)
            )
        layers = [nn.Linear(w.shape[1], WIDTH, bias=bias) for w in weights]
        layers.append(nn.Linear(WIDTH, WIDTH, bias=bias))
        olds = [*weights, old.out_proj.weight.detach()]
        pairs = [(o, layer.weight) for o, layer in zip(olds, layers, strict=True)]
        if bias:
            biases = [*old.in_proj_bias.detach().chunk(3), old.out_proj.bias.detach()]
            pairs += [(o, layer.bias) for o, layer in zip(biases, layers, strict=True)]
        return Maps(layers, rewritten), pairs

    def inputs() -> tuple[Tensor, ...]:
        width = kwargs.get("kdim", WIDTH)
        return torch.randn(SAMPLES, TOKENS, WIDTH), torch.randn(SAMPLES, 3, width)

    return Case(lambda: Attends(call, **kwargs), rewrite, inputs)


def itself(layers: Any, x: Tensor, y: Tensor) -> Tensor:
    return attended(layers, x, x, x)


def across(layers: Any, x: Tensor, y: Tensor) -> Tensor:
    return attended(layers, x, y, y)


CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
PADDED = torch.zeros(SAMPLES, TOKENS, dtype=torch.bool)
PADDED[1::2, -1] = True

ATTENTION: dict[str, Case] = {
    "batch first": attention(
        lambda a, x, y: a(x, x, x, need_weights=False)[0], itself, batch_first=True
    ),
    "sequence first": attention(
        lambda a, x, y: a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
        itself,
    ),
    "one tensor": attention(
        lambda a, x, y: a(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1), itself
    ),
    "with weights": attention(lambda a, x, y: a(x, x, x)[0], itself, batch_first=True),
    "without bias": attention(lambda a, x, y: a(x, x, x)[0], itself, batch_first=True, bias=False),
    "across": attention(lambda a, x, y: a(x, y, y)[0], across, batch_first=True),
    "own widths": attention(
        lambda a, x, y: a(x, y, y)[0], across, batch_first=True, kdim=6, vdim=6
    ),
    "causal": attention(
        lambda a, x, y: a(x, x, x, attn_mask=~CAUSAL, is_causal=True, need_weights=False)[0],
        lambda layers, x, y: attended(layers, x, x, x, CAUSAL),
        batch_first=True,
    ),
    "padded": attention(
        lambda a, x, y: a(x, x, x, key_padding_mask=PADDED)[0],
        lambda layers, x, y: attended(layers, x, x, x, ~PADDED[:, None, None, :]),
        batch_first=True,
    ),
    "three inputs": attention(
        lambda a, x, y: a(x, x.sin(), x.cos())[0],
        lambda layers, x, y: attended(layers, x, x.sin(), x.cos()),
        batch_first=True,
    ),
}


# ------------------------------------------------------------------------------- convolutions


def convolution(
    kind: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], size: Sequence[int]
) -> Case:
    """The weight of a convolution, used by the function."""
    layer_of = lambda: kind(*args, **kwargs)  # noqa: E731
    function = getattr(F, kind.__name__.lower().replace("transpose", "_transpose"))
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    options = {name: kwargs[name] for name in names if name in kwargs}
    like = layer_of()

    def rewrite(model: Uses) -> tuple[nn.Module, Pairs]:
        layer: Any = layer_of()
        assert model.b is not None
        pairs = [(model.w.detach(), layer.weight), (model.b.detach(), layer.bias)]
        return Maps([layer], lambda layers, x: layers[0](x)), pairs

    def build() -> nn.Module:
        use = lambda x, w, b: function(x, w, b, **options)  # noqa: E731
        return Uses(like.weight.shape, len(like.bias), use)

    return Case(build, rewrite, lambda: (torch.randn(SAMPLES, args[0], *size),))


class Same(nn.Conv2d):
    """Pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def padded_before() -> Case:
    def rewrite(model: Same) -> tuple[nn.Module, Pairs]:
        layer = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        assert model.bias is not None
        pairs = [(model.weight.detach(), layer.weight), (model.bias.detach(), layer.bias)]
        return Maps([layer], lambda layers, x: layers[0](F.pad(x, (0, 1, 0, 1)))), pairs

    return Case(
        lambda: Same(4, 6, 3, stride=2, groups=2), rewrite, lambda: (torch.randn(SAMPLES, 4, 6, 6),)
    )


CONVOLUTIONS: dict[str, Case] = {
    "conv1d": convolution(nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1}, (9,)),
    "conv2d, groups": convolution(
        nn.Conv2d, (4, 6, 3), {"padding": "same", "groups": 2, "dilation": 2}, (6, 5)
    ),
    "conv2d, depthwise": convolution(nn.Conv2d, (4, 4, 3), {"groups": 4}, (5, 5)),
    "conv3d": convolution(nn.Conv3d, (2, 3, 2), {"padding": 1}, (3, 4, 3)),
    "conv_transpose1d": convolution(nn.ConvTranspose1d, (4, 3, 3), {"stride": 2}, (5,)),
    "conv_transpose2d": convolution(
        nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "output_padding": 1, "groups": 2}, (4, 4)
    ),
    "conv_transpose3d": convolution(nn.ConvTranspose3d, (2, 3, 2), {}, (2, 3, 2)),
    "padded before": padded_before(),
}


# ------------------------------------------------------------------------------- stacks

EXPERTS, OUT = 3, 4
CHOICE = torch.tensor(
    [[0, 1, 1, 2], [2, 0, 0, 1], [1, 1, 0, 0], [0, 2, 2, 1], [2, 2, 2, 0], [1, 0, 0, 2]]
)


def looped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:-1], OUT)
    for e in range(EXPERTS):
        chosen = e == CHOICE
        out[chosen] = F.linear(x[chosen], w[e])
    return out


def looped_by_layers(layers: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:-1], OUT)
    for e, layer in enumerate(layers):
        chosen = e == CHOICE
        out[chosen] = layer(x[chosen])
    return out


def multiplied(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """All experts see all tokens: ``[E, N * T, C]``."""
    each = x.flatten(0, 1).expand(EXPERTS, -1, -1)
    return torch.bmm(each, w).tanh().sum(0).unflatten(0, x.shape[:2])


def stack(
    use: Callable[..., Tensor], rewritten: Callable[..., Tensor], turned: bool = False
) -> Case:
    """A stack of matrices, each used as a linear layer is."""

    def rewrite(model: Uses) -> tuple[nn.Module, Pairs]:
        layers = [nn.Linear(WIDTH, OUT, bias=False) for _ in range(EXPERTS)]
        olds = model.w.detach().mT if turned else model.w.detach()
        return Maps(layers, rewritten), [
            (old, layer.weight) for old, layer in zip(olds, layers, strict=True)
        ]

    shape = (EXPERTS, WIDTH, OUT) if turned else (EXPERTS, OUT, WIDTH)
    return Case(lambda: Uses(shape, 0, use), rewrite, sequences)


def multiplied_by_layers(layers: Any, x: Tensor) -> Tensor:
    each = torch.stack([layer(x.flatten(0, 1)) for layer in layers])
    return each.tanh().sum(0).unflatten(0, x.shape[:2])


def as_one() -> Case:
    """A product that has all outputs of all matrices is one of one matrix."""

    def use(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ntc,edc->entd", x, w).tanh().sum(0)

    def rewritten(layers: Any, x: Tensor) -> Tensor:
        return layers[0](x).unflatten(-1, (EXPERTS, OUT)).tanh().sum(-2)

    def rewrite(model: Uses) -> tuple[nn.Module, Pairs]:
        layer = nn.Linear(WIDTH, EXPERTS * OUT, bias=False)
        return Maps([layer], rewritten), [(model.w.detach().flatten(0, 1), layer.weight)]

    return Case(lambda: Uses((EXPERTS, OUT, WIDTH), 0, use), rewrite, sequences)


def grouped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Rows sorted by expert, one call for all."""
    order = CHOICE.flatten().argsort(stable=True)
    ends = CHOICE.flatten().bincount(minlength=EXPERTS).cumsum(0).int()
    rows = torch._grouped_mm(x.flatten(0, 1)[order], w, offs=ends)
    return torch.zeros_like(rows).index_copy(0, order, rows).unflatten(0, x.shape[:2])


STACKS: dict[str, Case] = {
    "a loop": stack(looped, looped_by_layers),
    "a loop of the transposed": stack(
        lambda x, w, b: looped(x, w.mT, b), looped_by_layers, turned=True
    ),
    "bmm": stack(multiplied, multiplied_by_layers, turned=True),
    "matmul": stack(lambda x, w, b: multiplied(x, w.mT, b), multiplied_by_layers),
    "einsum": stack(
        lambda x, w, b: (
            torch.einsum("entc,edc->nted", x.expand(EXPERTS, *x.shape), w).tanh().sum(2)
        ),
        multiplied_by_layers,
    ),
    "einsum, one matrix": as_one(),
}

SINGLE: dict[str, Case] = {"grouped_mm": stack(grouped, looped_by_layers, turned=True)}
"""Cases of what torch has in single precision alone."""


def added(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    each = x.flatten(0, 1).expand(EXPERTS, -1, -1)
    return torch.baddbmm(x.new_ones(1, 1, 1), each, w).tanh().sum(0).unflatten(0, x.shape[:2])


def added_by_layers(layers: Any, x: Tensor) -> Tensor:
    each = torch.stack([layer(x.flatten(0, 1)) for layer in layers]) + 1
    return each.tanh().sum(0).unflatten(0, x.shape[:2])


STACKS["baddbmm"] = stack(added, added_by_layers, turned=True)


class Grouped(nn.Linear):
    """A linear layer whose rows of outputs have inputs of their own."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.view(2, -1, self.in_features).transpose(1, 2)
        y = torch.bmm(x.reshape(-1, 2, self.in_features).transpose(0, 1), w)
        return y.transpose(0, 1).reshape(*x.shape[:-2], 2, -1)


def of_groups() -> Case:
    def rewritten(layers: Any, x: Tensor) -> Tensor:
        return torch.stack([layers[0](x[..., 0, :]), layers[1](x[..., 1, :])], -2)

    def rewrite(model: Grouped) -> tuple[nn.Module, Pairs]:
        layers = [nn.Linear(WIDTH, 3, bias=False) for _ in range(2)]
        halves = model.weight.detach().chunk(2)
        return Maps(layers, rewritten), [
            (half, layer.weight) for half, layer in zip(halves, layers, strict=True)
        ]

    return Case(
        lambda: Grouped(WIDTH, 6, bias=False),
        rewrite,
        lambda: (torch.randn(SAMPLES, TOKENS, 2, WIDTH),),
    )


STACKS["blocks of a matrix"] = of_groups()

CASES = {
    **WHOLE,
    **BLOCKS,
    **{f"attention, {name}": case for name, case in ATTENTION.items()},
    **CONVOLUTIONS,
    **{f"stack, {name}": case for name, case in STACKS.items()},
}
