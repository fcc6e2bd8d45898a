"""What keeps the table fast."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _few_objects() -> Iterator[None]:
    """Optimizers look for the modules of bare parameters among all objects of the collector.

    Those of the libraries and of other tests are put out of its sight.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
