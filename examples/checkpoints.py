"""Checkpoints of a training run that survive whatever ends it.

One folder for each, written by all processes through ``torch.distributed.checkpoint``. A folder
has its name only once it is complete, with the SHA-256 sum of every file, so that one that was cut
off or damaged is told from a whole one before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

SUMS = "sums.json"


class DamagedCheckpointError(Exception):
    """A checkpoint that is not what was saved."""


class Checkpoints:
    """The checkpoints of a run, the newest of which can be gone on with.

    Args:
        folder: Where they are.
        keep: How many are kept; two at least, so that there is one before the newest.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        """See the class."""
        if keep < 2:
            raise ValueError(f"keep: got {keep}. Supported: at least 2.")
        self.folder = Path(folder)
        self.keep = keep

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, /, **others: Any
    ) -> Path:
        """Save all there is to go on with; every process calls this.

        Args:
            step: Number of steps done, which names the checkpoint.
            model: The model, wrapped or not.
            optimizer: Its optimizer.
            **others: What else has a ``state_dict``, and plain values, equal in all processes.
        """
        final = self.folder / f"step_{step:09d}"
        partial = final.with_suffix(".partial")
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
        _wait()
        dcp.save(_states(model, optimizer, others), checkpoint_id=str(partial), no_dist=_alone())
        if _rank() == 0:
            files = sorted(path for path in partial.iterdir() if path.is_file())
            sums = {path.name: _sum(path) for path in files}
            (partial / SUMS).write_text(json.dumps(sums), encoding="utf-8")
            for path in [*files, partial / SUMS, partial]:
                _to_disk(path)
            partial.rename(final)
            _to_disk(self.folder)
            for old in self.found()[: -self.keep]:
                shutil.rmtree(old)
        _wait()
        return final

    def found(self) -> list[Path]:
        """All complete checkpoints, the newest last."""
        return sorted(path for path in self.folder.glob("step_*") if path.suffix == "")

    def newest(self) -> Path | None:
        """The newest one that is what was saved; says which ones are not."""
        for path in reversed(self.found()):
            try:
                check(path)
            except DamagedCheckpointError as error:
                if _rank() == 0:
                    print(f"{error} Going on with the one before.", flush=True)
            else:
                return path
        return None

    def load(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, /, **others: Any
    ) -> dict[str, Any]:
        """Restore everything from one checkpoint; every process calls this.

        Args:
            path: The checkpoint.
            model: As for :meth:`save`.
            optimizer: Likewise.
            **others: Likewise; plain values are what they are to be if they were not saved.

        Returns:
            The plain values.

        Raises:
            DamagedCheckpointError: If it is not what was saved; nothing is changed then.
        """
        check(path)
        states = _states(model, optimizer, others)
        dcp.load(states, checkpoint_id=str(path), no_dist=_alone())
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
        values = {}
        for name, thing in others.items():
            if hasattr(thing, "load_state_dict"):
                thing.load_state_dict(states["others"][name])
            else:
                values[name] = states["others"][name]
        _restore_randomness(states[f"random_{_rank()}"])
        return values


def check(path: Path) -> None:
    """Compare every file with its sum.

    Raises:
        DamagedCheckpointError: If one is missing, cut off or changed; the message names it.
    """
    try:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: {SUMS} cannot be read ({error}).") from error
    for name, expected in sums.items():
        if not (path / name).is_file():
            raise DamagedCheckpointError(f"{path}: {name} is missing.")
        if (path / name).stat().st_size != expected["bytes"]:
            size = (path / name).stat().st_size
            raise DamagedCheckpointError(
                f"{path}: {name} has {size} bytes, but {expected['bytes']} were saved."
            )
        if _sum(path / name) != expected:
            raise DamagedCheckpointError(f"{path}: {name} is not what was saved (SHA-256 differs).")


def _states(model: nn.Module, optimizer: Any, others: dict[str, Any]) -> dict[str, Any]:
    first, second = get_state_dict(model, optimizer)
    rest = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in others.items()}
    own = {f"random_{_rank()}": _randomness()}
    return {"model": first, "optimizer": second, "others": rest, **own}


def _randomness() -> dict[str, Any]:
    """Where all generators of this process are."""
    found = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _restore_randomness(saved: dict[str, Any]) -> None:
    random.setstate(_as_tuples(saved["python"]))
    np.random.set_state(_as_tuples(saved["numpy"]))
    torch.set_rng_state(saved["torch"])
    if "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"])


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _sum(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank() -> int:
    return 0 if _alone() else dist.get_rank()


def _alone() -> bool:
    return not dist.is_initialized()


def _wait() -> None:
    if not _alone():
        dist.barrier()
