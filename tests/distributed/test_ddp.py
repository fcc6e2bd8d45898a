"""Processes that train one model with DistributedDataParallel, on one machine."""

from pathlib import Path

import pytest
import torch.distributed as dist

from distributed.launching import HERE, python, scenarios
from oracles.loops import fit
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights
from tnkfac import SINGD


def test_all_scenarios(tmp_path: Path) -> None:
    """Each is named in ``ranks.py``; in processes of torch.multiprocessing, first two, then four.

    Those that torchrun starts are in ``test_faults.py``.
    """
    text = python(str(HERE / "ranks.py"), str(tmp_path), "2", "4")
    assert scenarios("ranks.py") == 20
    assert text.count(" holds") == 2 * 20, text


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it look for one."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective on one device")

    for name in ("all_reduce", "init_process_group", "new_group", "broadcast", "all_gather"):
        monkeypatch.setattr(dist, name, refuse)
    model = fixed_weights(AllLayers())
    fit(model, SINGD(model.parameters(), T=1), [all_layers_batch(seed) for seed in range(2)])
    assert not dist.is_initialized()
