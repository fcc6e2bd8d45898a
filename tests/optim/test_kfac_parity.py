"""KFAC against a slow dense reference, and its theory."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.grids import all_pairs
from oracles.kfac_reference import KfacReference
from oracles.layer_matrices import to_matrix
from oracles.loops import dense_factor, squares
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights, mlp
from tnkfac import KFAC

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

METHODS = (
    ("eigen", "tikhonov"),
    ("cholesky", "pi"),
    ("cholesky", "factor"),
    ("ekfac", "tikhonov"),
)
STRUCTURES = ("dense", "diagonal", "block3diagonal")
SAMPLES = 24  # factors of full rank: else eigenvectors are not unique
UNEVEN = (5, 16, 3)
BASE: dict[str, Any] = {
    "lr": 0.05,
    "momentum": 0.9,
    "damping": 0.05,
    "factor_decay": 0.8,
    "inv_update_steps": 2,
    "kl_clip": 1e-2,
    "structures": ("dense", "dense"),
}
SETTINGS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "default": ((SAMPLES,), {}),
    "uneven": (UNEVEN, {}),
    "intervals": ((SAMPLES,), {"factor_update_steps": 2, "inv_update_steps": 4}),
    "every step": ((SAMPLES,), {"inv_update_steps": 1}),
    "sum": (UNEVEN, {"loss_average": None, "lr": 0.01}),
    "batch+sequence": ((SAMPLES,), {"loss_average": "batch+sequence"}),
    "no clip": ((SAMPLES,), {"kl_clip": None, "lr": 1e-3}),
    "no decay of factors": ((SAMPLES,), {"factor_decay": 0.0}),
    "nesterov": ((SAMPLES,), {"nesterov": True}),
    "weight decay": ((SAMPLES,), {"weight_decay": 0.1, "momentum": 0.0}),
}


def sum_squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


@pytest.mark.parametrize(
    ("method", "approx", "setting"), all_pairs(METHODS, ["expand", "reduce"], SETTINGS)
)
def test_steps_equal_the_reference(method: tuple[str, str], approx: str, setting: str) -> None:
    """Every layer type; one step, and several with refreshed decompositions between them."""
    split, changed = SETTINGS[setting]
    compare(method, split, {**BASE, "kfac_approx": approx, **changed})


@pytest.mark.parametrize(
    "pair",
    [
        *((s, s) for s in STRUCTURES[1:]),
        ("dense", "diagonal"),
        ("block3diagonal", "dense"),
        ("diagonal", "block2diagonal"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("method", METHODS, ids="-".join)
def test_structures(method: tuple[str, str], pair: tuple[str, str]) -> None:
    compare(method, UNEVEN, {**BASE, "structures": pair})


def compare(method: tuple[str, str], split: tuple[int, ...], options: dict[str, Any]) -> None:
    """Train with KFAC and with the reference; weights must stay the same."""
    options = {**options, "compute_method": method[0], "damping_type": method[1]}
    total = options.get("loss_average", "batch") is None
    loss_fn = sum_squares if total else squares
    model = fixed_weights(AllLayers())
    reference = KfacReference(model, loss_fn, **options)
    optimizer = KFAC(model.parameters(), **options)

    def bases(name: str) -> tuple[Tensor, Tensor]:
        state, dims = optimizer.state[model.get_submodule(name).weight], reference.C[name].shape
        sides = (("Q_A", reference.K[name].shape), ("Q_B", dims))
        found = [
            torch.eye(shape[1]).double().expand(shape)
            if f"{key}" not in state and f"{key}.0" not in state
            else dense_factor(state, key)
            for key, shape in sides
        ]
        return found[0], found[1]

    if method[0] == "ekfac":
        reference.bases = bases
    for step in range(5):
        x, y = all_layers_batch(step, SAMPLES)
        parts = zip(x.split(split), y.split(split), strict=True)
        micro = [(u, v, 1.0 if total else len(u) / len(x)) for u, v in parts]
        optimizer.zero_grad()
        loss = 0.0
        for u, v, weight in micro:
            part = weight * loss_fn(model(u), v)
            part.backward()
            loss += part.item()
        optimizer.step()
        expected = reference.step(micro)
        assert abs(loss - expected) <= 1e-10 * max(1.0, abs(expected)), step
        trained = dict(reference.model.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, trained[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("layer", ["linear", "conv", "grouped", "transposed"])
def test_ekfac_scales_are_projections_of_the_fisher(layer: str) -> None:
    """With ``factor_decay=0`` after a second step: the diagonal of ``Q^T F Q``, ``F`` in full."""
    build: dict[str, tuple[Any, tuple[int, ...]]] = {
        "linear": (lambda: nn.Linear(3, 2), (30, 4, 3)),
        "conv": (lambda: nn.Conv2d(2, 3, 2), (30, 2, 4, 3)),
        "grouped": (lambda: nn.Conv1d(2, 4, 2, groups=2), (30, 2, 5)),
        "transposed": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2, bias=False), (30, 2, 3)),
    }
    make, shape = build[layer]
    model = fixed_weights(make())
    optimizer = KFAC(
        model.parameters(), compute_method="ekfac", factor_decay=0.0, structures="dense", lr=1e-30
    )
    for seed in range(2):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
        optimizer.zero_grad()
        model(x).tanh().flatten(1).sum(1).mean().backward()
        optimizer.step()
    state = optimizer.state[model.weight]
    fisher: Any = 0.0
    for one in x:
        loss = model(one[None]).tanh().sum()
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows = to_matrix(model, found[0], found[1] if len(found) > 1 else None).flatten(1)
        fisher = fisher + torch.einsum("gi,gj->gij", rows, rows) / len(x)
    for group, (Q_A, Q_B) in enumerate(zip(state["Q_A"], state["Q_B"], strict=True)):
        Q = torch.kron(Q_B, Q_A)
        expected = (Q.T @ fisher[group] @ Q).diagonal().view_as(state["scales"][group])
        torch.testing.assert_close(state["scales"][group], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["eigen", "ekfac"])
def test_a_quadratic_is_solved_in_one_undamped_step(method: str) -> None:
    """Least squares: ``A`` is the Hessian's factor, and ``B`` the identity."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x, y = torch.randn(40, 5).double(), torch.randn(40, 3).double()
    optimizer = KFAC(
        model.parameters(),
        lr=1.0,
        momentum=0.0,
        damping=0.0,
        kl_clip=None,
        fisher_type="forward-only",
        compute_method=method,
    )
    (0.5 * (model(x) - y).square().sum(1)).mean().backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(40, 1).double()], 1)
    solution = torch.linalg.lstsq(rows, y).solution
    torch.testing.assert_close(model.weight.T, solution[:5], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.bias, solution[5], rtol=1e-9, atol=1e-10)


