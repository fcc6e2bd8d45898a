"""What every test starts from: a fixed seed, the default dtype it found, and few objects."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores already
    torch.set_num_threads(1)


collect_ignore = ["data", "faults"]
"""Loops for packages that are not installed, and a script."""


@pytest.fixture(autouse=True)
def _seed_and_dtype() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True, scope="module")
def _few_objects() -> None:
    """Put the objects of libraries and of other tests out of sight of the collector.

    Optimizers look for the modules of bare parameters among all of its objects, and tests of what
    is freed let it run: both take as long as there are objects.
    """
    gc.collect()
    gc.freeze()
