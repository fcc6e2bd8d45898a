"""`diagonal` and `per_sample_gradients` against brute force with autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles.compare import assert_close
from oracles.curvature import (
    ggn,
    loss_hessian,
    sample_gradients,
    unflatten,
)
from oracles.estimator_cases import KNOWN, LOSSES, MODELS, Data, assert_same, make
from tnkfac.curvature import diagonal, gram, ntk, per_sample_gradients

EXACT = 1e-9


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


each_model = pytest.mark.parametrize("name", MODELS)
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


# --- exact kinds --------------------------------------------------------------------------------


@each_model
def test_ggn(name: str) -> None:
    model, data = make(name)
    expected = ggn(model, nn.CrossEntropyLoss(), data).diagonal()
    assert_same(diagonal(model, nn.CrossEntropyLoss(), data), unflatten(model, expected), EXACT)


@each_model
def test_empirical_fisher_and_per_sample_gradients(name: str) -> None:
    model, data = make(name)
    rows = sample_gradients(model, nn.CrossEntropyLoss(), data)
    found = per_sample_gradients(model, nn.CrossEntropyLoss(), data)
    stacked = torch.cat([found[key].flatten(1) for key in dict(model.named_parameters())], 1)
    assert_close(stacked, rows, EXACT)
    fisher = diagonal(model, nn.CrossEntropyLoss(), data, kind="empirical-fisher")
    assert_same(fisher, unflatten(model, rows.square().sum(0)), EXACT)


@each_reduction
@each_loss
def test_losses_and_their_averages(loss: str, reduction: str) -> None:
    model, data = make("conv2d", loss)
    loss_fn = LOSSES[loss](reduction=reduction)
    expected = ggn(model, loss_fn, data).diagonal()
    assert_same(diagonal(model, loss_fn, data), unflatten(model, expected), EXACT)
    rows = sample_gradients(model, loss_fn, data).square().sum(0)
    fisher = diagonal(model, loss_fn, data, kind="empirical-fisher")
    assert_same(fisher, unflatten(model, rows), EXACT)


def test_dense_outputs() -> None:
    """Cross-entropy over pixels: every position of a sample is a term."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1))
    data = [(torch.randn(n, 2, 3, 2), torch.randint(3, (n, 4, 3))) for n in (2, 3)]
    for reduction in ("mean", "sum"):
        loss_fn = nn.CrossEntropyLoss(reduction=reduction)
        expected = ggn(model, loss_fn, data).diagonal()
        assert_same(diagonal(model, loss_fn, data), unflatten(model, expected), EXACT)


# --- kinds that draw ----------------------------------------------------------------------------


@each_loss
def test_mc_converges_like_its_square_root(loss: str) -> None:
    model, data = make("linear", loss)
    loss_fn = LOSSES[loss]()
    exact = diagonal(model, loss_fn, data)
    generator = torch.Generator().manual_seed(3)

    def error(mc_samples: int) -> float:
        total = 0.0
        for _ in range(40):
            found = diagonal(
                model, loss_fn, data, kind="ggn-mc", mc_samples=mc_samples, generator=generator
            )
            total += sum(float((found[k] - exact[k]).square().sum()) for k in exact)
        return total**0.5

    ratio = error(2) / error(32)
    assert 2.8 < ratio < 5.6, "expected 4"


