"""Where ``init="first_batch"`` starts: at rest under the first batch's factors."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import dense_factor, fit, squares, state_by_name, weights
from oracles.singd_reference import SingdReference, project
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights, mlp
from tnkfac import SINGD

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

PAIRS = (
    ("dense", "dense"),
    ("diagonal", "diagonal"),
    ("block3diagonal", "block3diagonal"),
    ("dense", "diagonal"),
    ("diagonal", "dense"),
    ("block3diagonal", "dense"),
)
NO_EIGENBASIS = (
    ("hierarchical2_1", "hierarchical1_2"),
    ("triltoeplitz", "triutoeplitz"),
    ("triltopleftdiag", "trilbottomrightdiag"),
    ("triutopleftdiag", "triubottomrightdiag"),
    ("dense", "triltoeplitz"),
    ("triutopleftdiag", "diagonal"),
)
DAMPINGS = (1e-3, 1e-2, 10.0)
FACTORS = ("K", "C", "m_K", "m_C")
each_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def sum_squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def factors_of(
    model: nn.Module, batches: list[tuple[Tensor, Tensor, float]], loss_fn: Any, **options: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Projected ``A`` and ``B`` of one step by layer name, from the slow reference."""
    reference = SingdReference(model, loss_fn, **options)
    _, _, sums = reference.measure(batches)
    k, c = reference.options.structures
    pairs = {name: reference.normalise(s) for name, s in sums.items()}
    return {name: (project(k, A), project(c, B)) for name, (A, B) in pairs.items()}


def mean_trace(M: Tensor) -> Tensor:
    return M.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]


def assert_stationary(K: Tensor, C: Tensor, A: Tensor, B: Tensor, damping: float) -> None:
    """The equations of rest for every channel group, and how the free scale is fixed."""
    for X, Y, M, N in ((K, C, A, B), (C, K, B, A)):
        inverse, eye = torch.linalg.inv(X), torch.eye(X.shape[1]).to(X)
        left = inverse.mT @ inverse
        right = mean_trace(Y.mT @ N @ Y) * M + damping * mean_trace(Y.mT @ Y) * eye
        error = (left - right).abs().amax((1, 2)) / right.abs().amax((1, 2))
        assert error.max() <= 1e-9
    mean = mean_trace(K.mT @ A @ K) * mean_trace(C.mT @ B @ C)
    mean = mean + damping * mean_trace(K.mT @ K) * mean_trace(C.mT @ C)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-9, atol=0)
    torch.testing.assert_close(mean_trace(K @ K.mT), mean_trace(C @ C.mT), rtol=1e-9, atol=0)


def one_step(
    model: nn.Module, optimizer: SINGD, micro: list[tuple[Tensor, Tensor, float]], loss_fn: Any
) -> None:
    optimizer.zero_grad()
    for x, y, weight in micro:
        (weight * loss_fn(model(x), y)).backward()
    optimizer.step()


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@each_pair
def test_first_step_is_stationary(pair: tuple[str, str], approx: str, damping: float) -> None:
    """Every layer type, every channel group; and no regular update on top."""
    model = fixed_weights(AllLayers())
    options = {"structures": pair, "kfac_approx": approx, "damping": damping}
    x, y = all_layers_batch(0, samples=9)
    expected = factors_of(model, [(x, y, 1.0)], squares, **options)
    optimizer = SINGD(model.parameters(), T=1, lr_cov=0.3, alpha1=0.7, **options)
    one_step(model, optimizer, [(x, y, 1.0)], squares)
    assert len(expected) == 10
    for name, (A, B) in expected.items():
        state = optimizer.state[model.get_submodule(name).weight]
        assert_stationary(dense_factor(state, "K"), dense_factor(state, "C"), A, B, damping)
        for key, value in state.items():
            if key.startswith("m_"):
                assert not value.any(), key


