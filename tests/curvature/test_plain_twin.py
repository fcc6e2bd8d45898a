"""Every reading of a Gram matrix equals its plain twin, which torch.compile traces."""

import pytest
import torch

from oracles.layer_cases import SPECIAL, random_layer, special_layer
from tnkfac.curvature import describe
from tnkfac.curvature.moments.second_moment import Gram, gram_pair


def read_all(gram: Gram) -> dict[str, torch.Tensor]:
    blocks, last = gram.blocks(3)
    return {
        "dense": gram.dense(),
        "diagonal": gram.diagonal(),
        "blocks": blocks,
        "last block": last,
    }


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", [*range(60), *SPECIAL], ids=str)
def test_routes_equal_plain(case: int | str, approx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, *_ = random_layer(case) if isinstance(case, int) else special_layer(case)
    g = torch.randn_like(module(x))
    for gram in gram_pair(describe(module), x, g, approx):
        found = read_all(gram)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            expected = read_all(gram)
        for reading, value in expected.items():
            torch.testing.assert_close(
                found[reading], value, rtol=1e-11, atol=1e-12, msg=lambda m, r=reading: f"{r}: {m}"
            )
