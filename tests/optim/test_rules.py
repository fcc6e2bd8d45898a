"""Rules of one's own, made of what the package exports."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import fit, weights
from oracles.soap import SOAP, SoapRule
from oracles.zoo import AllLayers, Everyday, all_layers_batch, everyday_batch, fixed_weights
from tnkfac.optim import CurvatureOptimizer, Needs, Option, Rule, options

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def soap_by_hand(weight: Tensor, gradients: list[Tensor], lr: float, every: int) -> Tensor:
    """SOAP of one matrix, by the formulas of arXiv 2409.11321, algorithm 3."""
    rows, columns = weight.shape
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    L, R = torch.zeros(rows, rows).double(), torch.zeros(columns, columns).double()
    Q_L, Q_R = torch.eye(rows).double(), torch.eye(columns).double()
    for step, G in enumerate(gradients):
        if step and (step == 1 or step % every == 0):
            Q_L, Q_R = torch.linalg.eigh(L)[1], torch.linalg.eigh(R)[1]
        mean = 0.95 * mean + 0.05 * G
        square = 0.95 * square + 0.05 * (Q_L.T @ G @ Q_R) ** 2
        L, R = 0.95 * L + 0.05 * G @ G.T, 0.95 * R + 0.05 * G.T @ G
        scale = 1 - 0.95 ** (step + 1)
        turned = Q_L.T @ (mean / scale) @ Q_R / ((square / scale).sqrt() + 1e-8)
        weight = weight - lr * Q_L @ turned @ Q_R.T
    return weight


@pytest.mark.parametrize("every", [1, 3])
def test_soap_of_a_matrix(every: int) -> None:
    """Gradients of so many ranks that eigenvectors are unique, but for their signs."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 5, bias=False).double()
    optimizer = SOAP(layer.parameters(), lr=0.01, precondition_frequency=every)
    start = layer.weight.detach().clone()
    gradients = [torch.randn(5, 4, dtype=torch.float64) for _ in range(8)]
    for step, G in enumerate(gradients):
        layer.weight.grad = G.clone()
        optimizer.step()
        expected = soap_by_hand(start, gradients[: step + 1], 0.01, every)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-7, atol=1e-9)


def test_soap_trains_every_layer_and_goes_on_from_a_copy() -> None:
    model = fixed_weights(AllLayers())
    optimizer = SOAP(model.parameters(), lr=1e-2)
    before = weights(model)
    fit(model, optimizer, [all_layers_batch(seed) for seed in range(4)])
    for name, value in weights(model).items():
        assert not torch.equal(value, before[name]), name
    assert {row.last_update for row in optimizer.report() if row.approximation} == {3}
    twin, other = copy.deepcopy((model, optimizer))
    for net, its in ((model, optimizer), (twin, other)):
        fit(net, its, [all_layers_batch(9)])
    for name, value in weights(model).items():
        assert torch.equal(value, weights(twin)[name]), name


def test_soap_against_adamw() -> None:
    """Each at its best learning rate of four: the mean loss of 60 steps."""
    means: dict[str, list[float]] = {}
    for name, make in {"SOAP": SOAP, "AdamW": torch.optim.AdamW}.items():
        for lr in (3e-3, 1e-2, 3e-2, 1e-1):
            torch.manual_seed(0)
            model = Everyday()
            optimizer = make(model.parameters(), lr=lr, weight_decay=0.0)
            losses = []
            for step in range(60):
                x, y = everyday_batch(step, 16)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x.float()), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            means.setdefault(name, []).append(sum(losses) / len(losses))
    assert min(means["SOAP"]) < min(means["AdamW"])


