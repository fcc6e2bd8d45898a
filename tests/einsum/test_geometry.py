"""Facts about index patterns, checked over all small hyper-parameters."""

from itertools import product

import pytest

from tnkfac.einsum.geometry import Axis, conv_axes, conv_transpose_axes, resolve_padding

SMALL = [
    Axis(i, k, s, left, right, d)
    for i, k, s, left, right, d in product(
        range(1, 8), range(1, 4), range(1, 4), range(3), range(3), (1, 2, 3)
    )
    if i + left + right >= d * (k - 1) + 1
]


def test_the_grid_is_not_empty() -> None:
    assert len(SMALL) > 1000


def test_injective_means_that_no_pixel_is_met_twice() -> None:
    for axis in SMALL:
        if axis.is_unpadded:
            pixels = [i for _, _, i in axis.taps()]
            assert axis.is_injective == (len(pixels) == len(set(pixels))), axis
        elif axis.is_injective:  # padding may hide a second meeting, never add one
            pixels = [i for _, _, i in axis.taps()]
            assert len(pixels) == len(set(pixels)), axis


def test_unpadded_means_that_every_tap_meets_a_pixel() -> None:
    for axis in SMALL:
        every = axis.kernel_size * axis.output_size
        assert axis.is_unpadded == (len(list(axis.taps())) == every), axis


def test_cropping_keeps_all_taps_and_leaves_no_unused_pixel_behind() -> None:
    for axis in SMALL:
        small = axis.cropped()
        assert list(small.taps()) == list(axis.taps()), axis
        assert small.output_size == axis.output_size
        met = [i for _, _, i in axis.taps()]
        assert not met or small.input_size >= max(met) + 1


def test_a_common_factor_of_stride_and_dilation_leaves_pixels_untouched() -> None:
    coarse = 0
    for axis in SMALL:
        if axis.coarse is None:
            continue
        first, step, small = axis.coarse
        assert [(k, o, first + step * i) for k, o, i in small.taps()] == list(axis.taps()), axis
        coarse += 1
    assert coarse > 100


@pytest.mark.parametrize(
    ("padding", "kernel", "stride", "dilation", "expected"),
    [
        pytest.param(2, (3, 5), (1, 1), (1, 1), ((2, 2), (2, 2)), id="int"),
        pytest.param("valid", (3,), (2,), (1,), ((0, 0),), id="valid"),
        pytest.param("same", (4,), (1,), (1,), ((1, 2),), id="same-odd-zero-goes-right"),
        pytest.param("same", (2,), (1,), (3,), ((1, 2),), id="same-dilated"),
        pytest.param((1, 2), (3, 3), (1, 1), (1, 1), ((1, 1), (2, 2)), id="one-per-dimension"),
        pytest.param(((0, 1), 2), (3, 3), (2, 2), (1, 1), ((0, 1), (2, 2)), id="pairs"),
    ],
)
def test_padding_forms(padding, kernel, stride, dilation, expected) -> None:
    assert resolve_padding(padding, kernel, stride, dilation) == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        pytest.param(lambda: conv_axes((5,), 3, padding="full"), ["padding", "'full'"], id="name"),
        pytest.param(lambda: conv_axes((5,), 3, 2, "same"), ["same", "stride"], id="same-stride"),
        pytest.param(lambda: conv_axes((5, 5), (3, 3, 3)), ["kernel_size", "2"], id="entries"),
        pytest.param(lambda: conv_axes((2,), 3), ["larger"], id="no-output"),
        pytest.param(lambda: conv_axes((5,), 3, 0), ["stride", "0"], id="zero-stride"),
        pytest.param(lambda: conv_axes((5,), 3, 1, -1), ["padding", "-1"], id="negative-padding"),
        pytest.param(
            lambda: conv_transpose_axes((5,), 3, 2, output_padding=2),
            ["output_padding", "2"],
            id="output-padding",
        ),
        pytest.param(lambda: conv_transpose_axes((1,), 2, 1, 2), ["empty"], id="empty-output"),
    ],
)
def test_errors_name_argument_and_value(call, words) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
