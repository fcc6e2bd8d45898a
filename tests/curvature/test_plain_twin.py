"""Every reading of a second moment equals its plain twin, which torch.compile traces."""

from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.layer_cases import SPECIAL, random_layer, special_layer
from tnkfac.curvature.layers import Layer, describe
from tnkfac.curvature.moments import patches, rows, windows


def read_all(layer: Layer, x: Tensor, g: Tensor, approx: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for side, moment in zip(("input", "output"), layer.moments(x, g, approx), strict=True):
        blocks, last = moment.blocks(3)
        V = torch.arange(2.0 * moment.dim, dtype=x.dtype).cos().view(moment.dim, 2)
        first = min(2, moment.dim - 1)
        readings = {
            "dense": moment.dense(),
            "diagonal": moment.diagonal(),
            "blocks": blocks,
            "last block": last,
            "product": moment.product(V.expand(moment.groups, -1, -1)),
            "columns": moment.columns(first, 1),
        }
        found |= {f"{side}, {reading}": value for reading, value in readings.items()}
    return found


@pytest.mark.parametrize("case", [*range(60), *SPECIAL], ids=str)
def test_routes_equal_plain(case: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all samples are read at once, or as few of them as possible at a time."""
    module, x, *_ = random_layer(case) if isinstance(case, int) else special_layer(case)
    g = torch.randn_like(module(x))
    for approx in ("expand", "reduce"):
        found = read_all(describe(module), x, g, approx)
        with monkeypatch.context() as patch:
            for memory in (patches, rows, windows):
                patch.setattr(memory, "CHUNK", 1)
            in_parts = read_all(describe(module), x, g, approx)
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            expected = read_all(describe(module), x, g, approx)
        for reading, value in expected.items():
            for how, result in (("at once", found[reading]), ("in parts", in_parts[reading])):
                where = f"{approx}, {reading}, {how}"
                torch.testing.assert_close(
                    result, value, rtol=1e-11, atol=1e-12, msg=lambda m, w=where: f"{w}: {m}"
                )
