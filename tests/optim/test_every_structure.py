"""What training loops do to an optimizer, with every structure, on one everyday network.

Some structures measure with the factor in use, so that whatever moves, copies, saves or traces the
state concerns their statistics, too.
"""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from oracles.grids import all_pairs
from oracles.loops import assert_same_state, assert_same_weights, fit, state_by_name, weights
from oracles.optimizers import Optimizer, is_kfac, only_singd, skip_unless_decomposable
from oracles.singd_cases import numbers
from oracles.zoo import STRUCTURES, Everyday, everyday_batch, fixed_weights

BOTH_OPTIMIZERS = True


each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@pytest.fixture(autouse=True)
def _supported(request: pytest.FixtureRequest, optimizer_kind: str) -> None:
    skip_unless_decomposable(request.node.callspec.params["structure"])


Batches = list[tuple[Any, Any]]


def batches(first: int, count: int, dtype: torch.dtype = torch.float64) -> Batches:
    return [everyday_batch(seed, dtype=dtype) for seed in range(first, first + count)]


def network(dtype: torch.dtype = torch.float64) -> Any:
    return fixed_weights(Everyday(), 2.0).to(dtype)


def train(model: Any, optimizer: Any, data: Batches) -> list[float]:
    return fit(model, optimizer, data, functional.cross_entropy)


def all_finite(model: nn.Module, optimizer: Any) -> bool:
    tensors = [*weights(model).values(), *state_by_name(model, optimizer).values()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


PRECISIONS = {
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, factors in float32": (torch.bfloat16, torch.float32),
    "bfloat16, K in float32": (torch.bfloat16, (torch.float32, torch.bfloat16)),
    "float16, factors in float32": (torch.float16, torch.float32),
    "float16, factors in bfloat16": (torch.float16, torch.bfloat16),
}


def low_precisions() -> Iterator[Any]:
    """Everything in bfloat16, and one of two mixtures; the others are for slow runs."""
    mixed = ("bfloat16, factors in float32", "float16, factors in float32")
    for at, structure in enumerate(STRUCTURES):
        for precision in PRECISIONS:
            usual = precision in ("bfloat16", mixed[at % 2])
            yield pytest.param(structure, precision, marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize(("structure", "precision"), low_precisions())
def test_low_precision_stays_finite(structure: str, precision: str) -> None:
    """100 steps with an update in each; the loss falls."""
    only_singd()
    dtype, kept = PRECISIONS[precision]
    model = network(dtype)
    optimizer = Optimizer(
        model.parameters(), lr=1e-2, T=1, structures=structure, preconditioner_dtype=kept
    )
    data = batches(0, 5, dtype)
    losses = train(model, optimizer, data * 20)
    assert all_finite(model, optimizer)
    assert optimizer.skipped_updates == 0
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    pair = kept if isinstance(kept, tuple) else (kept, kept)
    for key, value in state_by_name(model, optimizer).items():
        kind = key.split("/")[1].removeprefix("m_")[0]
        if kind in "KC" and key.split("/")[1] != "momentum_buffer":
            assert value.dtype == (pair["KC".index(kind)] or dtype), key


@pytest.mark.parametrize(
    ("structure", "at", "bad"),
    all_pairs(STRUCTURES, [0, 1, 4], [float("nan"), float("inf"), -float("inf")]),
)
def test_a_bad_batch_is_skipped(structure: str, at: int, bad: float) -> None:
    """One bad number: nothing changes, it is counted, the update follows, training goes on."""
    model = network()
    optimizer = Optimizer(model.parameters(), lr=3e-3, T=4, structures=structure)
    train(model, optimizer, batches(0, at))
    before, state = weights(model), state_by_name(model, optimizer)
    x, y = everyday_batch(at)
    x[3, 1, 2, 2] = bad
    train(model, optimizer, [(x, y)])
    assert optimizer.skipped_updates == 1
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]), key
    for key, value in state.items():
        assert torch.equal(state_by_name(model, optimizer)[key], value), key
    losses = train(model, optimizer, batches(at + 1, 5) * 6)
    assert all_finite(model, optimizer)
    assert optimizer.skipped_updates == 1
    assert sum(losses[-5:]) < sum(losses[:5])
    updates = [row.last_update for row in optimizer.report() if row.structure]
    assert all(update is not None and update > at for update in updates)