@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence", None])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@each_pair
def test_accumulated_batch_equals_the_whole(
    pair: tuple[str, str], approx: str, loss_average: str | None
) -> None:
    """Uneven micro-batches start where the whole batch does."""
    whole, split = (fixed_weights(AllLayers()) for _ in range(2))
    loss_fn = sum_squares if loss_average is None else squares
    x, y = all_layers_batch(0, samples=7)
    scale = 1.0 if loss_average is None else 1 / 7
    sizes = (4, 1, 2)
    parts = zip(x.split(sizes), y.split(sizes), sizes, strict=True)
    micro = [(u, v, 1.0 if loss_average is None else n * scale) for u, v, n in parts]
    states = []
    for model, batches in ((whole, [(x, y, 1.0)]), (split, micro)):
        optimizer = SINGD(
            model.parameters(), structures=pair, kfac_approx=approx, loss_average=loss_average
        )
        one_step(model, optimizer, batches, loss_fn)
        states.append(state_by_name(model, optimizer))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-11, msg=name)
    trained = weights(split)
    for name, value in weights(whole).items():
        torch.testing.assert_close(trained[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("pair", NO_EIGENBASIS[:4], ids="-".join)
def test_scaled_identity_at_rest_in_the_mean(pair: tuple[str, str], damping: float) -> None:
    """Where a structure has no eigenbasis: ``p^2 (tr A tr B + damping) = 1``, per group."""
    model = fixed_weights(AllLayers())
    x, y = all_layers_batch(0, samples=9)
    expected = factors_of(model, [(x, y, 1.0)], squares, structures=pair)
    optimizer = SINGD(model.parameters(), structures=pair, damping=damping)
    one_step(model, optimizer, [(x, y, 1.0)], squares)
    for name, (A, B) in expected.items():
        state = optimizer.state[model.get_submodule(name).weight]
        scale = (mean_trace(A) * mean_trace(B) + damping) ** -0.25
        for kind, structure in zip("KC", pair, strict=True):
            factor = dense_factor(state, kind, structure)
            eye = torch.eye(factor.shape[1]).to(factor).expand_as(factor)
            torch.testing.assert_close(factor, scale * eye, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (("dense", "diagonal"), [True, True, False, True]),
        (("triltoeplitz", "triltoeplitz"), [False, False, False, True]),
        (("dense", "triltopleftdiag"), [False, False, False, True]),
    ],
    ids=str,
)
def test_a_rough_start_is_updated_at_every_one_of_the_first_steps(
    pair: tuple[str, str], expected: list[bool]
) -> None:
    """With ``T=3``: at 1 and 2 if the start was but a scaled identity, and at 3 in any case."""
    model = fixed_weights(AllLayers())
    optimizer = SINGD(model.parameters(), T=3, lr_cov=0.1, structures=pair)
    seen = []
    for step in range(5):
        fit(model, optimizer, [all_layers_batch(step)])
        state = optimizer.state[model.shared.weight]
        seen.append(torch.cat([v.flatten() for k, v in state.items() if k[0] in "KC"]))
    same = [torch.equal(a, b) for a, b in pairwise(seen)]
    assert same == expected


@pytest.mark.parametrize("pair", [*PAIRS, *NO_EIGENBASIS], ids="-".join)
def test_second_update_is_a_regular_one(pair: tuple[str, str]) -> None:
    """From the second update on the reference's rule, started from that point."""
    model = fixed_weights(AllLayers())
    options = {"structures": pair, "damping": 0.01, "T": 1, "lr_cov": 0.05, "alpha1": 0.5}
    optimizer = SINGD(model.parameters(), **options)
    fit(model, optimizer, [all_layers_batch(0)])
    reference = SingdReference(model, squares, **options)
    for name in reference.K:
        state = optimizer.state[model.get_submodule(name).weight]
        reference.K[name] = dense_factor(state, "K", pair[0])
        reference.C[name] = dense_factor(state, "C", pair[1])
    for step in (1, 2):
        reference.model.load_state_dict(model.state_dict())
        reference.step([(*all_layers_batch(step), 1.0)])
        fit(model, optimizer, [all_layers_batch(step)])
    for name in reference.K:
        state = optimizer.state[model.get_submodule(name).weight]
        for kind, factors, structure in zip("KC", (reference.K, reference.C), pair, strict=True):
            actual, expected = dense_factor(state, kind, structure), factors[name]
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.max())


