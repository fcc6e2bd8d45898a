"""`tnkfac.curvature.kfac` against Jacobians and Hessians of autograd, and its `Kronecker`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import factors as oracle
from oracles.compare import assert_close
from oracles.curvature import ggn, joint, layer_indices, output_hessian
from tnkfac.curvature import kfac

EXACT = 1e-10
Data = list[tuple[Tensor, Tensor]]


class Positions(nn.Module):
    """Mean over all positions; a layer before it is one of KFAC-reduce's exact cases."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class Tokens(nn.Module):
    """Mean over the positions between batch and features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear on sequences": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 2, 3, stride=2, padding=1, dilation=2), (3, 9)),
    "conv1d, circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=1), (2, 5, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 2, groups=2, padding="same"), (4, 4, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False), (3, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=(1, 2, 1)), (1, 3, 4, 3)),
    "conv_transpose1d": (
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1, dilation=2),
        (2, 4),
    ),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
        (2, 3, 3),
    ),
    "conv_transpose2d, groups": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), groups=2, bias=False),
        (4, 3, 2),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 1, 2, stride=2), (2, 2, 2, 2)),
}

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "mse": nn.MSELoss,
    "cross-entropy": nn.CrossEntropyLoss,
    "bce": nn.BCEWithLogitsLoss,
}


def targets(loss: str, outputs: Tensor) -> Tensor:
    if loss == "cross-entropy":
        classes = outputs.shape[1]
        return torch.randint(classes, (outputs.shape[0], *outputs.shape[2:]))
    return torch.rand_like(outputs).round() if loss == "bce" else torch.randn_like(outputs)


def make_data(model: nn.Module, shape: tuple[int, ...], loss: str, sizes: list[int]) -> Data:
    data = []
    for size in sizes:
        x = torch.randn(size, *shape)
        with torch.no_grad():
            data.append((x, targets(loss, model(x))))
    return data


def block(model: nn.Module, matrix: Tensor, name: str) -> Tensor:
    """Rows and columns of one layer, without what couples its channel groups."""
    indices = layer_indices(model, name).flatten(1)
    return torch.block_diag(*(matrix[group][:, group] for group in indices))


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


# --- exact cases --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_under_mse_is_the_exact_ggn(name: str, approx: str, reduction: str) -> None:
    build, shape = LAYERS[name]
    tail: nn.Module = nn.Identity()
    if approx == "reduce":
        tail = Tokens() if name.startswith("linear") and len(shape) > 1 else Positions()
        tail = nn.Identity() if name == "linear" else tail
    model = nn.Sequential(build(), tail)
    data = make_data(model, shape, "mse", [3, 1, 2])
    loss_fn = nn.MSELoss(reduction=reduction)
    found = kfac(model, loss_fn, data, approx=approx)
    assert list(found) == ["0"]
    assert_close(found["0"].to_dense(), block(model, ggn(model, loss_fn, data), "0"), EXACT)


STACKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3)), (3,)),
    "1x1 convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, bias=False)),
        (3, 3, 2),
    ),
    "1x1 transposed convolutions": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 1), nn.ConvTranspose2d(3, 2, 1)),
        (2, 3, 2),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_deep_linear_stacks_under_mse_are_exact(name: str) -> None:
    build, shape = STACKS[name]
    model = build()
    data = make_data(model, shape, "mse", [4, 3])
    full = ggn(model, nn.MSELoss(), data)
    for key, kronecker in kfac(model, nn.MSELoss(), data).items():
        assert_close(kronecker.to_dense(), block(model, full, key), EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_sample_without_weight_sharing_is_exact(loss: str, reduction: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = make_data(model, (4,), loss, [1])
    loss_fn = LOSSES[loss](reduction=reduction)
    full = ggn(model, loss_fn, data)
    for key, kronecker in kfac(model, loss_fn, data).items():
        assert_close(kronecker.to_dense(), block(model, full, key), EXACT)


# --- factors of a network by their definition ---------------------------------------------------


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, bias=False),
        nn.Tanh(),
        nn.AvgPool2d(6),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def defined_factors(
    model: nn.Sequential, loss_fn: nn.Module, data: Data, at: int, approx: str, empirical: bool
) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of one layer, a sample at a time."""
    x, y = joint(data)
    inside = model[:at](x).detach()
    layer, tail = model[at], model[at + 1 :]
    with torch.no_grad():
        after = layer(inside).clone()
    outputs = tail(after.clone()).detach()
    root = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(root, y), root)
    hess = output_hessian(loss_fn, outputs, y).reshape(*outputs.shape, *outputs.shape)
    total: Any = 0.0
    for n in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda z: tail(z.clone().unsqueeze(0))[0], after[n]
        )
        flat = jacobian.flatten(0, outputs.ndim - 2)
        square = hess[n].flatten(0, outputs.ndim - 2)[..., n, :].flatten(1)
        values, vectors = torch.linalg.eigh(square)
        columns = (vectors * values.clamp(min=0).sqrt()).T
        if empirical:
            columns = gradient[n].flatten().unsqueeze(0)
        for column in columns:
            g = torch.tensordot(column, flat, 1).unsqueeze(0)
            scale = float(len(x)) if empirical and loss_fn.reduction == "mean" else 1.0
            total = total + scale * oracle.grad_factor(layer, g, approx, "dense", 1.0)
    return oracle.input_factor(layer, inside, approx, "dense"), total


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_factors_of_a_network(loss: str, reduction: str, approx: str, fisher_type: str) -> None:
    model = convnet()
    data = make_data(model, (2, 6, 6), loss, [2, 1])
    loss_fn = LOSSES[loss](reduction=reduction)
    found = kfac(model, loss_fn, data, approx=approx, fisher_type=fisher_type)
    assert list(found) == ["0", "2", "6"]
    for key, kronecker in found.items():
        expected = defined_factors(
            model, loss_fn, data, int(key), approx, fisher_type == "empirical"
        )
        assert_close(kronecker.A, expected[0], EXACT)
        assert_close(kronecker.B, expected[1], EXACT)