@pytest.mark.parametrize("phase", [0, 2])
@each_structure
def test_resume_is_bit_equal(structure: str, phase: int) -> None:
    """Saved before the first step, and while the start is still being refined.

    All phases of an interval are in ``test_marks.py``.
    """
    model, resumed = network(), network()
    options: dict[str, Any] = {"lr": 3e-3, "T": 3, "structures": structure}
    optimizer = Optimizer(model.parameters(), **options)
    train(model, optimizer, batches(0, phase))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved_model, saved = torch.load(file, weights_only=True)
    other = Optimizer(resumed.parameters(), **options)
    resumed.load_state_dict(saved_model)
    other.load_state_dict(saved)
    for m, o in ((model, optimizer), (resumed, other)):
        train(m, o, batches(phase, 10))
    assert_same_weights(resumed, model)
    assert_same_state(resumed, other, model, optimizer)


@each_structure
def test_loading_an_empty_state_starts_anew(structure: str) -> None:
    """A checkpoint from before the first step, loaded into an optimizer that has run."""
    model, fresh = network(), network()
    options: dict[str, Any] = {"lr": 3e-3, "T": 2, "structures": structure}
    optimizer, other = (Optimizer(m.parameters(), **options) for m in (model, fresh))
    saved_model, saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches(20, 3))
    model.load_state_dict(saved_model)
    optimizer.load_state_dict(saved)
    for m, o in ((model, optimizer), (fresh, other)):
        train(m, o, batches(0, 5))
    assert_same_weights(model, fresh)
    assert_same_state(model, optimizer, fresh, other)


@each_structure
def test_copied_together(structure: str) -> None:
    """The copies of model and optimizer go on as the originals do, each for itself."""
    model = network()
    optimizer = Optimizer(model.parameters(), lr=3e-3, T=2, structures=structure)
    train(model, optimizer, batches(0, 3))
    twin, other = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, batches(3, 6))
    assert_same_weights(twin, model)
    assert_same_state(twin, other, model, optimizer)


class Checkpointed(Everyday):
    """The same network, its middle recomputed in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3, 6, 6]`` to ``[N, 4]``."""

        def middle(x: Tensor) -> Tensor:
            return torch.tanh(self.up(torch.relu_(self.grouped(x)))).flatten(1, 2)

        x = torch.relu_(self.norm(self.conv(x)))
        x = checkpoint(middle, x, use_reentrant=self.reentrant)
        y: Tensor = self.last(torch.tanh(self.shared(x)).flatten(1))
        return y


@pytest.mark.parametrize("reentrant", [False, True])
@each_structure
def test_activation_checkpointing(structure: str, reentrant: bool) -> None:
    """The same factors and weights as without."""
    runs: list[Any] = []
    for build in (Everyday, Checkpointed):
        model = fixed_weights(build(), 2.0)
        model.reentrant = reentrant
        optimizer = Optimizer(model.parameters(), lr=3e-3, T=2, structures=structure)
        train(model, optimizer, batches(0, 5))
        runs += [model, optimizer]
    for actual, expected in (
        (weights(runs[2]), weights(runs[0])),
        (state_by_name(*runs[2:]), state_by_name(*runs[:2])),
    ):
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-11, msg=key)


# Clipping scaled gradients is an error of the loop.
@pytest.mark.parametrize(("unscale", "clip"), [(False, None), (True, None), (True, 0.05)])
@each_structure
def test_grad_scaler(structure: str, unscale: bool, clip: float | None) -> None:
    """A scaled loss, unscaled before clipping or not, changes nothing; the scale is inferred."""
    runs = []
    for scaled in (False, True):
        model = network()
        optimizer = Optimizer(model.parameters(), lr=3e-3, T=2, structures=structure)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        for x, y in batches(0, 6):
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
        runs.append({**weights(model), **state_by_name(model, optimizer)})
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-9, atol=1e-11, msg=key)


