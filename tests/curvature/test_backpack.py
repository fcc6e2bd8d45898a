"""BackPACK's quantities by `tnkfac.curvature.backpack`, and the comparison that the docs show."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack import backpack as original
from backpack import extend, extensions
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from oracles import factors as oracle
from oracles.compare import assert_close
from oracles.curvature import ggn, joint, layer_indices, sample_gradients, unflatten
from tnkfac.curvature.backpack import QUANTITIES, backpack, compute

EXACT = 1e-9
DOCS = Path(__file__).parents[2] / "docs" / "backpack.md"
Layers = Callable[[], list[nn.Module]]

OPTIONS: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "`Linear`": (lambda: [nn.Linear(4, 5), nn.Sigmoid()], (4,)),
    "`Conv2d`": (
        lambda: [nn.Conv2d(2, 3, 2, stride=2, padding=1, dilation=2), nn.ReLU()],
        (2, 5, 6),
    ),
    "`Conv2d(groups=2)`": (lambda: [nn.Conv2d(4, 4, 2, groups=2), nn.Tanh()], (4, 3, 4)),
    "`Conv2d(padding_mode='circular')`": (
        lambda: [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()],
        (2, 4, 3),
    ),
    "`Conv2d(padding='same')`": (
        lambda: [nn.Conv2d(2, 3, 3, padding="same"), nn.ReLU()],
        (2, 4, 3),
    ),
    "`ConvTranspose2d`": (lambda: [nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Sigmoid()], (2, 2, 3)),
    "`ConvTranspose2d(groups=2)`": (
        lambda: [nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Tanh()],
        (4, 2, 3),
    ),
    "`ConvTranspose2d(output_padding=1)`": (
        lambda: [nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), nn.Sigmoid()],
        (2, 2, 3),
    ),
    "`Conv3d`": (lambda: [nn.Conv3d(1, 2, 2), nn.ReLU()], (1, 2, 3, 3)),
    "`LayerNorm`": (lambda: [nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh()], (3,)),
}
EXTENSIONS: dict[str, Any] = {
    "BatchGrad": extensions.BatchGrad,
    "SumGradSquared": extensions.SumGradSquared,
    "Variance": extensions.Variance,
    "DiagGGNExact": extensions.DiagGGNExact,
    "KFLR": extensions.KFLR,
}


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def make(option: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = OPTIONS[option]
    torch.manual_seed(1)
    head = nn.Sequential(*build(), nn.Flatten())
    x = torch.randn(3, *shape)
    model = nn.Sequential(*head, nn.Linear(head(x).shape[1], 3))
    return model, x, torch.tensor([0, 2, 1])


def fields(model: nn.Module, name: str) -> dict[str, Any]:
    return {key: getattr(p, name) for key, p in model.named_parameters() if hasattr(p, name)}


def run(context: Any, model: nn.Module, x: Tensor, y: Tensor, name: str, ours: bool) -> Any:
    """What a training loop of BackPACK's form stores."""
    extension = EXTENSIONS[name]()
    loss_fn = extend(nn.CrossEntropyLoss())
    model = extend(model)
    loss = loss_fn(model(x), y)
    options = {"model": model, "loss_fn": loss_fn, "x": x, "y": y} if ours else {}
    with context(extension, **options):
        loss.backward()
    return fields(model, extension.savefield)


def expected(model: nn.Module, x: Tensor, y: Tensor, name: str) -> dict[str, Any]:
    """Brute force."""
    data, loss_fn = [(x, y)], nn.CrossEntropyLoss()
    rows = sample_gradients(model, loss_fn, data)
    if name == "BatchGrad":
        stacked = [unflatten(model, row) for row in rows]
        return {key: torch.stack([row[key] for row in stacked]) for key in stacked[0]}
    if name == "SumGradSquared":
        return unflatten(model, rows.square().sum(0))
    if name == "Variance":
        return unflatten(model, rows.var(0, unbiased=False))
    return unflatten(model, ggn(model, loss_fn, data).diagonal())


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[key], wanted[key], rtol=1e-7, atol=1e-12) for key in wanted
    )


def factors_are_right(model: nn.Module, x: Tensor, y: Tensor, found: dict[str, Any]) -> bool:
    """Those of every layer exist; of a bias exact, of a weight the input's up to its scale."""
    full = ggn(model, nn.CrossEntropyLoss(), [(x, y)])
    layers = [i for i, m in enumerate(model) if isinstance(m, (nn.Linear, _ConvNd))]
    if not {f"{i}.{name}" for i in layers for name in ("weight", "bias")} <= found.keys():
        return False
    for i in layers:
        at = layer_indices(model, str(i))[:, :, -1]
        blocks = torch.stack([full[group][:, group] for group in at])
        A = oracle.input_factor(model[i], model[:i](x).detach())[:, :-1, :-1]
        B, theirs = found[f"{i}.bias"][0], found[f"{i}.weight"][-1]
        scale = theirs.norm() / A.norm()
        for factor, wanted in ((B, blocks), (theirs, scale * A)):
            if not torch.allclose(factor.view_as(wanted), wanted, rtol=1e-7, atol=1e-12):
                return False
    return True


def verdict(context: Any, option: str, name: str, ours: bool) -> str:
    model, x, y = make(option)
    try:
        found = run(context, model, x, y, name, ours)
    except Exception:
        return "raises"
    model, x, y = make(option)
    if name == "KFLR":
        return "exact" if factors_are_right(model, x, y, found) else "wrong"
    return "exact" if same(found, expected(model, x, y, name)) else "wrong"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_option_is_exact(name: str, option: str) -> None:
    assert verdict(backpack, option, name, ours=True) == "exact"


