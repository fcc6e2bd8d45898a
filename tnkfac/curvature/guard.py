"""A lock for what several threads do, one of which may be interrupted."""

from __future__ import annotations

from contextlib import suppress
from threading import RLock


class Guard:
    """A lock that stands in nobody's way for long if an interrupt has left it held.

    A KeyboardInterrupt may fall between the last line of a ``with`` block and its end. Then the
    same thread goes in again, and others go on after a while.
    """

    def __init__(self) -> None:
        """Nobody is inside."""
        self._lock = RLock()

    def __enter__(self) -> None:
        """Go in, after a second whether somebody is inside or not."""
        self._lock.acquire(timeout=1.0)

    def __exit__(self, *error: object) -> None:
        """Go out."""
        with suppress(RuntimeError):  # it is another thread's
            self._lock.release()
