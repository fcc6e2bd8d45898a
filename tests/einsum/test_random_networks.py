"""Laws of rewriting and planning over random networks and all rows of the operation table."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from oracles.compare import assert_close
from oracles.convolutions import CONV, TRANSPOSED, case
from oracles.networks import evaluate, inputs, random_network, rows
from tnkfac.einsum import Network, networks, plan, simplify
from tnkfac.einsum.geometry import Axis
from tnkfac.einsum.network import parse
from tnkfac.einsum.operands import Delta, Pattern, Variable
from tnkfac.einsum.plans import Plan
from tnkfac.einsum.rules import RULES, unfold_inputs

TOLERANCE = 1e-12
FLOAT64 = torch.float64
CHUNK = 30
CHUNKS = {f"seeds-{at:03d}-to-{at + CHUNK - 1:03d}": at for at in range(0, 480, CHUNK)}


def assert_value(network: Network, tensors: dict[str, Tensor], expected: Tensor) -> None:
    """A sum may cancel to zero: then the size of its terms is what rounding is relative to."""
    result = evaluate(network, tensors)
    assert result.shape == expected.shape, network
    torch.testing.assert_close(result, expected, rtol=TOLERANCE, atol=1e-11, msg=str(network))


def drawn(seed: int) -> tuple[Network, dict[str, Tensor], Tensor]:
    torch.manual_seed(seed)
    network = random_network(seed)
    tensors = inputs(network)
    return network, tensors, evaluate(network, tensors)


# --- every rule, on random networks -------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_the_value_until_it_stops(rule: str) -> None:
    """On its own, as often as it applies, and it applies to many of the networks."""
    fired = 0
    for seed in range(240):
        network, tensors, expected = drawn(seed)
        for _ in range(50):
            smaller = RULES[rule](network)
            if smaller is None:
                break
            assert_value(smaller, tensors, expected)
            network, fired = smaller, fired + 1
        else:
            raise AssertionError(f"{rule} does not stop on seed {seed}.")
    assert fired >= 10


@pytest.mark.parametrize("start", CHUNKS.values(), ids=CHUNKS)
def test_simplified_and_planned_networks_keep_the_value(start: int) -> None:
    for seed in range(start, start + CHUNK):
        network, tensors, expected = drawn(seed)
        small = simplify(network)
        assert_value(small, tensors, expected)
        assert_value(unfold_inputs(small), tensors, expected)
        assert len(small.operands) <= len(network.operands) + 1  # a pattern may become two deltas
        assert all(rule(small) is None for rule in RULES.values())
        result = plan(network)(**tensors)
        assert result.shape == expected.shape, network
        torch.testing.assert_close(result, expected, rtol=TOLERANCE, atol=1e-11, msg=str(network))


# --- networks at which a rewrite or a plan may go wrong -----------------------------------------

GAP = Axis(input_size=4, kernel_size=2, stride=3, right=1)
OVERLAP = Axis(input_size=5, kernel_size=2, right=1)

TRAPS: dict[str, Callable[[], Network]] = {
    # The windows hold as many entries as there are pixels, and yet they are no rearrangement.
    "windows-with-a-gap": lambda: parse(
        "o k, k o i -> i", [Variable("x"), Pattern(GAP)], {"o": 2, "k": 2, "i": 4}
    ),
    # Unfolding brings legs side by side that the other form does not merge.
    "forms-that-merge-other-legs": lambda: parse(
        "n (i c), k o i -> k c",
        [Variable("x"), Pattern(Axis(4, 3, 2, 2, 2))],
        {"n": 3, "i": 4, "c": 2, "k": 3, "o": 3},
    ),
    "positions-by-taps": lambda: networks.unfold((2, 3, 7), 3).arranged(("o1",), ("k1",)),
    # Deltas that tie two legs of one pattern: a diagonal of it.
    "position-is-pixel": lambda: parse(
        "k o i, i c, o i -> k",
        [Pattern(OVERLAP), Variable("x"), Delta(5)],
        {"k": 2, "o": 5, "i": 5, "c": 2},
    ),
    "tap-is-pixel": lambda: parse(
        "k o i, i c, k i -> o",
        [Pattern(Axis(2, 2, left=2, right=1)), Variable("x"), Delta(2)],
        {"k": 2, "o": 4, "i": 2, "c": 2},
    ),
    "tap-is-position": lambda: parse(
        "k o, k o i, i j, k o c -> j",
        [Delta(2), Pattern(Axis(4, 2, 3, 2, 1)), Delta(4), Variable("x")],
        {"k": 2, "o": 2, "i": 4, "j": 4, "c": 2},
    ),
    "two-taps-of-one-pixel": lambda: parse(
        "k o i, l o i, i -> k l",
        [Pattern(OVERLAP), Pattern(OVERLAP), Variable("x")],
        {"k": 2, "l": 2, "o": 5, "i": 5},
    ),
    "one-tensor-in-two-views": lambda: parse(
        "(a b), (c d) -> a d", [Variable("x")] * 2, {"a": 2, "b": 6, "c": 4, "d": 3}
    ),
    "repeated-leg": lambda: parse("i i j -> j", [Variable("x")], {"i": 3, "j": 2}),
    "numbers-only-in-front": lambda: parse(
        "a, i i, o o -> a", [Variable("x"), Delta(3), Delta(2)], {"a": 2, "i": 3, "o": 2}
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    network = TRAPS[name]()
    tensors = inputs(network)
    expected = evaluate(network, tensors)
    assert_value(simplify(network), tensors, expected)
    assert_value(unfold_inputs(simplify(network)), tensors, expected)
    for ready in (plan(network), Plan(network, simplified=False)):
        assert_close(ready(**tensors), expected, TOLERANCE)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, id=f"seed-{seed}-{why}")
        for why, seeds in {
            "gap": (841, 1140, 1718, 2385, 2412),
            "forms": (988, 4227, 9467),
            "diagonal-of-a-pattern": (889, 950, 2433, 3024, 3846),
        }.items()
        for seed in seeds
    ],
)
def test_rare_networks(seed: int) -> None:
    """Found among many thousand draws."""
    network, tensors, expected = drawn(seed)
    assert_value(simplify(network), tensors, expected)
    assert_value(unfold_inputs(simplify(network)), tensors, expected)
    assert_close(plan(network)(**tensors), expected, 1e-11)


# --- cost ---------------------------------------------------------------------------------------

COSTED = (*CONV[::2], *TRANSPOSED[1::2])


@pytest.mark.parametrize("name", COSTED)
def test_plans_cost_no_more_than_without_simplification(name: str) -> None:
    """Neither in multiply-adds nor in the planner's measure, which counts written numbers, too."""
    worse = {}
    for operation, network in rows(case(name)):
        before, after = Plan(network, simplified=False), plan(network)
        if after.flops > before.flops:
            worse[operation] = f"{before.flops} -> {after.flops} multiply-adds"
        if after._program.cost > before._program.cost:
            worse[operation] = f"{before._program.cost} -> {after._program.cost}"
    assert not worse
