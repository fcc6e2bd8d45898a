"""Bad input: errors name the argument, the value and what is supported; nothing is half done."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from oracles.loops import fit, mlp_batch, state_by_name, weights
from oracles.zoo import mlp
from tnkfac import SINGD

# argument, value, error, a supported value that the message lists
CHOICES: list[tuple[str, Any, type[Exception], str]] = [
    ("structures", "sparse", ValueError, "diagonal"),
    ("structures", "block0diagonal", ValueError, "dense"),
    ("structures", "blockdiagonal", ValueError, "block{k}diagonal"),
    ("structures", ("dense", "Dense"), ValueError, "dense"),
    ("structures", ("dense",), TypeError, "pair"),
    ("structures", ("dense", "dense", "dense"), TypeError, "pair"),
    ("structures", None, TypeError, "pair"),
    ("structures", 3, TypeError, "pair"),
    ("structures", ("dense", 3), TypeError, "dense"),
    ("kfac_approx", "expanded", ValueError, "reduce"),
    ("kfac_approx", None, ValueError, "expand"),
    ("init", "zeros", ValueError, "first_batch"),
    ("init", None, ValueError, "identity"),
    ("grafting", "adamw", ValueError, "rms"),
    ("grafting", True, ValueError, "rms"),
    ("fallback", "adam", ValueError, "adamw"),
    ("fallback", None, ValueError, "sgd"),
    ("loss_average", "sum", ValueError, "batch+sequence"),
    ("loss_average", 3, ValueError, "batch"),
    ("loss_average", True, ValueError, "batch"),
    ("preconditioner_dtype", torch.int64, TypeError, "floating-point"),
    ("preconditioner_dtype", "float33", TypeError, "floating-point"),
    ("preconditioner_dtype", (torch.float32,) * 3, TypeError, "pair"),
    ("fallback_options", {"learning_rate": 1.0}, ValueError, "lr"),
    ("fallback_options", {"lr": -1.0}, ValueError, "at least 0"),
    ("fallback_options", {"lr": "fast"}, TypeError, "number"),
    ("fallback_options", {"betas": 0.9}, TypeError, "pair"),
    ("fallback_options", {"betas": (0.9, 1.0)}, ValueError, "below 1"),
    ("fallback_options", {"eps": -1e-8}, ValueError, "at least 0"),
    ("fallback_options", 3, TypeError, "dict"),
    *(
        (name, value, ValueError, "at least 0")
        for name in ("lr", "momentum", "damping", "alpha1", "weight_decay", "lr_cov", "kl_clip")
        for value in (-1e-3, float("nan"))
    ),
    *((name, 1.0, ValueError, "below 1") for name in ("momentum", "alpha1")),
    *(
        (name, value, TypeError, "number")
        for name in ("lr", "momentum", "damping", "alpha1", "weight_decay", "lr_cov", "kl_clip")
        for value in (True, "0.1", [0.1])
    ),
    *((name, None, TypeError, "number") for name in ("lr", "relative_damping", "weight_decay")),
    ("lr", torch.ones(2), ValueError, "scalar"),
    ("T", 0, ValueError, "positive"),
    ("T", -3, ValueError, "positive"),
    ("T", 2.5, TypeError, "int"),
    ("T", True, TypeError, "int"),
    ("T", None, TypeError, "int"),
    ("T", "often", ValueError, "'auto'"),
    ("max_state_ratio", "small", ValueError, "'auto'"),
    ("max_state_ratio", [1], TypeError, "number"),
    ("kfac_like", "yes", TypeError, "bool"),
    ("normalize_lr_cov", 1.5, TypeError, "bool"),
    ("decoupled_weight_decay", None, TypeError, "bool"),
    ("grad_worker_fraction", -0.5, ValueError, "at least 0"),
    ("grad_worker_fraction", 1.5, ValueError, "1"),
    ("grad_worker_fraction", "all", TypeError, "number"),
    ("grafting", 0.0, ValueError, "positive"),
    ("grafting", -0.2, ValueError, "at least 0"),
    ("grafting", True, ValueError, "positive"),
    ("grafting", [0.2], TypeError, "number"),
    ("relative_damping", -0.1, ValueError, "at least 0"),
    ("max_state_ratio", -1.0, ValueError, "at least 0"),
    ("max_step_ratio", "one", TypeError, "number"),
]


def _id(case: tuple[Any, ...]) -> str:
    return f"{case[0]}={case[1]!r}"


@pytest.mark.parametrize("in_group", [False, True], ids=["argument", "group"])
@pytest.mark.parametrize("case", CHOICES, ids=_id)
def test_hyper_parameters(case: tuple[str, Any, type[Exception], str], in_group: bool) -> None:
    """As an argument and as the entry of a parameter group."""
    name, value, error, supported = case
    model = mlp(3, 2)
    with pytest.raises(error) as caught:
        if in_group:
            SINGD([{"params": model.parameters(), name: value}])
        else:
            SINGD(model.parameters(), **{name: value})
    message = str(caught.value)
    assert name in message
    assert supported in message
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    known_shown = [repr(shown), str(shown), "shape"]
    if isinstance(value, dict):
        known_shown.append(repr(next(iter(value))))
        known_shown += [repr(entry) for entry in shown] if isinstance(shown, tuple) else []
    known_shown += [repr(entry) for entry in value] if isinstance(value, tuple) else []
    assert any(text in message for text in known_shown), message
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: torch.ones(3, requires_grad=True), TypeError, "Tensor"),
        (lambda: nn.Parameter(torch.ones(3)), TypeError, "Parameter"),
        (list, ValueError, "no parameters"),
        (lambda: iter(()), ValueError, "no parameters"),
        (lambda: nn.ReLU(), ValueError, "no parameters"),
        (lambda: nn.ReLU().parameters(), ValueError, "no parameters"),
        (lambda: 3, TypeError, "iterable"),
        (lambda: None, TypeError, "iterable"),
        (lambda: [3], TypeError, "int"),
        (lambda: ["weight"], TypeError, "str"),
        (lambda: [torch.ones(3, requires_grad=True) * 2], ValueError, "leaf"),
        (lambda: [{"param": [torch.ones(3, requires_grad=True)]}], TypeError, "params"),
        (lambda: [{"params": {torch.ones(3, requires_grad=True)}}], TypeError, "ordered"),
    ],
    ids=[
        "tensor",
        "parameter",
        "empty list",
        "empty iterator",
        "module without parameters",
        "its generator",
        "number",
        "None",
        "list of numbers",
        "list of strings",
        "non-leaf",
        "group without params",
        "group with a set",
    ],
)
def test_params(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SINGD(make())


def test_a_group_may_be_empty() -> None:
    """As with every torch optimizer: a filter may leave a group without parameters."""
    model = mlp(3, 2)
    optimizer = SINGD([{"params": model.parameters()}, {"params": []}])
    fit(model, optimizer, [mlp_batch(0, 3, 2)])
    assert len(optimizer.param_groups) == 2


def test_a_parameter_in_two_groups_is_refused() -> None:
    model = mlp(3, 2)
    with pytest.raises(ValueError, match="more than one"):
        SINGD([{"params": model.parameters()}, {"params": [model[0].bias]}])
    assert not model[0]._forward_hooks


def test_bad_added_group_leaves_the_optimizer_as_it_was() -> None:
    model = mlp(3, 4, 2)
    optimizer = SINGD(model[0].parameters())
    with pytest.raises(ValueError, match="damping"):
        optimizer.add_param_group({"params": model[2].parameters(), "damping": -1.0})
    assert len(optimizer.param_groups) == 1
    assert not model[2]._forward_hooks
    fit(model, optimizer, [mlp_batch(0, 3, 2)])


def test_fallback_error_names_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"1\.weight.*LayerNorm.*adamw"):
        SINGD(model.parameters(), fallback="error")
    assert not model[0]._forward_hooks


def test_fallback_error_accepts_a_model_of_layers() -> None:
    model = mlp(3, 4, 2)
    fit(model, SINGD(model.parameters(), fallback="error"), [mlp_batch(0, 3, 2)])


def test_fallback_error_accepts_a_frozen_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[1].requires_grad_(False)
    SINGD(model.parameters(), fallback="error")


@pytest.mark.parametrize("name", ["weight_decy", "dampening", "structure", "Lr_cov", "momentun"])
def test_near_misses_warn_and_are_kept(name: str) -> None:
    model = mlp(3, 2)
    with pytest.warns(UserWarning, match=name):
        optimizer = SINGD([{"params": model.parameters(), name: 7}])
    assert optimizer.param_groups[0][name] == 7


@pytest.mark.parametrize("name", ["tag", "name", "lr_scale", "swa_lr", "initial_lr"])
def test_unknown_keys_are_kept_silently(name: str) -> None:
    """Other libraries put their own entries into groups."""
    model = mlp(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = SINGD([{"params": model.parameters(), name: 7}])
    assert optimizer.param_groups[0][name] == 7
    assert optimizer.state_dict()["param_groups"][0][name] == 7


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        SINGD(mlp(3, 2).parameters(), learning_rate=1.0)


def test_missing_gradients_warn_once_by_name() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).double()
    optimizer = SINGD(model.parameters())
    x, y = mlp_batch(0, 3, 2)
    with pytest.warns(UserWarning, match=r"unused\.weight.*unused\.bias") as caught:
        for _ in range(3):
            fit(model["used"], optimizer, [(x, y)])
    assert len([w for w in caught if "unused.weight" in str(w.message)]) == 1
    assert "used.weight," not in str(caught[0].message).replace("unused.weight,", "")


def test_kfac_like_with_momentum_warns() -> None:
    with pytest.warns(UserWarning, match="alpha1"):
        SINGD(mlp(3, 2).parameters(), kfac_like=True, alpha1=0.5)


class Sparse(nn.Module):
    """A linear layer before an embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.embedding = nn.Embedding(5, 2, sparse=True)
        self.sparse = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[N, 3]`` to ``[N, 2]``."""
        y: torch.Tensor = self.linear(x)
        return y + self.embedding(torch.zeros(len(x), dtype=torch.long)) if self.sparse else y


@pytest.mark.parametrize("first", [False, True], ids=["later step", "first step"])
def test_a_sparse_gradient_changes_nothing(first: bool) -> None:
    """The error comes before any parameter, state or counter has changed."""
    model = Sparse().double()
    optimizer = SINGD(model.parameters(), T=1)
    x, y = mlp_batch(0, 3, 2)
    model.sparse = False
    if not first:
        fit(model, optimizer, [(x, y)])
    model.sparse = True
    before, state = weights(model), state_by_name(model, optimizer)
    counter = optimizer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match=r"embedding\.weight.*sparse"):
        fit(model, optimizer, [(x, y)])
    for name, p in weights(model).items():
        assert torch.equal(p, before[name]), name
    after = state_by_name(model, optimizer)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert optimizer.state_dict()["param_groups"] == counter
