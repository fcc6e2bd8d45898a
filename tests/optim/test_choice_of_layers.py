"""Which weights have curvature, which the fallback trains, and that the report says why."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oracles.loops import assert_same_weights, fit, mlp_batch
from oracles.variants import VARIANTS
from oracles.zoo import mlp
from tnkfac import KFAC, SINGD, KFACPreconditioner

each_variant = pytest.mark.parametrize("name", VARIANTS)


def reasons(optimizer: Any) -> dict[str, str]:
    return {row.name: row.reason for row in optimizer.report()}


def captured(optimizer: Any) -> set[str]:
    return {row.name for row in optimizer.report() if row.structure}


# --- tied weights -------------------------------------------------------------------------------


class Bigram(nn.Module):
    """Predicts the next word; the head has the weight of the embedding."""

    def __init__(self, assign: str = "head from embedding") -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if assign == "head from embedding":
            self.head.weight = self.embedding.weight
        elif assign == "embedding from head":
            self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(self.embedding(tokens))))
        return y


class Bag(Bigram):
    """With a bag of words in the place of the embedding, and a bias."""

    def __init__(self) -> None:
        super().__init__("not")
        self.embedding = nn.EmbeddingBag(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.view(-1, 1))


class TwoHeads(Bigram):
    """Two layers and an embedding with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 7, bias=False)
        self.second.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        y: Tensor = self.head(hidden) + self.second(hidden.square())
        return y


