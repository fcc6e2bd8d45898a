"""The study of randomised backpropagation: it runs, and its table says what theory says."""

import csv
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "crs_study.py"


def test_the_study_runs_and_space_beats_channels(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main = runpy.run_path(str(SCRIPT))["main"]
        assert main(["--draws", "2", "--batch", "2", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    with (tmp_path / "crs-study.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["kept fraction"] for row in rows] == [0.1, 0.25, 0.5, 0.75, 0.9]
    for row in rows:
        assert row["channels"] == pytest.approx(row["sqrt(1/p - 1)"], rel=0.35)
        assert row["space"] < row["channels"]
    assert (tmp_path / "crs-study.png").stat().st_size > 10_000
