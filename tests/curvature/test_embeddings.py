"""Embeddings, against a linear layer that multiplies its weight with one-hot vectors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnkfac
from oracles.compare import assert_close
from tnkfac.curvature import (
    diagonal,
    explain,
    grad_factor,
    gram,
    input_factor,
    kfac,
    ntk,
    per_sample_gradients,
)
from tnkfac.curvature.layers import describe
from tnkfac.curvature.structures import resolve_structure

WORDS = 6
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], torch.dtype]] = {
    "one word": ({}, (5,), torch.int64),
    "sentences": ({}, (5, 4), torch.int64),
    "pages": ({}, (4, 3, 2), torch.int64),
    "int32": ({}, (5, 4), torch.int32),
    "padding": ({"padding_idx": 2}, (5, 7), torch.int64),
    "padding counted from the end": ({"padding_idx": -1}, (5, 7), torch.int64),
    "padding of one word": ({"padding_idx": 2}, (9,), torch.int64),
}
each_case = pytest.mark.parametrize("name", CASES)
each_approx = pytest.mark.parametrize("approx", ["expand", "reduce"])
EXACT = 1e-10


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


def make(name: str) -> tuple[nn.Module, Tensor, nn.Module, Tensor]:
    """A model with an embedding and indices; the same with a linear layer and one-hot vectors."""
    hyper, shape, dtype = CASES[name]
    embedding = nn.Embedding(WORDS, 3, **hyper)
    head = nn.Linear(3 * torch.Size(shape[1:]).numel(), 4)
    index = torch.randint(WORDS, shape).to(dtype)
    one_hot = nn.functional.one_hot(index.long(), WORDS).double()
    linear = nn.Linear(WORDS, 3, bias=False)
    linear.weight.data = embedding.weight.data.T.clone()
    if embedding.padding_idx is not None:
        one_hot[..., embedding.padding_idx] = 0  # a row without a gradient
        embedding.weight.data[embedding.padding_idx] = 0
    model, twin = (
        nn.Sequential(first, nn.Flatten(), nn.Tanh(), head) for first in (embedding, linear)
    )
    assert_close(model(index), twin(one_hot), EXACT)
    return model, index, twin, one_hot


@each_approx
@each_case
def test_what_every_structure_reads(name: str, approx: Any) -> None:
    model, index, twin, one_hot = make(name)
    layer, linear = describe(model[0]), describe(twin[0])
    g = torch.randn_like(model[0](index))
    for found, expected in zip(
        layer.moments(index, g, approx, torch.float64),
        linear.moments(one_hot, g, approx),
        strict=True,
    ):
        assert (found.samples, found.positions, found.dim) == (
            expected.samples,
            expected.positions,
            expected.dim,
        )
        for structure in (
            "dense", "diagonal", "block4diagonal", "block6diagonal", "hierarchical2_1",
            "triltoeplitz", "triltopleftdiag", "trilbottomrightdiag",
        ):  # fmt: skip
            read = resolve_structure(structure, found.dim)
            eye = read.identity(1, torch.float64, torch.device("cpu"))
            for K in (None, tuple(part + 0.5 for part in eye)):
                parts = zip(read.statistic(found, K), read.statistic(expected, K), strict=True)
                for one, other in parts:
                    assert_close(one, other, EXACT)


@each_approx
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "forward-only"])
@each_case
def test_kfac(name: str, fisher_type: str, approx: str) -> None:
    model, index, twin, one_hot = make(name)
    y, loss = torch.randint(4, (len(index),)), nn.CrossEntropyLoss()
    found = kfac(model, loss, [(index, y)], approx=approx, fisher_type=fisher_type)
    expected = kfac(twin, loss, [(one_hot, y)], approx=approx, fisher_type=fisher_type)
    assert list(found) == ["0", "3"]
    is_diagonal = approx == "expand" or index.ndim == 1
    A = torch.diag_embed(found["0"].A) if is_diagonal else found["0"].A
    assert_close(A, expected["0"].A, EXACT)
    assert_close(found["0"].B, expected["0"].B, EXACT)
    for quantity in ("to_dense", "eigenvalues", "trace"):
        assert_close(getattr(found["0"], quantity)(), getattr(expected["0"], quantity)(), 1e-8)
    v = torch.randn(WORDS, 3, dtype=torch.float64)
    assert_close(found["0"].matvec(v), expected["0"].matvec(v.T).T, EXACT)
    for damping in ("tikhonov", "pi", "factor"):
        inverse, other = (each["0"].inverse(0.1, damping) for each in (found, expected))
        assert_close(inverse.matvec(v), other.matvec(v.T).T, 1e-8)
        assert_close(inverse.to_dense(), other.to_dense(), 1e-8)


def by_linear(found: Tensor) -> Tensor:
    """A weight's quantity in the layout of the linear layer."""
    return found.mT