def test_next_update_waits_for_the_interval() -> None:
    """With ``T=3`` the factors rest at steps 1 and 2 and move at step 3."""
    model = fixed_weights(AllLayers())
    optimizer = SINGD(model.parameters(), T=3, lr_cov=0.1)
    seen = []
    for step in range(5):
        fit(model, optimizer, [all_layers_batch(step)])
        seen.append(optimizer.state[model.shared.weight]["K"].clone())
    same = [torch.equal(a, b) for a, b in pairwise(seen)]
    assert same == [True, True, False, True]


class Late(nn.Module):
    """A layer that takes part from the second batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.late = nn.Linear(3, 3), nn.Linear(3, 3)
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3]`` to ``[N, 3]``."""
        x = self.always(x)
        return torch.as_tensor(self.late(torch.tanh(x))) if self.on else x


def test_a_late_layer_starts_at_its_own_first_batch() -> None:
    model = fixed_weights(Late())
    optimizer = SINGD(model.parameters(), T=1, damping=0.01, structures="dense")
    with pytest.warns(UserWarning, match=r"late\.weight"):
        fit(model, optimizer, [(torch.randn(8, 3).double(), torch.randn(8, 3).double())])
    model.on = True
    x, y = torch.randn(8, 3).double(), torch.randn(8, 3).double()
    A, B = factors_of(model, [(x, y, 1.0)], squares)["late"]
    fit(model, optimizer, [(x, y)])
    state = optimizer.state[model.late.weight]
    assert_stationary(dense_factor(state, "K"), dense_factor(state, "C"), A, B, 0.01)


@pytest.mark.parametrize("structure", ["triltoeplitz", "hierarchical2_1", "triutopleftdiag"])
@pytest.mark.parametrize("start", [0, 5])
def test_a_rough_start_is_followed_by_frequent_updates(start: int, structure: str) -> None:
    """Of the layer, whenever that is: the first ``T`` steps update its factors."""
    model = fixed_weights(Late())
    model.on = True
    optimizer = SINGD(model.parameters(), T=4, structures=structure)
    model.late.requires_grad_(False)
    updates = []
    for step in range(start + 9):
        model.late.requires_grad_(step >= start)
        fit(model, optimizer, [(torch.randn(8, 3).double(), torch.randn(8, 3).double())])
        (row,) = (row for row in optimizer.report() if row.name == "late.weight")
        updates.append(row.last_update)
    assert updates[:start] == [None] * start
    first = list(range(start, start + 4))
    assert updates[start : start + 4] == first
    assert len(set(updates[start + 4 :])) <= 3


# --- degenerate factors -------------------------------------------------------------------------


def finite(model: nn.Module, optimizer: SINGD) -> bool:
    tensors = [*weights(model).values(), *state_by_name(model, optimizer).values()]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def dead_group(model: nn.Module) -> None:
    """Output gradients of one channel group become zero."""
    with torch.no_grad():
        model[2].weight[:, :6] = 0.0


def dead_inputs(x: Tensor) -> Tensor:
    """Inputs of one channel group become zero."""
    x = x.clone()
    x[:, :1] = 0.0
    return x


