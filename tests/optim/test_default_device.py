"""Training while new tensors go to another device by default."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from oracles.loops import fit, weights
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights
from tnkfac import KFAC, SINGD

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

CASES: dict[str, Any] = {
    "diagonal": lambda p: SINGD(p, structures="diagonal"),
    "dense": lambda p: SINGD(p, structures="dense", T=2),
    "grafting of AdamW": lambda p: SINGD(p, grafting="adam"),
    "auto, reduce": lambda p: SINGD(p, kfac_approx="reduce"),
    "KFAC": lambda p: KFAC(p, inv_update_steps=2),
    "KFAC classic": lambda p: KFAC(p, damping=1e-2),
}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A device without numbers, with which everything that meets the model's would fail."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", CASES)
def test_the_default_device_does_not_matter(name: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        with torch.device("cpu"):
            model = fixed_weights(AllLayers())
            batches = [all_layers_batch(seed) for seed in range(4)]
        with torch.device(device):
            optimizer = CASES[name](model.parameters())
            fit(model, optimizer, batches)
            again = CASES[name](model.parameters())
            again.load_state_dict(optimizer.state_dict())
        found.append(weights(model))
        devices = {v.device.type for s in again.state.values() for v in s.values()}
        assert devices == {"cpu"}
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key
