"""The benchmark of factors: it runs, its peers compute the same, and its rows are complete."""

import csv
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles import factors as oracle
from peers import TRANSPOSED, Problem, einconv_simplified, im2col, transposed_module

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "factors.py"


@pytest.fixture
def benchmark() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield runpy.run_path(str(SCRIPT))
    torch.set_num_threads(threads)


def test_the_benchmark_runs(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--only", "3c3d conv3", "--batch", "2", "--repeats", "1", "--budget", "0"]
    status = benchmark["main"]([*arguments, "--out", str(tmp_path)])
    with (tmp_path / "factors-cpu-batch2-3c3d-conv3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["quantity"] for row in rows] == [
        "expand dense",
        "expand diagonal",
        "reduce dense",
        "reduce diagonal",
    ]
    for row in rows:
        assert float(row["ours_ms"]) > 0
        assert float(row["im2col_ratio"]) > 0
        assert float(row["error"]) < 2e-5
        assert float(row["ours_mib"]) <= float(row["im2col_mib"])
    assert (tmp_path / "factors-cpu-batch2-3c3d-conv3.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert status == int("MISSED" in printed)
    assert "slower than" in printed


def row(**values: Any) -> dict[str, Any]:
    stock = {"network": "n", "layer": "l", "quantity": "expand dense", "kernel": 3, "stride": 1}
    stock |= {"im2col_ratio": 20.0, "einconv_ratio": 20.0, "ratio": 20.0, "error": 1e-7}
    return stock | {"ours_mib": 1.0, "im2col_mib": 8.0, "padded_mib": 1.0} | values


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([row()], 0),
        ([row(ratio=3.9)], 1),
        ([row(ratio=0.9), row(ratio=90.0)], 1),
        ([row(quantity="reduce dense")], 0),
        ([row(quantity="reduce dense", im2col_ratio=9.0, ratio=9.0)], 1),
        ([row(quantity="reduce dense", einconv_ratio=2.0)], 1),
        ([row(quantity="reduce dense", ours_mib=1.2)], 1),
        ([row(ours_mib=2.1)], 1),
        ([row(error=1e-4)], 1),
        ([row(network="transposed", stride=2, im2col_ratio=9.0)], 1),
        ([row(network="transposed", stride=1, im2col_ratio=9.0)], 0),
    ],
)
def test_bars(benchmark: Any, rows: list[dict[str, Any]], missed: int) -> None:
    assert sum(not met for *_, met in benchmark["bars"](rows)) == missed


@pytest.mark.parametrize("name", TRANSPOSED)
def test_the_unfolded_transposed_convolution(name: str) -> None:
    """The peer that transposed layers are compared with computes what brute force does."""
    dims, channels, size, *rest = TRANSPOSED[name]
    torch.manual_seed(0)
    module = transposed_module((dims, min(channels, 3), min(size, 4), *rest)).double()
    x = torch.randn(2, min(channels, 3), *[min(size, 4)] * dims, dtype=torch.float64)
    problem = Problem("", name, "", module, x, "expand", "dense")
    torch.testing.assert_close(im2col(problem)(), oracle.input_factor(module, x))
    assert einconv_simplified(problem) is None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_peers_compute_the_factor(approx: str, structure: str, groups: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 2, (3, 2), 2, 1, groups=groups, bias=False).double()
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    problem = Problem("", "", "", module, x, approx, structure)
    expected = oracle.input_factor(module, x, approx, structure)
    torch.testing.assert_close(im2col(problem)(), expected)
    reference = einconv_simplified(problem)
    if reference is not None:
        torch.testing.assert_close(reference(), expected)