class Doubled(nn.Linear):
    """A layer of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, 2 * self.weight, self.bias)


class Own(Bigram):
    """Tied to a subclass with a ``forward`` of its own."""

    def __init__(self) -> None:
        super().__init__("not")
        self.own = Doubled(4, 7, bias=False)
        self.own.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        y: Tensor = self.head(hidden) + self.own(hidden)
        return y


class Projection(Bigram):
    """Tied to the projection that attention reads without calling it."""

    def __init__(self) -> None:
        super().__init__("not")
        self.attention = nn.MultiheadAttention(4, 2)
        self.body.weight = self.attention.out_proj.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.body(self.attention(x, x, x)[0])
        y: Tensor = self.head(x)
        return y


class Container(Bigram):
    """The container uses the weight of its layer once more."""

    def __init__(self) -> None:
        super().__init__("not")
        self.table = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(self.table[tokens])))
        return y


# network, the tied weight, its layer, and who else has it
TIED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "head from embedding": (Bigram, "head", "Embedding embedding and Linear head"),
    "embedding from head": (
        lambda: Bigram("embedding from head"),
        "head",
        "Embedding embedding and Linear head",
    ),
    "embedding bag": (Bag, "head", "EmbeddingBag embedding and Linear head"),
    "two heads": (TwoHeads, "head", "Embedding embedding and Linear head"),
    "forward of its own": (Own, "head", "mul"),
    "container": (Container, "head", "__getitem__"),
}
AT_CALLS = ("forward of its own", "container")
"""Where only the calls of a pass tell who else takes the weight."""


def words(step: int) -> tuple[Tensor, Tensor]:
    tokens = (torch.arange(12) * (step + 3) + step) % 7
    return tokens, (3 * tokens + 1) % 7


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return build().double()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    fit(model, optimizer, [words(step) for step in steps], functional.cross_entropy)


@each_variant
@pytest.mark.parametrize("case", TIED)
def test_a_tied_weight_is_stepped_as_by_adamw(case: str, name: str) -> None:
    build, layer, _ = TIED[case]
    model = made(build)
    weight = model.get_parameter(f"{layer}.weight")
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = VARIANTS[name](model.parameters(), **options)
    if case not in AT_CALLS:
        assert any("is shared by" in reason for reason in reasons(optimizer).values())
    twin = nn.Parameter(weight.detach().clone())
    adamw = torch.optim.AdamW([twin], **options)
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        assert weight.grad is not None
        twin.grad = weight.grad.clone()
        adamw.step()
        torch.testing.assert_close(weight, twin, rtol=1e-12, atol=1e-14)


@each_variant
@pytest.mark.parametrize("case", TIED)
def test_the_report_names_who_shares_a_weight(case: str, name: str) -> None:
    build, layer, both = TIED[case]
    model = made(build)
    optimizer = VARIANTS[name](model.parameters())
    if case in AT_CALLS:
        train(model, optimizer, range(1))
        expected = f"taken by products and by {both} (capture_tied is False)"
    else:
        expected = f"it is shared by {both} (capture_tied is False)"
    assert expected in reasons(optimizer).values()
    assert f"{layer}.weight" not in captured(optimizer)


@each_variant
def test_a_weight_that_two_products_take_is_captured(name: str) -> None:
    """By attention, which calls no module for it, and by a layer."""
    model = made(Projection)
    optimizer = VARIANTS[name](model.parameters())
    train(model, optimizer, range(1))
    assert reasons(optimizer)["body.weight"] == ""


@each_variant
@pytest.mark.parametrize("case", TIED)
def test_capture_tied_measures_at_the_layers(case: str, name: str) -> None:
    """The factors of the first batch are those of a twin whose layers share with nobody."""
    build, layer, _ = TIED[case]
    model = made(build)
    twin = deepcopy(model)
    tied = twin.get_parameter(f"{layer}.weight")
    alone = nn.Parameter(tied.detach().clone())
    for module in twin.modules():
        if type(module) is nn.Linear and module.weight is tied:
            module.weight = alone
    states = []
    for network in (model, twin):
        optimizer = VARIANTS[name](network.parameters(), capture_tied=True)
        train(network, optimizer, range(1))
        assert "no statistics yet" not in reasons(optimizer).values()
        states.append(optimizer.state[network.get_parameter(f"{layer}.weight")])
    factors = [key for key in states[0] if key[0] in "KCABQ"]
    assert factors
    for key in factors:
        torch.testing.assert_close(states[0][key], states[1][key])


@each_variant
def test_a_list_of_parameters_uses_nothing(name: str) -> None:
    """To keep a weight in a list, too, is not to use it."""
    model = mlp(3, 4, 2)
    model.kept = nn.ParameterList(model.parameters())
    optimizer = VARIANTS[name](model.parameters())
    assert len(captured(optimizer)) == len(optimizer.report())


@each_variant
def test_capture_tied_is_an_option_of_groups(name: str) -> None:
    model = made(lambda: nn.ModuleList([Bigram(), Bigram()]))
    groups = [{"params": list(m.parameters()), "capture_tied": i == 1} for i, m in enumerate(model)]
    found = captured(VARIANTS[name](groups))
    assert {n.split(".")[-2] for n in found if ".0." in n or n.startswith("0")} == {"body"}
    assert len(found) == 5


@pytest.mark.parametrize("capture_tied", [False, True])
def test_gradients_of_tied_weights_in_a_preconditioner(capture_tied: bool) -> None:
    model = made(Bigram)
    preconditioner = KFACPreconditioner(model, capture_tied=capture_tied)
    tokens, targets = words(0)
    functional.cross_entropy(model(tokens), targets).backward()
    before = {key: p.grad.clone() for key, p in model.named_parameters()}
    preconditioner.step()
    same = {key for key, p in model.named_parameters() if torch.equal(p.grad, before[key])}
    assert same == (set() if capture_tied else {"embedding.weight"})


def without_new_keys(saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as earlier versions wrote it."""
    groups = [{k: v for k, v in g.items() if k != "capture_tied"} for g in saved["param_groups"]]
    return {**saved, "param_groups": groups}


CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"capture_tied": True},
    "skipped": {"skip_layers": ("body",)},
}


@each_variant
@pytest.mark.parametrize("built", CHOICES)
@pytest.mark.parametrize("saved", [*CHOICES, "tied, of an earlier version"])
def test_a_checkpoint_brings_its_choice(saved: str, built: str, name: str) -> None:
    """Training goes on as if it had not stopped, whatever the new optimizer was built with."""
    model = made(Bigram)
    optimizer = VARIANTS[name](model.parameters(), lr=0.01, **CHOICES[saved.split(",")[0]])
    train(model, optimizer, range(3))
    second, state = deepcopy(model), optimizer.state_dict()
    if "earlier" in saved:
        state = without_new_keys(state)
    resumed = VARIANTS[name](second.parameters(), lr=0.01, **CHOICES[built])
    if "earlier" in saved and built == "skipped":
        state = {**state, "param_groups": [{**state["param_groups"][0], "skip_layers": ()}]}
    resumed.load_state_dict(state)
    assert captured(resumed) == captured(optimizer)
    train(model, optimizer, range(3, 7))
    train(second, resumed, range(3, 7))
    assert_same_weights(model, second)


