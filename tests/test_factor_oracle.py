"""The oracles of the factors, checked against torch itself and against the definition of a GGN."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles.compare import assert_close
from oracles.factors import (
    canonical_output,
    canonical_weight,
    grad_factor,
    input_factor,
    restrict,
    unfold,
    unfolded_input,
)
from oracles.layer_cases import SPECIAL, LayerCase, random_layer, seed_id, special_layer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

SEEDS = range(140)


def assert_reproduces_output(case: LayerCase) -> None:
    """``W @ U`` is what the layer computes, and ``U`` has one trailing row of ones per bias."""
    module, x, _ = case
    unfolded = unfolded_input(module, x)
    expected = canonical_output(module, module(x))
    assert_close(canonical_weight(module) @ unfolded, expected, 1e-12)
    assert bool((unfolded[:, :, -1] == 1).all()) == (module.bias is not None)


@pytest.mark.parametrize("seed", SEEDS, ids=seed_id)
def test_matrix_product_reproduces_random_layers(seed: int) -> None:
    assert_reproduces_output(random_layer(seed))


@pytest.mark.parametrize("name", SPECIAL)
def test_matrix_product_reproduces_corner_cases(name: str) -> None:
    assert_reproduces_output(special_layer(name))


def test_output_size_replaces_output_padding() -> None:
    # Called with output_size, a transposed convolution ignores its own output_padding.
    module = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    expected = canonical_output(module, module(x, output_size=[5, 8]))
    assert_close(canonical_weight(module) @ unfolded_input(module, x, (0, 1)), expected, 1e-12)


@pytest.mark.parametrize("seed", range(28), ids=seed_id)
def test_gradients_of_weight_and_bias_are_products(seed: int) -> None:
    """``sum_n G U^T`` is the gradient of [W | b]: both layouts use the same positions."""
    module, x, _ = random_layer(seed)
    y = module(x)
    g = torch.randn_like(y)
    y.backward(g)
    result = torch.einsum("ngos,ngds->god", canonical_output(module, g), unfolded_input(module, x))
    # Read the gradients through the layout function itself: a layer whose weights are gradients.
    with torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    assert_close(result, canonical_weight(module), 1e-12)


@pytest.mark.parametrize("seed", range(14), ids=seed_id)
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_expand_is_exact_for_one_layer(seed: int, mean: bool) -> None:
    """``B (x) A`` is the GGN of every group for the sum, or mean, over samples of ``1/2 |y|^2``.

    The Hessian of that loss is the identity (over ``N`` for the mean), so its square root are the
    basis vectors of a sample's output; gradients of a mean loss carry ``1/N``, and ``R = N``.
    """
    module, x, _ = random_layer(seed)
    unfolded = unfolded_input(module, x)
    samples, shape = unfolded.shape[0], module(x).shape
    b = torch.zeros(())
    for entry in range(shape.numel() // samples):
        column = torch.zeros(samples, shape.numel() // samples, dtype=torch.float64)
        column[:, entry] = 1 / samples if mean else 1.0
        factor = grad_factor(module, column.reshape(shape), loss_terms=samples if mean else 1)
        assert isinstance(factor, Tensor)
        b = b + factor
    a = input_factor(module, x)
    assert isinstance(a, Tensor)
    ggn = torch.einsum("ngds,nges->gde", unfolded, unfolded) / (samples if mean else 1)
    identity = torch.eye(b.shape[1], dtype=torch.float64)
    for group in range(ggn.shape[0]):
        expected = torch.kron(identity, ggn[group])
        assert_close(torch.kron(b[group], a[group]), expected, 1e-12)


def test_grad_factor_counts_loss_terms() -> None:
    module, x, _ = special_layer("conv2d-groups2-out6")
    g = torch.randn_like(module(x))
    single = grad_factor(module, g, loss_terms=1)
    assert isinstance(single, Tensor)
    assert single.shape == (2, 3, 3)
    assert_close(grad_factor(module, g), 2 * single, 1e-15)  # the number of samples by default
    assert_close(grad_factor(module, g, loss_terms=24), 24 * single, 1e-15)


def test_linear_factors_by_hand() -> None:
    module, x, _ = special_layer("linear-3d")
    rows = torch.cat([x, torch.ones(3, 5, 1, dtype=torch.float64)], dim=2)
    expand = torch.einsum("nsi,nsj->ij", rows, rows) / 15
    assert_close(input_factor(module, x, "expand"), expand[None], 1e-14)
    mean = rows.mean(1)
    expected = mean.T @ mean / 3
    assert expected[-1, -1] == pytest.approx(1.0)  # averaged ones are ones
    assert_close(input_factor(module, x, "reduce"), expected[None], 1e-14)
    g = torch.randn_like(module(x))
    assert_close(grad_factor(module, g), 3 * torch.einsum("nsi,nsj->ij", g, g)[None], 1e-14)
    total = g.sum(1)
    assert_close(grad_factor(module, g, "reduce"), 3 * (total.T @ total)[None], 1e-14)


def test_conv_factor_by_unfold() -> None:
    module, x, _ = special_layer("conv2d-all-different")
    columns = F.unfold(x, (3, 2), dilation=(2, 1), padding=(2, 1), stride=(1, 2))
    columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)
    expected = torch.einsum("nds,nes->de", columns, columns) / (x.shape[0] * columns.shape[2])
    assert_close(input_factor(module, x), expected[None], 1e-14)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 9])
def test_restrict_keeps_entries(dim: int) -> None:
    matrix = torch.randn(2, dim, dim, dtype=torch.float64)
    assert restrict(matrix, "dense") is matrix
    assert_close(restrict(matrix, "diagonal"), matrix.diagonal(dim1=1, dim2=2), 0.0)
    blocks, rest = restrict(matrix, "block3diagonal")
    assert blocks.shape == (2, dim // 3, 3, 3)
    assert rest.shape == (2, dim % 3, dim % 3)
    rebuilt = torch.zeros_like(matrix)
    for i in range(dim // 3):
        rebuilt[:, 3 * i : 3 * i + 3, 3 * i : 3 * i + 3] = blocks[:, i]
    rebuilt[:, dim - dim % 3 :, dim - dim % 3 :] = rest
    owner = torch.arange(dim) // 3
    assert torch.equal(rebuilt, matrix * (owner[:, None] == owner[None, :]))


def test_unfold_has_any_number_of_axes() -> None:
    # Four spatial axes: the product of two independent two-dimensional unfolds of an outer product.
    left = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    right = torch.randn(2, 1, 3, 5, dtype=torch.float64)
    first = unfold(left, (2, 1), (1, 2), [(1, 0), (0, 1)], (2, 1))
    second = unfold(right, (3, 2), (2, 1), [(1, 1), (0, 2)], (1, 2))
    joint = unfold(
        torch.einsum("ncij,nckl->ncijkl", left, right),
        (2, 1, 3, 2),
        (1, 2, 2, 1),
        [(1, 0), (0, 1), (1, 1), (0, 2)],
        (2, 1, 1, 2),
    )
    expected = torch.einsum("ngks,nglt->ngklst", first, second).reshape(joint.shape)
    assert_close(joint, expected, 1e-14)


def test_random_layers_are_reproducible() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for seed in range(14):
        first, second = random_layer(seed), random_layer(seed)
        assert first.description == second.description
        assert torch.equal(first.x, second.x)
        assert_close(canonical_weight(first.module), canonical_weight(second.module), 0.0)
    assert torch.equal(before, torch.get_rng_state())


def features(case: LayerCase) -> set[str]:
    """Everything about a case that the seeds in use have to cover."""
    module, x, _ = case
    found = {type(module).__name__, f"bias {module.bias is not None}"}
    found.add("contiguous" if x.is_contiguous() else "not contiguous")
    if isinstance(module, nn.Linear):
        return found | {f"linear {x.ndim}-d"}
    transposed = "T" if "Transpose" in type(module).__name__ else ""
    found.add(f"unbatched{transposed} {x.ndim == len(module.kernel_size) + 1}")
    found |= {f"kernel{transposed} {k}" for k in module.kernel_size}
    found |= {f"stride{transposed} {s}" for s in module.stride}
    found |= {f"dilation{transposed} {d}" for d in module.dilation}
    found.add(f"mode {module.padding_mode}")
    string = isinstance(module.padding, str)
    found.add(f"padding{transposed} {module.padding if string else any(module.padding)}")
    if module.groups > 1:
        plain = module.in_channels > module.groups
        found.add(f"groups{transposed}" if plain else f"depthwise{transposed}")
    if transposed and any(module.output_padding):
        found.add("output padding")
    return found


def test_seeds_cover_the_grid() -> None:
    """The 70 seeds that the factor tests use draw every value of every hyper-parameter."""
    count = Counter(feature for seed in range(70) for feature in features(random_layer(seed)))
    expected = {f"{kind}{dims}d" for kind in ("Conv", "ConvTranspose") for dims in (1, 2, 3)}
    expected |= {"Linear", "bias True", "bias False", "contiguous", "not contiguous"}
    expected |= {f"linear {d}-d" for d in range(1, 5)} | {"output padding", "padding same"}
    for t in ("", "T"):
        expected |= {f"kernel{t} {k}" for k in range(1, 5)} | {f"stride{t} {s}" for s in (1, 2, 3)}
        expected |= {f"dilation{t} 1", f"dilation{t} 2", f"groups{t}", f"depthwise{t}"}
        expected |= {f"unbatched{t} True", f"unbatched{t} False", f"padding{t} True"}
        expected |= {f"padding{t} False"}
    expected |= {f"mode {mode}" for mode in ("zeros", "reflect", "replicate", "circular")}
    expected |= {"padding valid"}
    assert expected <= set(count), sorted(expected - set(count))
