"""One switch between the fast path and the plain one, which gives the same results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_plain = os.environ.get("TNKFAC_PLAIN", "0") not in ("", "0")


def fast() -> bool:
    """Whether layers are stepped and updated many at a time."""
    return not _plain


@contextmanager
def plain_path() -> Iterator[None]:
    """Inside, every layer is stepped and updated by itself; so is it with ``TNKFAC_PLAIN=1``."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before