# --- skip_layers --------------------------------------------------------------------------------

SKIPPED: dict[str, set[str]] = {
    "1": {"1.weight", "1.bias"},
    "1.weight": {"1.weight", "1.bias"},
    "1.bias": {"1.bias"},
    "Conv1d": {"0.0.weight", "0.0.bias"},
    "0": {"0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"},
    "0.2": {"0.2.weight", "0.2.bias"},
    "Linear": {"1.weight", "1.bias"},
    "0.2.bias": {"0.2.bias"},
}


def nested() -> nn.Module:
    torch.manual_seed(2)
    inner = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), nn.ConvTranspose1d(4, 3, 2), nn.Flatten())
    return nn.Sequential(inner, nn.Linear(12, 2)).double()


def signals(step: int) -> tuple[Tensor, Tensor]:
    x, y = mlp_batch(step, 6, 2)
    return x.view(-1, 2, 3), y


@each_variant
@pytest.mark.parametrize("skip", SKIPPED)
def test_skipped_parameters_are_stepped_as_by_adamw(skip: str, name: str) -> None:
    model = nested()
    options = {"lr": 0.02, "weight_decay": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = VARIANTS[name](model.parameters(), skip_layers=[skip], **options)
    everything = dict(model.named_parameters())
    assert captured(optimizer) == set(everything) - SKIPPED[skip]
    found = {n: reason for n, reason in reasons(optimizer).items() if n in SKIPPED[skip]}
    assert all(reason.endswith(f"skip_layers names {skip}") for reason in found.values())
    twins = {n: nn.Parameter(everything[n].detach().clone()) for n in SKIPPED[skip]}
    adamw = torch.optim.AdamW(twins.values(), **options)
    for step in range(4):
        fit(model, optimizer, [signals(step)])
        for n, twin in twins.items():
            twin.grad = everything[n].grad.clone()
        adamw.step()
        for n, twin in twins.items():
            torch.testing.assert_close(everything[n], twin, rtol=1e-12, atol=1e-14)


@each_variant
def test_skip_layers_is_an_option_of_groups(name: str) -> None:
    """Given to one group it is as given to the optimizer, and others do not mind."""
    first, second = nested(), nested()
    plain = VARIANTS[name](first.parameters(), skip_layers=("1",))
    groups = [
        {"params": list(second[0].parameters())},
        {"params": list(second[1].parameters()), "skip_layers": ["Linear"]},
    ]
    grouped = VARIANTS[name](groups)
    assert grouped.param_groups[1]["skip_layers"] == ("Linear",)
    for step in range(4):
        fit(first, plain, [signals(step)])
        fit(second, grouped, [signals(step)])
    assert_same_weights(first, second)


WRONG = {
    "a string": ({"skip_layers": "conv"}, "skip_layers: got 'conv'"),
    "numbers": ({"skip_layers": [3]}, r"skip_layers: got \[3\]"),
    "no flag": ({"capture_tied": "yes"}, "capture_tied: got 'yes'"),
}


@each_variant
@pytest.mark.parametrize("case", WRONG)
def test_wrong_choices(case: str, name: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(TypeError, match=message):
        VARIANTS[name](nested().parameters(), **options)
    with pytest.raises(TypeError, match=message):
        VARIANTS[name]([{"params": list(nested().parameters()), **options}])


def _frozen_half() -> nn.Module:
    model = nested()
    model[0].requires_grad_(False)
    return model


# what is built, the names that match nothing
UNKNOWN: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "misspelt": (lambda make: make(nested(), skip_layers=("1", "hed")), ("hed",)),
    "several": (
        lambda make: make(nested(), skip_layers=("hed", "Conv1", "Linear")),
        ("hed", "Conv1"),
    ),
    "without parameters": (lambda make: make(nested(), skip_layers=("Tanh",)), ("Tanh",)),
    "of another group": (
        lambda make: _in_groups(make, "1"),
        ("1",),
    ),
    "all known": (lambda make: make(nested(), skip_layers=("1.bias", "Conv1d", "0")), ()),
    "frozen": (lambda make: make(_frozen_half(), skip_layers=("0.2", "Conv1d")), ()),
}


def _in_groups(make: Callable[..., Any], skip: str) -> Any:
    model = nested()
    own = {"params": list(model[0].parameters()), "skip_layers": (skip, "0.0")}
    return make([own, {"params": list(model[1].parameters())}])


@each_variant
@pytest.mark.parametrize("case", UNKNOWN)
def test_names_that_match_nothing_are_warned_of_once(case: str, name: str) -> None:
    build, unknown = UNKNOWN[case]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = build(VARIANTS[name])
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "skip_layers": ()})
    told = [str(w.message) for w in caught if "skip_layers" in str(w.message)]
    assert len(told) == bool(unknown)
    for entry in unknown:
        assert repr(entry) in told[0]
    if told:
        assert told[0].count("'") == 2 * len(unknown)


