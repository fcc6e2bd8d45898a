"""`tnkfac.curvature.input_factor` and `grad_factor` against brute force over all layers."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles import factors as oracle
from oracles.compare import Result, assert_close
from oracles.layer_cases import SPECIAL, LayerCase, random_layer, seed_id, special_layer
from tnkfac.curvature import grad_factor, input_factor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

SEEDS = range(70)  # ten of each layer type
APPROXIMATIONS = ("expand", "reduce")
STRUCTURES = ("dense", "diagonal", "block3diagonal")
TOLERANCE = 1e-11

Factor = Callable[..., Result]

each_approx = pytest.mark.parametrize("approx", APPROXIMATIONS)
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def output_gradient(case: LayerCase) -> Tensor:
    """A seeded gradient in the shape and memory format of the layer's output."""
    with torch.no_grad():
        return torch.randn_like(case.module(case.x))


def check_input_factor(case: LayerCase, approx: str, structure: str) -> None:
    expected = oracle.input_factor(case.module, case.x, approx, structure)
    assert_close(input_factor(case.module, case.x, approx, structure), expected, TOLERANCE)


def check_grad_factor(case: LayerCase, approx: str, structure: str) -> None:
    g = output_gradient(case)
    expected = oracle.grad_factor(case.module, g, approx, structure)
    assert_close(grad_factor(case.module, g, approx, structure), expected, TOLERANCE)


# --- all layers ---------------------------------------------------------------------------------


@each_structure
@each_approx
@pytest.mark.parametrize("seed", SEEDS, ids=seed_id)
def test_input_factor_of_random_layers(seed: int, approx: str, structure: str) -> None:
    check_input_factor(random_layer(seed), approx, structure)


@each_structure
@each_approx
@pytest.mark.parametrize("name", SPECIAL)
def test_input_factor_of_corner_cases(name: str, approx: str, structure: str) -> None:
    check_input_factor(special_layer(name), approx, structure)


@each_structure
@each_approx
@pytest.mark.parametrize("seed", SEEDS, ids=seed_id)
def test_grad_factor_of_random_layers(seed: int, approx: str, structure: str) -> None:
    check_grad_factor(random_layer(seed), approx, structure)


@each_structure
@each_approx
@pytest.mark.parametrize("name", SPECIAL)
def test_grad_factor_of_corner_cases(name: str, approx: str, structure: str) -> None:
    check_grad_factor(special_layer(name), approx, structure)


# --- arguments ----------------------------------------------------------------------------------

# One layer per type that has its own way through the code.
PLAIN = ("linear-3d", "conv2d-plain-3x3", "conv2d-k3-stride2", "conv2d-dense", "convT2d-k4-stride2")
each_plain = pytest.mark.parametrize("name", PLAIN)


@each_plain
def test_defaults_are_expand_and_dense(name: str) -> None:
    case = special_layer(name)
    g = output_gradient(case)
    assert_close(input_factor(case.module, case.x), oracle.input_factor(case.module, case.x), 1e-11)
    assert_close(grad_factor(case.module, g), oracle.grad_factor(case.module, g), TOLERANCE)


@each_structure
@each_plain
@pytest.mark.parametrize("loss_terms", [1, 2.5])
def test_loss_terms_scale_the_grad_factor(name: str, structure: str, loss_terms: float) -> None:
    case = special_layer(name)
    g = output_gradient(case)
    expected = oracle.grad_factor(case.module, g, "expand", structure, loss_terms)
    result = grad_factor(case.module, g, "expand", structure, loss_terms=loss_terms)
    assert_close(result, expected, TOLERANCE)


@each_plain
@each_approx
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_blocks_of_any_size(name: str, approx: str, size: int) -> None:
    # Blocks of one entry; of two and four with and without rest; larger than the factor, which
    # then is all rest.
    check_input_factor(special_layer(name), approx, f"block{size}diagonal")
    check_grad_factor(special_layer(name), approx, f"block{size}diagonal")


@each_approx
@each_plain
def test_expanded_gradient(name: str, approx: str) -> None:
    """The gradient of ``output.sum()``: one number, seen through strides of zero."""
    case = special_layer(name)
    g = torch.ones((), dtype=torch.float64).expand(case.module(case.x).shape)
    expected = oracle.grad_factor(case.module, g, approx)
    assert_close(grad_factor(case.module, g, approx), expected, TOLERANCE)


