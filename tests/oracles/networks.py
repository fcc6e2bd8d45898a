"""Networks evaluated literally, all rows of the operation table, and random networks."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from oracles.convolutions import Case
from tnkfac.einsum import Network, networks
from tnkfac.einsum.geometry import Axis
from tnkfac.einsum.operands import Delta, Ones, Operand, Pattern, Source, Variable, grouped
from tnkfac.einsum.plans import compile_adjoint, compile_view, constant

__all__ = ["evaluate", "inputs", "random_network", "rows"]

FLOAT64 = torch.float64


def evaluate(network: Network, tensors: dict[str, Tensor]) -> Tensor:
    """Operand after operand, from left to right: no plan, no order, no rule."""
    labels: dict[str, int] = {}
    operands: list[tuple[Tensor, list[int]]] = []
    for op in network.operands:
        if isinstance(op.source, Variable):
            value = tensors[op.source.name]
        else:
            value = constant(op.source, FLOAT64, torch.device("cpu"))
        for step in compile_view(op.shape, op.view):
            value = step(value)
        operands.append((value, [labels.setdefault(leg, len(labels)) for leg in op.legs]))
    output = [labels[leg] for leg in network.output.legs]
    # Two at a time: for more, torch asks opt_einsum for a path, and timm, when it is imported, sets
    # a strategy whose paths torch refuses (torch.backends.opt_einsum.strategy = "auto-hq").
    result, legs = torch.ones((), dtype=FLOAT64), list[int]()
    for at, (value, own) in enumerate(operands):
        later = {*output, *(leg for _, others in operands[at + 1 :] for leg in others)}
        kept = [leg for leg in dict.fromkeys([*legs, *own]) if leg in later]
        result, legs = torch.einsum(result, legs, value, own, kept), kept
    result = torch.einsum(result, legs, output)
    for step in compile_adjoint(network.output.shape, network.output.view):
        result = step(result)
    return result * network.scale


def inputs(network: Network) -> dict[str, Tensor]:
    """A random tensor for every name."""
    return {
        op.source.name: torch.randn(op.shape, dtype=FLOAT64)
        for op in network.operands
        if isinstance(op.source, Variable)
    }


def rows(c: Case) -> Iterator[tuple[str, Network]]:
    """All networks of a layer type for one case: name and network."""
    x, weight, v, s = c.input_shape, c.weight_shape, c.output_shape, (3, *c.output_shape)
    kernel, size, features = c.kernel_size, c.input_size, 1
    for tap in kernel:
        features *= tap
    positions = 1
    for length in c.output_size:
        positions *= length
    side = c.channels[1] * positions
    suffix = "_transpose" if c.transposed else ""
    shapes: dict[str, tuple[object, ...]] = {
        "conv": (x, weight),
        "unfold": (x, kernel),
        "fold": ((c.batch, c.channels[0] * features, positions), size, kernel),
        "unfold_kernel": (weight, size),
        "weight_vjp": (x, v, kernel),
        "per_sample_weight_vjp": (x, v, kernel),
        "input_vjp": (weight, v, size),
        "weight_jvp": (x, weight),
        "input_jvp": (x, weight),
        "weight_jacobian": (x, weight),
        "input_jacobian": (weight, x),
        "kfc_factor": (x, kernel),
        "kfac_reduce_factor": (x, kernel),
        "kfc_diagonal": (x, kernel),
        "sqrt_ggn": (x, s, kernel),
        "ggn_diagonal": (x, s, kernel),
        "per_sample_ggn_diagonal": (x, s, kernel),
        "ggn_gram": (x, s, kernel),
        "ggn_block": (x, s, kernel),
        "ggn_block_diagonal": (x, s, kernel),
        "ggn_vector_product": (x, s, weight),
        "hessian_diagonal_input": (v, weight, size),
        "hessian_diagonal_weight": (v, x, kernel),
        "kfra": ((side, side), weight, size),
    }
    for name, args in shapes.items():
        yield name, getattr(networks, f"{name}{suffix}")(*args, **c.options)
    for block in ("output_channel", "group"):
        network = getattr(networks, f"ggn_block_diagonal{suffix}")
        yield f"ggn_block_diagonal-{block}", network(x, s, kernel, block=block, **c.options)
    if not c.transposed:
        yield "avg_pool", networks.avg_pool(x, kernel, **c.options)
    yield "kfc_grad_factor", networks.kfc_grad_factor(v, groups=c.groups)
    yield "kfac_reduce_grad_factor", networks.kfac_reduce_grad_factor(v, groups=c.groups)
    yield "bias_vjp", networks.bias_vjp(v)
    yield "per_sample_bias_vjp", networks.per_sample_bias_vjp(v)
    yield "bias_ggn_diagonal", networks.bias_ggn_diagonal(s)
    yield "bias_ggn_gram", networks.bias_ggn_gram(s)
    yield "hessian_diagonal_bias", networks.hessian_diagonal_bias(v)
    yield "kfra_output_factor", networks.kfra_output_factor((side, side), c.output_size)


# --- random networks ----------------------------------------------------------------------------


def _random_axis(rng: random.Random) -> Axis:
    while True:
        stride, dilation = rng.choice((1, 1, 2, 3, 4)), rng.choice((1, 1, 2, 4))
        left, right = rng.choice((0, 0, 1, 2)), rng.choice((0, 0, 1, 2))
        size, kernel = rng.randint(1, 7), rng.randint(1, 3)
        if size + left + right >= dilation * (kernel - 1) + 1:
            axis = Axis(size, kernel, stride, left, right, dilation)
            fewer = rng.randint(1, axis.output_size) if rng.random() < 0.2 else None
            return Axis(size, kernel, stride, left, right, dilation, fewer)


class _Legs:
    """Legs by size: old ones are reused, so that operands meet."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.sizes: dict[str, int] = {}

    def any(self, size: int, reuse: float) -> str:
        """A leg of that size, a new one with probability ``1 - reuse`` at least."""
        fitting = [leg for leg, have in self.sizes.items() if have == size]
        if fitting and self.rng.random() < reuse:
            return self.rng.choice(fitting)
        leg = f"l{len(self.sizes)}"
        self.sizes[leg] = size
        return leg

    def distinct(self, sizes: list[int], reuse: float) -> tuple[str, ...]:
        """One leg per size, no two alike."""
        legs: list[str] = []
        for size in sizes:
            leg = self.any(size, reuse)
            while leg in legs:
                leg = self.any(size, 0)
            legs.append(leg)
        return tuple(legs)


