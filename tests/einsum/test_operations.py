"""Forward-like operations and Kronecker factors against torch and brute-force loops."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oracles import factors as oracle
from oracles.compare import assert_close
from oracles.layer_cases import (
    Geometry,
    Padding,
    draw_conv_geometry,
    draw_conv_transpose_geometry,
)
from tnkfac.einsum.functional import (
    conv,
    conv_transpose,
    index_pattern,
    kfac_reduce_factor,
    kfac_reduce_factor_transpose,
    kfc_diagonal,
    kfc_factor,
    kfc_factor_transpose,
    unfold,
    unfold_transpose,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

SEEDS = range(45)  # fifteen per number of spatial axes
TOLERANCE = 1e-11
FLOAT64 = torch.float64

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


# --- cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A geometry with channels and the tensors of a (transposed) convolution."""

    geometry: Geometry
    groups: int
    x: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of all operations."""
        g = self.geometry
        return {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, **self.grouped}

    @property
    def ungrouped(self) -> dict[str, object]:
        return {name: value for name, value in self.options.items() if name != "groups"}

    @property
    def grouped(self) -> dict[str, object]:
        return {"groups": self.groups}

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.geometry.kernel_size

    @property
    def output_padding(self) -> tuple[int, ...]:
        return self.geometry.output_padding

    def unfolded(self, groups: int) -> Tensor:
        """Brute-force unfolded input ``[N, G, D, S]``."""
        g = self.geometry
        if g.output_padding:
            args = g.kernel_size, g.stride, g.pairs, g.dilation, g.output_padding
            return oracle.unfold_transpose(self.x, *args, groups)
        return oracle.unfold(self.x, g.kernel_size, g.stride, g.pairs, g.dilation, groups)

    def factor(self, approx: str) -> Tensor:
        """Brute-force input factor ``[G, D, D]`` without bias."""
        rows = self.unfolded(self.groups)
        rows = rows.mean(3, keepdim=True) if approx == "reduce" else rows
        return torch.einsum("ngds,nges->gde", rows, rows) / (rows.shape[0] * rows.shape[3])


def seed_id(seed: int) -> str:
    return f"{seed % 3 + 1}d-seed{seed:02d}"


def tensor(rng: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(*shape, generator=generator, dtype=FLOAT64)


def draw(seed: int, transposed: bool, dims: int | None = None) -> Case:
    """Random sizes, groups, and padding in every form."""
    rng = random.Random(1000 * transposed + seed)
    dims = seed % 3 + 1 if dims is None else dims
    draw_geometry = draw_conv_transpose_geometry if transposed else draw_conv_geometry
    geometry = draw_geometry(rng, dims, asymmetric=True)
    groups, c_in, c_out = rng.choice((1, 1, 2, 3)), rng.randint(1, 2), rng.randint(1, 3)
    rows, columns = (c_in * groups, c_out) if transposed else (c_out * groups, c_in)
    x = tensor(rng, rng.randint(1, 3), c_in * groups, *geometry.input_size)
    weight = tensor(rng, rows, columns, *geometry.kernel_size)
    return Case(geometry, groups, x, weight, tensor(rng, c_out * groups))


def make(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    *,
    groups: int = 1,
    stride: Sequence[int] = (1, 1),
    padding: Padding = 0,
    dilation: Sequence[int] = (1, 1),
    channels: int = 2,
    samples: int = 2,
) -> Case:
    """A two-dimensional convolution with given hyper-parameters."""
    sizes = tuple(input_size), tuple(kernel_size), tuple(stride)
    geometry = Geometry(*sizes, padding, tuple(dilation))
    rng = random.Random(0)
    x = tensor(rng, samples, channels * groups, *input_size)
    weight = tensor(rng, 3 * groups, channels, *kernel_size)
    return Case(geometry, groups, x, weight, tensor(rng, 3 * groups))


# Geometries for which a network can be rewritten; each guards one rewrite against its look-alikes.
SPECIAL: dict[str, Case] = {
    "1x1": make((4, 5), (1, 1)),
    "1x1-groups": make((4, 5), (1, 1), groups=2),
    # Down-sampling: divisible, with unused pixels, and with a stride that leaves the input.
    "down-sampling": make((6, 4), (1, 1), stride=(2, 2)),
    "down-sampling-leaves-input": make((7, 7), (1, 1), stride=(2, 3)),
    "down-sampling-2x2": make((9, 7), (2, 2), stride=(4, 3)),
    # Dense: kernel equals stride; with pixels that are never read; along one axis only.
    "dense": make((6, 6), (2, 3), stride=(2, 3)),
    "dense-unused-pixels": make((7, 8), (2, 3), stride=(2, 3)),
    "dense-one-axis": make((6, 5), (2, 3), stride=(2, 1)),
    "dense-groups": make((6, 6), (3, 2), stride=(3, 2), groups=2),
    # Looks dense, but padding shifts the windows; so does padding on one side only.
    "dense-padded": make((6, 6), (2, 2), stride=(2, 2), padding=1),
    "dense-padded-left": make((5, 6), (2, 2), stride=(2, 2), padding=((1, 0), (2, 0))),
    # Looks dense, but taps are dilated.
    "dense-dilated": make((8, 8), (2, 2), stride=(2, 2), dilation=(2, 3)),
    # One output: stride without effect. One tap: dilation without effect.
    "one-output": make((3, 4), (3, 4), stride=(2, 1)),
    "one-output-with-unused": make((4, 5), (3, 4), stride=(2, 3)),
    "one-tap-dilated": make((3, 4), (1, 1), dilation=(2, 3), padding=1),
    # Stride and dilation exchanged: dense once the roles of tap and output are swapped.
    "swapped-dense": make((6, 4), (3, 2), dilation=(2, 2)),
    "common-divisor": make((9, 11), (3, 2), stride=(2, 4), dilation=(2, 2)),
    "common-divisor-padded": make((9, 8), (3, 3), stride=(2, 2), dilation=(2, 2), padding=1),
    # Stride divides the kernel (space-to-depth), and does not.
    "stride-divides-kernel": make((8, 9), (4, 3), stride=(2, 3), padding=1),
    "stride-3-kernel-4": make((9, 8), (4, 4), stride=(3, 3), padding=(1, 2)),
    # Windows that lie on padding entirely; a kernel larger than the input.
    "far-outside": make((3, 2), (2, 2), padding=3),
    "kernel-exceeds-input": make((2, 1), (5, 3), padding=(2, 1)),
    "dilation-exceeds-input": make((3, 3), (3, 3), dilation=(4, 5), padding=(4, 5)),
    "same-even": make((5, 4), (2, 4), padding="same"),
    "same-even-odd-dilation": make((5, 6), (4, 2), padding="same", dilation=(3, 1)),
    "asymmetric": make((5, 6), (3, 2), padding=((0, 2), (3, 1)), stride=(2, 1)),
    "depthwise": make((5, 4), (3, 3), padding=1, channels=1, groups=4),
    "one-channel": make((5, 4), (3, 2), channels=1),
    "one-sample": make((5, 4), (3, 3), padding=1, samples=1),
    # Equal sizes on all axes: exchanged axes keep their shapes.
    "ambiguous-axes": make((3, 3), (3, 3), padding=1, channels=3, samples=3),
}

CASES: dict[str, Callable[[], Case]] = {seed_id(s): lambda s=s: draw(s, False) for s in SEEDS}
CASES |= {name: lambda case=case: case for name, case in SPECIAL.items()}
TRANSPOSED: dict[str, Callable[[], Case]] = {seed_id(s): lambda s=s: draw(s, True) for s in SEEDS}

each_case = pytest.mark.parametrize("name", CASES)
each_transposed = pytest.mark.parametrize("name", TRANSPOSED)


# --- references ---------------------------------------------------------------------------------


def pad(x: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    return F.pad(x, [side for pair in reversed(pairs) for side in pair])


def torch_conv(case: Case, bias: Tensor | None) -> Tensor:
    """torch's convolution of the explicitly padded input."""
    g = case.geometry
    x, options = pad(case.x, g.pairs), {"stride": g.stride, "dilation": g.dilation}
    return CONV[len(g.stride)](x, case.weight, bias, groups=case.groups, **options)