@each_structure
@each_approx
@each_plain
def test_arguments_are_left_alone(name: str, approx: str, structure: str) -> None:
    """No argument is changed, nothing records a graph, and results own their memory."""
    case = special_layer(name)
    x, g = case.x.clone().requires_grad_(), output_gradient(case)
    kept = g.clone()
    results: list[Result] = [
        input_factor(case.module, x, approx, structure),
        grad_factor(case.module, g, approx, structure),
    ]
    assert torch.equal(x, case.x)
    assert torch.equal(g, kept)
    for result in results:
        for part in (result,) if isinstance(result, Tensor) else result:
            assert not part.requires_grad
            assert part.numel() == 0 or part.data_ptr() not in (x.data_ptr(), g.data_ptr())


@each_approx
@each_plain
def test_second_shape_of_the_same_layer(name: str, approx: str) -> None:
    """A smaller last batch, then the first shape again: nothing remembers the shape before."""
    module, x, description = special_layer(name)
    for samples in (slice(None), slice(1), slice(None)):
        check_input_factor(LayerCase(module, x[samples], description), approx, "dense")
        check_grad_factor(LayerCase(module, x[samples], description), approx, "dense")


@each_approx
def test_changed_hyper_parameters_are_seen(approx: str) -> None:
    """Two layers that differ in one hyper-parameter only do not share what is cached."""
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    for change in ({}, {"stride": 2}, {"padding": 2}, {"dilation": 2}, {"bias": False}):
        options = {"padding": 1} | change
        module = nn.Conv2d(2, 2, 3, **options).double()
        check_input_factor(LayerCase(module, x, str(change)), approx, "dense")
    for mode in ("zeros", "reflect", "replicate", "circular"):
        module = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode).double()
        check_input_factor(LayerCase(module, x, mode), approx, "dense")


# --- dtypes -------------------------------------------------------------------------------------

DTYPES = ("linear-3d", "conv2d-plain-3x3", "conv2d-all-different", "conv2d-dense", "conv3d-reflect")
DTYPES += ("conv2d-groups2-out6", "convT2d-k3-stride2-output-padding", "convT3d-all-different")


def check_dtype(
    case: LayerCase, dtype: torch.dtype, approx: str, structure: str, tol: float
) -> None:
    """Input and gradient are rounded to ``dtype``; factors are float32 and as exact as ``tol``."""
    g = output_gradient(case).to(dtype)
    module, x = case.module.to(dtype), case.x.to(dtype)
    results: list[tuple[Result, Result]] = [
        (
            input_factor(module, x, approx, structure),
            oracle.input_factor(module, x, approx, structure),
        ),
        (
            grad_factor(module, g, approx, structure),
            oracle.grad_factor(module, g, approx, structure),
        ),
    ]
    for result, expected in results:
        assert_close(result, expected, tol)
        for part in (result,) if isinstance(result, Tensor) else result:
            assert part.dtype == torch.float32


@each_structure
@each_approx
@pytest.mark.parametrize("name", DTYPES)
def test_float32_stays_float32(name: str, approx: str, structure: str) -> None:
    check_dtype(special_layer(name), torch.float32, approx, structure, 1e-4)


@each_structure
@each_approx
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_accumulates_in_float32(
    name: str, approx: str, structure: str, dtype: torch.dtype
) -> None:
    check_dtype(special_layer(name), dtype, approx, structure, 1e-5)


@each_structure
@each_approx
@pytest.mark.parametrize("name", PLAIN)
def test_half_precision_input_of_a_float32_layer(name: str, approx: str, structure: str) -> None:
    """Under autocast: weights in float32, an input and an output gradient in bfloat16."""
    module, x, _ = special_layer(name)
    module, x = module.float(), x.bfloat16()
    result = input_factor(module, x, approx, structure)
    assert_close(result, oracle.input_factor(module, x, approx, structure), 1e-5)
    for part in (result,) if isinstance(result, Tensor) else result:
        assert part.dtype == torch.float32


@each_approx
def test_float16_neither_overflows_nor_underflows(approx: str) -> None:
    """Squares and sums beyond the range of float16 (6e4 above, 6e-8 below)."""
    module = nn.Conv2d(2, 3, 3, padding=1).half()
    x = torch.full((4, 2, 6, 6), 300.0, dtype=torch.float16)
    assert_close(input_factor(module, x, approx), oracle.input_factor(module, x, approx), 1e-5)
    g = torch.full((4, 3, 6, 6), 1e-5, dtype=torch.float16)
    assert_close(grad_factor(module, g, approx), oracle.grad_factor(module, g, approx), 1e-5)


