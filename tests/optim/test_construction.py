"""How parameters reach the optimizer, and what becomes of each kind of parameter."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.loops import assert_same_weights, fit, mlp_batch, squares, weights
from oracles.optimizers import Optimizer, is_kfac
from oracles.zoo import Mixed, mixed_batch, mixed_loss, mlp

BOTH_OPTIMIZERS = True


FAST = {"lr": 0.01, "T": 2}


# --- spellings ----------------------------------------------------------------------------------


def in_groups(model: nn.Module) -> list[dict[str, Any]]:
    """One group per child, generators inside, and one for what the module itself owns."""
    groups = [{"params": child.parameters()} for _, child in model.named_children()]
    own = list(model.parameters(recurse=False))
    return [*groups, {"params": own}] if own else groups


def second(pair: tuple[str, Tensor]) -> Tensor:
    return pair[1]


SPELLINGS: dict[str, Callable[[nn.Module], Any]] = {
    "named_parameters()": lambda m: m.named_parameters(),
    "module": lambda m: m,
    "list": lambda m: list(m.parameters()),
    "tuple": lambda m: tuple(m.parameters()),
    "list of named": lambda m: list(m.named_parameters()),
    "filter": lambda m: filter(lambda p: p.requires_grad, m.parameters()),
    "generator expression": lambda m: (p for p in m.parameters() if p.requires_grad),
    "nested generators": lambda m: (p for _, p in filter(None, m.named_parameters())),
    "map": lambda m: map(second, m.named_parameters()),
    "iterator of a list": lambda m: iter(list(m.parameters())),
    "values of a dict": lambda m: dict(m.named_parameters()).values(),
    "one group": lambda m: [{"params": list(m.parameters())}],
    "one group, generator": lambda m: [{"params": m.parameters()}],
    "one group, named": lambda m: [{"params": m.named_parameters()}],
    "groups": in_groups,
    "generator of groups": lambda m: (group for group in in_groups(m)),
}


class Shared(nn.Module):
    """Two linear layers with one weight and one bias, in different children."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.second[0].weight, self.second[0].bias = self.first[0].weight, self.first[0].bias
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 4]`` to ``[N, 3]``."""
        y: Tensor = self.head(self.second(self.first(x)))
        return y


def in_disjoint_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Like :func:`in_groups`, without parameters that an earlier child has."""
    taken: set[int] = set()
    groups = []
    for _, child in model.named_children():
        mine = [p for p in child.parameters() if id(p) not in taken]
        taken |= {id(p) for p in mine}
        whole = len(mine) == len(list(child.parameters()))
        if mine:
            groups.append({"params": child.parameters() if whole else mine})
    return groups


def train(
    build: Callable[[], nn.Module],
    spelling: Callable[[nn.Module], Any],
    batch: Callable[[int], Any],
    loss: Callable[..., Tensor],
    **options: Any,
) -> nn.Module:
    torch.manual_seed(3)
    model = build()
    optimizer = Optimizer(spelling(model), **{**FAST, **options})
    fit(model, optimizer, [batch(step) for step in range(20)], loss)
    return model


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_train_alike(name: str) -> None:
    """Bit for bit the same weights after 20 steps, on a network with every kind of parameter."""
    runs = [
        train(Mixed, spelling, mixed_batch, mixed_loss)
        for spelling in (lambda m: m.parameters(), SPELLINGS[name])
    ]
    assert_same_weights(runs[1], runs[0])


@pytest.mark.parametrize("name", [*SPELLINGS, "disjoint groups"])
def test_spellings_train_shared_weights_alike(name: str) -> None:
    """All modules that share a weight contribute, also one outside of the group's generator."""
    spelling = {**SPELLINGS, "groups": in_disjoint_groups, "disjoint groups": in_disjoint_groups}
    spelling["generator of groups"] = lambda m: (group for group in in_disjoint_groups(m))
    runs = [
        train(Shared, spell, lambda step: mlp_batch(step, 4, 3, dtype=torch.float32), squares)
        for spell in (lambda m: m.parameters(), spelling[name])
    ]
    assert_same_weights(runs[1], runs[0])


