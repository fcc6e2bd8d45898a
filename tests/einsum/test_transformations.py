"""Derivatives, batching and composition of networks against the rows that are written out."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracles.compare import assert_close
from oracles.convolutions import CONV, TRANSPOSED, Case, case
from oracles.networks import evaluate, inputs
from tnkfac.einsum import Network, functional, networks, plan, simplify
from tnkfac.einsum.network import parse
from tnkfac.einsum.operands import Delta, Ones, Pattern, Variable

TOLERANCE = 1e-12
FLOAT64 = torch.float64

each_case = pytest.mark.parametrize("name", CONV + TRANSPOSED)


def row(name: str, c: Case, *shapes: object, **more: object) -> Network:
    """A row of the table for the layer type of a case."""
    suffix = "_transpose" if c.transposed else ""
    return getattr(networks, f"{name}{suffix}")(*shapes, **c.options, **more)


def layer(c: Case) -> Network:
    return row("conv", c, c.input_shape, c.weight_shape)


def assert_same_function(actual: Network, expected: Network) -> None:
    """Same names, result shape and, for random tensors, the same result."""
    assert set(actual.names) == set(expected.names)
    assert actual.shape == expected.shape
    tensors = inputs(expected)
    literal = evaluate(expected, tensors)
    assert_close(evaluate(actual, tensors), literal, TOLERANCE)
    assert_close(plan(actual)(**tensors), literal, TOLERANCE)


def kinds(network: Network) -> Counter[type]:
    return Counter(type(op.source) for op in simplify(network).operands)


def assert_same_network(actual: Network, expected: Network) -> None:
    """Equal functions, and after simplification as many operands of every kind."""
    assert_same_function(actual, expected)
    assert kinds(actual) == kinds(expected)


# --- derivatives of a layer ---------------------------------------------------------------------


@each_case
def test_vjp(name: str) -> None:
    c = case(name)
    expected = row("weight_vjp", c, c.input_shape, c.output_shape, c.kernel_size)
    assert_same_network(layer(c).vjp("weight"), expected)
    expected = row("input_vjp", c, c.weight_shape, c.output_shape, c.input_size)
    assert_same_network(layer(c).vjp("x"), expected)


@each_case
def test_jvp(name: str) -> None:
    c = case(name)
    expected = row("weight_jvp", c, c.input_shape, c.weight_shape)
    assert layer(c).jvp("weight", "dw") == expected
    expected = row("input_jvp", c, c.input_shape, c.weight_shape)
    assert layer(c).jvp("x", "dx") == expected


@each_case
def test_jacobian(name: str) -> None:
    c = case(name)
    expected = row("weight_jacobian", c, c.input_shape, c.weight_shape)
    assert_same_network(layer(c).jacobian("weight"), expected)
    expected = row("input_jacobian", c, c.weight_shape, c.input_shape)
    assert_same_network(layer(c).jacobian("x"), expected)


@each_case
def test_derivatives_of_simplified_networks(name: str) -> None:
    """Views of tensors become views of results and the other way round."""
    c = case(name)
    small = simplify(layer(c))
    tensors = inputs(layer(c)) | {"v": c.cotangent()}
    for leaf in ("x", "weight"):
        given = {n: t for n, t in tensors.items() if n != leaf}
        expected = evaluate(layer(c).vjp(leaf), given)
        assert_close(evaluate(small.vjp(leaf), given), expected, TOLERANCE)
        assert_close(plan(small.vjp(leaf))(**given), expected, TOLERANCE)


@each_case
def test_derivatives_of_derivatives(name: str) -> None:
    """The adjoint of the adjoint is forward mode; a GGN is the Jacobian of its products."""
    c = case(name)
    twice = layer(c).vjp("weight", "v").vjp("v", "dw")
    assert_same_network(twice, row("weight_jvp", c, c.input_shape, c.weight_shape))
    twice = layer(c).vjp("x", "v").vjp("v", "dx")
    expected = row("input_jvp", c, c.input_shape, c.weight_shape)
    assert_same_network(twice, expected)
    s = (3, *c.output_shape)
    product = row("ggn_vector_product", c, c.input_shape, s, c.weight_shape)
    block = row("ggn_block", c, c.input_shape, s, c.kernel_size)
    tensors = inputs(block)
    found = plan(product.jacobian("vector"))(**tensors)
    assert_close(found.reshape(block.shape), evaluate(block, tensors), TOLERANCE)


@each_case
def test_adjoint_of_unfolding_is_folding(name: str) -> None:
    c = case(name)
    unfold = row("unfold", c, c.input_shape, c.kernel_size)
    fold = row("fold", c, unfold.shape, c.input_size, c.kernel_size)
    assert_same_network(unfold.vjp("x", "z"), fold)
    assert_same_network(fold.vjp("z", "x"), unfold)


@pytest.mark.parametrize("name", CONV)
def test_transposed_convolution_is_the_adjoint(name: str) -> None:
    """A convolution is the input gradient of a transposed one, with weights in one layout."""
    c, g = case(name), case(name).geometry
    adjoint = layer(c).vjp("x")
    tensors = inputs(adjoint)
    extra = tuple(
        i - ((o - 1) * s - sum(pair) + d * (k - 1) + 1)
        for i, o, k, s, pair, d in zip(
            c.input_size, c.output_size, c.kernel_size, g.stride, g.pairs, g.dilation, strict=True
        )
    )
    options = c.options | {"padding": tuple(g.pairs), "output_padding": extra}
    result = functional.conv_transpose(tensors["v"], tensors["weight"], **options)
    assert_close(result, evaluate(adjoint, tensors), TOLERANCE)


@pytest.mark.parametrize("groups", [1, 2])
def test_jacobian_of_a_network_with_primed_legs(groups: int) -> None:
    """The legs that tie a Jacobian together have to be new, whatever the network names its own."""
    weight, size = (4, 4 // groups, 3), (6,)
    network = networks.kfra((16, 16), weight, size, groups=groups)
    tensors = {"weight": torch.randn(weight, dtype=FLOAT64)}
    matrix = functional.unfold_kernel(tensors["weight"], size, groups=groups)
    expected = torch.einsum("ai,bj->ijab", matrix, matrix)
    assert_close(plan(network.jacobian("g"))(**tensors), expected, TOLERANCE)


# --- vmap ---------------------------------------------------------------------------------------

BATCHED: dict[str, Callable[[Case, tuple[int, ...]], tuple[Network, str]]] = {
    "weight_vjp": lambda c, lead: (
        row("weight_vjp", c, c.input_shape, (*lead, *c.output_shape), c.kernel_size),
        "v",
    ),
    "per_sample_weight_vjp": lambda c, lead: (
        row("per_sample_weight_vjp", c, c.input_shape, (*lead, *c.output_shape), c.kernel_size),
        "v",
    ),
    "input_vjp": lambda c, lead: (
        row("input_vjp", c, c.weight_shape, (*lead, *c.output_shape), c.input_size),
        "v",
    ),
    "weight_jvp": lambda c, lead: (
        row("weight_jvp", c, c.input_shape, (*lead, *c.weight_shape)),
        "dw",
    ),
    "input_jvp": lambda c, lead: (
        row("input_jvp", c, (*lead, *c.input_shape), c.weight_shape),
        "dx",
    ),
}


@each_case
def test_vmap(name: str) -> None:
    c = case(name)
    for build in BATCHED.values():
        plain, tensor = build(c, ())
        assert_same_network(plain.vmap(tensor, 2), build(c, (2,))[0])
        twice = plain.vmap(tensor, 3, leg="inner").vmap(tensor, 2, leg="outer")
        assert_same_network(twice, build(c, (2, 3))[0])


@each_case
def test_vmap_of_simplified_networks(name: str) -> None:
    c = case(name)
    expected = layer(c).vmap("x", 3)
    tensors = inputs(expected)
    result = evaluate(simplify(layer(c)).vmap("x", 3), tensors)
    assert_close(result, evaluate(expected, tensors), TOLERANCE)


# --- compose ------------------------------------------------------------------------------------


def named(network: Network, weight: str) -> Network:
    return network.with_names({"weight": weight})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_two_layers_in_a_row(dims: int, groups: int) -> None:
    first = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    second = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    options = {"stride": 2, "padding": 1, "groups": groups}
    x = torch.randn(2, 4, *(7, 5, 4)[:dims], dtype=FLOAT64)
    a = torch.randn(6, 4 // groups, *(3, 3, 2)[:dims], dtype=FLOAT64)
    hidden = first(x, a, **options)
    b = torch.randn(6, 4 // groups, *[2] * dims, dtype=FLOAT64)
    inner = named(networks.conv(x.shape, a.shape, **options), "a")
    for outer, y in (
        (networks.conv(hidden.shape, b.transpose(0, 1).shape, padding=1), None),
        (networks.conv_transpose(hidden.shape, b.shape, **options), second(hidden, b, **options)),
    ):
        if y is None:
            if groups > 1:  # hidden channels split in another way: refused below
                continue
            b_conv = b.transpose(0, 1).contiguous()
            y, tensors = first(hidden, b_conv, padding=1), {"x": x, "a": a, "b": b_conv}
        else:
            tensors = {"x": x, "a": a, "b": b}
        both = named(outer, "b").compose("x", inner)
        assert both.names == ("x", "a", "b")
        assert_close(plan(both)(**tensors), y, TOLERANCE)
        assert_close(evaluate(both, tensors), y, TOLERANCE)


def chain(order: str) -> tuple[Network, Tensor, dict[str, Tensor]]:
    """Three convolutions in a row, composed from one end or from the other."""
    tensors = {"x": torch.randn(2, 4, 9, dtype=FLOAT64)}
    y, layers = tensors["x"], []
    for weight in ("a", "b", "c"):
        tensors[weight] = torch.randn(4, 4, 3, dtype=FLOAT64)
        layers.append(named(networks.conv(y.shape, (4, 4, 3), padding=1), weight))
        y = F.conv1d(y, tensors[weight], padding=1)
    a, b, c = layers
    if order == "inner-first":
        return c.compose("x", b.compose("x", a)), y, tensors
    return c.compose("x", b).compose("x", a), y, tensors


@pytest.mark.parametrize("order", ["inner-first", "outer-first"])
def test_three_layers_in_a_row(order: str) -> None:
    """Equal sizes everywhere, so that two legs that got one name would pass unnoticed."""
    network, y, tensors = chain(order)
    assert_close(evaluate(network, tensors), y, TOLERANCE)
    assert_close(plan(network)(**tensors), y, TOLERANCE)


@pytest.mark.parametrize("order", ["inner-first", "outer-first"])
@pytest.mark.parametrize("leaf", ["x", "a", "b", "c"])
def test_gradients_through_composed_layers(leaf: str, order: str) -> None:
    network, y, tensors = chain(order)
    v = torch.randn_like(y)
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    out = tensors["x"]
    for weight in ("a", "b", "c"):
        out = F.conv1d(out, tensors[weight], padding=1)
    (expected,) = torch.autograd.grad(out, tensors[leaf], v)
    given = {n: t.detach() for n, t in tensors.items() if n != leaf}
    assert_close(plan(network.vjp(leaf))(v=v, **given), expected, TOLERANCE)


def test_composition_multiplies_scales() -> None:
    x, weight = torch.randn(2, 3, 8, dtype=FLOAT64), torch.randn(3, 3, 3, dtype=FLOAT64)
    pool = networks.avg_pool((2, 3, 6), 2, stride=2)
    both = pool.scaled(3.0).compose("x", networks.conv(x.shape, weight.shape).scaled(0.5))
    expected = 1.5 * F.avg_pool1d(F.conv1d(x, weight), 2)
    assert_close(plan(both)(x=x, weight=weight), expected, TOLERANCE)


# --- Gram products ------------------------------------------------------------------------------


def open_rows(c: Case) -> tuple[Network, tuple[str, ...], tuple[str, ...]]:
    """Unfolded inputs with every leg open; legs of the features and of the positions."""
    dims = range(1, len(c.kernel_size) + 1)
    unfold = row("unfold", c, c.input_shape, c.kernel_size)
    positions = tuple(f"{'i' if c.transposed else 'o'}{d}" for d in dims)
    features = ("ci", *(f"k{d}" for d in dims))
    legs = [(leg,) for leg in ("n", "g", *features, *positions)]
    return unfold.arranged(*legs), features, positions


@each_case
def test_trace_of_a_gram_is_the_sum_of_its_diagonal(name: str) -> None:
    c = case(name)
    network, features, positions = open_rows(c)
    tensors = inputs(network)
    rows = evaluate(network, tensors)  # n g ci k.. positions..
    gram = network.gram({"n", "g", *positions}, rows=[features], keep=[("g",)])
    diagonal = network.gram({"n", "g", *positions, *features}, keep=[("g",), features])
    full = plan(gram)(**tensors)
    assert_close(full, full.mT, 1e-13)
    found = plan(diagonal)(**tensors)
    assert_close(found, full.diagonal(dim1=1, dim2=2), TOLERANCE)
    matrix = rows.flatten(2, 1 + len(features)).flatten(3)
    assert_close(full, torch.einsum("ngdo,ngeo->gde", matrix, matrix), TOLERANCE)
    assert_close(found.sum(), rows.square().sum(), TOLERANCE)


@each_case
def test_kept_legs_are_leading_axes_and_sum_to_the_shared_ones(name: str) -> None:
    c = case(name)
    network, features, positions = open_rows(c)
    tensors = inputs(network)
    shared = {"n", "g", *positions}
    total = plan(network.gram(shared, rows=[features]))(**tensors)
    kept = plan(network.gram(shared, rows=[features], keep=[("n", "g"), positions]))(**tensors)
    samples_and_groups = c.batch * c.groups
    assert kept.shape[0] == samples_and_groups
    assert kept.shape[2:] == total.shape
    assert_close(kept.sum((0, 1)), total, TOLERANCE)
    swapped = plan(network.gram(shared, rows=[features], keep=[("g",), ("n",)]))(**tensors)
    expected = kept.sum(1).reshape(c.batch, c.groups, *total.shape).transpose(0, 1)
    assert_close(swapped, expected, TOLERANCE)


@each_case
def test_unshared_legs_that_are_left_out_are_summed_in_each_copy(name: str) -> None:
    """Sharing nothing gives the product of two sums."""
    c = case(name)
    network, features, _ = open_rows(c)
    tensors = inputs(network)
    sums = evaluate(network, tensors).flatten(2 + len(features)).sum(-1).flatten(2)
    product = plan(network.gram({"n", "g"}, rows=[features], keep=[("n",), ("g",)]))(**tensors)
    assert_close(product, torch.einsum("ngd,nge->ngde", sums, sums), TOLERANCE)
    everything = plan(network.gram(()))(**tensors)
    assert_close(everything, sums.sum().square(), 1e-11)


def test_doubled_squares_the_scale() -> None:
    network = networks.avg_pool((2, 3, 8), 2, stride=2)
    tensors = inputs(network)
    double = network.doubled(network.output.legs)
    expected = evaluate(network, tensors).square()
    assert_close(evaluate(double, tensors).reshape(expected.shape), expected, TOLERANCE)
    assert double.scale == 0.25


# --- constants ----------------------------------------------------------------------------------


def test_covered_legs() -> None:
    """A tensor's leg that nothing else has is ones in its gradient."""
    total = parse("i j -> i", [Variable("x")], {"i": 3, "j": 2})
    v = torch.randn(3, dtype=FLOAT64)
    network = total.vjp("x")
    assert sum(isinstance(op.source, Ones) for op in network.operands) == 1
    assert_close(plan(network)(v=v), v[:, None].expand(3, 2), TOLERANCE)


def test_jacobian_ties_shared_legs_with_deltas() -> None:
    scale = parse("i, i -> i", [Variable("x"), Variable("y")], {"i": 3})
    network = scale.jacobian("x")
    assert any(isinstance(op.source, Delta) for op in network.operands)
    y = torch.randn(3, dtype=FLOAT64)
    assert_close(plan(network)(y=y), torch.diag(y), TOLERANCE)
    assert not any(isinstance(op.source, Pattern) for op in network.operands)
