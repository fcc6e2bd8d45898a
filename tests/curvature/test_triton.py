"""Triton's kernels, by its interpreter where there is no GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from tnkfac.curvature.layers import describe

TESTS = Path(__file__).parent.parent
SCRIPTS = {"curvature/kernels_interpreted.py": 11, "optim/kernels_interpreted.py": 14}
"""What is interpreted, and how many cases agree."""
TOO_NEW = "only 0-dimensional arrays can be converted to Python scalars"
"""What the interpreter of Triton 3.6 says with NumPy 2.4, in every loop."""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_kernels_equal_their_twins(script: str) -> None:
    """In a process of its own: a switch before Triton is imported decides who runs kernels."""
    found = subprocess.run(
        [sys.executable, str(TESTS / script)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if TOO_NEW in found.stderr:
        pytest.skip("This interpreter of Triton does not know this NumPy.")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("agrees") == SCRIPTS[script]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(70, 64, 3, 2, 1), nn.Conv2d(3, 64, 7, 2, 3), nn.ConvTranspose2d(8, 6, 3, 2, 1, 1)],
    ids=str,
)
def test_the_kernel_on_cuda(module: nn.Module, kind: torch.dtype, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer = describe(module)
    x = torch.randn(8, layer.in_channels, 33, 31, device="cuda").to(kind, memory_format=layout)
    g = torch.randn_like(module.cuda()(x.float())).to(kind, memory_format=layout)
    pair = layer.moments(x, g, "reduce", torch.float32)
    a, b = (replace(moment, has_one=False).diagonal() for moment in pair)
    exact = layer.moments(x.double(), g.double(), "reduce")
    A, B = (replace(moment, has_one=False).diagonal() for moment in exact)
    torch.testing.assert_close(a.double(), A, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.double(), B, rtol=1e-4, atol=1e-4)


def test_environment_is_left_alone() -> None:
    """The interpreter would be in force for everything after it."""
    assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
