"""Plans: built once, sharing what is equal, exact in every dtype, never aliasing."""

import pytest
import torch

from tnkfac.einsum import Network, functional, networks, plan
from tnkfac.einsum.network import parse
from tnkfac.einsum.operands import Delta, Variable
from tnkfac.einsum.plans import Plan


def test_a_second_call_for_a_shape_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 2, 11, 5)
    first = functional.kfc_factor(x, (3, 2), padding=1)

    def refuse(*args: object) -> None:
        raise AssertionError("built again")

    before = plan.cache_info().misses
    monkeypatch.setattr(Plan, "__init__", refuse)
    monkeypatch.setattr(Network, "__post_init__", refuse)
    again = functional.kfc_factor(x + 1, (3, 2), padding=1)
    assert plan.cache_info().misses == before
    assert again.shape == first.shape


def test_equal_networks_share_a_plan_whatever_the_spelling() -> None:
    a = networks.conv((2, 3, 8, 8), (4, 3, 3, 3), padding="same")
    b = networks.conv((2, 3, 8, 8), (4, 3, 3, 3), padding=((1, 1), 1), stride=(1, 1))
    assert a == b
    assert plan(a) is plan(b)


def test_the_caches_are_bounded() -> None:
    assert plan.cache_info().maxsize == 1024
    assert functional.unfold.cache_info().maxsize == 1024


def test_lists_and_tensors_are_accepted_as_hyper_parameters() -> None:
    x = torch.randn(2, 3, 8)
    expected = functional.unfold(x, 3, stride=2)
    assert torch.equal(functional.unfold(x, [3], stride=[2]), expected)
    assert torch.equal(functional.unfold(x=x, kernel_size=3, stride=torch.tensor([2])), expected)


def test_both_halves_of_a_gram_product_are_computed_once() -> None:
    factor = plan(networks.kfac_reduce_factor((4, 3, 9, 9), 3))
    squares = [step for step in factor.steps if len(step.inputs) == 2 > len(set(step.inputs))]
    assert squares == factor.steps[-1:], factor
    assert len(factor.steps) <= 4, factor


def test_flops_count_what_is_done() -> None:
    matmul = parse("i j, j k -> i k", [Variable("a"), Variable("b")], {"i": 3, "j": 5, "k": 7})
    assert plan(matmul).flops == 3 * 5 * 7
    # A leg of one operand only is summed before the product.
    summed = parse(
        "i j l, j k -> i k", [Variable("a"), Variable("b")], {"i": 3, "j": 5, "k": 7, "l": 4}
    )
    assert plan(summed).flops == 3 * 5 * 4 + 3 * 5 * 7
    assert plan(matmul).peak_memory == 3 * 7


def test_peak_memory_counts_a_value_until_it_is_read() -> None:
    """Of two products the first is there while the second is written."""
    sizes = {"i": 2, "j": 3, "k": 4, "l": 50}
    chain = parse("i j, j k, k l -> i l", [Variable(name) for name in "abc"], sizes)
    assert plan(chain).flops == 2 * 3 * 4 + 2 * 4 * 50
    assert plan(chain).peak_memory == 2 * 4 + 2 * 50


def test_a_plan_prints_its_steps_and_costs() -> None:
    text = str(plan(networks.kfc_factor((2, 3, 5, 5), 3)))
    for word in ("multiply-adds", "entries", "einsum", "v0 = x", "-> (1, 27, 27)"):
        assert word in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constants_follow_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(dtype)
    result = functional.kfc_factor(x, 3, padding=1)
    assert result.dtype == dtype
    expected = functional.kfc_factor(x.double(), 3, padding=1)
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float32: 1e-6}.get(dtype, 1e-14)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_float64_scales_are_exact() -> None:
    # A scale kept in float32 would show as an error of 1e-8.
    x = torch.ones(3, 1, 7, dtype=torch.float64)
    assert functional.kfc_factor(x, 1).item() == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(networks.unfold((2, 3, 6), 1), id="1x1"),
        pytest.param(networks.unfold((2, 3, 6), 2, stride=2), id="dense"),
        pytest.param(parse("i j -> j i", [Variable("x")], {"i": 2, "j": 3}), id="transpose"),
        pytest.param(parse("i -> i", [Variable("x")], {"i": 2}), id="identity"),
    ],
)
def test_a_result_shares_no_memory_with_its_argument(network: Network) -> None:
    x = torch.randn(network.operands[0].shape)
    kept = x.clone()
    plan(network)(x=x).zero_()
    assert torch.equal(x, kept)


def test_more_than_26_legs() -> None:
    # Four dense dimensions of a Gram product: 26 letters are not enough for its operands.
    x = torch.randn(1, 2, 4, 4, 4, 4, dtype=torch.float64)
    rows = functional.unfold(x, 2, stride=2)
    mean = rows.mean(-1)
    torch.testing.assert_close(functional.kfac_reduce_factor(x, 2, stride=2)[0], mean.T @ mean)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, ["Expected tensors ['x']", "[]"]),
        ({"y": torch.ones(2, 3, 6)}, ["['x']", "['y']"]),
        ({"x": torch.ones(2, 3, 7)}, ["x", "(2, 3, 7)", "(2, 3, 6)"]),
    ],
)
def test_a_plan_refuses_other_tensors(tensors: dict[str, torch.Tensor], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        plan(networks.unfold((2, 3, 6), 2))(**tensors)
    assert all(word in str(error.value) for word in words)


def test_gradients_flow_through_plans() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: functional.conv(x, w, stride=2), (x, w))
    assert torch.autograd.gradcheck(lambda x: functional.kfc_factor(x, 2, padding=1), (x,))


def test_a_network_of_constants_only() -> None:
    network = parse("i j, j k -> i k", (Delta(3), Delta(3)), {"i": 3, "j": 3, "k": 3})
    assert torch.equal(plan(network)(), torch.eye(3))


@pytest.mark.parametrize("operation", ["kfc_factor", "kfac_reduce_factor", "kfc_diagonal"])
def test_no_samples(operation: str) -> None:
    """A mean over nothing is zero, not a division by zero."""
    factor = getattr(functional, operation)(torch.rand(0, 2, 5), 3)
    assert torch.equal(factor, torch.zeros_like(factor))