@each_approx
def test_large_mean_in_float32(approx: str) -> None:
    """Non-centred input: differences of sums (prefix sums, border strips) must not cancel."""
    module = nn.Conv2d(3, 2, 3, padding=1, stride=2)
    x = 100 + torch.randn(4, 3, 17, 16)
    assert_close(input_factor(module, x, approx), oracle.input_factor(module, x, approx), 1e-5)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [input_factor, grad_factor], ids=lambda f: f.__name__)
@pytest.mark.parametrize("approx", ["expnd", "EXPAND", "", None])
def test_unknown_approx(function: Factor, approx: str | None) -> None:
    with pytest.raises((ValueError, TypeError), match="approx") as error:
        function(nn.Linear(4, 4), torch.randn(2, 4), approx)
    for words in (repr(approx), "expand", "reduce"):
        assert words in str(error.value)


@pytest.mark.parametrize("function", [input_factor, grad_factor], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "structure",
    [
        "dens",
        "blockdiagonal",  # no size
        "block0diagonal",  # no rows
        "block-3diagonal",
        "block3.5diagonal",
        "block3diagonals",  # trailing letters
        None,
    ],
)
def test_unknown_structure(function: Factor, structure: str | None) -> None:
    with pytest.raises((ValueError, TypeError), match="structure") as error:
        function(nn.Linear(4, 4), torch.randn(2, 4), "expand", structure)
    for words in (repr(structure), "dense", "diagonal", "block"):
        assert words in str(error.value)


@pytest.mark.parametrize("function", [input_factor, grad_factor], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4),
        nn.Embedding(4, 4, sparse=True),
        nn.Bilinear(4, 4, 4),
        nn.Sequential(nn.Linear(4, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_unknown_module(function: Factor, module: nn.Module) -> None:
    with pytest.raises((ValueError, TypeError), match="module") as error:
        function(module, torch.randn(2, 4))
    for words in (type(module).__name__, "Linear", "Conv2d", "ConvTranspose3d"):
        assert words in str(error.value)


def sizes(shape: tuple[int, ...]) -> str | None:
    """Pattern for a message that names the shape, printed as a tuple or as a list."""
    return re.escape(str(shape)[1:-1]) or None


# Shapes in which a channel (or feature) count does not fit, or that have too few or many axes.
WRONG_INPUTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear-features": (nn.Linear(4, 3), (2, 5)),
    "linear-scalar": (nn.Linear(1, 3), ()),
    "conv-channels": (nn.Conv2d(4, 3, 1), (2, 3, 5, 5)),
    # As many channels as outputs, and as a multiple of the groups: neither is the input's count.
    "conv-output-channels": (nn.Conv2d(4, 6, 3, groups=2), (2, 6, 5, 5)),
    "conv-channels-of-one-group": (nn.Conv2d(4, 6, 3, groups=2), (2, 2, 5, 5)),
    "conv-channels-unbatched": (nn.Conv2d(4, 3, 1), (3, 5, 5)),
    "conv-too-few-axes": (nn.Conv2d(4, 3, 1), (4, 5)),
    "conv-too-many-axes": (nn.Conv1d(4, 3, 1), (2, 4, 5, 5)),
    "convT-channels": (nn.ConvTranspose2d(4, 3, 1), (2, 3, 5, 5)),
    "convT-too-few-axes": (nn.ConvTranspose3d(4, 3, 1), (4, 5, 5)),
}


@each_approx
@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_input_of_another_layer(name: str, approx: str) -> None:
    module, shape = WRONG_INPUTS[name]
    with pytest.raises(ValueError, match=sizes(shape)):
        input_factor(module, torch.randn(shape), approx)


WRONG_GRADIENTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear-features": (nn.Linear(4, 3), (2, 4)),
    "conv-channels": (nn.Conv2d(4, 3, 1), (2, 4, 5, 5)),
    "conv-too-few-axes": (nn.Conv2d(4, 3, 1), (3, 5)),
    "convT-channels": (nn.ConvTranspose2d(4, 6, 1, groups=2), (2, 4, 5, 5)),
}


@each_approx
@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_gradient_of_another_layer(name: str, approx: str) -> None:
    module, shape = WRONG_GRADIENTS[name]
    with pytest.raises(ValueError, match=sizes(shape)):
        grad_factor(module, torch.randn(shape), approx)


@each_approx
def test_kernel_larger_than_the_padded_input(approx: str) -> None:
    with pytest.raises(ValueError):
        input_factor(nn.Conv2d(1, 1, 5, padding=1), torch.randn(2, 1, 6, 2), approx)
