"""Defaults that need no scale: damping relative to the curvature, updates of a fixed size."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import dense_factor, fit, squares, weights
from oracles.zoo import STRUCTURES, AllLayers, all_layers_batch, fixed_weights, mlp
from tnkfac import KFAC, SINGD
from tnkfac.curvature import grad_factor, input_factor
from tnkfac.curvature.layers import describe
from tnkfac.curvature.structures import resolve_structure
from tnkfac.optim.rules.kfac_rule import CLASSIC, UNTUNED

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

METHODS = (
    ("eigen", "tikhonov"),
    ("ekfac", "tikhonov"),
    ("cholesky", "pi"),
    ("cholesky", "factor"),
)


def one_conv(groups: int = 2, bias: bool = True) -> tuple[nn.Conv2d, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias).double()
    x, y = torch.randn(8, 4, 5, 5).double(), torch.randn(8, 6, 5, 5).double()
    x[:, 2:] *= 5  # channel groups of different scales
    return layer, x, y


def linear(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose gradient does not depend on the input."""
    return (output * target).flatten(1).sum(1).mean()


def true_factors(
    layer: nn.Conv2d, x: Tensor, y: Tensor, loss_fn: Any = squares
) -> tuple[Tensor, Tensor]:
    output = layer(x)
    (g,) = torch.autograd.grad(loss_fn(output, y), output)
    A, B = input_factor(layer, x), grad_factor(layer, g)
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    return A, B


def mean_trace(M: Tensor) -> Tensor:
    return M.diagonal(dim1=1, dim2=2).mean(1)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "block3diagonal"])
def test_the_start_is_at_rest_under_the_relative_damping(structure: str) -> None:
    """Without grafting the level counts: mean eigenvalue of P (B (x) A + damping I) is one."""
    layer, x, y = one_conv()
    A, B = true_factors(layer, x, y)
    share = 0.2
    optimizer = SINGD(
        layer.parameters(), structures=structure, grafting=None, relative_damping=share
    )
    fit(layer, optimizer, [(x, y)])
    state = optimizer.state[layer.weight]
    K, C = (dense_factor(state, name, structure) for name in ("K", "C"))
    for g in range(2):
        lam = share * mean_trace(A)[g] * mean_trace(B)[g]
        P = torch.kron(C[g] @ C[g].mT, K[g] @ K[g].mT)
        curvature = torch.kron(B[g], A[g])
        curvature = curvature + lam * torch.eye(len(curvature), dtype=torch.float64)
        assert torch.trace(P @ curvature) / len(P) == pytest.approx(1.0, rel=1e-8)