def torch_conv_transpose(case: Case, bias: Tensor | None) -> Tensor:
    """torch's transposed convolution without padding, which then crops the output."""
    g = case.geometry
    options = {"stride": g.stride, "dilation": g.dilation, "groups": case.groups}
    y = CONV_TRANSPOSE[len(g.stride)](case.x, case.weight, None, **options)
    # Output padding appends zeros, so that it may be taken back by padding on the right.
    y = pad(
        y, [(-left, e - right) for (left, right), e in zip(g.pairs, g.output_padding, strict=True)]
    )
    return y if bias is None else y + bias.reshape(-1, *[1] * len(g.stride))


def loop_conv(case: Case) -> Tensor:
    """A convolution with any number of axes: one loop over outputs, taps and channels."""
    g, pairs = case.geometry, case.geometry.pairs
    windows = zip(g.input_size, g.kernel_size, g.stride, pairs, g.dilation, strict=True)
    sizes = [(i + sum(pair) - d * (k - 1) - 1) // s + 1 for i, k, s, pair, d in windows]
    c_out, c_in = case.weight.shape[:2]
    y = torch.zeros(case.x.shape[0], c_out, *sizes, dtype=FLOAT64)
    for o in product(*map(range, sizes)):
        for k in product(*map(range, g.kernel_size)):
            axes = zip(o, k, g.stride, pairs, g.dilation, strict=True)
            i = tuple(s * out + d * tap - pair[0] for out, tap, s, pair, d in axes)
            if not all(0 <= at < size for at, size in zip(i, g.input_size, strict=True)):
                continue
            for co, ci in product(range(c_out), range(c_in)):
                channel = co // (c_out // case.groups) * c_in + ci
                y[(slice(None), co, *o)] += (
                    case.x[(slice(None), channel, *i)] * case.weight[co, ci][k]
                )
    return y


# --- convolutions -------------------------------------------------------------------------------


@each_case
def test_conv(name: str) -> None:
    case = CASES[name]()
    for bias in (None, case.bias):
        result = conv(case.x, case.weight, bias, **case.options)
        assert_close(result, torch_conv(case, bias), TOLERANCE)


@each_transposed
def test_conv_transpose(name: str) -> None:
    case = TRANSPOSED[name]()
    options = case.options | {"output_padding": case.output_padding}
    for bias in (None, case.bias):
        result = conv_transpose(case.x, case.weight, bias, **options)
        assert_close(result, torch_conv_transpose(case, bias), TOLERANCE)


@pytest.mark.parametrize("padding", [0, 1, 2, (1, 2), "same", "valid"], ids=str)
def test_conv_padding_means_what_it_means_in_torch(padding: Padding) -> None:
    """No helper in between: the very same arguments, even kernel and odd dilation included."""
    x, weight = torch.randn(2, 4, 5, 6, dtype=FLOAT64), torch.randn(6, 2, 2, 4, dtype=FLOAT64)
    for dilation in (1, (2, 1)):
        options = {"padding": padding, "dilation": dilation, "groups": 2}
        assert_close(conv(x, weight, **options), F.conv2d(x, weight, **options), TOLERANCE)


def test_conv_transpose_arguments_mean_what_they_mean_in_torch() -> None:
    x, weight = torch.randn(2, 4, 3, 4, dtype=FLOAT64), torch.randn(4, 3, 3, 2, dtype=FLOAT64)
    bias = torch.randn(6, dtype=FLOAT64)
    options = {"stride": 2, "padding": (1, 0), "output_padding": (0, 1), "groups": 2}
    expected = F.conv_transpose2d(x, weight, bias, dilation=(1, 2), **options)
    result = conv_transpose(x, weight, bias, dilation=(1, 2), **options)
    assert_close(result, expected, TOLERANCE)


def test_defaults() -> None:
    """Stride 1, no padding, no dilation, one group, no bias."""
    x, weight = torch.randn(2, 3, 5, 6, dtype=FLOAT64), torch.randn(3, 3, 2, 3, dtype=FLOAT64)
    assert_close(conv(x, weight), F.conv2d(x, weight), TOLERANCE)
    assert_close(conv_transpose(x, weight), F.conv_transpose2d(x, weight), TOLERANCE)
    assert_close(unfold(x, (2, 3)), F.unfold(x, (2, 3)), TOLERANCE)


@pytest.mark.parametrize("kernel_size", [2, (2, 2), [2, 2], torch.Size([2, 2])], ids=repr)
def test_sizes_are_a_number_or_any_sequence(kernel_size: int | Sequence[int]) -> None:
    case = make((5, 6), (2, 2), stride=(2, 2), padding=1)
    for stride in (2, [2, 2]):
        options = {"stride": stride, "padding": [1, 1], "dilation": 1}
        assert_close(unfold(case.x, kernel_size, **options), case.unfolded(1)[:, 0], TOLERANCE)
        result = kfc_factor(case.x, kernel_size, **options)
        assert_close(result, case.factor("expand"), TOLERANCE)
        assert_close(conv(case.x, case.weight, **options), torch_conv(case, None), TOLERANCE)


def test_hyper_parameters_of_an_earlier_call_are_not_reused() -> None:
    """Equal shapes, other hyper-parameters, and back."""
    x, weight = torch.randn(2, 4, 7, 7, dtype=FLOAT64), torch.randn(4, 4, 3, 3, dtype=FLOAT64)
    changes = [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"padding": "same"}, {}]
    for options in changes:
        assert_close(conv(x, weight, **options), F.conv2d(x, weight, **options), TOLERANCE)
    for options in [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {}]:
        expected = F.conv_transpose2d(x, weight, **options)
        assert_close(conv_transpose(x, weight, **options), expected, TOLERANCE)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_keep_the_dtype(dims: int, dtype: torch.dtype) -> None:
    """Scales and patterns must not pull a result to the default dtype."""
    x, weight = torch.randn(2, 2, *[4] * dims).to(dtype), torch.randn(2, 2, *[3] * dims).to(dtype)
    kernel_size = weight.shape[2:]
    for operation in (conv, conv_transpose):
        assert operation(x, weight, padding=1).dtype == dtype
    for operation in (unfold, unfold_transpose, kfc_factor, kfac_reduce_factor, kfc_diagonal):
        assert operation(x, kernel_size, padding=1).dtype == dtype


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_memory_layout_of_the_input(layout: str) -> None:
    """Views of the input are taken by strides: any strides have to do."""
    for case in (SPECIAL["dense-unused-pixels"], SPECIAL["dense-groups"], SPECIAL["asymmetric"]):
        x = case.x
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "sliced":
            x = torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
        else:
            x = x[:1].expand_as(x)
        case = Case(case.geometry, case.groups, x, case.weight, case.bias)
        kernel_size = case.kernel_size
        result = conv(x, case.weight, **case.options)
        assert_close(result, torch_conv(case, None), TOLERANCE)
        for operation, approx in ((kfc_factor, "expand"), (kfac_reduce_factor, "reduce")):
            result = operation(x, kernel_size, **case.options)
            assert_close(result, case.factor(approx), TOLERANCE)


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv_transpose"])
@pytest.mark.parametrize("seed", range(12), ids=seed_id)
def test_convolutions_are_differentiable(seed: int, transposed: bool) -> None:
    case = draw(seed, transposed)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias)]
    copy = Case(case.geometry, case.groups, leaves[0], leaves[1], leaves[2])
    if transposed:
        options = case.options | {"output_padding": case.output_padding}
        result, expected = conv_transpose(*leaves, **options), torch_conv_transpose(copy, leaves[2])
    else:
        result, expected = conv(*leaves, **case.options), torch_conv(copy, leaves[2])
    v = torch.randn_like(expected)
    ours = torch.autograd.grad(result, leaves, v)
    assert_close(ours, torch.autograd.grad(expected, leaves, v), TOLERANCE)


