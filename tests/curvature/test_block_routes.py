"""Routes of diagonal blocks, and products by convolutions: all of them exact."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from oracles.layer_cases import SPECIAL, random_layer, special_layer
from tnkfac.curvature.layers import Convolution, describe
from tnkfac.curvature.moments import patches
from tnkfac.curvature.moments.algorithms import Algorithm
from tnkfac.curvature.moments.blocks.lines import applies
from tnkfac.curvature.moments.products import convolved, syrk
from tnkfac.curvature.moments.rows import Pixels, Vectors
from tnkfac.curvature.moments.unfolding import Unfolding

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[tuple[int, int], ...], tuple[int, int]]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=["matrices", "convolutions"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways to multiply, in float64, and no more than one number at a time."""

    def pays(x: Tensor, dtype: torch.dtype, count: int, numbers: int) -> bool:
        return request.param == "convolutions" and count * numbers > 0

    for module in (convolved, syrk):
        monkeypatch.setattr(module, "pays", pays)
    monkeypatch.setattr(convolved, "TOGETHER", 64)
    monkeypatch.setattr(syrk, "COMPUTED", 64)
    monkeypatch.setattr(syrk, "HALVED", 16)
    return


def compare_blocks(fill: Callable[[Tensor, Tensor], None], dense: Tensor, size: int) -> None:
    """Blocks of so many rows against those of ``dense [G, D, D]``."""
    groups, dim, _ = dense.shape
    count, left = divmod(dim, size)
    blocks = dense.new_full((groups, count, size, size), float("nan"))
    last = dense.new_full((groups, left, left), float("nan"))
    fill(blocks, last)
    for at in range(count):
        inside = slice(at * size, (at + 1) * size)
        torch.testing.assert_close(blocks[:, at], dense[:, inside, inside], **EXACT)
    torch.testing.assert_close(last, dense[:, dim - left :, dim - left :], **EXACT)


@pytest.mark.parametrize("case", [*range(0, 120, 3), *SPECIAL], ids=str)
@pytest.mark.usefixtures("products")
def test_every_route_of_blocks_is_exact(case: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, *_ = random_layer(case) if isinstance(case, int) else special_layer(case)
    layer = describe(module)
    if not isinstance(layer, Convolution):
        return
    rows = layer.input_rows(layer.standard_input(x), None, x.dtype)
    u = rows.unfolded().flatten(1, 2)
    lines = (
        isinstance(rows, patches.Patches) and applies(rows.classes) and layer.groups == x.shape[-3]
    )
    for route in ("im2col", "slabs", "whole", *(["lines"] if lines else [])):
        found = (Algorithm(route, 0, 0, 0.0),)
        monkeypatch.setattr(patches, "block_algorithms", lambda *_, f=found: f)
        for size in {1, 2, 5, 8, rows.dim}:
            compare_blocks(rows.blocks, u.mT @ u, size)


LINES: dict[str, Geometry] = {
    "plain": ((7, 7), (1, 1), ((3, 3), (3, 3)), (1, 1)),
    "strided, one-sided padding": ((3, 5), (2, 3), ((0, 1), (2, 0)), (1, 1)),
    "dilated": ((5, 3), (1, 2), ((2, 2), (0, 0)), (2, 3)),
    "larger than the image": ((9, 9), (1, 1), ((4, 4), (4, 4)), (1, 1)),
    "one line": ((1, 6), (1, 1), ((0, 0), (5, 5)), (1, 1)),
    "one column": ((6, 1), (1, 1), ((5, 5), (0, 0)), (1, 1)),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("batch", [1, 3])
def test_lines_of_single_channels(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of all sizes, with a part of the channels at a time."""
    monkeypatch.setattr("tnkfac.curvature.moments.blocks.lines.TOGETHER", 800)
    found = (Algorithm("lines", 0, 0, 0.0),)
    monkeypatch.setattr(patches, "block_algorithms", lambda *_: found)
    kernel, stride, padding, dilation = LINES[name]
    unfolding = Unfolding(5, 5, kernel, stride, padding, dilation)
    x = torch.randn(batch, 5, 8, 9, dtype=torch.float64)
    rows = patches.Patches(x, x.dtype, unfolding, unfolding.output_size((8, 9)))
    u = rows.unfolded().flatten(1, 2)
    for size in (1, 3, 8, 17, rows.dim):
        compare_blocks(rows.blocks, u.mT @ u, size)


@pytest.mark.parametrize("count", [1, 3, 64, 131, 197, 256, 394])
@pytest.mark.parametrize("dim", [1, 16, 21, 40])
@pytest.mark.usefixtures("products")
def test_rows_and_pixels(count: int, dim: int) -> None:
    """Dense and blocks of what lies in memory, in both orders of channels and pixels."""
    x = torch.randn(count, dim, dtype=torch.float64)
    images = torch.randn(3, 2 * dim, count, dtype=torch.float64)
    last = images.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    u = images.view(3, 2, dim, count).permute(1, 2, 0, 3).flatten(2)
    for rows, dense in (
        (Vectors(x.unsqueeze(1), x.dtype), (x.T @ x).unsqueeze(0)),
        (Pixels(images, x.dtype, 2), u @ u.mT),
        (Pixels(last, x.dtype, 2), u @ u.mT),
    ):
        out = torch.full_like(dense, float("nan"))
        rows.dense(out)
        torch.testing.assert_close(out, dense, **EXACT)
        for size in (1, 8, 13):
            compare_blocks(rows.blocks, dense, size)


def test_float32_products_of_many_rows() -> None:
    """What oneDNN computes, where it is chosen."""
    x = torch.randn(4096, 1, 512)
    assert convolved.pays(x, x.dtype, len(x), 512 * 64)
    exact = x[:, 0].double().T @ x[:, 0].double()
    rows = Vectors(x, x.dtype)
    out, blocks, last = torch.empty(1, 512, 512), torch.empty(1, 8, 64, 64), torch.empty(1, 0, 0)
    rows.dense(out)
    rows.blocks(blocks, last)
    assert (out[0] - exact).norm() <= 1e-6 * exact.norm()
    for at in range(8):
        wanted = exact[at * 64 : at * 64 + 64, at * 64 : at * 64 + 64]
        assert (blocks[0, at] - wanted).norm() <= 1e-6 * wanted.norm()