def test_spellings_capture_alike() -> None:
    """The same parameters are captured, under names of the model."""
    reports = {}
    for name, spelling in {"parameters()": lambda m: m.parameters(), **SPELLINGS}.items():
        model = Mixed()
        rows = Optimizer(spelling(model)).report()
        reports[name] = {row.shape: bool(row.structure) for row in rows}
    assert all(report == reports["parameters()"] for report in reports.values())
    model = Mixed()
    captured = [row.name for row in Optimizer(model.named_parameters()).report() if row.structure]
    attention = [
        f"attention.in_proj_{kind}[{first}:{first + 4}]"
        for first in (0, 4, 8)
        for kind in ("weight", "bias")
    ]
    attention += ["attention.out_proj.weight", "attention.out_proj.bias"]
    called = ["conv.weight", "conv.bias", "head.weight", "head.bias"]
    assert sorted(captured) == sorted([*called, *attention])


def test_named_parameters_keep_their_names() -> None:
    """As with torch's optimizers, names sit in the groups and in the checkpoint."""
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


def test_module_leaves_out_frozen_parameters() -> None:
    model = mlp(3, 4, 2)
    model[0].requires_grad_(False)
    optimizer = Optimizer(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model[2].parameters()
    ]


# --- groups -------------------------------------------------------------------------------------


def capture_rows(optimizer: Any) -> dict[str, bool]:
    return {row.name: bool(row.structure) for row in optimizer.report()}


def test_groups_of_decay() -> None:
    """Weights with decay, biases and norms without: what every training script does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    optimizer = Optimizer(groups, lr=0.01)
    assert capture_rows(optimizer)["0.bias"]
    before = weights(model)
    optimizer.zero_grad()
    (0.0 * model(torch.ones(2, 3).double())).sum().backward()
    optimizer.step()
    for name, p in weights(model).items():
        factor = 1 - 0.01 * 0.5 if p.ndim > 1 else 1.0
        torch.testing.assert_close(p, before[name] * factor, rtol=1e-15, atol=0)


def test_group_options_of_layers() -> None:
    """``structures``, ``T``, ``damping`` and ``kfac_approx`` are those of the weight's group."""
    model = mlp(3, 4, 4, 2)
    groups = [
        {"params": model[0].parameters(), "structures": "diagonal", "T": 1},
        {"params": model[2].parameters(), "structures": ("dense", "diagonal"), "T": 3},
        {"params": model[4].parameters()},
    ]
    optimizer = Optimizer(groups, structures="block2diagonal", T=2)
    fit(model, optimizer, [mlp_batch(step, 3, 2) for step in range(6)])
    state = [optimizer.state[model[i].weight] for i in (0, 2, 4)]
    left, right = ("A", "B") if is_kfac() else ("K", "C")
    assert state[0][left].shape == (1, 4)
    assert state[1][left].shape == (1, 5, 5)
    assert state[1][right].shape == (1, 4)
    assert state[2][f"{left}.0"].shape == (1, 2, 2, 2)
    assert [int(s["last_update"]) for s in state] == [5, 3, 4]


def test_a_group_added_later_is_captured() -> None:
    """At construction the second layer does not exist yet."""
    first = nn.Linear(3, 4).double()
    optimizer = Optimizer(first.parameters(), **FAST)
    fit(first, optimizer, [mlp_batch(0, 3, 4)])
    second = nn.Linear(4, 2).double()
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.1, "T": 1})
    model = nn.Sequential(first, nn.Tanh(), second)
    before = weights(model)
    fit(model, optimizer, [mlp_batch(step, 3, 2) for step in range(3)])
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())
    assert int(optimizer.state[second.weight]["last_update"]) == 2
    assert len(second._forward_hooks) == 1
    assert len(first._forward_hooks) == 1


def test_a_bias_added_later_is_trained() -> None:
    """Its weight is captured alone by then; both move."""
    model = mlp(3, 2)
    optimizer = Optimizer([model[0].weight], **FAST)
    fit(model, optimizer, [mlp_batch(0, 3, 2)])
    optimizer.add_param_group({"params": [model[0].bias]})
    before = weights(model)
    fit(model, optimizer, [mlp_batch(1, 3, 2)])
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())


# --- frozen parameters --------------------------------------------------------------------------

FROZEN: dict[str, tuple[str, ...]] = {
    "layer": ("0.weight", "0.bias"),
    "bias": ("0.bias",),
    "weight": ("0.weight",),
    "last layer": ("2.weight", "2.bias"),
    "last bias": ("2.bias",),
    "last weight": ("2.weight",),
}