@pytest.mark.filterwarnings("ignore")
def test_the_table_of_the_docs() -> None:
    """What the page says of BackPACK is what it does."""
    lines = re.findall(r"^\| (`.*)\|$", DOCS.read_text(encoding="utf-8"), re.M)
    rows = {
        cells[0].strip(): [c.strip() for c in cells[1:]] for cells in (x.split("|") for x in lines)
    }
    found = {
        option: [verdict(original, option, name, ours=False) for name in EXTENSIONS]
        for option in OPTIONS
    }
    assert rows == found


def test_where_backpack_is_right_the_factors_are_equal() -> None:
    """Linear layers on one vector per sample; there KFC and its factors coincide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    theirs = run(original, model, x, y, "KFLR", ours=False)
    theirs = {key: [f.clone() for f in factors] for key, factors in theirs.items()}
    ours = run(backpack, model, x, y, "KFLR", ours=True)
    assert ours.keys() == theirs.keys()
    for key, factors in theirs.items():
        assert len(ours[key]) == len(factors)
        for found, wanted in zip(ours[key], factors, strict=True):
            assert_close(found, wanted, EXACT)


def test_roots_and_batches() -> None:
    model, x, y = make("`Conv2d(padding_mode='circular')`")
    options = [extensions.SqrtGGNExact(), extensions.BatchDiagGGNExact(), extensions.BatchL2Grad()]
    compute(model, nn.CrossEntropyLoss(), x, y, *options)
    roots = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in model.parameters()], 2).flatten(0, 1)
    assert_close(roots.T @ roots, ggn(model, nn.CrossEntropyLoss(), [(x, y)]), EXACT)
    rows = sample_gradients(model, nn.CrossEntropyLoss(), [(x, y)])
    for name, p in model.named_parameters():
        assert_close(p.diag_ggn_exact_batch, p.sqrt_ggn_exact.square().sum(0), EXACT)
        squares = torch.stack([unflatten(model, row)[name].square().sum() for row in rows])
        assert_close(p.batch_l2, squares, EXACT)


@pytest.mark.parametrize("name", ["DiagGGNMC", "BatchDiagGGNMC", "SqrtGGNMC", "KFAC"])
def test_draws(name: str) -> None:
    """Many draws come close to the exact quantity."""
    model, x, y = make("`Linear`")
    extension = getattr(extensions, name)(mc_samples=3000)
    compute(model, nn.CrossEntropyLoss(), x, y, extension)
    found = fields(model, extension.savefield)
    full = ggn(model, nn.CrossEntropyLoss(), [(x, y)])
    if name == "KFAC":
        compute(model, nn.CrossEntropyLoss(), x, y, extensions.KFLR())
        for key, p in model.named_parameters():
            assert_close(found[key][0], p.kflr[0], 0.15)
        return
    for key, exact in unflatten(model, full.diagonal()).items():
        value = found[key]
        value = value.square().sum((0, 1)) if name == "SqrtGGNMC" else value
        value = value.sum(0) if name == "BatchDiagGGNMC" else value
        assert_close(value, exact, 0.15)


def test_gradients_are_those_of_the_loss() -> None:
    model, x, y = make("`Conv2d(groups=2)`")
    run(backpack, model, x, y, "BatchGrad", ours=True)
    for name, p in model.named_parameters():
        assert_close(p.grad, p.grad_batch.sum(0), EXACT), name


def test_a_mean_over_several_batches_is_no_matter_of_one() -> None:
    """Fields hold the last pass, as BackPACK's do."""
    model, x, y = make("`Conv2d`")
    compute(model, nn.CrossEntropyLoss(), x, y, extensions.DiagGGNExact())
    first = model[0].weight.diag_ggn_exact.clone()
    compute(model, nn.CrossEntropyLoss(), *joint([(x, y), (x, y)]), extensions.DiagGGNExact())
    assert_close(model[0].weight.diag_ggn_exact, first, EXACT)


LINEAR = nn.Sequential(nn.Linear(3, 2))
X, Y = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
CE = nn.CrossEntropyLoss()
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "extension": (
        TypeError,
        "DiagHessian.*SumGradSquared",
        lambda: compute(LINEAR, CE, X, Y, extensions.DiagHessian()),
    ),
    "class": (
        TypeError,
        "instances of",
        lambda: compute(LINEAR, CE, X, Y, extensions.BatchGrad),
    ),
    "subsampling": (
        ValueError,
        "all samples",
        lambda: compute(LINEAR, CE, X, Y, extensions.BatchGrad(subsampling=[0])),
    ),
    "loss": (
        TypeError,
        "CrossEntropyLoss",
        lambda: compute(LINEAR, nn.L1Loss(), X, Y, extensions.BatchGrad()),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    error, match, call = BAD[name]
    torch.set_default_dtype(torch.float32)
    with pytest.raises(error, match=match):
        call()


def test_every_quantity_is_tested() -> None:
    drawn = {"DiagGGNMC", "BatchDiagGGNMC", "SqrtGGNMC", "KFAC"}
    others = {"SqrtGGNExact", "BatchDiagGGNExact", "BatchL2Grad"}
    assert set(QUANTITIES) == set(EXTENSIONS) | drawn | others