# --- unfolded inputs ----------------------------------------------------------------------------


@each_case
def test_unfold(name: str) -> None:
    case = CASES[name]()
    result = unfold(case.x, case.kernel_size, **case.ungrouped)
    assert_close(result, case.unfolded(1)[:, 0], TOLERANCE)


@each_transposed
def test_unfold_transpose(name: str) -> None:
    case = TRANSPOSED[name]()
    options = case.ungrouped | {"output_padding": case.output_padding}
    result = unfold_transpose(case.x, case.kernel_size, **options)
    assert_close(result, case.unfolded(1)[:, 0], TOLERANCE)


@pytest.mark.parametrize("name", ["asymmetric", "same-even", "dense-unused-pixels", "far-outside"])
def test_unfold_equals_torch(name: str) -> None:
    case = SPECIAL[name]
    g = case.geometry
    expected = F.unfold(pad(case.x, g.pairs), g.kernel_size, dilation=g.dilation, stride=g.stride)
    assert_close(unfold(case.x, case.kernel_size, **case.ungrouped), expected, TOLERANCE)


@pytest.mark.parametrize("seed", range(9), ids=seed_id)
def test_unfold_transpose_times_weight_is_the_convolution(seed: int) -> None:
    case = draw(seed, True)
    options = case.ungrouped | {"output_padding": case.output_padding}
    columns = unfold_transpose(case.x, case.kernel_size, **options)
    samples, groups = case.x.shape[0], case.groups
    weight = case.weight.unflatten(0, (groups, -1))  # [G, Ci/G, Co/G, *K]
    matrix = weight.transpose(1, 2).flatten(2)
    y = matrix @ columns.reshape(samples, groups, -1, columns.shape[-1])
    assert_close(y.flatten(1), torch_conv_transpose(case, None).flatten(1), TOLERANCE)


