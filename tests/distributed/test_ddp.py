"""Processes that train one model with DistributedDataParallel, on one machine."""

from pathlib import Path

import pytest
import torch.distributed as dist

from distributed.launching import HERE, launch, python, scenarios
from oracles.loops import fit
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights
from tnkfac import SINGD


@pytest.mark.parametrize("world", [2, 4])
def test_all_scenarios(world: int) -> None:
    """Each is named in ``ranks.py``."""
    text = launch("ranks.py", world)
    assert text.count(" holds") == scenarios("ranks.py") == 19, text


def test_processes_of_torch_multiprocessing(tmp_path: Path) -> None:
    """They find each other through a file."""
    chosen = ["uneven_parts_give_the_mean_of_local_means", "a_layer_that_some_did_not_run"]
    text = python(str(HERE / "ranks.py"), str(tmp_path / "store"), "2", *chosen)
    assert text.count(" holds") == len(chosen), text


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it look for one."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective on one device")

    for name in ("all_reduce", "init_process_group", "new_group", "broadcast", "all_gather"):
        monkeypatch.setattr(dist, name, refuse)
    model = fixed_weights(AllLayers())
    fit(model, SINGD(model.parameters(), T=1), [all_layers_batch(seed) for seed in range(2)])
    assert not dist.is_initialized()
