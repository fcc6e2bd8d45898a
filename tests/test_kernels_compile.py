"""Triton's kernels compile for GPUs of several generations: no GPU is needed for that."""

from typing import Any

import pytest

pytest.importorskip("triton")

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tnkfac.curvature.moments.triton_sums import _squares_of_sums
from tnkfac.optim.step.triton_kernels import _squares, _to_size

FLOATS, NUMBERS = "*fp32", "*i64"
TABLES = {"table": NUMBERS, "tiles": "*i32", "sums": "*fp64", "totals": "*fp64", "sizes": "*fp64"}
TABLES |= {"out": FLOATS}
UNSIZED = {**TABLES, "totals": NUMBERS, "sizes": NUMBERS}
KIND = {"KIND": tl.float32, "BLOCK": 1024}
PIXELS = {"x": FLOATS, "out": FLOATS}
BLOCKS = {"PER": 4, "KP": 16, "BC": 16, "BP": 128}

CASES: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "squares": (_squares, TABLES, KIND),
    "to size": (_to_size, TABLES, {"SIZED": True, **KIND}),
    "as they are": (_to_size, UNSIZED, {"SIZED": False, **KIND}),
    "taps": (_squares_of_sums, PIXELS, {**BLOCKS, "TAPS": True, "TRANSPOSED": False}),
    "taps, bfloat16": (
        _squares_of_sums,
        {**PIXELS, "x": "*bf16"},
        {**BLOCKS, "TAPS": True, "TRANSPOSED": False},
    ),
    "transposed": (_squares_of_sums, PIXELS, {**BLOCKS, "TAPS": True, "TRANSPOSED": True}),
    "channels last": (
        _squares_of_sums,
        {**PIXELS, "x": "*fp16"},
        {**BLOCKS, "BC": 64, "BP": 32, "TAPS": True, "TRANSPOSED": False},
    ),
    "positions": (_squares_of_sums, PIXELS, {**BLOCKS, "TAPS": False, "TRANSPOSED": False}),
}


@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100"])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_compiles(case: str, capability: int) -> None:
    kernel, types, constants = CASES[case]
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed)
    assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
