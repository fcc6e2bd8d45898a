"""The slow SINGD reference against recorded runs of ``singd`` 0.0.5 and against plain facts."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from oracles.layer_matrices import from_matrix, output_columns, to_matrix, unfold_input
from oracles.singd_cases import (
    CASE_NAMES,
    STEPS,
    TOLERANCE,
    assert_close_to_record,
    assert_numbers_close,
    build_model,
    get_case,
    load_record,
    micro_batches,
    numbers,
    probe,
)
from oracles.singd_reference import SingdReference, project, structure_support

assert_equal = partial(assert_close, rtol=0.0, atol=TOLERANCE)

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (2, 4)),
    "linear, no bias": (nn.Linear(4, 3, bias=False), (2, 4)),
    "linear, 4-d": (nn.Linear(4, 3), (2, 3, 2, 4)),
    "linear, unbatched": (nn.Linear(4, 3), (4,)),
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (2, 2, 7)),
    "conv1d, reflect": (nn.Conv1d(2, 3, 4, padding=3, padding_mode="reflect"), (2, 2, 5)),
    "conv1d, valid, unbatched": (nn.Conv1d(2, 3, 2, padding="valid"), (2, 5)),
    "conv2d, groups": (nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=1, groups=2), (2, 4, 4, 5)),
    "conv2d, same, even": (nn.Conv2d(2, 3, (4, 2), padding="same", dilation=(1, 3)), (2, 2, 5, 4)),
    "conv2d, same, circular": (
        nn.Conv2d(2, 3, (4, 3), padding="same", padding_mode="circular", bias=False),
        (2, 2, 5, 4),
    ),
    "conv2d, replicate": (nn.Conv2d(2, 3, 3, 2, 2, padding_mode="replicate"), (2, 2, 5, 4)),
    "conv3d, depthwise": (nn.Conv3d(2, 4, (1, 2, 3), padding=1, groups=2), (1, 2, 2, 3, 3)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, 2, 1, output_padding=1, dilation=2), (2, 2, 4)),
    "transposed 2d, groups": (
        nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), padding=(1, 0), groups=2),
        (2, 4, 3, 2),
    ),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2, (2, 1, 1), bias=False), (1, 2, 2, 2, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_matrix_times_unfolded_input(name: str) -> None:
    module, shape = LAYERS[name]
    module = copy.deepcopy(module).double()
    x = numbers(*shape, seed=1)
    out = module(x)
    u = unfold_input(module, x, out)
    matrix = to_matrix(module, module.weight, module.bias)
    assert_equal(matrix @ u, output_columns(module, out))

    g = numbers(*out.shape, seed=2)
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    gradients = torch.autograd.grad(out, parameters, g)
    columns = torch.einsum("ngcs,ngds->gcd", output_columns(module, g), u)
    for actual, expected in zip(from_matrix(module, columns), gradients, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_reference_equals_recorded_singd(name: str) -> None:
    case = get_case(name)
    record = load_record(case)
    reference = SingdReference(build_model(), case.loss_fn, **case.options)
    losses = [reference.step(micro_batches(case, step)) for step in range(STEPS)]
    assert_close_to_record(record, reference.model, losses)
    for kind, factors in (("K", reference.K), ("C", reference.C)):
        assert factors.keys() == record[kind].keys()
        for layer, factor in factors.items():
            assert_numbers_close(f"{kind} of {layer}", probe(factor[0]), record[kind][layer])


@pytest.mark.parametrize(
    "structure",
    [
        "dense",
        "diagonal",
        "block2diagonal",
        "hierarchical2_1",
        "triltopleftdiag",
        "triutopleftdiag",
    ],
)
def test_projection_inverts_symmetrisation(structure: str) -> None:
    support = structure_support(structure, 5)
    m = numbers(2, 5, 5, seed=3) * support
    m = torch.where(support & support.T, (m + m.mT) / 2, m)
    assert_equal(project(structure, (m + m.mT) / 2), m)


def mean_squares(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error summed over outputs, averaged over samples."""
    return (output - target).square().flatten(1).sum(1).mean()


