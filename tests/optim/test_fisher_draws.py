"""Output factors of drawn targets: the mean over draws, over micro-batches the whole batch."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.zoo import Everyday, everyday_batch, fixed_weights
from tnkfac import KFAC
from tnkfac.curvature import diagonal, kfac

SAMPLES, POSITIONS = 6, 5


def samples(module: nn.Module, shape: Any) -> float:
    return float(shape[0])


def positions(module: nn.Module, shape: Any) -> float:
    return float(shape[0] * shape[1]) if len(shape) > 2 else float(shape[0])


AVERAGES: dict[str, tuple[Any, bool, bool]] = {
    "batch": ("batch", True, False),
    "batch+sequence": ("batch+sequence", True, True),
    "sum": (None, False, False),
    "callable samples": (samples, True, False),
    "callable positions": (positions, True, True),
}
"""The argument, whether it is a mean at all, and whether one over positions."""
LIKELIHOODS = ("categorical", "gaussian", "bernoulli")
METHODS = ("eigen", "cholesky", "ekfac")
each_average = pytest.mark.parametrize("average", AVERAGES)
each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)


def terms(average: str, count: int) -> float:
    """Loss terms of a batch of this many samples."""
    _, mean, over_positions = AVERAGES[average]
    return float(count * (POSITIONS if over_positions else 1)) if mean else 1.0


class Sequence(nn.Module):
    """Maps ``[N, S, 3]`` to ``[N, S, 2]``, or ``[N, 2, S]`` for classes."""

    def __init__(self, classes: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """Every position on its own."""
        y: Tensor = self.last(self.first(x).tanh())
        return y.transpose(1, 2) if self.classes else y


def inputs(count: int = SAMPLES, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, POSITIONS, 3, generator=generator, dtype=torch.float64)


def build(average: str, likelihood: str, draws: int, method: str = "eigen") -> Any:
    model = Sequence(likelihood == "categorical")
    optimizer = KFAC(
        model.parameters(),
        lr=1e-30,
        factor_decay=0.0,
        fisher_type="mc",
        mc_samples=draws,
        loss_average=AVERAGES[average][0],
        compute_method=method,
        structures="dense",
        inv_update_steps=100,
    )
    return model, optimizer


def finish(model: Any, optimizer: KFAC, *outputs: Tensor) -> dict[str, Tensor]:
    """Step with some loss of training; the factors of this batch."""
    sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    found = {}
    for name, layer in (("first", model.first), ("last", model.last)):
        state = optimizer.state[layer.weight]
        for key in ("A", "B"):
            found[f"{name}.{key}"] = state[key] / state["factor_weight"]
        if "scales" in state:
            found[f"{name}.scales"] = state["scales"].clone()
    return found


def sampled(
    average: str, likelihood: str, draws: int, generator: torch.Generator, method: str = "eigen"
) -> dict[str, Tensor]:
    """Factors of one batch; of EKFAC in the eigenbasis of another one."""
    model, optimizer = build(average, likelihood, draws, method)
    start = torch.Generator().manual_seed(77)
    output = model(inputs())
    optimizer.param_groups[0]["mc_samples"] = 1
    optimizer.sample_fisher(output, likelihood, start)
    finish(model, optimizer, output)
    optimizer.param_groups[0]["mc_samples"] = draws
    output = model(inputs())
    optimizer.sample_fisher(output, likelihood, generator)
    return finish(model, optimizer, output)


def mean(several: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([one[key] for one in several]).mean(0) for key in several[0]}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-13, msg=key)


@pytest.mark.parametrize("method", METHODS)
@each_likelihood
@each_average
def test_draws_are_averaged(average: str, likelihood: str, method: str) -> None:
    """Ten draws give the mean of ten single ones from the same source of random numbers."""
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    found = sampled(average, likelihood, 10, one, method)
    singles = [sampled(average, likelihood, 1, other, method) for _ in range(10)]
    assert_equal(found, mean(singles))
    assert ("last.scales" in found) == (method == "ekfac")


def hessians(likelihood: str, f: Tensor) -> Tensor:
    """Of the negative log-likelihood, ``[.., C, C]`` at outputs ``[.., C]``."""
    if likelihood == "categorical":
        p = f.softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    p = f.sigmoid()
    return torch.diag_embed(p * (1 - p) if likelihood == "bernoulli" else torch.ones_like(f))


@each_likelihood
@each_average
def test_many_draws_give_the_gauss_newton_factor(average: str, likelihood: str) -> None:
    """``J^T H J`` summed over samples and positions, over the terms of the loss."""
    found = sampled(average, likelihood, 400, torch.Generator().manual_seed(0))
    model = Sequence(False)
    with torch.no_grad():
        hidden = model.first(inputs())
        H = hessians(likelihood, model.last(hidden.tanh()))
        J = model.last.weight * (1 - hidden.tanh().square())[..., None, :]
        by_layer = {"first": J.mT @ H @ J, "last": H}
    for name, each in by_layer.items():
        expected = each.sum((0, 1)) / terms(average, SAMPLES)
        error = (found[f"{name}.B"][0] - expected).norm() / expected.norm()
        assert float(error) < 0.1, name


PARTS = (slice(0, 1), slice(1, 4), slice(4, SAMPLES))


@pytest.mark.parametrize("draws", [1, 3])
@each_likelihood
@each_average
def test_micro_batches_give_the_whole_batch(average: str, likelihood: str, draws: int) -> None:
    """``B`` is the mean of those of the parts by their terms, or their sum for a summed loss."""
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    model, optimizer = build(average, likelihood, draws)
    outputs = []
    for part in PARTS:
        outputs.append(model(inputs()[part]))
        optimizer.sample_fisher(outputs[-1], likelihood, generators[0])
    found = finish(model, optimizer, *outputs)
    expected: dict[str, Any] = dict.fromkeys(found, 0.0)
    for part in PARTS:
        model, optimizer = build(average, likelihood, draws)
        output = model(inputs()[part])
        optimizer.sample_fisher(output, likelihood, generators[1])
        for key, value in finish(model, optimizer, output).items():
            share = len(output) / SAMPLES
            share = 1.0 if average == "sum" and key.endswith("B") else share
            expected[key] = expected[key] + share * value
    assert_equal(found, expected)


def targets(output: Tensor, count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        yield output.detach() + torch.randn(output.shape, generator=generator, dtype=output.dtype)


def own_loss(average: str, output: Tensor, target: Tensor, whole: int = SAMPLES) -> Tensor:
    return 0.5 * (output - target).square().sum() / terms(average, whole)


def blocks(model: Any, optimizer: KFAC, losses: Callable[[], list[Tensor]]) -> None:
    for loss in losses():
        with optimizer.fisher_pass():
            loss.backward(retain_graph=True)


def one_block(model: Any, optimizer: KFAC, losses: Callable[[], list[Tensor]]) -> None:
    with optimizer.fisher_pass():
        for loss in losses():
            loss.backward(retain_graph=True)


@pytest.mark.parametrize("around", [blocks, one_block])
@each_average
def test_draws_of_ones_own_are_averaged(average: str, around: Any) -> None:
    """Passes through the same outputs are draws, whose losses are averaged as in training."""

    def factors(chosen: slice) -> dict[str, Tensor]:
        model, optimizer = build(average, "gaussian", 1)
        output = model(inputs())
        drawn = [*targets(output, 4)][chosen]
        around(model, optimizer, lambda: [own_loss(average, output, t) for t in drawn])
        return finish(model, optimizer, output)

    singles = [factors(slice(i, i + 1)) for i in range(4)]
    assert_equal(factors(slice(4)), mean(singles))


@pytest.mark.parametrize("around", [blocks, one_block])
@each_average
def test_draws_of_ones_own_for_micro_batches(average: str, around: Any) -> None:
    """All draws of a part, part after part: as draws for the whole batch."""
    model, optimizer = build(average, "gaussian", 1)
    whole = model(inputs())
    drawn = [*targets(whole, 3)]
    around(model, optimizer, lambda: [own_loss(average, whole, t) for t in drawn])
    expected = finish(model, optimizer, whole)
    model, optimizer = build(average, "gaussian", 1)
    outputs = []
    for part in PARTS:
        output = model(inputs()[part])
        outputs.append(output)
        around(
            model,
            optimizer,
            lambda o=output, p=part: [own_loss(average, o, t[p]) for t in drawn],  # type: ignore
        )
    assert_equal(finish(model, optimizer, *outputs), expected)


def test_draws_of_ones_own_and_then_training_once_more() -> None:
    """What one step has counted does not reach the next one."""
    found = []
    for before in (False, True):
        model, optimizer = build("batch", "gaussian", 1)
        for step in range(2):
            output = model(inputs(seed=step))
            if step or before:
                with optimizer.fisher_pass():
                    for target in targets(output, 1 if step else 5):
                        own_loss("batch", output, target).backward(retain_graph=True)
            factors = finish(model, optimizer, output) if step or before else {}
        found.append(factors)
    assert_equal(*found)


def test_a_callable_that_says_what_a_name_says() -> None:
    """Also in a network with layers of several kinds that run several times."""
    found = []
    for given in (samples, "batch"):
        model = fixed_weights(Everyday(), 2.0)
        optimizer = KFAC(model.parameters(), fisher_type="mc", loss_average=given, mc_samples=2)
        x, y = everyday_batch(0)
        output = model(x)
        optimizer.sample_fisher(output, generator=torch.Generator().manual_seed(0))
        nn.functional.cross_entropy(output, y).backward()
        optimizer.step()
        state = optimizer.state
        keys = [(p, key) for p in model.parameters() for key in ("A", "B") if key in state[p]]
        found.append({str(i): state[p][key].clone() for i, (p, key) in enumerate(keys)})
        assert len(keys) == 10
    assert_equal(*found)


def test_a_single_output_per_sample() -> None:
    """Logits ``[N]`` are as many terms as there are samples."""
    found = []
    for squeezed in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        optimizer = KFAC(model.parameters(), fisher_type="mc", mc_samples=3)
        output = model(inputs()[:, 0])
        output = output.squeeze(1) if squeezed else output
        optimizer.sample_fisher(output, "bernoulli", torch.Generator().manual_seed(0))
        output.sum().backward()
        optimizer.step()
        found.append({"B": optimizer.state[model.weight]["B"]})
    assert_equal(*found)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss])
def test_estimators_average_their_draws(loss: Any, reduction: str) -> None:
    model = Sequence(loss is nn.CrossEntropyLoss)
    y = torch.zeros(SAMPLES, POSITIONS, dtype=torch.long)
    if loss is not nn.CrossEntropyLoss:
        y = torch.zeros(SAMPLES, POSITIONS, 2, dtype=torch.float64)
    average = "batch+sequence" if reduction == "mean" else None
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))

    def factors(draws: int, generator: torch.Generator) -> dict[str, Tensor]:
        found = kfac(
            model,
            loss(reduction=reduction),
            [(inputs(), y)],
            fisher_type="mc",
            mc_samples=draws,
            loss_average=average,
            generator=generator,
        )
        return {f"{name}.B": pair.B for name, pair in found.items()}

    assert_equal(factors(10, one), mean([factors(1, other) for _ in range(10)]))

    def diagonals(draws: int, generator: torch.Generator) -> dict[str, Tensor]:
        data = [(inputs(), y)]
        options: Any = {"kind": "ggn-mc", "mc_samples": draws, "generator": generator}
        return diagonal(model, loss(reduction=reduction), data, **options)

    assert_equal(diagonals(10, one), mean([diagonals(1, other) for _ in range(10)]))


@pytest.mark.parametrize("draws", [1, 3])
@each_average
def test_gradients_stay_as_they_are(draws: int, average: str) -> None:
    model, optimizer = build(average, "gaussian", draws)
    output = model(inputs())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = [p.grad for p in model.parameters()]
    optimizer.sample_fisher(output, "gaussian")
    with optimizer.fisher_pass():
        own_loss(average, output, torch.zeros_like(output)).backward(retain_graph=True)
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert all(bool((g == 7).all()) for g in before)
