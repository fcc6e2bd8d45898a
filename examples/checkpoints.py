"""Checkpoints of a training run that survive whatever ends it.

One folder for each, written by all processes through ``torch.distributed.checkpoint``. A folder
has its name only once it is complete, with the SHA-256 sum of every file, so that one that was cut
off or damaged is told from a whole one before anything is loaded. One that cannot be written is an
error in all processes, and those before it stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

SUMS = "sums.json"
PARTIAL, OLD = ".partial", ".old"
"""Endings of what is being written, and of what is being removed."""


class DamagedCheckpointError(Exception):
    """A checkpoint that is not what was saved."""


class NotWrittenError(Exception):
    """A file or folder that cannot be written."""


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

        Raises:
            NotWrittenError: If it cannot be written; checkpoints that are there stay.
        """
        final = self.folder / f"step_{step:09d}"
        partial = final.with_suffix(PARTIAL)
        in_first(final, self.prepare)
        in_first(final, partial.mkdir)
        try:
            states = _states(model, optimizer, others)
            dcp.save(states, checkpoint_id=str(partial), no_dist=_alone())
            in_first(final, lambda: self._complete(partial, final))
        except (CheckpointException, NotWrittenError) as error:
            if _rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, NotWrittenError):
                raise
            raise NotWrittenError(f"{final} cannot be written: {_reason(error, final)}.") from error
        return final

    def prepare(self) -> None:
        """Make the folder, and remove what was being written or removed when a run ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob(f"*{PARTIAL}"), *self.folder.glob(f"*{OLD}")]:
            shutil.rmtree(path)

    def _complete(self, partial: Path, final: Path) -> None:
        """Give a checkpoint its name, and remove those that it makes outdated."""
        files = sorted(path for path in partial.iterdir() if path.is_file())
        sums = {path.name: _sum(path) for path in files}
        (partial / SUMS).write_text(json.dumps(sums), encoding="utf-8")
        for path in [*files, partial / SUMS, partial]:
            _to_disk(path)
        found = sorted({*self.found(), final})
        place = found.index(final)  # later ones are damaged, or of a run that was begun anew
        outdated = [*found[: max(0, place + 1 - self.keep)], *found[place + 1 :]]
        if final.exists():
            final.rename(final.with_suffix(OLD))
        partial.rename(final)
        _to_disk(self.folder)
        for path in outdated:  # of which none is to be half there under its name
            path.rename(path.with_suffix(OLD))
        self.prepare()

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


def in_first(path: Path, work: Callable[[], Any]) -> None:
    """Do something with files in the first process while the others wait; all call this.

    Raises:
        NotWrittenError: If that cannot be done; in all processes, and names the path.
    """
    texts = [""]
    if _rank() == 0:
        try:
            with writing(path):
                work()
        except NotWrittenError as error:
            texts = [str(error)]
    if not _alone():
        dist.broadcast_object_list(texts)
    if texts[0]:
        raise NotWrittenError(texts[0])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what could not be written, and why.

    Raises:
        NotWrittenError: In the place of an error of the system, or of torch while it writes.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) or _cause(error):
            raise NotWrittenError(f"{path} cannot be written: {_reason(error, path)}.") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written that takes its name, and the place of another, once it is complete."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _cause(error: BaseException | None) -> OSError | None:
    """The error of the system behind one of torch."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _reason(error: BaseException, path: Path) -> str:
    """Why something could not be written, in a line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    found = _cause(error)
    if found is None:  # other processes are told what torch has made of it
        return f"{' '.join(str(error).split())} ({_free(path)} MB are free there)"
    where = "" if found.filename in (None, str(path)) else f" ({found.filename})"
    return (found.strerror or str(found)) + where


def _free(path: Path) -> int:
    """Megabytes on the disc of something that may not be there yet."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free >> 20


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
        try:
            found = _sum(path / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{path}: {name} cannot be read ({error}).") from error
        if found != expected:
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
