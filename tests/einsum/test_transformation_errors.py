"""What transformations of networks refuse, and in which words."""

from collections.abc import Callable, Sequence

import pytest

from tnkfac.einsum import Network, networks

CONV = networks.conv((2, 4, 7), (6, 2, 3), groups=2)
FACTOR = networks.kfc_factor((2, 4, 7), 3)
ROWS = networks.unfold((2, 4, 7), 3).arranged(("n",), ("ci",), ("k1",), ("o1",))

CALLS: dict[str, Callable[[Network, str], Network]] = {
    "vmap": lambda network, name: network.vmap(name, 3),
    "vjp": lambda network, name: network.vjp(name),
    "jvp": lambda network, name: network.jvp(name, "tangent"),
    "jacobian": lambda network, name: network.jacobian(name),
    "compose": lambda network, name: network.compose(name, CONV),
}
each_call = pytest.mark.parametrize("method", CALLS)


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in {error.value}"


@each_call
def test_unknown_tensor(method: str) -> None:
    refused(lambda: CALLS[method](CONV, "bias"), "'bias'", "0 times", "x, weight")


@each_call
def test_tensor_that_occurs_twice(method: str) -> None:
    refused(lambda: CALLS[method](FACTOR, "x"), "'x'", "2 times")


@each_call
def test_the_message_names_the_transformation(method: str) -> None:
    refused(lambda: CALLS[method](CONV, "bias"), method)


def test_vmap_refuses_an_existing_leg() -> None:
    refused(lambda: CONV.vmap("x", 3, leg="co"), "vmap", "'co'", "exists", "n, g, ci")
    refused(lambda: CONV.vmap("x", 3).vmap("x", 2), "vmap", "'v'", "exists")


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        pytest.param(networks.conv((2, 4, 9), (5, 4, 3)), ["(2, 5, 7)", "(2, 4, 7)"], id="channel"),
        pytest.param(networks.conv((2, 4, 8), (4, 4, 3)), ["(2, 4, 6)", "(2, 4, 7)"], id="space"),
        pytest.param(networks.conv((3, 4, 9), (4, 4, 3)), ["(3, 4, 7)", "(2, 4, 7)"], id="batch"),
        pytest.param(networks.conv((2, 4, 9, 9), (4, 4, 3, 3)), ["(2, 4, 7, 7)"], id="axes"),
        pytest.param(
            networks.conv((2, 4, 9), (4, 1, 3), groups=4), ["(2, 4, 7)", "g co"], id="other-groups"
        ),
    ],
)
def test_compose_refuses_what_does_not_fit(inner: Network, words: Sequence[str]) -> None:
    refused(lambda: CONV.compose("x", inner), "compose", "'x'", "does not fit", *words)


@pytest.mark.parametrize("method", ["doubled", "gram"])
def test_gram_refuses_to_share_unknown_legs(method: str) -> None:
    refused(lambda: getattr(ROWS, method)({"n", "q"}), "'q'", "k1")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"rows": [("ci", "q")]}, id="unknown-row"),
        pytest.param({"keep": [("q",)]}, id="unknown-kept"),
        pytest.param({"rows": [("n",)]}, id="shared-row"),
        pytest.param({"rows": [("i1",)]}, id="row-that-is-not-an-output-leg"),
    ],
)
def test_gram_refuses_other_legs(options: dict[str, list[tuple[str, ...]]]) -> None:
    """A row leg is an unshared leg of the output, a kept one a shared one."""
    ((leg,),) = [group[-1:] for group in next(iter(options.values()))]
    refused(lambda: ROWS.gram({"n"}, **options), f"'{leg}'")


def test_arranged_refuses_unknown_legs() -> None:
    refused(lambda: ROWS.arranged(("n",), ("q",)), "'q'")


def test_names_of_other_tensors_are_refused() -> None:
    """Two operands of one name would be the same tensor."""
    refused(lambda: CONV.vjp("x", cotangent="weight"), "vjp", "'weight'", "taken")
    refused(lambda: CONV.jvp("x", "weight"), "jvp", "'weight'", "taken")
    assert CONV.jvp("x", "x") == CONV
