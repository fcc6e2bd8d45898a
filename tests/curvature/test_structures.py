"""Structures: the algebra of each against dense matrices, what it reads against brute force."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.factors import grad_factor, input_factor
from oracles.layer_cases import SPECIAL, random_layer, special_layer
from oracles.singd_reference import project, structure_support
from tnkfac.curvature.layers import describe
from tnkfac.curvature.moments.second_moment import SecondMoment
from tnkfac.curvature.structures import Structure, resolve_structure

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

NAMES = (
    "dense",
    "diagonal",
    "block3diagonal",
    "hierarchical2_3",
    "hierarchical1_1",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
    "triltopleftdiag",
    "trilbottomrightdiag",
    "triutopleftdiag",
    "triubottomrightdiag",
)
DIMS = (1, 2, 3, 5, 16, 31)
each_name = pytest.mark.parametrize("name", NAMES)
each_structure = pytest.mark.parametrize(("name", "dim"), list(product(NAMES, DIMS)))


def random_parts(structure: Structure, groups: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return tuple(torch.randn(groups, *shape, **draw) for shape in structure.part_shapes)


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    size = scale * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13 * max(size, 1e-30))


@each_structure
def test_support(name: str, dim: int) -> None:
    """Every part shows up where the structure has an entry, and nowhere else.

    One number is kept per entry of the support; one per diagonal of Toeplitz matrices.
    """
    structure, support = resolve_structure(name, dim), structure_support(name, dim)
    assert structure.name == name
    ones = tuple(torch.ones(2, *shape) for shape in structure.part_shapes)
    assert torch.equal(structure.to_dense(ones)[1], support.float())
    eye = structure.to_dense(structure.identity(2, torch.float64, torch.device("cpu")))
    assert torch.equal(eye, torch.eye(dim).double().expand(2, dim, dim))
    assert structure.numel == (dim if "toeplitz" in name else int(support.sum()))


@each_structure
def test_algebra(name: str, dim: int) -> None:
    """Closed operations on two groups at once equal those of dense matrices."""
    structure = resolve_structure(name, dim)
    K, m = random_parts(structure, 2, 1), random_parts(structure, 2, 2)
    dense, other = structure.to_dense(K), structure.to_dense(m)
    X = torch.randn(2, dim, 4, dtype=torch.float64)
    close(structure.to_dense(structure.matmul(K, m)), dense @ other, 10)
    close(structure.to_dense(structure.gram(K)), project(name, dense.mT @ dense), 10)
    close(structure.apply_kkt(K, X), dense @ (dense.mT @ X), 10)
    close(structure.trace(K), dense.diagonal(dim1=1, dim2=2).mean(1), 10)


@each_structure
def test_norm_is_a_fair_estimate_from_below(name: str, dim: int) -> None:
    structure = resolve_structure(name, dim)
    m = random_parts(structure, 3, 3)
    if name in ("dense", "block3diagonal"):  # there it is for symmetric matrices
        m = tuple(part + part.mT for part in m)
    exact = torch.linalg.matrix_norm(structure.to_dense(m), 2)
    estimate = structure.norm(m)
    assert (estimate <= exact * (1 + 1e-12)).all()
    assert (estimate >= 0.6 * exact).all()
    assert not structure.norm(tuple(torch.zeros_like(part) for part in m)).any()


@each_structure
def test_eigenbasis_or_trace(name: str, dim: int) -> None:
    """A symmetric matrix is rebuilt from its eigenvalues, or at least its trace is."""
    structure = resolve_structure(name, dim)
    root = random_parts(structure, 2, 4)
    if structure.has_eigenbasis:
        A = structure.gram(root)
        values, vectors = structure.eigen(A)
        close(structure.to_dense(structure.from_eigen(values, vectors)), structure.to_dense(A), 100)
        return
    values = torch.arange(1.0, dim + 1).double().expand(2, dim)
    scaled = structure.to_dense(structure.from_eigen(values, ()))
    close(scaled, (dim + 1) / 2 * torch.eye(dim).double().expand(2, dim, dim))


@pytest.mark.parametrize("case", [*range(30), *SPECIAL], ids=str)
def test_what_is_read_of_a_layer(case: int | str) -> None:
    """``Pi(K^T A K)`` of every structure, from the identity and from another ``K``."""
    module, x, *_ = random_layer(case) if isinstance(case, int) else special_layer(case)
    g = torch.randn_like(module(x))
    given = getattr(module, "output_padding", None)
    for approx in ("expand", "reduce"):
        moments = describe(module).moments(x, g, approx)  # type: ignore[arg-type]
        A = input_factor(module, x, approx, output_padding=given)
        B = grad_factor(module, g, approx, loss_terms=1.0)
        assert isinstance(A, Tensor)
        assert isinstance(B, Tensor)
        rows = moments[0].samples * (moments[0].positions if approx == "expand" else 1)
        for moment, dense in zip(moments, (A * rows, B), strict=True):
            for name in NAMES:
                check_reading(name, moment, dense)


def check_reading(name: str, moment: SecondMoment, dense: Tensor) -> None:
    """What a structure reads of a second moment against that of the oracle."""
    groups, dim = dense.shape[:2]
    structure = resolve_structure(name, dim)
    eye = structure.identity(groups, dense.dtype, dense.device)
    for K, current in ((eye, None), (random_parts(structure, groups, 5),) * 2):
        read = structure.statistic(moment, current)
        assert tuple(part.shape[1:] for part in read) == structure.statistic_shapes
        if current is None:
            close(structure.statistic_trace(read), structure.trace(structure.congruence(K, read)))
        matrix = structure.to_dense(K)
        expected = project(name, matrix.mT @ dense @ matrix)
        pulled = structure.to_dense(structure.congruence(K, read))
        torch.testing.assert_close(
            pulled,
            expected,
            rtol=0,
            atol=1e-12 * float(expected.abs().max()),
            msg=lambda text: f"{name}: {text}",
        )


@each_name
def test_empty_batches_read_zeros(name: str) -> None:
    module = torch.nn.Conv2d(2, 4, 3, groups=2)
    x, g = torch.zeros(0, 2, 5, 5), torch.zeros(0, 4, 3, 3)
    for moment in describe(module).moments(x, g, "expand"):
        structure = resolve_structure(name, moment.dim)
        read = structure.statistic(moment)
        for part, shape in zip(read, structure.statistic_shapes, strict=True):
            assert part.shape == (2, *shape)
            assert not part.any()


def test_wide_matrices_are_never_written_out() -> None:
    """Structures with O(d) numbers work where a dense matrix would need 160 GB."""
    dim = 200_000
    x = torch.randn(3, dim)
    moment = describe(torch.nn.Linear(dim - 1, 2)).input_moment(x[:, 1:], "expand")
    for name in NAMES:
        structure = resolve_structure(name, dim)
        if name == "dense":
            continue
        K = structure.identity(1, x.dtype, x.device)
        pulled = structure.congruence(K, structure.statistic(moment, K))
        K = structure.matmul(K, pulled)
        assert structure.apply_kkt(K, x.T.unsqueeze(0)).isfinite().all(), name
        assert structure.norm(structure.gram(K)).isfinite().all(), name


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("block0diagonal", ValueError),
        ("blockdiagonal", ValueError),
        ("block-3diagonal", ValueError),
        ("block03diagonal", ValueError),
        ("hierarchical15", ValueError),
        ("hierarchical0_3", ValueError),
        ("hierarchical3_", ValueError),
        ("toeplitz", ValueError),
        ("Dense", ValueError),
        ("", ValueError),
        (None, TypeError),
        (3, TypeError),
    ],
    ids=repr,
)
def test_unknown_names(name: Any, raised: type[Exception]) -> None:
    with pytest.raises(raised, match=r"triltopleftdiag.*triubottomrightdiag") as caught:
        resolve_structure(name, 4)
    assert repr(name) in str(caught.value)
