"""What a row of the tables of planted faults is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A mistake that somebody might make.

    Attributes:
        file: Where it is planted, below ``tnkfac``; the first folder is its room.
        old: Text that occurs there exactly once.
        new: What takes its place.
        what: The mistake in a few words.
    """

    file: str
    old: str
    new: str
    what: str

    @property
    def path(self) -> str:
        """From the root of a checkout."""
        return f"tnkfac/{self.file}"

    @property
    def room(self) -> str:
        """The room that it is in."""
        return self.file.split("/")[0]

    def planted(self, source: str) -> str:
        """The source with the fault.

        Raises:
            ValueError: If the old text is not there exactly once, or what results is no Python.
        """
        count = source.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self}: the old text occurs {count} times, not once.")
        changed = source.replace(self.old, self.new)
        try:
            compile(changed, self.path, "exec")
        except SyntaxError as error:
            raise ValueError(f"{self}: {error}") from error
        return changed
