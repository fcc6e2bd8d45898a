"""`Kronecker` and its inverses against the matrices they stand for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles import factors as oracle
from oracles.compare import assert_close
from tnkfac.curvature import Kronecker, kfac

EXACT = 1e-10
MSE = nn.MSELoss()


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def make_data(model: nn.Module, shape: tuple[int, ...], size: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(size, *shape)
    with torch.no_grad():
        return [(x, torch.randn_like(model(x)))]


def some_kronecker(groups: bool) -> tuple[nn.Module, Kronecker]:
    layer: nn.Module = nn.ConvTranspose2d(4, 6, 2, groups=2) if groups else nn.Linear(4, 3)
    model = nn.Sequential(layer)
    shape = (4, 3, 3) if groups else (4,)
    return layer, kfac(model, MSE, make_data(model, shape, 9), fisher_type="empirical")["0"]


def parameters(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return torch.randn_like(layer.weight), torch.randn_like(layer.bias)


def joint_vector(layer: nn.Module, weight: Tensor, bias: Tensor) -> Tensor:
    layer.weight.data, layer.bias.data = weight, bias
    return oracle.canonical_weight(layer).flatten()


DAMPED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "tikhonov": lambda A, B, d: torch.kron(B, A) + d * torch.eye(len(A) * len(B)),
    "pi": lambda A, B, d: torch.kron(
        B + d**0.5 / _pi(A, B) * torch.eye(len(B)), A + d**0.5 * _pi(A, B) * torch.eye(len(A))
    ),
    "factor": lambda A, B, d: torch.kron(B + d * torch.eye(len(B)), A + d * torch.eye(len(A))),
}


def _pi(A: Tensor, B: Tensor) -> float:
    return float((A.trace() / len(A) / (B.trace() / len(B))).sqrt())


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("damping_type", DAMPED)
def test_inverse(damping_type: str, groups: bool) -> None:
    layer, kronecker = some_kronecker(groups)
    pairs = list(zip(kronecker.A, kronecker.B, strict=True))
    damped = torch.block_diag(*(DAMPED[damping_type](A, B, 0.03) for A, B in pairs))
    inverse = kronecker.inverse(0.03, damping_type)
    assert_close(inverse.to_dense(), damped.inverse(), EXACT)
    assert_close(inverse.trace(), damped.inverse().trace(), EXACT)
    assert_close(inverse.logdet(), -damped.logdet(), EXACT)
    assert_close(inverse.eigenvalues(), torch.linalg.eigvalsh(damped.inverse()), EXACT)
    weight, bias = parameters(layer)
    found = joint_vector(layer, *inverse.matvec((weight, bias)))
    assert_close(found, damped.inverse() @ joint_vector(layer, weight, bias), EXACT)


@pytest.mark.parametrize("groups", [False, True])
def test_the_operator_is_its_matrix(groups: bool) -> None:
    layer, kronecker = some_kronecker(groups)
    dense = kronecker.to_dense()
    weight, bias = parameters(layer)
    expected = dense @ joint_vector(layer, weight, bias)
    pair = kronecker.matvec((weight, bias))
    named = kronecker.matvec({"weight": weight, "bias": bias})
    qualified = kronecker.matvec({"features.0.weight": weight, "features.0.bias": bias})
    assert list(qualified) == ["features.0.weight", "features.0.bias"]
    for found in (pair, tuple(named.values()), tuple(qualified.values())):
        assert [v.shape for v in found] == [weight.shape, bias.shape]
        assert_close(joint_vector(layer, *found), expected, EXACT)
    assert_close(kronecker.trace(), dense.trace(), EXACT)
    assert_close(kronecker.eigenvalues(), torch.linalg.eigvalsh(dense).clamp(min=0), 1e-9)


def test_log_determinant() -> None:
    _, kronecker = some_kronecker(False)
    regular = Kronecker(kronecker.layer, kronecker.A + torch.eye(5), kronecker.B + torch.eye(3))
    assert_close(regular.logdet(), regular.to_dense().logdet(), EXACT)
    assert_close(regular.inverse(0.0).logdet(), -regular.logdet(), EXACT)
    singular = Kronecker(kronecker.layer, kronecker.A, torch.zeros(1, 3, 3))
    assert singular.logdet() == -torch.inf


def test_layers_without_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    kronecker = kfac(model, MSE, make_data(model, (3,), 4))["0"]
    weight = torch.randn(2, 3)
    alone = kronecker.matvec(weight)
    assert torch.equal(alone, kronecker.matvec((weight,))[0])
    assert torch.equal(alone, kronecker.matvec({"weight": weight})["weight"])
    pair = kronecker.matvec((weight, None))
    assert torch.equal(pair[0], alone)
    assert pair[1] is None


BAD_USES: dict[str, tuple[str, Callable[[Kronecker], object]]] = {
    "negative damping": ("non-negative", lambda k: k.inverse(-1.0)),
    "not a number": ("non-negative", lambda k: k.inverse(float("nan"))),
    "damping type": ("tikhonov", lambda k: k.inverse(1.0, "exact")),
    "singular": ("singular", lambda k: Kronecker(k.layer, k.A, 0 * k.B).inverse(0.0)),
    "missing bias": ("bias", lambda k: k.matvec({"weight": torch.zeros(3, 4)})),
    "superfluous": ("bias", lambda k: k.matvec({"gain": torch.zeros(3)})),
    "shape": (r"\(3, 4\)", lambda k: k.matvec((torch.zeros(4, 3), torch.zeros(3)))),
    "three tensors": ("3 tensors", lambda k: k.matvec((torch.zeros(3),) * 3)),
}


@pytest.mark.parametrize("name", BAD_USES)
def test_bad_use(name: str) -> None:
    match, call = BAD_USES[name]
    with pytest.raises(ValueError, match=match):
        call(some_kronecker(False)[1])