def test_the_warning_points_at_the_caller() -> None:
    for build in (SINGD, KFAC, KFACPreconditioner):
        with pytest.warns(UserWarning, match="skip_layers: 'hed'") as caught:
            build(nested(), skip_layers=["hed"])
        assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [(["^0$"], set()), (["Sequential"], set()), (["0\\."], {"0.0", "0.2"}), (["Tanh"], set())],
    ids=lambda value: str(sorted(value)),
)
def test_patterns_find_layers_alone(patterns: list[str], skipped: set[str]) -> None:
    """As in kfac-pytorch, modules that contain others are no layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preconditioner = KFACPreconditioner(nested(), skip_layers=patterns)
    layers = {n.rpartition(".")[0] for n in captured(preconditioner)}
    assert layers == {"0.0", "0.2", "1"} - skipped


# --- frozen parameters --------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen layer with a trained low-rank one beside it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3, bias=bias).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def lora() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(LoRA(), nn.LayerNorm(3), LoRA(False), nn.Linear(3, 2)).double()


@each_variant
def test_the_report_follows_freezing(name: str) -> None:
    model = lora()
    frozen = {"0.base.weight", "0.base.bias", "2.base.weight"}
    optimizer = VARIANTS[name](model.parameters(), lr=0.01)
    assert {n for n, reason in reasons(optimizer).items() if reason == "frozen"} == frozen
    fit(model, optimizer, [mlp_batch(step, 3, 2) for step in range(3)])
    assert {n for n, reason in reasons(optimizer).items() if reason == "frozen"} == frozen
    assert "no statistics yet" not in reasons(optimizer).values()
    model.requires_grad_(True)
    found = reasons(optimizer)
    assert found["0.base.weight"] == found["2.base.weight"] == "no statistics yet"
    assert found["0.base.bias"] == "its weight was frozen when the optimizer was built"
    fit(model, optimizer, [mlp_batch(step, 3, 2) for step in range(3, 6)])
    rows = {row.name: row for row in optimizer.report()}
    for n in ("0.base.weight", "2.base.weight"):
        assert rows[n].reason == ""
        assert rows[n].last_update >= 3
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    found = reasons(optimizer)
    names = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n for n, reason in found.items() if reason == "frozen"} == names
    assert found["1.bias"] == "LayerNorm is not a supported layer"


# --- reasons ------------------------------------------------------------------------------------


class Mine(nn.Module):
    """A layer of another package that is called like one of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))


Linear = type("Linear", (Mine,), {})


