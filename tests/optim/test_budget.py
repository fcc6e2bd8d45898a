"""``max_state_ratio`` and ``max_step_ratio``: what ``"auto"`` chooses, and that it is kept."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.loops import assert_same_weights, fit, squares
from tnkfac import SINGD
from tnkfac.optim.params.auto_structure import candidates, ladder


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 160),
        nn.ReLU(),
        nn.Linear(160, 10),
    )


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 8, 8), torch.randn(size, 10)) for _ in range(count)]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that are kept: the state without what grafting adds, and squares."""
    held = [
        t
        for state in optimizer.state.values()
        for name, t in state.items()
        if t.ndim and name != "structures"
        if not (
            isinstance(optimizer, SINGD) and "momentum_buffer" in state and name == "exp_avg_sq"
        )
    ]
    if isinstance(optimizer, SINGD):
        held += [
            part
            for layer in optimizer._registry.layers
            for _, parts in layer.cached_products.values()
            for part in parts
        ]
    return sum(t.numel() * t.element_size() for t in held)


def structures(optimizer: SINGD) -> list[str]:
    return [row.structure for row in optimizer.report() if row.structure]


def adamw_bytes() -> int:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    fit(model, optimizer, batches(1))
    return state_bytes(optimizer)


def trained(count: int = 1, **options: Any) -> tuple[nn.Module, SINGD]:
    model = network()
    optimizer = SINGD(model.parameters(), lr=1e-3, **options)
    fit(model, optimizer, batches(count))
    return model, optimizer


@pytest.mark.parametrize("more", [{}, {"alpha1": 0.5}, {"grafting": "adam"}], ids=str)
@pytest.mark.parametrize("ratio", [0.7, 1.0, 1.2, 1.5, 2.0, 4.0])
def test_the_state_is_within_its_bound(ratio: float, more: dict[str, Any]) -> None:
    """Measured against AdamW's own state, and not by leaving room unused."""
    model, optimizer = trained(max_state_ratio=ratio, **more)
    bound = ratio * adamw_bytes()
    assert state_bytes(optimizer) <= bound
    _, free = trained(max_state_ratio=1e9, **more)
    if state_bytes(optimizer) < state_bytes(free):
        assert state_bytes(optimizer) > 0.5 * bound
    else:
        assert structures(optimizer) == structures(free)
    fit(model, optimizer, batches(3))