def set_frozen(model: nn.Module, names: tuple[str, ...], frozen: bool) -> None:
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad_(not frozen)
            p.grad = None


@pytest.mark.parametrize("grafting", ["rms", "adam", None])
@pytest.mark.parametrize("later", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("name", FROZEN)
def test_freezing_and_unfreezing(name: str, later: bool, grafting: str | None) -> None:
    """Frozen parameters rest, all others move, and unfrozen ones move again."""
    model = mlp(3, 4, 2)
    if not later:
        set_frozen(model, FROZEN[name], True)
    optimizer = Optimizer(model.parameters(), grafting=grafting, lr=0.01, T=1)
    if later:
        fit(model, optimizer, [mlp_batch(9, 3, 2)])
        set_frozen(model, FROZEN[name], True)
    before = weights(model)
    fit(model, optimizer, [mlp_batch(step, 3, 2) for step in range(2)])
    middle = weights(model)
    for key, p in middle.items():
        assert torch.equal(p, before[key]) == (key in FROZEN[name]), key
    set_frozen(model, FROZEN[name], False)
    fit(model, optimizer, [mlp_batch(step, 3, 2) for step in range(2, 4)])
    for key, p in weights(model).items():
        assert torch.isfinite(p).all()
        assert not torch.equal(p, middle[key]), key


# --- modules of all kinds -----------------------------------------------------------------------


class TiedHead(nn.Module):
    """A language model's embedding and head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[N, S]`` to ``[N, 7]``."""
        y: Tensor = self.head(torch.tanh(self.body(self.embedding(tokens).mean(1))))
        return y


class Doubled(nn.Linear):
    """Overrides forward: what multiplies the weight is unknown."""

    def forward(self, x: Tensor) -> Tensor:
        """Use twice the weight."""
        return functional.linear(x, 2 * self.weight, self.bias)


class Scaled(nn.Module):
    """Parameters owned by a module that contains others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.shifts = nn.ParameterList([torch.zeros(4)])
        self.linear = nn.Linear(4, 4)
        self.unowned_use = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Use a layer's weight without calling the layer, too."""
        x = self.linear(x) * self.scale + self.shifts[0]
        return functional.linear(x, self.unowned_use.weight, self.unowned_use.bias)


class Kept(nn.Linear):
    """A subclass with the stock forward is captured."""


class Named(nn.Module):
    """A forward with several inputs; the layer is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Call by keyword."""
        y: Tensor = self.linear(input=x)
        return y


def vectors(step: int) -> tuple[Tensor, Tensor]:
    return mlp_batch(step, 4, 4, dtype=torch.float32)


def sequences(step: int) -> tuple[Tensor, Tensor]:
    x, y = mlp_batch(step, 12, 12, dtype=torch.float32)
    return x.view(-1, 3, 4), y.view(-1, 3, 4)


def words(step: int) -> tuple[Tensor, Tensor]:
    tokens, _ = mixed_batch(step)
    return tokens, functional.one_hot(tokens[:, 0], 7).float()


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, S, 4]`` to itself."""
        y: Tensor = self.attention(x, x, x)[0]
        return y


class Conv1D(nn.Module):
    """GPT-2's linear layer: not torch's, and its weight is transposed."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[.., d_in]`` to ``[.., d_out]``."""
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


def attention(prefix: str) -> set[str]:
    """What is captured of a stock attention with 4 features."""
    parts = {f"in_proj_{p}[{a}:{a + 4}]" for a in (0, 4, 8) for p in ("weight", "bias")}
    return {prefix + name for name in {*parts, "out_proj.weight", "out_proj.bias"}}


