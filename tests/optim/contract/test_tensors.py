"""torch's contract: strides, dtypes, shapes, and gradients of every kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.contract import Behaviours, Check, Make, assert_close_weights, batches, moved, tiny
from oracles.loops import assert_same_weights, fit, weights

behaviour = Behaviours()
Layout = Callable[[Tensor], Tensor]


def every_second(t: Tensor) -> Tensor:
    """A view that leaves out every other number."""
    return torch.full((*t.shape, 2), 7.0, dtype=t.dtype)[..., 0].copy_(t)


def reversed_axes(t: Tensor) -> Tensor:
    """In memory the last axis comes first: a transposed matrix."""
    axes = tuple(reversed(range(t.ndim)))
    return t.permute(axes).contiguous().permute(axes)


def narrowed(t: Tensor) -> Tensor:
    """The first columns of something wider."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), 7.0, dtype=t.dtype)
    return wide[..., : t.shape[-1]].copy_(t)


def cut_from_a_buffer(t: Tensor) -> Tensor:
    """A view of a flat buffer, from an odd place on."""
    return torch.full((t.numel() + 3,), 7.0, dtype=t.dtype)[1:-2].view(t.shape).copy_(t)


def channels_last(t: Tensor) -> Tensor:
    """For images, or for volumes; all else stays."""
    kinds = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=kinds[t.ndim]) if t.ndim in kinds else t.clone()


LAYOUTS: dict[str, Layout] = {
    "every second": every_second,
    "transposed": reversed_axes,
    "narrowed": narrowed,
    "cut from a buffer": cut_from_a_buffer,
    "channels_last": channels_last,
}


class Laid(nn.Module):
    """A layer, and parameters of no layer, all of the layer's number of axes."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        kinds: dict[int, Any] = {2: nn.Linear, 4: nn.Conv2d, 5: nn.Conv3d}
        self.layer = kinds[axes](3, 5, *([2] if axes > 2 else []))
        self.table = nn.Parameter(torch.randn_like(self.layer.weight))
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3, ...]`` to ``[N, 5]``."""
        y = self.layer(x).flatten(2).mean(2) if x.ndim > 2 else self.layer(x)
        shift: Tensor = self.table.flatten(1).square().mean(1)
        return self.scale * y + shift


def laid(axes: int) -> Laid:
    """The same network at every call."""
    torch.manual_seed(0)
    return Laid(axes).double()


def lay(model: nn.Module, layout: Layout) -> None:
    """Give all parameters other strides."""
    for p in model.parameters():
        p.data = layout(p.data)