# --- Kronecker factors --------------------------------------------------------------------------


@each_case
def test_input_factors(name: str) -> None:
    case = CASES[name]()
    expand, args = case.factor("expand"), (case.x, case.kernel_size)
    assert_close(kfc_factor(*args, **case.options), expand, TOLERANCE)
    diagonal = oracle.restrict(expand, "diagonal")
    assert_close(kfc_diagonal(*args, **case.options), diagonal, TOLERANCE)
    reduced = kfac_reduce_factor(*args, **case.options)
    assert_close(reduced, case.factor("reduce"), TOLERANCE)


@each_transposed
def test_input_factors_transpose(name: str) -> None:
    case = TRANSPOSED[name]()
    options = case.options | {"output_padding": case.output_padding}
    for operation, approx in (
        (kfc_factor_transpose, "expand"),
        (kfac_reduce_factor_transpose, "reduce"),
    ):
        result = operation(case.x, case.kernel_size, **options)
        assert_close(result, case.factor(approx), TOLERANCE)


@pytest.mark.parametrize("name", ["1x1", "dense", "asymmetric", "stride-divides-kernel"])
def test_factors_are_symmetric(name: str) -> None:
    case = SPECIAL[name]
    for operation in (kfc_factor, kfac_reduce_factor):
        factor = operation(case.x, case.kernel_size, **case.options)
        assert_close(factor, factor.mT, 1e-14)