ESTIMATES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "per-sample gradients": per_sample_gradients,
    "ggn": diagonal,
    "empirical Fisher": lambda *args: diagonal(*args, kind="empirical-fisher"),
}


@pytest.mark.parametrize("estimate", ESTIMATES)
@each_case
def test_diagonals_and_gradients(name: str, estimate: str) -> None:
    model, index, twin, one_hot = make(name)
    y, loss = torch.randint(4, (len(index),)), nn.CrossEntropyLoss()
    found = ESTIMATES[estimate](model, loss, [(index, y)])
    expected = ESTIMATES[estimate](twin, loss, [(one_hot, y)])
    assert_close(by_linear(found["0.weight"]), expected["0.weight"], EXACT)
    assert_close(found["3.weight"], expected["3.weight"], EXACT)


@each_case
def test_kernels(name: str) -> None:
    model, index, twin, one_hot = make(name)
    y, loss = torch.randint(4, (len(index),)), nn.CrossEntropyLoss()
    assert_close(ntk(model, index), ntk(twin, one_hot), EXACT)
    assert_close(gram(model, loss, [(index, y)]), gram(twin, loss, [(one_hot, y)]), EXACT)


def test_two_batches_of_which_one_has_single_words() -> None:
    """With KFAC-reduce the first is diagonal and the second is not."""
    embedding = nn.Embedding(WORDS, 3)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = embedding

        def forward(self, index: Tensor) -> Tensor:
            return self.embedding(index[:, 0]) + self.embedding(index).sum(1)

    index = torch.randint(WORDS, (5, 3))
    found = kfac(Both(), nn.MSELoss(), [(index, torch.zeros(5, 3))], approx="reduce")["embedding"]
    one_hot = nn.functional.one_hot(index, WORDS).double()
    rows = torch.cat([one_hot[:, 0], one_hot.mean(1)])
    assert_close(found.A[0], rows.T @ rows / 10, EXACT)


def test_a_vocabulary_of_a_million_words() -> None:
    """Neither one-hot vectors nor a dense factor would fit."""
    model = nn.Sequential(nn.Embedding(10**6, 2), nn.Flatten(), nn.Linear(80, 2)).float()
    data = [(torch.randint(10**6, (3, 40)), torch.tensor([0, 1, 1]))]
    factors = kfac(model, nn.CrossEntropyLoss(), data)["0"]
    assert factors.A.shape == (1, 10**6)
    assert float(factors.A.sum()) == pytest.approx(1)
    step = factors.inverse(1e-2).matvec(torch.ones(10**6, 2))
    assert step.isfinite().all()
    squares = diagonal(model, nn.CrossEntropyLoss(), data)["0.weight"]
    assert int(squares.any(1).sum()) == len(data[0][0].unique())


def test_batches_without_samples_count_nothing() -> None:
    model = nn.Sequential(nn.Embedding(WORDS, 3), nn.Flatten(), nn.Linear(6, 2))
    data = [(torch.zeros(0, 2).long(), torch.zeros(0).long())]
    assert torch.equal(kfac(model, nn.CrossEntropyLoss(), data)["0"].A, torch.zeros(1, WORDS))


def test_factors_of_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    layer, index = nn.Embedding(WORDS, 3), torch.tensor([[0, 1], [1, 5]])
    counts = torch.tensor([[1.0, 2, 0, 0, 0, 1]], dtype=torch.float32)
    found = input_factor(layer, index, structure="diagonal")
    assert torch.equal(found, counts / 4)  # type: ignore[arg-type]
    assert grad_factor(layer, torch.rand(2, 2, 3)).shape == (1, 3, 3)  # type: ignore[union-attr]
    assert explain(layer, (2, 2)).chosen == "counts"
    with pytest.raises(TypeError, match="integers"):
        input_factor(layer, torch.rand(2, 2))


REFUSED: dict[str, dict[str, Any]] = {
    "sparse": {"sparse": True},
    "max_norm": {"max_norm": 1.0},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """Their gradients are not those of a linear map, or not dense."""
    embedding = nn.Embedding(WORDS, 3, **REFUSED[name])
    with pytest.raises(TypeError, match="Embedding"):
        describe(embedding)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 2))
    data = [(torch.randint(WORDS, (4, 4)), torch.tensor([0, 1, 0, 1]))]
    assert list(kfac(model, nn.CrossEntropyLoss(), data)) == ["2"]


def test_optimizers_leave_them_to_the_fallback() -> None:
    model = nn.Sequential(nn.Embedding(WORDS, 3), nn.Flatten(), nn.Linear(12, 2))
    rows = {row.name: row for row in tnkfac.SINGD(model.parameters()).report()}
    assert rows["0.weight"].reason == "Embedding is not a supported layer"