def equal_traces(layer: nn.Conv2d, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """An input for which both factors have the same mean eigenvalue, and that number."""
    A, B = (float(mean_trace(M)) for M in true_factors(layer, x, y, linear))
    return x * (B / A) ** 0.5, B


@pytest.mark.parametrize("kfac_like", [False, True], ids=["singd", "ikfac"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.filterwarnings("ignore:alpha1")
def test_a_number_of_the_same_size_gives_the_same_steps(structure: str, kfac_like: bool) -> None:
    """Without grafting, ``None`` is nothing but a number that follows each batch."""
    (layer, x, y), (twin, _, _) = one_conv(1, bias=False), one_conv(1, bias=False)
    shared: dict[str, Any] = {"structures": (structure, "dense"), "grafting": None, "T": 1}
    shared |= {"init": "identity", "kfac_like": kfac_like, "lr": 1e-3, "alpha1": 0.0}
    share = 0.3
    ours = SINGD(layer.parameters(), relative_damping=share, **shared)
    theirs = SINGD(twin.parameters(), damping=1.0, **shared)
    for step in range(3):
        target = y * (1 + step)
        inputs, mean = equal_traces(twin, x, target)
        theirs.param_groups[0]["damping"] = share * (mean if kfac_like else mean**2)
        fit(layer, ours, [(inputs, target)], linear)
        fit(twin, theirs, [(inputs, target)], linear)
        torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_scale_of_the_loss_does_not_matter(structure: str, scale: float) -> None:
    """Gradients shrink by orders of magnitude in training; the preconditioner must not fade."""
    assert_same_for_scaled_loss(SINGD, scale, {"structures": structure, "T": 2})


@pytest.mark.parametrize("scale", [1e-8, 1e6])
@pytest.mark.parametrize(("method", "damping_type"), METHODS)
def test_nor_does_it_for_kfac(method: str, damping_type: str, scale: float) -> None:
    options = {"compute_method": method, "damping_type": damping_type, "inv_update_steps": 2}
    assert_same_for_scaled_loss(KFAC, scale, options)


def test_with_a_number_it_does() -> None:
    """So the comparison above can fail."""
    with pytest.raises(AssertionError):
        assert_same_for_scaled_loss(SINGD, 1e-8, {"structures": "dense", "damping": 1e-3})


def assert_same_for_scaled_loss(cls: Any, scale: float, options: dict[str, Any]) -> None:
    runs = []
    for factor in (1.0, scale):
        model = fixed_weights(AllLayers())
        optimizer = cls(model.parameters(), lr=1e-3, fallback="sgd", **options)
        batches = [all_layers_batch(seed) for seed in range(4)]
        fit(model, optimizer, batches, lambda a, b, factor=factor: factor * squares(a, b))
        runs.append(weights(model))
    for name, expected in runs[0].items():
        torch.testing.assert_close(runs[1][name], expected, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "average",
    ["batch+sequence", None, lambda m, s: 17.0],
    ids=["batch+sequence", "sum", "callable"],
)
@pytest.mark.parametrize("cls", [SINGD, KFAC])
def test_nor_does_what_the_loss_is_averaged_over(cls: Any, average: Any) -> None:
    """A wrong ``loss_average`` cannot spoil training with the defaults."""
    found = []
    for given in ("batch", average):
        model = fixed_weights(AllLayers())
        optimizer = cls(model.parameters(), lr=1e-3, loss_average=given)
        fit(model, optimizer, [all_layers_batch(seed) for seed in range(4)])
        found.append(weights(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(("method", "damping_type"), METHODS)
def test_kfac_damps_by_a_share_of_the_mean_eigenvalue(method: str, damping_type: str) -> None:
    """Against the same step with numbers worked out from the factors."""
    (layer, x, y), (twin, _, _) = one_conv(1, bias=False), one_conv(1, bias=False)
    x, mean = equal_traces(layer, x, y)  # "factor" has a unit for each factor
    share = 0.1
    damping = share * (mean if damping_type == "factor" else mean**2)
    options: dict[str, Any] = {"compute_method": method, "damping_type": damping_type}
    options |= {"kl_clip": None, "momentum": 0.0, "lr": 1.0, "grafting": None}
    ours = KFAC(layer.parameters(), damping=None, relative_damping=share, **options)
    fit(layer, ours, [(x, y)], linear)
    fit(twin, KFAC(twin.parameters(), damping=damping, **options), [(x, y)], linear)
    torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("cls", [SINGD, KFAC])
def test_inputs_of_zero_do_no_harm(cls: Any) -> None:
    """A factor of zeros has no mean eigenvalue to be relative to."""
    model = mlp(3, 4, 2)
    optimizer = cls(model.parameters(), lr=1e-2)
    zero = torch.zeros(8, 3).double()
    fit(model, optimizer, [(zero, torch.zeros(8, 2).double())] * 3)
    fit(model, optimizer, [(torch.randn(8, 3).double(), torch.randn(8, 2).double())] * 3)
    assert all(value.isfinite().all() for value in weights(model).values())


@pytest.mark.parametrize("lower", ["triltoeplitz", "triutoeplitz"])
def test_toeplitz_measures_the_trace_beside_its_statistic(lower: str) -> None:
    """The statistic depends on the factor in use, the trace of ``A`` must not."""
    layer, x, _ = one_conv(groups=1)
    structure = resolve_structure(lower, describe(layer).in_dim)
    K = structure.identity(1, torch.float64, x.device)[0] * 3
    moment = describe(layer).input_moment(x, "expand")
    expected = moment.dense().diagonal(dim1=1, dim2=2).mean(1)
    for factor in (None, (K,)):
        found = structure.statistic_trace(structure.statistic(moment, factor))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [0.05, 1.0, 3])
@pytest.mark.parametrize("cls", [SINGD, KFAC])
def test_grafting_takes_a_number(cls: Any, size: float) -> None:
    """It is the root mean square of an update; ``"rms"`` is 0.2."""
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    batch = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    before = weights(model)
    fit(model, cls(model.parameters(), lr=0.1, momentum=0.0, grafting=size), [batch])
    fit(twin, cls(twin.parameters(), lr=0.1, momentum=0.0, grafting="rms"), [batch])
    joint = torch.cat(
        [(before[n] - p.detach()).flatten() for n, p in model[0].named_parameters(prefix="0")]
    )
    assert joint.square().mean().sqrt().item() == pytest.approx(0.1 * size, rel=1e-9)
    for name, value in weights(model).items():
        moved, other = value - before[name], weights(twin)[name] - before[name]
        torch.testing.assert_close(moved, other * size / 0.2)


RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing given": ({}, UNTUNED),
    "damping as a tensor": (
        {"damping": torch.tensor(0.5)},
        {**CLASSIC, "damping": torch.tensor(0.5)},
    ),
    "no trust region": ({"kl_clip": None}, UNTUNED),
    "damping": ({"damping": 1e-2}, {**CLASSIC, "damping": 1e-2}),
    "trust region": ({"kl_clip": 1e-2}, {**CLASSIC, "kl_clip": 1e-2}),
    "adaptive": ({"adaptive_damping": True}, CLASSIC),
    "kfac-pytorch": ({"normalization": "kfac-pytorch"}, CLASSIC),
    "damping, no trust region": (
        {"damping": 1e-2, "kl_clip": None},
        {**CLASSIC, "damping": 1e-2, "kl_clip": None},
    ),
    "damping, grafting": (
        {"damping": 1e-2, "grafting": "rms", "momentum": 0.8},
        {**CLASSIC, "damping": 1e-2, "grafting": "rms", "momentum": 0.8},
    ),
    "relative, no grafting": (
        {"damping": None, "grafting": None},
        {**UNTUNED, "grafting": None},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_kfac_makes_of_arguments_that_are_left_out(name: str) -> None:
    """Who brings a tuned damping or trust region gets the classic with it."""
    given, expected = RECIPES[name]
    (group,) = KFAC(mlp(3, 2).parameters(), **given).param_groups
    assert {key: group[key] for key in expected} == expected


def test_adaptive_damping_needs_a_number() -> None:
    with pytest.raises(ValueError, match=r"damping: got None.*a number"):
        KFAC(mlp(3, 2).parameters(), damping=None, adaptive_damping=True)