# Without damping to speak of, what the first batch does not see is unbounded: one step only.
DEGENERATE: dict[str, dict[str, Any]] = {
    "batch size 1": {"samples": 1},
    "fewer samples than rows": {"samples": 2},
    "tiny damping": {"damping": 1e-30, "steps": 1},
    "no damping": {"damping": 0.0, "steps": 1},
    "no damping, rank 1": {"damping": 0.0, "samples": 1, "steps": 1},
    "tiny damping, rank 1": {"damping": 1e-20, "samples": 1, "steps": 1},
    "huge damping": {"damping": 1e12},
    "tiny gradients": {"scale": 1e-15},
    "huge gradients": {"scale": 1e12, "steps": 1},
    "zero gradients": {"scale": 0.0},
    "zero gradients, no damping": {"scale": 0.0, "damping": 0.0},
    "one channel group without gradient": {"prepare": dead_group},
    "one channel group without input": {"inputs": dead_inputs},
    "zero input": {"inputs": torch.zeros_like},
    "zero input, no damping": {"inputs": torch.zeros_like, "damping": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("pair", [*PAIRS[:3], *NO_EIGENBASIS[:4]], ids="-".join)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_factors_stay_finite(
    name: str, pair: tuple[str, str], bias: bool, dtype: torch.dtype
) -> None:
    case = DEGENERATE[name]
    conv = nn.Conv2d(2, 4, 2, groups=2, bias=bias)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(16 - 4, 2, bias=bias)).to(dtype)
    case.get("prepare", lambda model: None)(model)
    optimizer = SINGD(model.parameters(), damping=case.get("damping", 1e-3), structures=pair, T=1)
    before = weights(model)
    for seed in range(case.get("steps", 3)):
        generator = torch.Generator().manual_seed(seed)
        n = case.get("samples", 6)
        x = torch.randn(n, 2, 4, 2, generator=generator).to(dtype)
        y = torch.randn(n, 2, generator=generator).to(dtype)
        x = case.get("inputs", lambda x: x)(x)
        optimizer.zero_grad()
        (case.get("scale", 1.0) * squares(model(x), y)).backward()
        optimizer.step()
        assert finite(model, optimizer), seed
    assert optimizer.skipped_updates == 0
    if case.get("scale") == 0.0:  # no gradient, no decay: nothing moves
        for key, value in weights(model).items():
            assert torch.equal(value, before[key]), key


def test_low_precision_parameters_start_in_higher_precision() -> None:
    """bfloat16 weights with float32 factors: decompositions run in at least float32."""
    model = mlp(5, 6, 2, dtype=torch.bfloat16)
    optimizer = SINGD(model.parameters(), preconditioner_dtype=torch.float32)
    x, y = torch.randn(8, 5).bfloat16(), torch.randn(8, 2).bfloat16()
    exact = copy.deepcopy(model).float()
    fit(model, optimizer, [(x, y)])
    other = SINGD(exact.parameters())
    fit(exact, other, [(x.float(), y.float())])
    for layer in (0, 2):
        K, expected = optimizer.state[model[layer].weight]["K"], other.state[exact[layer].weight]
        assert K.dtype == torch.float32
        torch.testing.assert_close(K, expected["K"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("loss_scale", [1.0, 1e3])
def test_without_grafting_the_start_has_the_level_of_the_curvature(loss_scale: float) -> None:
    """``C C^T x K K^T`` times the damped curvature has mean eigenvalue one."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False).double()
    x, y = torch.randn(16, 5).double(), torch.randn(16, 3).double()
    optimizer = SINGD(model.parameters(), lr=1e-9, grafting=None, structures="dense")
    output = model(x)
    (loss_scale * (output - y).square().sum(1).mean()).backward()
    g = 2 * loss_scale * (output - y).detach()  # of the loss of each sample
    A, B = x.mT @ x / 16, g.mT @ g / 16
    optimizer.step()
    K, C = (optimizer.state[model.weight][name][0] for name in ("K", "C"))
    share = optimizer.param_groups[0]["relative_damping"]
    damping = share * float(A.diagonal().mean() * B.diagonal().mean())
    P, Q = K @ K.mT, C @ C.mT
    level = (P @ A).trace() / 5 * (Q @ B).trace() / 3 + damping * P.trace() / 5 * Q.trace() / 3
    assert float(level) == pytest.approx(1.0, rel=1e-9)
    assert float(P.trace() / 5) == pytest.approx(float(Q.trace() / 3), rel=1e-9)