Build = Callable[[], nn.Module]
# network, batches, names of the captured parameters
MODULES: dict[str, tuple[Build, Callable[[int], Any], set[str]]] = {
    "tied embedding": (TiedHead, words, {"body.weight", "body.bias"}),
    "overridden forward": (
        lambda: nn.Sequential(Doubled(4, 4), nn.Linear(4, 4)),
        vectors,
        {"1.weight", "1.bias"},
    ),
    "subclass": (lambda: nn.Sequential(Kept(4, 4)), vectors, {"0.weight", "0.bias"}),
    "keyword call": (Named, vectors, {"linear.weight", "linear.bias"}),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
        ),
        vectors,
        {"1.weight", "1.bias"},
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
        vectors,
        set(),
    ),
    "container-owned": (
        Scaled,
        vectors,
        {"linear.weight", "linear.bias", "unowned_use.weight", "unowned_use.bias"},
    ),
    "GPT-2's Conv1D": (
        lambda: nn.Sequential(Conv1D(4, 4), nn.Linear(4, 4)),
        vectors,
        {"0.weight", "0.bias", "1.weight", "1.bias"},
    ),
    "attention": (SelfAttention, sequences, attention("attention.")),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        sequences,
        {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}
        | attention("self_attn."),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), 2
        ),
        sequences,
        {f"layers.{i}.linear{j}.{p}" for i in (0, 1) for j in (1, 2) for p in ("weight", "bias")}
        | attention("layers.0.self_attn.")
        | attention("layers.1.self_attn."),
    ),
    "non-dynamically quantizable linear": (
        lambda: nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)),
        vectors,
        {"0.weight", "0.bias"},
    ),
    "bilinear and norms": (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4), nn.PReLU()),
        vectors,
        set(),
    ),
    "no supported layer": (lambda: nn.Sequential(nn.LayerNorm(4)), vectors, set()),
    "one layer alone": (lambda: nn.Linear(4, 4), vectors, {"weight", "bias"}),
}


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("name", MODULES)
def test_kinds_of_modules(name: str, fallback: str) -> None:
    """The right ones are captured, and every parameter with a gradient moves."""
    build, batch, captured = MODULES[name]
    model = build()
    optimizer = Optimizer(model.parameters(), lr=0.01, fallback=fallback)
    before = weights(model)
    fit(model, optimizer, [batch(0)])
    found = {row.name for row in optimizer.report() if row.structure}
    assert found == captured
    for key, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p, before[key]) == (not p.grad.any()), key
            assert torch.isfinite(p).all()
    after = weights(model)
    fit(model, optimizer, [batch(step) for step in range(1, 4)])
    assert any(not torch.equal(p, after[key]) for key, p in weights(model).items())


def test_every_parameter_moves() -> None:
    """Norms, embedding, recurrence, attention and a free parameter, after one step."""
    torch.manual_seed(0)
    model = Mixed()
    before = weights(model)
    fit(model, Optimizer(model.parameters(), lr=0.01), [mixed_batch(0)], mixed_loss)
    moved = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == with_gradient
    assert moved >= set(before) - {"attention.in_proj_bias", "conv.bias"}


def test_reasons_are_reported() -> None:
    model, overridden = Mixed(), nn.Sequential(Doubled(4, 4))
    rows = {row.name: row.reason for row in Optimizer(model).report()}
    assert "MultiheadAttention" in rows["attention.out_proj.weight"]
    assert "LSTM" in rows["lstm.weight_ih_l0"]
    assert "LayerNorm" in rows["norm.weight"]
    assert "Mixed" in rows["position"]
    doubled = {row.name: row.reason for row in Optimizer(overridden).report()}
    assert "Doubled" in doubled["0.weight"]


