"""What is reported of the curvature, against decompositions of dense matrices."""

from typing import Any

import pytest
import torch
from torch import nn

from oracles.loops import fit
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights
from tnkfac import KFAC, SINGD

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SINGD": (SINGD, {}),
    "SINGD diagonal": (SINGD, {"structures": "diagonal"}),
    "SINGD blocks": (SINGD, {"structures": "block3diagonal"}),
    "SINGD Toeplitz": (SINGD, {"structures": "triltoeplitz"}),
    "SINGD hierarchical": (SINGD, {"structures": "hierarchical2_1"}),
    "KFAC": (KFAC, {"damping": 0.1, "kl_clip": None}),
    "KFAC relative": (KFAC, {}),
    "KFAC Cholesky": (KFAC, {"damping": 0.1, "kl_clip": None, "compute_method": "cholesky"}),
}


def trained(name: str) -> tuple[nn.Module, Any]:
    cls, options = CASES[name]
    model = fixed_weights(AllLayers())
    optimizer = cls(model.parameters(), lr=0.01, **options)
    fit(model, optimizer, [all_layers_batch(seed) for seed in range(3)])
    return model, optimizer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CASES)
def test_spectra_are_those_of_dense_factors(name: str) -> None:
    """Of all channel groups together; damping is split over both factors."""
    _, optimizer = trained(name)
    found = optimizer.diagnostics()
    assert [row.name for row in found] == [la.name for la in optimizer._registry.layers]
    for row, layer in zip(found, optimizer._registry.layers, strict=True):
        own, state = layer.statistics, optimizer.state[layer.weight]
        dense = []
        for structure, key in ((own.k, "KA"), (own.c, "CB")):
            name_of = key[0] if name.startswith("SINGD") else key[1]
            parts = [state[k] for k in sorted(state) if k.split(".")[0] == name_of]
            matrix = structure.to_dense(tuple(parts))
            if name.startswith("SINGD"):
                dense.append(torch.linalg.inv(matrix @ matrix.mT))
            else:
                dense.append(matrix / state["factor_weight"])
        values = [torch.linalg.eigvalsh(m).flatten() for m in dense]
        if name.startswith("KFAC"):
            level = [float(v.mean()) for v in values]
            relative = optimizer.param_groups[0]["relative_damping"] * level[0] * level[1]
            damping = 0.1 if "relative" not in name else relative
            ratio = (level[0] / level[1]) ** 0.5
            values = [values[0] + damping**0.5 * ratio, values[1] + damping**0.5 / ratio]
        for spectrum, expected in zip(found.spectra[row.name], values, strict=True):
            expected = expected.sort(descending=True).values
            torch.testing.assert_close(spectrum, expected, rtol=1e-6, atol=1e-9)
        for condition, expected in zip(
            (row.condition_input, row.condition_output), values, strict=True
        ):
            assert condition == pytest.approx(float(expected.max() / expected.min()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", ["SINGD", "KFAC"])
def test_sizes_of_updates_are_those_of_the_last_step(name: str) -> None:
    model, optimizer = trained(name)
    before = {layer.name: layer.weight.detach().clone() for layer in optimizer._registry.layers}
    fit(model, optimizer, [all_layers_batch(9)])
    for row, layer in zip(optimizer.diagnostics(), optimizer._registry.layers, strict=True):
        moved = (layer.weight.detach() - before[layer.name]).square().mean().sqrt()
        assert row.update_rms == pytest.approx(float(moved), rel=1e-6)


def test_before_the_first_step_nothing_is_known() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = SINGD(model.parameters())
    (row,) = optimizer.diagnostics()
    assert (row.condition_input, row.condition_output, row.update_rms) == (None, None, None)
    assert str(optimizer.diagnostics()).splitlines()[-1].split() == ["0", "-", "-", "-"]


def test_everything_is_written_for_tensorboard() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = KFAC(model.parameters(), kl_clip=1e-3, damping=0.1)
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    written: dict[str, float] = {}

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            assert step == 7
            written[tag] = value

    found = optimizer.diagnostics()
    found.write(Writer(), 7)
    assert written["curvature/0/condition_input"] == found[0].condition_input
    assert written["curvature/trust_region"] == found.trust_region
    assert written["curvature/skipped_updates"] == 0
    assert len(written) == 5