@each_structure
def test_compiled_whole_graph(structure: str) -> None:
    """Statistics with the live factor are traced too; at most two graphs for 12 steps."""
    runs: list[Any] = []
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        optimizer = Optimizer(model.parameters(), lr=3e-3, T=2, structures=structure)
        for x, y in batches(0, 12):
            optimizer.zero_grad()
            functional.cross_entropy(run(x), y).backward()
            optimizer.step()
        runs.append(dict(weights(model)))
        if not is_kfac():  # eigenvectors have either sign
            runs[-1].update(state_by_name(model, optimizer))
        assert all(row.last_update == 10 for row in optimizer.report() if row.structure)
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-9, atol=1e-11, msg=key)
    assert len(graphs) <= 2


class Shape(nn.Module):
    """One layer between others, its output flattened to a number per sample."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to ``[N]``."""
        y: Tensor = torch.tanh(self.layer(x)).flatten(1).sum(1)
        return y


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one output": (lambda: nn.Linear(5, 1), (6, 5)),
    "one input": (lambda: nn.Linear(1, 5), (6, 1)),
    "one number": (lambda: nn.Linear(1, 1, bias=False), (6, 1)),
    "1x1 convolution": (lambda: nn.Conv2d(3, 4, 1), (6, 3, 2, 2)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3), (6, 3, 3, 3)),
    "depthwise 1x1 without bias": (lambda: nn.Conv1d(3, 3, 1, groups=3, bias=False), (6, 3, 4)),
    "one channel transposed": (lambda: nn.ConvTranspose1d(1, 1, 2), (6, 1, 3)),
}


@pytest.mark.parametrize("name", SMALL)
@each_structure
def test_smallest_layers(structure: str, name: str) -> None:
    """Factors with one row have empty parts; everything still trains, saves and loads."""
    build, shape = SMALL[name]
    data = [(numbers(*shape, seed=s), numbers(6, seed=s + 9)) for s in range(6)]
    model, resumed = (fixed_weights(Shape(build())) for _ in range(2))
    before = weights(model)
    optimizer = Optimizer(model.parameters(), lr=1e-2, T=2, structures=structure)
    fit(model, optimizer, data[:3], functional.mse_loss)
    other = Optimizer(resumed.parameters(), lr=1e-2, T=2, structures=structure)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (resumed, other)):
        fit(m, o, data[3:], functional.mse_loss)
    assert_same_weights(resumed, model)
    assert all_finite(model, optimizer)
    assert all(not torch.equal(p, before[key]) for key, p in weights(model).items())


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@each_structure
def test_state_bytes(structure: str, momentum: float) -> None:
    """The documented number of numbers for ``K`` and ``C``, again for their momenta.

    Beside them: the last update and, where the first one is but a start, that.
    """
    only_singd()
    counts: dict[str, Callable[[int], int]] = {
        "dense": lambda d: d * d,
        "diagonal": lambda d: d,
        "block3diagonal": lambda d: d // 3 * 9 + (d % 3) ** 2,
        "hierarchical2_3": lambda d: (
            d * d if d <= 2 else (2 * d + min(3, d - 2) * (d - 2) + max(0, d - 5))
        ),
        "triltoeplitz": lambda d: d,
        "triutoeplitz": lambda d: d,
    }
    count = counts.get(structure, lambda d: 2 * d - 1)
    model = network(torch.float32)
    optimizer = Optimizer(model.parameters(), structures=structure, alpha1=momentum)
    train(model, optimizer, batches(0, 1, torch.float32))
    for row in optimizer.report():
        if row.structure and row.name.endswith("weight"):
            groups, d_in, d_out = row.factor_dims[0], row.factor_dims[1], row.factor_dims[2]
            factors = groups * (count(d_in) + count(d_out)) * (2 if momentum else 1)
            weight = model.get_parameter(row.name).numel()
            marks = 1 if structure in ("dense", "diagonal", "block3diagonal") else 2
            assert row.state_bytes == 4 * (factors + weight) + 8 * marks, row.name