class Gained(nn.Linear):
    """A stock layer with one more parameter."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.gain = nn.Parameter(torch.ones(3))


def _shared(first: nn.Module, second: nn.Module) -> nn.Module:
    second.weight = first.weight
    return nn.ModuleList([first, second])


def _removed(module: nn.Linear) -> Any:
    return [module.bias], module


def _pruned(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight[:2].detach())
    return layer


def _frozen(attribute: str) -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.get_parameter(attribute).requires_grad_(False)
    return layer


# network (or parameters and what keeps them alive), reasons
COMPUTED = "the weight that its layer uses is computed of it (a parametrization)"
REASONS: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "captured": (
        lambda: nn.Linear(3, 3),
        {"weight": "no statistics yet", "bias": "no statistics yet"},
    ),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        dict.fromkeys(
            [
                "out_proj.weight",
                "out_proj.bias",
                *(f"in_proj_{p}[{a}:{a + 4}]" for a in (0, 4, 8) for p in ("weight", "bias")),
            ],
            "no statistics yet: promised by its MultiheadAttention",
        ),
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        {
            "bias": "its weight is not a parameter",
            "parametrizations.weight.original0": COMPUTED,
            "parametrizations.weight.original1": COMPUTED,
        },
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(3, 3, 1, bias=False)),
        {"parametrizations.weight.original": COMPUTED},
    ),
    "weight norm of old": (
        lambda: nn.utils.weight_norm(nn.Linear(3, 3)),
        {
            "bias": "its weight is not a parameter",
            "weight_g": "it is the weight_g of Linear",
            "weight_v": "it is the weight_v of Linear",
        },
    ),
    "recurrent": (
        lambda: nn.LSTM(3, 3, bias=False),
        {
            "weight_ih_l0": "LSTM is not a supported layer",
            "weight_hh_l0": "LSTM is not a supported layer",
        },
    ),
    "forward of its own": (
        lambda: Doubled(3, 3),
        dict.fromkeys(("weight", "bias"), "no statistics yet: promised by its Doubled"),
    ),
    "foreign, of the same name": (
        Linear,
        {"weight": "Linear is not a supported layer", "bias": "Linear is not a supported layer"},
    ),
    "one parameter more": (
        Gained,
        {
            "weight": "no statistics yet",
            "bias": "no statistics yet",
            "gain": "it is the gain of Gained",
        },
    ),
    "frozen": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3, bias=False)).requires_grad_(False),
        {"0.weight": "frozen", "0.bias": "frozen", "1.weight": "frozen"},
    ),
    "weight frozen": (
        lambda: _frozen("weight"),
        {"weight": "frozen", "bias": "its weight was frozen when the optimizer was built"},
    ),
    "bias frozen": (
        lambda: _frozen("bias"),
        {"weight": "no statistics yet", "bias": "frozen"},
    ),
    "tied to an embedding": (
        lambda: _shared(nn.Embedding(3, 3), nn.Linear(3, 3)),
        {
            "0.weight": "it is shared by Embedding 0 and Linear 1 (capture_tied is False)",
            "1.bias": "its weight is not captured: it is shared by Embedding 0 and Linear 1 "
            "(capture_tied is False)",
        },
    ),
    "tied to a layer of another kind": (
        lambda: _shared(nn.Linear(3, 3, bias=False), nn.Conv1d(3, 3, 1, bias=False)),
        {"0.weight": "layers of different kinds share it"},
    ),
    "of another shape": (
        lambda: _pruned(nn.Linear(3, 3)),
        {
            "weight": "its shape (2, 3) is not that of the layer",
            "bias": "its weight is not captured: its shape (2, 3) is not that of the layer",
        },
    ),
    "tied to a transposed layer": (
        lambda: _shared(nn.Conv1d(3, 3, 1, bias=False), nn.ConvTranspose1d(3, 3, 1, bias=False)),
        {"0.weight": "layers of different kinds share it"},
    ),
    "tied, with another bias": (
        lambda: _shared(nn.Linear(3, 3), nn.Linear(3, 3)),
        {
            "0.weight": "no statistics yet",
            "0.bias": "its weight is shared by layers with other biases",
            "1.bias": "its weight is shared by layers with other biases",
        },
    ),
    "tied, one without bias": (
        lambda: _shared(nn.Linear(3, 3, bias=False), nn.Linear(3, 3)),
        {
            "0.weight": "no statistics yet",
            "1.bias": "its weight is shared by layers with other biases",
        },
    ),
    "container-owned": (
        lambda: nn.ParameterList([torch.zeros(3)]),
        {"0": "ParameterList is not a supported layer"},
    ),
    "complex": (
        lambda: nn.Linear(3, 3, dtype=torch.complex64),
        {
            "weight": "torch.complex64 is not supported",
            "bias": "its weight is not captured: torch.complex64 is not supported",
        },
    ),
    "no entries": (
        lambda: nn.Linear(0, 3),
        {
            "weight": "it has no entries",
            "bias": "its weight is not captured: it has no entries",
        },
    ),
    "weight in no group": (
        lambda: _removed(nn.Linear(3, 3)),
        {"bias": "its weight is in no parameter group"},
    ),
    "no module": (
        lambda: ([nn.Parameter(torch.zeros(3))], None),
        {"param_0": "no module that owns it was found"},
    ),
}


@each_variant
@pytest.mark.parametrize("case", REASONS)
@pytest.mark.filterwarnings("ignore:Initializing zero", "ignore::FutureWarning")
def test_reasons(case: str, name: str) -> None:
    build, expected = REASONS[case]
    built = build()
    params = built[0] if isinstance(built, tuple) else built.parameters()
    assert reasons(VARIANTS[name](params)) == expected


# --- groups that come later ---------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("first", ["weight", "bias"])
def test_weight_and_bias_one_after_the_other(first: str, fallback: str, name: str) -> None:
    """Both train on, and the reasons stay true."""
    model = nested()
    last = model[1]
    second = last.bias if first == "weight" else last.weight
    start = [p for p in model.parameters() if p is not second]
    optimizer = VARIANTS[name](start, fallback=fallback, lr=0.01)
    fit(model, optimizer, [signals(step) for step in range(2)])
    optimizer.add_param_group({"params": [second]})
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, optimizer, [signals(step) for step in range(2, 5)])
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    found = reasons(optimizer)
    assert found["1.weight"] == ""
    if first == "weight":
        assert found["1.bias"] == "it was added after its weight"
    elif fallback == "adamw":
        assert "begun" in found["1.bias"]


@each_variant
def test_reasons_outlast_another_group(name: str) -> None:
    model = lora()
    optimizer = VARIANTS[name](model.parameters())
    before = reasons(optimizer)
    more = nn.Linear(2, 2)
    optimizer.add_param_group({"params": list(more.parameters())})
    after = reasons(optimizer)
    assert {
        n.removeprefix("Sequential."): after[n] for n in after if "Linear." not in n
    }.items() >= (before.items())


class AddedLater(nn.Linear):
    """A layer that adds its bias to the product, as Falcon does."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight) + self.bias


