"""Planned readings of a Gram matrix equal their plain twins, which torch.compile traces."""

import pytest
import torch

from oracles.layer_cases import SPECIAL, random_layer, special_layer
from tnkfac.curvature import describe
from tnkfac.curvature.grams import gram_pair


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", [*range(28), *SPECIAL], ids=str)
def test_planned_equals_plain(case: int | str, approx: str) -> None:
    module, x, *_ = random_layer(case) if isinstance(case, int) else special_layer(case)
    g = torch.randn_like(module(x))
    for gram in gram_pair(describe(module), x, g, approx):
        for reading in ("dense", "diagonal", "rows", "sum"):
            torch.testing.assert_close(
                gram._read(reading), gram._read_plainly(reading), rtol=1e-11, atol=1e-12
            )