def test_cross_entropy_over_positions() -> None:
    """A 1x1 convolution that classifies pixels is a linear layer on more samples."""
    conv, linear = nn.Conv2d(3, 4, 1), nn.Linear(3, 4)
    linear.load_state_dict(
        {k: v.flatten(1) if v.ndim > 1 else v for k, v in conv.state_dict().items()}
    )
    x, y = torch.randn(2, 3, 3, 2), torch.randint(4, (2, 3, 2))
    rows = x.movedim(1, -1).reshape(-1, 3)
    for fisher_type in ("type-2", "empirical"):
        pixels = kfac(nn.Sequential(conv), nn.CrossEntropyLoss(), [(x, y)], fisher_type=fisher_type)
        samples = kfac(
            nn.Sequential(linear),
            nn.CrossEntropyLoss(),
            [(rows, y.flatten())],
            fisher_type=fisher_type,
        )
        assert_close(pixels["0"].A, samples["0"].A, EXACT)
        assert_close(pixels["0"].B, samples["0"].B, EXACT)


def test_a_reused_layer_sums_over_its_calls() -> None:
    """Two calls are two positions of KFAC-expand."""
    layer = nn.Linear(3, 3)
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    found = kfac(nn.Sequential(layer, layer), nn.MSELoss(reduction="sum"), [(x, y)])["0"]
    inside = layer(x).detach()
    A = (oracle.input_factor(layer, x) + oracle.input_factor(layer, inside)) / 2
    W = layer.weight.detach()
    assert_close(found.A, A, EXACT)
    assert_close(found.B, 2 * 5 * (torch.eye(3) + W.T @ W).unsqueeze(0), EXACT)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    found = kfac(model, nn.MSELoss(), make_data(model, (3,), "mse", [2]))
    assert {name: tuple(k.A.shape) for name, k in found.items()} == {"1": (1, 4, 4), "2": (1, 5, 5)}