# --- four spatial axes --------------------------------------------------------------------------

FOUR = Geometry(
    input_size=(3, 4, 3, 2),
    kernel_size=(2, 3, 1, 2),
    stride=(1, 2, 2, 1),
    padding=((1, 0), (1, 1), (0, 0), (0, 1)),
    dilation=(2, 1, 1, 1),
)
FOUR_DENSE = Geometry((4, 3, 2, 5), (2, 3, 1, 2), (2, 3, 1, 2), 0, (1, 1, 1, 1))
FOUR_AXES = {"general": FOUR, "dense": FOUR_DENSE}
each_four = pytest.mark.parametrize("name", FOUR_AXES)


def four_axes(name: str) -> Case:
    geometry, rng = FOUR_AXES[name], random.Random(4)
    x, weight = tensor(rng, 2, 4, *geometry.input_size), tensor(rng, 2, 2, *geometry.kernel_size)
    return Case(geometry, 2, x, weight, tensor(rng, 2))


@each_four
def test_conv_in_four_dimensions(name: str) -> None:
    case = four_axes(name)
    result = conv(case.x, case.weight, **case.options)
    assert_close(result, loop_conv(case), TOLERANCE)
    shifted = conv(case.x, case.weight, case.bias, **case.options)
    assert_close(shifted, result + case.bias.reshape(-1, 1, 1, 1, 1), TOLERANCE)


