"""The page of guarantees names tests that exist, and every line has one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = [
    line
    for line in (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| guarantee"))
]


def names(line: str) -> list[tuple[str, str]]:
    """File and test of every reference in a line; a missing file is that of the one before."""
    found, file = [], ""
    for path, test in re.findall(r"`([\w/.]*)::(\w+)`", line.split("|")[-2]):
        file = path or file
        found.append((file, test))
    return found


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[2:40])
def test_every_line_is_tested(line: str) -> None:
    assert names(line)
    for file, test in names(line):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, f"{file}::{test}"


def test_there_are_lines() -> None:
    assert len(LINES) > 40