def _random_groups(rng: random.Random, legs: tuple[str, ...]) -> list[list[str]]:
    """Legs in the same order, some side by side on one axis."""
    groups: list[list[str]] = []
    for leg in legs:
        if groups and rng.random() < 0.3:
            groups[-1].append(leg)
        else:
            groups.append([leg])
    return groups


def random_network(seed: int) -> Network:
    """Variables, patterns, deltas and ones whose legs meet at random, and a random output.

    Patterns often come in equal pairs that share legs, as in Gram products. Sizes are small
    enough for one joint einsum.
    """
    rng = random.Random(seed)
    legs = _Legs(rng)
    constants: list[tuple[Source, tuple[int, ...], tuple[str, ...]]] = []
    for _ in range(rng.choice((0, 1, 1, 2))):
        axis = _random_axis(rng)
        shape = axis.kernel_size, axis.output_size, axis.input_size
        names = legs.distinct(list(shape), 0.1)
        constants.append((Pattern(axis), shape, names))
        if rng.random() < 0.5:
            twin = tuple(
                leg if rng.random() < 0.5 else legs.any(size, 0)
                for leg, size in zip(names, shape, strict=True)
            )
            constants.append((Pattern(axis), shape, twin))
    for _ in range(rng.choice((0, 0, 1, 2))):
        size = rng.choice([*legs.sizes.values(), 2])
        constants.append((Delta(size), (size,) * 2, (legs.any(size, 0.8), legs.any(size, 0.8))))
    for _ in range(rng.choice((0, 0, 1))):
        size = rng.choice([*legs.sizes.values(), 3])
        constants.append((Ones(size), (size,), (legs.any(size, 0.7),)))
    operands = [Operand(source, shape, names) for source, shape, names in constants]
    for at in range(rng.choice((1, 1, 2, 3))):
        pool = [*legs.sizes.values(), 1, 2]
        sizes = rng.choices(pool, k=rng.randint(1, 3))
        names = legs.distinct(sizes, 0.9)
        groups = _random_groups(rng, names)
        operands.append(grouped(Variable(f"x{at}"), groups, legs.sizes))
    rng.shuffle(operands)
    open_legs = [leg for leg in legs.sizes if any(leg in op.legs for op in operands)]
    picked = tuple(rng.sample(open_legs, k=min(len(open_legs), rng.randint(0, 4))))
    output = grouped(Variable("output"), _random_groups(rng, picked), legs.sizes)
    return Network(tuple(operands), output, rng.choice((1.0, 0.5, -3.0)))