@each_four
def test_factors_in_four_dimensions(name: str) -> None:
    # The reduce factor has 28 legs (n, g, c, c' and i, o, k of 4 axes twice), more than a to z.
    case = four_axes(name)
    kernel_size = case.kernel_size
    columns = unfold(case.x, kernel_size, **case.ungrouped)
    assert_close(columns, case.unfolded(1)[:, 0], TOLERANCE)
    expected = case.factor("expand")
    assert_close(kfc_factor(case.x, kernel_size, **case.options), expected, TOLERANCE)
    diagonal = expected.diagonal(dim1=1, dim2=2)
    assert_close(kfc_diagonal(case.x, kernel_size, **case.options), diagonal, TOLERANCE)
    reduced = kfac_reduce_factor(case.x, kernel_size, **case.options)
    assert_close(reduced, case.factor("reduce"), TOLERANCE)


def test_transposed_operations_in_four_dimensions() -> None:
    sizes, kernel_size = (2, 1, 2, 3), (2, 3, 1, 2)
    stride, padding, dilation, extra = (2, 1, 2, 1), (1, 0, 0, 1), (1, 2, 1, 2), (1, 0, 1, 1)
    geometry = Geometry(sizes, kernel_size, stride, padding, dilation, extra)
    rng = random.Random(5)
    x, weight = tensor(rng, 2, 4, *sizes), tensor(rng, 4, 1, *kernel_size)
    case = Case(geometry, 2, x, weight, tensor(rng, 2))
    options = case.options | {"output_padding": extra}
    for operation, approx in (
        (kfc_factor_transpose, "expand"),
        (kfac_reduce_factor_transpose, "reduce"),
    ):
        assert_close(operation(x, kernel_size, **options), case.factor(approx), TOLERANCE)
    y = conv_transpose(x, weight, **options)
    matrix = weight.reshape(2, 2, 1, -1).transpose(1, 2).flatten(2)  # [G, Co/G, Ci/G * K]
    assert_close(y.flatten(1), (matrix @ case.unfolded(2)).flatten(1), TOLERANCE)


def test_loops_agree_with_torch() -> None:
    """The reference of the four-dimensional case, where torch has one too."""
    for case in (SPECIAL["asymmetric"], SPECIAL["dense-groups"], SPECIAL["same-even-odd-dilation"]):
        assert_close(loop_conv(case), torch_conv(case, None), 1e-13)


# --- index patterns -----------------------------------------------------------------------------


def loop_pattern(
    size: int, kernel: int, stride: int, pair: tuple[int, int], dilation: int
) -> Tensor:
    """``P[k, o, i] = 1`` where tap ``k`` of output ``o`` reads input ``i``."""
    outputs = (size + sum(pair) - dilation * (kernel - 1) - 1) // stride + 1
    pattern = torch.zeros(kernel, outputs, size, dtype=FLOAT64)
    for k, o, i in product(range(kernel), range(outputs), range(size)):
        if i == k * dilation + o * stride - pair[0]:
            pattern[k, o, i] = 1
    return pattern


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_index_pattern(kernel: int, stride: int, dilation: int) -> None:
    """All sizes up to 8 and all paddings up to 3 on each side that leave an output."""
    for size, left, right in product(range(1, 9), range(4), range(4)):
        if size + left + right < dilation * (kernel - 1) + 1:
            continue
        expected = loop_pattern(size, kernel, stride, (left, right), dilation)
        result = index_pattern(size, kernel, stride, (left, right), dilation, dtype=FLOAT64)
        assert torch.equal(result, expected), (size, left, right)
        if left == right:
            result = index_pattern(size, kernel, stride, left, dilation, dtype=FLOAT64)
            assert torch.equal(result, expected), (size, left)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_index_pattern_of_named_padding(kernel: int, dilation: int) -> None:
    size = dilation * (kernel - 1) + 3
    left = dilation * (kernel - 1) // 2
    pair = (left, dilation * (kernel - 1) - left)
    same = index_pattern(size, kernel, padding="same", dilation=dilation, dtype=FLOAT64)
    assert torch.equal(same, loop_pattern(size, kernel, 1, pair, dilation))
    assert same.shape == (kernel, size, size)
    valid = index_pattern(size, kernel, 2, "valid", dilation, dtype=FLOAT64)
    assert torch.equal(valid, loop_pattern(size, kernel, 2, (0, 0), dilation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, None], ids=str)