@each_loss
def test_rademacher_is_unbiased(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all signs is the diagonal, exactly."""
    from tnkfac.curvature.estimators import hutchinson

    model, data = make("linear", loss, sizes=(2,))
    loss_fn = LOSSES[loss]()
    columns = 3
    total: dict[str, Tensor] = {}
    for bits in range(2 ** (2 * columns)):
        signs = iter(
            torch.tensor([[1.0 - 2 * (bits >> (2 * c + n) & 1)] for n in range(2)])
            for c in range(columns)
        )
        monkeypatch.setattr(hutchinson, "_signs", lambda like, generator, signs=signs: next(signs))
        for key, value in diagonal(model, loss_fn, data, kind="ggn-rademacher").items():
            total[key] = total.get(key, 0) + value / 2 ** (2 * columns)
    assert_same(total, diagonal(model, loss_fn, data), EXACT)


@each_reduction
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "attention", "other parameters"])
def test_hutchinson_is_unbiased(name: str, reduction: str) -> None:
    """Within five standard errors; exact along directions without off-diagonal neighbours."""
    model, data = make(name, sizes=(4,))
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    hessian = loss_hessian(model, loss_fn, data)
    generator = torch.Generator().manual_seed(0)
    found = diagonal(model, loss_fn, data, kind="hutchinson", mc_samples=400, generator=generator)
    flat = torch.cat([found[key].flatten() for key in dict(model.named_parameters())])
    off = (hessian.square().sum(0) - hessian.diagonal().square()) / 400
    error = (flat - hessian.diagonal()).abs()
    assert bool((error <= 5 * off.sqrt() + 1e-12).all())


@pytest.mark.parametrize("kind", ["ggn-mc", "ggn-rademacher", "hutchinson"])
def test_generators(kind: str) -> None:
    model, data = make("conv1d")
    state = torch.get_rng_state()

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = {"kind": kind, "mc_samples": 2, "generator": generator}
        return diagonal(model, nn.CrossEntropyLoss(), data, **options)["0.weight"]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(state, torch.get_rng_state()), "the global generator moved"


# --- manners ------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 2**30])
@pytest.mark.parametrize("name", [name for name in KNOWN if name.startswith("conv")])
def test_folding_and_unfolding(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the gradients of every sample."""
    from tnkfac.curvature.moments import per_sample

    model, data = make(name)
    monkeypatch.setattr(per_sample, "UNFOLDED", most)
    rows = sample_gradients(model, nn.CrossEntropyLoss(), data)
    found = per_sample_gradients(model, nn.CrossEntropyLoss(), data)
    stacked = torch.cat([found[key].flatten(1) for key in dict(model.named_parameters())], 1)
    assert_close(stacked, rows, EXACT)


def test_squares_are_summed_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tnkfac.curvature.estimators import diagonals

    model, data = make("conv2d")
    expected = diagonal(model, nn.CrossEntropyLoss(), data)
    monkeypatch.setattr(diagonals, "MOST", 100)
    assert_same(diagonal(model, nn.CrossEntropyLoss(), data), expected, 1e-12)


@pytest.mark.parametrize("name", KNOWN)
def test_supported_layers_need_no_loop_over_samples(name: str) -> None:
    """Also normalisation: one backward pass per class, and one to check the first sample."""
    from tnkfac.curvature.capture.recording import recording
    from tnkfac.curvature.estimators.jacobian_rows import SampleRows, owners, trainable

    model, data = make(name)
    parameters = trainable(model)
    with recording(owners(parameters, model)) as calls:
        outputs = model(data[0][0])
    rows = SampleRows(parameters, calls, outputs)
    rows.backpropagate(torch.randn_like(outputs))
    assert set(rows.together) == set(parameters)


@pytest.mark.parametrize(
    "kind",
    ["ggn", "ggn-mc", "ggn-rademacher", "empirical-fisher", "hutchinson", "hesscale", "bl89"],
)
def test_nothing_changes_and_empty_batches_count_nothing(kind: str) -> None:
    model, data = make("conv2d")
    loss_fn = nn.CrossEntropyLoss()
    empty = (torch.empty(0, 2, 5, 6), torch.empty(0, dtype=torch.long))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def run(data: Data) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return diagonal(model, loss_fn, data, kind=kind, generator=generator)

    expected = run(data)
    assert_same(run([empty, *data, empty]), expected, 1e-14)
    assert all(float(v.abs().sum()) == 0 for v in run([empty]).values())
    assert all(not v.requires_grad for v in expected.values())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "0.weight")
    assert not any(m._forward_hooks for m in model.modules())


