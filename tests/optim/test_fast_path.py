"""Many layers at once: the same numbers as one layer after the other."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from oracles.loops import fit, state_by_name, weights
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights
from tnkfac import KFAC, SINGD
from tnkfac.curvature import plain_path, switch
from tnkfac.optim import base
from tnkfac.optim.step import apply, elementwise, grafting, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

SINGD_CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "diagonal": {"structures": "diagonal"},
    "diagonal and dense": {"structures": ("diagonal", "dense")},
    "without momentum": {"structures": "diagonal", "momentum": 0.0, "alpha1": 0.0},
    "without grafting": {"structures": "diagonal", "grafting": None, "momentum": 0.9},
    "a number as damping": {"structures": "diagonal", "damping": 0.1, "grafting": "rms"},
    "from the identity": {"structures": "diagonal", "init": "identity"},
    "trust region": {"structures": "diagonal", "grafting": None, "kl_clip": 1e-4},
    "decoupled decay": {"structures": "diagonal", "weight_decay": 0.1},
    "coupled decay": {
        "structures": "diagonal",
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
    },
    "as AdamW's size": {"structures": "diagonal", "grafting": "adam"},
    "as the gradient's size": {"grafting": "sgd"},
    "paper": dict(SINGD.REFERENCE),
    "paper, diagonal": {**SINGD.REFERENCE, "structures": "diagonal"},
    "ikfac": {"structures": "diagonal", "kfac_like": True, "alpha1": 0.0},
    "normalised": {"structures": "diagonal", "normalize_lr_cov": True},
    "half precision": {"structures": "diagonal", "preconditioner_dtype": torch.bfloat16},
    "reduce": {"structures": "diagonal", "kfac_approx": "reduce"},
}
KFAC_CASES: dict[str, dict[str, Any]] = {
    "KFAC": {},
    "KFAC classic": {"damping": 1e-2},
    "KFAC diagonal": {"structures": "diagonal"},
    "KFAC Nesterov": {"nesterov": True},
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (SINGD, options) for name, options in SINGD_CASES.items()},
    **{name: (KFAC, options) for name, options in KFAC_CASES.items()},
}


def trained(cls: Any, options: dict[str, Any], frozen: bool = False) -> Any:
    model = fixed_weights(AllLayers())
    intervals: dict[str, Any] = {"T": 2} if cls is SINGD else {"inv_update_steps": 2}
    optimizer = cls(model.parameters(), lr=1e-2, **intervals, **options)
    fit(model, optimizer, [all_layers_batch(seed) for seed in range(4)])
    if frozen:
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                param.requires_grad_(False)
                param.grad = None
    fit(model, optimizer, [all_layers_batch(seed) for seed in range(4, 7)])
    return model, optimizer


@pytest.mark.filterwarnings("ignore:alpha1")
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen biases"])
@pytest.mark.parametrize("name", CASES)
def test_the_fast_path_equals_the_plain_one(name: str, frozen: bool) -> None:
    """Weights and every tensor of the state, in float64, after seven steps."""
    cls, options = CASES[name]
    model, optimizer = trained(cls, options, frozen)
    with plain_path():
        assert switch.plain
        twin, other = trained(cls, options, frozen)
    low = "half" in name
    close: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-3} if low else {"rtol": 1e-9, "atol": 1e-12}
    for key, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[key], msg=key, **close)
    states, others = state_by_name(model, optimizer), state_by_name(twin, other)
    assert states.keys() == others.keys()
    for key, value in states.items():
        if key.split("/")[1].startswith("Q_"):
            continue  # eigenvectors of equal eigenvalues are not unique
        torch.testing.assert_close(value, others[key], msg=key, **close)


def test_the_fast_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the comparison above compares two paths."""
    seen: list[int] = []
    known = pipeline.scaled_gradients

    def counted(scaled: Any) -> Any:
        seen.append(len(scaled))
        return known(scaled)

    monkeypatch.setattr(pipeline, "scaled_gradients", counted)
    _, optimizer = trained(SINGD, {"structures": "diagonal"})
    assert seen == [len(optimizer._registry.layers)] * 7
    seen.clear()
    with plain_path():
        trained(SINGD, {"structures": "diagonal"})
    assert not seen


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen biases"])
@pytest.mark.parametrize("block", [1, 7, 40])
@pytest.mark.parametrize(
    "name",
    [
        "diagonal",
        "without momentum",
        "without grafting",
        "decoupled decay",
        "coupled decay",
        "a number as damping",
    ],
)
def test_layers_taken_by_rows_equal_the_plain_path(
    name: str, block: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large ones are; here all of them are large."""
    monkeypatch.setattr(elementwise, "BLOCK", block)
    taken: list[str] = []
    known = elementwise.step_large

    def counted(scaled: Any, *args: Any) -> bool:
        taken.append(scaled[0].name)
        return known(scaled, *args)

    monkeypatch.setattr(elementwise, "step_large", counted)
    cls, options = CASES[name]
    model, _ = trained(cls, options, frozen)
    assert taken
    with plain_path():
        twin, _ = trained(cls, options, frozen)
    for key, value in weights(model).items():
        torch.testing.assert_close(value, weights(twin)[key], msg=key, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("T", [1, 3], ids=["with an update", "without"])
def test_a_large_gradient_that_is_not_finite_is_skipped(
    T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found out after factors were updated, which may stand: their statistics are finite."""
    monkeypatch.setattr(elementwise, "BLOCK", 7)
    model = fixed_weights(AllLayers())
    optimizer = SINGD(model.parameters(), structures="diagonal", T=T)
    fit(model, optimizer, [all_layers_batch(seed) for seed in range(2)])
    before = [p.detach().clone() for p in model.parameters()]
    states = copy.deepcopy(optimizer.state_dict()["state"])
    x, y = all_layers_batch(2)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    large = next(la.weight for la in optimizer._registry.layers if elementwise.is_large(la))
    large.grad.view(-1)[-1] = float("inf")  # by the loop: statistics are finite
    optimizer.step()
    assert optimizer.skipped_updates == 1
    for old, param in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, param)
    for place, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if key in ("K", "C", "m_K", "m_C"):
                assert value.isfinite().all()
            else:
                torch.testing.assert_close(value, states[place][key], rtol=0, atol=0)
    fit(model, optimizer, [all_layers_batch(3)])
    assert not torch.equal(before[0], next(model.parameters()))