def test_dtype_of_index_pattern(dtype: torch.dtype | None) -> None:
    pattern = index_pattern(5, 3, 2, 1, dtype=dtype, device=torch.device("cpu"))
    assert dtype is None or pattern.dtype == dtype
    assert torch.equal(pattern.to(FLOAT64), loop_pattern(5, 3, 2, (1, 1), 1))


def test_index_pattern_is_a_fresh_tensor() -> None:
    """Whoever writes to a pattern does not change the next one."""
    index_pattern(5, 3, dtype=FLOAT64).zero_()
    assert torch.equal(index_pattern(5, 3, dtype=FLOAT64), loop_pattern(5, 3, 1, (0, 0), 1))


def test_index_pattern_convolves() -> None:
    x, weight = torch.randn(2, 3, 7, dtype=FLOAT64), torch.randn(4, 3, 3, dtype=FLOAT64)
    pattern = index_pattern(7, 3, 2, 1, 2, dtype=FLOAT64)
    y = torch.einsum("nci,koi,dck->ndo", x, pattern, weight)
    assert_close(y, F.conv1d(x, weight, stride=2, padding=1, dilation=2), TOLERANCE)


def test_index_pattern_is_exported_by_the_package() -> None:
    import tnkfac.einsum

    assert tnkfac.einsum.index_pattern is index_pattern


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["smae", "SAME", ""])
def test_unknown_padding(padding: str) -> None:
    x, weight = torch.randn(2, 2, 5, 5), torch.randn(2, 2, 3, 3)
    for call in (
        lambda: index_pattern(5, 3, padding=padding),
        lambda: conv(x, weight, padding=padding),
        lambda: kfc_factor(x, (3, 3), padding=padding),
    ):
        with pytest.raises(ValueError, match="padding") as error:
            call()
        for words in (repr(padding), "same", "valid"):
            assert words in str(error.value)


def test_same_padding_refuses_strides() -> None:
    """As in torch: the output could not be as large as the input."""
    x, weight = torch.randn(2, 2, 5, 5), torch.randn(2, 2, 3, 3)
    for call in (
        lambda: index_pattern(5, 3, 2, "same"),
        lambda: conv(x, weight, stride=2, padding="same"),
        lambda: kfac_reduce_factor(x, 3, stride=(1, 2), padding="same"),
    ):
        with pytest.raises(ValueError, match="same"):
            call()


def test_kernel_larger_than_the_padded_input() -> None:
    x, weight = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 5, 5)
    for call in (
        lambda: index_pattern(2, 5, 1, 1),
        lambda: conv(x, weight, padding=1),
        lambda: unfold(x, 5, padding=1),
        lambda: kfc_diagonal(x, 5, padding=1),
    ):
        with pytest.raises(ValueError):
            call()


def test_channels_that_do_not_fit() -> None:
    """Torch raises a RuntimeError here; a ValueError is as good, a result is not."""
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 2, 3, 3)
    for call in (
        lambda: conv(x, weight),
        lambda: conv(x[:, :2], weight, groups=2),
        lambda: conv_transpose(x, weight),
        lambda: kfc_factor(x, 3, groups=2),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()
