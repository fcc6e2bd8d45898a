"""One switch between the fast path and the plain one, which gives the same results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

plain = os.environ.get("TNKFAC_PLAIN", "0") not in ("", "0")
"""Whether every layer is stepped and updated by itself."""


@contextmanager
def plain_path() -> Iterator[None]:
    """Inside, every layer is stepped and updated by itself; so is it with ``TNKFAC_PLAIN=1``."""
    global plain
    before, plain = plain, True
    try:
        yield
    finally:
        plain = before