class Helped(nn.Module):
    """A model that hands a module to a function."""

    def __init__(self, help_):
        super().__init__()
        self.inner, self.help = nn.Linear(4, 5), help_

    def forward(self, x):
        return self.help(self.inner, x)


def with_bias(module, x):
    return nn.functional.linear(x, module.weight, module.bias)


def bias_later(module, x):
    return x @ module.weight.T + module.bias


@pytest.mark.parametrize(
    ("first", "joint"),
    [
        (lambda: AddedLater(4, 5), False),
        (lambda: Helped(with_bias), True),
        (lambda: Helped(bias_later), False),
    ],
    ids=["bias added later", "a function takes the layer", "a function that adds the bias"],
)
@pytest.mark.filterwarnings("ignore:No statistics reached")
def test_all_parameters_are_trained_however_layers_are_used(first, joint):
    torch.manual_seed(0)
    model = nn.Sequential(first(), nn.Tanh(), nn.Linear(5, 2))
    optimizer = SINGD(model.parameters(), lr=0.01, T=1)
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
    rows = {row.name: row for row in optimizer.report()}
    assert rows.keys() == before.keys()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    weight, bias = (
        next(n for n in rows if n.startswith("0.") and n.endswith(e)) for e in ("weight", "bias")
    )
    assert rows[weight].last_update == 2
    assert (rows[bias].last_update == 2) is joint