def test_monte_carlo_fisher_converges_to_the_gauss_newton_factor() -> None:
    """``B`` of drawn classes tends to that of the softmax' Hessian like ``1/sqrt(draws)``."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
    p = model(x).softmax(1).detach()
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    errors = []
    for samples in (40, 160, 640, 2560):
        found = []
        for seed in range(6):
            optimizer = KFAC(model.parameters(), fisher_type="mc", mc_samples=samples, lr=1e-12)
            output = model(x)
            generator = torch.Generator().manual_seed(seed)
            optimizer.sample_fisher(output, generator=generator)
            functional.cross_entropy(output, y).backward()
            optimizer.step()
            state = optimizer.state[model.weight]
            found.append(state["B"][0] / state["factor_weight"] - exact)
            optimizer.close()
        errors.append(float(torch.stack(found).square().sum().sqrt()))
    for one, four in pairwise(errors):
        assert 1.3 < one / four < 3.0
    assert errors[-1] < 0.1 * float(exact.norm())


LIKELIHOODS: dict[str, tuple[tuple[int, ...], Any]] = {
    "categorical": ((6, 3), lambda f: torch.diag_embed(f.softmax(1)) - outer(f.softmax(1))),
    "gaussian": ((6, 3), lambda f: torch.eye(3).double().expand(6, 3, 3)),
    "bernoulli": ((6, 3), lambda f: torch.diag_embed(f.sigmoid() * (1 - f.sigmoid()))),
}


def outer(p: Tensor) -> Tensor:
    return p[:, :, None] * p[:, None]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_likelihoods(likelihood: str) -> None:
    """The output factor of a last layer is the mean Hessian of the negative log-likelihood."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(6, 4).double()
    optimizer = KFAC(model.parameters(), fisher_type="mc", mc_samples=4000, lr=1e-12)
    output = model(x)
    optimizer.sample_fisher(output, likelihood)
    output.sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    expected = LIKELIHOODS[likelihood][1](output.detach()).mean(0)
    found = state["B"][0] / state["factor_weight"]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)
    A = state["A"][0] / state["factor_weight"]
    rows = torch.cat([x, torch.ones(6, 1).double()], 1)
    torch.testing.assert_close(A, rows.T @ rows / 6, rtol=1e-10, atol=1e-12)


def test_fisher_pass_with_targets_of_ones_own() -> None:
    """The same as back-propagating these targets empirically, and no gradient changes."""
    torch.manual_seed(0)
    models = [mlp(3, 4, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    drawn = torch.randn(8, 2).double()
    empirical = KFAC(models[0].parameters(), lr=0.0, kl_clip=None)
    empirical.param_groups[0]["lr"] = 1e-30
    squares(models[0](x), drawn).backward()
    empirical.step()
    mc = KFAC(models[1].parameters(), lr=1e-30, kl_clip=None, fisher_type="mc")
    for part in (slice(0, 5), slice(5, 8)):
        output = models[1](x[part])
        before = [p.grad for p in models[1].parameters()]
        kept = [None if g is None else g.clone() for g in before]
        with mc.fisher_pass():
            (squares(output, drawn[part]) * len(output) / 8).backward(retain_graph=True)
        for p, g, same in zip(models[1].parameters(), kept, before, strict=True):
            assert p.grad is same
            assert g is None or torch.equal(p.grad, g)
        (squares(output, y[part]) * len(output) / 8).backward()
    mc.step()
    for one, other in zip(models[0], models[1], strict=True):
        if isinstance(one, nn.Linear):
            for name in ("A", "B", "Q_A", "d_A", "d_B"):
                expected = empirical.state[one.weight][name]
                found = mc.state[other.weight][name].abs()
                torch.testing.assert_close(found, expected.abs(), rtol=1e-8, atol=1e-12)
