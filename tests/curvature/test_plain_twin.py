"""Every reading of a second moment equals its plain twin, which torch.compile traces."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles.factors import input_factor
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


@pytest.mark.parametrize("extra", [(0, 0), (1, 2), (2, 1)], ids=str)
def test_an_output_size_that_was_asked_for(extra: tuple[int, int]) -> None:
    """It may be another than that of the layer's own ``output_padding``."""
    module = nn.ConvTranspose2d(2, 3, 3, stride=3, padding=1, output_padding=(1, 0)).double()
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    g = torch.randn_like(module(x, output_size=[10 + extra[0], 13 + extra[1]]))
    dense = input_factor(module, x, output_padding=extra)
    assert isinstance(dense, Tensor)
    found = read_all(describe(module), x, g, "expand")
    dense = dense * g[:, 0].numel()
    V = torch.arange(2.0 * len(dense[0]), dtype=x.dtype).cos().view(-1, 2)
    torch.testing.assert_close(found["input, dense"], dense, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found["input, product"], dense @ V, rtol=1e-11, atol=1e-11)
