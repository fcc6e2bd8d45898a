"""A parameter that a model multiplies with by itself is trained as stock layers of it are."""

import pytest
from torch import nn

from oracles.uses_products import PRODUCTS, STACKS, pairs, twins
from oracles.uses_training import OPTIMIZERS, assert_equal, assert_untouched, train

FORMS = {**PRODUCTS, **STACKS}
SHAPE = (6, 8, 4)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", FORMS)
def test_steps_are_those_of_stock_layers(name: str, kind: str) -> None:
    form = FORMS[name]
    used, stock = twins(form)
    optimizer, _ = (train(net, OPTIMIZERS[kind], SHAPE) for net in (used, stock))
    assert_equal(pairs(used, stock), form.tolerance)
    rows = {row.name: row for row in optimizer.report()}
    assert [n for n, row in rows.items() if row.reason] == ["bias"] * form.added


@pytest.mark.parametrize(("approx", "micro"), [("expand", 2), ("reduce", 1), ("reduce", 3)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_samples_are_those_of_the_batch(name: str, approx: str, micro: int) -> None:
    """Also where rows are flattened or in windows, and of batches in several parts."""
    form = PRODUCTS[name]
    used, stock = twins(form)
    for net in (used, stock):
        train(net, OPTIMIZERS["SINGD dense"], SHAPE, micro, kfac_approx=approx)
    assert_equal(pairs(used, stock), form.tolerance)


@pytest.mark.parametrize("name", ["F.linear", "@, transposed"])
def test_a_matrix_whose_rows_do_not_lie_in_order(name: str) -> None:
    """All of it may be used; a part of it is refused."""
    used, stock = twins(PRODUCTS[name])
    used.weight = nn.Parameter(used.weight.detach().T.contiguous().T)
    assert not used.weight.is_contiguous()
    optimizer, _ = (train(net, OPTIMIZERS["SINGD dense"], SHAPE) for net in (used, stock))
    assert_equal(pairs(used, stock))
    assert not any(row.reason for row in optimizer.report())


@pytest.mark.parametrize("name", FORMS)
def test_outputs_and_gradients_are_those_of_the_model_alone(name: str) -> None:
    used, _ = twins(FORMS[name])
    assert_untouched(used, SHAPE)