def images(axes: int, start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of vectors, images or volumes."""
    found = []
    for step in range(start, start + count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, *[4] * (axes - 2), generator=generator, dtype=torch.float64)
        found.append((x, torch.randn(6, 5, generator=generator, dtype=torch.float64)))
    return found


PLACES = {f"{name}, {axes} axes": (axes, LAYOUTS[name]) for name in LAYOUTS for axes in (2, 4)}
PLACES["channels_last, 5 axes"] = (5, channels_last)
del PLACES["channels_last, 2 axes"]


@behaviour.over(PLACES)
def parameters(make: Make, case: tuple[int, Layout]) -> None:
    """Their strides change nothing, and are kept."""
    axes, layout = case
    model, twin = laid(axes), laid(axes)
    lay(model, layout)
    strides = [p.stride() for p in model.parameters()]
    fit(model, make(model.parameters(), lr=0.01, weight_decay=0.1), images(axes, 0, 5))
    fit(twin, make(twin.parameters(), lr=0.01, weight_decay=0.1), images(axes, 0, 5))
    assert_close_weights(model, twin)
    assert [p.stride() for p in model.parameters()] == strides


@behaviour.over(PLACES)
def what_lies_between_parameters(make: Make, case: tuple[int, Layout]) -> None:
    """Other numbers of the same memory are not touched."""
    axes, layout = case
    model = laid(axes)
    lay(model, layout)
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    fit(model, optimizer, images(axes, 0, 3))
    for p in model.parameters():
        whole = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())
        assert (whole == 7).sum() >= len(whole) - p.numel()


@behaviour.over(PLACES)
def parameters_laid_out_anew(make: Make, case: tuple[int, Layout]) -> None:
    """After some steps, when there is state: as ``model.to(memory_format=...)`` does."""
    axes, layout = case
    model, twin = laid(axes), laid(axes)
    optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
    for start, change in ((0, layout), (3, torch.clone), (6, layout)):
        fit(model, optimizer, images(axes, start, 3))
        fit(twin, other, images(axes, start, 3))
        lay(model, change)
    assert_close_weights(model, twin)


@behaviour.over(PLACES)
def checkpoints(make: Make, case: tuple[int, Layout]) -> None:
    """State of one layout is loaded into another, both ways."""
    axes, layout = case
    twin = laid(axes)
    fit(twin, make(twin.parameters(), lr=0.01), images(axes, 0, 6))
    for first, second in ((layout, torch.clone), (torch.clone, layout)):
        model, other = laid(axes), laid(axes)
        lay(model, first)
        optimizer = make(model.parameters(), lr=0.01)
        fit(model, optimizer, images(axes, 0, 3))
        other.load_state_dict(model.state_dict())
        lay(other, second)
        loaded = make(other.parameters())
        loaded.load_state_dict(optimizer.state_dict())
        fit(other, loaded, images(axes, 3, 3))
        assert_close_weights(other, twin)


def negated_bit(t: Tensor) -> Tensor:
    """Minus something, which is only noted."""
    return torch._neg_view(-t)


def with_a_graph(t: Tensor) -> Tensor:
    """As ``backward(create_graph=True)`` leaves it."""
    return t * torch.ones((), dtype=t.dtype, requires_grad=True)


GRADIENTS = {**LAYOUTS, "negated": negated_bit, "with a graph": with_a_graph}


@behaviour.over(GRADIENTS)
def gradients(make: Make, case: Layout) -> None:
    """Set by hand in any layout, they are the same gradients."""
    for axes in (2, 4):
        model, twin = laid(axes), laid(axes)
        optimizer, other = (make(m.parameters(), lr=0.01) for m in (model, twin))
        for batch in images(axes, 0, 4):
            fit(twin, other, [batch])
            x, y = batch
            optimizer.zero_grad()
            (model(x) - y).square().flatten(1).sum(1).mean().backward()
            for p in model.parameters():
                p.grad = case(p.grad)
            optimizer.step()
        assert_close_weights(model, twin)


@behaviour
def expanded_gradients(make: Make) -> None:
    """One number stands for all."""
    models = []
    for expanded in (True, False):
        model = laid(2)
        optimizer = make(model.parameters(), lr=0.01)
        for step in range(3):
            for p in model.parameters():
                g = torch.tensor(1.0 + step, dtype=p.dtype).expand_as(p)
                p.grad = g if expanded else g.clone()
            optimizer.step()
        models.append(model)
    assert_close_weights(*models)


@behaviour
def expanded_parameters_are_an_error(make: Make) -> None:
    """One number cannot take several steps."""
    buffer = torch.ones(12)  # no less than a kernel would write that takes it for contiguous
    p = nn.Parameter(buffer[:4].view(1, 4).expand(3, 4))
    optimizer = make([p], lr=0.01, weight_decay=0.1)
    p.grad = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step()
    assert (buffer == 1).all()


# --- complex numbers ----------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {"0-d": (), "1-d": (5,), "2-d": (3, 4), "empty": (0, 3)}


@behaviour.over(SHAPES)
def complex_parameters(make: Make, case: tuple[int, ...]) -> None:
    """They are pairs of real ones."""
    model, twin = tiny(), tiny()
    start, target = torch.randn(2, *case, dtype=torch.complex128)
    p = nn.Parameter(start.clone())
    q = nn.Parameter(torch.view_as_real(start).clone())
    optimizer = make([p, *model.parameters()], lr=0.01, weight_decay=0.1)
    other = make([q, *twin.parameters()], lr=0.01, weight_decay=0.1)
    for batch in batches(0, 5):
        for m, o, gap in ((model, optimizer, p - target), (twin, other, None)):
            x, y = batch
            o.zero_grad()
            gap = torch.view_as_complex(q) - target if gap is None else gap
            ((m(x) - y).square().sum(1).mean() + gap.abs().square().sum()).backward()
            o.step()
    torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach(), rtol=1e-9, atol=1e-12)
    assert_close_weights(model, twin)
    assert p.numel() == 0 or not torch.equal(p, start)


@behaviour
def complex_parameters_in_any_layout(make: Make) -> None:
    """Their strides change nothing."""
    start = torch.randn(4, 5, dtype=torch.complex64)
    found = []
    for layout in (torch.clone, reversed_axes, narrowed):
        p = nn.Parameter(layout(start))
        optimizer = make([p], lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            (p - 1j).abs().square().sum().backward()
            optimizer.step()
        found.append(p.detach())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


# --- shapes -------------------------------------------------------------------------------------

EMPTY: dict[str, tuple[int, ...]] = {"(0,)": (0,), "(0, 3)": (0, 3), "(3, 0)": (3, 0)}


@behaviour.over(EMPTY)
def empty_parameters(make: Make, case: tuple[int, ...]) -> None:
    """They do no harm to the others."""
    model, twin = tiny(), tiny()
    nothing = nn.Parameter(torch.ones(case, dtype=torch.float64))
    optimizer = make([nothing, *model.parameters()], lr=0.01)
    for x, y in batches(0, 4):
        optimizer.zero_grad()
        ((model(x) - y).square().sum(1).mean() + nothing.sum()).backward()
        optimizer.step()
    fit(twin, make(twin.parameters(), lr=0.01), batches(0, 4))
    assert_same_weights(model, twin)


@behaviour
def a_layer_without_outputs(make: Make) -> None:
    """Its weight is empty, and so may be its batch."""
    model = nn.ModuleDict({"body": nn.Linear(4, 3), "none": nn.Linear(4, 0)}).double()
    optimizer = make(model.parameters(), lr=0.01)
    before = weights(model)
    for x, y in batches(0, 3):
        optimizer.zero_grad()
        loss = (model["body"](x) - y).square().sum(1).mean() + model["none"](x).sum()
        loss.backward()
        optimizer.step()
    assert moved(model, before) == {"body.weight", "body.bias"}


@behaviour
def scalars(make: Make) -> None:
    """Alone, 0-d and of one element."""
    p, q = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in ((), (1,)))
    optimizer = make([p, q], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        (p.square() + q.square().sum()).backward()
        optimizer.step()
    assert p.shape == () and q.shape == (1,)
    assert 0 < p.item() < 1
    assert q.item() == pytest.approx(p.item())


@behaviour
def lazy_modules(make: Make) -> None:
    """Parameters without a shape, which have one at the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    optimizer = make(model.parameters(), lr=0.01)
    for x, _ in batches(0, 1, torch.float32):
        model(x)
    before = weights(model)
    fit(model, optimizer, batches(0, 3, torch.float32))
    assert moved(model, before) == set(before)


# --- dtypes -------------------------------------------------------------------------------------

DTYPES = {str(kind)[6:]: kind for kind in (torch.float32, torch.bfloat16)}


@behaviour.over(DTYPES)
def lower_precision(make: Make, case: torch.dtype) -> None:
    """Stays close to float64, as far as its own rounding allows; dtypes are kept."""
    model, twin = tiny(case), tiny()
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        fit(m, make(m.parameters(), lr=0.01), batches(0, 5, next(m.parameters()).dtype))
    bound = 20 * torch.finfo(case).eps ** 0.5
    for name, p in weights(twin).items():
        q = dict(model.named_parameters())[name].detach()
        assert q.dtype == case
        assert (q.double() - p).abs().max() < bound * 0.05, name


def learns(make: Make, kind: torch.dtype) -> None:
    """Finite, and the loss falls."""
    model = tiny(kind)
    (batch,) = batches(0, 1, kind)
    losses = fit(model, make(model.parameters(), lr=0.01), [batch] * 20)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@behaviour
def bfloat16_learns(make: Make) -> None:
    """Without a scaler."""
    learns(make, torch.bfloat16)


@behaviour.beyond_torch("the moments and the eps of AdamW vanish in float16")
def float16_learns(make: Make) -> None:
    """Without a scaler."""
    learns(make, torch.float16)


@behaviour
def dtypes_in_one_group(make: Make) -> None:
    """Each parameter is stepped in its own."""
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.complex64)
    params = [nn.Parameter(torch.ones(3, dtype=kind)) for kind in kinds]
    optimizer = make(params, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.abs().square().sum().double() for p in params).backward()
        optimizer.step()
    for p, kind in zip(params, kinds, strict=True):
        assert p.dtype == kind
        assert (p.abs() < 1).all()


@behaviour
def dtypes_in_one_model(make: Make) -> None:
    """A float64 head on a float32 body, as two models of their own."""
    body, head = tiny(torch.float32), tiny()
    twins = tiny(torch.float32), tiny()
    optimizer = make([*body.parameters(), *head.parameters()], lr=0.01)
    others = [make(m.parameters(), lr=0.01) for m in twins]
    for step in range(4):
        optimizer.zero_grad()
        for m, kind in ((body, torch.float32), (head, torch.float64)):
            for x, y in batches(step, 1, kind):
                (m(x) - y).square().sum(1).mean().backward()
        optimizer.step()
        for m, o, kind in zip(twins, others, (torch.float32, torch.float64), strict=True):
            fit(m, o, batches(step, 1, kind))
    assert_same_weights(body, twins[0])
    assert_same_weights(head, twins[1])


@behaviour.for_every_kind()
def test_tensors(check: Check, make: Make) -> None:
    """Each behaviour, for each kind of optimizer."""
    check(make)