def test_fallback_is_torch_adamw() -> None:
    """Parameters without a layer are trained exactly as ``torch.optim.AdamW`` does."""
    model, twin = nn.LayerNorm(4).double(), nn.LayerNorm(4).double()
    options = {"betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = Optimizer(model.parameters(), lr=0.01, weight_decay=0.1, fallback_options=options)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1, **options)
    batches = [mlp_batch(step, 4, 4) for step in range(5)]
    fit(model, optimizer, batches)
    fit(twin, adamw, batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fallback_is_torch_sgd(momentum: float) -> None:
    model, twin = nn.LayerNorm(4).double(), nn.LayerNorm(4).double()
    options = {"lr": 0.02, "momentum": momentum, "weight_decay": 0.1}
    optimizer = Optimizer(model.parameters(), fallback="sgd", fallback_options=options)
    sgd = torch.optim.SGD(twin.parameters(), **options)
    batches = [mlp_batch(step, 4, 4) for step in range(5)]
    fit(model, optimizer, batches)
    fit(twin, sgd, batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_fallback_options_are_followed_per_group() -> None:
    """A group may set its own fallback."""
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)).double()
    groups = [
        {"params": model[0].parameters(), "fallback": "sgd", "fallback_options": {"lr": 0.5}},
        {"params": model[1].parameters()},
    ]
    optimizer = Optimizer(groups, lr=0.01, momentum=0.0)
    x, y = mlp_batch(0, 4, 4)
    before = weights(model)
    fit(model, optimizer, [(x, y)])
    expected = before["0.weight"] - 0.5 * model[0].weight.grad
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-12, atol=1e-14)
    moved = (model[1].weight.detach() - before["1.weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)


# --- lazy modules, unused layers, moves ---------------------------------------------------------


@pytest.mark.parametrize("spelling", ["module", "parameters()", "list"])
def test_lazy_modules(spelling: str) -> None:
    """Built before their shape is known, captured from the first batch on."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyConv1d(4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))

    def spell(model: nn.Module) -> Any:
        spellings = {"module": model, "parameters()": model.parameters()}
        return spellings.get(spelling) or list(model.parameters())

    lazy, eager = build(), build()
    optimizer = Optimizer(spell(lazy), **FAST)
    x, y = torch.randn(6, 2, 5), torch.randn(6, 2)
    torch.manual_seed(1)
    lazy(x)
    torch.manual_seed(1)
    eager(x)
    other = Optimizer(eager.parameters(), **FAST)
    batches = [(x + step, y) for step in range(4)]
    fit(lazy, optimizer, batches)
    fit(eager, other, batches)
    assert_same_weights(lazy, eager)


def test_an_unused_layer_is_left_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)}).double()
    optimizer = Optimizer(model.parameters(), lr=0.1, weight_decay=0.1, T=1)
    before = weights(model)
    with pytest.warns(UserWarning, match="unused"):
        fit(model["used"], optimizer, [mlp_batch(step, 4, 2) for step in range(3)])
    after = weights(model)
    assert torch.equal(after["unused.weight"], before["unused.weight"])
    assert not torch.equal(after["used.weight"], before["used.weight"])
    fit(model["unused"], optimizer, [mlp_batch(step, 4, 2) for step in range(2)])
    assert not torch.equal(weights(model)["unused.weight"], before["unused.weight"])


class Sometimes(nn.Module):
    """A layer that takes part in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Skip the second layer in odd batches."""
        x = self.first(x)
        self.calls += 1
        return x if self.calls % 2 == 0 else torch.as_tensor(self.sometimes(torch.tanh(x)))


@pytest.mark.filterwarnings("ignore:No gradient reached")
@pytest.mark.parametrize("T", [1, 2])
def test_a_layer_that_missed_its_update_takes_it_next_time(T: int) -> None:
    """With ``T=2`` it never runs in a step that is due by the clock after the first."""
    model = Sometimes().double()
    model.calls = 1  # the first batch, due at step 0, leaves it out
    optimizer = Optimizer(model.parameters(), lr=0.01, T=T)
    fit(model, optimizer, [mlp_batch(step, 4, 4) for step in range(6)])
    assert int(optimizer.state[model.sometimes.weight]["last_update"]) == 5
    assert int(optimizer.state[model.first.weight]["last_update"]) == 6 - T


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_model_converted_after_construction(dtype: torch.dtype) -> None:
    """``.to(dtype)`` keeps the parameters; the optimizer follows before and after a step."""
    model = mlp(4, 5, 3, dtype=torch.float32)
    optimizer = Optimizer(model.parameters(), **FAST)
    model.to(dtype)
    before = weights(model)
    fit(model, optimizer, [mlp_batch(step, 4, 3, dtype=dtype) for step in range(4)])
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_closure_is_called_once_with_gradients() -> None:
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    optimizer, other = Optimizer(model.parameters(), **FAST), Optimizer(twin.parameters(), **FAST)
    x, y = mlp_batch(0, 3, 2)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = squares(model(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(float(optimizer.step(closure)))
    assert losses == fit(twin, other, [(x, y)] * 3)
    assert len(calls) == 3
    assert_same_weights(model, twin)


def test_step_without_backward_changes_nothing() -> None:
    model = mlp(3, 4, 2)
    optimizer = Optimizer(model.parameters())
    before = copy.deepcopy(model)
    optimizer.step()
    assert optimizer.step() is None
    assert_same_weights(model, before)