class Branching(nn.Module):
    """A layer that the sign of the input turns off, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.sometimes(x).tanh() if self.on else x


def test_parameters_that_are_not_used() -> None:
    """Zeros, without a pass per sample; also where only one of two batches uses them."""
    model = Branching()
    data = [(torch.randn(3, 3), torch.randint(3, (3,))) for _ in range(2)]

    class Switching(list):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            for on, batch in zip((True, False), data, strict=True):
                model.on = on
                yield batch

    expected: dict[str, Tensor] = {}
    for on, batch in zip((True, False), data, strict=True):
        model.on = on
        for name, value in unflatten(
            model, ggn(model, nn.CrossEntropyLoss(reduction="sum"), [batch]).diagonal()
        ).items():
            expected[name] = expected.get(name, 0) + value / 6
    assert_same(diagonal(model, nn.CrossEntropyLoss(), Switching()), expected, EXACT)
    rows = per_sample_gradients(model, nn.CrossEntropyLoss(), Switching())
    assert rows["never.weight"].shape == (6, 3, 3)
    assert float(rows["sometimes.weight"][3:].abs().sum()) == 0
    matrix = gram(model, nn.CrossEntropyLoss(), Switching())
    total = sum(float(value.sum()) for value in expected.values())
    assert_close(matrix.trace(), torch.tensor(total), EXACT)


def test_frozen_parameters_are_left_out() -> None:
    model, data = make("linear")
    model[0].weight.requires_grad_(False)
    for kind in ("ggn", "ggn-rademacher", "hutchinson", "hesscale"):
        found = diagonal(model, nn.CrossEntropyLoss(), data, kind=kind)
        assert list(found) == ["0.bias", "2.weight", "2.bias"]


def test_half_precision_is_summed_in_float32() -> None:
    model, data = make("conv2d")
    expected = diagonal(model, nn.CrossEntropyLoss(), data)
    model.to(torch.bfloat16)
    found = diagonal(model, nn.CrossEntropyLoss(), [(x.bfloat16(), y) for x, y in data])
    for name in expected:
        assert found[name].dtype == torch.float32
        assert_close(found[name].double(), expected[name], 0.1)


NET = nn.Sequential(nn.Linear(3, 2))
X, CLASSES = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
CE = nn.CrossEntropyLoss()
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "kind": (ValueError, "bl89", lambda: diagonal(NET, CE, [(X, CLASSES)], kind="exact")),
    "samples": (ValueError, "at least 1", lambda: diagonal(NET, CE, [(X, CLASSES)], mc_samples=-1)),
    "loss": (TypeError, "MSELoss", lambda: per_sample_gradients(NET, nn.NLLLoss(), [])),
    "model": (TypeError, "Module", lambda: gram("net", CE, [])),
    "no data": (ValueError, "iterable", lambda: gram(NET, CE, [])),
    "targets": (ValueError, "class indices", lambda: per_sample_gradients(NET, CE, [(X, X)])),
    "frozen": (ValueError, "requires a gradient", lambda: ntk(nn.ReLU(), X)),
    "output": (TypeError, "one tensor", lambda: ntk(nn.LSTM(3, 2), torch.zeros(2, 4, 3))),
    "batch normalisation": (
        ValueError,
        r"'1'.*eval\(\)",
        lambda: diagonal(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), CE, [(X, CLASSES)]),
    ),
    "recursion": (
        ValueError,
        "LayerNorm. Supported: .*Linear",
        lambda: diagonal(
            nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), CE, [(X, CLASSES)], kind="hesscale"
        ),
    ),
    "recursion with dropout": (
        ValueError,
        "Dropout in training mode",
        lambda: diagonal(
            nn.Sequential(nn.Linear(3, 2), nn.Dropout()), CE, [(X, CLASSES)], kind="bl89"
        ),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    error, match, call = BAD[name]
    torch.set_default_dtype(torch.float32)
    with pytest.raises(error, match=match):
        call()