class Curvature(Rule):
    """Divides by the damped diagonal of the curvature: the smallest rule with statistics."""

    options: ClassVar[Mapping[str, Option]] = {
        **options.SHARED,
        "structures": options.SHARED["structures"].but("diagonal"),
        "decay": Option(0.9, options.number, "of the averages of both factors"),
        "shift": Option(0.1, options.number, "added to the product"),
    }

    def init(self, layer: Any) -> dict[str, tuple[Tensor, ...]]:
        kind = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        groups, k, c = layer.statistics.layer.groups, layer.statistics.k, layer.statistics.c
        return {"A": k.identity(groups, **kind), "B": c.identity(groups, **kind)}

    def update(self, batch: Any) -> dict[str, tuple[Tensor, ...]]:
        (A,), (B,) = batch.factors()
        rate = 1 - batch.group["decay"]
        return {"A": (batch.read("A")[0].lerp(A, rate),), "B": (batch.read("B")[0].lerp(B, rate),)}

    def precondition(self, batch: Any, gradient: Tensor) -> Tensor:
        (A,), (B,) = batch.read("A"), batch.read("B")
        return gradient / (B[:, :, None] * A[:, None, :] + batch.group["shift"])


class Diagonal(CurvatureOptimizer):
    """A class of one's own has no more than its rule."""

    rule = Curvature()


def test_a_rule_with_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()
    twin = copy.deepcopy(model)
    optimizer = Diagonal(model.parameters(), lr=0.1)
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    averages: dict[int, list[Tensor]] = {}
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        hidden = twin[0](x)
        output = twin[3](hidden.tanh().flatten(1))
        g_0, g_3, *grads = torch.autograd.grad(
            output.square().mean(), [hidden, output, *twin.parameters()]
        )
        for param, grad in zip(twin.parameters(), grads, strict=True):
            param.grad = grad
        unfolded = nn.functional.unfold(x, 2).mT.flatten(0, 1)
        for i, rows, g in (
            (0, unfolded, g_0.flatten(2).mT.flatten(0, 1)),
            (3, hidden.tanh().flatten(1).detach(), g_3),
        ):
            layer = twin[i]
            rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
            A, B = rows.square().mean(0), g.square().sum(0) * len(x)
            old = averages.setdefault(i, [torch.ones_like(A), torch.ones_like(B)])
            averages[i] = [o.lerp(n, 0.1) for o, n in zip(old, (A, B), strict=True)]
            A, B = averages[i]
            joint = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
            move = joint / (B[:, None] * A + 0.1)
            with torch.no_grad():
                layer.weight -= 0.1 * move[:, :-1].view_as(layer.weight)
                layer.bias -= 0.1 * move[:, -1]
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[name], rtol=1e-10, atol=1e-12)


class Wrong(SoapRule):
    """Uses a name of the optimizer's own."""

    def init(self, layer: Any) -> dict[str, tuple[Tensor, ...]]:
        kept = super().init(layer)
        return {**kept, "step": kept["count"]}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"betas": 0.9}, TypeError, "betas: got 0.9"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
        ({"momentun": 0.9}, TypeError, "Did you mean 'momentum'"),
        ({"fallback_options": {"beta": 1}}, ValueError, "fallback_options: got 'beta'"),
    ],
    ids=str,
)
def test_options_of_a_rule_are_checked(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SOAP(nn.Linear(2, 2).parameters(), **given)


def test_a_near_miss_in_a_group_warns() -> None:
    with pytest.warns(UserWarning, match="did you mean 'precondition_frequency'"):
        SOAP([{"params": nn.Linear(2, 2).parameters(), "precondition_frequenzy": 3}])


def test_names_of_the_optimizer_are_not_for_rules() -> None:
    class Optimizer(CurvatureOptimizer):
        rule = Wrong()

    layer = nn.Linear(3, 2)
    optimizer = Optimizer(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    with pytest.raises(ValueError, match="got a matrix 'step'"):
        optimizer.step()


def test_what_a_rule_needs_is_what_is_measured() -> None:
    """SOAP has no use for statistics, so that its passes measure none."""
    assert SoapRule().needs({}) == Needs(statistics=False)
    layer = nn.Linear(3, 2)
    optimizer = SOAP(layer.parameters())
    layer(torch.ones(4, 3)).sum().backward()
    (captured,) = optimizer._registry.layers
    assert not captured.statistics.pending
