"""Estimators of models whose parameters belong to no supported layer, against plain autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.compare import assert_close
from tnkfac.curvature import diagonal, gram, kfac, ntk, per_sample_gradients
from tnkfac.curvature.backpack import QUANTITIES

EXACT = 1e-9
FISHER_KINDS = ("ggn", "ggn-mc", "ggn-rademacher", "empirical-fisher", "hutchinson")


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


class Recurrent(nn.Module):
    """The last output of a recurrent layer, which returns a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0][:, -1, :3]
        return y


class TimeFirst(nn.Module):
    """The batch is the second axis of what the layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.transpose(0, 1))[0][-1]
        return y


class Cell(nn.Module):
    """A cell that is called at every position."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


class Free(nn.Module):
    """Parameters of its own, one of them a number; one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.positions = nn.Parameter(torch.randn(4, 3))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * (x + self.positions)).sum(1)


class Number(nn.Module):
    """Its only parameter is a number, which it uses sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x[:, 0] * self.scale)


class Words(nn.Module):
    """An embedding, on tokens made of the inputs."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        found = self.table(x[..., 0].gt(0).long() + 2 * x[..., 1].gt(0).long())
        return found if found.ndim == 2 else torch.sin(found).sum(1)


class Attention(nn.Module):
    """Attention, which reads its output projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0][:, 0]
        return y


class Functional(nn.Module):
    """A layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x[:, 0], self.layer.weight, self.layer.bias)


class Bilinear(nn.Module):
    """A module of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bilinear(x[:, 0], x[:, 1])
        return y


class First(nn.Module):
    """The first position, through one module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x[:, 0])
        return y


Build = Callable[[], nn.Module]
MODELS: dict[str, Build] = {
    "LSTM": lambda: Recurrent(nn.LSTM(3, 3, batch_first=True)),
    "LSTM of two layers, both ways": lambda: Recurrent(
        nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True)
    ),
    "LSTM with a projection": lambda: Recurrent(nn.LSTM(3, 4, proj_size=3, batch_first=True)),
    "GRU": lambda: Recurrent(nn.GRU(3, 3, batch_first=True)),
    "RNN": lambda: Recurrent(nn.RNN(3, 3, batch_first=True)),
    "GRU, time first": TimeFirst,
    "GRU cell": lambda: Cell(nn.GRUCell(3, 3)),
    "layer norm": lambda: First(nn.LayerNorm(3)),
    "group norm": lambda: First(nn.GroupNorm(1, 3)),
    "batch norm": lambda: First(nn.BatchNorm1d(3)).eval(),
    "PReLU": lambda: First(nn.PReLU()),
    "embedding": lambda: Words(nn.Embedding(4, 3)),
    "embedding bag": lambda: Words(nn.EmbeddingBag(4, 3)),
    "attention": Attention,
    "free parameters": Free,
    "a number": Number,
    "functional use": Functional,
    "bilinear": Bilinear,
}
WITHOUT_SECOND_DERIVATIVE = {"embedding bag"}


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    return MODELS[name](), torch.randn(5, 4, 3), torch.tensor([0, 2, 1, 1, 0])


def jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``[N, C, *parameter.shape]`` by one backward pass for every number."""
    named = dict(model.named_parameters())
    rows: dict[str, list[list[Tensor]]] = {name: [[] for _ in x] for name in named}
    for n in range(len(x)):
        for entry in model(x[n : n + 1])[0]:
            found = torch.autograd.grad(
                entry, list(named.values()), retain_graph=True, allow_unused=True
            )
            for (name, p), g in zip(named.items(), found, strict=True):
                rows[name][n].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack([torch.stack(r) for r in own]) for name, own in rows.items()}