def test_a_larger_bound_never_means_a_smaller_state() -> None:
    sizes = [state_bytes(trained(max_state_ratio=r)[1]) for r in (0.6, 0.8, 1.0, 1.3, 1.7, 5.0)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 4


def test_a_bound_that_cannot_be_met_is_said() -> None:
    with pytest.warns(UserWarning, match=r"max_state_ratio: got 0\.1\. With the smallest"):
        _, optimizer = trained(max_state_ratio=0.1)
    assert set(structures(optimizer)) == {"diagonal, diagonal"}


@pytest.mark.parametrize("bound", ["max_state_ratio", "max_step_ratio"])
@pytest.mark.filterwarnings("ignore:max_state_ratio")
def test_structures_asked_for_by_name_stay(bound: str) -> None:
    bounds = {"max_state_ratio": None, bound: 1.0}
    _, optimizer = trained(2, structures=("dense", "auto"), **bounds)
    assert set(structures(optimizer)) == {"dense, diagonal"}


@pytest.mark.filterwarnings("error")
def test_the_step_is_within_its_bound() -> None:
    """Multiply-adds of all layers together, for the batch that was seen."""
    _, free = trained(2, max_state_ratio=1e9)
    previous = -1.0
    for ratio in (1.0, 1.3, 2.0, 4.0, 1e9):
        model, optimizer = trained(2, max_step_ratio=ratio, max_state_ratio=1e9)
        work, base = 0.0, 0.0
        for layer, rows in zip(optimizer._registry.layers, (8 * 64, 8 * 16, 8, 8), strict=True):
            shape, s = layer.statistics.layer, layer.statistics
            base += 3 * rows * shape.groups * s.k.dim * s.c.dim
            chosen = [c for c in candidates(shape, ("auto", "auto")) if c.k == s.k and c.c == s.c]
            work += chosen[0].work(rows, 10)
        assert work <= (ratio - 1) * base or set(structures(optimizer)) == {"diagonal, diagonal"}
        assert work >= previous
        previous = work
        assert all(row.last_update is not None for row in optimizer.report() if row.structure)
        fit(model, optimizer, batches(3))
    assert structures(optimizer) == structures(free)


@pytest.mark.parametrize("bound", [{"max_state_ratio": 1.2}, {"max_step_ratio": 1.5}], ids=str)
def test_a_run_goes_on_with_its_structures(bound: dict[str, float]) -> None:
    """Also where the next batch would have led to other ones."""
    model, optimizer = trained(3, T=2, **bound)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    again = SINGD(twin.parameters(), lr=1e-3, T=2, **bound)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert structures(again) == structures(optimizer)
    assert len(set(structures(optimizer))) > 1
    for data in (batches(2, size=64), batches(3)):
        fit(model, optimizer, data)
        fit(twin, again, data)
    assert_same_weights(twin, model)


@pytest.mark.parametrize("ratio", [0.8, 1.5, None])
def test_lazy_layers_are_bounded_once_their_size_is_known(ratio: float | None) -> None:
    """They may lose the first batch; then they have what layers of this size have."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 90), torch.randn(8, 4))] * 3
    lazy = nn.Sequential(nn.LazyLinear(80), nn.ReLU(), nn.Linear(80, 4))
    ready = nn.Sequential(nn.Linear(90, 80), nn.ReLU(), nn.Linear(80, 4))
    optimizers = [SINGD(model.parameters(), max_state_ratio=ratio) for model in (lazy, ready)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, optimizer in zip((lazy, ready), optimizers, strict=True):
            fit(model, optimizer, data, squares)
    assert structures(optimizers[0]) == structures(optimizers[1])
    assert all(row.last_update is not None for row in optimizers[0].report())


def test_layers_that_come_later_share_the_bound() -> None:
    """What the first ones have is counted."""
    torch.manual_seed(0)
    first, second = nn.Linear(100, 100), nn.Linear(100, 100)
    model = nn.Sequential(first, nn.ReLU(), second)
    optimizer = SINGD([first.weight, first.bias], max_state_ratio=1.0)
    data = [(torch.randn(8, 100), torch.randn(8, 100))] * 2
    fit(model, optimizer, data, squares)
    optimizer.param_groups[0]["params"] += [second.weight, second.bias]
    fit(model, optimizer, data, squares)
    assert len(structures(optimizer)) == 4
    adamw = 2 * 4 * sum(p.numel() for p in model.parameters())
    assert state_bytes(optimizer) <= adamw


def test_depthwise_layers_keep_little() -> None:
    """Dense factors of 50 rows a channel would be 50 times the weight."""
    model = nn.Sequential(nn.Conv2d(32, 32, 7, padding=3, groups=32), nn.Conv2d(32, 64, 1))
    optimizer = SINGD(model.parameters(), max_state_ratio=1e9)
    fit(model, optimizer, [(torch.randn(2, 32, 8, 8), torch.randn(2, 64, 8, 8))], squares)
    depthwise, pointwise = structures(optimizer)[::2]
    assert depthwise == "block8diagonal, dense"
    assert pointwise == "dense, dense"


def test_a_compiled_model_keeps_its_statistics() -> None:
    model = network()
    optimizer = SINGD(model.parameters(), lr=1e-3, max_step_ratio=1.5, T=1)
    compiled = torch.compile(model, backend="eager")
    for x, y in batches(3):
        optimizer.zero_grad()
        squares(compiled(x), y).backward()
        optimizer.step()
    assert {row.last_update for row in optimizer.report() if row.structure} == {2}


def test_a_ladder_goes_down() -> None:
    assert ladder("auto", 5) == ["dense", "diagonal"]
    assert ladder("auto", 64) == ["dense", "block32diagonal", "block8diagonal", "diagonal"]
    assert ladder("auto", 65)[0] == "block64diagonal"
    assert ladder("auto", 2000) == [*(f"block{rows}diagonal" for rows in (64, 32, 8)), "diagonal"]
    assert ladder("triltoeplitz", 200) == ["triltoeplitz"]


def test_without_a_bound_factors_are_larger() -> None:
    model = nn.Sequential(nn.Linear(200, 150), nn.Linear(150, 2000), nn.Linear(2000, 2))
    optimizer = SINGD(model.parameters(), max_state_ratio=None)
    assert structures(optimizer)[::2] == [
        "dense, block128diagonal",
        "dense, block128diagonal",
        "block128diagonal, dense",
    ]


def test_large_structures_are_warned_of() -> None:
    """Typing "dense" for a layer of 4,609 rows: the figure, and what to do."""
    model = nn.Sequential(nn.Conv2d(512, 8, 3), nn.Conv2d(8, 8, 1)).to("meta")
    with pytest.warns(UserWarning, match=r"0\.weight and 0 more they take 0\.2 GiB, 576 times"):
        SINGD(model.parameters(), structures="dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SINGD(model.parameters())
        SINGD(nn.Linear(1000, 10).parameters(), structures="dense")


def test_a_bound_on_the_step_holds_for_lazy_layers() -> None:
    """With a bound on the state beside it, as there is by default."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 300), torch.randn(8, 10))] * 3
    lazy = nn.Sequential(nn.LazyLinear(300), nn.ReLU(), nn.Linear(300, 10))
    ready = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))
    chosen = []
    for model in (lazy, ready):
        optimizer = SINGD(model.parameters(), max_step_ratio=1.01)
        fit(model, optimizer, data, squares)
        chosen.append(structures(optimizer))
    assert chosen[0] == chosen[1]
    assert "diagonal, diagonal" in chosen[0]


