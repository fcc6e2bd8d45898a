"""The benchmark of the price: what it measures, and when it says that a bar is missed."""

from typing import Any

import pytest
import torch

import limit
import price


def row(network: str, optimizer: str = "SINGD", **figures: float) -> dict[str, Any]:
    usual = {"passes_ms": 100.0, "first": 1.5, "mean": 0.1, "plain": 0.1, "state": 1.2, "kept": 0.2}
    return {"network": network, "optimizer": optimizer, **usual, **figures}


def test_bars_and_networks_belong_together() -> None:
    named = {*price.STUDY["networks"], *price.STUDY["bars"]["mean"], *price.STUDY["bars"]["first"]}
    assert named <= set(price.NETWORKS)


@pytest.mark.parametrize(
    ("figures", "missed"),
    [({}, 0), ({"mean": 0.31}, 1), ({"first": 3.1}, 1), ({"state": 1.9}, 1)],
    ids=["met", "too slow", "a slow start", "what is kept counts as memory"],
)
def test_a_missed_bar_is_told(figures: dict[str, float], missed: int) -> None:
    assert price.bars([row("resnet18", **figures)]) == missed
    assert price.bars([row("resnet18", "SOAP", **figures)]) == 0


def test_a_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory is exact, and every optimizer has its line."""
    threads = torch.get_num_threads()
    rows = price.measure("resnet18", ["AdamW", "SINGD", "SINGD diagonal"], 1, price.QUICK)
    print(price.table(rows))
    text = capsys.readouterr().out
    assert all(name in text for name in ("AdamW", "SINGD diagonal"))
    adamw, singd, diagonal = rows
    assert adamw["state"] == 2.0
    assert adamw["kept"] == diagonal["kept"] == 0
    assert 1.0 < diagonal["state"] < 1.01
    assert singd["state"] == pytest.approx(1 + singd["kept"], abs=0.02)  # K and C, and squares
    assert all(float(r[field]) > 0 for r in rows for field in ("first", "mean", "plain"))
    torch.set_num_threads(threads)


def test_the_least_counts_every_layer() -> None:
    run = price.Run("resnet18", "SINGD", price.QUICK)
    run.loss().backward()
    memory, products, update = limit.least(run, 1.0, 1.0)
    assert memory == limit.BYTES * sum(p.numel() for p in run.model.parameters())
    layers = run.optimizer._registry.layers
    by_hand = sum(
        la.statistics.k.numel * la.statistics.c.dim + la.statistics.c.numel * la.statistics.k.dim
        for la in layers
    )
    assert products == by_hand
    assert update > 0.1 * sum(3 * la.statistics.k.numel * 64 for la in layers[5:6])
