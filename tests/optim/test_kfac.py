"""What only KFAC does: failures, resuming inside an interval, Fisher passes, damping, aliases."""

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.loops import assert_same_state, assert_same_weights, fit, mlp_batch, squares, weights
from oracles.zoo import Everyday, everyday_batch, fixed_weights, mlp
from tnkfac import KFAC
from tnkfac.optim.rules.levenberg_marquardt import FACTOR

METHODS = ("eigen", "cholesky", "ekfac")
each_method = pytest.mark.parametrize("method", METHODS)


def network() -> Any:
    return fixed_weights(Everyday(), 2.0)


def batches(first: int, count: int) -> list[tuple[Any, Any]]:
    return [everyday_batch(seed) for seed in range(first, first + count)]


def train(model: Any, optimizer: KFAC, data: list[tuple[Any, Any]]) -> list[float]:
    return fit(model, optimizer, data, functional.cross_entropy)


# --- failures -----------------------------------------------------------------------------------


def failures(optimizer: KFAC) -> dict[str, int]:
    return {row.name: row.failures for row in optimizer.report() if row.failures}


@each_method
def test_a_decomposition_that_raises(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something stands in for it; it is counted and named; success forgets; too many raise.

    Eigenvectors stay what they were. Without any, the inverse is a multiple of the identity.
    """
    model = network()
    optimizer = KFAC(
        model.parameters(), compute_method=method, inv_update_steps=1, num_tolerated_failures=2
    )
    train(model, optimizer, batches(0, 1))
    state = optimizer.state[model.conv.weight]
    key = "A_inv" if method == "cholesky" else "Q_A"
    before = state[key].clone()

    def failing(patch: pytest.MonkeyPatch) -> None:
        for name in ("eigh", "cholesky"):
            real = getattr(torch.linalg, name)

            def fails(matrix: Tensor, real: Any = real) -> Any:
                if matrix.shape[-1] == 28:  # the inputs of the first layer
                    raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
                return real(matrix)

            patch.setattr(torch.linalg, name, fails)

    with monkeypatch.context() as patch:
        failing(patch)
        for count in (1, 2):
            with pytest.warns(UserWarning, match=r"conv\.weight could not.*did not converge"):
                train(model, optimizer, batches(count, 1))
            assert failures(optimizer) == {"conv.weight": count, "conv.bias": count}
            if method == "cholesky":
                before = torch.eye(28).double() * state[key][0, 0, 0]
            assert torch.equal(state[key], before.view_as(state[key]))
    train(model, optimizer, batches(3, 1))
    assert not failures(optimizer)
    assert not torch.equal(state[key], before)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failing(patch)
        train(model, optimizer, batches(4, 2))
        with pytest.raises(RuntimeError, match=r"conv\.weight .* 3 times in a row"):
            train(model, optimizer, batches(6, 1))


@each_method
def test_a_failure_in_float32_is_tried_in_float64(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network().float()
    optimizer = KFAC(model.parameters(), compute_method=method)
    real = torch.linalg.eigh, torch.linalg.cholesky

    def fails(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return real[method == "cholesky"](matrix)

    monkeypatch.setattr(torch.linalg, "cholesky" if method == "cholesky" else "eigh", fails)
    x, y = everyday_batch(0, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, [(x, y)])
    assert not failures(optimizer)
    state = optimizer.state[model.conv.weight]
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("structures", ["dense", "block2diagonal", "diagonal"])
@each_method
def test_a_singular_factor_without_damping(method: str, structures: str) -> None:
    """As without the input that is always zero: its weights have no gradient to be divided."""
    found = []
    for used in ([0, 1, 2], [0, 2]):
        torch.manual_seed(0)
        model = mlp(3, 4, 2)
        if len(used) == 2:
            first = nn.Linear(2, 4).double()
            first.weight.data, first.bias.data = model[0].weight.data[:, used], model[0].bias.data
            model[0] = first
        optimizer = KFAC(
            model.parameters(),
            compute_method=method,
            structures=(structures if structures == "diagonal" else "dense", structures),
            damping=0.0,
            kl_clip=None,
            lr=1e-3,
        )
        x, y = mlp_batch(0, 3, 2, samples=16)
        x[:, 1] = 0
        fit(model, optimizer, [(x[:, used], y)] * 2)
        assert not failures(optimizer)
        found.append([model[0].weight[:, [0, -1]], *list(model.parameters())[1:]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@each_method
def test_a_factor_that_is_not_finite_is_measured_anew(method: str) -> None:
    model = network()
    optimizer = KFAC(model.parameters(), compute_method=method, inv_update_steps=2)
    train(model, optimizer, batches(0, 2))
    optimizer.state[model.up.weight]["A"].fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"up\.weight could not.*not finite"):
        train(model, optimizer, batches(2, 1))
    losses = train(model, optimizer, batches(0, 5) * 6)
    assert not failures(optimizer)
    assert sum(losses[-5:]) < sum(losses[:5])
    tensors = [v for s in optimizer.state.values() for v in s.values()]
    assert all(bool(v.isfinite().all()) for v in (*tensors, *model.parameters()))


# --- checkpoints --------------------------------------------------------------------------------


def resumed(model: Any, optimizer: KFAC, **options: Any) -> tuple[Any, KFAC]:
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    other = network()
    second = KFAC(other.parameters(), **options)
    other.load_state_dict(saved)
    second.load_state_dict(state)
    return other, second


@pytest.mark.parametrize("phase", [0, 1, 4, 5, 7])
@each_method
def test_resume_inside_an_interval_is_bit_equal(method: str, phase: int) -> None:
    """The decomposition in use is not that of the newest factors."""
    options: dict[str, Any] = {
        "compute_method": method,
        "factor_update_steps": 2,
        "inv_update_steps": 4,
    }
    model = network()
    optimizer = KFAC(model.parameters(), **options)
    train(model, optimizer, batches(0, phase))
    other, second = resumed(model, optimizer, **options)
    for m, o in ((model, optimizer), (other, second)):
        train(m, o, batches(phase, 9))
    assert_same_weights(other, model)
    assert_same_state(other, second, model, optimizer)


@each_method
def test_compact_state(method: str) -> None:
    """Decompositions are left out, and made of the saved factors at the next step."""
    options: dict[str, Any] = {"compute_method": method, "compact_state": True}
    model = network()
    optimizer = KFAC(model.parameters(), **options)
    train(model, optimizer, batches(0, 3))
    saved = optimizer.state_dict()["state"]
    kept = {key.split(".")[0] for state in saved.values() for key in state}
    assert not kept & {"Q_A", "Q_B", "d_A", "d_B", "scales", "A_inv", "B_inv"}
    assert {"A", "B", "momentum_buffer"} <= kept
    other, second = resumed(model, optimizer, **options)
    assert second.state[other.conv.weight].keys() == optimizer.state[model.conv.weight].keys()
    losses = train(other, second, batches(3, 1))
    made = [int(state["last_refresh"]) for state in second.state.values() if "A" in state]
    assert set(made) == {3}  # though the next refresh is due at the tenth step
    losses += train(other, second, batches(4, 4))
    assert all(loss < 10 for loss in losses)
    assert all(row.last_update == 7 for row in second.report() if row.structure)


# --- Fisher passes ------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_sampling_under_autocast_and_accumulation(autocast: bool) -> None:
    """Gradients are those of the training loss alone, to the last bit."""
    model, twin = (network().float() for _ in range(2))
    optimizer = KFAC(model.parameters(), fisher_type="mc", mc_samples=2, factor_update_steps=2)
    for step in range(4):
        optimizer.zero_grad()
        twin.zero_grad()
        twin.load_state_dict(model.state_dict())
        for seed in (2 * step, 2 * step + 1):
            x, y = everyday_batch(seed, dtype=torch.float32)
            for m in (model, twin):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    output = m(x)
                    loss = functional.cross_entropy(output, y) / 2
                    if m is model:
                        optimizer.sample_fisher(output)
                loss.backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        optimizer.step()
    assert {row.last_update for row in optimizer.report() if row.structure} == {2}


def test_forgotten_sampling_is_said_once() -> None:
    model = network()
    optimizer = KFAC(model.parameters(), fisher_type="mc")
    with pytest.warns(UserWarning, match=r"No statistics reached conv\.weight.*sample_fisher"):
        train(model, optimizer, batches(0, 3))


def test_sampling_needs_its_fisher_type() -> None:
    model = network()
    optimizer = KFAC(model.parameters())
    output = model(everyday_batch(0)[0])
    with pytest.raises(ValueError, match=r"got 'empirical'.*'mc'"):
        optimizer.sample_fisher(output)
    with pytest.raises(ValueError, match=r"got 'empirical'.*'mc'"), optimizer.fisher_pass():
        pass
    sampled = KFAC(network().parameters(), fisher_type="mc")
    with pytest.raises(ValueError, match=r"likelihood: got 'poisson'.*categorical"):
        sampled.sample_fisher(output, "poisson")


# --- damping ------------------------------------------------------------------------------------


def quadratic(**options: Any) -> tuple[nn.Linear, KFAC, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 2).double()
    optimizer = KFAC(
        model.parameters(),
        momentum=0.0,
        kl_clip=None,
        fisher_type="forward-only",
        adaptive_damping=True,
        **options,
    )
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = (0.5 * (model(x) - y).square().sum(1)).mean()
        loss.backward()
        return loss

    optimizer.calls = calls  # type: ignore[attr-defined]
    return model, optimizer, closure


def test_damping_falls_where_the_model_is_right() -> None:
    """On a quadratic with its own Hessian the prediction holds, and damping falls every fifth."""
    _, optimizer, closure = quadratic(lr=0.3, damping=0.5)
    for _ in range(11):
        optimizer.step(closure)
    (group,) = optimizer.param_groups
    assert group["damping"] == pytest.approx(0.5 * FACTOR**2)
    assert len(optimizer.calls) == 11 + 2


def test_damping_rises_where_steps_are_too_long() -> None:
    _, optimizer, closure = quadratic(lr=2.5, damping=1e-3)
    for _ in range(6):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-3 / FACTOR)


def test_adaptation_restores_gradients_and_statistics() -> None:
    """The second evaluation leaves no trace: the factors go on as without it."""
    states = []
    for adaptive in (False, True):
        model = network()
        optimizer = KFAC(model.parameters(), adaptive_damping=adaptive, kl_clip=1e-2)
        for seed in range(5):
            x, y = everyday_batch(seed)

            def closure(model: Any = model, o: KFAC = optimizer, x: Any = x, y: Any = y) -> Tensor:
                o.zero_grad()
                loss = functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        gradients = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}
        states.append({**weights(model), **gradients})
        assert not any(layer.statistics.pending for layer in optimizer._registry.layers)
        assert any(layer.statistics.enabled for layer in optimizer._registry.layers)
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


def test_adaptive_damping_trains_a_network() -> None:
    model = network()
    optimizer = KFAC(model.parameters(), lr=0.1, damping=1.0, adaptive_damping=True)
    losses = []
    for seed in range(60):
        x, y = everyday_batch(seed % 5)

        def closure(x: Any = x, y: Any = y) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    assert optimizer.param_groups[0]["damping"] != 1.0


def test_adaptive_damping_needs_a_closure() -> None:
    model = network()
    optimizer = KFAC(model.parameters(), adaptive_damping=True)
    with pytest.raises(ValueError, match="closure: got None"):
        optimizer.step()


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("stat_decay", "factor_decay"),
        ("curvature_ema", "factor_decay"),
        ("TCov", "factor_update_steps"),
        ("TInv", "inv_update_steps"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    value: Any = 0.5 if name == "factor_decay" else 7
    model = mlp(3, 2)
    optimizer = KFAC(model.parameters(), **{alias: value})
    assert optimizer.param_groups[0][name] == value
    with pytest.raises(TypeError, match=f"{name}.*{alias}"):
        KFAC(mlp(3, 2).parameters(), **{alias: value, name: 0.25 if value == 0.5 else 3})


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"TConv": 3}, TypeError, "unexpected argument 'TConv'.*TCov"),
    ({"stat_decay": 0.5, "curvature_ema": 0.5}, TypeError, "curvature_ema|stat_decay"),
    ({"factor_decay": 1.0}, ValueError, "factor_decay: got 1.0"),
    ({"factor_update_steps": 0}, ValueError, "factor_update_steps: got 0"),
    ({"inv_update_steps": 2.5}, TypeError, "inv_update_steps: got 2.5"),
    ({"fisher_type": "type-2"}, ValueError, "fisher_type: got 'type-2'.*forward-only"),
    ({"mc_samples": 0}, ValueError, "mc_samples: got 0"),
    ({"compute_method": "inverse"}, ValueError, "compute_method: got 'inverse'.*cholesky"),
    ({"damping_type": "pi"}, ValueError, "damping_type.*got 'pi'.*tikhonov"),
    ({"compute_method": "ekfac", "damping_type": "factor"}, ValueError, "got 'factor'"),
    ({"compute_method": "cholesky", "damping_type": "tikhonov"}, ValueError, "'pi', 'factor'"),
    ({"structures": "triltoeplitz"}, ValueError, "structures: got 'triltoeplitz'.*block"),
    ({"inv_dtype": torch.int64}, TypeError, "inv_dtype: got torch.int64"),
    ({"skip_layers": "conv"}, TypeError, "skip_layers: got 'conv'"),
    ({"num_tolerated_failures": -1}, ValueError, "num_tolerated_failures: got -1"),
    ({"nesterov": 1}, TypeError, "nesterov: got 1"),
    ({"normalization": "kaisa"}, ValueError, "normalization: got 'kaisa'.*kfac-pytorch"),
    ({"normalization": "kfac-pytorch", "kfac_approx": "reduce"}, ValueError, "got 'reduce'"),
    ({"kl_clip": -1.0}, ValueError, "kl_clip: got -1.0"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=str)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KFAC(mlp(3, 2).parameters(), **options)


@pytest.mark.parametrize("skip", ["conv", "shared.weight", "ConvTranspose2d"])
def test_skipped_layers_use_the_fallback(skip: str) -> None:
    model = network()
    optimizer = KFAC(model.parameters(), skip_layers=[skip])
    before = weights(model)
    train(model, optimizer, batches(0, 2))
    skipped = {row.name for row in optimizer.report() if row.reason == f"skip_layers names {skip}"}
    names = {"conv": "conv.weight", "shared.weight": "shared.weight"}
    assert names.get(skip, "up.weight") in skipped
    assert all(not torch.equal(p, before[key]) for key, p in weights(model).items())


def test_loss_of_squares_with_default_options_falls() -> None:
    """Out of the box, on a regression."""
    model = mlp(3, 8, 2)
    optimizer = KFAC(model.parameters(), lr=0.1)
    losses = fit(model, optimizer, [mlp_batch(0, 3, 2)] * 60, squares)
    assert losses[-1] < 0.5 * losses[0]