@pytest.mark.filterwarnings("error:max_state_ratio")
@pytest.mark.filterwarnings("ignore:structures")
def test_structures_given_by_name_are_no_matter_of_the_default_bound() -> None:
    """Nor do they push the other side down."""
    model = nn.Sequential(nn.Linear(2500, 2500)).to("meta")
    for given, expected in (
        ("dense", "dense, dense"),
        (("dense", "auto"), "dense, block64diagonal"),
        (("auto", "dense"), "block64diagonal, dense"),
    ):
        assert structures(SINGD(model.parameters(), structures=given))[0] == expected


@pytest.mark.filterwarnings("error:max_state_ratio")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_others_keep_is_no_matter_of_the_default_bound(dtype: torch.dtype) -> None:
    """A large embedding in half precision has moments in single precision."""
    layers = nn.Embedding(40000, 256), nn.Linear(256, 1024), nn.Linear(1024, 256)
    model = nn.Sequential(*layers).to("meta", dtype)
    assert structures(SINGD(model.parameters()))[0] == "block64diagonal, block64diagonal"


def test_groups_share_what_small_models_may_have() -> None:
    """A group for every layer has no more than one for all."""
    model = nn.Sequential(*(nn.Linear(70, 70) for _ in range(400))).to("meta")
    together = SINGD(model.parameters())
    apart = SINGD([{"params": list(layer.parameters())} for layer in model])
    assert structures(together)[0] != "block64diagonal, block64diagonal"
    totals = [
        sum(la.statistics.k.numel + la.statistics.c.numel for la in o._registry.layers)
        for o in (together, apart)
    ]
    assert totals[1] <= 1.1 * totals[0]
