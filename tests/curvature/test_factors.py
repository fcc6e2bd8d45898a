"""`tnkfac.curvature.input_factor` and `grad_factor` against brute force over all layers."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from oracles import factors as oracle
from oracles.compare import Result, assert_close
from oracles.layer_cases import SPECIAL, LayerCase, random_layer, seed_id, special_layer
from tnkfac.curvature import grad_factor, input_factor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

APPROXIMATIONS = ("expand", "reduce")
STRUCTURES = ("dense", "diagonal", "block3diagonal")
TOLERANCE = 1e-11

Factor = Callable[..., Result]

CASES: dict[str, Callable[[], LayerCase]] = {
    **{seed_id(seed): partial(random_layer, seed) for seed in range(70)},  # ten of each type
    **{name: partial(special_layer, name) for name in SPECIAL},
}
each_approx = pytest.mark.parametrize("approx", APPROXIMATIONS)


def output_gradient(case: LayerCase) -> Tensor:
    """A seeded gradient in the shape and memory format of the layer's output."""
    with torch.no_grad():
        return torch.randn_like(case.module(case.x))


def parts(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def restricted(dense: oracle.Factor, structure: str) -> oracle.Factor:
    """What a structure keeps of a dense factor of the oracle."""
    assert isinstance(dense, Tensor)
    return oracle.restrict(dense, structure)


def check(
    case: LayerCase,
    g: Tensor | None = None,
    approximations: Sequence[str] = APPROXIMATIONS,
    structures: Sequence[str] = STRUCTURES,
    tolerance: float = TOLERANCE,
) -> list[Result]:
    """Both factors with every approximation and structure; return them."""
    module, x, _ = case
    g = output_gradient(case) if g is None else g
    found: list[Result] = []
    for approx in approximations:
        for factor, dense, argument in (
            (input_factor, oracle.input_factor(module, x, approx), x),
            (grad_factor, oracle.grad_factor(module, g, approx), g),
        ):
            for structure in structures:
                found.append(factor(module, argument, approx, structure))
                assert_close(found[-1], restricted(dense, structure), tolerance)
    return found


# --- all layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_factors(name: str) -> None:
    check(CASES[name]())


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


@each_plain
def test_loss_terms_scale_the_grad_factor(name: str) -> None:
    case = special_layer(name)
    g = output_gradient(case)
    for structure, loss_terms in product(STRUCTURES, (1, 2.5)):
        expected = oracle.grad_factor(case.module, g, "expand", structure, loss_terms)
        result = grad_factor(case.module, g, "expand", structure, loss_terms=loss_terms)
        assert_close(result, expected, TOLERANCE)


@each_plain
def test_blocks_of_any_size(name: str) -> None:
    # Blocks of one entry; of two and four with and without rest; larger than the factor, which
    # then is all rest.
    check(special_layer(name), structures=[f"block{size}diagonal" for size in (1, 2, 4, 100)])


@each_plain
def test_expanded_gradient(name: str) -> None:
    """The gradient of ``output.sum()``: one number, seen through strides of zero."""
    case = special_layer(name)
    check(case, torch.ones((), dtype=torch.float64).expand(case.module(case.x).shape))


@each_plain
def test_arguments_are_left_alone(name: str) -> None:
    """No argument is changed, nothing records a graph, and results own their memory."""
    case = special_layer(name)
    x, g = case.x.clone().requires_grad_(), output_gradient(case)
    kept = g.clone()
    results = check(case._replace(x=x), g)
    assert torch.equal(x, case.x)
    assert torch.equal(g, kept)
    for part in (part for result in results for part in parts(result)):
        assert not part.requires_grad
        assert part.numel() == 0 or part.data_ptr() not in (x.data_ptr(), g.data_ptr())


@each_plain
def test_second_shape_of_the_same_layer(name: str) -> None:
    """A smaller last batch, then the first shape again: nothing remembers the shape before."""
    module, x, description = special_layer(name)
    for samples in (slice(None), slice(1), slice(None)):
        check(LayerCase(module, x[samples], description), structures=["dense"])


@each_approx
def test_changed_hyper_parameters_are_seen(approx: str) -> None:
    """Two layers that differ in one hyper-parameter only do not share what is cached."""
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    for change in ({}, {"stride": 2}, {"padding": 2}, {"dilation": 2}, {"bias": False}):
        options = {"padding": 1} | change
        module = nn.Conv2d(2, 2, 3, **options).double()
        check(LayerCase(module, x, str(change)), None, [approx], ["dense"])
    for mode in ("zeros", "reflect", "replicate", "circular"):
        module = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode).double()
        check(LayerCase(module, x, mode), None, [approx], ["dense"])


# --- dtypes -------------------------------------------------------------------------------------

DTYPES = ("linear-3d", "conv2d-plain-3x3", "conv2d-all-different", "conv2d-dense", "conv3d-reflect")
DTYPES += ("conv2d-groups2-out6", "convT2d-k3-stride2-output-padding", "convT3d-all-different")


def check_dtype(case: LayerCase, dtype: torch.dtype, tolerance: float) -> None:
    """Input and gradient are rounded to ``dtype``; factors are float32 and as exact as told."""
    g = output_gradient(case).to(dtype)
    rounded = LayerCase(case.module.to(dtype), case.x.to(dtype), case.description)
    for result in check(rounded, g, tolerance=tolerance):
        assert all(part.dtype == torch.float32 for part in parts(result))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
    ids=["float32", "bfloat16", "float16"],
)
def test_results_are_accumulated_in_float32(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    check_dtype(special_layer(name), dtype, tolerance)


@each_plain
def test_half_precision_input_of_a_float32_layer(name: str) -> None:
    """Under autocast: weights in float32, an input and an output gradient in bfloat16."""
    module, x, _ = special_layer(name)
    module, x = module.float(), x.bfloat16()
    for approx, structure in product(APPROXIMATIONS, STRUCTURES):
        result = input_factor(module, x, approx, structure)
        assert_close(result, oracle.input_factor(module, x, approx, structure), 1e-5)
        assert all(part.dtype == torch.float32 for part in parts(result))


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


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_input_of_another_layer(name: str) -> None:
    module, shape = WRONG_INPUTS[name]
    for approx in APPROXIMATIONS:
        with pytest.raises(ValueError, match=sizes(shape)):
            input_factor(module, torch.randn(shape), approx)


WRONG_GRADIENTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear-features": (nn.Linear(4, 3), (2, 4)),
    "conv-channels": (nn.Conv2d(4, 3, 1), (2, 4, 5, 5)),
    "conv-too-few-axes": (nn.Conv2d(4, 3, 1), (3, 5)),
    "convT-channels": (nn.ConvTranspose2d(4, 6, 1, groups=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_gradient_of_another_layer(name: str) -> None:
    module, shape = WRONG_GRADIENTS[name]
    for approx in APPROXIMATIONS:
        with pytest.raises(ValueError, match=sizes(shape)):
            grad_factor(module, torch.randn(shape), approx)


@each_approx
def test_kernel_larger_than_the_padded_input(approx: str) -> None:
    with pytest.raises(ValueError):
        input_factor(nn.Conv2d(1, 1, 5, padding=1), torch.randn(2, 1, 6, 2), approx)
