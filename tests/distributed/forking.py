"""Processes that need not import everything again: copies of one that has."""

import gc
import os
from collections.abc import Callable, Sequence

import torch
import torch._dynamo  # wrappers import it

Run = Callable[..., None]


def start(run: Run, worlds: Sequence[int], folder: str) -> None:
    """Run a function in every process of one group after the other.

    Args:
        run: Takes the arguments of ``init_process_group``.
        worlds: Number of processes of every group.
        folder: Where they find each other; it is made.
    """
    torch.set_num_threads(1)
    os.makedirs(folder, exist_ok=True)
    gc.freeze()  # optimizers look for wrappers among all objects
    for place, world in enumerate(worlds):
        store = f"file://{folder}/store{place}"
        arguments = (run, store, world)
        torch.multiprocessing.start_processes(_forked, arguments, nprocs=world, start_method="fork")


def _forked(rank: int, run: Run, store: str, world: int) -> None:
    run(init_method=store, rank=rank, world_size=world)
