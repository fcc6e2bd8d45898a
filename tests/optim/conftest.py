"""Modules of tests that run once with every optimizer."""

from collections.abc import Iterator
from typing import Any

import pytest

from oracles import optimizers


@pytest.fixture(autouse=True)
def optimizer_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    kind = getattr(request, "param", "SINGD")
    optimizers.use(kind)
    yield kind
    optimizers.use("SINGD")


def pytest_generate_tests(metafunc: Any) -> None:
    if getattr(metafunc.module, "BOTH_OPTIMIZERS", False):
        metafunc.parametrize("optimizer_kind", optimizers.KINDS, indirect=True)
