"""Files of earlier versions load, and training goes on as with the version that has saved them."""

from pathlib import Path

import pytest
import torch

from oracles.record_version import CASES, network, train

RECORDS = torch.load(Path(__file__).parents[1] / "data/version_0_1.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_0_1(name: str) -> None:
    """Up to rounding: sums are formed in another order since."""
    record, model = RECORDS[name], network()
    optimizer = CASES[name](model.parameters())
    model.load_state_dict(record["model"])
    optimizer.load_state_dict(record["optimizer"])
    train(model, optimizer, range(4, 9))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, record["after"][key], rtol=1e-11, atol=1e-13)
