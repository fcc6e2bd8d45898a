"""Every rewrite is exact, fires where it should, and simplify leaves what is expected."""

import pytest
import torch

from oracles.networks import evaluate, inputs
from tnkfac.einsum import Network, networks, simplify
from tnkfac.einsum.network import parse
from tnkfac.einsum.operands import Delta, Ones, Pattern, Variable
from tnkfac.einsum.rules import RULES, unfold_inputs

X1, X2 = (2, 4, 9), (2, 4, 7, 6)
W2 = (6, 2, 3, 2)
CASES = {
    "conv": networks.conv(X2, W2, padding=1, groups=2),
    "conv-strided-dilated": networks.conv(X2, W2, stride=2, dilation=(1, 3), groups=2),
    "conv-unused-pixels": networks.conv((2, 3, 10, 10), (5, 3, 3, 3), stride=(3, 4)),
    "conv-1x1": networks.conv(X2, (5, 4, 1, 1)),
    "conv-1x1-down": networks.conv(X2, (5, 4, 1, 1), stride=2),
    "conv-1x1-dilated": networks.conv(X2, (5, 4, 1, 1), dilation=3),
    "conv-down-unfilled-window": networks.conv((2, 3, 7), (4, 3, 2), stride=5),
    "conv-one-output": networks.conv((2, 3, 5), (4, 3, 5)),
    "conv-swapped-dense": networks.conv((2, 3, 6), (4, 3, 3), dilation=2),
    "conv-injective-padded": networks.conv((2, 3, 6), (4, 3, 2), stride=2, padding=1),
    "conv-common-factor": networks.conv((2, 3, 15), (4, 3, 3), stride=2, dilation=4, padding=3),
    "transposed-common-factor": networks.conv_transpose(
        (2, 3, 4), (3, 2, 3), stride=4, dilation=2, padding=1, output_padding=3
    ),
    "kfc-transposed-common-factor": networks.kfc_factor_transpose(
        (2, 3, 4), 3, stride=2, dilation=2, padding=1
    ),
    "conv-depthwise": networks.conv(X2, (4, 1, 3, 3), groups=4, padding=1),
    "conv-batch-of-one": networks.conv((1, 4, 5), (3, 4, 2)),
    "transposed": networks.conv_transpose((2, 4, 5), (4, 3, 3), stride=2, padding=1),
    "transposed-dense": networks.conv_transpose((2, 4, 5), (4, 3, 2), stride=2),
    "transposed-down": networks.conv_transpose((2, 4, 5), (4, 3, 1), stride=3, output_padding=2),
    "transposed-groups": networks.conv_transpose(
        (2, 4, 5, 3), (4, 3, 3, 2), stride=(2, 1), groups=2, output_padding=(1, 0)
    ),
    "unfold": networks.unfold(X1, 3, stride=2, padding=(1,)),
    "unfold-dense": networks.unfold((2, 3, 9), 3, stride=3),
    "unfold-transposed-dense": networks.unfold_transpose((2, 3, 4), 2, stride=2),
    "unfold-transposed-gaps": networks.unfold_transpose((2, 3, 4), 2, stride=4),
    "kfc": networks.kfc_factor(X2, (3, 2), padding=1, groups=2),
    "kfc-dense": networks.kfc_factor((2, 3, 8), 2, stride=2),
    "kfc-dense-unused": networks.kfc_factor((2, 3, 9), 2, stride=2),
    "kfc-transposed-dense": networks.kfc_factor_transpose((2, 3, 4), 2, stride=2),
    "kfc-transposed": networks.kfc_factor_transpose((2, 4, 4), 3, stride=2, padding=1, groups=2),
    "reduce": networks.kfac_reduce_factor(X2, (3, 2), padding=1, groups=2),
    "reduce-3d-dense": networks.kfac_reduce_factor((1, 2, 4, 4, 4), 2, stride=2),
    "reduce-transposed-dense": networks.kfac_reduce_factor_transpose((2, 3, 4), 2, stride=2),
    "diagonal": networks.kfc_diagonal(X2, 3, stride=2, padding=1),
    "delta-in-output": parse(
        "n i, i j -> i j", [Variable("x"), Delta(3)], {"n": 2, "i": 3, "j": 3}
    ),
    "dangling-delta": parse("n i, i j -> n", [Variable("x"), Delta(3)], {"n": 2, "i": 3, "j": 3}),
    "delta-number": parse("n, i j -> n", [Variable("x"), Delta(3)], {"n": 2, "i": 3, "j": 3}),
    "delta-of-output": parse("n, i j -> n j", [Variable("x"), Delta(3)], {"n": 2, "i": 3, "j": 3}),
    "ones": parse("n i, i, j -> n", [Variable("x"), Ones(3), Ones(4)], {"n": 2, "i": 3, "j": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rewrite_on_the_way_is_exact(name: str) -> None:
    network = CASES[name]
    tensors = inputs(network)
    expected = evaluate(network, tensors)
    steps = 0
    while True:
        for rule in RULES.values():
            rewritten = rule(network)
            if rewritten is None:
                continue
            torch.testing.assert_close(
                evaluate(rewritten, tensors), expected, rtol=1e-12, atol=1e-12
            )
            network, steps = rewritten, steps + 1
            break
        else:
            break
    assert simplify(CASES[name]) == network
    assert steps < 60
    torch.testing.assert_close(
        evaluate(unfold_inputs(network), tensors), expected, rtol=1e-12, atol=1e-12
    )


def patterns(network: Network) -> int:
    return sum(isinstance(op.source, Pattern) for op in network.operands)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("conv-1x1", 0),
        ("conv-1x1-down", 0),
        ("conv-1x1-dilated", 0),
        ("conv-down-unfilled-window", 0),
        ("conv-one-output", 0),
        ("conv-swapped-dense", 0),
        ("conv-injective-padded", 0),
        ("transposed-dense", 0),
        ("transposed-down", 0),
        ("unfold-dense", 0),
        ("unfold-transposed-dense", 0),
        ("kfc-dense", 0),
        ("kfc-dense-unused", 0),
        ("kfc-transposed-dense", 0),
        ("reduce-3d-dense", 0),
        ("reduce-transposed-dense", 0),
        ("diagonal", 2),
        ("conv", 2),
        ("kfc", 4),
    ],
)
def test_patterns_that_only_rearrange_pixels_disappear(name: str, left: int) -> None:
    assert patterns(simplify(CASES[name])) == left


def test_unused_pixels_are_cropped() -> None:
    small = simplify(CASES["conv-unused-pixels"])
    # 10 pixels, kernel 3: stride 3 meets 9 without overlap, stride 4 meets 7 with gaps.
    assert patterns(small) == 0
    overlapping = simplify(networks.conv((2, 3, 10), (5, 3, 3), stride=2))
    (pattern,) = (op for op in overlapping.operands if isinstance(op.source, Pattern))
    assert pattern.source.axis.input_size == 9


def test_parallel_legs_are_merged_and_legs_of_size_one_dropped() -> None:
    small = simplify(networks.conv((2, 4, 6, 6), (3, 4, 1, 1)))
    assert len(small.output.legs) == 3  # n, co, and both positions as one
    assert len(simplify(networks.conv((1, 1, 5), (1, 1, 5))).output.legs) == 0


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_fires_somewhere(rule: str) -> None:
    fired = False
    for network in CASES.values():
        while not fired:
            first = next(
                ((n, new) for n, r in RULES.items() if (new := r(network)) is not None), None
            )
            if first is None:
                break
            fired, network = first[0] == rule, first[1]
    assert fired