def blocks(model: nn.Module, x: Tensor) -> Tensor:
    """Hessian ``[N, C, C]`` of the summed cross-entropy of every sample."""
    p = torch.softmax(model(x).detach(), 1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def contracted(H: Tensor, J: dict[str, Tensor], divisor: int) -> dict[str, Tensor]:
    """Diagonal of the Gauss-Newton matrix."""
    return {n: torch.einsum("nab,na...,nb...->...", H, j, j) / divisor for n, j in J.items()}


@pytest.mark.parametrize("name", MODELS)
def test_exact_quantities(name: str) -> None:
    model, x, y = make(name)
    loss_fn, data = nn.CrossEntropyLoss(), [(x[:2], y[:2]), (x[2:], y[2:])]
    J, H, N = jacobian(model, x), blocks(model, x), len(x)
    residual = torch.softmax(model(x).detach(), 1) - functional.one_hot(y, 3)
    expected = {n: torch.einsum("na,na...->n...", residual, j) / N for n, j in J.items()}
    for key, rows in per_sample_gradients(model, loss_fn, data).items():
        assert_close(rows, expected[key], EXACT)
    fisher = diagonal(model, loss_fn, data, kind="empirical-fisher")
    exact = contracted(H, J, N)
    ggn = diagonal(model, loss_fn, data)
    for key, rows in expected.items():
        assert_close(fisher[key], rows.square().sum(0), EXACT)
        assert_close(ggn[key], exact[key], EXACT)
    flat = torch.cat([j.reshape(N, 3, -1) for j in J.values()], 2)
    rows = flat.transpose(0, 1).flatten(0, 1)  # class-major
    assert_close(ntk(model, x), rows @ rows.T, EXACT)
    matrix = torch.einsum("nab,nap,nbq->pq", H, flat, flat) / N
    spectra = [torch.linalg.eigvalsh(m) for m in (gram(model, loss_fn, data), matrix)]
    least = min(map(len, spectra))
    assert_close(spectra[0][-least:], spectra[1][-least:], EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_quantities_of_backpack(name: str) -> None:
    model, x, y = make(name)
    loss_fn = nn.CrossEntropyLoss()
    J, H, N = jacobian(model, x), blocks(model, x), len(x)
    residual = torch.softmax(model(x).detach(), 1) - functional.one_hot(y, 3)
    rows = {n: torch.einsum("na,na...->n...", residual, j) / N for n, j in J.items()}
    each = {n: torch.einsum("nab,na...,nb...->n...", H, j, j) / N for n, j in J.items()}
    expected = {
        "BatchGrad": rows,
        "BatchL2Grad": {n: r.reshape(N, -1).square().sum(1) for n, r in rows.items()},
        "SumGradSquared": {n: r.square().sum(0) for n, r in rows.items()},
        "Variance": {n: r.var(0, unbiased=False) for n, r in rows.items()},
        "DiagGGNExact": contracted(H, J, N),
        "BatchDiagGGNExact": each,
    }
    for quantity, fields in expected.items():
        found = QUANTITIES[quantity](model, loss_fn, x, y, 1)
        assert found.keys() == fields.keys()
        for key, value in fields.items():
            assert_close(found[key], value, EXACT)
    roots = QUANTITIES["SqrtGGNExact"](model, loss_fn, x, y, 1)
    for key, value in each.items():
        assert_close(roots[key].square().sum(0), value, EXACT)


@pytest.mark.parametrize("kind", ["ggn-mc", "ggn-rademacher", "hutchinson"])
@pytest.mark.parametrize("name", MODELS)
def test_draws_have_the_right_mean(name: str, kind: str) -> None:
    """Within four deviations of the mean of many draws."""
    model, x, y = make(name)
    data, loss_fn = [(x, y)], nn.CrossEntropyLoss()
    if name in WITHOUT_SECOND_DERIVATIVE and kind == "hutchinson":
        with pytest.raises(ValueError, match=r"hutchinson.*no second derivative.*'ggn'"):
            diagonal(model, loss_fn, data, kind=kind)
        return
    if kind == "hutchinson":
        named = list(model.parameters())
        first = torch.autograd.grad(
            loss_fn(model(x), y), named, create_graph=True, allow_unused=True
        )
        sums = torch.zeros(())
        for p, g in zip(named, first, strict=True):
            for at in range(0 if g is None or not g.requires_grad else p.numel()):
                (row,) = torch.autograd.grad(
                    g.reshape(-1)[at], p, retain_graph=True, allow_unused=True
                )
                sums = sums + (0.0 if row is None else row.reshape(-1)[at])
        expected = sums
    else:
        J = contracted(blocks(model, x), jacobian(model, x), len(x))
        expected = torch.stack([d.sum() for d in J.values()]).sum()
    draws = torch.stack(
        [
            torch.stack([d.sum() for d in diagonal(model, loss_fn, data, kind=kind).values()]).sum()
            for _ in range(40)
        ]
    )
    error = (draws.mean() - expected).abs()
    spread = 4 * draws.std() / len(draws) ** 0.5
    assert error <= spread + 1e-9 * (1 + expected.abs())


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"embedding"}))  # that has factors
def test_no_factors_is_said(name: str) -> None:
    """An error without a supported layer; a warning that names a layer that is never called."""
    model, x, y = make(name)
    loss_fn, data = nn.CrossEntropyLoss(), [(x, y)]
    silent = {"attention": "attention.out_proj", "functional use": "layer"}
    for fisher_type in ("type-2", "mc", "empirical", "forward-only"):
        if name in silent:
            with pytest.warns(UserWarning, match=f"'{silent[name]}' did not run"):
                assert kfac(model, loss_fn, data, fisher_type=fisher_type) == {}
            continue
        with pytest.raises(ValueError, match=r"got no layer with a trainable weight.*Linear"):
            kfac(model, loss_fn, data, fisher_type=fisher_type)


class Constant(nn.Module):
    """Has parameters, on which its outputs do not depend."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.layer, x[:, 0])


CONSTANT: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "never called": lambda layer, x: x,
    "called in vain": lambda layer, x: (layer(x), x)[1],
    "detached": lambda layer, x: layer(x).detach(),
    "no_grad": lambda layer, x: torch.no_grad()(layer)(x),
}
ESTIMATORS: dict[str, Callable[..., object]] = {
    "per_sample_gradients": per_sample_gradients,
    "gram": gram,
    "ntk": lambda model, loss_fn, data: ntk(model, data[0][0]),
    "kfac": lambda *given: kfac(*given),
    **{
        kind: lambda *given, kind=kind: diagonal(*given, kind=kind)
        for kind in (*FISHER_KINDS, "hesscale", "bl89")
    },
    **{
        name: lambda model, loss_fn, data, q=quantity: q(model, loss_fn, *data[0], 1)
        for name, quantity in QUANTITIES.items()
    },
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_to_differentiate_is_said(estimator: str) -> None:
    data = [(torch.randn(5, 4, 3), torch.tensor([0, 2, 1, 1, 0]))]
    models = [(Constant(run), "depend on no parameter") for run in CONSTANT.values()]
    none: list[nn.Module] = [First(nn.Tanh()), First(nn.Linear(3, 3)).requires_grad_(False)]
    for model, match in [*models, *((model, "model: got no") for model in none)]:
        with pytest.raises(ValueError, match=match):
            ESTIMATORS[estimator](model, nn.CrossEntropyLoss(), data)
