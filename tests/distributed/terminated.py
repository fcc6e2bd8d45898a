"""A process that is ended at every place at which saving a checkpoint touches its folder."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from checkpoints import Checkpoints
from torch import nn

from tnkfac import SINGD


def built() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = SINGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def ends_at(place: int, folder: Path) -> None:
    """Be sent a signal before the folder is touched for the so-manieth time."""
    left = [place]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        removed = event in ("os.remove", "os.rmdir")  # names relative to an open folder
        opened = event in ("open", "os.mkdir", "os.rename") and str(folder) in str(arguments[0])
        if removed or opened:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGTERM)

    sys.addaudithook(look)


def main(folder: Path) -> None:
    """Save twice, then a third time and be ended at one place after the other."""
    torch.set_num_threads(1)
    model, optimizer = built()
    before = Checkpoints(folder / "before")
    for step in (1, 2):
        before.save(step, model, optimizer, step=step)
    kept = []
    for place in range(1000):
        here = folder / str(place)
        shutil.copytree(before.folder, here)
        checkpoints = Checkpoints(here)
        child = os.fork()
        if not child:
            ends_at(place, here)
            checkpoints.save(3, model, optimizer, step=3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGTERM)
        newest = checkpoints.newest()
        assert newest is not None
        step = checkpoints.load(newest, *built(), step=0)["step"]
        assert step == int(newest.name[-1])
        kept.append(step)
        checkpoints.save(3, model, optimizer, step=3)
        names = sorted(path.name for path in here.iterdir())
        assert names == ["step_000000002", "step_000000003"], (place, names)
        if status == 0:
            break
        shutil.rmtree(here)
    assert kept == sorted(kept)
    assert set(kept) == {2, 3}
    print(f"ended at {len(kept) - 1} places: {kept.count(2)} before and {kept.count(3)} after")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