def sum_squares(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error summed over everything."""
    return (output - target).square().sum()


def assert_same_run(first: SingdReference, second: SingdReference) -> None:
    """Assert that two references ended with the same factors and weights."""
    for name, K in first.K.items():
        assert_equal(second.K[name], K)
        assert_equal(second.C[name], first.C[name])
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert_equal(q, p)


@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence", None])
def test_uneven_micro_batches_equal_the_whole_batch(
    loss_average: str | None, approx: str, kfac_like: bool
) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Linear(6, 2)).double()
    loss_fn = sum_squares if loss_average is None else mean_squares
    options = {"T": 1, "lr_cov": 0.05, "lr": 0.01, "structures": ("dense", "diagonal")}
    options |= {"loss_average": loss_average, "kfac_like": kfac_like, "kfac_approx": approx}
    whole, split = (SingdReference(model, loss_fn, **options) for _ in range(2))
    for step in range(3):
        x, y = numbers(6, 2, 6, seed=step), numbers(6, 3, 2, seed=50 + step)
        whole.step([(x, y, 1.0)])
        weights = (1.0, 1.0) if loss_average is None else (4 / 6, 2 / 6)
        split.step([(x[:4], y[:4], weights[0]), (x[4:], y[4:], weights[1])])
    assert_same_run(whole, split)


class Twice(nn.Module):
    """Apply one layer to two inputs, by the same module or by two that share parameters."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = self.first
        if tied:
            self.second = nn.Linear(3, 2)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 6]`` to ``[2 N, 2]``."""
        return torch.cat([self.first(x[:, :3]), self.second(input=x[:, 3:])])


@pytest.mark.parametrize("tied", [False, True])
def test_layer_used_twice_equals_twice_the_batch(tied: bool) -> None:
    twice = Twice(tied)
    options = {"T": 1, "lr_cov": 0.1, "kfac_like": True}
    a = SingdReference(twice, mean_squares, **options)
    plain = SingdReference(nn.Sequential(twice.first), mean_squares, **options)
    for step in range(3):
        x, y = numbers(4, 6, seed=step), numbers(8, 2, seed=50 + step)
        a.step([(x, y, 1.0)])
        plain.step([(torch.cat([x[:, :3], x[:, 3:]]), y, 1.0)])
    assert_equal(a.K["first"], plain.K["0"])
    assert_equal(a.C["first"], plain.C["0"])
    assert_equal(a.model.first.weight, plain.model[0].weight)


def test_channel_groups_are_layers_of_their_own() -> None:
    grouped: Any = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    options = {"T": 1, "lr_cov": 0.1, "normalize_lr_cov": True, "loss_average": None}
    reference = SingdReference(nn.Sequential(grouped), sum_squares, **options)
    halves = []
    for g in range(2):
        conv: Any = nn.Conv2d(2, 3, 3, padding=1).double()
        conv.weight.data, conv.bias.data = grouped.weight[3 * g :][:3], grouped.bias[3 * g :][:3]
        halves.append(SingdReference(nn.Sequential(conv), sum_squares, **options))
    for step in range(3):
        x, y = numbers(3, 4, 4, 3, seed=step), numbers(3, 6, 4, 3, seed=50 + step)
        reference.step([(x, y, 1.0)])
        for g, half in enumerate(halves):
            half.step([(x[:, 2 * g :][:, :2], y[:, 3 * g :][:, :3], 1.0)])
    for kind in ("K", "C"):
        joined = torch.cat([getattr(half, kind)["0"] for half in halves])
        assert_equal(getattr(reference, kind)["0"], joined)
    weights = torch.cat([half.model[0].weight for half in halves])
    assert_equal(reference.model[0].weight, weights)


class Partial(nn.Module):
    """A network with a norm, an activation in place, and a layer used for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.LayerNorm(4))
        self.sometimes = nn.Linear(4, 4)

    def forward(self, inputs: tuple[Tensor, bool]) -> Tensor:
        """Map ``[N, 3]`` to ``[N, 4]``; the flag says whether the last layer takes part."""
        x: Tensor = self.body(inputs[0])
        return self.sometimes(x) if inputs[1] else x


def test_other_parameters_stay_and_unused_layers_wait() -> None:
    reference = SingdReference(Partial(), mean_squares, T=1, lr_cov=0.1)
    model, start = reference.model, copy.deepcopy(reference.model)
    x, y = numbers(4, 3, seed=1), numbers(4, 4, seed=2)
    reference.step([((x, False), y, 1.0)])
    assert not torch.equal(model.body[0].weight, start.body[0].weight)
    assert torch.equal(model.sometimes.weight, start.sometimes.weight)
    assert torch.equal(reference.K["sometimes"][0], torch.eye(5).double())
    reference.step([((x, True), y, 1.0)])
    assert not torch.equal(model.sometimes.weight, start.sometimes.weight)
    assert torch.equal(model.body[2].weight, start.body[2].weight)
