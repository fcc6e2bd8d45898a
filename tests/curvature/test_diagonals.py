"""`diagonal`, `per_sample_gradients`, `gram` and `ntk` against brute force with autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles.compare import assert_close
from oracles.curvature import (
    ggn,
    joint,
    loss_hessian,
    model_jacobian,
    output_hessian,
    sample_gradients,
    unflatten,
)
from tnkfac.curvature import diagonal, gram, ntk, per_sample_gradients

EXACT = 1e-9
Data = list[tuple[Tensor, Tensor]]


class Batchless(nn.Module):
    """Time first: the leading axis of the layer inside is not that of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1).sum(1)


class Scaled(nn.Module):
    """Parameters of its own beside those of its layers, one layer used twice, one functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.twice = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x * self.gain))))
        return self.last(x) + nn.functional.linear(x, self.last.weight.square())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return x.mean(1)


def convnet(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), (4,)),
    "linear on sequences": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        (3, 4),
    ),
    "conv1d": (lambda: convnet(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.ELU()), (2, 7)),
    "conv2d": (
        lambda: convnet(
            nn.Conv2d(2, 4, (3, 2), padding=(1, 0), dilation=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2, groups=2, bias=False),
            nn.Sigmoid(),
        ),
        (2, 5, 6),
    ),
    "conv2d, padding modes": (
        lambda: convnet(
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(2, 2, 2, padding="same", padding_mode="reflect"),
        ),
        (2, 4, 4),
    ),
    "conv2d, even kernel and same": (
        lambda: convnet(nn.Conv2d(2, 2, 2, padding="same")),
        (2, 4, 3),
    ),
    "conv3d": (lambda: convnet(nn.Conv3d(1, 2, 2, stride=(1, 2, 1))), (1, 3, 4, 3)),
    "conv_transpose1d": (
        lambda: convnet(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1)),
        (2, 4),
    ),
    "conv_transpose2d": (
        lambda: convnet(
            nn.ConvTranspose2d(4, 4, 3, 2, padding=2, output_padding=1, groups=2, dilation=2),
            nn.Softplus(),
        ),
        (4, 3, 4),
    ),
    "conv_transpose3d": (lambda: convnet(nn.ConvTranspose3d(2, 1, 2, stride=2)), (2, 2, 1, 2)),
    "batch normalisation": (
        lambda: convnet(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.GroupNorm(1, 3)),
        (2, 4, 4),
    ),
    "attention": (Attention, (3, 4)),
    "other parameters": (Scaled, (4,)),
    "time first": (Batchless, (4, 3)),
    "as many steps as samples": (Batchless, (5, 3)),
}
KNOWN = [name for name in MODELS if not name.startswith(("attention", "other", "time", "as many"))]
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "mse": nn.MSELoss,
    "cross-entropy": nn.CrossEntropyLoss,
    "bce": nn.BCEWithLogitsLoss,
}


def make(
    name: str, loss: str = "cross-entropy", sizes: tuple[int, ...] = (5, 2)
) -> tuple[nn.Module, Data]:
    build, shape = MODELS[name]
    model = build().eval()
    model(torch.randn(2, *shape))  # lazy layers learn their shape
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    data = []
    for size in sizes:
        x = torch.randn(size, *shape)
        outputs = model(x).detach()
        y = torch.randn_like(outputs)
        if loss == "cross-entropy":
            y = torch.randint(outputs.shape[1], (size,))
        elif loss == "bce":
            y = torch.rand_like(outputs)
        data.append((x, y))
    return model, data


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert_close(found[name], expected[name], tolerance)


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
    from tnkfac.curvature.estimators import probes

    model, data = make("linear", loss, sizes=(2,))
    loss_fn = LOSSES[loss]()
    columns = 3
    total: dict[str, Tensor] = {}
    for bits in range(2 ** (2 * columns)):
        signs = iter(
            torch.tensor([[1.0 - 2 * (bits >> (2 * c + n) & 1)] for n in range(2)])
            for c in range(columns)
        )
        monkeypatch.setattr(probes, "_signs", lambda like, generator, signs=signs: next(signs))
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


# --- recursions ---------------------------------------------------------------------------------

LINEAR_CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), (4,)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, 2, padding=1, groups=2)), (2, 5, 4)),
    "conv2d, circular": (
        lambda: nn.Sequential(nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular")),
        (2, 3, 3),
    ),
    "conv_transpose2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 3, 2, 1, output_padding=1)),
        (2, 3, 2),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2)), (1, 3, 2, 3)),
    "conv_transpose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 1, 3, dilation=2)), (2, 4)),
}


@pytest.mark.parametrize("kind", ["hesscale", "bl89"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("name", LINEAR_CHAINS)
def test_recursions_are_exact_at_an_elementwise_loss(name: str, loss: str, kind: str) -> None:
    build, shape = LINEAR_CHAINS[name]
    model = nn.Sequential(build(), nn.Sigmoid())
    x = torch.randn(3, *shape)
    data = [(x, torch.rand_like(model(x)))]
    expected = loss_hessian(model, LOSSES[loss](), data).diagonal()
    found = diagonal(model, LOSSES[loss](), data, kind=kind)
    assert_same(found, unflatten(model, expected), EXACT)


def test_hesscale_is_exact_at_the_last_layer_of_a_classifier() -> None:
    model, data = make("linear", sizes=(4, 3))
    expected = unflatten(model, loss_hessian(model, nn.CrossEntropyLoss(), data).diagonal())
    found = diagonal(model, nn.CrossEntropyLoss(), data, kind="hesscale")
    for key in ("2.weight", "2.bias"):
        assert_close(found[key], expected[key], EXACT)
    neglecting = diagonal(model, nn.CrossEntropyLoss(), data, kind="bl89")
    assert float((neglecting["2.bias"] - expected["2.bias"]).norm()) > 0.1 * float(
        expected["2.bias"].norm()
    )


def recursion_by_matrices(model: nn.Sequential, x: Tensor, h: Tensor, g: Tensor) -> list[Tensor]:
    """The recursion from Jacobians and Hessians of every module: diagonals of the inputs."""
    inputs = [x]
    for module in model:
        inputs.append(module(inputs[-1].clone()).detach())
    found = []
    for module, x in reversed(list(zip(model, inputs, strict=False))):
        flat = x.flatten()
        run = lambda v, m=module, x=x: m(v.view_as(x).clone()).flatten()  # noqa: E731
        jacobian = torch.func.jacrev(run)(flat)
        weighted = lambda v, g=g, run=run: (g.flatten() * run(v)).sum()  # noqa: E731
        curved = torch.autograd.functional.hessian(weighted, flat).diagonal()
        h = (jacobian.square().T @ h.flatten() + curved).view_as(x)
        g = (jacobian.T @ g.flatten()).view_as(x)
        found.append(h)
    return found


CHAIN: dict[str, Callable[[], list[nn.Module]]] = {
    "convolutions": lambda: [nn.Conv2d(2, 3, 2, groups=1), nn.SiLU(), nn.ConvTranspose2d(3, 2, 2)],
    "average pooling": lambda: [nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)],
    "average pooling, inside": lambda: [nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)],
    "average pooling, divisor": lambda: [nn.AvgPool2d((2, 1), divisor_override=3)],
    "adaptive pooling": lambda: [nn.AdaptiveAvgPool2d((3, 2))],
    "maximum": lambda: [nn.MaxPool2d(2), nn.GELU()],
    "batch normalisation": lambda: [nn.BatchNorm2d(2).eval(), nn.Tanh()],
    "rearranging": lambda: [nn.ZeroPad2d(1), nn.PixelUnshuffle(1), nn.Identity(), nn.Mish()],
    "dropout": lambda: [nn.Dropout(0.5).eval(), nn.Hardswish(), nn.Softsign()],
}


@pytest.mark.parametrize("name", CHAIN)
def test_modules_on_the_way(name: str) -> None:
    """The diagonal with respect to the bias of a first layer is that of its output, summed."""
    first = nn.Conv2d(1, 2, 1)
    rest = nn.Sequential(*CHAIN[name]())
    model = nn.Sequential(first, nn.Sequential(rest, nn.Flatten()))
    x = torch.randn(2, 1, 3, 4)
    y = torch.randn_like(model(x))
    loss_fn = nn.MSELoss(reduction="sum")
    found = diagonal(model, loss_fn, [(x, y)], kind="hesscale")
    outputs = model(x).detach()
    hidden = first(x).detach()
    flat = nn.Sequential(*rest, nn.Flatten())
    h = recursion_by_matrices(flat, hidden, torch.full_like(outputs, 2.0), 2 * (outputs - y))[-1]
    assert_close(found["0.bias"], h.sum((0, 2, 3)), EXACT)
    assert_close(found["0.weight"].flatten(), (h * x.square()).sum((0, 2, 3)), EXACT)


@pytest.mark.parametrize("dims", [1, 3])
def test_pooling_in_other_dimensions(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](1, 2, 1)
    pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](2, 1, padding=1)
    adaptive = (nn.AdaptiveAvgPool1d, None, nn.AdaptiveAvgPool3d)[dims - 1](2)
    x = torch.randn(2, 1, *[3] * dims)
    for module in (pool, adaptive):
        model = nn.Sequential(conv, module)
        y = torch.randn_like(model(x))
        found = diagonal(model, nn.MSELoss(reduction="sum"), [(x, y)], kind="bl89")
        hidden = conv(x).detach()
        outputs = module(hidden)
        h = recursion_by_matrices(
            nn.Sequential(module), hidden, torch.full_like(outputs, 2.0), 2 * (outputs - y)
        )[-1]
        assert_close(found["0.bias"], h.flatten(2).sum((0, 2)), EXACT)


# --- kernels ------------------------------------------------------------------------------------


@each_model
def test_ntk(name: str) -> None:
    model, data = make(name)
    x = data[0][0]
    jacobian = model_jacobian(model, x).flatten(1, -2).transpose(0, 1).flatten(0, 1)
    assert_close(ntk(model, x), jacobian @ jacobian.T, EXACT)


@each_reduction
@each_loss
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "attention", "other parameters"])
def test_gram(name: str, loss: str, reduction: str) -> None:
    """`V^T V` with `V V^T` the Gauss-Newton matrix, and its order."""
    model, data = make(name, loss)
    loss_fn = LOSSES[loss](reduction=reduction)
    found = gram(model, loss_fn, data)
    x, y = joint(data)
    outputs = model(x).detach()
    samples, classes = outputs.shape
    jacobian = model_jacobian(model, x)  # [N, C, P]
    hessian = output_hessian(loss_fn, outputs, y).view(samples, classes, samples, classes)
    roots = []
    for n in range(samples):
        block = hessian[n, :, n]
        if loss == "cross-entropy":
            p = outputs[n].softmax(0)
            scale = len(x) ** -0.5 if reduction == "mean" else 1.0
            root = (torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())) * scale
        else:
            root = block.diagonal().sqrt().diag()
        assert_close(root @ root.T, block, EXACT)
        roots.append(root)
    v = torch.stack([jacobian[n].T @ roots[n] for n in range(samples)])  # [N, P, C]
    rows = v.permute(2, 0, 1).flatten(0, 1)
    assert_close(found, rows @ rows.T, EXACT)


def test_kernels_form_rows_a_few_channels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tnkfac.curvature.estimators import kernels

    model, data = make("conv_transpose1d")
    expected = ntk(model, data[0][0])
    monkeypatch.setattr(kernels, "MOST", 200)
    assert_close(ntk(model, data[0][0]), expected, 1e-12)


# --- manners ------------------------------------------------------------------------------------


def test_squares_are_summed_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tnkfac.curvature.estimators import diagonals

    model, data = make("conv2d")
    expected = diagonal(model, nn.CrossEntropyLoss(), data)
    monkeypatch.setattr(diagonals, "MOST", 100)
    assert_same(diagonal(model, nn.CrossEntropyLoss(), data), expected, 1e-12)


@pytest.mark.parametrize("name", KNOWN)
def test_supported_layers_need_no_loop_over_samples(name: str) -> None:
    """Also normalisation: one backward pass per class, and one to check the first sample."""
    from tnkfac.curvature.capture import recording
    from tnkfac.curvature.estimators.rows import SampleRows, owners, trainable

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