def test_forward_only_needs_no_backward() -> None:
    model = convnet()
    data = make_data(model, (2, 6, 6), "mse", [2])
    exact = kfac(model, nn.MSELoss(), data)
    found = kfac(model, nn.MSELoss(), data, fisher_type="forward-only")
    for key, kronecker in found.items():
        assert torch.equal(kronecker.A, exact[key].A)
        assert torch.equal(kronecker.B, torch.eye(kronecker.B.shape[1]).expand_as(kronecker.B))


# --- Monte Carlo --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_monte_carlo_converges_like_its_square_root(loss: str, reduction: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    data = make_data(model, (3,), loss, [3, 2])
    loss_fn = LOSSES[loss](reduction=reduction)
    exact = kfac(model, loss_fn, data)
    generator = torch.Generator().manual_seed(7)

    def error(mc_samples: int) -> float:
        squares = 0.0
        for _ in range(64):
            found = kfac(
                model, loss_fn, data, fisher_type="mc", mc_samples=mc_samples, generator=generator
            )
            squares += sum(
                float(((found[k].B - exact[k].B).norm() / exact[k].B.norm()) ** 2) for k in exact
            )
        return squares**0.5

    few, many = error(4), error(4 * 16)
    assert 2.9 < few / many < 5.3, "expected a ratio of 4"


def test_equal_generators_give_equal_factors() -> None:
    model = convnet()
    data = make_data(model, (2, 6, 6), "cross-entropy", [2, 2])
    state = torch.get_rng_state()
    first, second = (
        kfac(
            model,
            nn.CrossEntropyLoss(),
            data,
            fisher_type="mc",
            mc_samples=3,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    )
    assert all(torch.equal(first[k].B, second[k].B) for k in first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"


# --- manners ------------------------------------------------------------------------------------


def test_nothing_changes_in_the_model() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 2))
    data = make_data(model, (2, 6), "mse", [4])
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kfac(model, nn.MSELoss(), data)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "0.weight")
    assert not any(m._forward_hooks for m in model.modules())


def test_an_optimizer_on_the_model_notices_nothing() -> None:
    import tnkfac

    def train(look: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        optimizer = tnkfac.SINGD(model.parameters(), T=1)
        data = make_data(model, (3,), "mse", [4] * 3)
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            if look:
                kfac(model, nn.MSELoss(), data)
            optimizer.step()
        return model[0].weight.detach()

    assert torch.equal(train(True), train(False))


def test_under_no_grad_and_in_eval_mode() -> None:
    model = convnet().eval()
    data = make_data(model, (2, 6, 6), "mse", [2])
    with torch.no_grad():
        found = kfac(model, nn.MSELoss(), data)
    assert_close(found["0"].B, kfac(model.train(), nn.MSELoss(), data)["0"].B, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_summed_in_float32(dtype: torch.dtype) -> None:
    model = convnet()
    data = make_data(model, (2, 6, 6), "mse", [4])
    exact = kfac(model, nn.MSELoss(), data)
    small = model.to(dtype)
    found = kfac(small, nn.MSELoss(), [(x.to(dtype), y.to(dtype)) for x, y in data])
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    for key in exact:
        assert found[key].A.dtype == found[key].B.dtype == torch.float32
        assert_close(found[key].A.double(), exact[key].A, tolerance)
        assert_close(found[key].B.double(), exact[key].B, tolerance)


def test_empty_batches_count_nothing() -> None:
    model = convnet()
    data = make_data(model, (2, 6, 6), "mse", [2])
    empty = (torch.empty(0, 2, 6, 6), torch.empty(0, 3))
    expected = kfac(model, nn.MSELoss(), data)
    found = kfac(model, nn.MSELoss(), [empty, *data, empty])
    nothing = kfac(model, nn.MSELoss(), [empty])
    for key in expected:
        assert torch.equal(found[key].A, expected[key].A)
        assert torch.equal(found[key].B, expected[key].B)
        assert float(nothing[key].A.abs().sum() + nothing[key].B.abs().sum()) == 0


def test_layers_that_do_not_run_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].extra = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="'0.extra' did not run"):
        assert list(kfac(model, nn.MSELoss(), make_data(model, (3,), "mse", [2]))) == ["0"]
