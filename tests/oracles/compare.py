"""Comparison of results and oracles, relative to the size of the oracle."""

from torch import Size, Tensor, float64

__all__ = ["assert_close", "relative_error", "shapes"]

Result = Tensor | tuple[Tensor, ...]


def _parts(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def shapes(result: Result) -> list[Size]:
    """Shapes of a tensor, or of every tensor of a tuple."""
    return [part.shape for part in _parts(result)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest entry of ``expected``.

    An expected tensor of zeros (or without entries) has to be met absolutely. NaN gives infinity.
    """
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().to(float64), expected.detach().to(float64)
    error = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    error = error / scale if scale > 0 else error
    return error if error == error else float("inf")


def assert_close(actual: Result, expected: Result, rtol: float) -> None:
    """Same kind of result, same shapes, and a relative error of at most ``rtol``."""
    assert isinstance(actual, Tensor) == isinstance(expected, Tensor), type(actual)
    assert shapes(actual) == shapes(expected)
    for ours, oracle in zip(_parts(actual), _parts(expected), strict=True):
        error = relative_error(ours, oracle)
        assert error <= rtol, f"relative error {error:.2e} exceeds {rtol:.0e}"
