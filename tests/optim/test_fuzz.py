"""Random networks and options: repeatable, finite, and the same when resumed from a file."""

import pytest

from oracles import fuzz


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_networks(first: int) -> None:
    """More of them: `python -m oracles.fuzz --runs 1000` in `tests`."""
    assert [what for seed in range(first, first + 10) if (what := fuzz.check(seed))] == []
