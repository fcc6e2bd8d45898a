"""Processes that train one model with DistributedDataParallel, on one machine."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from oracles.loops import fit
from oracles.zoo import AllLayers, all_layers_batch, fixed_weights
from tnkfac import SINGD

HERE = Path(__file__).parent
LIMIT = 200
"""Seconds after which all processes of a test are killed."""


def launch(script: str, world: int) -> str:
    """Run a script under torchrun; return what it prints.

    The processes are a group of their own, and none of them outlives this call.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", str(HERE / script)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"},
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, text[-5000:]
    return text


@pytest.mark.parametrize("world", [2, 4])
def test_all_scenarios(world: int) -> None:
    text = launch("ranks.py", world)
    source = (HERE / "ranks.py").read_text(encoding="utf-8")
    assert text.count(" holds") == source.count("\n@scenario\n") == 9, text


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it look for one."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective on one device")

    for name in ("all_reduce", "init_process_group", "new_group", "broadcast", "all_gather"):
        monkeypatch.setattr(dist, name, refuse)
    model = fixed_weights(AllLayers())
    fit(model, SINGD(model.parameters(), T=1), [all_layers_batch(seed) for seed in range(2)])
    assert not dist.is_initialized()
    assert not torch.distributed.is_torchelastic_launched()