def test_large_gradients_are_not_read_to_see_that_they_are_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for those whose norms are not needed, or are out of range."""
    seen: list[set[int]] = []
    known = base.non_finite

    def counted(tensors: Any) -> Any:
        listed = list(tensors)
        seen.append({tensor.data_ptr() for tensor in listed})
        return known(listed)

    monkeypatch.setattr(elementwise, "BLOCK", 7)
    monkeypatch.setattr(base, "non_finite", counted)
    for options, guarded in (({}, False), ({"grafting": None}, True), ({"kl_clip": 1e-3}, True)):
        model = fixed_weights(AllLayers())
        optimizer = SINGD(model.parameters(), structures="diagonal", **options)
        x, y = all_layers_batch(0)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        weight = next(la.weight for la in optimizer._registry.layers if elementwise.is_large(la))
        assert (weight.grad.data_ptr() in seen[-1]) == guarded, options


@pytest.mark.parametrize("chunk", [1, 200, 1 << 22])
def test_how_layers_are_cut_does_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained(SINGD, {"structures": "diagonal"})
    monkeypatch.setattr(apply, "CHUNK", chunk)
    found, _ = trained(SINGD, {"structures": "diagonal"})
    for key, value in weights(found).items():
        assert torch.equal(value, weights(expected)[key]), key


def test_a_channels_last_model_takes_the_same_steps() -> None:
    """Its weights are no matrices as they lie."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
        model = model.to(memory_format=layout)
        optimizer = SINGD(model.parameters(), structures="diagonal", T=2)
        torch.manual_seed(1)
        data = [(torch.randn(4, 3, 8, 8).double(), torch.randn(4, 4, 4, 4).double())] * 4
        fit(model, optimizer, data)
        found.append(weights(model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


def test_a_factor_that_is_not_finite_is_left_alone() -> None:
    """One layer's overflow does not cost the others their update."""
    found = []
    for way in ("fast", "plain"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        torch.manual_seed(0)
        for param in model.parameters():
            nn.init.normal_(param)
        optimizer = SINGD(model.parameters(), structures="diagonal", T=1)
        x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        fit(model, optimizer, [(x, y)])
        state = optimizer.state[model[0].weight]
        state["K"].fill_(1e200)  # its square times a factor overflows
        before = state["K"].clone(), optimizer.state[model[2].weight]["K"].clone()
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        if way == "fast":
            optimizer.step()
        else:
            with plain_path():
                optimizer.step()
        assert torch.equal(state["K"], before[0])
        assert not torch.equal(optimizer.state[model[2].weight]["K"], before[1])
        found.append(optimizer.state[model[2].weight]["K"])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("change", ["layout of the buffers", "precision of the model"])
def test_tensors_that_do_not_fit_together_go_the_plain_way(change: str) -> None:
    """A checkpoint of a channels-last model, or a model in another precision than its state."""
    found = []
    for way in ("fast", "plain"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        optimizer = SINGD(model.parameters(), structures="diagonal", T=2, lr=1e-2)
        torch.manual_seed(1)
        x, y = torch.randn(4, 3, 8, 8), torch.randn(4, 4, 4, 4)
        fit(model, optimizer, [(x, y)] * 2)
        if change.startswith("layout"):
            for layer in (model[0], model[2]):
                state = optimizer.state[layer.weight]
                buffer = state["momentum_buffer"]
                state["momentum_buffer"] = buffer.to(memory_format=torch.channels_last)
                assert not state["momentum_buffer"].is_contiguous()
        else:
            model.double()
            x, y = x.double(), y.double()
        if way == "fast":
            fit(model, optimizer, [(x, y)] * 3)
        else:
            with plain_path():
                fit(model, optimizer, [(x, y)] * 3)
        found.append(weights(model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


@pytest.mark.parametrize("size", [1e25, 1e-25, 0.0, 1.0])
def test_norms_of_huge_and_tiny_updates(size: float) -> None:
    """Squares of these overflow or vanish in float32."""
    found = grafting._host_norms([torch.full((4, 9), size), torch.ones(3)])
    assert found == pytest.approx([6 * size, 3**0.5], rel=1e-6)


def test_gradients_stay_as_they_are() -> None:
    """A layer without statistics is not preconditioned: its update is its gradient at first."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = SINGD(model.parameters(), lr=1e-2, init="identity", structures="dense")
    with optimizer.no_stats():
        model(torch.ones(4, 3)).square().sum().backward()
    before = model.weight.grad.clone()
    optimizer.step()
    assert torch.equal(model.weight.grad, before)
