"""The simulation of placements: equal to a real run, and lawful."""

import csv
import itertools
from pathlib import Path

import pytest

import placement
from distributed.launching import HERE, python


def test_a_real_run_sends_and_keeps_what_is_simulated() -> None:
    """Four processes; all bytes of messages and of preconditioners."""
    text = python(str(HERE.parents[1] / "benchmarks" / "placement.py"), "--check")
    assert text.count("equal") == 24
    assert "DIFFERENT" not in text


@pytest.mark.parametrize("name", placement.OPTIMIZERS)
def test_fewer_keepers_keep_less_and_send_more(name: str) -> None:
    cls, options = placement.OPTIMIZERS[name]
    model = placement.small()
    optimizer = cls(model.parameters(), **options)
    loads = [placement.simulate("small", name, optimizer, 16, g)[0] for g in (1, 2, 4, 8, 16)]
    for fewer, more in itertools.pairwise(loads):
        assert fewer.kept <= more.kept
        assert fewer.statistics == more.statistics
        assert fewer.gradients >= more.gradients
        assert fewer.preconditioners <= more.preconditioners
    assert loads[-1].gradients == loads[0].preconditioners == 0


def test_results_are_of_all_networks() -> None:
    path = Path(placement.RESULTS) / "placement.csv"
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["network"] for row in rows} == set(placement.NETWORKS)
    assert {int(row["world"]) for row in rows} == {8, 64, 512, 4096}
